"""Errors that a user can fix: `main` prints them in one line and leaves with exit code 2."""


class UserError(Exception):
  """Invalid input. The message names the value, what was expected and what to do.

  It is one line, whatever the value is.
  """

  def __str__(self) -> str:
    return ''.join(
      c if c.isprintable() else c.encode('unicode_escape').decode() for c in super().__str__()
    )


class NonFiniteError(UserError):
  """A loss or gradient is NaN or infinite. The message names it and the step."""


def one_line(error: BaseException) -> str:
  """Kind and beginning of another library's error, to be quoted in a message."""
  return f'{type(error).__name__}: {" ".join(str(error).split())[:160]}'

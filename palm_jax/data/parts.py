"""What folders, files and splits of a data set are called that are a part of it, in any case."""

from collections.abc import Iterable, Sequence

TRAIN = 'train', 'training'
TESTS = 'test', 'testing', 'validation', 'val', 'valid'  # the first that is there is the test part


def first(names: Iterable[str], called: Sequence[str]) -> str:
  """Of the names the one that is the first of `called` that is there; '' where there is none."""
  there = {name.lower(): name for name in names}
  return next((there[name] for name in called if name in there), '')


def is_part(name: str) -> bool:
  """Whether it is one of those names."""
  return name.lower() in TRAIN + TESTS

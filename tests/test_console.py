"""What a run says on a terminal."""

import contextlib
import io
import logging
import os
import re
import sys

import pytest

from palm_jax.base import console
from palm_jax.base.metrics import Progress


def say(handler, level, text, **kinds):
  record = logging.LogRecord('palm', level, __file__, 1, text, None, None)
  vars(record).update(kinds)
  handler.emit(record)


def shown(text):
  """What stands on the screen at last: lines, colours left out."""
  text = re.sub(r'\x1b\[\d*m', '', text)
  return [line.rpartition('\r\x1b[K')[2] for line in text.split('\n')]


def test_progress_is_one_line_that_moves():
  out = io.StringIO()
  handler = console.Terminal(out, columns=40)
  say(handler, logging.INFO, 'data: digits')
  for step in (1, 2):
    say(handler, logging.INFO, f'pretrain  {step}/9 env steps {"x" * 90}', progress=True)
  assert out.getvalue().count('\n') == 1
  say(handler, logging.WARNING, 'the policy is a cone')
  say(handler, logging.INFO, 'pretrain  3/9', progress=True)
  handler.rest()
  handler.rest()
  lines = shown(out.getvalue())
  assert lines == ['data: digits', 'warning: the policy is a cone', 'pretrain  3/9', '']
  assert '\x1b[33mwarning\x1b[0m' in out.getvalue()
  widest = max(len(re.sub(r'\x1b\[\w+', '', line)) for line in re.split('[\r\n]', out.getvalue()))
  assert widest < 40


def test_no_colours():
  out = io.StringIO()
  handler = console.Terminal(out, colours=False)
  say(handler, logging.ERROR, 'broken')
  assert out.getvalue() == 'error: broken\n'


def test_a_closed_terminal_stops_nobody():
  """As one whose connection broke: the kernel answers every write with EIO."""
  ours, theirs = os.openpty()
  # What was not written fails again as the stream is closed.
  with contextlib.suppress(OSError), os.fdopen(theirs, 'w') as stream:
    handler = console.Terminal(stream)
    say(handler, logging.INFO, 'pretrain  1/9', progress=True)
    os.close(ours)
    with pytest.raises(OSError):
      os.write(theirs, b'x')
    say(handler, logging.INFO, 'pretrain  2/9', progress=True)
    handler.rest()
    lived = True
  assert lived


def test_errors_bring_their_traceback():
  out = io.StringIO()
  handler = console.Terminal(out)
  try:
    raise ValueError('inside')
  except ValueError:
    say(handler, logging.ERROR, 'broken', exc_info=sys.exc_info())
  assert 'ValueError: inside' in out.getvalue()


@pytest.mark.parametrize('tty', [True, False])
def test_only_a_terminal_is_written_to_so(tty, monkeypatch):
  stream = io.StringIO()
  stream.isatty = lambda: tty
  monkeypatch.setattr(sys, 'stderr', stream)
  monkeypatch.setattr(console, '_terminal', None)
  monkeypatch.setenv('TERM', 'xterm')
  root = logging.getLogger()
  before, level = list(root.handlers), root.level
  try:
    console.start()
    progress = Progress('job', 10, 'steps', every_seconds=0.0)
    root.setLevel(logging.INFO)
    for step in (0, 5, 10):
      progress.update(step, dict(loss=0.5))
  finally:
    root.handlers[:] = before
    root.setLevel(level)
  text = stream.getvalue()
  if tty:
    assert text.count('\r\x1b[K') == 2 and text.count('\n') == 1  # the last line stays
    assert shown(text)[0].startswith('job  10/10 steps  100.0%') and 'loss 0.5' in text
  else:
    assert not text

# SPDX-License-Identifier: Apache-2.0
"""Output of Orbax's and TensorStore's threads, which repeats a raised error."""

import contextlib
import gc
import logging
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

_LOGGERS = ('absl', 'asyncio')
_LIBRARIES = ('orbax', 'tensorstore', 'asyncio', 'Event loop is closed')
# The message of a callback of TensorStore whose event loop has ended.
_LATE = 'Event loop is closed'


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Keeps tracebacks of Orbax's threads off stderr within the block.

  The caller is raised the error itself. Where that happens, callbacks that
  come after the block are ignored too.
  """
  loggers = [logging.getLogger(name) for name in _LOGGERS]
  levels = [logger.level for logger in loggers]
  hooks = threading.excepthook, sys.unraisablehook
  for logger in loggers:
    logger.setLevel(logging.CRITICAL)
  threading.excepthook, sys.unraisablehook = map(_without_libraries, hooks)
  failed = True
  try:
    yield
    failed = False
  finally:
    if failed:
      # Futures that nobody awaited are reported when they are collected.
      gc.collect()
    threading.excepthook, sys.unraisablehook = hooks
    for logger, level in zip(loggers, levels, strict=True):
      logger.setLevel(level)
    if failed:
      _ignore_late_callbacks()


def _without_libraries(hook: Callable[[Any], None]) -> Callable[[Any], None]:
  """A hook that passes on the errors that are not of the libraries."""

  def filtered(error: Any) -> None:
    frames = traceback.extract_tb(error.exc_traceback)
    texts = [frame.filename for frame in frames]
    # An unawaited future has no frame; its message names the library.
    texts.append(f'{error.exc_value!r} {getattr(error, "err_msg", "")}')
    if not any(name in text for text in texts for name in _LIBRARIES):
      hook(error)

  return filtered


def _ignore_late_callbacks() -> None:
  before = sys.unraisablehook
  if getattr(before, 'ignores_late_callbacks', False):
    return

  def hook(unraisable: Any) -> None:
    if _LATE not in str(unraisable.exc_value):
      before(unraisable)

  hook.ignores_late_callbacks = True
  sys.unraisablehook = hook

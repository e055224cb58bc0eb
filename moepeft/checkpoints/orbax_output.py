# SPDX-License-Identifier: Apache-2.0
"""Suppresses output of Orbax's threads that repeats a raised error."""

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
# The message of a TensorStore callback whose event loop has ended.
_CLOSED_LOOP = 'Event loop is closed'


@contextlib.contextmanager
def suppress_tracebacks() -> Iterator[None]:
  """Suppresses tracebacks of Orbax's threads on stderr within the block.

  The error itself is raised to the caller. After an error, late callbacks are
  ignored beyond the block, too.
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
      # Python reports unawaited futures when they are garbage-collected.
      gc.collect()
    threading.excepthook, sys.unraisablehook = hooks
    for logger, level in zip(loggers, levels, strict=True):
      logger.setLevel(level)
    if failed:
      _ignore_late_callbacks()


def _without_libraries(hook: Callable[[Any], None]) -> Callable[[Any], None]:
  """A hook that ignores errors of the libraries."""

  def filtered_hook(error: Any) -> None:
    frames = traceback.extract_tb(error.exc_traceback)
    texts = [frame.filename for frame in frames]
    # An unawaited future has no frame; its message names the library.
    texts.append(f'{error.exc_value!r} {getattr(error, "err_msg", "")}')
    if not any(name in text for text in texts for name in _LIBRARIES):
      hook(error)

  return filtered_hook


def _ignore_late_callbacks() -> None:
  previous_hook = sys.unraisablehook
  if getattr(previous_hook, 'ignores_late_callbacks', False):
    return

  def hook(unraisable: Any) -> None:
    if _CLOSED_LOOP not in str(unraisable.exc_value):
      previous_hook(unraisable)

  hook.ignores_late_callbacks = True
  sys.unraisablehook = hook

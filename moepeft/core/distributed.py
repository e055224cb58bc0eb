# SPDX-License-Identifier: Apache-2.0
"""Runs on several processes: initialization, exit and output."""

import contextlib
import ctypes
import json
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from moepeft.core import files, process_barrier

# The range of --distributed_timeout, in seconds.
SHORTEST, LONGEST = 10, 86_400
# Words in the errors of collectives and of JAX's coordination service after a
# process was lost.
_LOST_PEER = (
  'Gloo',
  'NCCL',
  'UNAVAILABLE',
  'DEADLINE_EXCEEDED',
  'coordination service',
  'CoordinationService',
  'heartbeat',
  'Connection reset by peer',
  'Connection closed by peer',
)
_EXIT_CODE = 2


def join(cluster: str, timeout: int = 300) -> None:
  """Joins the processes of a run; only the first one prints after that.

  Args:
    cluster: 'auto' on a cluster that JAX detects, else
      'HOST:PORT,PROCESSES,NUMBER' with the address of process 0.
    timeout: seconds to wait for all processes, and after which a process that
      does not answer counts as lost.

  Raises:
    ValueError: `cluster` has another syntax, or a process is missing.
  """
  address, *numbers = cluster.split(',')
  has_numbers = len(numbers) == 2 and all(map(str.isdecimal, numbers))
  port = address.rpartition(':')[2]
  if cluster != 'auto' and not (
    has_numbers and port.isdecimal() and 0 < int(port) < 65_536
  ):
    raise ValueError(
      f"--distributed is 'auto' or HOST:PORT,PROCESSES,NUMBER; got {cluster!r}"
    )
  arguments: tuple = ()
  if cluster == 'auto':
    print(
      f'waiting for the other processes, for at most {timeout} s',
      file=sys.stderr,
    )
  else:
    count, number = map(int, numbers)
    if not number < count:
      raise ValueError(
        f'--distributed={cluster} is number {number} of {count}; the numbers '
        f'are 0 to {count - 1}'
      )
    process_barrier.wait_for_all(address, count, number, timeout)
    arguments = (address, count, number)
  _set_abort_message(
    f'the processes of --distributed={cluster} did not connect within '
    f'{timeout} s (--distributed_timeout), or one was lost; start all of them '
    'again'
  )
  try:
    jax.distributed.initialize(
      *arguments,
      initialization_timeout=timeout,
      heartbeat_timeout_seconds=timeout,
    )
  except (ValueError, RuntimeError) as e:
    reason = str(e).splitlines()[0]
    raise ValueError(
      f'the processes of --distributed={cluster} cannot connect ({reason})'
    ) from None
  _set_abort_message(_lost_message(timeout))
  if not first():
    sys.stdout = open(os.devnull, 'w')


def _lost_message(timeout: int) -> str:
  return (
    f'process {jax.process_index()} of {jax.process_count()} exits, as another '
    f'one was lost or did not answer for {timeout} s (--distributed_timeout); '
    'start all of them again, and the run resumes from its latest checkpoint'
  )


# The C library has only the address of a handler, so this keeps them alive.
_handlers: list[Any] = []


def _set_abort_message(message: str) -> None:
  """Sets a message and exit code 2 for `abort`.

  JAX's coordination service calls `abort` in a thread of its own as soon as
  another process is lost. A handler of Python's `signal` would never run, so
  this one is registered with the C library.
  """
  line = f'error: {message}\n'.encode()

  def exit_process(number: int) -> None:
    del number
    os.write(2, line)
    os._exit(_EXIT_CODE)

  handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(exit_process)
  _handlers.append(handler)
  libc = ctypes.CDLL(None)
  libc.signal.restype = ctypes.c_void_p
  libc.signal.argtypes = (ctypes.c_int, type(handler))
  libc.signal(signal.SIGABRT, handler)


@contextlib.contextmanager
def exit_on_error(timeout: int) -> Iterator[None]:
  """Exits at once after an error inside, if there are several processes.

  `sys.exit` would wait for the other processes, which wait for this one.
  """
  try:
    yield
  except Exception as e:
    if jax.process_count() == 1:
      raise
    text = str(e)
    is_lost = any(word in text for word in _LOST_PEER)
    if not is_lost and not isinstance(e, (ValueError, OSError)):
      # A bug is shown with its traceback.
      sys.excepthook(type(e), e, e.__traceback__)
    else:
      message = _lost_message(timeout) if is_lost else text
      print(f'error: {message}', file=sys.stderr)
    sys.stderr.flush()
    os._exit(_EXIT_CODE)


def first() -> bool:
  """Whether this is process 0, which prints and writes for all."""
  return jax.process_index() == 0


def gather_positions(position: np.ndarray) -> tuple[tuple[int, int], ...]:
  """The position of every process in its data; `position` is int [2]."""
  positions = multihost_utils.process_allgather(position).reshape(-1, 2)
  return tuple((int(window), int(row)) for window, row in positions)


def position_of_process(
  positions: tuple[tuple[int, int], ...],
) -> tuple[int, int]:
  """This process's position among those in a checkpoint.

  Raises:
    ValueError: the checkpoint has another number of processes.
  """
  if len(positions) != jax.process_count():
    raise ValueError(
      f'the checkpoint is of {len(positions)} processes, and '
      f'{jax.process_count()} would read other examples; resume with as many '
      'processes'
    )
  return positions[jax.process_index()]


def agree(flag: bool, now: bool) -> bool:
  """Whether the flag is set in any process.

  Args:
    now: whether several processes communicate at this call; else False.
  """
  if jax.process_count() == 1:
    return flag
  return now and bool(np.any(multihost_utils.process_allgather(flag)))


def write_json(path: str, value: Any) -> None:
  """Writes a file atomically, in process 0 only."""
  if not first():
    return
  files.write_text(path, json.dumps(value, indent=2))

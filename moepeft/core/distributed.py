# SPDX-License-Identifier: Apache-2.0
"""Several processes as one run: they come together, and the first writes."""

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

# Seconds that --distributed_timeout may be.
SHORTEST, LONGEST = 10, 86_400
# As collectives of CPUs and GPUs, and JAX's coordination, say that a peer is
# gone.
_LOST = (
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
_CODE = 2


def join(cluster: str, timeout: int = 300) -> None:
  """Makes this process one of several; only the first goes on to print.

  Args:
    cluster: 'auto' on a cluster that JAX knows, else
      'HOST:PORT,PROCESSES,NUMBER', the address being of the first process.
    timeout: seconds to wait for all to come, and after which one that is
      silent counts as lost.

  Raises:
    ValueError: `cluster` is not of the form, or they do not come together.
  """
  address, *numbers = cluster.split(',')
  counted = len(numbers) == 2 and all(map(str.isdecimal, numbers))
  port = address.rpartition(':')[2]
  if cluster != 'auto' and not (
    counted and port.isdecimal() and 0 < int(port) < 65_536
  ):
    raise ValueError(
      f"--distributed is 'auto' or HOST:PORT,PROCESSES,NUMBER; got {cluster!r}"
    )
  arguments: tuple = ()
  if cluster == 'auto':
    print(
      f'waiting for the other processes of the cluster, for {timeout} s at '
      'most',
      file=sys.stderr,
    )
  else:
    count, number = map(int, numbers)
    if not number < count:
      raise ValueError(
        f'--distributed={cluster} is number {number} of {count}; they are '
        f'numbered from 0 to {count - 1}'
      )
    process_barrier.wait_for_all(address, count, number, timeout)
    arguments = (address, count, number)
  _say_at_abort(
    f'the processes of --distributed={cluster} did not come together in '
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
      f'the processes of --distributed={cluster} do not come together '
      f'({reason})'
    ) from None
  _say_at_abort(_lost(timeout))
  if not first():
    sys.stdout = open(os.devnull, 'w')


def _lost(timeout: int) -> str:
  return (
    f'process {jax.process_index()} of {jax.process_count()} ends, as another '
    f'one was lost or did not answer for {timeout} s (--distributed_timeout); '
    'start all of them again, and the run goes on from its latest checkpoint'
  )


# Kept, as the C library has the address of the last one only.
_handlers: list[Any] = []


def _say_at_abort(sentence: str) -> None:
  """Lets `abort` end the process with a sentence and exit code 2.

  JAX's coordination ends a process by `abort`, from a thread of its own, as
  soon as it knows that another one was lost. Handlers of Python's `signal`
  would never run then, so the handler is the C library's.
  """
  line = f'error: {sentence}\n'.encode()

  def end(number: int) -> None:
    del number
    os.write(2, line)
    os._exit(_CODE)

  handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
  _handlers.append(handler)
  libc = ctypes.CDLL(None)
  libc.signal.restype = ctypes.c_void_p
  libc.signal.argtypes = (ctypes.c_int, type(handler))
  libc.signal(signal.SIGABRT, handler)


@contextlib.contextmanager
def together(timeout: int) -> Iterator[None]:
  """Within it an error of one of several processes ends this one at once.

  An exit by `sys.exit` would wait for the others, which wait for this one.
  """
  try:
    yield
  except Exception as e:
    if jax.process_count() == 1:
      raise
    text = str(e)
    lost = any(word in text for word in _LOST)
    if not lost and not isinstance(e, (ValueError, OSError)):
      # A fault of the program keeps its traceback.
      sys.excepthook(type(e), e, e.__traceback__)
    else:
      sentence = _lost(timeout) if lost else text
      print(f'error: {sentence}', file=sys.stderr)
    sys.stderr.flush()
    os._exit(_CODE)


def first() -> bool:
  """Whether this process is the one that prints and writes."""
  return jax.process_index() == 0


def places(place: np.ndarray) -> tuple[tuple[int, int], ...]:
  """Every process's place in its data: int [2] -> a pair for each."""
  gathered = multihost_utils.process_allgather(place).reshape(-1, 2)
  return tuple((int(window), int(row)) for window, row in gathered)


def place_of_process(places: tuple[tuple[int, int], ...]) -> tuple[int, int]:
  """This process's of the places that a checkpoint holds.

  Raises:
    ValueError: there were more processes then, or fewer.
  """
  if len(places) != jax.process_count():
    raise ValueError(
      f'the checkpoint is of {len(places)} processes, here are '
      f'{jax.process_count()}, which would read other examples; go on with as '
      'many'
    )
  return places[jax.process_index()]


def agree(flag: bool, now: bool) -> bool:
  """Whether any process said it; of several they ask each other `now` only."""
  if jax.process_count() == 1:
    return flag
  return now and bool(np.any(multihost_utils.process_allgather(flag)))


def write_json(path: str, value: Any) -> None:
  """Writes a file, all of it or nothing, from the first process."""
  if not first():
    return
  files.write_text(path, json.dumps(value, indent=2))

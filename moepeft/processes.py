# SPDX-License-Identifier: Apache-2.0
"""Several processes as one run: they come together, and the first writes."""

import json
import os
import sys
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from moepeft.core import files


def join(how: str) -> None:
  """Makes this process one of several; only the first goes on to print.

  Args:
    how: 'auto' on a cluster that JAX knows, else 'HOST:PORT,PROCESSES,NUMBER',
      the address being of the first process.

  Raises:
    ValueError: `how` is not of the form, or they do not come together.
  """
  address, *numbers = how.split(',')
  counted = len(numbers) == 2 and all(map(str.isdigit, numbers))
  if how != 'auto' and not counted:
    raise ValueError(
      f"--distributed is 'auto' or HOST:PORT,PROCESSES,NUMBER; got {how!r}"
    )
  arguments = () if how == 'auto' else (address, *map(int, numbers))
  try:
    jax.distributed.initialize(*arguments)
  except (ValueError, RuntimeError) as e:
    reason = str(e).splitlines()[0]
    raise ValueError(
      f'the processes of --distributed={how} do not come together ({reason})'
    ) from None
  if not first():
    sys.stdout = open(os.devnull, 'w')


def first() -> bool:
  """Whether this process is the one that prints and writes."""
  return jax.process_index() == 0


def places(place: np.ndarray) -> tuple[tuple[int, int], ...]:
  """Every process's place in its data: int [2] -> a pair for each."""
  found = multihost_utils.process_allgather(place).reshape(-1, 2)
  return tuple((int(window), int(row)) for window, row in found)


def own(places: tuple[tuple[int, int], ...]) -> tuple[int, int]:
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


def agree(said: bool, now: bool) -> bool:
  """Whether any process said it; of several they ask each other `now` only."""
  if jax.process_count() == 1:
    return said
  return now and bool(np.any(multihost_utils.process_allgather(said)))


def write_json(path: str, value: Any) -> None:
  """Writes a file, all of it or nothing, from the first process."""
  if not first():
    return
  files.write_text(path, json.dumps(value, indent=2))

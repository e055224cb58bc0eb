# SPDX-License-Identifier: Apache-2.0
"""Batches in a fixed order, made ahead, with a position that can be saved.

Examples are encoded and packed in windows of `WINDOW`. A window is a pure
function of its number, so the stream is the same with any number of worker
processes, and two numbers say where in it a run stands.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from moepeft.core.types import Batch
from moepeft.data.batching.collators import Collator, Rows, make_model_collator
from moepeft.data.dataset import TrainingData
from moepeft.data.tokenizers.tokenizer import Tokenizer

WINDOW = 1024
# Batches that wait for the device.
_AHEAD = 2


class Windows(Protocol):
  """Rows of batches by windows of examples."""

  def open(self, number: int) -> Iterator[Rows]:
    """The windows from `number` on, without end."""


class ExampleWindows:
  """Windows of a dataset whose items can be had in any order."""

  def __init__(
    self,
    examples: grain.MapDataset,
    collator: Collator,
    shard: tuple[int, int] = (0, 1),
    workers: int = 0,
  ):
    """Reads every `shard[1]`-th window, in `workers` processes if any."""

    def window(number: int, part: Sequence) -> Rows:
      return collator.rows(number, collator.encode(part))

    windows = examples.batch(WINDOW, batch_fn=list).map_with_index(window)
    self._windows = windows[shard[0] :: shard[1]]
    self._workers = workers

  def open(self, number: int) -> Iterator[Rows]:
    serial = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    windows = self._windows[number:].to_iter_dataset(serial)
    if self._workers:
      # Grain reads absl's flags here, which nobody parsed in a notebook.
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
      options = grain.MultiprocessingOptions(num_workers=self._workers)
      windows = windows.mp_prefetch(options, _end_with_parent)
    return iter(windows)


def _end_with_parent(number: int, count: int) -> None:
  """Ends a worker process when its parent is killed."""
  del number, count
  parent = multiprocessing.parent_process()

  def wait() -> None:
    parent.join()
    os._exit(1)

  if parent is not None:
    threading.Thread(target=wait, daemon=True).start()


class StreamWindows:
  """Windows of encoded examples that come one after the other."""

  def __init__(
    self,
    stream: Callable[[int], Iterator[dict[str, np.ndarray]]],
    collator: Collator,
  ):
    """`stream(place)` gives {'inputs', 'targets'}, from a place on."""
    self._stream, self._form = stream, collator

  def open(self, number: int) -> Iterator[Rows]:
    examples = self._stream(number * WINDOW)
    while True:
      part = [next(examples) for _ in range(WINDOW)]
      pairs = [(e['inputs'], e['targets']) for e in part]
      yield self._form.rows(number, self._form.encode(pairs))
      number += 1


class _Batches(grain.DatasetIterator):
  """Cuts windows into batches; see `Loader`."""

  def __init__(self, windows: Windows, batch_size: int):
    super().__init__()
    self._source, self._batch_size = windows, batch_size
    self.set_state({'window': 0, 'row': 0})

  def __next__(self) -> Batch:
    parts, missing = [], self._batch_size
    while missing:
      if self._rows is None:
        self._rows = next(self._windows)
      count = len(next(iter(self._rows.values())))
      end = min(self._row + missing, count)
      parts.append({k: v[self._row : end] for k, v in self._rows.items()})
      missing -= end - self._row
      self._row = end
      if end == count:
        self._window, self._row, self._rows = self._window + 1, 0, None
    if len(parts) == 1:
      return parts[0]
    return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}

  def get_state(self) -> dict[str, int]:
    return {'window': self._window, 'row': self._row}

  def set_state(self, state: dict[str, int]) -> None:
    self._window, self._row = int(state['window']), int(state['row'])
    self._windows = self._source.open(self._window)
    self._rows = None


class _Dataset(grain.IterDataset):
  def __init__(self, windows: Windows, batch_size: int):
    super().__init__()
    self._arguments = windows, batch_size

  def __iter__(self) -> _Batches:
    return _Batches(*self._arguments)


class Loader:
  """An endless iterator of batches that a thread makes ahead."""

  def __init__(self, windows: Windows, batch_size: int):
    batches = _Dataset(windows, batch_size)
    self._batches = iter(
      grain.experimental.ThreadPrefetchIterDataset(
        batches, prefetch_buffer_size=_AHEAD
      )
    )

  def __iter__(self) -> 'Loader':
    return self

  def __next__(self) -> Batch:
    return next(self._batches)

  def position(self) -> np.ndarray:
    """The next batch's start: int64 [2], window and row in it."""
    state = self._batches.get_state()
    return np.array([state['window'], state['row']], np.int64)

  def seek(self, position: Any) -> None:
    """Makes the next batch the one that began at `position`."""
    window, row = (int(n) for n in position)
    self._batches.set_state({'window': window, 'row': row})

  def close(self) -> None:
    self._batches.close()


def make_loader(
  source: TrainingData,
  tokenizer: Tokenizer,
  data: ConfigDict,
  batch_size: int,
  seed: int,
  shard: tuple[int, int] = (0, 1),
  model: Any = None,
  collator: Collator | None = None,
) -> Loader:
  """The batches of a config.

  Args:
    batch_size: rows in a batch of this host.
    shard: (number of this host, hosts); each reads windows of its own.
    model: the model that they are for, or its config; None for an
      encoder-decoder.
    collator: of the batches; by default the model's.
  """
  collator = collator or make_model_collator(data, tokenizer, model, seed)
  if source.open_stream is not None:
    # A stream reads ahead, and by host, by itself.
    return Loader(StreamWindows(source.open_stream, collator), batch_size)
  windows = ExampleWindows(source.train, collator, shard, data.num_workers)
  return Loader(windows, batch_size)


def truncation_note(
  source: TrainingData, collator: Collator, rows: int = 500
) -> str:
  """A line that says how many of the first examples are too long, or ''.

  Examples of a stream are cut before they come here, so there is none.
  """
  if source.train is None:
    return ''
  cut = collator.count_cut([source.train[i] for i in range(rows)])
  if not cut:
    return ''
  return (
    f'{cut} of the first {rows} training examples are cut; raise '
    f'{collator.length_keys} to keep them whole\n'
  )

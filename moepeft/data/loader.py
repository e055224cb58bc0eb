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
_PREFETCHED_BATCHES = 2


class Windows(Protocol):
  """A source of windows: the rows of `WINDOW` encoded examples each."""

  def open(self, window: int) -> Iterator[Rows]:
    """Iterates over the rows of `window` and all windows after it."""


class ExampleWindows:
  """Windows of a dataset with random access."""

  def __init__(
    self,
    examples: grain.MapDataset,
    collator: Collator,
    shard: tuple[int, int] = (0, 1),
    workers: int = 0,
  ):
    """Reads every `shard[1]`-th window, in `workers` processes if any."""

    def make_rows(window: int, items: Sequence) -> Rows:
      return collator.rows(window, collator.encode(items))

    windows = examples.batch(WINDOW, batch_fn=list).map_with_index(make_rows)
    self._windows = windows[shard[0] :: shard[1]]
    self._workers = workers

  def open(self, window: int) -> Iterator[Rows]:
    serial = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    windows = self._windows[window:].to_iter_dataset(serial)
    if self._workers:
      # Grain reads absl's flags here, and a notebook never parses them.
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
      options = grain.MultiprocessingOptions(num_workers=self._workers)
      windows = windows.mp_prefetch(options, _end_with_parent)
    return iter(windows)


def _end_with_parent(worker: int, num_workers: int) -> None:
  """Ends a worker process when its parent is killed."""
  del worker, num_workers
  parent = multiprocessing.parent_process()

  def exit_after_parent() -> None:
    parent.join()
    os._exit(1)

  if parent is not None:
    threading.Thread(target=exit_after_parent, daemon=True).start()


class StreamWindows:
  """Windows of encoded examples that can only be read in order."""

  def __init__(
    self,
    open_stream: Callable[[int], Iterator[dict[str, np.ndarray]]],
    collator: Collator,
  ):
    """
    Args:
      open_stream: (index) -> {'inputs', 'targets'} of each example from that
        index on.
    """
    self._open_stream, self._collator = open_stream, collator

  def open(self, window: int) -> Iterator[Rows]:
    examples = self._open_stream(window * WINDOW)
    while True:
      window_examples = [next(examples) for _ in range(WINDOW)]
      pairs = [(e['inputs'], e['targets']) for e in window_examples]
      yield self._collator.rows(window, self._collator.encode(pairs))
      window += 1


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
        batches, prefetch_buffer_size=_PREFETCHED_BATCHES
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
  """Makes the loader of a config's training batches.

  Args:
    batch_size: rows in a batch of this host.
    shard: (this host, number of hosts); each host reads other windows.
    model: the model or its config; None for an encoder-decoder.
    collator: makes the batches; by default the model's collator.
  """
  collator = collator or make_model_collator(data, tokenizer, model, seed)
  if source.open_stream is not None:
    # A stream prefetches and shards by itself.
    return Loader(StreamWindows(source.open_stream, collator), batch_size)
  windows = ExampleWindows(source.train, collator, shard, data.num_workers)
  return Loader(windows, batch_size)


def truncation_note(
  source: TrainingData, collator: Collator, rows: int = 500
) -> str:
  """A line that says how many of the first examples are too long.

  It is '' where none is, and for a stream, which truncates as it reads.
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

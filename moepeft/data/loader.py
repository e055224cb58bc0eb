# SPDX-License-Identifier: Apache-2.0
"""Loads training batches in a reproducible order, with a resumable position.

Examples are encoded and packed in windows of `WINDOW_SIZE` examples. A window
is a pure function of its index, so the batches do not depend on the number of
worker processes, and a window and a row in it are the position of a run.
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

WINDOW_SIZE = 1024
_PREFETCHED_BATCHES = 2


class WindowSource(Protocol):
  """A sequence of windows; each is the rows of `WINDOW_SIZE` examples."""

  def iterate_from(self, window: int) -> Iterator[Rows]:
    """Yields the rows of each window, from the index `window` on."""


class ExampleWindows:
  """Windows of a dataset with random access."""

  def __init__(
    self,
    examples: grain.MapDataset,
    collator: Collator,
    shard: tuple[int, int] = (0, 1),
    workers: int = 0,
  ):
    """
    Args:
      shard: (i, n): reads the windows i, i + n, i + 2n, ...
      workers: the number of processes that encode windows; 0 for none.
    """

    def make_rows(window: int, items: Sequence) -> Rows:
      return collator.rows(window, collator.encode(items))

    windows = examples.batch(WINDOW_SIZE, batch_fn=list).map_with_index(
      make_rows
    )
    self._windows = windows[shard[0] :: shard[1]]
    self._workers = workers

  def iterate_from(self, window: int) -> Iterator[Rows]:
    no_threads = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    windows = self._windows[window:].to_iter_dataset(no_threads)
    if self._workers:
      # Grain reads absl's flags here, which are not parsed in a notebook.
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
      open_stream: (index) -> iterator over the examples from that index on,
        each {'inputs': ids, 'targets': ids}.
    """
    self._open_stream, self._collator = open_stream, collator

  def iterate_from(self, window: int) -> Iterator[Rows]:
    examples = self._open_stream(window * WINDOW_SIZE)
    while True:
      window_examples = [next(examples) for _ in range(WINDOW_SIZE)]
      pairs = [(e['inputs'], e['targets']) for e in window_examples]
      yield self._collator.rows(window, self._collator.encode(pairs))
      window += 1


class _BatchIterator(grain.DatasetIterator):
  """Cuts windows into batches; see `Loader`."""

  def __init__(self, windows: WindowSource, batch_size: int):
    super().__init__()
    self._window_source, self._batch_size = windows, batch_size
    self.set_state({'window': 0, 'row': 0})

  def __next__(self) -> Batch:
    parts, rows_needed = [], self._batch_size
    while rows_needed:
      if self._rows is None:
        self._rows = next(self._windows)
      count = len(next(iter(self._rows.values())))
      end = min(self._row + rows_needed, count)
      parts.append({k: v[self._row : end] for k, v in self._rows.items()})
      rows_needed -= end - self._row
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
    self._windows = self._window_source.iterate_from(self._window)
    self._rows = None


class _BatchDataset(grain.IterDataset):
  def __init__(self, windows: WindowSource, batch_size: int):
    super().__init__()
    self._windows, self._batch_size = windows, batch_size

  def __iter__(self) -> _BatchIterator:
    return _BatchIterator(self._windows, self._batch_size)


class Loader:
  """An endless iterator over batches, which a thread prefetches."""

  def __init__(self, windows: WindowSource, batch_size: int):
    batches = _BatchDataset(windows, batch_size)
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
    """Returns the start of the next batch: int64 [2], (window, row)."""
    state = self._batches.get_state()
    return np.array([state['window'], state['row']], np.int64)

  def seek(self, position: Any) -> None:
    """Continues with the batch that starts at `position`."""
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
    shard: (index of this host, number of hosts); hosts share out the windows.
    model: the model or its config, which selects the collator; None for an
      encoder-decoder.
    collator: the collator to use instead.
  """
  collator = collator or make_model_collator(data, tokenizer, model, seed)
  if source.open_stream is not None:
    # `open_stream` reads this host's shard and prefetches already.
    return Loader(StreamWindows(source.open_stream, collator), batch_size)
  windows = ExampleWindows(source.train, collator, shard, data.num_workers)
  return Loader(windows, batch_size)


def truncation_warning(
  source: TrainingData, collator: Collator, rows: int = 500
) -> str:
  """Returns a line with the number of truncated examples among the first rows.

  Returns '' if there is none, and for a stream, whose reader truncates.
  """
  if source.train is None:
    return ''
  count = collator.count_truncated([source.train[i] for i in range(rows)])
  if not count:
    return ''
  return (
    f'{count} of the first {rows} training examples are cut; raise '
    f'{collator.length_keys} to keep them whole\n'
  )

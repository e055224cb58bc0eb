# SPDX-License-Identifier: Apache-2.0
"""Token ids of a SeqIO task or mixture, as an endless stream.

Needs the extra `moepeft[seqio]`; TensorFlow is imported by the first call.
What a task does until it has ids of `inputs` and `targets` is SeqIO's and its
author's (arXiv:2203.17189). An element then gets moepeft's form, that of
`batching.cut`: both sides end with one EOS, which is added where the task adds
none (as P3's cached inputs) and kept where a side is cut.
"""

import contextlib
import dataclasses
import difflib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from moepeft.core.files import local_path

EOS = 1
SIDES = ('inputs', 'targets')


def import_seqio() -> tuple[Any, Any]:
  """The modules seqio and tensorflow.

  Raises:
    ValueError: they are not installed.
  """
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  try:
    import seqio
    import tensorflow as tf
  except ImportError as e:
    raise ValueError(
      f"SeqIO cannot be imported ({e}); pip install 'moepeft[seqio]'"
    ) from None
  # It would take the memory that JAX trains in. A TensorFlow that has begun
  # to use a device was told by its user to.
  with contextlib.suppress(RuntimeError):
    tf.config.set_visible_devices([], 'GPU')
  return seqio, tf


def is_registered(name: str) -> bool:
  """Whether a module that was imported has registered a task or mixture."""
  # Without SeqIO in memory nothing is; its own import takes seconds.
  seqio = sys.modules.get('seqio')
  return seqio is not None and (
    name in seqio.TaskRegistry.names() or name in seqio.MixtureRegistry.names()
  )


def find_registered(name: str, caches: Sequence[str] = ()) -> Any:
  """The seqio.Task or seqio.Mixture of a name.

  Args:
    caches: directories in which SeqIO looks for cached tasks too.

  Raises:
    ValueError: SeqIO cannot be imported, or the name is unknown.
  """
  seqio, _ = import_seqio()
  seqio.add_global_cache_dirs([local_path(path) for path in caches])
  if not is_registered(name):
    names = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    near = difflib.get_close_matches(name, sorted(names)) or sorted(names)[:3]
    raise ValueError(
      f'SeqIO knows no task or mixture {name!r}; of its {len(names)} the '
      f'nearest are {", ".join(near) or "none"}; name the module that '
      'registers it with --imports'
    )
  return seqio.get_mixture_or_task(name)


def end_with_eos(ids: np.ndarray, length: int) -> np.ndarray:
  """int32 [<= length]: the ids, cut if need be, and one EOS."""
  ids = np.asarray(ids, np.int32)
  if ids.size and ids[-1] == EOS:
    ids = ids[:-1]
  return np.append(ids[: length - 1], np.int32(EOS))


@dataclasses.dataclass(frozen=True)
class SeqioStream:
  """Endless examples of a task or mixture, in an order set by a seed.

  The order is SeqIO's: files are shuffled, then examples in a buffer (of 1,000
  by default), and a mixture draws from its tasks by their rates. It is the
  same in every process with the same version of TensorFlow.

  Attributes:
    provider: a seqio.Task or seqio.Mixture with features inputs and targets;
      see `registered` and `seqio_cache.mixture`.
    inputs_length: the most ids of an element's inputs, EOS included.
    targets_length: the same of its targets.
    seed: of the order and of random preprocessors.
    split: the split that is trained on.
    shard: (index, count): this host's part of the examples. SeqIO deals out
      files where each host can have one, and examples where not.
    below: ids have to be below it, the size of a model's vocabulary; 0 for
      any.

  Raises:
    ValueError: features are missing, or the split is.
  """

  provider: Any
  inputs_length: int
  targets_length: int
  seed: int = 0
  split: str = 'train'
  shard: tuple[int, int] = (0, 1)
  below: int = 0

  def __post_init__(self):
    name, features = self.provider.name, self.provider.output_features
    missing = [side for side in SIDES if side not in features]
    if missing:
      raise ValueError(
        f'{name} has no feature {" and no ".join(missing)}, it has '
        f'{", ".join(sorted(features))}; give a task of inputs and targets'
      )
    if self.split not in self.provider.splits:
      raise ValueError(
        f'{name} has no split {self.split!r}, it has '
        f'{", ".join(sorted(self.provider.splits)) or "none"}; set '
        'config.data.split to one of them'
      )

  def __str__(self):
    tasks = self._tasks()
    return f'SeqIO {self.provider.name}, {len(tasks)} tasks, {self.split}'

  def rates(self) -> dict[str, float]:
    """The share of each task of the split, which sum to one."""
    tasks = [task for task in self._tasks() if self.split in task.splits]
    # A task by itself has no rate.
    rate = getattr(self.provider, 'get_rate', lambda task: 1.0)
    rates = {task.name: float(rate(task)) for task in tasks}
    return {name: value / sum(rates.values()) for name, value in rates.items()}

  def open(self, place: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """The elements from number `place` on, without an end.

    SeqIO has no way to go to a place at once: what comes before it is read
    again and dropped, without leaving TensorFlow. That takes as long as
    SeqIO took to give it, up to hours where a run has read tens of millions.

    Yields:
      inputs int32 [<= inputs_length] and targets int32 [<= targets_length],
      each with EOS at its end.

    Raises:
      ValueError: nothing can be read, an id is too large, or the data ends.
    """
    seqio, tf = import_seqio()
    self._check_eos()
    index, count = self.shard
    with _errors_as_sentences(self.provider.name):
      dataset = self.provider.get_dataset(
        self._lengths(),
        split=self.split,
        use_cached=self._cached(),
        shuffle=True,
        seed=self.seed,
        shard_info=seqio.ShardInfo(index, count) if count > 1 else None,
        num_epochs=None,
      )
    options = tf.data.Options()
    options.deterministic = True
    return self._endless(_sides(dataset).with_options(options).skip(place))

  def validation(self, count: int) -> list[dict[str, np.ndarray]]:
    """At most `count` elements of the split 'validation', task by task.

    As many of each task as can be, from the front; none where no task has the
    split. The same on every host.
    """
    tasks = [t for t in self._tasks() if 'validation' in t.splits]
    chosen = min(count, len(tasks))
    # With more tasks than elements, evenly spaced ones.
    tasks = [tasks[i * len(tasks) // chosen] for i in range(chosen)]
    elements_read = []
    for i, task in enumerate(tasks):
      share = (i + 1) * count // chosen - i * count // chosen
      with _errors_as_sentences(task.name):
        dataset = task.get_dataset(
          self._lengths(),
          split='validation',
          use_cached=self._cached(),
          shuffle=False,
          num_epochs=1,
          try_in_mem_cache=False,
        )
        elements = _sides(dataset).take(share).as_numpy_iterator()
        elements_read += [self._element(e) for e in elements]
    return elements_read

  @property
  def vocabulary_size(self) -> int | None:
    """Ids are below it; None where SeqIO does not know (ids cached on disk)."""
    with _errors_as_sentences(self.provider.name):
      return max(v.vocab_size for v in self._vocabularies()) or None

  @property
  def decode(self) -> Callable[[Sequence[int]], str] | None:
    """Text of ids, by the targets' vocabulary; None where it is not known."""
    if self.vocabulary_size is None:
      return None
    vocabulary = self._vocabularies()[1]
    return lambda ids: vocabulary.decode([int(i) for i in ids])

  def _vocabularies(self) -> list[Any]:
    features = self.provider.output_features
    return [features[side].vocabulary for side in SIDES]

  def _check_eos(self) -> None:
    with _errors_as_sentences(self.provider.name):
      ends = {v.eos_id for v in self._vocabularies()} - {None}
    if ends - {EOS}:
      raise ValueError(
        f'{self.provider.name} ends its sequences with the id '
        f'{", ".join(map(str, ends - {EOS}))}, expected {EOS} as in T5; give '
        'a task with a vocabulary of that kind'
      )

  def _tasks(self) -> list[Any]:
    return import_seqio()[0].get_subtasks(self.provider)

  def _cached(self) -> bool:
    # One answer for a whole mixture: SeqIO says which of its tasks is absent.
    return any(
      task.requires_caching or (task.supports_caching and task.cache_dir)
      for task in self._tasks()
    )

  def _lengths(self) -> dict[str, int]:
    return {'inputs': self.inputs_length, 'targets': self.targets_length}

  def _endless(self, dataset) -> Iterator[dict[str, np.ndarray]]:
    with _errors_as_sentences(self.provider.name):
      for element in dataset.as_numpy_iterator():
        yield self._element(element)
    raise ValueError(
      f'{self.provider.name} came to an end in the split {self.split!r}: one '
      'of its tasks has no example (for this host); leave it out'
    )

  def _element(self, element) -> dict[str, np.ndarray]:
    lengths = self._lengths()
    element = {
      side: end_with_eos(element[side], lengths[side]) for side in SIDES
    }
    largest = max(int(ids.max()) for ids in element.values())
    if self.below and largest >= self.below:
      raise ValueError(
        f'{self.provider.name} has the token id {largest}, the model has '
        f'{self.below} tokens; give data of the vocabulary of the model'
      )
    return element


def _sides(dataset):
  """The two features alone; texts and choices stay behind."""
  if set(dataset.element_spec) == set(SIDES):
    return dataset
  _, tf = import_seqio()

  # As in seqio_cache: AutoGraph has nothing to convert here.
  @tf.autograph.experimental.do_not_convert
  def choose(element):
    return {side: element[side] for side in SIDES}

  return dataset.map(choose, num_parallel_calls=tf.data.AUTOTUNE)


@contextlib.contextmanager
def _errors_as_sentences(name: str):
  """Turns errors of TensorFlow and SeqIO into a ValueError of one sentence."""
  # Looked up now: a stream may be closed when Python itself is.
  failure = import_seqio()[1].errors.OpError
  try:
    yield
  except AssertionError as e:
    raise ValueError(
      f'{name} cannot be read ({e}); cache it with seqio_cache_tasks, or name '
      'the directory that holds it with config.data.path'
    ) from None
  except failure as e:
    reason = (e.message or str(e)).splitlines()[0]
    raise ValueError(
      f'{name} cannot be read ({type(e).__name__}: {reason}); look at its '
      'files, and copy them again if one is cut short'
    ) from None

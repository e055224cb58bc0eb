# SPDX-License-Identifier: Apache-2.0
"""An infinite stream of token ids from a SeqIO task or mixture.

The module needs the extra `moepeft[seqio]`; the first call imports TensorFlow.
SeqIO (arXiv:2203.17189) runs the task's preprocessors, which give the ids of
`inputs` and `targets`. The stream then truncates both and ends them with one
EOS, as `batching.seq2seq.encode_truncated` does, whether or not the task
appends EOS. The inputs of the cached P3 tasks have none.
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
FEATURES = ('inputs', 'targets')


def import_seqio() -> tuple[Any, Any]:
  """Imports seqio and tensorflow, and hides GPUs from TensorFlow.

  Raises:
    ValueError: one of them is not installed.
  """
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  try:
    import seqio
    import tensorflow as tf
  except ImportError as e:
    raise ValueError(
      f"SeqIO cannot be imported ({e}); pip install 'moepeft[seqio]'"
    ) from None
  # TensorFlow would allocate the GPU memory that JAX needs. The call raises
  # RuntimeError if the user's code has already initialized TensorFlow's GPUs.
  with contextlib.suppress(RuntimeError):
    tf.config.set_visible_devices([], 'GPU')
  return seqio, tf


def is_registered(name: str) -> bool:
  """Whether an imported module has registered a task or mixture."""
  # If seqio is not imported, nothing is registered. Importing it takes seconds.
  seqio = sys.modules.get('seqio')
  return seqio is not None and (
    name in seqio.TaskRegistry.names() or name in seqio.MixtureRegistry.names()
  )


def find_registered(name: str, cache_dirs: Sequence[str] = ()) -> Any:
  """Returns the registered seqio.Task or seqio.Mixture with a name.

  Args:
    cache_dirs: additional directories in which SeqIO looks for cached tasks.

  Raises:
    ValueError: SeqIO cannot be imported, or the name is unknown.
  """
  seqio, _ = import_seqio()
  seqio.add_global_cache_dirs([local_path(path) for path in cache_dirs])
  if not is_registered(name):
    names = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    suggestions = (
      difflib.get_close_matches(name, sorted(names)) or sorted(names)[:3]
    )
    raise ValueError(
      f'SeqIO knows no task or mixture {name!r}; similar names among the '
      f'{len(names)} registered ones: {", ".join(suggestions) or "none"}; name '
      'the module that registers it with --imports'
    )
  return seqio.get_mixture_or_task(name)


def end_with_eos(ids: np.ndarray, length: int) -> np.ndarray:
  """Truncates ids to at most `length`, with exactly one EOS at the end."""
  ids = np.asarray(ids, np.int32)
  if ids.size and ids[-1] == EOS:
    ids = ids[:-1]
  return np.append(ids[: length - 1], np.int32(EOS))


@dataclasses.dataclass(frozen=True)
class SeqioStream:
  """An infinite stream of the examples of a task or mixture.

  SeqIO shuffles the files, then the examples in a buffer (of 1,000 examples by
  default). A mixture samples its tasks by their rates. The order depends on the
  seed and on the version of TensorFlow only.

  Attributes:
    provider: a seqio.Task or seqio.Mixture with the features inputs and
      targets; see `find_registered` and `seqio_cache.mixture`.
    inputs_length: the maximum number of input ids, EOS included.
    targets_length: the maximum number of target ids, EOS included.
    seed: the seed of the shuffling and of random preprocessors.
    split: the split of the training examples.
    shard: (index of this host, number of hosts). SeqIO shards by file if there
      are enough files for all hosts, otherwise by example.
    vocab_size: the size of the model's vocabulary, which all ids have to be
      below; 0 for no check.

  Raises:
    ValueError: the provider lacks a feature or the split.
  """

  provider: Any
  inputs_length: int
  targets_length: int
  seed: int = 0
  split: str = 'train'
  shard: tuple[int, int] = (0, 1)
  vocab_size: int = 0

  def __post_init__(self):
    name, features = self.provider.name, self.provider.output_features
    missing = [feature for feature in FEATURES if feature not in features]
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
    """Returns the sampling rate of each task; the rates sum to one."""
    tasks = [task for task in self._tasks() if self.split in task.splits]
    # A seqio.Task has no method get_rate, unlike a seqio.Mixture.
    rate = getattr(self.provider, 'get_rate', lambda task: 1.0)
    rates = {task.name: float(rate(task)) for task in tasks}
    return {name: value / sum(rates.values()) for name, value in rates.items()}

  def examples(self, start: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Returns an infinite iterator over the examples from index `start` on.

    SeqIO cannot seek. TensorFlow reads and discards the examples before
    `start`, which takes as long as reading them did: up to hours after tens of
    millions of examples.

    Yields:
      inputs int32 [<= inputs_length] and targets int32 [<= targets_length],
      each with EOS at its end.

    Raises:
      ValueError: the data cannot be read, an id is too large, or the data ends.
    """
    seqio, tf = import_seqio()
    self._check_eos()
    index, count = self.shard
    with _convert_errors(self.provider.name):
      dataset = self.provider.get_dataset(
        self._lengths(),
        split=self.split,
        use_cached=self._use_cached(),
        shuffle=True,
        seed=self.seed,
        shard_info=seqio.ShardInfo(index, count) if count > 1 else None,
        num_epochs=None,
      )
    options = tf.data.Options()
    options.deterministic = True
    dataset = _select_features(dataset).with_options(options).skip(start)
    return self._iterate(dataset)

  def validation(self, count: int) -> list[dict[str, np.ndarray]]:
    """Returns the first examples of the split 'validation' of each task.

    The examples are the same on every host.

    Args:
      count: the maximum number of examples in total. The tasks get equal
        numbers of examples. With more tasks than `count`, evenly spaced tasks
        get one example each.

    Returns:
      The examples, task by task; [] if no task has the split.
    """
    tasks = [t for t in self._tasks() if 'validation' in t.splits]
    num_tasks = min(count, len(tasks))
    tasks = [tasks[i * len(tasks) // num_tasks] for i in range(num_tasks)]
    examples = []
    for i, task in enumerate(tasks):
      num_examples = (i + 1) * count // num_tasks - i * count // num_tasks
      with _convert_errors(task.name):
        dataset = task.get_dataset(
          self._lengths(),
          split='validation',
          use_cached=self._use_cached(),
          shuffle=False,
          num_epochs=1,
          try_in_mem_cache=False,
        )
        elements = (
          _select_features(dataset).take(num_examples).as_numpy_iterator()
        )
        examples += [self._convert_element(e) for e in elements]
    return examples

  @property
  def vocabulary_size(self) -> int | None:
    """The vocabulary size; None if SeqIO does not know it (cached ids)."""
    with _convert_errors(self.provider.name):
      return max(v.vocab_size for v in self._vocabularies()) or None

  @property
  def decode(self) -> Callable[[Sequence[int]], str] | None:
    """Decodes ids with the targets' vocabulary; None if it is unknown."""
    if self.vocabulary_size is None:
      return None
    vocabulary = self._vocabularies()[1]
    return lambda ids: vocabulary.decode([int(i) for i in ids])

  def _vocabularies(self) -> list[Any]:
    features = self.provider.output_features
    return [features[feature].vocabulary for feature in FEATURES]

  def _check_eos(self) -> None:
    with _convert_errors(self.provider.name):
      eos_ids = {v.eos_id for v in self._vocabularies()} - {None}
    if eos_ids - {EOS}:
      raise ValueError(
        f'{self.provider.name} ends its sequences with the id '
        f'{", ".join(map(str, eos_ids - {EOS}))}, expected {EOS} as in T5; '
        'give a task whose vocabulary has this EOS'
      )

  def _tasks(self) -> list[Any]:
    return import_seqio()[0].get_subtasks(self.provider)

  def _use_cached(self) -> bool:
    # SeqIO takes one value for all tasks of a mixture. Its error names the
    # tasks that are not cached.
    return any(
      task.requires_caching or (task.supports_caching and task.cache_dir)
      for task in self._tasks()
    )

  def _lengths(self) -> dict[str, int]:
    return {'inputs': self.inputs_length, 'targets': self.targets_length}

  def _iterate(self, dataset) -> Iterator[dict[str, np.ndarray]]:
    with _convert_errors(self.provider.name):
      for element in dataset.as_numpy_iterator():
        yield self._convert_element(element)
    raise ValueError(
      f'{self.provider.name} has no more examples in the split {self.split!r}: '
      'one of its tasks has no example (for this host); remove that task'
    )

  def _convert_element(self, element) -> dict[str, np.ndarray]:
    lengths = self._lengths()
    element = {
      feature: end_with_eos(element[feature], lengths[feature])
      for feature in FEATURES
    }
    largest = max(int(ids.max()) for ids in element.values())
    if self.vocab_size and largest >= self.vocab_size:
      raise ValueError(
        f'{self.provider.name} has the token id {largest}, but the '
        f'vocabulary of the model has {self.vocab_size} tokens; give data that '
        'was tokenized with the vocabulary of the model'
      )
    return element


def _select_features(dataset):
  """Removes all features except inputs and targets, such as the texts."""
  if set(dataset.element_spec) == set(FEATURES):
    return dataset
  _, tf = import_seqio()

  # As in seqio_cache, there is no control flow for AutoGraph to convert.
  @tf.autograph.experimental.do_not_convert
  def select(element):
    return {feature: element[feature] for feature in FEATURES}

  return dataset.map(select, num_parallel_calls=tf.data.AUTOTUNE)


@contextlib.contextmanager
def _convert_errors(name: str):
  """Converts errors of TensorFlow and SeqIO to a ValueError."""
  # The type is looked up before the `try`, because a stream may be closed while
  # the interpreter shuts down, when modules can no longer be imported.
  op_error = import_seqio()[1].errors.OpError
  try:
    yield
  except AssertionError as e:
    raise ValueError(
      f'{name} cannot be read ({e}); cache it with seqio_cache_tasks, or name '
      'the directory that holds it with config.data.path'
    ) from None
  except op_error as e:
    reason = (e.message or str(e)).splitlines()[0]
    raise ValueError(
      f'{name} cannot be read ({type(e).__name__}: {reason}); check its '
      'files, and copy them again if one is truncated'
    ) from None

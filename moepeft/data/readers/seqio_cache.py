# SPDX-License-Identifier: Apache-2.0
"""Reads a directory of tasks that SeqIO has cached, such as P3 on the hub.

Every task is a subdirectory that holds, for each of its splits,
`info.<split>.json`, `stats.<split>.json` and `<split>.tfrecord-*`. The tasks
need no registration. The module needs the extra `moepeft[seqio]`.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moepeft.core import files, untrusted
from moepeft.data.readers.seqio_stream import FEATURES, import_seqio

# P3's tasks for ranking have a row for every choice, right or wrong.
_RANKED_SUFFIX = '_score_eval'


@dataclasses.dataclass(frozen=True)
class _Split:
  """One split of a task on disk."""

  path: str
  name: str
  info: Mapping[str, Any]
  examples: int

  def files(self) -> list[str]:
    """The TFRecord files, as many as `info` says."""
    _, tf = import_seqio()
    count = untrusted.field(self.info, 'num_shards', int)
    pattern = f'{self.path}/{self.name}.tfrecord-*-of-{count:05d}'
    paths = sorted(tf.io.gfile.glob(pattern))
    if len(paths) != count:
      raise ValueError(
        f'expected {count} files {pattern}, got {len(paths)}; copy the task '
        'again'
      )
    for file in paths:
      files.check_file(file)
    return paths


def sizes(path: str, split: str = 'train') -> dict[str, int]:
  """The number of examples in each task that has the split.

  Raises:
    ValueError: the directory has no cached task, or none has the split.
  """
  tasks = _tasks_with_split(path, split)
  return {name: splits[split].examples for name, splits in tasks.items()}


def mixture(
  path: str, rates: Mapping[str, float] | None = None, split: str = 'train'
) -> Any:
  """A seqio.Mixture of the tasks in a directory; it is not registered.

  Args:
    rates: relative rates by task; tasks without a rate are left out. If None,
      the rates are the numbers of examples.

  Raises:
    ValueError: the directory has no cached task, none has the split, a task of
      `rates` is missing, lacks the features or the split, or lacks a file.
  """
  seqio, _ = import_seqio()
  cached = _tasks_with_split(path, split)
  if rates is None:
    rates = {name: splits[split].examples for name, splits in cached.items()}
  missing = sorted(set(rates) - set(cached))
  if missing:
    raise ValueError(
      f'{len(missing)} of {len(rates)} tasks of the mixture are not in {path} '
      f'with a split {split!r}: {_first_names(missing)}; copy them there, or '
      'choose another mixture'
    )
  tasks = [
    (_task(name, cached[name]), float(rate))
    for name, rate in sorted(rates.items())
    if rate > 0
  ]
  if not tasks:
    raise ValueError(
      f'no task in {path} has a rate and a number of examples above 0; choose '
      'another mixture or directory'
    )
  return seqio.Mixture(path, tasks)


def _tasks_with_split(path: str, split: str) -> dict[str, dict[str, _Split]]:
  tasks = _find_tasks(path)
  with_split = {name: s for name, s in tasks.items() if split in s}
  if not with_split:
    names = sorted({name for splits in tasks.values() for name in splits})
    raise ValueError(
      f'no task in {path} has a split {split!r}, there are '
      f'{", ".join(names)}; set config.data.split to one of them'
    )
  return with_split


def _find_tasks(path: str) -> dict[str, dict[str, _Split]]:
  """{task: {split name: split}}, without the tasks for ranking."""
  _, tf = import_seqio()
  path = files.local_path(path)
  if not tf.io.gfile.isdir(path):
    raise ValueError(
      f'{path!r} is no directory; set config.data.path to a directory of '
      'cached tasks'
    )
  tasks = {}
  for entry in sorted(tf.io.gfile.listdir(path)):
    name = entry.rstrip('/')
    if not name.endswith(_RANKED_SUFFIX):
      infos = tf.io.gfile.glob(os.path.join(path, name, 'info.*.json'))
      splits = [_read_split(os.path.join(path, name), info) for info in infos]
      if splits:
        tasks[name] = {split.name: split for split in splits}
  if not tasks:
    raise ValueError(
      f'{path} holds no cached task to train on; expected subdirectories with '
      'info.train.json, stats.train.json and train.tfrecord-*'
    )
  return tasks


def _read_split(path: str, info: str) -> _Split:
  name = os.path.basename(info).removeprefix('info.').removesuffix('.json')
  stats = os.path.join(path, f'stats.{name}.json')
  try:
    examples = untrusted.field(_read_json(stats), 'examples', int)
    split = _Split(path, name, _read_json(info), examples)
    untrusted.field(split.info, 'num_shards', int)
    untrusted.field(split.info, 'features', dict)
    return split
  except untrusted.Malformed as e:
    raise ValueError(
      f"{info} and its stats are not in SeqIO's format ({e}); copy the task "
      'again'
    ) from None


def _read_json(path: str) -> dict[str, Any]:
  _, tf = import_seqio()
  try:
    files.check_file(path)
    with tf.io.gfile.GFile(path, 'rb') as f:
      value = untrusted.parse_json(f.read())
    if not isinstance(value, dict):
      raise untrusted.Malformed('expected a JSON object')
    return value
  except (tf.errors.OpError, untrusted.Malformed) as e:
    reason = str(e).splitlines()[0]
    raise ValueError(
      f'{path} cannot be read ({reason}); copy the task again'
    ) from None


def _task(name: str, splits: Mapping[str, _Split]) -> Any:
  """A seqio.Task of the ids on disk, with a pass-through vocabulary."""
  seqio, tf = import_seqio()
  for split in splits.values():
    _check_features(name, split.info)
  source = seqio.FileDataSource(
    _reader_fn(tf),
    {split.name: split.files() for split in splits.values()},
    num_input_examples={s.name: s.examples for s in splits.values()},
  )
  feature = seqio.Feature(
    seqio.PassThroughVocabulary(size=0, eos_id=1), add_eos=False
  )
  return seqio.Task(name, source, dict.fromkeys(FEATURES, feature))


def _reader_fn(tf: Any) -> Callable[[Any], Any]:
  """A function from TFRecord files to a dataset of the two features.

  TensorFlow traces the function. AutoGraph would convert all code that it
  calls, and print objects that it cannot convert, such as `os.environ` with
  every secret in it. So AutoGraph is off, and the function calls TensorFlow
  only.
  """
  unconverted = tf.autograph.experimental.do_not_convert
  ids = tf.io.FixedLenSequenceFeature([], tf.int64, allow_missing=True)

  @unconverted
  def parse(record):
    row = tf.io.parse_single_example(record, dict.fromkeys(FEATURES, ids))
    return {name: tf.cast(row[name], tf.int32) for name in FEATURES}

  @unconverted
  def read(files):
    # One map, because a step of the pipeline costs more than its work.
    records = tf.data.TFRecordDataset(files)
    return records.map(parse, num_parallel_calls=tf.data.AUTOTUNE)

  return read


def _check_features(name: str, info: Mapping[str, Any]) -> None:
  features = untrusted.field(info, 'features', dict)
  for key in FEATURES:
    feature = untrusted.field(features, key, dict, {})
    is_integer = feature.get('dtype') in ('int32', 'int64')
    if feature.get('shape') != [None] or not is_integer:
      raise ValueError(
        f'the cached task {name} has no token ids {key!r}, it has '
        f'{_first_names(sorted(features))}; leave it out, or cache it tokenized'
      )


def _first_names(names: Sequence[str]) -> str:
  return ', '.join(names[:5]) + (', ...' if len(names) > 5 else '')

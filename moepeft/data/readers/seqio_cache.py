# SPDX-License-Identifier: Apache-2.0
"""A directory of tasks that SeqIO has cached, as P3's on the hub.

Every task is a subdirectory that holds, for each of its splits,
`info.<split>.json`, `stats.<split>.json` and `<split>.tfrecord-*`. Nothing
has to be registered. Needs the extra `moepeft[seqio]`.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moepeft.core import files, untrusted
from moepeft.data.readers.seqio_stream import FEATURES, import_seqio

# Tasks of P3 that rank answers have a row for every choice, right or wrong.
_RANKED = '_score_eval'


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
  """Examples of each task that can be trained on, where it has the split.

  Raises:
    ValueError: no cached task is there, or none has the split.
  """
  tasks = _with_split(path, split)
  return {name: splits[split].examples for name, splits in tasks.items()}


def mixture(
  path: str, rates: Mapping[str, float] | None = None, split: str = 'train'
) -> Any:
  """A seqio.Mixture of the tasks in a directory; it is not registered.

  Args:
    rates: relative rates by task; tasks without one are left out. None draws
      every example as often: the rates are the numbers of examples.

  Raises:
    ValueError: no cached task is there, none has the split, a task of `rates`
      is missing, lacks the features or the split, or a file of it is missing.
  """
  seqio, _ = import_seqio()
  cached = _with_split(path, split)
  if rates is None:
    rates = {name: splits[split].examples for name, splits in cached.items()}
  missing = sorted(set(rates) - set(cached))
  if missing:
    raise ValueError(
      f'{len(missing)} of {len(rates)} tasks of the mixture are not in {path} '
      f'with a split {split!r}: {_first_names(missing)}; copy them there, or '
      'choose another mixture'
    )
  drawn = {name: rate for name, rate in sorted(rates.items()) if rate > 0}
  if not drawn:
    raise ValueError(
      f'no task of {path} is drawn: every rate or number of examples is 0'
    )
  tasks = [(_task(name, cached[name]), float(drawn[name])) for name in drawn]
  return seqio.Mixture(path, tasks)


def _with_split(path: str, split: str) -> dict[str, dict[str, _Split]]:
  tasks = _find(path)
  having = {name: s for name, s in tasks.items() if split in s}
  if not having:
    splits_there = sorted(
      {name for splits in tasks.values() for name in splits}
    )
    raise ValueError(
      f'no task in {path} has a split {split!r}, there are '
      f'{", ".join(splits_there)}; set config.data.split to one of them'
    )
  return having


def _find(path: str) -> dict[str, dict[str, _Split]]:
  """{task: {split: what is there}}, those that rank answers left out."""
  _, tf = import_seqio()
  path = files.local_path(path)
  if not tf.io.gfile.isdir(path):
    raise ValueError(
      f'{path!r} is no directory; set config.data.path to one of cached tasks'
    )
  tasks = {}
  for entry in sorted(tf.io.gfile.listdir(path)):
    name = entry.rstrip('/')
    if not name.endswith(_RANKED):
      infos = tf.io.gfile.glob(os.path.join(path, name, 'info.*.json'))
      splits = [_split(os.path.join(path, name), info) for info in infos]
      if splits:
        tasks[name] = {split.name: split for split in splits}
  if not tasks:
    raise ValueError(
      f'{path} holds no cached task to train on; expected subdirectories with '
      'info.train.json, stats.train.json and train.tfrecord-*'
    )
  return tasks


def _split(path: str, info: str) -> _Split:
  name = os.path.basename(info).removeprefix('info.').removesuffix('.json')
  stats = os.path.join(path, f'stats.{name}.json')
  try:
    examples = untrusted.field(_json(stats), 'examples', int)
    split = _Split(path, name, _json(info), examples)
    untrusted.field(split.info, 'num_shards', int)
    untrusted.field(split.info, 'features', dict)
    return split
  except untrusted.Malformed as e:
    raise ValueError(
      f'{info} and its stats are not what SeqIO writes ({e}); copy the task '
      'again'
    ) from None


def _json(path: str) -> dict[str, Any]:
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
  """A seqio.Task of the ids on disk, whatever their vocabulary."""
  seqio, tf = import_seqio()
  for split in splits.values():
    _check_features(name, split.info)
  source = seqio.FileDataSource(
    _reader(tf),
    {split.name: split.files() for split in splits.values()},
    num_input_examples={s.name: s.examples for s in splits.values()},
  )
  unknown = seqio.Feature(
    seqio.PassThroughVocabulary(size=0, eos_id=1), add_eos=False
  )
  return seqio.Task(name, source, dict.fromkeys(FEATURES, unknown))


def _reader(tf: Any) -> Callable[[Any], Any]:
  """A function that reads the two features of rows of TFRecord files.

  TensorFlow traces it. AutoGraph would take apart all that it calls, and print
  objects that it cannot convert, `os.environ` with every key among them: so
  nothing is converted, and nothing but TensorFlow is used.
  """
  untraced = tf.autograph.experimental.do_not_convert
  ids = tf.io.FixedLenSequenceFeature([], tf.int64, allow_missing=True)

  @untraced
  def parse(record):
    row = tf.io.parse_single_example(record, dict.fromkeys(FEATURES, ids))
    return {name: tf.cast(row[name], tf.int32) for name in FEATURES}

  @untraced
  def read(files):
    # In one map: a step of the pipeline costs more than what is done in it.
    records = tf.data.TFRecordDataset(files)
    return records.map(parse, num_parallel_calls=tf.data.AUTOTUNE)

  return read


def _check_features(name: str, info: Mapping[str, Any]) -> None:
  features = untrusted.field(info, 'features', dict)
  for side in FEATURES:
    feature = untrusted.field(features, side, dict, {})
    whole = feature.get('dtype') in ('int32', 'int64')
    if feature.get('shape') != [None] or not whole:
      raise ValueError(
        f'the cached task {name} has no token ids {side!r}, it has '
        f'{_first_names(sorted(features))}; leave it out, or cache it tokenized'
      )


def _first_names(names: Sequence[str]) -> str:
  shown = ', '.join(names[:5])
  return shown if len(names) <= 5 else f'{shown}, ...'

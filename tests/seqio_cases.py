# SPDX-License-Identifier: Apache-2.0
"""Caches as `seqio_cache_tasks` lays them out, without its Apache Beam."""

import json
import pathlib

import numpy as np
import seqio
import tensorflow as tf


def write(
  folder: pathlib.Path, split: str, rows: list[dict], shards: int = 1
) -> None:
  """Writes one split of a task: TFRecords, info and stats.

  Args:
    rows: features by name: arrays, texts and numbers.
    shards: files that the rows are dealt out to.
  """
  folder.mkdir(parents=True, exist_ok=True)
  for shard in range(shards):
    file = folder / f'{split}.tfrecord-{shard:05d}-of-{shards:05d}'
    with tf.io.TFRecordWriter(str(file)) as writer:
      for row in rows[shard::shards]:
        # SeqIO hands booleans on as such, which later protobufs refuse.
        plain = {k: int(v) if v is True else v for k, v in row.items()}
        writer.write(seqio.dict_to_tfexample(plain).SerializeToString())
  features = {}
  for name, value in rows[0].items():
    value = tf.constant(value)
    shape = [None, *value.shape[1:]] if value.shape.rank else []
    features[name] = {'shape': shape, 'dtype': value.dtype.name}
  info = {'num_shards': shards, 'features': features, 'seqio_version': '0.0.6'}
  stats = {'examples': len(rows)}
  for side in {'inputs', 'targets'} & set(rows[0]):
    lengths = [len(row[side]) for row in rows]
    stats[f'{side}_tokens'] = sum(lengths)
    stats[f'{side}_max_tokens'] = max(lengths)
  (folder / f'info.{split}.json').write_text(json.dumps(info, indent=2))
  (folder / f'stats.{split}.json').write_text(json.dumps(stats, indent=2))
  (folder / 'COMPLETED').touch()


def p3_row(mark: int, number: int, length: int = 3) -> dict:
  """A row in P3's form, which no other mark and number has.

  As T0's tasks do before they are cached, EOS ends the targets and not the
  inputs (bigscience-workshop/t-zero, t0/seqio_tasks/tasks.py).
  """
  return {
    'inputs': np.array([mark, 100 + number] + [7] * (length - 2), np.int32),
    'inputs_pretokenized': f'Row {number} of {mark}?',
    'targets': np.array([mark, 1], np.int32),
    'targets_pretokenized': f' {mark}',
  }


def score_row(number: int) -> dict:
  """A row of a task that ranks answers, `*_score_eval`."""
  return p3_row(11, number) | {
    'idx': np.array([number, 0], np.int32),
    'is_correct': True,
    'weight': 1.0,
    'answer_choices': np.array(['yes', 'no']),
  }

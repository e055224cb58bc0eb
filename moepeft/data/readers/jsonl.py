# SPDX-License-Identifier: Apache-2.0
"""The reader of rows in P3's form: `.jsonl` or `.jsonl.gz` files."""

from ml_collections import ConfigDict

from moepeft.data import fingerprint
from moepeft.data.dataset import TrainingData, from_examples
from moepeft.data.readers.jsonl_rows import read
from moepeft.data.readers.reader import DataReader, ReadContext


def open_jsonl(data: ConfigDict, context: ReadContext) -> TrainingData:
  """Opens rows in P3's form; the last `idx` of each dataset are held out."""
  if not data.path:
    raise ValueError(
      'set config.data.path to .jsonl rows, or a directory of them'
    )
  rows = read(data.path, on_bad_row=data.on_bad_row, ignore=data.ignore_fields)
  return from_examples(rows, data, context.seed)


READER = DataReader(
  open_jsonl,
  config_keys=(
    *(
      'data.path',
      'data.templates',
      'data.mixture',
      'data.max_examples_per_task',
    ),
    *(
      'data.temperature',
      'data.on_bad_row',
      'data.ignore_fields',
      'data.truncation',
    ),
    *('data.num_workers', 'data.replay', 'data.replay_rate'),
  ),
  files=fingerprint.ROW_FILES,
  is_seeded=False,
)

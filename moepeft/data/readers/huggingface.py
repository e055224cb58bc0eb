# SPDX-License-Identifier: Apache-2.0
"""The reader of Hugging Face `datasets`: a name on the hub, or local files."""

from ml_collections import ConfigDict

from moepeft.data import fingerprint
from moepeft.data.dataset import TrainingData, from_examples
from moepeft.data.readers.dataset_rows import read
from moepeft.data.readers.reader import DataReader, ReadContext


def open_dataset(data: ConfigDict, context: ReadContext) -> TrainingData:
  """Opens a dataset on the hub or in local files, rendered by any templates."""
  if not data.path:
    raise ValueError(
      'set config.data.path to a name on the hub, or local files'
    )
  rows = read(
    *(data.path, data.split, data.templates, data.on_bad_row),
    *(context.seed, data.ignore_fields),
  )
  return from_examples(rows, data, context.seed)


READER = DataReader(
  open_dataset,
  config_keys=(
    *('data.path', 'data.split', 'data.templates', 'data.mixture'),
    *(
      'data.max_examples_per_task',
      'data.temperature',
      'data.on_bad_row',
      'data.ignore_fields',
    ),
    *('data.truncation', 'data.num_workers', 'data.replay', 'data.replay_rate'),
  ),
  files=fingerprint.TABLE_FILES,
)

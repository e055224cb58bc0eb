# SPDX-License-Identifier: Apache-2.0
"""The reader of chosen and rejected answers, and of answers with a label."""

from ml_collections import ConfigDict

from moepeft.data import fingerprint
from moepeft.data.dataset import TrainingData
from moepeft.data.preference.dataset import (
  preference_data,
  read_preferences,
)
from moepeft.data.readers.reader import DataReader, ReadContext


def open_preferences(data: ConfigDict, context: ReadContext) -> TrainingData:
  """Opens preference data and tokenizes the answers."""
  preferences = read_preferences(data, context.collator)
  return preference_data(preferences, data, context.seed)


READER = DataReader(
  open_preferences,
  config_keys=(
    *('data.path', 'data.split', 'data.on_bad_row', 'data.ignore_fields'),
    *('data.num_workers', 'data.format', 'data.chat_template', 'data.date'),
    *('data.system_prompt', 'data.train_on', 'data.truncation'),
  ),
  batches=('pair', 'judged'),
  files=fingerprint.TABLE_FILES,
)

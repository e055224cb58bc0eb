# SPDX-License-Identifier: Apache-2.0
"""Pairs of a chosen and a rejected answer, and answers with a label."""

from ml_collections import ConfigDict

from moepeft.data import fingerprint
from moepeft.data.dataset import TrainingData
from moepeft.data.preference.dataset import (
  preference_data,
  read_preferences,
)
from moepeft.data.readers.reader import DataReader, ReadContext


def open_preferences(data: ConfigDict, context: ReadContext) -> TrainingData:
  """Opens compared or judged answers, which are encoded as they are read."""
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

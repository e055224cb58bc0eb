# SPDX-License-Identifier: Apache-2.0
"""Pairs of a chosen and a rejected answer, and answers with a label."""

from ml_collections import ConfigDict

from moepeft.data import fingerprint, mixing
from moepeft.data.dataset import TrainingData, path_name
from moepeft.data.preference.dataset import (
  PreferenceDataset,
  read_preferences,
)
from moepeft.data.readers.reader import DataReader, ReadContext


def open_preferences(data: ConfigDict, context: ReadContext) -> TrainingData:
  """Opens compared or judged answers, which are encoded as they are read."""
  preferences = read_preferences(data, context.collator)
  return preference_data(preferences, data, context.seed)


def preference_data(
  preferences: PreferenceDataset, data: ConfigDict, seed: int
) -> TrainingData:
  """Splits answers into those to train on and those held out.

  Raises:
    ValueError: config.data.validation_fraction leaves nothing to train on.
  """
  train, held_out = preferences.split(data.validation_fraction)
  name = path_name(data.path)
  return TrainingData(
    train=mixing.mix({name: train}, {}, seed),
    shares={name: 1.0},
    held_out=held_out,
    notes=preferences.notes,
    preferences=preferences,
  )


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

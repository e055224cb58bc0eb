# SPDX-License-Identifier: Apache-2.0
"""The reader of plain text in local files, split into chunks."""

from ml_collections import ConfigDict

from moepeft.data import fingerprint, mixing
from moepeft.data.dataset import TrainingData, path_name
from moepeft.data.readers.reader import DataReader, ReadContext
from moepeft.data.text.dataset import read_chunks


def open_text(data: ConfigDict, context: ReadContext) -> TrainingData:
  """Opens text; the last chunks are held out.

  Raises:
    ValueError: there is no path or no text, or
      config.data.pretraining_objective does not fit the model.
  """
  if not data.path:
    raise ValueError(
      'set config.data.path to a .txt file, to .jsonl rows with text, or to a '
      'directory of them'
    )
  seed = context.seed
  chunks = read_chunks(data, context.collator, data.path, context.vocab_size)
  train, held_out = chunks.split(data.validation_fraction)
  name = path_name(data.path)
  return TrainingData(
    train=chunks.random_items(mixing.mix({name: train}, {}, seed), seed),
    shares={name: 1.0},
    held_out=held_out.fixed_items(seed),
    notes=chunks.notes,
  )


READER = DataReader(
  open_text,
  config_keys=(
    *('data.path', 'data.on_bad_row', 'data.ignore_fields', 'data.num_workers'),
    *(
      'data.pretraining_objective',
      'data.noise_density',
      'data.mean_noise_span_length',
      'data.dedup_threshold',
    ),
    *('data.quality_filters', 'data.replay', 'data.replay_rate'),
  ),
  files=fingerprint.TEXT_FILES,
  has_separator=False,
)

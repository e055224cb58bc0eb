# SPDX-License-Identifier: Apache-2.0
"""The reader of conversations in local files, rendered by a chat template."""

import os

from ml_collections import ConfigDict

from moepeft.core.files import local_path
from moepeft.data import fingerprint, mixing, split
from moepeft.data.batching.decoder_only import CausalCollator
from moepeft.data.chat import dataset as chat_dataset
from moepeft.data.dataset import TrainingData, path_name
from moepeft.data.readers.reader import DataReader, ReadContext


def open_chats(data: ConfigDict, context: ReadContext) -> TrainingData:
  """Opens conversations; the last ones in each file are held out.

  Conversations with the same beginning are held out together, see
  `split.hold_out_last`.

  Raises:
    ValueError: the model is no decoder, there is no path, a row is bad, or no
      row is left to train on.
  """
  collator = context.collator
  if not isinstance(collator, CausalCollator):
    raise ValueError(
      f'config.data.source={data.source!r} is for decoder-only models; give an '
      'encoder-decoder rows with inputs and targets'
    )
  if not data.path:
    raise ValueError(
      'set config.data.path to a .json or .jsonl file of conversations, or to '
      'a directory of them'
    )
  by_file, notes = chat_dataset.read_chats(
    data, collator.tokenizer, *collator.max_lengths
  )
  train, held_out, held_out_names = {}, [], []
  for file, chats in by_file.items():
    is_held_out = split.hold_out_last(
      [chat.group for chat in chats], data.validation_fraction
    )
    pairs = list(zip(chats, is_held_out, strict=True))
    samples = [chat.sample for chat, excluded in pairs if not excluded]
    name = _relative_name(data.path, file)
    if samples:
      train[name] = samples
    held_out += [chat.sample for chat, excluded in pairs if excluded]
    held_out_names += [name] * (len(held_out) - len(held_out_names))
  if not train:
    raise ValueError(
      f'config.data.validation_fraction={data.validation_fraction} leaves no '
      'row to train on; lower it'
    )
  weights = mixing.mixing_rates(
    {name: len(samples) for name, samples in train.items()}
  )
  return TrainingData(
    train=mixing.mix(train, weights, context.seed),
    shares=mixing.normalize(weights),
    held_out=held_out,
    held_out_datasets=held_out_names,
    notes=notes,
  )


def _relative_name(path: str, file: str) -> str:
  """The name of a file below a path, or of the path's own file."""
  inside = os.path.relpath(file, local_path(path))
  if inside.startswith(os.pardir):
    return file
  return path_name(path) if inside == os.curdir else inside


READER = DataReader(
  open_chats,
  config_keys=(
    *('data.path', 'data.on_bad_row', 'data.ignore_fields', 'data.num_workers'),
    *('data.format', 'data.chat_template', 'data.date', 'data.system_prompt'),
    *('data.train_on', 'data.truncation', 'data.replay', 'data.replay_rate'),
  ),
  architecture='decoder',
  files=fingerprint.CHAT_FILES,
  has_separator=False,
)

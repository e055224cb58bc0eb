# SPDX-License-Identifier: Apache-2.0
"""open_data: the training data of a config, with replayed text mixed in."""

import dataclasses

import grain
from ml_collections import ConfigDict

from moepeft.data import mixing
from moepeft.data.batching.collators import Collator
from moepeft.data.dataset import TrainingData
from moepeft.data.readers import READERS
from moepeft.data.readers.reader import DataReader, ReadContext
from moepeft.data.text.dataset import read_chunks


def open_data(
  data: ConfigDict,
  seed: int,
  shard: tuple[int, int] = (0, 1),
  vocab_size: int = 0,
  collator: Collator | None = None,
) -> TrainingData:
  """Opens config.data.

  Args:
    shard: (this host, number of hosts), for streams.
    vocab_size: the size of the model's vocabulary, which the source's token
      ids must be below; 0 for no check.
    collator: the model's collator, which text is split for.

  Raises:
    ValueError: the source, path, task family or mixture is unknown, or rows
      are malformed.
  """
  reader = READERS.lookup(data.source)
  context = ReadContext(seed, collator, shard, vocab_size)
  if not data.replay and not data.replay_rate:
    return reader.open(data, context)
  _check_replay(data, reader)
  return _mix_in_text(reader.open(data, context), data, context)


def _check_replay(data: ConfigDict, reader: DataReader) -> None:
  if not data.replay or not 0 < data.replay_rate < 1:
    raise ValueError(
      'config.data.replay is a path of text and config.data.replay_rate its '
      'share of the examples, above 0 and below 1; got '
      f'{data.replay!r} and {data.replay_rate}'
    )
  if not reader.takes_replay:
    raise ValueError(
      'config.data.replay cannot be mixed into config.data.source='
      f"{data.source!r}; set it to '' and config.data.replay_rate to 0"
    )


def _mix_in_text(
  source: TrainingData, data: ConfigDict, context: ReadContext
) -> TrainingData:
  """Mixes plain text in at config.data.replay_rate, against forgetting."""
  seed, rate = context.seed, data.replay_rate
  chunks = read_chunks(data, context.collator, data.replay, context.vocab_size)
  shuffled = mixing.mix({'replay': chunks}, {}, seed)
  schedule = mixing.MixtureSchedule((1 - rate, rate), seed)
  train = grain.MapDataset.select_from_datasets(
    [source.train, chunks.random_items(shuffled, seed)], schedule
  )
  shares = {name: (1 - rate) * share for name, share in source.shares.items()}
  return dataclasses.replace(
    source,
    train=train,
    shares=shares | {data.replay: rate},
    notes=(
      *source.notes,
      *chunks.notes,
      f'{data.replay} is {rate:.1%} of the examples (not of the tokens)',
    ),
    replay=schedule,
  )

# SPDX-License-Identifier: Apache-2.0
"""Plain text mixed into what is trained, so that less is forgotten."""

import dataclasses

import grain
from ml_collections import ConfigDict

from moepeft.data import mixing
from moepeft.data.batching.collators import Collator
from moepeft.data.dataset import TrainingData
from moepeft.data.preference import dataset as preference_dataset
from moepeft.data.text import dataset as text_dataset


def check_replay(data: ConfigDict) -> None:
  """Refuses what cannot be, before anything is read.

  Raises:
    ValueError: one of the path and the rate is missing, the rate is no share,
      or nothing can be mixed into the source.
  """
  if not data.replay or not 0 < data.replay_rate < 1:
    raise ValueError(
      'config.data.replay is a path of text and config.data.replay_rate its '
      'share of the examples, above 0 and below 1; got '
      f'{data.replay!r} and {data.replay_rate}'
    )
  if data.source == 'seqio':
    raise ValueError(
      'config.data.replay cannot be mixed into a stream of SeqIO; make a '
      'mixture of SeqIO that has the text'
    )
  if data.source == preference_dataset.SOURCE:
    raise ValueError(
      'config.data.replay cannot be mixed into answers that are compared, '
      "which text has not; set it to '' and config.data.replay_rate to 0"
    )


def mix_in_text(
  found: TrainingData, data: ConfigDict, seed: int, own: Collator, below: int
) -> TrainingData:
  """The same with plain text mixed in at config.data.replay_rate."""
  rate = data.replay_rate
  old = text_dataset.read_chunks(data, own, data.replay, below)
  drawn = mixing.mix({'replay': old}, {}, seed)
  turns = mixing.MixtureSchedule((1 - rate, rate), seed)
  train = grain.MapDataset.select_from_datasets(
    [found.train, old.prepared(drawn, seed)], turns
  )
  shares = {name: (1 - rate) * share for name, share in found.shares.items()}
  return dataclasses.replace(
    found,
    train=train,
    shares=shares | {data.replay: rate},
    notes=(
      *found.notes,
      *old.notes,
      f'{data.replay} is {rate:.1%} of the examples (not of the tokens)',
    ),
    replay=turns,
  )

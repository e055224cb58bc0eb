# SPDX-License-Identifier: Apache-2.0
"""DataReader: an entry of READERS, which opens a kind of training data."""

import dataclasses
from collections.abc import Callable

from ml_collections import ConfigDict

from moepeft.data.batching.collators import Collator
from moepeft.data.dataset import TrainingData
from moepeft.data.fingerprint import FileKind


@dataclasses.dataclass(frozen=True)
class ReadContext:
  """The settings outside config.data that a reader may need.

  Attributes:
    seed: config.seed, the seed of the order and of all random choices.
    collator: the model's collator; None if rows are read without a model.
    shard: (this host, number of hosts). Only streams use it, as random-access
      data are sharded by the loader.
    vocab_size: the size of the model's vocabulary, which a source's token ids
      must be below; 0 for no check.
  """

  seed: int
  collator: Collator | None = None
  shard: tuple[int, int] = (0, 1)
  vocab_size: int = 0


@dataclasses.dataclass(frozen=True)
class DataReader:
  """A source of training data.

  Attributes:
    open: (config.data, context) -> TrainingData. It raises a ValueError of one
      sentence if the data cannot be used.
    config_keys: the config keys that it reads, such as 'data.path'. A key that
      only other readers read may not be set.
    architecture: 'encoder-decoder', 'decoder' or 'any', the models that it has
      data for.
    batches: 'single', 'pair' or 'judged', the kinds of batches that it has rows
      for.
    files: the kind of files that data.path names, which a run hashes; None if
      it names no local files.
    has_separator: whether a separator joins inputs and targets, so that
      generation adds it to prompts.
    evaluates_tasks: whether a run is evaluated on config.evaluation.tasks, not
      on held-out rows.
    is_seeded: whether the held-out rows depend on config.seed.
  """

  open: Callable[[ConfigDict, ReadContext], TrainingData]
  config_keys: tuple[str, ...] = ()
  architecture: str = 'any'
  batches: tuple[str, ...] = ('single',)
  files: FileKind | None = None
  has_separator: bool = True
  evaluates_tasks: bool = False
  is_seeded: bool = True

  @property
  def uses_chat_template(self) -> bool:
    """Whether rows are rendered by the chat template, if there is one."""
    return 'data.chat_template' in self.config_keys

  @property
  def is_plain_text(self) -> bool:
    """Whether rows are plain text, for config.data.pretraining_objective."""
    return 'data.pretraining_objective' in self.config_keys

  @property
  def takes_replay(self) -> bool:
    """Whether config.data.replay can mix plain text in."""
    return 'data.replay' in self.config_keys

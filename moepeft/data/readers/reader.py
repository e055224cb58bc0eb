# SPDX-License-Identifier: Apache-2.0
"""DataReader: an entry of READERS, a function that opens data, and facts."""

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
    seed: config.seed, of the order and of all that is drawn.
    collator: of the model's batches; None where rows are read without a model.
    shard: (this host, number of hosts). Random-access data are divided by
      host later, so only a reader of a stream looks at it.
    vocab_size: of the model; token ids that a source brings must be below it.
      0 for no check.
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
      sentence where the data cannot be used.
    config_keys: the keys of the config that it reads, 'data.path'. A key that
      other readers read and this one does not is refused when it is set.
    architecture: of the models that it has data for: 'encoder-decoder',
      'decoder' or 'any'.
    batches: the kinds of objectives' batches that it has rows for: 'single',
      'pair' or 'judged'.
    files: the kind of files that data.path names, which a run hashes; None
      where it names no local files.
    has_separator: whether inputs and targets are joined by a separator, so
      that generation puts it behind a prompt.
    evaluates_tasks: whether config.evaluation.tasks names what a run is
      evaluated on, rather than held-out rows.
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
    """Whether rows are written by a chat template, if there is one."""
    return 'data.chat_template' in self.config_keys

  @property
  def is_plain_text(self) -> bool:
    """Whether rows are plain text, for config.data.pretraining_objective."""
    return 'data.pretraining_objective' in self.config_keys

  @property
  def takes_replay(self) -> bool:
    """Whether plain text can be mixed in by config.data.replay."""
    return 'data.replay' in self.config_keys

# SPDX-License-Identifier: Apache-2.0
"""The reader of the generated examples of moepeft.tasks."""

import collections
import dataclasses

import grain
from ml_collections import ConfigDict

from moepeft import tasks
from moepeft.data.dataset import TrainingData
from moepeft.data.readers.reader import DataReader, ReadContext
from moepeft.tasks import Example

# Larger than the number of examples of any run.
_LENGTH = 1 << 60


@dataclasses.dataclass(frozen=True)
class GeneratedExamples:
  """An endless sequence of examples, each generated on access."""

  names: tuple[str, ...]
  seed: int

  def __len__(self) -> int:
    return _LENGTH

  def __getitem__(self, index: int) -> Example:
    return tasks.example(self.names, index, seed=self.seed)


def open_tasks(data: ConfigDict, context: ReadContext) -> TrainingData:
  """Opens the tasks in config.data.tasks, with equal rates."""
  names = tasks.task_names(data.tasks)
  counts = collections.Counter(names)
  return TrainingData(
    train=grain.MapDataset.source(GeneratedExamples(names, context.seed)),
    shares={name: count / len(names) for name, count in counts.items()},
    held_out=tasks.examples(
      names,
      tasks.VALIDATION_EXAMPLES * len(names),
      seed=context.seed,
      split='held_out',
    ),
  )


READER = DataReader(
  open_tasks,
  config_keys=(
    *('data.truncation', 'data.num_workers', 'data.replay', 'data.replay_rate'),
  ),
  evaluates_tasks=True,
)

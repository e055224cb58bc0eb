# SPDX-License-Identifier: Apache-2.0
"""The embedded tasks of moepeft.tasks, whose examples are generated."""

import collections
import dataclasses

import grain
from ml_collections import ConfigDict

from moepeft import tasks
from moepeft.data.dataset import TrainingData
from moepeft.data.readers.reader import DataReader, ReadContext
from moepeft.tasks import Example

_ENDLESS = 1 << 60
# Held-out examples of each task.
_HELD_OUT = 32


@dataclasses.dataclass(frozen=True)
class GeneratedExamples:
  """Endless examples of tasks, each generated when it is looked up."""

  names: tuple[str, ...]
  seed: int

  def __len__(self) -> int:
    return _ENDLESS

  def __getitem__(self, place: int) -> Example:
    return tasks.example(self.names, place, seed=self.seed)


def open_tasks(data: ConfigDict, context: ReadContext) -> TrainingData:
  """Opens the tasks that config.data.tasks names, each as often."""
  names = tasks.task_names(data.tasks)
  counts = collections.Counter(names)
  return TrainingData(
    train=grain.MapDataset.source(GeneratedExamples(names, context.seed)),
    shares={name: count / len(names) for name, count in counts.items()},
    held_out=tasks.examples(
      names, _HELD_OUT * len(names), seed=context.seed, split='held_out'
    ),
  )


READER = DataReader(
  open_tasks,
  config_keys=(
    *('data.truncation', 'data.num_workers', 'data.replay', 'data.replay_rate'),
  ),
  evaluates_tasks=True,
)

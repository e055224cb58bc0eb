# SPDX-License-Identifier: Apache-2.0
"""MHR: Poly with weights for each part of the inputs and outputs.

Multi-head routing, Caccia et al., arXiv:2211.03831.
python -m moepeft.train --workdir=DIR \
  --config=configs/methods/mhr.py

It needs data with the name of a task in each row (config.data.source 'tasks',
'jsonl', 'datasets' or 'seqio'), all of them named in `tasks`; by default those
of the embedded data. An adapter whose router reads tasks is trained and scored;
requests to generate name no task.

differs: follows peft's Poly, which is MHR where it has splits: rank 8, 4
  skills, a relaxed Bernoulli sample in training and its mean after. peft needs
  sizes that the splits divide, here the last part may be smaller. The number of
  splits, 4, and the training settings were not taken from the paper.
scale: alpha / r = 1 / 8 = 0.125, times weights that sum to one, of A and of B.
"""

from moepeft import config as config_lib

# The embedded tasks of group B.
_TASKS = 'storage|profession|stars|verdict'


def get_config(values: str = ''):
  v = config_lib.values(values, tasks=_TASKS)
  names = ', '.join(map(repr, v.tasks.split('|')))
  c = config_lib.finetuning(
    '', f'mhr(router=poly(tasks=[{names}], splits=4))', learning_rate=1e-3
  )
  # Other tasks have no routing of their own.
  c.evaluation.tasks = 'B'
  return c

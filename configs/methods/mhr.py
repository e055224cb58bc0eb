# SPDX-License-Identifier: Apache-2.0
"""MHR: Poly with weights for each part of the inputs and outputs.

Multi-head routing, Caccia et al., arXiv:2211.03831.
python -m moepeft.train --workdir=DIR \
  --config=configs/methods/mhr.py

It needs data with the name of a task in each row (config.data.source 'tasks',
'jsonl', 'datasets' or 'seqio'), all of them named in `tasks`; by default those
of the embedded data. Requests name their task: `generate --task=NAME`, or
"task" in the body of a request to the server.

differs: follows peft's Poly, which is MHR where it has splits: rank 8, 4
  skills, a relaxed Bernoulli sample in training and its mean after. peft needs
  sizes that the splits divide, here the last part may be smaller. The number of
  splits, 4, and the training settings were not taken from the paper.
scale: alpha / r = 1 / 8 = 0.125, times weights that sum to one, of A and of B.
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  return config_lib.finetuning(
    values, 'mhr(router=poly(tasks={tasks}, splits=4))', learning_rate=1e-3
  )

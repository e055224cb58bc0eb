# SPDX-License-Identifier: Apache-2.0
"""Poly: low-rank skills, whose parameters are merged for each task.

Ponti et al., arXiv:2202.13914.
python -m moepeft.train --workdir=DIR \
  --config=configs/methods/poly.py

It needs data with the name of a task in each row (config.data.source 'tasks',
'jsonl', 'datasets' or 'seqio'), all of them named in `tasks`; by default those
of the embedded data. Requests name their task: `generate --task=NAME`, or
"task" in the body of a request to the server.

differs: follows peft's Poly with one split: rank 8, 4 skills, a relaxed
  Bernoulli sample in training and its mean after. The preset mhr has
  more splits. The training settings were not taken from the paper.
scale: alpha / r = 1 / 8 = 0.125, times weights that sum to one, of A and of B.
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  return config_lib.finetuning(
    values, 'poly(router=poly(tasks={tasks}))', learning_rate=1e-3
  )

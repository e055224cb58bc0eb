# SPDX-License-Identifier: Apache-2.0
"""MOELoRA: one routing for each task.

Liu et al., arXiv:2310.18339.
python -m moepeft.train --workdir=DIR \
  --config=configs/methods/moelora.py

It needs data with the name of a task in each row (config.data.source 'tasks',
'jsonl', 'datasets' or 'seqio'), all of them named in `tasks`; by default those
of the embedded data. Requests name their task: `generate --task=NAME`, or
"task" in the body of a request to the server.

differs: follows the released code (liuqidong07/MOELoRA-peft). Rank 16 and alpha
  32 are those of all 8 experts together there; here of each, 2 and 4. Its A is
  drawn from N(0, 0.01^2), here from N(0, 0.02^2).
scale: alpha / r = 4 / 2 = 2, times weights that sum to one.
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  c = config_lib.finetuning(
    values,
    'moelora(router=task(tasks={tasks}))',
    learning_rate=2e-4,
    batch_size=64,
  )
  c.optimizer.schedule = 'linear'
  return c

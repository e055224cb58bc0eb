# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA: LoRA whose ranks go to the sites that matter.

Zhang et al., arXiv:2303.10512.
python -m moepeft.train --workdir=DIR \
  --config=configs/methods/adalora.py:model=PATH,data=FILE

Without a model it trains the embedded T5 on the embedded tasks.

differs: follows the released code (QingruZhang/AdaLoRA, its script for RTE),
  which is also in peft. It takes sensitivities of parameters after the step
  and gradients before it, the paper both before; and the mean over matrices
  of |P^T P - I|, the paper the sum of the squares. Here the gradients are not
  clipped yet. The script's 3,900 steps lower ranks from step 600 on and have
  1,800 steps after that; here the same shares of the run.
scale: alpha / r = 32 / 2 = 16, r the rank at first.
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  c = config_lib.finetuning(
    values,
    'adalora(rank=2, target_rank=1, alpha=32.0, orthogonality=0.3, '
    'tinit={tinit}, tfinal={tfinal})',
    learning_rate=1.2e-3,
    batch_size=32,
    length=320,
  )
  schedule = {'tinit': c.steps * 600 // 3900, 'tfinal': c.steps * 1800 // 3900}
  for name, steps in schedule.items():
    c.method = c.method.replace(f'{{{name}}}', str(steps))
  c.optimizer.schedule = 'linear'
  c.optimizer.weight_decay = 0.01
  return c

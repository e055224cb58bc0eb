# SPDX-License-Identifier: Apache-2.0
"""FlyLoRA: a frozen sparse A whose largest projections choose the ranks.

Zou et al., arXiv:2510.08396.
python -m moepeft.train --workdir=DIR \
  --config=configs/methods/flylora.py:model=PATH,data=FILE

Without a model it trains the embedded T5 on the embedded tasks.

differs: follows the text and flylora.py in the released code
  (gfyddha/FlyLoRA): experts are chosen by |x A + d|, and d moves towards even
  loads, by 1e-3 once per optimizer step. flylora.py compares counts with k / r,
  so that d only falls; the fork of peft beside it, which the training script
  runs, takes the largest signed values and moves d in every forward pass,
  evaluation too. Sites and training settings are those of that script, whose
  texts on MMLU have 128 tokens.
scale: alpha / r = 64 / 32 = 2, here written as rank-one experts with alpha 2.
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  c = config_lib.finetuning(
    values, 'flylora', learning_rate=0.0003, batch_size=128, length=128
  )
  c.optimizer.schedule = 'linear'
  return c

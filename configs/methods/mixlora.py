# SPDX-License-Identifier: Apache-2.0
"""MixLoRA: whole feed-forwards that share the frozen weights, as experts.

Li et al., arXiv:2404.15159.
python -m moepeft.train --workdir=DIR \
  --config=configs/methods/mixlora.py:model=PATH,data=FILE

Without a model it trains the embedded T5 on the embedded tasks.

differs: follows the released code that trains it (TUDB-Labs/MoE-PEFT): gates
  drawn from N(0, 0.02^2), and a load balance with the coefficient 1e-3, in
  which each of a token's two experts counts. Here their mean counts, with twice
  the coefficient, and the loss is computed for each layer and averaged; the
  code joins the logits of all layers first. It computes the frozen products of
  each expert's tokens, here once for all experts: the same function.
scale: alpha / r = 32 / 16 = 2 in an expert, times weights that sum to one; the
  LoRA on the attention has the same.
"""

from moepeft import config as config_lib

_LORA = 'lora(rank=16, alpha=32.0, dropout=0.05, a_init=kaiming'


def get_config(values: str = ''):
  c = config_lib.finetuning(
    values,
    f'mixlora + {_LORA}, targets="*/[qkvo]")',
    learning_rate=0.0002,
    batch_size=16,
    length=512,
  )
  c.optimizer.schedule = 'constant'
  c.router_losses.load_balance = 2e-3
  return c

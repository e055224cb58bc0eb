# SPDX-License-Identifier: Apache-2.0
"""MixLoRA: whole feed-forwards that share the frozen weights, as experts.

Li et al., arXiv:2404.15159.
python -m moepeft.train --workdir=DIR \
  --config=configs/methods/mixlora.py:model=PATH,data=FILE

Without a model it trains the embedded T5 on the embedded tasks.

differs: follows the released code (TUDB-Labs/MixLoRA): coefficient 1e-3 of the
  load balance, gates drawn from N(0, 0.02^2). Here the load balance is computed
  for each layer and averaged; the code joins the logits of all layers first.
  The paper's frozen products are computed once for each chosen expert, here
  once for all: the same function.
scale: alpha / r = 32 / 16 = 2 in an expert, times weights that sum to one; the
  LoRA on the attention has the same.
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  c = config_lib.finetuning(
    values,
    'mixlora + lora(rank=16, alpha=32.0, a_init=kaiming, targets="*/[qkvo]")',
    learning_rate=0.0002,
    batch_size=16,
    length=512,
  )
  c.router_losses.load_balance = 1e-3
  return c

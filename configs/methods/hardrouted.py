# SPDX-License-Identifier: Apache-2.0
"""Hard-Routed MoR-LoRA: trained LoRAs, exactly one of them for each token.

Molavi et al., arXiv:2606.31413. The experts are LoRAs of a feed-forward's
projections and stay as they are; a router, which takes one of them at full
scale, and a LoRA of the attention are trained:
python -m moepeft.train --workdir=DIR \
  --config=configs/methods/hardrouted.py:model=PATH,data=FILE,adapters=A|B

Without a model it trains the embedded T5 on the embedded tasks.

differs: follows the released code (sar-molavi/hard-routed-mor-lora), of the
  paper only the abstract was read. The code has a router for each layer, as
  here, or by router_shared_across_layers, which its example configs set, one
  for all layers. Its straight-through gradient reaches the probability of the
  chosen expert alone, here those of all experts. The LoRAs have the size of its
  example config, and the training settings are the defaults of its mixer.train;
  its experts are trained before, by reinforcement learning, and the text is
  distilled from them.
scale: alpha / r = 256 / 128 = 2, of one expert; the LoRA at the attention has
  the same.
"""

from moepeft import config as config_lib

_LORA = 'lora(rank=128, alpha=256.0, dropout=0.1, a_init=kaiming'


def get_config(values: str = ''):
  return config_lib.finetuning(
    values,
    f'hardrouted({{adapters}}) + {_LORA}, targets="*/[qkvo]")',
    learning_rate=1e-4,
  )

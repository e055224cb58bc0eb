# SPDX-License-Identifier: Apache-2.0
"""X-LoRA: trained LoRAs, weighted by a first pass of the base alone.

Buehler and Buehler, arXiv:2402.07148. Each token's last hidden state in that
pass gives its weights at every site and layer; only these heads are trained:
python -m moepeft.train --workdir=DIR \
  --config=configs/methods/xlora.py:model=PATH,data=FILE,adapters=A|B

It needs a decoder-only model. Generation keeps a second KV cache, that of the
first pass.

differs: follows peft's X-LoRA with layerwise_scalings, as in the paper, and a
  head of one linear layer, the default of both codes; by peft's default all
  layers have the same weights. Deeper heads are not here. The first pass has no
  dropout. The training settings were not taken from the paper.
scale: alpha / r = 16 / 4 = 4 where no adapters say another, times weights that
  sum to one.
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  return config_lib.finetuning(values, 'xlora({adapters})')

# SPDX-License-Identifier: Apache-2.0
"""Arrow: trained LoRAs, routed by the direction that each of them changes.

Ostapenko et al., arXiv:2405.11157. Nothing is trained:
python -m moepeft.convert --output=DIR \
  --config=configs/methods/arrow.py:model=PATH,adapters=A|B

writes the mixture, which is served, scored and generated with as any adapter.

differs: follows peft's Arrow: the 3 largest of |x v_e|, temperature 1, no
  division by |x|, though peft calls the product a cosine. peft finds v_e by 15
  power iterations, here it is computed exactly. The released code (mttl)
  routes over all adapters where its command line gives no k. peft's further
  option subtracts the mean of general adapters (GenKnowSub) and is not here.
scale: alpha / r = 16 / 4 = 4 where no adapters say another, times weights that
  sum to one.
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  return config_lib.finetuning(values, 'arrow({adapters})')

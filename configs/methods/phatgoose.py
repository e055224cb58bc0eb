# SPDX-License-Identifier: Apache-2.0
"""PHATGOOSE: trained LoRAs, each with a gate, routed by their gates.

Muqeeth et al., arXiv:2402.05859. With one adapter it trains that adapter's gate
on the adapter's own data, everything else frozen:
python -m moepeft.train --workdir=DIR \
  --config=configs/methods/phatgoose.py:model=PATH,data=FILE,adapters=A
python -m moepeft.convert --workdir=DIR --output=GATED_A

With several, which have gates, nothing is left to train:
python -m moepeft.convert --output=MIXTURE \
  --config=configs/methods/phatgoose.py:model=PATH,adapters=GATED_A|GATED_B

differs: follows the released code (r-three/phatgoose) on T5: 100 steps of AdamW
  at 5e-3 with 6 percent of warm-up and 1024 examples a batch, as in the paper.
  Its LoRA draws A from N(0, 0.01^2), here N(0, 0.02^2); its standardization
  adds 1e-5 to the variance, which the paper does not have.
scale: alpha / r = 1 / 16 = 0.0625, times the gate, or weights that sum to one.
"""

from moepeft import config as config_lib
from moepeft.config import method_string


def get_config(values: str = ''):
  c = config_lib.finetuning(
    values,
    'phatgoose({adapters})',
    steps=100,
    batch_size=1024,
    learning_rate=5e-3,
  )
  c.optimizer.schedule = 'constant'
  c.optimizer.warmup_steps = c.steps * 6 // 100
  paths = method_string.parse(c.method).get('from_adapters', ())
  if len(paths) == 1:
    router = 'router=sigmoid(kernel_init=zeros)'
    c.method = f'mixture(from_adapters={[*paths]}, {router})'
  return c

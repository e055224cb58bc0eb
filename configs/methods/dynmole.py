# SPDX-License-Identifier: Apache-2.0
"""DynMoLE: more experts for tokens of which the router is not sure.

arXiv:2504.00661.
python -m moepeft.train --workdir=DIR \
  --config=configs/methods/dynmole.py:model=PATH,data=FILE

Without a model it trains the embedded T5 on the embedded tasks.

differs: routing and losses follow the released code, a branch of MoE-PEFT.
  Its loss of the entropy counts padding too, and its losses join the tokens of
  all layers, here each layer has its own. Rank, alpha, experts and learning
  rate are not stated there; here they are those of MoLA.
scale: alpha / r = 16 / 8 = 2, times weights whose sum is below one unless all
  experts are used.
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  c = config_lib.finetuning(values, 'dynmole', learning_rate=3e-4)
  c.router_losses.tsallis_entropy = 1e-2
  c.router_losses.adaptive_balance = 1e-3
  return c

# SPDX-License-Identifier: Apache-2.0
"""LD-MoLE: sparse weights whose sparsity each token learns.

arXiv:2509.25684.
python -m moepeft.train --workdir=DIR \
  --config=configs/methods/ldmole.py:model=PATH,data=FILE

Without a model it trains the embedded T5 on the embedded tasks.

differs: follows the released code (eshentw/LD-MoLE), whose script has a balance
  loss of 1.0, no loss of sparsity and 512 hidden units. One MLP for each width
  serves the whole net there, of 256 units in the paper; here each site has its
  own, of 16, whose hidden biases start at 0, there at -2.5. The code's router
  reads x after the dropout, here before it. Its rate falls twice, here it is
  constant.
scale: alpha / r = 16 / 8 = 2, times weights that sum to one.
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  c = config_lib.finetuning(values, 'ldmole', learning_rate=1e-4, batch_size=32)
  c.optimizer.schedule = 'constant'
  c.optimizer.weight_decay = 0.1
  c.router_losses.sparsegen_balance = 1.0
  return c

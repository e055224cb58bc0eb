# SPDX-License-Identifier: Apache-2.0
"""Lily: A's of groups of layers, and B's of all layers, mixed by a router.

Zhong et al., arXiv:2407.09946.
python -m moepeft.train --workdir=DIR \
  --config=configs/methods/lily.py:model=PATH,data=FILE

Without a model it trains the embedded T5 on the embedded tasks.

differs: follows the released code (yibozhong/lily), its script of LLaMA-3-8B,
  but for the router's mean: there, and in peft, a token is routed by the mean
  over the whole batch, later tokens and padding included. Here each token is
  routed by itself; router=token_mean is the mean over an example, for
  encoders alone. The B's are those of a stack, so that a T5 has two sets.
scale: alpha / r = 16 / 16 = 1, times weights that sum to one.
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  return config_lib.finetuning(
    values, 'lily', learning_rate=3e-4, batch_size=16, length=256
  )

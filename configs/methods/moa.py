# SPDX-License-Identifier: Apache-2.0
"""MoA: LoRA at five projections and a bottleneck, each with a gate of its own.

Cao et al., arXiv:2506.05928. Of a layer's input one router makes a sigmoid gate
for each of the six adapters.
python -m moepeft.train --workdir=DIR \
  --config=configs/methods/moa.py:model=PATH,data=FILE

Without a model it trains the embedded T5 on the embedded tasks.

differs: follows the released code (DCDmllm/MoA, MoA_Transformers), whose router
  reads the normalized input of the attention; of the paper only the abstract
  was read. The code for LLaMA 3 beside it reads the input before the norm, and
  has a rate of 7.5e-4. Its soft variant has a seventh expert, ten prompt
  vectors: keys and values are the layer's own projections of them, with a
  softmax apart from that of the tokens and a gate for each head that starts at
  zero. MoA_Transformers turns it off, and it is left out here: the expert
  `prefix` has keys and values of its own in the softmax of the tokens. Both
  projections of the bottleneck start from Xavier's initializer times 1e-4
  there, here from N(0, 0.01^2) and zero. A T5's decoder layer has a second
  router, of the encoder's tokens, for the keys and values of its
  cross-attention. Sparse MoA sets gates below a threshold to zero, which has no
  gradient, in the code either: it is moa(router=sigmoid(hidden=4, bias=True,
  kernel_init=kaiming, max_threshold=0.5)).
scale: alpha / r = 8 / 8 = 1 of each LoRA, times gates that sum to anything.
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  c = config_lib.finetuning(values, 'moa', learning_rate=1e-4, length=300)
  c.optimizer.schedule = 'constant'
  return c

# SPDX-License-Identifier: Apache-2.0
"""HMoRA: routed by token in low layers, by prompt in high ones.

Liao et al., ICLR 2025, openreview lTkHiXeuDl.
python -m moepeft.train --workdir=DIR \
  --config=configs/methods/hmora.py:model=PATH,data=FILE

Without a model it trains the embedded T5 on the embedded tasks.

differs: follows the released code (LiaoMengqi/HMoRA), where a transformer layer
  over the prompt's embeddings makes the vector that the prompt is routed by,
  and is trained with the routers. Here each router takes the mean of its own
  input over the prompt, so this is not the paper's task encoder. The code sums
  the losses of all routers with a weight of 0.005; here they are averaged, so
  the weight is larger by the number of routers in its script, two in each of
  28 layers. B's rate is 1.2 times the others', as in its script. It also has
  dropout of the routers' input.
scale: alpha / r = 8 / 8 = 1, by rsLoRA alpha / sqrt(r) = 2.83; times weights
  that sum to one. The LoRA at the output and down projections has the same.
"""

from moepeft import config as config_lib

_LORA = 'lora(rank=8, alpha=8.0, rslora=True, dropout=0.1, a_init=kaiming'


def get_config(values: str = ''):
  c = config_lib.finetuning(
    values,
    f'hmora + {_LORA}, targets="*/o|*/wo")',
    learning_rate=5e-5,
  )
  c.optimizer.schedule = 'constant'
  c.optimizer.groups = '*/b: rate_ratio=1.2'
  c.loss.label_smoothing = 0.1
  c.router_losses.token_js = c.router_losses.prompt_js = 0.005 * 2 * 28
  return c

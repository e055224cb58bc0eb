# SPDX-License-Identifier: Apache-2.0
"""CoMoL: r x r cores as experts, between one A and one B.

arXiv:2603.00573.
python -m moepeft.train --workdir=DIR \
  --config=configs/methods/comol.py:model=PATH,data=FILE

Without a model it trains the embedded T5 on the embedded tasks.

differs: follows the released code (DCDmllm/CoMoL) with its router on x A; its
  configs have 4 to 16 experts. The code applies dropout to the merged core and
  once more to its output; here, as in LoRA, to the input.
scale: alpha / r = 16 / 16 = 1, times weights that sum to one.
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  c = config_lib.finetuning(values, 'comol', learning_rate=1e-4)
  c.optimizer.schedule = 'constant'
  return c

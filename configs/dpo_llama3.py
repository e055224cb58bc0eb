# SPDX-License-Identifier: Apache-2.0
"""DPO on a Llama 3 of any size, on accelerators.

python -m moepeft.train --workdir=/tmp/dpo \
  --config=configs/dpo_llama3.py:model=LLAMA,data=PAIRS.json

LLAMA is a directory or hub name in Hugging Face's form. The base is held once:
policy and reference are two passes of the same weights.
--config.model.quantize=nf4 makes it smaller still.
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  v = config_lib.values(
    values, model='', data='', method='molora(experts=4, rank=8, alpha=32)'
  )
  c = config_lib.default()
  c.objective, c.method = 'dpo', v.method
  c.model.path = v.model
  if not v.model:
    # What can be counted, not trained.
    c.model.family, c.model.size = 'llama', '3.1-8b'
  c.model.dtype = c.model.param_dtype = 'bfloat16'
  c.model.remat = 'full'
  c.model.attention = 'chunked'
  # The first loss is then ln 2, and a pair is compared without noise.
  c.model.dropout = 0.0
  c.data.source, c.data.path = 'preference', v.data
  # Each of a pair's two answers in a row of so many tokens, in one pass.
  c.data.length, c.data.packing = 2048, True
  c.data.validation_fraction = 0.1
  c.batch_size = 64
  c.gradient_accumulation_steps = 8
  c.steps = 1000
  c.sharding.preset = 'fsdp'
  c.optimizer.learning_rate = 5e-5
  c.optimizer.schedule = 'cosine'
  c.optimizer.warmup_steps = 100
  c.evaluation.before = True
  c.evaluation.every_steps = 100
  c.evaluation.batch_size = 16
  c.checkpoint.every_steps = 100
  c.log.every_steps = 10
  return c

# SPDX-License-Identifier: Apache-2.0
"""MoLoRA on Llama 3.x by conversations, its weights spread over accelerators.

python -m moepeft.train --workdir=DIR \
  --config=configs/sft_llama3.py:model=meta-llama/Llama-3.2-1B-Instruct,data=FILE

FILE holds conversations, see configs/sft.py.
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  v = config_lib.values(
    values,
    model='',
    data='',
    method='molora(experts=4, rank=8, alpha=32)',
    steps=1000,
  )
  c = config_lib.default()
  c.objective, c.method = 'causal', v.method
  c.steps, c.batch_size = v.steps, 32
  c.model.path, c.model.dropout = v.model, 0.0
  if not v.model:
    # What can be counted, not trained.
    c.model.family, c.model.size = 'llama', '3.2-1b'
  c.model.dtype = c.model.param_dtype = 'bfloat16'
  c.model.remat = 'full'
  c.sharding.preset = 'fsdp'
  c.data.source, c.data.path = 'chat', v.data
  c.data.length, c.data.packing = 2048, True
  c.optimizer.learning_rate = 1e-4
  c.optimizer.schedule = 'cosine'
  c.optimizer.warmup_steps = 50
  c.evaluation.every_steps = 100
  c.evaluation.batch_size = 32
  return c

# SPDX-License-Identifier: Apache-2.0
"""MoLoRA on Qwen3 by conversations, on an accelerator.

python -m moepeft.train --workdir=DIR \
  --config=configs/sft_qwen3.py:model=Qwen/Qwen3-0.6B,data=FILE

FILE holds conversations, see configs/sft.py. Qwen3's template renders a last
answer with an empty thought and drops it from earlier ones; both are found
and trained as they stand.
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
  c.steps, c.batch_size = v.steps, 16
  c.model.path, c.model.dropout = v.model, 0.0
  if not v.model:
    # What can be counted, not trained.
    c.model.family, c.model.size = 'qwen3', '0.6b'
  c.model.dtype = c.model.param_dtype = 'bfloat16'
  c.model.remat = 'full'
  c.data.source, c.data.path = 'chat', v.data
  c.data.length, c.data.packing = 2048, True
  c.optimizer.learning_rate = 1e-4
  c.optimizer.schedule = 'cosine'
  c.optimizer.warmup_steps = 50
  c.evaluation.every_steps = 100
  c.evaluation.batch_size = 8
  return c

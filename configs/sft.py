# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning of any chat model, by any method, on conversations.

python -m moepeft.train --workdir=DIR \
  --config=configs/sft.py:model=PATH,data=FILE,method='molora(experts=4,rank=4)'

PATH is a directory or hub name in Hugging Face's form, or 'smollm2'; FILE holds
conversations as alpaca, sharegpt, OpenAI's messages or TRL's prompt and
completion. The loss is that of the assistant's turns. See what is trained with
python -m moepeft.data --show_batch and the same --config.
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  v = config_lib.values(
    values,
    model='',
    data='',
    method='lora(rank=8)',
    steps=300,
    batch_size=16,
    length=512,
    learning_rate=2e-4,
  )
  c = config_lib.default()
  c.objective, c.method = 'causal', v.method
  c.steps, c.batch_size = v.steps, v.batch_size
  c.model.path, c.model.dropout = v.model, 0.0
  if not v.model:
    # What can be counted, not trained.
    c.model.family, c.model.size = 'llama', 'smollm2-135m'
  c.data.source, c.data.path = 'chat', v.data
  c.data.length, c.data.packing = v.length, True
  c.optimizer.learning_rate = v.learning_rate
  c.optimizer.schedule = 'cosine'
  c.optimizer.warmup_steps = v.steps // 20
  c.evaluation.every_steps = max(v.steps // 6, 1)
  c.evaluation.batch_size = v.batch_size
  return c

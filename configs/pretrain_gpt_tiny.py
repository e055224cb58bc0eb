# SPDX-License-Identifier: Apache-2.0
"""A small decoder of bytes trained on plain text from nothing.

python -m moepeft.train --config=configs/pretrain_gpt_tiny.py:text=PATH \
  --workdir=DIR

PATH is a .txt file, .jsonl rows with a text, or a directory of them. The last
twentieth of the text is held out; its loss is that of a byte, in nats.
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  v = config_lib.values(values, text='', steps=1500)
  c = config_lib.default()
  c.method, c.objective = 'full', 'causal'
  c.steps, c.batch_size = v.steps, 16
  c.model.path, c.model.family, c.model.size = '', 'llama', 'tiny'
  c.model.dropout = 0.1
  c.data.source, c.data.path, c.data.tokenizer = 'text', v.text, 'bytes'
  c.data.length = 256
  c.optimizer.learning_rate = 1e-3
  c.optimizer.schedule = 'cosine'
  c.optimizer.warmup_steps = v.steps // 15
  c.optimizer.weight_decay = 0.1
  c.optimizer.b2 = 0.95
  c.evaluation.every_steps = 250
  c.evaluation.batch_size = 16
  c.checkpoint.every_steps = 250
  c.checkpoint.keep_best = True
  return c

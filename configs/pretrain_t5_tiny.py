# SPDX-License-Identifier: Apache-2.0
"""The pretraining that made the embedded base, moepeft/assets/t5_tiny.

python -m moepeft.train --config=configs/pretrain_t5_tiny.py --workdir=W
python -m moepeft.convert --workdir=W --to=hf --output=moepeft/assets/t5_tiny
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  v = config_lib.values(values, steps=9000)
  c = config_lib.default()
  c.method = 'full'
  c.steps = v.steps
  c.batch_size = 32
  c.model.path = ''
  c.model.size = 'tiny'
  c.model.dropout = 0.0
  # Heads times head size differs from d_model, as in T5 1.1 small.
  c.model.shape.update(
    vocab=384,
    d_model=128,
    heads=2,
    head_dim=48,
    ffn=256,
    encoder_layers=3,
    decoder_layers=2,
    buckets=32,
    max_distance=128,
  )
  c.model.unroll = 3
  c.data.tasks = 'A'
  c.data.inputs_length = 128
  c.optimizer.learning_rate = 1.5e-3
  c.optimizer.schedule = 'cosine'
  c.optimizer.warmup_steps = 500
  c.optimizer.weight_decay = 0.01
  c.optimizer.b2 = 0.98
  c.checkpoint.every_steps = 500
  c.log.every_steps = 100
  c.evaluation.before = False
  return c

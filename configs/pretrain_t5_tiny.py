# SPDX-License-Identifier: Apache-2.0
"""A small T5 of bytes trained from nothing, on plain text or on tasks.

On text, T5's span corruption of its own, PATH a .txt file, .jsonl rows with a
text, or a directory of them:

python -m moepeft.train --config=configs/pretrain_t5_tiny.py:text=PATH \
  --workdir=DIR

On tasks, the pretraining that made the embedded base, moepeft/assets/t5_tiny,
in two stages: first words and pairs, which are short and so cheap (1,500
steps, a quarter of an hour on two cores); then every family of group A (9,000
steps, about an hour).

python -m moepeft.train --config=configs/pretrain_t5_tiny.py:stage=1 \
  --workdir=W1
python -m moepeft.convert --workdir=W1 --to=hf --output=BASE
python -m moepeft.train --config=configs/pretrain_t5_tiny.py:stage=2 \
  --workdir=W2 --config.model.path=BASE
python -m moepeft.convert --workdir=W2 --to=hf --dtype=bfloat16 \
  --output=moepeft/assets/t5_tiny
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  v = config_lib.values(values, stage=1, text='')
  c = config_lib.default()
  c.method = 'full'
  c.model.path = ''
  c.model.family = 't5'
  c.model.size = 'tiny'
  c.model.dropout = 0.0
  # Heads times head size differs from d_model, as in T5 1.1 small.
  c.model.shape.update(
    vocab=384,
    d_model=128,
    heads=4,
    head_dim=24,
    ffn=256,
    encoder_layers=3,
    decoder_layers=2,
  )
  c.model.scan_unroll = 3
  c.data.tokenizer = 'bytes'
  c.optimizer.b2 = 0.98
  c.optimizer.schedule = 'cosine'
  c.checkpoint.every_steps = 250
  c.log.every_steps = 50
  c.evaluation.before = False
  if v.text:
    c.data.source, c.data.path, c.data.pretraining_objective = (
      'text',
      v.text,
      'spans',
    )
    # 141 bytes of text: 21 of them in 7 hidden spans.
    c.data.inputs_length = 128
    c.data.targets_length = 29
    c.optimizer.learning_rate = 1.5e-3
    c.batch_size = 32
    c.steps = 3000
    c.optimizer.warmup_steps = 150
    c.evaluation.every_steps = 250
  elif v.stage == 1:
    # Looking up is the harder half.
    c.data.tasks = 'kind,opinion,recall,recall'
    c.data.inputs_length = 48
    c.data.targets_length = 12
    c.optimizer.learning_rate = 1.5e-3
    c.batch_size = 128
    c.steps = 1500
    c.optimizer.warmup_steps = 150
    c.evaluation.tasks = 'kind,opinion,recall'
  else:
    c.data.tasks = 'A'
    c.data.inputs_length = 96
    c.data.targets_length = 14
    c.optimizer.learning_rate = 1e-3
    c.batch_size = 64
    c.steps = 9000
    c.optimizer.warmup_steps = 200
    c.evaluation.tasks = 'A,B'
  return c

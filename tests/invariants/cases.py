# SPDX-License-Identifier: Apache-2.0
"""Small runs whose losses and gradient norms are recorded in losses.json.

python -m tests.invariants.cases [CASE ...] records them anew: to be done only
by a commit that says why a number moves.
"""

import json
import pathlib
import sys
import tempfile

from moepeft import config as config_lib
from moepeft import train

from . import bases

STEPS = 20
# Other compiler options (no optimization, no fusion emitters, vectors of 128
# bits) change losses by up to 4e-7 and gradient norms by up to 4e-5.
TOLERANCE = {'loss': 1e-5, 'gradient_norm': 3e-4}
FILE = pathlib.Path(__file__).parent / 'losses.json'
ROUTED = 'molora(experts=3, rank=2)'
SPARSE = 'molora(experts=3, rank=2, router=topk(k=2))'
SFT = {
  'data.tokenizer': '',
  'data.source': 'chat',
  'data.path': 'package:chats',
  'data.packing': True,
  'data.length': 320,
}
TEXT = {'data.source': 'text', 'data.path': 'package:text', 'data.length': 96}
PAIRS = {
  'data.tokenizer': '',
  'data.source': 'preference',
  'data.path': 'package:pairs',
  'data.length': 320,
  'data.validation_fraction': 0.2,
}
# {name: (family, changes of the default config)}
CASES = {
  't5/molora': ('t5', {'method': ROUTED}),
  't5/molora_topk_accumulated_packed': (
    't5',
    {
      'method': SPARSE,
      'gradient_accumulation_steps': 2,
      'data.packing': True,
      'loss.average_over': 'sequences',
      'loss.z_loss': 1e-3,
      'router_losses.load_balance': 0.1,
      'router_losses.z': 0.01,
      'router_losses.entropy': 0.01,
    },
  ),
  't5/mov_dropout_cosine': (
    't5',
    {
      'method': 'mov(experts=3, router=softmax(jitter=0.1))',
      'model.dropout': 0.1,
      'optimizer.schedule': 'cosine',
      'optimizer.warmup_steps': 3,
    },
  ),
  't5/mov_paper_semantics': (
    't5',
    {'method': 'mov(experts=3)', 'semantics': 'paper', 'model.remat': 'full'},
  ),
  't5/lora_adafactor': (
    't5',
    {
      'method': 'lora(rank=3)',
      'optimizer.name': 'adafactor',
      'optimizer.decay_initial_step': 1_100_000,
      'optimizer.max_grad_norm': 0.0,
    },
  ),
  't5/dora_packed': ('t5', {'method': 'dora(rank=3)', 'data.packing': True}),
  't5/ia3_smoothed': ('t5', {'method': 'ia3', 'loss.label_smoothing': 0.1}),
  't5/full': ('t5', {'method': 'full', 'optimizer.weight_decay': 0.01}),
  't5/molora_int8': ('t5', {'method': ROUTED, 'model.quantize': 'int8'}),
  't5/lora_spans': (
    't5',
    {
      'method': 'lora(rank=3)',
      **TEXT,
      'data.pretraining_objective': 'spans',
      'data.targets_length': 22,
    },
  ),
  'llama/molora_sft': ('llama', {'method': ROUTED, **SFT}),
  'llama/lora_nf4_text': (
    'llama',
    {'method': 'lora(rank=3)', 'model.quantize': 'nf4', **TEXT},
  ),
  'llama/mov_topk_text_accumulated': (
    'llama',
    {
      'method': 'mov(experts=3, router=topk(k=2))',
      'gradient_accumulation_steps': 2,
      'router_losses.load_balance': 0.1,
      **TEXT,
    },
  ),
  'llama/prompt_tasks': ('llama', {'method': 'prompt(length=4)'}),
  'llama/dpo_molora_packed': (
    'llama',
    {'objective': 'dpo', 'method': ROUTED, **PAIRS, 'data.packing': True},
  ),
  'llama/kto_lora': (
    'llama',
    {'objective': 'kto', 'method': 'lora(rank=3)', **PAIRS},
  ),
  'llama/simpo_dora': (
    'llama',
    {'objective': 'simpo', 'method': 'dora(rank=3)', **PAIRS},
  ),
}


def run(name: str, models: dict[str, str], workdir: str) -> dict:
  """Trains a case; returns its losses and gradient norms, one a step."""
  family, changes = CASES[name]
  c = config_lib.default()
  c.model.path, c.model.dropout = models[family], 0.0
  c.objective = 'causal' if family == 'llama' else 'seq2seq'
  c.data.tokenizer, c.data.length = 'bytes', 128
  c.data.inputs_length, c.data.targets_length = 96, 12
  c.steps, c.batch_size = STEPS, 4
  c.optimizer.learning_rate = 3e-3
  c.evaluation.before = c.evaluation.after = False
  c.checkpoint.every_steps = c.log.every_steps = STEPS
  c.log.trackers, c.log.plots = '', False
  with c.unlocked():
    c.update_from_flattened_dict(changes)
  train.train(c, workdir)
  lines = pathlib.Path(workdir, 'metrics.jsonl').read_text().splitlines()
  rows = [row for row in map(json.loads, lines) if 'gradient_norm' in row]
  assert [row['step'] for row in rows] == list(range(1, STEPS + 1))
  return {key: [row[key] for row in rows] for key in ('loss', 'gradient_norm')}


def main() -> None:
  unknown = set(sys.argv[1:]) - CASES.keys()
  if unknown:
    raise SystemExit(f'no case {sorted(unknown)[0]!r}; name some of {[*CASES]}')
  losses = json.loads(FILE.read_text()) if FILE.exists() else {}
  with tempfile.TemporaryDirectory() as folder:
    models = bases.write(pathlib.Path(folder))
    for i, name in enumerate(sys.argv[1:] or CASES):
      losses[name] = run(name, models, f'{folder}/{i}')
      FILE.write_text(json.dumps(losses, indent=1) + '\n')


if __name__ == '__main__':
  main()

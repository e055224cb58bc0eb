# SPDX-License-Identifier: Apache-2.0
"""Time of a fine-tuning step relative to peft's, at SmolLM2-135M's shapes.

python benchmarks/sft_step.py [--json=FILE]

One process, float32, random weights; 4 rows of 256 tokens, every one trained.
A step is the loss and the gradients of what is trained, without dropout or
optimizer. `peft` is LoRA of Hugging Face's peft on `transformers` in torch,
rank 8 at the six projections where ours is by default; both sides begin with
the same weights, and their first losses are printed. Sides take turns, and
ratios are medians over the rounds of a round's ratio.

The frozen products are 2 x 135 M weights x 1024 tokens forward and as many
backward through the activations, 0.55 TFLOP; attention's add 1.1 %.
"""

import json

import decode
import jax
import numpy as np
import train_step
from absl import flags

from moepeft.config import command_line
from moepeft.evaluation.step_cost import CompiledStep
from moepeft.models import FAMILIES
from moepeft.nn.initializers import init_params
from moepeft.nn.scan_layers import unstack_layers
from moepeft.objectives import seq2seq
from moepeft.objectives.cross_entropy import mean_loss
from moepeft.peft import build

ROWS, LENGTH = 4, 256
# {side: (method, remat)}; the mixture has the rank of its LoRA in all.
SIDES = {
  'lora': ('lora(rank=8, alpha=16)', 'none'),
  'molora': ('molora(experts=2, rank=4)', 'none'),
  'lora_full': ('lora(rank=8, alpha=16)', 'full'),
}
# As `lora` by default.
PROJECTIONS = ('q', 'k', 'v', 'o', 'gate', 'down')

# {ratio: (side above, side below)}
TIMES = {
  'time_peft_lora_over_lora': ('peft', 'lora'),
  'time_molora_over_lora_equal_rank': ('molora', 'lora'),
  'time_remat_over_none': ('lora_full', 'lora'),
}


def example() -> dict[str, np.ndarray]:
  """A full batch of random tokens, every one but the first predicted."""
  rng = np.random.default_rng(0)
  vocab = decode.SMOLLM2['vocab_size']
  tokens = rng.integers(2, vocab, (ROWS, LENGTH + 1), dtype=np.int32)
  whole = np.ones((ROWS, LENGTH), bool)
  return {
    'inputs': tokens[:, :-1],
    'inputs_mask': whole,
    'targets': tokens[:, 1:],
    'targets_mask': whole,
  }


def compile_jax(config, params, method: str, remat: str = 'none'):
  """A compiled step and its arguments."""
  family = FAMILIES[config.family]
  built = build(method, family.sites(config))
  model = family.module(
    config, built.adapter_map, remat=remat, scan=remat != 'none'
  )
  params = params if remat != 'none' else unstack_layers(params)
  batch = example()
  peft = init_params(model, batch, 0)['peft']

  def loss(peft, params, batch):
    variables = {'params': params, 'peft': peft}
    total, aux = seq2seq.loss_sums(model.apply, variables, batch, None)
    return mean_loss(total, aux)

  arguments = jax.device_put((peft, params, batch))
  step = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()
  return step, arguments


def jax_side(config, params, method: str, remat: str) -> CompiledStep:
  step, arguments = compile_jax(config, params, method, remat)

  def run():
    return float(jax.block_until_ready(step(*arguments))[0])

  return CompiledStep(run, step.memory_analysis().temp_size_in_bytes)


def torch_side(torch_model) -> CompiledStep:
  """The same of peft's; the model is changed by it."""
  import peft
  import torch

  names = [f'{site}_proj' for site in PROJECTIONS]
  model = peft.get_peft_model(
    torch_model,
    peft.LoraConfig(r=8, lora_alpha=16, target_modules=names),
  )
  model.config.use_cache = False
  model.train()
  batch = example()
  inputs = torch.tensor(batch['inputs']).long()
  targets = torch.tensor(batch['targets']).long()
  trained = [p for p in model.parameters() if p.requires_grad]

  def run():
    logits = model(input_ids=inputs).logits.flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, targets.flatten())
    torch.autograd.grad(loss, trained)
    return loss.item()

  return CompiledStep(run, None)


def make() -> dict[str, CompiledStep]:
  torch_model = decode.theirs('')
  config, params = decode.read(torch_model)
  sides = {
    name: jax_side(config, params, method, remat)
    for name, (method, remat) in SIDES.items()
  }
  # Last: it wraps the torch model's projections.
  return sides | {'peft': torch_side(torch_model)}


def main(argv) -> None:
  del argv
  if _JSON.value:
    command_line.check_can_write(_JSON.value)
  sides = make()
  losses = {name: side.run() for name, side in sides.items()}
  print('first losses', {name: round(x, 5) for name, x in losses.items()})
  times = train_step.take_turns(sides, _ROUNDS.value)
  report = {
    name: train_step.ratio(times[above], times[below])
    for name, (above, below) in TIMES.items()
  }
  table = train_step.table(sides, times, SIDES, SIDES['lora'][0])
  print(table, flush=True)
  print(json.dumps(report, indent=2), flush=True)
  if _JSON.value:
    with open(_JSON.value, 'w') as f:
      json.dump(report, f, indent=2)


if __name__ == '__main__':
  _JSON = flags.DEFINE_string('json', None, 'Where to write the ratios.')
  _ROUNDS = flags.DEFINE_integer(
    'rounds', 5, 'Turns of every side.', lower_bound=1
  )
  command_line.run(main)

# SPDX-License-Identifier: Apache-2.0
"""Training steps of methods side by side, at T5-small size.

python benchmarks/train_step.py [--json=FILE]

One process, float32, random weights: d 512, 6 + 6 layers, 8 heads of 64, f
1024, vocabulary 32128; 8 rows of 256 and 64 tokens. A step is the loss and
the gradients of what is trained, without dropout or optimizer. All sides
share model and loss. They take turns, and ratios are medians over the rounds
of a round's ratio; memory is what the compiled step needs beside its
arguments.

`naive` is MoLoRA as in the released code: every expert's output is built and
then mixed. `peft` is LoRA of Hugging Face's peft on `transformers` in torch,
with the same shapes, where both are installed.
"""

import importlib.util
import json
import statistics
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from moepeft.config import command_line
from moepeft.evaluation.step_cost import CompiledStep, take_turns
from moepeft.models.t5 import model as t5
from moepeft.moe.router_stats import route
from moepeft.nn.adapter_hook import AdapterMap, contraction, flatten_features
from moepeft.nn.initializers import init_params, peft_param
from moepeft.objectives import seq2seq
from moepeft.objectives.cross_entropy import mean_loss
from moepeft.peft import build, low_rank
from moepeft.peft.methods import lora
from moepeft.peft.mixture import Mixture

SHAPE = t5.T5Config(
  d_model=512,
  heads=8,
  head_dim=64,
  ffn=1024,
  encoder_layers=6,
  decoder_layers=6,
  dropout=0.0,
)
ROWS, INPUTS, TARGETS = 8, 256, 64

_LORA, _MOLORA = 'lora(rank=40)', 'molora(experts=10, rank=4)'
# {side: (method, remat)}
SIDES = {
  'lora': (_LORA, 'none'),
  'lora_small': ('lora(rank=4)', 'none'),
  'molora': (_MOLORA, 'none'),
  'naive': (_MOLORA, 'none'),
  'mov1': ('mov(experts=1)', 'none'),
  'mov60': ('mov(experts=60)', 'none'),
  'molora_dots': (_MOLORA, 'dots'),
  'molora_full': (_MOLORA, 'full'),
  'naive_full': (_MOLORA, 'full'),
}


class Naive(Mixture):
  """The same function; builds [b, t, e, out] before it mixes."""

  @nn.compact
  def __call__(self, f, x, ctx):
    inside, outside = low_rank.shapes(f, 'molora')
    ranks = (self.experts, self.expert.rank)
    a = peft_param(
      self, 'a', lora.INIT_A, (*inside, *ranks), f'{f.input_axes}er'
    )
    b = peft_param(
      self, 'b', lora.INIT_B, (*ranks, *outside), f'er{f.output_axes}'
    )
    p = route(self, self.router, flatten_features(x), ctx).combine_weights
    _, _, outer, output = contraction(f.eqn)
    # As in `Lora.mix`: what is compared is how the experts' outputs are mixed.
    z = low_rank.down(x, a)
    each = jnp.einsum(f'bter,er{outer}->bte{outer}', z, b)
    mixed = jnp.einsum(f'bte{outer},bte->{output}', each, p)
    return f(x) + mixed * self.expert.scale


def example() -> dict[str, np.ndarray]:
  """A full batch of random tokens, every one real."""
  rng = np.random.default_rng(0)
  inputs = rng.integers(2, SHAPE.vocab, (ROWS, INPUTS), dtype=np.int32)
  targets = rng.integers(2, SHAPE.vocab, (ROWS, TARGETS), dtype=np.int32)
  return {
    'inputs': inputs,
    'inputs_mask': np.ones(inputs.shape, bool),
    'targets': targets,
    'targets_mask': np.ones(targets.shape, bool),
    'decoder_inputs': np.pad(targets[:, :-1], ((0, 0), (1, 0))),
  }


def compile_jax(
  method: str, remat: str = 'none', naive: bool = False, unroll: int = 6
) -> tuple[jax.stages.Compiled, tuple]:
  """A compiled step and its arguments."""
  adapter_map = build(method, t5.sites(SHAPE)).adapter_map
  if naive:
    adapter_map = AdapterMap(
      tuple((path, _naive(m)) for path, m in adapter_map.entries)
    )
  model = t5.T5(SHAPE, adapter_map, remat=remat, unroll=unroll)
  batch = example()
  variables = init_params(model, batch, 0)

  def loss(peft, params, batch):
    variables = {'params': params, 'peft': peft}
    total, aux = seq2seq.loss_sums(model.apply, variables, batch, None)
    return mean_loss(total, aux)

  arguments = jax.device_put((variables['peft'], variables['params'], batch))
  step = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()
  return step, arguments


def make_jax(method: str, remat: str, naive: bool, unroll: int) -> CompiledStep:
  step, arguments = compile_jax(method, remat, naive, unroll)
  memory = step.memory_analysis().temp_size_in_bytes
  return CompiledStep(lambda: jax.block_until_ready(step(*arguments)), memory)


def _naive(molora: Mixture) -> Naive:
  fields = ('expert', 'experts', 'router', 'name')
  return Naive(**{key: getattr(molora, key) for key in fields}, parent=None)


def make_peft() -> CompiledStep | None:
  """The same of Hugging Face's; None where torch or peft is not installed."""
  try:
    import peft
    import torch
    import transformers
  except ImportError:
    return None
  config = transformers.T5Config(
    vocab_size=SHAPE.vocab,
    d_model=SHAPE.d_model,
    d_kv=SHAPE.head_dim,
    d_ff=SHAPE.ffn,
    num_layers=SHAPE.encoder_layers,
    num_decoder_layers=SHAPE.decoder_layers,
    num_heads=SHAPE.heads,
    feed_forward_proj='gated-gelu',
    tie_word_embeddings=False,
    dropout_rate=0.0,
    use_cache=False,
    decoder_start_token_id=0,
  )
  sites = ['q', 'k', 'v', 'o', 'wi_0', 'wo']
  model = peft.get_peft_model(
    transformers.T5ForConditionalGeneration(config),
    peft.LoraConfig(r=40, lora_alpha=16, target_modules=sites),
  )
  model.train()
  batch = example()
  ids = {
    'input_ids': torch.tensor(batch['inputs']).long(),
    'attention_mask': torch.tensor(batch['inputs_mask']).long(),
    'labels': torch.tensor(batch['targets']).long(),
  }
  trained = [p for p in model.parameters() if p.requires_grad]

  def step():
    torch.autograd.grad(model(**ids).loss, trained)

  return CompiledStep(step, None)


# {ratio: (side above, side below)}
TIMES = {
  'time_naive_over_molora': ('naive', 'molora'),
  'time_molora_over_lora_equal_rank': ('molora', 'lora'),
  'time_mov60_over_mov1': ('mov60', 'mov1'),
  'time_peft_lora_over_lora': ('peft', 'lora'),
}
MEMORIES = {'memory_naive_over_molora': ('naive', 'molora')}


def ratio(above: Sequence[float], below: Sequence[float]) -> float | None:
  """The median over the rounds, None where a side has none."""
  each = [a / b for a, b in zip(above, below, strict=False)]
  return round(statistics.median(each), 3) if each else None


def ratios(sides, times) -> dict[str, float | None]:
  """The ratios of the module's docstring; None where a side is missing."""
  result = {}
  for name, (above, below) in TIMES.items():
    result[name] = ratio(times.get(above, ()), times.get(below, ()))
  for name, (above, below) in MEMORIES.items():
    pair = [sides[side].memory for side in (above, below) if side in sides]
    is_complete = len(pair) == 2 and all(pair)
    result[name] = round(pair[0] / pair[1], 3) if is_complete else None
  return result


def table(sides, times, descriptions=SIDES, peft='lora(rank=40)') -> str:
  """Each side's step time and memory over molora's, or the first side's."""
  reference = 'molora' if 'molora' in sides else next(iter(sides))
  lines = [f'{"side":12}  {"time":>6}  {"memory":>6}   over {reference}']
  for name, side in sides.items():
    each = [a / b for a, b in zip(times[name], times[reference], strict=True)]
    memory = '-'
    if side.memory and sides[reference].memory:
      memory = f'{side.memory / sides[reference].memory:.2f}'
    description = ', '.join(descriptions.get(name, (f'{peft} of peft',)))
    lines.append(
      f'{name:12}  {statistics.median(each):6.2f}  {memory:>6}   {description}'
    )
  return '\n'.join(lines)


def chosen(only: Sequence[str]) -> list[str]:
  """The sides to time: `only`, or all that can be.

  Raises:
    ValueError: a side does not exist, or is peft's and cannot be made.
  """
  for name in only:
    if name not in SIDES and name != 'peft':
      raise ValueError(f'--only takes {", ".join(SIDES)}, peft; got {name!r}')
  needed = ('torch', 'peft', 'transformers')
  missing = [n for n in needed if importlib.util.find_spec(n) is None]
  if not missing:
    return list(only) or [*SIDES, 'peft']
  why = f"the side 'peft' needs {', '.join(missing)}, not installed here"
  if 'peft' in only:
    raise ValueError(f'{why}; install it or leave the side out of --only')
  if not only:
    print(f'{why}; it is left out', flush=True)
  return list(only) or list(SIDES)


def make(names: Sequence[str], unroll: int) -> dict[str, CompiledStep]:
  sides = {
    name: make_jax(method, remat, name.startswith('naive'), unroll)
    for name, (method, remat) in SIDES.items()
    if name in names
  }
  if 'peft' in names:
    if (side := make_peft()) is None:
      raise ValueError('torch, transformers or peft cannot be imported')
    sides['peft'] = side
  return sides


def main(argv) -> None:
  del argv
  if _JSON.value:
    command_line.check_can_write(_JSON.value)
  sides = make(chosen(_ONLY.value), _UNROLL.value)
  times = take_turns(sides, _ROUNDS.value)
  report = ratios(sides, times)
  # First, so that a write that fails loses nothing.
  print(table(sides, times), json.dumps(report, indent=2), sep='\n', flush=True)
  if _JSON.value:
    with open(_JSON.value, 'w') as f:
      json.dump(report, f, indent=2)


if __name__ == '__main__':
  _JSON = flags.DEFINE_string('json', None, 'Where to write the ratios.')
  _ROUNDS = flags.DEFINE_integer(
    'rounds', 7, 'Turns of every side.', lower_bound=1
  )
  _UNROLL = flags.DEFINE_integer(
    'unroll', 6, 'Layers in one step of the scan.', lower_bound=1
  )
  _ONLY = flags.DEFINE_list('only', [], 'Sides to time; by default all.')
  command_line.run(main)

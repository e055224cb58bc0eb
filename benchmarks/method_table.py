# SPDX-License-Identifier: Apache-2.0
"""Parameters, FLOPs and step time of methods, over those of LoRA.

python benchmarks/method_table.py [--json=FILE]
python benchmarks/method_table.py --method='molora(experts=16)' --method=lora

By default the method of each config in configs/methods, and the dense and the
sparse form of mixtures (`--dispatch`). The model is a Llama of two layers with
the sizes of SmolLM2-135M; a step is the loss and the gradient of the adapter.
FLOPs are those of the products of matrices in the traced step, of each pass
(`moepeft.checkpoints.count_flops`). Each method takes turns with LoRA of rank
4; the ratio is the median over the rounds.
"""

import dataclasses
import importlib.util
import itertools
import json
import pathlib
import statistics

import jax
import numpy as np
import train_step
from absl import flags

from moepeft.checkpoints.count_flops import products
from moepeft.config import command_line
from moepeft.core.types import Tree
from moepeft.evaluation.step_cost import CompiledStep
from moepeft.models.decoder import llama
from moepeft.models.decoder.model import Decoder, DecoderConfig, sites
from moepeft.nn.initializers import init_params
from moepeft.objectives import seq2seq
from moepeft.objectives.cross_entropy import mean_loss
from moepeft.peft import build

SHAPE = dataclasses.replace(llama.SIZES['smollm2-135m'], vocab=512, layers=2)
ROWS, TOKENS = 8, 256
BASELINE = 'lora(rank=4)'
# {expert: its counts} of a top-k mixture, dense and sparse.
DISPATCH = {
  'lora(rank=4)': (8, 32, 128),
  'lora(rank=16)': (8, 16, 32, 64),
  'lora(rank=64)': (4, 8, 16),
  'ffn_lora(rank=16)': (4, 8, 16),
}
CONFIGS = pathlib.Path(__file__).parents[1] / 'configs' / 'methods'


def example(rows: int, tokens: int) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  ids = rng.integers(2, SHAPE.vocab, (rows, tokens + 1), dtype=np.int32)
  # A prompt of half the tokens; rows are of two tasks in turn.
  tasks = 1 + np.arange(rows)[:, None] % 2
  return {
    'inputs': ids[:, :-1],
    'inputs_mask': np.ones((rows, tokens), bool),
    'inputs_tasks': np.broadcast_to(tasks, (rows, tokens)).astype(np.int32),
    'targets': ids[:, 1:],
    'targets_mask': np.broadcast_to(
      np.arange(tokens) >= tokens // 2, (rows, tokens)
    ),
  }


@dataclasses.dataclass
class Row:
  """A method's compiled step.

  Attributes:
    parameters: in the collection 'peft'; forward, backward: FLOPs of a step.
  """

  side: CompiledStep
  parameters: int
  forward: int
  backward: int


def make(
  method: str, shape: DecoderConfig = SHAPE, rows: int = ROWS, tokens=TOKENS
) -> Row:
  """Compiles a method's step on a batch of rows of so many tokens."""
  built = build(method, sites(shape))
  model = Decoder(shape, built.adapter_map, scan=False)
  batch = example(rows, tokens)
  variables = init_params(model, batch, 0)

  def loss(peft: Tree, params: Tree, batch) -> jax.Array:
    variables = {'params': params, 'peft': peft}
    rngs = {name: jax.random.key(0) for name in ('router', 'dropout')}
    total, sums = seq2seq.loss_sums(model.apply, variables, batch, rngs)
    return mean_loss(total, sums)

  arguments = jax.device_put((variables['peft'], variables['params'], batch))
  gradient = jax.value_and_grad(loss)
  forward = products(loss, *arguments)
  step = jax.jit(gradient).lower(*arguments).compile()
  return Row(
    CompiledStep(
      lambda: jax.block_until_ready(step(*arguments)),
      step.memory_analysis().temp_size_in_bytes,
    ),
    sum(array.size for array in jax.tree.leaves(variables['peft'])),
    forward,
    products(gradient, *arguments) - forward,
  )


def config_methods() -> list[str]:
  """The methods of configs/methods; those over trained adapters are left out.

  Their experts are an adapter's, and their cost is that of `topk`.
  """
  methods = []
  for path in sorted(CONFIGS.glob('*.py')):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    method = module.get_config().method
    if method and 'from_adapters' not in method:
      methods.append(method)
  return methods


def step_ratio(method: Row, baseline: Row, rounds: int) -> float:
  """The median of the method's step time over the baseline's."""
  sides = {'method': method.side, 'baseline': baseline.side}
  times = train_step.take_turns(sides, rounds)
  pairs = zip(times['method'], times['baseline'], strict=True)
  return round(statistics.median(a / b for a, b in pairs), 2)


def method_rows(methods: list[str], rounds: int) -> list[dict]:
  baseline, rows = make(BASELINE), []
  print('| method | parameters | forward | backward | step time | memory |')
  print('| --- | --- | --- | --- | --- | --- |')
  for text in methods:
    method = make(text)
    row = {
      'method': text,
      'parameters': method.parameters,
      'forward': round(method.forward / baseline.forward, 2),
      'backward': round(method.backward / baseline.backward, 2),
      'time': step_ratio(method, baseline, rounds),
      'memory': round(method.side.memory / baseline.side.memory, 2),
    }
    rows.append(row)
    print(
      f'| `{text}` | {method.parameters:,} | {row["forward"]} | '
      f'{row["backward"]} | {row["time"]} | {row["memory"]} |',
      flush=True,
    )
  return rows


def dispatch_rows(rounds: int) -> list[dict]:
  """The step time of dense forms over sparse ones."""
  rows = []
  print('| expert | experts | k | dense / sparse |')
  print('| --- | --- | --- | --- |')
  for expert, counts in DISPATCH.items():
    for e, k in itertools.product(counts, (1, 2)):
      forms = {
        form: make(
          f'mixture(expert={expert}, experts={e}, router=topk(k={k}), '
          f"dispatch='{form}')"
        )
        for form in ('dense', 'sparse')
      }
      ratio = step_ratio(forms['dense'], forms['sparse'], rounds)
      rows.append({'expert': expert, 'experts': e, 'k': k, 'ratio': ratio})
      print(f'| `{expert}` | {e} | {k} | {ratio} |', flush=True)
  return rows


def main(argv) -> None:
  del argv
  if _JSON.value:
    command_line.check_can_write(_JSON.value)
  if _DISPATCH.value:
    rows = dispatch_rows(_ROUNDS.value)
  else:
    rows = method_rows(_METHOD.value or config_methods(), _ROUNDS.value)
  if _JSON.value:
    with open(_JSON.value, 'w') as f:
      json.dump(rows, f, indent=2)


if __name__ == '__main__':
  _JSON = flags.DEFINE_string('json', None, 'Where to write the figures.')
  _METHOD = flags.DEFINE_multi_string('method', [], 'Methods in place of all.')
  _ROUNDS = flags.DEFINE_integer(
    'rounds', 5, 'Turns of each pair.', lower_bound=1
  )
  _DISPATCH = flags.DEFINE_boolean(
    'dispatch', False, 'Compare dense and sparse mixtures.'
  )
  command_line.run(main)

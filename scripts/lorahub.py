# SPDX-License-Identifier: Apache-2.0
"""LoraHub: one LoRA of several, their weights searched without gradients.

  python scripts/lorahub.py --model=BASE --adapters=A,B --data=ROWS.jsonl \
    --output=DIR

Huang et al., arXiv:2307.13269: A = sum_i w_i A_i and B = sum_i w_i B_i, so that
the term is quadratic in w. The weights, within 1.5 of zero, minimize the loss
of a few examples and 0.05 times the mean of |w|. The released code searches
with NGOpt of nevergrad, here a (1+1) evolution strategy does.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags

from moepeft.checkpoints import adapter as adapter_lib
from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints import directory, run_metadata
from moepeft.checkpoints.open_adapter import check_base, load_adapter
from moepeft.config import command_line, default
from moepeft.core.types import Tree
from moepeft.data.readers import jsonl_rows
from moepeft.data.tokenizers.tokenizer import load_tokenizer
from moepeft.evaluation import eval_sets
from moepeft.evaluation.loglikelihood import Likelihood
from moepeft.peft import build
from moepeft.peft.build import function_of
from moepeft.peft.method_text import method_entry, resolve

BOUND, PENALTY = 1.5, 0.05


def combined(trees: Sequence[Tree], weights: np.ndarray) -> Tree:
  """The weighted sum of each array."""
  return jax.tree.map(
    lambda *leaves: np.float32(np.tensordot(weights, np.stack(leaves), 1)),
    *trees,
  )


def search(
  loss: Callable[[np.ndarray], float], size: int, steps: int, seed: int
) -> tuple[np.ndarray, float]:
  """(weights, their loss): a (1+1) evolution strategy that starts at zero.

  The step size follows the rule of one success in five.
  """
  rng = np.random.default_rng(seed)
  best, step_size = np.zeros(size), BOUND / 3
  least = loss(best)
  for _ in range(steps):
    step = step_size * rng.standard_normal(size)
    candidate = np.clip(best + step, -BOUND, BOUND)
    value = loss(candidate)
    if value < least:
      best, least = candidate, value
      step_size *= 1.5
    else:
      step_size *= 1.5**-0.25
  return best, least


def find(
  model: str,
  adapters: Sequence[str],
  data: str,
  output: str,
  steps: int = 40,
  seed: int = 0,
  max_length: int = 512,
  overwrite: bool = False,
) -> tuple[np.ndarray, float]:
  """Searches weights and writes the adapter; returns both weights and loss.

  Raises:
    ValueError: there is no adapter, a sum of them is not one, they differ in
      their method or base, the rows are no examples, or `output` has files.
  """
  if not any(adapters):
    raise ValueError('LoraHub sums adapters; name them, --adapters=A,B')
  directory.check_output(Path(output), overwrite)
  examples = eval_sets.examples_of(jsonl_rows.read(data))
  config = default()
  config.model.path = model
  base = base_lib.load(config.model)
  loaded = [load_adapter(path, base.config) for path in adapters]
  sites = base.family.sites(base.config)
  functions = set()
  for adapter, path in zip(loaded, adapters, strict=True):
    check_base(adapter, path, base)
    built = build(adapter.method, sites, adapter.semantics or 'official')
    functions.add(function_of(built.adapter_map))
  if len(functions) > 1:
    methods = ' and '.join(dict.fromkeys(a.method for a in loaded))
    raise ValueError(
      f'LoraHub sums adapters of one method; got {methods}: leave one out'
    )
  for spec in resolve(loaded[0].method):
    if not method_entry(spec).additive:
      raise ValueError(
        f'LoraHub sums adapters that add a term, such as lora; {adapters[0]} '
        f'is {loaded[0].method!r}'
      )
  config.method = loaded[0].method
  config.semantics = loaded[0].semantics or 'official'
  module, built = base_lib.module(base, config)
  tokenizer = load_tokenizer(config.data.tokenizer, model)
  likelihood = Likelihood(
    module, tokenizer, max_length, max_length, min(len(examples), 8)
  )
  trees = [adapter.tree for adapter in loaded]

  def loss(weights: np.ndarray) -> float:
    peft = combined(trees, weights)
    variables = {'params': base.params, 'peft': peft}
    nll, tokens = likelihood.sums(variables, examples)
    return float(nll.sum() / tokens.sum() + PENALTY * np.abs(weights).mean())

  weights, least = search(loss, len(trees), steps, seed)
  metadata = run_metadata.describe_adapter(base, built)
  adapter_lib.save(output, combined(trees, weights), metadata, overwrite)
  return weights, least


def main(argv) -> None:
  del argv
  weights, least = find(
    _MODEL.value,
    _ADAPTERS.value,
    _DATA.value,
    _OUTPUT.value,
    _STEPS.value,
    _SEED.value,
    overwrite=_OVERWRITE.value,
  )
  for path, weight in zip(_ADAPTERS.value, weights, strict=True):
    print(f'{weight:+.3f} {path}')
  print(f'loss {least:.4f}; wrote {_OUTPUT.value}')


if __name__ == '__main__':
  _MODEL = flags.DEFINE_string('model', None, 'The base.', required=True)
  _ADAPTERS = flags.DEFINE_list('adapters', None, 'A,B', required=True)
  _DATA = flags.DEFINE_string('data', None, 'A few rows.', required=True)
  _OUTPUT = flags.DEFINE_string('output', None, 'A directory.', required=True)
  _STEPS = flags.DEFINE_integer('steps', 40, 'Weights to try.', lower_bound=1)
  _SEED = flags.DEFINE_integer('seed', 0, 'Of the search.')
  _OVERWRITE = flags.DEFINE_boolean(
    'overwrite', False, 'Replace a directory that has files.'
  )
  command_line.run(main)

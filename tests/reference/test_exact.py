# SPDX-License-Identifier: Apache-2.0
"""Ours means what the released layers mean, shown where rounding is no excuse.

Some of official/*.npz are so sharp that one unit in the last place of each
weight moves float32 logits by 1e-4: no other order of operations can meet
1e-5, and `test_t5` allows for that. Here ours is compared in float64 with
`naive`, the layers' maths written out by itself, at the files' own weights and
inputs: logits, and gradients of every adapter tensor.

A relative error is max |a - b| / max |b| of an array.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.checkpoints.adapter import AdapterWeights
from moepeft.checkpoints.t5x import adapters as t5x_adapters
from moepeft.objectives.cross_entropy import mean_loss
from moepeft.objectives.seq2seq import loss_sums

from . import cases, naive

if not cases.ROOT.is_dir():
  pytest.skip(
    f'no reference cases at {cases.ROOT}: name their directory with '
    'MOEPEFT_FIXTURES',
    allow_module_level=True,
  )

OFFICIAL = cases.official()

# Float64 rounds at 1e-16, which the sharpest case magnifies to about 1e-12;
# one float32 operation anywhere would show as 1e-7 or more.
EXACT = 1e-9

_INPUTS = {
  'inputs': 'encoder_input_tokens',
  'decoder_inputs': 'decoder_input_tokens',
  'targets': 'decoder_target_tokens',
}


# Compiling a case in float64 takes 10 s: two mixtures in the fast suite.
_SLOW = ('official/ia3', 'official/lora', 'official/molora_top2')


def of_cases(found):
  return pytest.mark.parametrize(
    'name',
    [
      pytest.param(name, marks=pytest.mark.slow if name in _SLOW else ())
      for name in found
    ],
  )


def has_adapter(name):
  with np.load(cases.ROOT / f'{name}.npz') as arrays:
    return any(map(t5x_adapters.is_adapter, arrays.files))


def naive_weights(name):
  """({adapter's T5X name: array}, {base's T5X name: array}), float64."""
  arrays = cases.below(cases.load(name).expected, 'params/')
  weights = {k: jnp.asarray(array, 'float64') for k, array in arrays.items()}
  ours = {
    k: array for k, array in weights.items() if t5x_adapters.is_adapter(k)
  }
  return ours, {k: weights[k] for k in weights if k not in ours}


def naive_logits(name, adapter, base):
  arrays = cases.load(name).expected
  inputs = {key: arrays[f'inputs/{file}'] for key, file in _INPUTS.items()}
  top_k = json.loads(str(arrays['config'])).get('top_k')
  return naive.logits(adapter | base, **inputs, top_k=top_k)


def naive_gradients(name):
  """({T5X name: gradient of the mean loss} of the adapter, logits)."""

  def loss(adapter, base):
    targets = cases.load(name).batch['targets']
    logits = naive_logits(name, adapter, base)
    return naive.mean_token_nll(logits, targets), logits

  return jax.grad(loss, has_aux=True)(*naive_weights(name))


def our_gradients(name):
  """The same of ours."""
  case = cases.load(name)
  model = case.model.clone(dtype=jnp.float64)
  cast = functools.partial(jnp.asarray, dtype='float64')
  variables = jax.tree.map(cast, {'peft': {}} | case.variables)

  def loss(tree, params):
    variables = {'params': params, 'peft': tree}
    found = loss_sums(model.apply, variables, case.batch, None)
    return mean_loss(*found), model.apply(variables, case.batch)

  gradient = jax.jit(jax.grad(loss, has_aux=True))
  tree, logits = gradient(variables['peft'], variables['params'])
  if case.adapter is None:
    return {}, logits
  written = t5x_adapters.write(
    case.config, AdapterWeights(case.adapter.method, tree)
  )
  return {entry.stored_name: array for entry, array in written}, logits


@functools.cache
def in_float64(name):
  """Gradients and logits of ours, and those of `naive`; NumPy arrays."""
  with jax.enable_x64(True):
    found = our_gradients(name)
    expected = naive_gradients(name)
    return jax.tree.map(np.asarray, (found, expected))


@of_cases(OFFICIAL)
def test_exact_logits(name):
  (_, found), (_, expected) = in_float64(name)
  real = cases.load(name).batch['targets_mask']
  check_exact({'logits': found[real]}, {'logits': expected[real]})


@of_cases([name for name in OFFICIAL if has_adapter(name)])
def test_exact_gradients(name):
  (found, _), (expected, _) = in_float64(name)
  check_exact(found, expected)


def check_exact(found, expected):
  """Every array of one dict against its namesake."""
  dtypes = {a.dtype for a in (*found.values(), *expected.values())}
  assert dtypes == {np.dtype(np.float64)}
  assert found.keys() == expected.keys()
  errors = {k: cases.relative_error(found[k], expected[k]) for k in expected}
  worst = max(errors, key=errors.get)
  print(f'{worst}: relative error {errors[worst]:.1e}, limit {EXACT:.0e}')
  assert {key: e for key, e in errors.items() if e >= EXACT} == {}

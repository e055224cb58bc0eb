# SPDX-License-Identifier: Apache-2.0
"""A LoRA as a mixture computes the same, until its experts are chosen."""

import jax
import numpy as np
import pytest
from flax import traverse_util

from moepeft import routing, train
from moepeft.checkpoints.hf import model as hf
from moepeft.evaluation.routing.split import split_lora
from moepeft.inference.loaded_model import load_model, load_run

from ...contracts import small
from ...training.test_train import card
from . import planted

EVEN = 'softmax(kernel_init=zeros)'
SITES = "targets='encoder/self/q|decoder/mlp/wo'"


def moved(method):
  """(model, variables) with a LoRA that does something."""
  model, _ = small.make(method)
  return model, small.variables(method, noise=0.3)


def logits(model, variables):
  batch = {k: np.asarray(v) for k, v in small.batch().items()}
  return np.asarray(jax.jit(model.apply)(variables, batch))


def with_router(split, variables):
  """(model, variables) of a split adapter; its router is the initial one."""
  model, _ = small.make(split.method)
  initial = small.variables(split.method)['peft']
  peft = traverse_util.unflatten_dict(
    traverse_util.flatten_dict(initial) | traverse_util.flatten_dict(split.peft)
  )
  return model, {**variables, 'peft': peft}


@pytest.mark.parametrize(
  ('options', 'experts', 'rank'),
  [('rank=4', 2, 2), ('rank=5, rslora=True', 3, 2)],
)
def test_an_even_mixture_computes_what_the_lora_does(options, experts, rank):
  model, variables = moved(f'lora({options}, {SITES})')
  split = split_lora(model.adapter_map, variables['peft'], experts, EVEN)
  assert split.method.startswith(f'molora(experts={experts}, rank={rank},')
  np.testing.assert_allclose(
    logits(*with_router(split, variables)),
    logits(model, variables),
    # float32 after six layers; logits are up to 5.
    atol=1e-4,
  )


def test_experts_take_singular_values_in_turn():
  model, variables = moved("lora(rank=4, targets='encoder/self/q')")
  split = split_lora(model.adapter_map, variables['peft'], 2, EVEN)
  site = variables['peft']['encoder']['layers']['self']['q']['lora']
  expert = split.peft['encoder']['layers']['self']['q']['molora']
  for layer in range(len(site['a'])):
    # The scale is alpha / r = 16 / 4.
    change = 4 * np.tensordot(site['a'][layer], site['b'][layer], 1)
    values = np.linalg.svd(change.reshape(len(change), -1), compute_uv=False)
    for i in range(2):
      part = np.tensordot(
        expert['a'][layer][:, i], expert['b'][layer][i], 1
      ).reshape(len(change), -1)
      # Twice the i-th and the i + 2nd, as two experts of weight 1/2 are added.
      np.testing.assert_allclose(
        np.linalg.svd(part, compute_uv=False)[:2],
        2 * values[[i, i + 2]],
        rtol=1e-5,
      )


@pytest.mark.parametrize(
  ('method', 'experts', 'message'),
  [
    ('lora(rank=4)', 5, 'rank 4 can be split into 2 to 4 experts; got 5'),
    ('molora(experts=2, rank=2)', 2, 'one plain LoRA, .*; got molora'),
    ('lora(rank=2) + ia3', 2, 'got lora, ia3'),
    ("lora(rank=2, init_weights='pissa')", 2, 'without init_weights'),
    ('dora(rank=2)', 2, 'got dora'),
  ],
)
def test_what_cannot_be_split_is_refused(method, experts, message):
  _, built = small.make(method)
  with pytest.raises(ValueError, match=message):
    split_lora(built.adapter_map, {}, experts, EVEN)


@pytest.mark.slow
def test_a_split_run_is_trained_further(tmp_path):
  model, variables = planted.model()
  base = str(tmp_path / 'base')
  hf.save(base, planted.CONFIG, variables['params'])
  first = str(tmp_path / 'first')
  changes = {'data.tasks': 'stars,kind', 'optimizer.learning_rate': 1e-2}
  train.train(card(base, steps=6, method='lora(rank=4)', **changes), first)
  run = load_run(first)
  rows = routing.rows.read(run, routing._collator(run), '', 3)
  derived = split_lora(run.model.adapter_map, run.variables['peft'], 2, EVEN)
  mixture = str(tmp_path / 'mixture')
  before, after = routing.save_derived(run, derived, mixture, rows)
  # The router is even, so that only the rounding of float32 is left.
  assert after == pytest.approx(before, rel=1e-5)
  assert load_model(base, mixture).method.startswith('molora(experts=2')
  config = card(base, steps=2, method=derived.method, **changes)
  config.model.adapter = mixture
  second = str(tmp_path / 'second')
  train.train(config, second)
  before = load_model(base, mixture).variables['peft']
  after = load_run(second).variables['peft']
  moved_by = jax.tree.map(
    lambda a, b: float(np.abs(a - b).max()), before, after
  )
  # Two steps of AdamW at 1e-2 move a parameter by at most 0.02.
  assert 0 < max(jax.tree.leaves(moved_by)) <= 0.021

# SPDX-License-Identifier: Apache-2.0
"""Pairs and judged answers in packed rows mean what they mean alone.

In float64, where rounding is no excuse, as tests/data/batching/test_packing.py.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft import train
from moepeft.data.batching import collators
from moepeft.data.preference import dataset as preference_dataset
from moepeft.data.tokenizers.tokenizer import ByteTokenizer
from moepeft.models import weight_mapping
from moepeft.objectives import OBJECTIVES, build_objective
from moepeft.objectives.batches import make_collator
from moepeft.objectives.cross_entropy import mean_loss
from moepeft.runs.metrics_log import read

from ..preferences import card, noisy, parts_of, written

CLOSE = dict(rtol=1e-9, atol=1e-13)
WIDE = {'model.dtype': 'float64', 'model.param_dtype': 'float64'}
COUNT = 11


@pytest.fixture(scope='module')
def places(tmp_path_factory):
  return written(tmp_path_factory.mktemp('packed'))


def items_of(config, parts):
  """(the form of packed rows, some items, each with references)."""
  collator = collators.make_model_collator(
    config.data, ByteTokenizer(), parts.model.config, 0
  )
  collator = make_collator(config, collator)
  preferences = preference_dataset.read_preferences(config.data, collator)
  shape = len(preferences.items), 2, collator.lengths[-1]
  logps = np.random.default_rng(1).normal(-3, 1, shape).astype(np.float32)
  return collator, preferences.with_references(logps).items[:COUNT]


def gradient(config, parts, batch):
  """({path: gradient}, loss, aux) of a batch, the adapter off its start."""
  objective = build_objective(config, parts.reference)
  state = noisy(parts.state, 0.1)
  variables = jax.tree.map(jnp.float64, parts.built.variables(state))

  def loss(peft):
    policy = {**variables, 'peft': peft}
    ready = objective.prepare(parts.model.apply, policy, batch)
    total, aux = objective(parts.model.apply, policy, ready, None)
    return mean_loss(total, aux), aux

  (value, aux), slope = jax.jit(jax.value_and_grad(loss, has_aux=True))(
    variables['peft']
  )
  return jax.tree.map(np.asarray, (weight_mapping.flatten(slope), value, aux))


# With a reference that is asked, and with what was computed of it before.
CASES = [
  (name, False) for name, spec in OBJECTIVES.items() if spec.batch != 'single'
] + [('dpo', True), ('kto', True)]
# What is not done by other cases: sums, labels and points, places, two lengths.
QUICK = (('llama', 'dpo', False),)


@pytest.mark.parametrize(
  ('family', 'objective', 'precomputed'),
  [
    *QUICK,
    *(
      pytest.param(family, *case, marks=pytest.mark.slow)
      for family in ('llama', 't5')
      for case in CASES
      if (family, *case) not in QUICK
    ),
  ],
)
def test_packed_answers_have_the_loss_and_gradient_of_answers_alone(
  places, family, objective, precomputed
):
  with jax.enable_x64(True):
    config = card(
      places,
      family,
      objective=objective,
      **WIDE,
      **{'data.packing': True, 'data.length': 61},
      **{'data.inputs_length': 41, 'data.targets_length': 19},
    )
    parts = parts_of(config)
    collator, items = items_of(config, parts)
    packed, alone = collator.rows(0, items), collator.pad(items)
    if not precomputed:
      packed, alone = (
        {k: a for k, a in rows.items() if not k.endswith('reference')}
        for rows in (packed, alone)
      )
    side = 'chosen_' * (objective != 'kto')
    rows = len(packed[f'{side}inputs'])
    assert 1 < rows <= COUNT // 2 and len(alone[f'{side}inputs']) == COUNT
    packed_result = gradient(config, parts, packed)
    expected = gradient(config, parts, alone)
  np.testing.assert_allclose(packed_result[1], expected[1], **CLOSE)
  for key in ('weight', 'tokens', 'correct', 'nll', 'metrics'):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, **CLOSE),
      packed_result[2][key],
      expected[2][key],
    )
  assert packed_result[2]['weight'] == COUNT
  for path, array in expected[0].items():
    assert np.abs(array).max() > 1e-8, path
    np.testing.assert_allclose(
      packed_result[0][path], array, err_msg=path, **CLOSE
    )


def test_an_answer_keeps_its_label_and_its_references(places):
  """Segments are counted by hand in the arrays, not by the collator."""
  config = card(places, objective='kto', **{'data.packing': True})
  config.data.length = 61
  parts = parts_of(config)
  collator, items = items_of(config, parts)
  rows = collator.rows(0, items)
  packed_answers = []
  for i in range(len(rows['inputs'])):
    for segment in range(1, rows['inputs_segments'][i].max() + 1):
      here = rows['inputs_segments'][i] == segment
      there = rows['kl_inputs_segments'][i] == segment
      packed_answers.append(
        (
          tuple(rows['inputs'][i][here]),
          tuple(rows['kl_inputs'][i][there]),
          tuple(rows['reference'][i][here]),
          tuple(rows['kl_reference'][i][there]),
          bool(rows['label'][i][segment - 1]),
        )
      )
  expected = []
  for item in items:
    first, mismatched = (tuple(side.ids[:-1]) for side in item.sides)
    logps, kl_logps = item.references
    expected.append(
      (
        first,
        mismatched,
        tuple(logps[: len(first)]),
        tuple(kl_logps[: len(mismatched)]),
        item.label,
      )
    )
  assert sorted(packed_answers) == sorted(expected)
  assert {label for *_, label in packed_answers} == {True, False}


@pytest.mark.parametrize(
  ('family', 'objective'),
  [
    pytest.param('llama', 'dpo', marks=pytest.mark.slow),
    pytest.param('t5', 'kto', marks=pytest.mark.slow),
  ],
)
def test_a_packed_run_learns_and_goes_on_exactly(
  places, tmp_path, family, objective
):
  more = {'objective': objective, 'data.packing': True, 'data.length': 61}
  more |= {'data.targets_length': 19, 'data.inputs_length': 41}
  more |= {'evaluation.every_steps': 6, 'batch_size': 2}
  train.train(card(places, family, **more, steps=6), str(tmp_path / 'whole'))
  train.train(card(places, family, **more, steps=2), str(tmp_path / 'cut'))
  train.train(card(places, family, **more, steps=6), str(tmp_path / 'cut'))
  whole, cut = (
    read(str(tmp_path / name / 'metrics.jsonl')) for name in ('whole', 'cut')
  )
  losses = [row['loss'] for row in whole if 'loss' in row]
  assert losses == [row['loss'] for row in cut if 'loss' in row]
  if objective == 'dpo':
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
  assert losses[-1] < losses[0] - 0.01
  assert whole[-1]['validation_margins'] > 0

# SPDX-License-Identifier: Apache-2.0
"""The one loop on pairs and judged answers: tiny decoder, tiny T5."""

import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moepeft import convert, evaluate, train
from moepeft.checkpoints import adapter
from moepeft.core.types import PAIR
from moepeft.evaluation import summary
from moepeft.inference.loaded_model import load_run
from moepeft.objectives import build_objective, paired_batch
from moepeft.objectives.cross_entropy import mean_loss
from moepeft.runs.metrics_log import read
from moepeft.training import setup

from ..preferences import MOLORA, card, noisy, pairs, parts_of, written


@pytest.fixture(scope='module')
def places(tmp_path_factory):
  return written(tmp_path_factory.mktemp('preference'))


def first_loss(config):
  parts = parts_of(config)
  objective = build_objective(config, parts.reference)

  @jax.jit
  def loss(variables, batch):
    return mean_loss(*objective(parts.model.apply, variables, batch, None))

  return float(loss(parts.built.variables(parts.state), parts.batch))


@pytest.mark.parametrize(
  ('family', 'method'),
  [
    ('llama', MOLORA),
    ('t5', 'mov(experts=3)'),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        ('llama', 'lora(rank=2)'),
        ('llama', 'mov(experts=3)'),
        ('llama', 'ia3'),
        ('t5', MOLORA),
      )
    ),
  ],
)
def test_the_first_loss_of_dpo_is_the_logarithm_of_two(places, family, method):
  actual = first_loss(card(places, family, method=method))
  assert actual == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.slow
def test_the_reference_is_the_same_before_and_after_training(places):
  optimizer = optax.sgd(1.0)
  config = card(places, **{'model.dropout': 0.3})
  parts = parts_of(config, optimizer)
  update = jax.jit(
    setup.build_train_step(
      config, parts.model, parts.built, optimizer, parts.reference
    )
  )
  rows = paired_batch.stack_sides(parts.batch, PAIR)
  of = jax.jit(lambda variables: parts.reference(variables, rows))
  policy = jax.jit(
    lambda variables: paired_batch.token_logps(
      parts.model.apply(variables, rows), rows
    )
  )
  before = parts.built.variables(parts.state)
  state, aux = update(parts.state, parts.batch)
  # Two steps: experts have a gradient from the second on.
  state, again = update(state, parts.batch)
  after = parts.built.variables(state)
  np.testing.assert_array_equal(of(before), of(after))
  assert float(jnp.abs(policy(before) - policy(after)).max()) > 1e-3
  # Dropout is the policy's alone: two calls agree, and with another adapter.
  np.testing.assert_array_equal(of(before), of(before))
  assert np.isfinite(float(again['loss'])) and float(aux['loss']) > 0


@pytest.mark.parametrize(
  'objective', ['dpo', pytest.param('kto', marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_parts_of_a_batch_add_up_to_the_whole(places, objective):
  """In float64: a defect stays there, rounding does not.

  In float32 the two are apart by 3e-6 of an array's largest number here, and
  by 1e-4 with noise of 0.3 in place of 0.1, of which layers make more.
  """
  wide = {'model.dtype': 'float64', 'model.param_dtype': 'float64'}
  actual = {}
  with jax.enable_x64(True):
    for count in (1, 3):
      config = card(
        places,
        objective=objective,
        # At every site: noise at a few changes too little.
        method='molora(experts=3, rank=2)',
        gradient_accumulation_steps=count,
        **wide,
      )
      # 100: what is subtracted of changed weights is no smaller than they are.
      optimizer = optax.sgd(100.0)
      parts = parts_of(config, optimizer)
      update = jax.jit(
        setup.build_train_step(
          config, parts.model, parts.built, optimizer, parts.reference
        )
      )
      batch = without_second(parts.batch)
      # Of a change and its opposite one makes mismatched answers more likely.
      for scale in (0.1, -0.1):
        state = noisy(parts.state, scale)
        state = state.replace(
          trainable=jax.tree.map(jnp.float64, state.trainable)
        )
        after, aux = update(state, batch)
        change = jax.tree.map(jnp.subtract, after.trainable, state.trainable)
        actual[count, scale] = change, aux['metrics'], aux['loss']

  def check(a, b):
    # Seen: 4e-15 of the largest. A mean of the parts' means errs by a tenth.
    assert a.dtype == np.float64
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * np.max(np.abs(a)))

  for scale in (0.1, -0.1):
    jax.tree.map(check, actual[1, scale], actual[3, scale])
  assert max(np.abs(a).max() for a in jax.tree.leaves(actual[1, 0.1][0])) > 1e-3
  if objective == 'kto':
    points = [float(actual[1, s][1]['z_ref'][0]) for s in (0.1, -0.1)]
    # One is clipped, the other is a mean over the parts.
    assert min(points) == 0 < max(points)


def without_second(batch):
  """The second row as one that only fills up: parts weigh differently."""
  hidden = {
    key: array.at[1].set(False)
    for key, array in batch.items()
    if key.endswith('targets_mask')
  }
  return batch | hidden


def test_dpo_learns_what_is_preferred_and_tells_it(places, tmp_path, capsys):
  config = card(
    places, steps=12, **{'evaluation.every_steps': 6, 'model.dropout': 0.1}
  )
  config.evaluation.before = config.log.plots = True
  train.train(config, str(tmp_path))
  rows = read(str(tmp_path / 'metrics.jsonl'))
  trained = [row for row in rows if 'loss' in row]
  # Dropout is the policy's alone, so a first step is not at ln 2.
  assert abs(trained[0]['loss'] - math.log(2)) > 1e-3
  assert trained[-1]['loss'] < trained[0]['loss'] - 0.02
  last = trained[-1]
  assert last['margins'] == pytest.approx(
    last['rewards_chosen'] - last['rewards_rejected'], abs=1e-5
  )
  assert last['kl'] > 0
  begun, half, end = (row for row in rows if 'validation_loss' in row)
  # Validation has none: at the start both are one model.
  assert begun['step'] == 0
  assert begun['validation_loss'] == pytest.approx(math.log(2), abs=1e-6)
  assert end['validation_margins'] > half['validation_margins'] > 0
  assert end['validation_accuracies'] == 1
  assert end['validation_loss'] < half['validation_loss'] < math.log(2)
  assert (tmp_path / 'plots' / 'preference.png').read_bytes()[1:4] == b'PNG'
  output = capsys.readouterr().out
  assert 'margin ' in output and 'validation accuracies 1.0000' in output


def losses(workdir):
  rows = read(str(workdir / 'metrics.jsonl'))
  return [row['loss'] for row in rows if 'loss' in row]


@pytest.mark.slow
def test_a_full_run_has_its_reference_from_before_training(
  places, tmp_path, capsys
):
  more = {'method': 'full', 'preference.reference': 'precomputed'}
  own = tmp_path / 'pairs.json'
  own.write_text(json.dumps(pairs(17)))
  more |= {'data.path': str(own), 'optimizer.learning_rate': 1e-3}
  more |= {'evaluation.every_steps': 4}
  train.train(card(places, 't5', **more), str(tmp_path / 'whole'))
  train.train(card(places, 't5', **more, steps=2), str(tmp_path / 'cut'))
  remaining = (tmp_path / 'cut' / 'reference' / 'log_p.npy').read_bytes()
  train.train(card(places, 't5', **more), str(tmp_path / 'cut'))
  row = read(str(tmp_path / 'cut' / 'metrics.jsonl'))[-1]
  told_again(str(tmp_path / 'cut'), row, capsys)
  assert losses(tmp_path / 'whole') == losses(tmp_path / 'cut')
  assert losses(tmp_path / 'cut')[0] == pytest.approx(math.log(2), abs=1e-6)
  assert (tmp_path / 'cut/reference/log_p.npy').read_bytes() == remaining
  # Other data under the same path are noticed, and where they are allowed,
  # that the references are not of them.
  own.write_text(json.dumps(pairs(18)))
  again = card(places, 't5', **more, steps=5), str(tmp_path / 'cut')
  with pytest.raises(ValueError, match='has changed since the run'):
    train.train(*again)
  with pytest.raises(
    ValueError, match='computed with another base, adapter or'
  ):
    train.train(*again, may_differ=('data.path',))


@pytest.mark.slow
def test_training_goes_on_from_adapters_that_are_the_reference(
  places, tmp_path, capsys
):
  train.train(card(places, steps=2), str(tmp_path / 'a'))
  out = str(tmp_path / 'out')
  convert.main(['convert', f'--workdir={tmp_path}/a', f'--output={out}'])
  # Without a reference of its own, it is told what the base is.
  capsys.readouterr()
  started = card(places, **{'model.adapter': out})
  train.train(started, str(tmp_path / 'c'), dry_run=True)
  said = f'set config.preference.reference to {out!r}'
  assert said in capsys.readouterr().out
  more = {'model.adapter': out, 'preference.reference': out}
  actual = first_loss(card(places, **more))
  # Of the policy's own start it is ln 2 again; of the base it is not: here
  # the policy is at its fresh start, and the reference is what was trained.
  assert actual != pytest.approx(math.log(2), abs=1e-6)
  more |= {'evaluation.every_steps': 2}
  train.train(card(places, **more, steps=2), str(tmp_path / 'b'))
  assert losses(tmp_path / 'b')[0] == pytest.approx(math.log(2), abs=1e-6)
  row = read(str(tmp_path / 'b' / 'metrics.jsonl'))[-1]
  told_again(str(tmp_path / 'b'), row, capsys)


# Going on compiles all once more, and knows nothing of an objective: one does.
@pytest.mark.parametrize(
  ('objective', 'stops'),
  [
    pytest.param('kto', (4, 6), marks=pytest.mark.slow),
    pytest.param('reward', (6,), marks=pytest.mark.slow),
    pytest.param('orpo', (6,), marks=pytest.mark.slow),
    pytest.param('simpo', (6,), marks=pytest.mark.slow),
  ],
)
def test_every_objective_trains_goes_on_and_is_evaluated(
  places, tmp_path, objective, stops, capsys
):
  run, out = str(tmp_path / 'run'), str(tmp_path / 'out')
  more = {'objective': objective, 'evaluation.every_steps': 6}
  for steps in stops:
    train.train(card(places, **more, steps=steps), run)
  assert ('resumed at step 4' in capsys.readouterr().out) == (4 in stops)
  rows = read(os.path.join(run, 'metrics.jsonl'))
  trained = [row for row in rows if 'loss' in row]
  assert [row['step'] for row in trained] == [1, 2, 3, 4, 5, 6]
  assert trained[-1]['loss'] < trained[0]['loss'] - 0.01
  assert rows[-1]['validation_margins'] > 0 < rows[-1]['validation_loss']
  told_again(run, rows[-1], capsys)
  with pytest.raises(ValueError, match='held-out rows have none .* --data'):
    evaluate.evaluate(run, metrics=['exact_match'])
  # The adapter that is exported is the run's.
  convert.main(['convert', f'--workdir={run}', f'--output={out}'])
  tree, _ = adapter.load(out)
  trained = load_run(run).variables['peft']
  jax.tree.map(np.testing.assert_array_equal, tree, trained)


def told_again(run, row, capsys):
  """moepeft.evaluate says of a run what its last validation said."""
  actual, each = evaluate.evaluate(run)
  figures = {k: v for k, v in row.items() if k.startswith('validation_')}
  assert {'validation_loss', 'validation_accuracies'} <= figures.keys()
  # The same batches of the same weights; compiled without unrolling.
  again = {k: actual[k] for k in actual if k.startswith('validation_')}
  assert again == pytest.approx(figures, rel=1e-5, abs=1e-6)
  capsys.readouterr()
  summary.print_summary(actual, each)
  output = capsys.readouterr().out
  assert (
    f'validation accuracies {figures["validation_accuracies"]:.4f}' in output
  )
  assert 'nothing to judge by' not in output


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'method': 'full'}, "set it to 'precomputed'"),
    ({'data.source': 'tasks', 'data.path': ''}, 'does not go with'),
    ({'objective': 'causal'}, 'does not go with'),
    ({'preference.margin': 1.0}, 'margin=1.0 does nothing'),
    ({'loss.z_loss': 0.1}, r'config.loss.z_loss=0.1 does nothing'),
    ({'data.length': 3}, 'none of 45 rows of .* fits config.data.length'),
    ({'preference.reference': '/nowhere'}, '/nowhere'),
    ({'preference.loss': 'robust'}, 'set config.preference.label_smoothing'),
    ({'objective': 'kto', 'preference.loss': 'ipo'}, "loss='ipo' does nothing"),
    (
      {'data.replay': 'old.txt', 'data.replay_rate': 0.1},
      'replay=.* does nothing with',
    ),
    (
      {'data.pretraining_objective': 'prefix'},
      "pretraining_objective='prefix' does nothing",
    ),
    ({'data.train_on': 'all'}, "train_on='all' does nothing"),
  ],
)
def test_what_cannot_be_is_one_sentence(places, tmp_path, changes, said):
  with pytest.raises(ValueError, match=said):
    train.train(card(places, **changes), str(tmp_path))


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'data.chat_template': 'a.jinja'}, 'chat_template=.* an encoder-decoder'),
    ({'data.truncation': 'middle'}, 'one of prompt, end, drop'),
  ],
)
def test_what_an_encoder_decoder_ignores_is_one_sentence(
  places, tmp_path, changes, said, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'a.jinja').write_text('{{ messages }}')
  with pytest.raises(ValueError, match=said):
    train.train(card(places, 't5', **changes), str(tmp_path / 'w'))

# SPDX-License-Identifier: Apache-2.0
"""The one loop on a tiny decoder: tasks, text, resume, judging, packing."""

import functools
import json

import jax
import numpy as np
import pytest
import scipy.special

from moepeft import config as config_lib
from moepeft import train
from moepeft.checkpoints import base as base_lib
from moepeft.data.batching.decoder_only import (
  CausalCollator,
  make_sample,
  pack_samples,
  pad_samples,
)
from moepeft.data.tokenizers.tokenizer import (
  ByteTokenizer,
  HuggingFaceTokenizer,
)
from moepeft.evaluation.loglikelihood import Likelihood
from moepeft.evaluation.rank_classification import Ranker
from moepeft.objectives import seq2seq
from moepeft.objectives.cross_entropy import token_losses
from moepeft.runs.metrics_log import read
from moepeft.tasks import Example

from .. import chat_cases

WORDS = 'the quick brown fox jumps over a lazy dog '


def card(**changes):
  c = config_lib.default()
  c.model.path, c.model.family, c.model.size = '', 'llama', 'tiny'
  shape = dict(d_model=16, heads=2, kv_heads=1, head_dim=6, ffn=22, layers=2)
  c.model.shape.update(vocab=263, **shape)
  c.objective, c.method, c.data.tokenizer = 'causal', 'full', 'bytes'
  c.steps, c.batch_size, c.data.length = 4, 3, 96
  c.log.every_steps = 2
  c.log.plots = False
  c.checkpoint.every_steps = 2
  c.evaluation.before = c.evaluation.after = False
  c.evaluation.max_examples, c.evaluation.batch_size = 3, 4
  c.evaluation.tasks = 'stars'
  with c.unlocked():
    c.update_from_flattened_dict(changes)
  return c


@pytest.fixture(scope='module')
def model():
  config = card()
  base = base_lib.load(config.model)
  made, _ = base_lib.module(base, config)
  return made, base_lib.initialise(base, made, 0)


@pytest.fixture
def text(tmp_path):
  (tmp_path / 'a.txt').write_text(WORDS * 97)
  return {'data.source': 'text', 'data.path': str(tmp_path / 'a.txt')}


@pytest.mark.slow
def test_embedded_tasks_train_and_judge_a_decoder(tmp_path, capsys):
  actual = train.train(card(**{'evaluation.after': True}), str(tmp_path))
  rows = read(str(tmp_path / 'metrics.jsonl'))
  # The evaluation after training is the last row.
  assert [row['step'] for row in rows] == [1, 2, 3, 4, 4]
  assert np.isfinite(actual['after']['validation_loss'])
  assert {row['task'] for row in actual['after']['rows']} == {'stars'}
  assert 'accuracy' in capsys.readouterr().out


@pytest.mark.slow
def test_text_is_learnt_and_a_run_cut_in_two_is_the_same(text, tmp_path):
  more = {**text, 'evaluation.every_steps': 2, 'data.packing': True}
  rate = {'optimizer.learning_rate': 1e-2}
  train.train(card(**more, **rate), str(tmp_path / 'whole'))
  train.train(card(**more, **rate, steps=2), str(tmp_path / 'cut'))
  train.train(card(**more, **rate), str(tmp_path / 'cut'))
  one, two = (
    [
      (row['step'], row.get('loss'), row.get('validation_loss'))
      for row in read(str(tmp_path / name / 'metrics.jsonl'))
    ]
    for name in ('whole', 'cut')
  )
  assert one == two
  # Of 263 ids, nothing learnt; random logits cost up to a nat more.
  assert one[0][1] == pytest.approx(np.log(263), abs=1.0)
  assert one[-1][2] < one[0][1]


def test_a_dry_run_of_text_writes_nothing(text, tmp_path, capsys):
  train.train(card(**text), str(tmp_path / 'w'), dry_run=True)
  assert not (tmp_path / 'w').exists()
  assert 'tokens of 1 documents' in capsys.readouterr().out


def test_an_objective_of_the_other_kind_is_refused(tmp_path):
  with pytest.raises(ValueError, match="set it to 'causal'"):
    train.train(card(objective='seq2seq'), str(tmp_path), dry_run=True)
  plain = config_lib.default()
  plain.objective = 'causal'
  with pytest.raises(ValueError, match="set it to 'seq2seq'"):
    train.train(plain, str(tmp_path), dry_run=True)


def samples(seed, sizes=(7, 3, 11, 5, 2)):
  rng = np.random.default_rng(seed)
  return [
    make_sample(rng.integers(2, 259, n), rng.integers(2, 259, n + 1))
    for n in sizes
  ]


def test_packed_losses_equal_unpacked_ones(model):
  made, variables = model
  some = samples(0)
  actual = []
  # 7 + 7, 3 + 3, 11 + 11, 5 + 5 and 2 + 2 tokens fed, 24 to a row.
  bins = [[2], [0, 1, 4], [3]]
  for rows in (pad_samples(some, 24), pack_samples(some, 24, bins)):
    total, aux = jax.jit(
      lambda rows: seq2seq.loss_sums(made.apply, variables, rows, None)
    )(rows)
    actual.append((float(total), int(aux['tokens']), int(aux['correct'])))
  one, two = actual
  assert len(rows['inputs']) == 3 < len(some)
  # Sums of about 33 tokens at 5.6 in float32.
  assert one[0] == pytest.approx(two[0], rel=1e-5)
  assert one[1:] == two[1:] == (33, one[2])


def test_a_changed_first_example_never_changes_the_seconds_loss(model):
  made, variables = model
  first, second, other = *samples(0, (5, 5)), *samples(1, (5,))
  token_losses_of = jax.jit(
    lambda rows: token_losses(made.apply(variables, rows), rows['targets'])
  )

  def losses(one):
    rows = pack_samples([one, second], 21, [[0, 1]])
    actual = token_losses_of(rows)
    own = [
      s
      for s in (1, 2)
      if rows['inputs'][0][rows['inputs_segments'][0] == s].tolist()
      == second.ids[:-1].tolist()
    ]
    return np.asarray(actual)[0][rows['inputs_segments'][0] == own[0]]

  np.testing.assert_array_equal(losses(first), losses(other))


EXAMPLES = [
  Example('t', '', 0, 'ab', 'cde', ('cde', 'x', 'yz'), 0),
  Example('t', '', 1, 'a longer one', 'f', ('f', 'gh', 'q'), 0),
]


@functools.cache
def jitted(made):
  return jax.jit(made.apply)


def by_hand(made, variables, prompt, answer):
  """Sum of log p of an answer, of one row.

  Zeros behind the text, which no token before them sees, give all rows one
  length and so one program.
  """
  ids = (
    ByteTokenizer().encode(prompt + '\n') + ByteTokenizer().encode(answer) + [1]
  )
  inputs = np.zeros((1, 23), np.int32)
  inputs[0, : len(ids) - 1] = ids[:-1]
  logits = np.asarray(jitted(made)(variables, {'inputs': inputs}))
  log_p = scipy.special.log_softmax(logits[0], axis=-1)
  first = len(prompt)
  return sum(float(log_p[i, ids[i + 1]]) for i in range(first, len(ids) - 1))


def test_likelihood_is_of_the_targets_given_the_inputs(model):
  made, variables = model
  scores = Likelihood(made, ByteTokenizer(), 64, 16, 2)
  nll, tokens = scores.sums(variables, EXAMPLES)
  expected = [-by_hand(made, variables, e.inputs, e.targets) for e in EXAMPLES]
  np.testing.assert_allclose(nll, expected, rtol=1e-5)
  # With EOS.
  assert tokens.tolist() == [4, 2]
  assert not scores.cut(EXAMPLES).any()


def test_ranking_scores_each_choice_as_if_alone(model):
  made, variables = model
  ranker = Ranker(made, ByteTokenizer(), 64, 16, 2)
  actual = ranker.scores(variables, ranker.prepare(EXAMPLES))
  for e, scores in zip(EXAMPLES, actual, strict=True):
    expected = [by_hand(made, variables, e.inputs, c) for c in e.choices]
    # Longer rows and another order of sums, in float32.
    np.testing.assert_allclose(scores, expected, rtol=1e-4)


def test_a_prompt_to_rank_loses_its_beginning(model):
  ranker = Ranker(model[0], ByteTokenizer(), 5, 4, 2)
  (_, row) = ranker.prepare(EXAMPLES)
  assert ByteTokenizer().decode(row.inputs) == ' one\n' and row.cut


def test_a_prompt_to_rank_keeps_what_begins_every_text(model, tmp_path):
  chat_cases.learnt('bytes', bos=True).save_pretrained(tmp_path)
  words = HuggingFaceTokenizer(str(tmp_path))
  example = Example('t', '', 0, 'again ' * 9, 'a', ('a', 'b'), 0)
  (row,) = Ranker(model[0], words, 5, 4, 2).prepare([example])
  assert row.cut and len(row.inputs) == 5
  assert row.inputs[0] == words.bos and words.bos not in row.inputs[1:]


def test_a_window_that_is_all_too_long_is_refused():
  with pytest.raises(ValueError, match='raise the length'):
    CausalCollator(ByteTokenizer(), 3, truncation='drop').encode(EXAMPLES)


def test_the_config_of_a_run_names_its_objective(text, tmp_path):
  train.train(card(**text, steps=1), str(tmp_path / 'w'))
  remaining = json.loads((tmp_path / 'w' / 'config.json').read_text())
  assert remaining['objective'] == 'causal'

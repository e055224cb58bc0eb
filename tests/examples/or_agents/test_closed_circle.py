# SPDX-License-Identifier: Apache-2.0
"""The closed circle measures what the agents do, and runs from end to end."""

import json
import re

import pytest

pytest.importorskip('openai')
pytest.importorskip('highspy')

from examples.or_agents import closed_circle, rewards, sentences  # noqa: E402
from examples.or_agents.closed_circle import (  # noqa: E402
  SCALE,
  Outcome,
  Sizes,
)
from examples.or_agents.domains import DOMAINS  # noqa: E402
from examples.or_agents.families import draw_knapsack  # noqa: E402
from examples.or_agents.generate import check_numbers  # noqa: E402
from examples.or_agents.problem import Problem  # noqa: E402
from moepeft.agent.chat_model import ChatReply, ReplyError  # noqa: E402
from moepeft.tasks.stable_random import StableRandom  # noqa: E402

TEXT = 'bread: value 4, weight 2. cake: value 7, weight 3. Limit: 4.'
# The cake alone fits, with the bread it weighs 5: the optimum is 7.
RIGHT = '{"s":"max","v":"bb","o":[4,7],"c":[[2,3,"<=",4]]}'
WRONG = '{"s":"max","v":"bb","o":[4,7],"c":[[2,3,"<=",9]]}'


class ScriptedModel:
  """A chat model with the given replies, in order."""

  def __init__(self, *replies):
    self.replies, self.requests = list(replies), []

  def __call__(self, request, on_text, seconds):
    self.requests.append(request)
    reply = self.replies.pop(0)
    if isinstance(reply, Exception):
      raise reply
    reason = 'length' if reply.endswith('...') else 'stop'
    return ChatReply({'role': 'assistant', 'content': reply}, reason)


def numbers(form):
  """A problem without the names of its variables."""
  problem = Problem.from_json(form)
  return problem.sense, problem.objective, problem.constraints


def verdict(is_right, runs=True):
  return rewards.Verdict(runs, is_right)


def test_the_agents_send_the_text_alone_and_solve_the_reply():
  model = ScriptedModel(RIGHT)
  outcome = closed_circle.solve_once(TEXT, model, temperature=0.5, seed=3)
  assert (outcome.status, outcome.value) == ('optimal', 7)
  (request,) = model.requests
  assert request['messages'] == [{'role': 'user', 'content': TEXT}]
  assert (request['temperature'], request['seed']) == (0.5, 3)


@pytest.mark.parametrize('reply', ('{"s":', '', RIGHT + '...'))
def test_a_reply_that_is_no_formulation_does_not_run(reply):
  outcome = closed_circle.solve_once(TEXT, ScriptedModel(reply), 0.0, 0)
  assert outcome.status == 'error'


def test_a_server_without_reply_is_an_error():
  model = ScriptedModel(ReplyError('no server'))
  with pytest.raises(ReplyError, match='no server'):
    closed_circle.solve_once(TEXT, model, 0.0, 0)


def test_a_vote_outweighs_a_wrong_greedy_answer(tmp_path):
  circle = closed_circle.Circle(str(tmp_path), Sizes(votes=3))
  model = ScriptedModel(WRONG, RIGHT, WRONG, RIGHT)
  (outcome,) = circle.solve_all(model, [{'text': TEXT, 'value': 7}])
  assert outcome == Outcome(verdict(False), True)


def test_the_table_has_means_intervals_and_paired_differences():
  # Of 100 problems LoRA is right in 40 and MoLoRA in 60, the same with both
  # seeds; all run.
  def outcomes(right):
    return [Outcome(verdict(i < right), i < right + 10) for i in range(100)]

  by_name = {'base': outcomes(0)}
  for seed in (0, 1):
    by_name |= {
      f'lora_sft_{seed}': outcomes(40),
      f'molora_sft_{seed}': outcomes(60),
      f'lora_dpo_{seed}': outcomes(40),
      f'molora_dpo_{seed}': outcomes(70),
    }
  baseline = [i < 5 for i in range(100)]
  table = closed_circle.make_table(by_name, baseline, seeds=2)
  assert table['majority']['accuracy'][0] == 5
  assert table['base']['accuracy'] == (0, 0, 0)
  mean, low, high = table['molora_sft']['accuracy']
  # The binomial standard deviation is 4.9 points.
  assert (mean, low, high) == (
    60,
    pytest.approx(50, abs=2),
    pytest.approx(70, abs=2),
  )
  assert table['molora_sft']['runs'] == (100, 100, 100)
  assert table['molora_sft, vote less one answer']['accuracy'][0] == 10
  mean, low, high = table['molora less lora, sft']['accuracy']
  # Paired, the deviation is that of 20 of 100: 4 points.
  assert mean == 20
  assert low == pytest.approx(12, abs=2) and high == pytest.approx(28, abs=2)
  text = closed_circle.format_table(table)
  assert (
    '| majority | 5.0 (' in text and '| molora, dpo less sft | 10.0 (' in text
  )


def test_the_majority_baseline_is_the_most_frequent_value_of_the_family(
  tmp_path,
):
  train = tmp_path / 'train.jsonl'
  rows = [('knapsack', 7), ('knapsack', 7), ('knapsack', 3), ('covering', 3)]
  train.write_text(
    ''.join(json.dumps({'dataset': f, 'value': v}) + '\n' for f, v in rows)
  )
  test = [
    {'family': 'knapsack', 'value': 7},
    {'family': 'knapsack', 'value': 3},
    {'family': 'covering', 'value': 3},
  ]
  assert closed_circle.majority(str(train), test) == [True, False, True]


def test_training_and_test_share_no_template_and_no_problem(tmp_path):
  circle = closed_circle.Circle(
    str(tmp_path), Sizes(rows=60, test_rows=20, validation_rows=5)
  )
  circle.write_data()
  train, base, validation, test = (
    [json.loads(x) for x in (tmp_path / f'{name}.jsonl').open()]
    for name in ('train', 'base', 'validation', 'test')
  )
  assert (len(train), len(validation), len(test)) == (60, 5, 20)
  assert not {row['text'] for row in validation} & {r['text'] for r in test}
  assert all(row['template'].startswith('held_out/') for row in validation)
  assert {row['dataset'] for row in base} == set(closed_circle.BASE_FAMILIES)
  assert all(row['template'].startswith('held_out/') for row in test)
  assert not any(row['template'].startswith('held_out/') for row in train)
  problems = {numbers(row['targets']) for row in train}
  assert not problems & {numbers(row['problem']) for row in test}
  for row in train:
    problem = Problem.from_json(row['targets'])
    assert rewards.judge(problem.to_json(), row['value']).is_right
    names = [variable.name for variable in problem.variables]
    assert all(name in row['inputs'] for name in names)


@pytest.mark.parametrize('kind', ('items', 'limit', 'question'))
@pytest.mark.parametrize('family', sentences.FAMILIES)
def test_held_out_sentences_are_new_and_their_words_are_not(family, kind):
  train, held_out = (
    sentences.forms(family, kind, is_held_out) for is_held_out in (False, True)
  )
  assert held_out and not set(train) & set(held_out)
  words = set(re.findall(r'\w+', ' '.join(train).lower()))
  assert set(re.findall(r'\w+', ' '.join(held_out).lower())) <= words


def test_a_text_has_its_sentences_in_any_order():
  instance = draw_knapsack(StableRandom(0, 1, 2), DOMAINS[0], SCALE)
  texts = set()
  for index in range(200):
    template = sentences.draw_template(
      StableRandom(0, 0, index), 'knapsack', index % 2 == 0
    )
    assert template.name.startswith('held_out/') == (index % 2 == 0)
    text = template.render(instance.fields, DOMAINS[0])
    assert not re.search(r'[{}\[\]|]|[A-Z]{3}', text)
    check_numbers(instance, text)
    texts.add(text)
  assert len(texts) > 150


def test_the_written_tokenizer_is_that_of_bytes(tmp_path):
  pytest.importorskip('transformers')
  from moepeft.data.tokenizers import tokenizer as tokenizers

  closed_circle.write_byte_tokenizer(str(tmp_path))
  written = tokenizers.load_tokenizer(str(tmp_path))
  of_bytes = tokenizers.load_tokenizer('bytes')
  for text in (TEXT, RIGHT, 'a  b\n\tc|', 'Käse 木 \u00a0'):
    assert list(written.encode(text)) == of_bytes.encode(text)
    assert written.decode(of_bytes.encode(text)) == text
  assert (written.eos, written.size) == (of_bytes.eos, of_bytes.size)


@pytest.mark.slow
def test_the_circle_runs_from_end_to_end(tmp_path, capsys):
  sizes = dict(
    seeds=1, rows=200, test_rows=3, base_steps=4, sft_steps=3, dpo_steps=2
  )
  flags = [f'--{name}={value}' for name, value in sizes.items()]
  flags += ['--batch_size=4', '--pair_rows=4', '--votes=2']
  flags += ['--validation_rows=2']
  assert closed_circle.main([f'--output={tmp_path}', *flags]) == 0
  table = json.loads((tmp_path / 'table.json').read_text())
  # Four steps teach nothing: no answer is right, with pairs or without.
  assert table['molora_dpo']['accuracy'] == [0, 0, 0]
  assert {'majority', 'base', 'lora_sft', 'molora_sft', 'lora_dpo'} <= set(
    table
  )
  pairs = (tmp_path / 'pairs_molora_0.jsonl').read_text().splitlines()
  assert 0 < len(pairs) <= 8
  assert '| molora_dpo | 0.0 (0.0 to 0.0)' in capsys.readouterr().out
  # The second call finds every step done.
  assert closed_circle.main([f'--output={tmp_path}', *flags]) == 0
  assert (
    closed_circle.main([f'--output={tmp_path}', *flags, '--rates', '0.1']) == 0
  )
  assert 'molora, learning rate 0.1: 0.0% right' in capsys.readouterr().out

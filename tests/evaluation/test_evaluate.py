# SPDX-License-Identifier: Apache-2.0
"""The evaluation command: rows of every prompt, and bad input."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import types

import numpy as np
import pytest

from moepeft import config as config_lib
from moepeft import evaluate, train
from moepeft.checkpoints.hf import model as hf
from moepeft.core.progress import Pass
from moepeft.data.readers import jsonl_rows
from moepeft.data.tokenizers.tokenizer import ByteTokenizer
from moepeft.evaluation import eval_sets, plan, results, summary
from moepeft.evaluation import evaluator as evaluator_lib
from moepeft.evaluation.evaluator import Evaluator
from moepeft.evaluation.plan import PartialResults
from moepeft.evaluation.tables import compare
from moepeft.evaluation.tables import render as table_render
from moepeft.evaluation.tables import terminal as text
from moepeft.models.decoder.model import Decoder, DecoderConfig
from moepeft.models.t5 import model as t5
from moepeft.nn.initializers import init_params
from moepeft.tasks import Example

from .. import commands
from ..contracts import small
from ..training.test_train import CONFIG, card
from .cases import INFO, right, row
from .test_rank_classification import RANDOM, Bigram, log_likelihood, variables


def made(task, prompt, idx, inputs, choices=(), label=-1, targets=''):
  targets = targets or choices[label]
  return Example(task, prompt, idx, inputs, targets, tuple(choices), label)


# Two prompts on the same three examples, and a task of one.
ROWS = [
  made('x', 'p', 3, 'a?', 'ab', 0),
  made('x', 'p', 5, 'b?', 'ab', 0),
  made('x', 'p', 9, 'b?', 'ab', 1),
  made('x', 'q', 3, 'a?', 'abc', 0),
  made('x', 'q', 5, 'b?', 'abc', 1),
  made('x', 'q', 9, 'c?', 'abc', 0),
  made('y', 'p', 3, 'b?', ('a', 'b'), 1),
]


def small_evaluator(model):
  return Evaluator(model, ByteTokenizer(), (64, 16), 4)


def accuracies(rows, most=9):
  actual = eval_sets.prompts('evaluation', rows, most)
  measured = small_evaluator(Bigram()).accuracy(variables(echo=2.0), actual)
  return [results.make_result(INFO, m) for m in measured]


def test_every_prompt_has_a_row_with_what_each_example_came_to():
  # The echo chooses what the inputs begin with: it is the label in 1, 0, 1 of
  # the first prompt, 1, 1, 0 of the second and in the last.
  actual = {(r.task, r.prompt): r for r in accuracies(ROWS)}
  assert list(actual) == [('x', 'p'), ('x', 'q'), ('y', 'p')]
  first, second, last = actual.values()
  assert (first.idx, first.each) == ((3, 5, 9), (1, 0, 1))
  assert (second.idx, second.each) == ((3, 5, 9), (1, 1, 0))
  assert first.value == pytest.approx(2 / 3) and last.value == 1
  # Labels 0, 0, 1, then 0, 1, 0.
  assert first.majority == second.majority == pytest.approx(2 / 3)
  assert (first.chance, second.chance) == pytest.approx((1 / 2, 1 / 3))
  assert first.metric == 'accuracy' and first.run == INFO.run


def test_examples_that_cannot_be_ranked_are_counted():
  long = 'a' * 20
  rows = [
    *ROWS[:2],
    # The same after 16 tokens: left out; a long input: cut.
    made('x', 'p', 9, 'b?', (long, long + 'b'), 1),
    made('x', 'p', 11, 'b' * 80, 'ab', 1),
    made('z', 'p', 9, 'b?', (long, long + 'b'), 1),
  ]
  (row,) = accuracies(rows)
  assert (row.idx, row.cut, row.left_out) == ((3, 5, 11), 1, 1)


def test_a_prompt_that_cannot_be_ranked_is_named(capsys):
  long = 'a' * 20
  lost = made('z', 'w', 9, 'b?', (long, long + 'b'), 1)
  prompts = eval_sets.prompts('evaluation', [*ROWS, lost], 9)
  actual = summary.summarize('none', 0, prompts, accuracies([*ROWS, lost]))
  assert actual['not_ranked'] == [{'task': 'z', 'prompt': 'w', 'examples': 1}]
  summary.print_summary(actual, accuracies(ROWS))
  output = capsys.readouterr().out
  assert '1 prompts have no accuracy' in output and "z 'w'" in output


def test_a_cut_example_is_told_once_whatever_is_measured(capsys):
  rows = [made('x', 'p', 3, 'b' * 80, 'ab', 0), made('x', 'p', 5, 'a', 'ab', 0)]
  (row,) = accuracies(rows)
  again = dataclasses.replace(row, metric='exact_match')
  summary.print_summary({'when': 'now'}, [row, again])
  assert '1 of 2 measured examples are cut' in capsys.readouterr().out


def test_prompts_of_a_task_have_the_same_examples():
  rows = [
    made('x', prompt, idx, f'{idx}', 'ab', 0)
    for prompt in 'pqr'
    for idx in range(0, 22, 2)
    if (prompt, idx) != ('r', 0)
  ]
  actual = eval_sets.prompts('evaluation', rows, 3)
  # 0, 11/3 and 22/3 of eleven, rounded down: the idx 0, 6 and 14.
  assert [[e.idx for e in p.examples] for p in actual] == [
    [0, 6, 14],
    [0, 6, 14],
    # It lacks one, and gets no other for it.
    [6, 14],
  ]


def test_rows_without_an_idx_are_counted_in_their_prompt():
  rows = [made('x', p, -1, 'a', 'ab', 0) for p in 'ppqqq']
  actual = eval_sets.prompts('evaluation', rows, 9)
  assert [[e.idx for e in p.examples] for p in actual] == [[0, 1], [0, 1, 2]]


def test_rows_without_an_idx_are_counted_in_their_task():
  # All -1 they would be one example, which has no interval.
  rows = [made('x', p, -1, 'a', 'ab', 0) for p in 'ppq']
  (actual,) = eval_sets.whole_tasks([*rows, made('x', 'p', 7, 'a', 'ab', 0)], 9)
  assert [e.idx for e in actual.examples] == [0, 1, 2, 7]


def test_rows_of_another_file_are_not_held_out_ones(tmp_path):
  config = config_lib.default()
  config.data.source = 'jsonl'
  # Of the same task and prompt: not a row twice, nor in the mean.
  config.evaluation.path = dump(tmp_path / 'x.jsonl', [CHOICES])
  rows = [made('x', 'p', i, 'q', targets='ab'[i % 2]) for i in range(5)]
  held_out = types.SimpleNamespace(rows=rows[:4], held_out=rows[4:])
  actual = eval_sets.prompts_with_choices(config, held_out)
  assert [(p.group, p.task, p.name) for p in actual] == [
    ('validation', 'x', 'p')
  ]


class Logits(Bigram):
  """The same, with logits alone for an answer."""

  def apply(self, variables, batch):
    return super().apply(variables, batch)[0]


def test_loss_is_a_mean_over_tokens():
  texts = ('abcabc', 'a', 'cb')
  rows = [made('x', 'p', i, 'q', targets=t) for i, t in enumerate(texts)]
  actual = eval_sets.prompts('evaluation', rows, 9)
  (measured,) = small_evaluator(Logits()).loss(variables(RANDOM), actual)
  row = results.make_result(INFO, measured)
  np.testing.assert_allclose(
    row.each, [-log_likelihood(t) for t in texts], rtol=1e-5
  )
  # With EOS.
  assert row.weights == (7, 2, 3)
  assert row.value == pytest.approx(sum(row.each) / 12)
  assert (row.metric, row.majority, row.chance) == ('loss', None, None)
  head, cells = text.table([row]).splitlines()[1:3]
  assert head.split()[:3] == ['task', 'median', 'perplexity']
  assert cells.split()[2] == f'{np.exp(row.value):.3f}'


class Parrot:
  """Answers with the inputs."""

  def answers(self, variables, examples, progress):
    return [e.inputs for e in examples]

  def cut(self, examples):
    return np.array([e.idx == 1 for e in examples])


def test_answers_are_measured_by_example_and_bleu_by_prompt(monkeypatch):
  pytest.importorskip('rouge_score')
  pytest.importorskip('sacrebleu')
  text = 'the cat sat on the mat'
  rows = [
    made('x', 'p', 0, text, targets=text),
    made('x', 'p', 1, 'a dog', targets='no'),
    made('x', 'q', 0, text, targets=text),
  ]
  evaluator = small_evaluator(Bigram())
  evaluator._generator = Parrot()
  measured = evaluator.text_metrics(
    ('exact_match', 'rouge_l', 'bleu'),
    {},
    eval_sets.prompts('evaluation', rows, 9),
  )
  actual = [results.make_result(INFO, m) for m in measured]
  by_key = {(r.prompt, r.metric): r for r in actual}
  assert by_key['p', 'exact_match'].each == (1, 0)
  assert by_key['p', 'exact_match'].cut == 1
  assert by_key['p', 'rouge_l'].each == (1, 0)
  bleu = by_key['q', 'bleu']
  assert (bleu.value, bleu.each, bleu.low) == (pytest.approx(100), None, None)


def test_the_table_has_medians_intervals_and_what_they_are_of():
  lines = text.table(accuracies(ROWS)).splitlines()
  assert lines[0] == 'accuracy (%)'
  cells = [line.split() for line in lines]
  head = 'task median over prompts 95 % interval majority prompts examples'
  assert cells[1] == head.split()
  # Both prompts have 2/3, of the same three examples; one has no interval.
  x, y, average = cells[2:]
  assert (x[0], x[1], x[-3:]) == ('x', '66.7', ['66.7', '2', '3'])
  assert x[2:5] == ['66.7', 'to', '66.7']
  assert y == ['y', '100.0', '-', '-', '100.0', '1', '1']
  assert (average[:2], average[-2:]) == (['average', '83.3'], ['3', '4'])


def test_the_table_has_the_spread_over_the_prompts_of_a_task():
  # Accuracies 1/5, 4/5 and 3/5: the median says nothing of the outer two.
  rows = [row('x', 'pqr'[i], right(of, 5)) for i, of in enumerate((1, 4, 3))]
  line, average = text.table(rows).splitlines()[2:]
  assert line.split()[:5] == ['x', '60.0', '20.0', 'to', '80.0']
  # Of tasks, not of prompts.
  assert average.split()[:3] == ['average', '60.0', '-']
  assert 'over prompts' not in text.table(rows[:1])


def test_wordings_of_embedded_tasks_are_told_apart():
  rows = accuracies(ROWS[:6])
  rows = [
    dataclasses.replace(row, prompt=name)
    for row, name in zip(rows, ('seen', 'held_out'), strict=True)
  ]
  seen, held_out = text.table(rows).split('\n\n')
  # The prompts p and q have 2/3 each, of a prompt: no median of both.
  for said, name in ((seen, 'seen'), (held_out, 'held_out')):
    head, _, line, *_ = said.splitlines()
    assert head == f'accuracy (%), wordings {name}'
    assert line.split()[:2] == ['x', '66.7'] and line.split()[-2] == '1'


def test_a_pass_tells_its_speed_and_the_time_left(capsys):
  times = iter([0.0, 2.0, 3.0, 30.0])
  told = Pass(20, 'ranked', clock=lambda: next(times))
  for count in (4, 4, 12):
    told(count)
  told.close()
  # The second comes too soon after the first for a line of its own.
  assert capsys.readouterr().err.splitlines() == [
    'ranked 0/20',
    'ranked 4/20  2.0 examples/s  ETA 0:08',
    'ranked 20/20  0.67 examples/s  ETA 0:00',
  ]


# At every site, compiling takes several times as long.
METHOD = "lora(rank=2, targets='decoder/cross/q')"


def dump(path, rows):
  path.write_text('\n'.join(map(json.dumps, rows)) + '\n')
  return str(path)


@pytest.fixture(scope='module')
def begun(tmp_path_factory):
  """The work directory of a step on rows of two datasets."""
  folder = tmp_path_factory.mktemp('evaluate')
  rows = [
    {
      'dataset': name,
      'template': template,
      'idx': i,
      'inputs': f'{i}?',
      'targets': 'ab'[i % 2],
    }
    for name in ('one', 'two')
    for template in ('t', 'u')
    for i in range(10)
  ]
  params = init_params(t5.T5(CONFIG), small.batch(), 0)['params']
  hf.save(str(folder / 'tiny'), CONFIG, params)
  config = card(
    str(folder / 'tiny'),
    steps=1,
    **{
      'method': METHOD,
      'data.source': 'jsonl',
      'data.path': dump(folder / 'train.jsonl', rows),
      'data.validation_fraction': 0.4,
    },
  )
  train.train(config, str(folder / 'run'))
  return str(folder / 'run')


CHOICES = {'template': 't', 'inputs': 'q?', 'choices': ['a', 'b'], 'label': 1}
OPEN = {'template': 't', 'inputs': 'q?', 'targets': 'abc'}


@pytest.mark.slow
def test_a_run_is_measured_on_what_it_holds_out(begun):
  total, rows = evaluate.evaluate(begun, max_examples=3)
  actual = {(r.task, r.prompt, r.metric): r for r in rows}
  assert set(actual) == {
    *((task, prompt, 'accuracy') for task in ('one', 'two') for prompt in 'tu'),
    ('one', '', 'loss'),
    ('two', '', 'loss'),
  }
  row = actual['one', 'u', 'accuracy']
  # Three of the last four idx, 6 to 9: places 0, 4/3 and 8/3.
  assert row.idx == (6, 7, 8)
  assert (row.data, row.step, row.seed) == ('held_out', 1, 0)
  assert (row.method, row.semantics) == (METHOD, 'official')
  assert (row.run, row.base) == (begun, 'tiny')
  assert 0 < row.parameters < row.base_parameters
  # A letter and EOS each.
  assert actual['one', '', 'loss'].weights == (2, 2, 2)
  # Of one task: both prompts' three examples.
  assert [(r['group'], r['task'], r['examples']) for r in total['rows']] == [
    ('validation', 'one', 6),
    ('validation', 'two', 6),
  ]
  both = [actual['one', p, 'accuracy'].value for p in 'tu']
  assert total['rows'][0]['accuracy'] == pytest.approx(np.mean(both))
  assert set(total['scores']) == {'accuracy', 'loss'}
  assert np.isfinite(total['validation_loss'])
  perplexity = np.exp(actual['one', '', 'loss'].value)
  assert total['perplexity']['one'] == pytest.approx(perplexity)


def test_held_out_rows_have_the_named_metrics(begun):
  _, rows = evaluate.evaluate(
    begun, max_examples=3, metrics=['exact_match', 'accuracy']
  )
  assert [(r.task, r.prompt, r.metric) for r in rows] == [
    *((task, prompt, 'accuracy') for task in ('one', 'two') for prompt in 'tu'),
    ('one', '', 'exact_match'),
    ('two', '', 'exact_match'),
  ]
  assert {row.data for row in rows} == {'held_out'}
  assert all(row.examples == 3 for row in rows)


def test_a_metric_that_held_out_rows_do_not_have_is_refused():
  config = config_lib.default()
  config.data.source = 'jsonl'
  # Each has a target of its own: nothing to choose from.
  rows = [made('x', 'p', i, 'q', targets=str(i)) for i in range(23)]
  held_out = types.SimpleNamespace(rows=rows[:19], held_out=rows[19:])
  run = types.SimpleNamespace(config=config)
  assert set(plan.plan_from_run(run, held_out)) == {'loss'}
  with pytest.raises(ValueError, match='asks for accuracy, of which .* --data'):
    plan.plan_from_run(run, held_out, ['accuracy', 'loss'])


def test_rows_are_ranked_where_they_have_choices_and_else_scored(
  begun, tmp_path
):
  path = dump(tmp_path / 'mine.jsonl', [CHOICES, OPEN | {'task': 'open'}])
  total, rows = evaluate.evaluate(begun, data=path)
  assert [(r.task, r.metric, r.data) for r in rows] == [
    ('mine', 'accuracy', 'mine'),
    ('open', 'loss', 'mine'),
  ]
  assert 'validation_loss' not in total
  # The targets of a row with choices are its right one: a letter and EOS.
  _, rows = evaluate.evaluate(begun, data=path, metrics=['loss'])
  assert [(r.task, r.weights) for r in rows] == [('mine', (2,)), ('open', (4,))]


def test_rows_say_which_data_and_lengths_they_are_of(begun, tmp_path):
  rows = [CHOICES, CHOICES | {'label': 0}]
  path = dump(tmp_path / 'mine.jsonl', rows)
  _, (row,) = evaluate.evaluate(begun, data=path, max_examples=1)
  config = json.loads((pathlib.Path(begun) / 'config.json').read_text())
  lengths = [config['data'][f'{side}_length'] for side in ('inputs', 'targets')]
  assert [row.inputs_length, row.targets_length] == lengths
  # Of all that was read, however little of it is measured.
  whole = jsonl_rows.read(path)
  assert row.examples == 1 and row.data_sha == eval_sets.digest(whole)
  assert re.fullmatch('[0-9a-f]{12}', row.data_sha)
  other = [dataclasses.replace(e, inputs=f'{e.inputs}!') for e in whole]
  assert (
    eval_sets.digest(other) != row.data_sha == eval_sets.digest(list(whole))
  )
  assert (
    eval_sets.digest(whole[:1]) != row.data_sha and eval_sets.digest([]) is None
  )


def test_lengths_may_be_longer_than_those_of_training(begun, tmp_path):
  # Bytes: 300 and EOS are more than the run was trained on.
  path = dump(tmp_path / 'mine.jsonl', [OPEN | {'inputs': 'a' * 300}])
  options = {'data': path, 'metrics': ['loss']}
  _, (short,) = evaluate.evaluate(begun, **options)
  _, (long,) = evaluate.evaluate(begun, **options, inputs_length=301)
  assert (short.cut, long.cut, long.inputs_length) == (1, 0, 301)
  assert long.targets_length == short.targets_length
  # 'abc' is three tokens and EOS: 'a' and EOS are left.
  more = {'inputs_length': 301, 'targets_length': 2, 'batch_size': 1}
  _, (cut,) = evaluate.evaluate(begun, **options, **more)
  assert (cut.cut, cut.targets_length, cut.weights) == (1, 2, (2,))


def test_an_evaluation_goes_on_where_it_was_killed(
  begun, tmp_path, monkeypatch, capsys
):
  rows = [CHOICES | {'task': t, 'template': p} for t in 'xy' for p in 'pq']
  path = dump(tmp_path / 'mine.jsonl', rows)
  options = {'data': path, 'part': str(tmp_path / 'rows.jsonl.part')}
  monkeypatch.setattr(evaluator_lib, '_CHUNK_EXAMPLES', 1)
  accuracy, asked = Evaluator.accuracy, []

  def killed_at(count):
    def until(self, variables, prompts, progress):
      if len(asked) == count:
        raise KeyboardInterrupt
      asked.append([(p.task, p.name) for p in prompts])
      return accuracy(self, variables, prompts, progress)

    monkeypatch.setattr(Evaluator, 'accuracy', until)

  killed_at(3)
  with pytest.raises(KeyboardInterrupt):
    evaluate.evaluate(begun, **options)
  # A kill in the middle of a line: that row is measured once more.
  part = tmp_path / 'rows.jsonl.part'
  part.write_bytes(part.read_bytes()[:-7])
  capsys.readouterr()
  asked.clear()
  killed_at(None)
  _, actual = evaluate.evaluate(begun, **options)
  assert asked == [[('y', 'p')], [('y', 'q')]]
  assert f'2 of 4 rows are in {part}; going on' in capsys.readouterr().out
  # In one go, and in the order of one go.
  _, whole = evaluate.evaluate(begun, data=path)
  assert actual == whole and results.read(part) == whole


def test_rows_of_another_evaluation_are_not_gone_on_from(tmp_path):
  path = str(tmp_path / 'rows.jsonl.part')
  row = accuracies(ROWS[:3])[0]
  info = dataclasses.replace(INFO, data_sha='0123456789ab')
  first = PartialResults(path, info)
  first.add([dataclasses.replace(row, data_sha='0123456789ab')])
  first.close()
  (prompt,) = eval_sets.prompts('evaluation', ROWS[:3], 9)
  moved = dataclasses.replace(info, run='elsewhere')
  assert PartialResults(path, moved).get(prompt, 'accuracy').run == 'elsewhere'
  assert PartialResults(path, info).get(prompt, 'loss') is None
  # Fewer examples of the prompt are another --max_examples.
  (fewer,) = eval_sets.prompts('evaluation', ROWS[:3], 2)
  assert PartialResults(path, info).get(fewer, 'accuracy') is None
  for changes in ({'data_sha': 'ba9876543210'}, {'seed': 1}, {'step': 4}):
    other = PartialResults(path, dataclasses.replace(info, **changes))
    assert other.get(prompt, 'accuracy') is None


def test_the_base_alone_has_rows_too(begun, tmp_path):
  path = dump(tmp_path / 'mine.jsonl', [OPEN])
  _, (base,) = evaluate.evaluate(begun, 'base', path)
  assert (base.method, base.step, base.parameters) == ('none', 0, 0)
  assert base.checkpoint == 'base'
  _, (run,) = evaluate.evaluate(begun, '', path)
  assert run.base_parameters == base.base_parameters
  assert run.checkpoint == 'latest'
  # One step at a rate of 1e-3 moves it a little.
  assert run.value != base.value
  assert run.value == pytest.approx(base.value, rel=0.05)


def test_tables_set_a_run_beside_its_base(begun, tmp_path):
  data = dump(tmp_path / 'mine.jsonl', [CHOICES, CHOICES | {'label': 0}])
  shutil.copy(os.path.join(begun, 'config.json'), tmp_path)
  # By the names that the command gives them.
  for checkpoint, name in (('', 'evaluation_mine'), ('base', 'base_mine')):
    _, rows = evaluate.evaluate(begun, checkpoint, data)
    results.write(str(tmp_path / f'{name}.jsonl'), rows)
  shown = table_render.markdown(compare.table([str(tmp_path)])).splitlines()
  # Of two equal inputs of other labels one is right, whatever the weights.
  for label in ('the base', METHOD):
    (line,) = [
      line for line in shown if line.startswith('| ') and label in line
    ]
    assert ' 50.0' in line


def test_the_command_writes_rows_and_what_they_come_to(begun, tmp_path):
  data = dump(tmp_path / 'mine.jsonl', [CHOICES, CHOICES | {'label': 0}])
  done = commands.run(
    'moepeft.evaluate', f'--workdir={begun}', f'--data={data}'
  )
  assert done.returncode == 0, done.stderr
  (row,) = results.read(os.path.join(begun, 'evaluation_mine.jsonl'))
  # The same inputs twice, of other labels: one of them is right.
  assert (row.value, row.examples, row.idx) == (0.5, 2, (0, 1))
  with open(os.path.join(begun, 'evaluation_mine.json')) as f:
    actual = json.load(f)
  assert actual['scores']['accuracy']['mine']['value'] == 0.5
  assert actual['rows'][0]['group'] == 'evaluation'
  assert not os.path.exists(os.path.join(begun, 'evaluation_mine.jsonl.part'))
  assert 'accuracy (%)' in done.stdout and 'ranked 2/2' in done.stderr


@pytest.mark.parametrize(
  ('args', 'said'),
  [
    ({'data': '/no/rows'}, "'/no/rows' does not exist; name a file of .jsonl"),
    ({'data': '{empty}'}, 'holds no file of .jsonl, .jsonl.gz'),
    ({'data': '{open}', 'metrics': ['accuracy']}, "has 'choices' and 'label'"),
    (
      {'data': '{open}', 'metrics': ['f1']},
      "no metric 'f1'; there are accuracy, loss",
    ),
    ({'workdir': '{empty}'}, 'is no work directory .*it has no config.json'),
    ({'checkpoint': '7'}, "holds no checkpoint '7'; it has those of the steps"),
    ({'max_examples': 0}, 'config.evaluation.max_examples is at least 1'),
    ({'inputs_length': 1}, 'config.data.inputs_length is at least 2'),
    ({'batch_size': 0}, 'config.evaluation.batch_size is at least 1'),
  ],
)
def test_bad_input_is_one_sentence(begun, tmp_path, args, said):
  (tmp_path / 'empty').mkdir()
  paths = {
    '{empty}': str(tmp_path / 'empty'),
    '{open}': dump(tmp_path / 'open.jsonl', [OPEN]),
  }
  args = {'workdir': begun} | args
  args = {
    k: paths.get(v, v) if isinstance(v, str) else v for k, v in args.items()
  }
  with pytest.raises(ValueError, match=said) as e:
    evaluate.evaluate(**args)
  assert '\n' not in str(e.value)


def test_a_decoder_without_room_for_answers_is_refused_before_anything_runs():
  config = config_lib.default()
  model = Decoder(DecoderConfig(length=config.data.length - 1))
  run = types.SimpleNamespace(config=config, model=model)
  with pytest.raises(
    ValueError, match='length=512 tokens .* room for 511; leave out bleu'
  ):
    plan.check_length(run, ['loss', 'bleu'])
  plan.check_length(run, ['loss', 'accuracy'])
  config.data.length -= 1
  plan.check_length(run, ['bleu'])


def test_data_is_named_by_its_file_or_directory(tmp_path, monkeypatch):
  paths = ('a/cb.v2.jsonl.gz', 'cb.jsonl', 'a/p3.1/', 'x.gz', 'a/../b')
  actual = [evaluate.name_of(path) for path in paths]
  assert actual == ['cb.v2', 'cb', 'p3.1', 'x', 'b']
  monkeypatch.chdir(tmp_path)
  assert evaluate.name_of('.') == tmp_path.name
  for path in ('held_out.jsonl', 'a/after', '/'):
    with pytest.raises(ValueError, match='rename'):
      evaluate.name_of(path)


def test_the_output_is_checked_and_written_whole(tmp_path):
  folder = str(tmp_path)
  path = evaluate.output_of(None, f'{folder}/evaluation.json')
  assert path == str(tmp_path / 'evaluation.json')
  with pytest.raises(ValueError, match='ends in .json.*got .*rows.jsonl'):
    evaluate.output_of(f'{folder}/rows.jsonl', f'{folder}/x.json')
  with pytest.raises(ValueError, match='does not exist; make it'):
    evaluate.output_of(f'{folder}/none/a.json', f'{folder}/x.json')
  summary.write(path, {'a': 1})
  with pytest.raises(TypeError):
    summary.write(path, {'a': object()})
  # What was there is whole, and nothing else is.
  assert json.loads((tmp_path / 'evaluation.json').read_text()) == {'a': 1}
  assert os.listdir(folder) == ['evaluation.json']


def test_the_command_answers_bad_input_with_one_line_and_code_two(begun):
  done = commands.run('moepeft.evaluate', f'--workdir={begun}', '--metrics=f1')
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: there is no metric')

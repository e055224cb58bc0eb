# SPDX-License-Identifier: Apache-2.0
"""The embedded tasks are balanced, short, disjoint by split and repeatable."""

import collections
import functools
import re

import pytest

from moepeft import tasks

COUNT = 1000  # draws a task; a rate of one half then deviates by 1.6 %
SLACK = 0.065  # four deviations
ALL = tasks.task_names('ABC')


@functools.cache
def _draws(name, count=COUNT, seed=5):
  task = tasks.TASKS[name]
  return [task.draw(tasks.StableRandom(seed, 1, i)) for i in range(count)]


@pytest.fixture(scope='module', params=ALL)
def drawn(request):
  """Examples of one task, all wordings, half of them held out."""
  half = COUNT // 2
  return [
    example
    for split in ('train', 'held_out')
    for example in tasks.examples(
      (request.param,), half, seed=3, split=split, templates='all'
    )
  ]


def test_every_task_is_in_one_group_and_no_group_is_small():
  assert all(len(tasks.task_names(group)) >= 4 for group in 'ABC')
  assert tasks.task_names('ABC') == tuple(tasks.TASKS)


@pytest.mark.parametrize('name', ALL)
def test_tasks_have_four_to_six_wordings_with_their_own_names(name):
  task = tasks.TASKS[name]
  assert task.name == name
  assert 4 <= len(task.templates) <= 6
  assert 1 <= task.held_out <= 2
  assert len({t.name for t in task.templates}) == len(task.templates)
  assert len({t.text for t in task.templates}) == len(task.templates)


def test_some_wordings_list_the_options_and_some_change_the_labels():
  templates = [t for f in tasks.TASKS.values() for t in f.templates]
  listing = sum('{options}' in t.text for t in templates)
  assert 10 <= listing <= len(templates) // 2
  assert sum(bool(t.verbalizer) for t in templates) >= 5


def test_an_example_depends_on_its_place_only():
  stream = tasks.examples(ALL, 60, seed=1)
  assert [example.idx for example in stream] == list(range(60))
  for index in (59, 0, 31):
    assert tasks.example(ALL, index, seed=1) == stream[index]
  assert tasks.examples(ALL, 20, seed=1, start=40) == stream[40:]
  assert tasks.examples(ALL, 60, seed=2) != stream


def test_tasks_take_turns_and_ignore_their_company():
  mixed = tasks.examples(('topic', 'order', 'owner'), 12, seed=1)
  alone = tasks.examples(('order',), 4, seed=1)
  assert [example.task for example in mixed[:4]] == [
    'topic',
    'order',
    'owner',
    'topic',
  ]
  assert [example.inputs for example in mixed[1::3]] == [
    example.inputs for example in alone
  ]


def test_choices_are_distinct_and_hold_the_target(drawn):
  for example in drawn:
    assert 2 <= len(example.choices) <= 4
    assert len(set(example.choices)) == len(example.choices)
    assert example.choices[example.label] == example.targets


def test_texts_are_short_ascii(drawn):
  assert all(
    example.inputs.isascii() and example.targets.isascii() for example in drawn
  )
  assert max(len(example.inputs) for example in drawn) <= 160
  assert (
    max(len(choice) for example in drawn for choice in example.choices) <= 16
  )


def test_texts_are_clean_english(drawn):
  wrong = re.compile(r'\ba [aeiou]|\ban [^aeiou]|  |[{}]|\.\.(?!\.)|^ | $')
  faults = [example.inputs for example in drawn if wrong.search(example.inputs)]
  assert [text for text in faults if ' ...' not in text] == []


def _chance(examples):
  return sum(1 / len(example.choices) for example in examples) / len(examples)


def test_no_place_among_the_choices_is_a_good_guess(drawn):
  for guess in (0, -1):
    hits = sum(example.choices[guess] == example.targets for example in drawn)
    assert hits / len(drawn) <= _chance(drawn) + SLACK


def test_no_constant_answer_is_a_good_guess(drawn):
  offered = collections.Counter(c for example in drawn for c in example.choices)
  correct = collections.Counter(example.targets for example in drawn)
  for answer, count in offered.items():
    if count >= 200:
      assert correct[answer] / count <= _chance(drawn) + 2 * SLACK
  _, most = correct.most_common(1)[0]
  assert most / len(drawn) <= _chance(drawn) + SLACK


@pytest.mark.parametrize(
  'name',
  'odd_one_out lookup directory order comparison owner coreference '
  'negation'.split(),
)
def test_neither_the_first_nor_the_last_mention_is_a_good_guess(name):
  shown = [example for example in tasks.examples((name,), COUNT, seed=4)]
  for find, best in ((str.find, min), (str.rfind, max)):
    hits = sum(
      best(example.choices, key=lambda c: find(example.inputs, c))
      == example.targets  # noqa: B023
      for example in shown
    )
    assert abs(hits / COUNT - _chance(shown)) <= SLACK


@pytest.mark.parametrize(
  'name, question_field',
  [
    ('membership', 'a_kind'),
    ('lookup', 'name'),
    ('order', 'rank'),
    ('directory', 'name'),
    ('comparison', 'question'),
    ('entailment', 'claim'),
    ('owner', 'thing'),
    ('medal', 'name'),
    ('result', 'name'),
    ('arithmetic', 'name'),
    ('counting', 'kind'),
    ('negation', 'question'),
  ],
)
def test_the_question_without_the_passage_does_not_tell_the_answer(
  name, question_field
):
  """The best answer to each question, learned from many, stays at chance."""
  counts = collections.Counter(
    (example.fields[question_field], example.answer)
    for example in _draws(name, 2 * COUNT)
  )
  tried = _draws(name, seed=6)
  hits = chance = 0
  for example in tried:
    choices = sorted((example.answer, *example.distractors))
    guess = max(
      choices, key=lambda c: counts[example.fields[question_field], c]
    )  # noqa: B023
    hits += guess == example.answer
    chance += 1 / len(choices)
  assert (hits - chance) / len(tried) <= SLACK


@pytest.mark.parametrize('name', ALL)
def test_a_tenth_of_the_instances_is_held_out(name):
  task = tasks.TASKS[name]
  splits = collections.Counter(map(task.split_of, _draws(name)))
  assert set(splits) == {'train', 'held_out'}
  assert 0.06 <= splits['held_out'] / COUNT <= 0.14


def test_train_and_held_out_share_no_text(drawn):
  half = COUNT // 2
  train, held_out = (
    {example.inputs for example in examples}
    for examples in (drawn[:half], drawn[half:])
  )
  assert not train & held_out
  assert len(held_out) > half / 2


@pytest.mark.parametrize('name', ALL)
def test_equal_fields_mean_equal_answers(name):
  answers = collections.defaultdict(set)
  for instance in _draws(name):
    answers[tuple(sorted(instance.fields.items()))].add(instance.answer)
  assert all(len(field_answers) == 1 for field_answers in answers.values())
  assert len(answers) > 0.6 * COUNT


def test_held_out_templates_are_never_trained_on():
  names = {
    templates: {
      (example.task, example.template)
      for example in tasks.examples(ALL, 1500, seed=0, templates=templates)
    }
    for templates in ('train', 'held_out', 'all')
  }
  assert not names['train'] & names['held_out']
  assert names['train'] | names['held_out'] == names['all']
  assert len(names['all']) == sum(
    len(task.templates) for task in tasks.TASKS.values()
  )


def test_groups_and_names_combine():
  assert tasks.task_names('order, topic') == ('order', 'topic')
  assert tasks.task_names('AC') == tasks.task_names('A') + tasks.task_names('C')
  assert tasks.task_names('B,topic') == (*tasks.task_names('B'), 'topic')


@pytest.mark.parametrize('wrong', ['D', 'topics', '', 'A,,B'])
def test_an_unknown_task_is_an_error_that_lists_what_exists(wrong):
  with pytest.raises(
    ValueError, match=r'groups are A, B, C, and tasks.*topic,'
  ):
    tasks.task_names(wrong)


def test_other_wrong_arguments_say_what_is_expected():
  with pytest.raises(ValueError, match="split is train or held_out; got 'dev'"):
    tasks.example(ALL, 0, seed=0, split='dev')
  with pytest.raises(ValueError, match="train, held_out, all; got 'some'"):
    tasks.example(ALL, 0, seed=0, templates='some')
  with pytest.raises(ValueError, match='count from 0; got seed -1, index 0'):
    tasks.example(ALL, 0, seed=-1)
  with pytest.raises(ValueError, match='at least one task'):
    tasks.example((), 0, seed=0)


@pytest.mark.parametrize(
  'name, inputs, targets',
  [
    (
      'topic',
      'Gina borrowed a dirty mallet. What is this text about?',
      'tools',
    ),
    (
      'lookup',
      'Question: what does Gina have? Umar has a peach, Gina has a mallet and'
      ' Tom has a saw.',
      'mallet',
    ),
    (
      'comparison',
      'Sam has 43 coins and Gina has 68 coins. Who has more coins? Choose:'
      ' Sam, Gina.',
      'Gina',
    ),
    ('medal', 'Finish: Max, Ned, Cleo. Cleo gets', 'bronze'),
    (
      'arithmetic',
      'Work it out. Fay has 69 stamps and gives away 5. Now Fay has'
      ' (59, 63, 66, 64)',
      '64',
    ),
  ],
)
def test_the_stream_never_changes(name, inputs, targets):
  """Tables and the embedded base depend on it: a change needs a new base."""
  example = tasks.example((name,), 0, seed=0)
  assert (example.inputs, example.targets) == (inputs, targets)

# SPDX-License-Identifier: Apache-2.0
"""Training never sees a held-out instance or wording of the tasks."""

import dataclasses

import pytest

from moepeft import config as config_lib
from moepeft import tasks
from moepeft.data import TrainingData, open_data
from moepeft.evaluation.eval_sets import loss_rows, training_prompts
from moepeft.tasks.task import Instance, Template

COUNT = 40
BETWEEN = '\n'


@pytest.fixture
def spelled(monkeypatch):
  """Every wording keeps its name and spells the instance, field by field."""
  for name, task in tasks.TASKS.items():
    fields = sorted(task.draw(tasks.StableRandom(0, 0, 0)).fields)
    text = BETWEEN.join(f'{{{field}}}' for field in fields)
    templates = tuple(Template(t.name, text) for t in task.templates)
    changed = dataclasses.replace(task, templates=templates)
    monkeypatch.setitem(tasks.TASKS._entries, name, changed)


def split_of(example):
  """The split of the instances that a spelled example is of."""
  task = tasks.TASKS[example.task]
  fields = sorted(task.draw(tasks.StableRandom(0, 0, 0)).fields)
  values = example.inputs.split(BETWEEN)
  fields = dict(zip(fields, values, strict=True))
  return task.split_of(Instance(fields, '', ()))


def wording_of(example):
  held_out = tasks.TASKS[example.task].templates_of('held_out')
  return (
    'held_out' if example.template in {t.name for t in held_out} else 'seen'
  )


def card(group='B'):
  config = config_lib.default()
  config.data.source = 'tasks'
  config.data.tasks = config.evaluation.tasks = group
  config.evaluation.max_examples = COUNT
  return config


def drawn(group):
  """(training examples, validation): as many of each task."""
  config = card(group)
  actual = open_data(config.data, config.seed)
  assert not actual.rows
  count = COUNT * len(tasks.task_names(group))
  return [actual.train[i] for i in range(count)], actual.held_out


# A tenth of the instances is held out and a fifth or more of the wordings:
# where training drew any of them, 40 draws a task of four families or more
# would miss them with a probability below 1e-7.
@pytest.mark.parametrize('group', tasks.GROUPS)
def test_training_sees_no_held_out_instance_and_no_held_out_wording(
  spelled, group
):
  train, _ = drawn(group)
  assert {e.task for e in train} == set(tasks.task_names(group))
  assert {split_of(e) for e in train} == {'train'}
  assert {wording_of(e) for e in train} == {'seen'}


@pytest.mark.parametrize('group', tasks.GROUPS)
def test_validation_is_of_held_out_instances_in_seen_wordings(spelled, group):
  _, validation = drawn(group)
  assert {e.task for e in validation} == set(tasks.task_names(group))
  assert {split_of(e) for e in validation} == {'held_out'}
  assert {wording_of(e) for e in validation} == {'seen'}


def test_training_uses_every_seen_wording(spelled):
  train, _ = drawn('B')
  for name in tasks.task_names('B'):
    # At most five wordings: 40 draws miss one with probability 1e-3 at most,
    # and the draws are always the same.
    assert {e.template for e in train if e.task == name} == {
      t.name for t in tasks.TASKS[name].templates_of('train')
    }


def test_evaluation_holds_out_instances_and_tells_wordings_apart(spelled):
  actual = training_prompts(card('BC'), TrainingData(None, {}))
  assert {p.task for p in actual} == set(tasks.task_names('BC'))
  for prompt in actual:
    assert len(prompt.examples) == COUNT
    assert prompt.group == tasks.TASKS[prompt.task].group
    assert {split_of(e) for e in prompt.examples} == {'held_out'}
    assert {wording_of(e) for e in prompt.examples} == {prompt.templates}
    assert {e.task for e in prompt.examples} == {prompt.task}


def test_no_evaluated_example_gives_the_validation_loss():
  config = card('B')
  data = open_data(config.data, 0)
  validated = {(e.task, e.idx // len(data.shares)) for e in data.held_out}
  # The n-th example of a task, alone or among the others.
  ranked = {
    (p.task, e.idx) for p in training_prompts(config, data) for e in p.examples
  }
  losses = {
    (e.task, e.idx // len(data.shares)) for e in loss_rows(config, data, COUNT)
  }
  assert len(validated) == 32 * len(data.shares)
  assert len(losses) == COUNT * len(data.shares)
  assert not validated & (ranked | losses)


def test_seeds_give_other_training_examples():
  config = card()
  one, two = (open_data(config.data, seed).train for seed in (0, 1))
  assert [one[i] for i in range(9)] != [two[i] for i in range(9)]

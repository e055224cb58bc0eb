# SPDX-License-Identifier: Apache-2.0
"""A LoRA learns the distribution of a trained mixture."""

import json

import pytest

from .. import commands

OPTIONS = (
  '--config=configs/molora_t5.py',
  '--config.steps=12',
  '--config.batch_size=8',
  '--config.evaluation.before=False',
  '--config.evaluation.max_examples=2',
  '--config.evaluation.tasks=storage',
  '--config.log.every_steps=1',
  '--config.log.plots=False',
)
STUDENT = ('--config.method=lora(rank=8)', '--config.objective=distill')


def train(workdir, *args):
  return commands.run('moepeft.train', *OPTIONS, f'--workdir={workdir}', *args)


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
  path = tmp_path_factory.mktemp('runs') / 'teacher'
  method = '--config.method=molora(experts=3, rank=2)'
  done = train(path, method, '--config.steps=40')
  assert done.returncode == 0, done.stderr
  return path


@pytest.mark.slow
def test_a_lora_comes_nearer_to_a_mixture_and_validates_by_the_divergence(
  teacher, tmp_path
):
  done = train(
    tmp_path / 'student', *STUDENT, f'--config.preference.reference={teacher}'
  )
  assert done.returncode == 0, done.stderr
  lines = (tmp_path / 'student' / 'metrics.jsonl').read_text().splitlines()
  losses = [row['loss'] for row in map(json.loads, lines) if 'loss' in row]
  # Batches differ; the divergence falls by more than they do.
  assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
  after = json.loads((tmp_path / 'student' / 'after.json').read_text())
  assert 0 < after['validation_loss'] < losses[0]
  assert 0 < after['validation_agreement'] <= 1


@pytest.mark.slow
@pytest.mark.parametrize('source', ['base', 'precomputed'])
def test_a_distribution_needs_a_teacher(source, tmp_path):
  done = train(tmp_path, *STUDENT, f'--config.preference.reference={source}')
  assert done.returncode == 2
  assert f'config.preference.reference={source!r} is no teacher' in done.stderr


@pytest.mark.slow
def test_a_teacher_that_reads_tasks_needs_a_student_that_does(tmp_path):
  method = "moelora(router=task(tasks=['storage']), rank=8)"
  tasks = '--config.data.tasks=storage'
  done = train(
    tmp_path / 'a', f'--config.method={method}', tasks, '--config.steps=2'
  )
  assert done.returncode == 0, done.stderr
  done = train(
    tmp_path / 'b',
    *STUDENT,
    tasks,
    f'--config.preference.reference={tmp_path / "a"}',
  )
  assert done.returncode == 2
  assert 'has a router of tasks or embeddings, which batches' in done.stderr

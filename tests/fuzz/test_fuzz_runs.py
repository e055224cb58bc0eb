# SPDX-License-Identifier: Apache-2.0
"""Damaged files of runs: every reader reads them or says so in a sentence."""

import collections
import contextlib
import json
import os
import random
import shutil
import signal

import numpy as np
import pytest

from moepeft import train
from moepeft.checkpoints.manager import Checkpoints
from moepeft.evaluation.plan import PartialResults
from moepeft.evaluation.summary import before_after_table
from moepeft.evaluation.tables import compare
from moepeft.inference import loaded_model
from moepeft.runs import resume
from moepeft.runs.history import History
from moepeft.runs.plots import Figures
from moepeft.runs.run import Run
from moepeft.runs.trackers import open_trackers

from ..checkpoints.test_manager import DESCRIBED, blank, make_state
from ..evaluation import runs as made
from ..training.test_train import JUDGED, base, card  # noqa: F401

SEED = 20_230_905
# Seconds after which a reader hangs.
PATIENCE_S = 30
MARK = '"deep\u00e4"'
DEEP = '[' * 5000 + ']' * 5000
ODD = (
  *(None, True, 0, -1, 7, 2**70, 10**400, 1.5, 1e308, float('nan')),
  *(float('inf'), '', 'x', '\ud800', 'a\nb\x1b[31m', '../..', [], {}, [[1]]),
  *([None], {'a': 1}, [1, 'x'], [[1, 2], [3]], 'deep\u00e4'),
)


class Hangs(BaseException):
  """A reader took longer than `PATIENCE_S`."""


def hang(number, frame):
  raise Hangs


# ---- what is done to a file ----


def nodes(value, path=()):
  """Paths to all parts of a JSON value."""
  yield path
  if isinstance(value, dict):
    for key in value:
      yield from nodes(value[key], (*path, key))
  elif isinstance(value, list):
    for i in range(min(len(value), 4)):
      yield from nodes(value[i], (*path, i))


def changed(value, dice):
  """A value in which one part has another type, is gone, or is new."""
  # The large part of a row is its routing: others have to be met, too.
  paths = sorted(nodes(value), key=len)
  path = dice.choice(paths if dice.random() < 0.5 else paths[:60])
  if not path:
    return dice.choice(ODD)
  parent = value
  for key in path[:-1]:
    parent = parent[key]
  how = dice.randrange(4)
  if how == 0:
    del parent[path[-1]]
  elif how == 1 and isinstance(parent, dict):
    parent[dice.choice(('x', '', 'step', 'a.b', 'a/b'))] = dice.choice(ODD)
  else:
    parent[path[-1]] = dice.choice(ODD)
  return value


def of_json(data, dice):
  """Bytes of a JSON file, or of one line of several, with a part changed."""
  lines = data.decode().splitlines() if data.count(b'\n{') else [data.decode()]
  at = dice.randrange(len(lines))
  text = json.dumps(changed(json.loads(lines[at]), dice))
  lines[at] = text.replace(json.dumps('deep\u00e4'), DEEP)
  return ('\n'.join(lines) + '\n').encode()


def of_bytes(data, dice):
  data = bytearray(data)
  at = dice.randrange(len(data) + 1)
  how = dice.randrange(6)
  if how == 0:
    return bytes(data[:at])
  if how == 1:
    data[at:at] = bytes(dice.randrange(256) for _ in range(dice.randint(1, 9)))
  elif how == 2:
    data[at : at + dice.randint(1, 999)] = b''
  elif how == 3:
    data[at : at + 64] = bytes(len(data[at : at + 64]))
  elif data:
    data[at % len(data)] ^= 1 << dice.randrange(8)
  return bytes(data)


def other_kind(path, dice):
  """Puts something else than a file there, or nothing."""
  path.unlink()
  how = dice.randrange(4)
  if how == 0:
    os.mkfifo(path)
  elif how == 1:
    path.mkdir()
  elif how == 2:
    path.symlink_to(path.name)


@contextlib.contextmanager
def damaged(path, dice):
  """The file is damaged within the block, and as it was after it."""
  data = path.read_bytes()
  parsed = path.suffix in ('.json', '.jsonl') or path.name in (
    *('metadata', '_METADATA', '_CHECKPOINT_METADATA'),
  )
  how = dice.random()
  try:
    if how < 0.1:
      other_kind(path, dice)
    elif parsed and how < 0.75:
      path.write_bytes(of_json(data, dice))
    else:
      path.write_bytes(of_bytes(data, dice))
    yield
  finally:
    if path.is_dir() and not path.is_symlink():
      shutil.rmtree(path)
    elif os.path.lexists(path):
      path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def fuzz(name, folder, paths, read, count, capsys):
  """Reads a folder `count` times with one of its files damaged.

  Any error but a ValueError or OSError of one line fails.
  """
  dice = random.Random(SEED)
  figures, faults = collections.Counter(), []
  before = signal.signal(signal.SIGALRM, hang)
  try:
    for number in range(count):
      path = folder / dice.choice(paths)
      with damaged(path, dice):
        signal.alarm(PATIENCE_S)
        try:
          read()
          figures['read'] += 1
        except Hangs:
          figures['hangs'] += 1
          faults.append(f'{number}: {path} hangs')
        except (ValueError, OSError) as e:
          figures['refused'] += 1
          if len(str(e).splitlines()) != 1 or isinstance(e, UnicodeError):
            faults.append(f'{number}: {path}: {e!r}')
        except Exception as e:
          figures['tracebacks'] += 1
          faults.append(f'{number}: {path}: {e!r}')
        finally:
          signal.alarm(0)
  finally:
    signal.signal(signal.SIGALRM, before)
  with capsys.disabled():
    print(f'\n{name}: {count} inputs: {dict(figures)}')
  assert not faults, '\n'.join([str(len(faults)), *faults[:40]])
  assert figures['refused'] > count / 10 and figures['read'] > 0


# ---- who reads it ----


@pytest.fixture(scope='module')
def run(base, tmp_path_factory):  # noqa: F811
  """A run of four steps with all its files."""
  workdir = tmp_path_factory.mktemp('run') / 'w'
  train.train(card(base, **JUDGED), str(workdir))
  shutil.copytree(base, workdir.parent / 'base')
  folder = workdir.parent / 'base'
  (folder / 'generation_config.json').write_text('{"eos_token_id": [1, 2]}')
  (workdir / 'wandb_id').write_text('0123abcd')
  return workdir


@pytest.fixture(scope='module')
def measured(run, tmp_path_factory):
  """Two work directories that a table compares."""
  folder = tmp_path_factory.mktemp('tables')
  rows = [
    (task, 'p', 'accuracy', made.right(3, 5)) for task in ('cb', 'rte', 'wsc')
  ]
  loss = [('cb', 'p', 'loss', [1.0, 2.0], [3, 4])]
  after = {'step': 7, 'validation_loss': 1.5, 'means': {'A seen': 0.5}}
  for name, seed in (('one', 0), ('two', 1)):
    made.make(folder / name, [*rows, *loss], {'seed': seed}, after)
    shutil.copy(run / 'metrics.jsonl', folder / name)
  return folder


@pytest.mark.slow
def test_tables_of_damaged_files(measured, capsys):
  one, two = str(measured / 'one'), str(measured / 'two')
  names = [
    'one/config.json',
    'one/after.json',
    'one/evaluation_eval.jsonl',
    'one/metrics.jsonl',
    'two/evaluation_eval.jsonl',
  ]
  fuzz(
    'tables',
    measured,
    names,
    lambda: compare.table([one, two], routing=True),
    600,
    capsys,
  )


@pytest.mark.slow
def test_a_resumed_run_of_damaged_files(run, base, tmp_path, capsys):  # noqa: F811
  workdir = tmp_path / 'w'
  shutil.copytree(run, workdir)
  config = card(base, **JUDGED)

  def read():
    directory = Run(str(workdir))
    resume.check_unchanged(directory, config)
    resume.check_same_data(directory, {'path': {}})
    for writer in open_trackers(directory, 4, {'log': {'trackers': ''}}):
      writer.close()
    history = History(directory.metrics())
    Figures(history, str(tmp_path / 'plots'), False).draw()
    before = directory.before()
    before_after_table(before.get('rows', []), after['rows'])

  after = json.loads((workdir / 'after.json').read_text())
  names = ['config.json', 'data.json', 'metrics.jsonl', 'before.json']
  fuzz('train (resume)', workdir, names, read, 1500, capsys)


@pytest.mark.slow
def test_rows_of_an_evaluation_under_way(measured, tmp_path, capsys):
  path = tmp_path / 'evaluation.jsonl.part'
  shutil.copy(measured / 'one' / 'evaluation_eval.jsonl', path)
  info = made.info(measured / 'one')

  def read():
    PartialResults(str(path), info).close()

  fuzz('evaluate (part)', tmp_path, [path.name], read, 600, capsys)


@pytest.mark.slow
def test_a_run_that_is_opened_with_damaged_files(run, capsys):
  folder = run.parent
  config = json.loads((run / 'config.json').read_text())
  (run / 'config.json').write_text(
    json.dumps(
      config | {'model': config['model'] | {'path': str(folder / 'base')}}
    )
  )
  names = ['w/config.json', 'base/generation_config.json']

  def read():
    opened = loaded_model.load_run(str(run))
    opened.eos_token_ids  # noqa: B018

  fuzz('evaluate, generate', folder, names, read, 120, capsys)


@pytest.mark.slow
def test_a_damaged_checkpoint(tmp_path, capsys):
  workdir = tmp_path / 'w'
  checkpoints = Checkpoints(str(workdir), keep=2)
  checkpoints.save(make_state(step=5), DESCRIBED)
  checkpoints.save(make_state(), DESCRIBED)
  latest = workdir / 'checkpoints' / '7'
  names = [
    str(f.relative_to(workdir)) for f in latest.rglob('*') if f.is_file()
  ]
  whole = make_state()

  def read():
    fresh = Checkpoints(str(workdir), keep=2)
    actual = fresh.restore(blank(), DESCRIBED)
    tree, _ = fresh.restore_trainable()
    # Read, it is what was written.
    for name in ('a', 'b'):
      expected = np.asarray(whole.trainable['q'][name])
      if not (np.asarray(actual.trainable['q'][name]) == expected).all():
        raise AssertionError('restored other arrays')
      if not (tree['q'][name] == expected).all():
        raise AssertionError('restored another adapter')

  fuzz('checkpoint', workdir, sorted(names), read, 60, capsys)

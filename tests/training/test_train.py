# SPDX-License-Identifier: Apache-2.0
"""The main job on a small random base: rows, resume, export, bad input."""

import ast
import contextlib
import dataclasses
import io
import json
import pathlib
import shutil
import sys
import types

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from moepeft import config as config_lib
from moepeft import convert, generate, train
from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.restore import restore_adapter
from moepeft.config import ranges
from moepeft.core.progress import Progress
from moepeft.core.ranges import Range
from moepeft.evaluation.evaluator import Evaluator
from moepeft.models.t5 import model as t5
from moepeft.nn.initializers import init_params
from moepeft.runs.metrics_log import MetricsLog, read
from moepeft.runs.resume import check_unchanged
from moepeft.runs.run import Run
from moepeft.training.metrics_logger import MetricsLogger

from .. import commands
from ..contracts import small

# Bytes need 259 ids.
CONFIG = dataclasses.replace(small.GATED, vocab=263)
# At every site, compiling takes five times as long.
SITES = "targets='decoder/cross/q'"


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  path = tmp_path_factory.mktemp('base') / 'hf'
  params = init_params(t5.T5(CONFIG), small.batch(), 0)['params']
  hf.save(str(path), CONFIG, params)
  return str(path)


def card(base, **changes):
  c = config_lib.default()
  c.model.path = base
  c.data.tokenizer = 'bytes'
  # Noise in the adapter and in the router, which a resumed run has to repeat.
  c.method = (
    'molora(experts=3, rank=2, dropout=0.1, router=softmax(jitter=0.1), '
    f'{SITES})'
  )
  c.optimizer.schedule = 'constant'
  c.steps = 4
  c.batch_size = 3
  c.data.inputs_length = 48
  c.data.targets_length = 9
  c.log.every_steps = 2
  # They cost as much as the steps; the tests of pictures ask for them.
  c.log.plots = False
  c.checkpoint.every_steps = 2
  # Compiling it takes longer than all else; tests that judge ask for it.
  c.evaluation.before = c.evaluation.after = False
  c.evaluation.max_examples = 3
  c.evaluation.tasks = 'B'
  c.evaluation.batch_size = 4
  with c.unlocked():
    c.update_from_flattened_dict(changes)
  return c


JUDGED = {'evaluation.before': True, 'evaluation.after': True}


def adapter_bytes(workdir):
  tree, _ = restore_adapter(str(workdir))
  return b''.join(a.tobytes() for a in jax.tree.leaves(tree))


@dataclasses.dataclass
class Begun:
  base: str
  workdir: str
  output: str


@pytest.fixture(scope='module')
def begun(base, tmp_path_factory):
  """A finished run of four steps with all its files; to be read only."""
  workdir = str(tmp_path_factory.mktemp('begun'))
  with contextlib.redirect_stdout(io.StringIO()) as output:
    train.train(card(base, **JUDGED, **{'log.plots': True}), workdir)
  return Begun(base, workdir, output.getvalue())


def test_the_job_leaves_all_its_files_and_says_where(begun):
  workdir, output = pathlib.Path(begun.workdir), begun.output
  rows = read(str(workdir / 'metrics.jsonl'))
  # What was measured before the first step and after the last are the first and
  # the last point of the curve.
  assert [row['step'] for row in rows] == [0, 1, 2, 3, 4, 4]
  before, after = (
    json.loads((workdir / f'{name}.json').read_text())
    for name in ('before', 'after')
  )
  assert rows[0]['validation_loss'] == before['validation_loss']
  assert rows[-1]['validation_loss'] == after['validation_loss']
  assert all(np.isfinite(row['loss']) for row in rows[1:-1])
  sites = rows[-2]['routing']
  assert len(sites['decoder/layers/cross/q/molora']['top']) == 3
  for name in ('before.json', 'after.json', 'summary.json', 'config.json'):
    assert json.loads((workdir / name).read_text())
  assert (workdir / 'plots' / 'loss.png').read_bytes()[1:4] == b'PNG'
  for expected in ('step 4/4', 'examples/s', 'ETA', 'done in', 'MEAN', 'plots'):
    assert expected in output
  assert (workdir / 'plots' / 'before_after.png').read_bytes()[1:4] == b'PNG'
  # The words of the end, and commands as they can be run.
  fell = f'  validation loss fell from {before["validation_loss"]:.4g}'
  assert fell in output
  for expected in (
    f'try it       python -m moepeft.generate --workdir={workdir} --prompt=',
    f'serve it     python -m moepeft.serve --model={begun.base} --adapter=',
    f'export it    python -m moepeft.convert --workdir={workdir} --output=',
  ):
    assert expected in output


def test_a_run_cut_in_two_ends_with_the_same_bytes(begun, tmp_path):
  train.train(card(begun.base, steps=2), str(tmp_path))
  train.train(card(begun.base), str(tmp_path))
  assert adapter_bytes(begun.workdir) == adapter_bytes(tmp_path)
  rows = read(str(tmp_path / 'metrics.jsonl'))
  assert [row['step'] for row in rows] == [1, 2, 3, 4]


@pytest.mark.slow
def test_another_seed_trains_another_adapter(base, begun, tmp_path):
  train.train(card(base, seed=1), str(tmp_path))
  assert adapter_bytes(begun.workdir) != adapter_bytes(tmp_path)


def test_a_finished_run_started_again_changes_nothing(begun, tmp_path):
  shutil.copytree(begun.workdir, tmp_path, dirs_exist_ok=True)
  first = (tmp_path / 'metrics.jsonl').read_bytes()
  train.train(card(begun.base), str(tmp_path))
  assert (tmp_path / 'metrics.jsonl').read_bytes() == first


def test_only_the_adapter_is_trained_and_kept(begun):
  tree, actual = restore_adapter(begun.workdir)
  assert actual['base']['sha256'] == hf.load(begun.base).sha256
  assert set(tree) == {'decoder'}
  saved = pathlib.Path(begun.workdir, 'checkpoints', '4')
  trainable, rest = (
    [
      ast.literal_eval(name)
      for name in json.loads((saved / item / '_METADATA').read_text())[
        'tree_metadata'
      ]
    ]
    for item in ('trainable', 'rest')
  )
  arrays = len(jax.tree.leaves(tree))
  assert len(trainable) == arrays
  # The optimizer's moments, the step and the random key; nothing of the base.
  assert {name[0] for name in rest} == {'opt', 'rng', 'step'}
  for moment in ('mu', 'nu'):
    assert sum(moment in name for name in rest) == arrays


@pytest.mark.slow
def test_full_fine_tuning_is_the_same_loop(base, tmp_path):
  train.train(card(base, method='full', steps=1), str(tmp_path / 'w'))
  with pytest.raises(ValueError, match='has no adapter'):
    restore_adapter(str(tmp_path / 'w'))
  argv = ['convert', f'--workdir={tmp_path}/w', f'--output={tmp_path}/hf']
  assert convert.main(argv) == 0
  assert hf.load(str(tmp_path / 'hf')).config == dataclasses.replace(
    CONFIG, dropout=0.1
  )


@pytest.mark.slow
def test_convert_writes_a_function_of_the_adapter_alone(base, tmp_path):
  for name in ('a', 'b'):
    train.train(card(base), str(tmp_path / name))
    argv = [
      'convert',
      f'--workdir={tmp_path / name}',
      f'--output={tmp_path / name}-out',
    ]
    assert convert.main(argv) == 0
  files = sorted(f.name for f in (tmp_path / 'a-out').iterdir())
  assert files == ['adapter.json', 'adapter.safetensors']
  for file in files:
    one = (tmp_path / 'a-out' / file).read_bytes()
    assert one == (tmp_path / 'b-out' / file).read_bytes()
  tensors = load_file(tmp_path / 'a-out' / 'adapter.safetensors')
  assert tensors['decoder/layers/cross/q/molora/a'].shape == (3, 11, 3, 2)


@pytest.mark.slow
def test_training_goes_on_from_an_exported_adapter(base, tmp_path, capsys):
  train.train(card(base, **JUDGED), str(tmp_path / 'a'))
  convert.main(
    ['convert', f'--workdir={tmp_path}/a', f'--output={tmp_path}/out']
  )
  capsys.readouterr()
  changes = {'model.adapter': str(tmp_path / 'out'), 'steps': 2}
  train.train(card(base, **JUDGED, **changes), str(tmp_path / 'b'))
  one = json.loads((tmp_path / 'a' / 'after.json').read_text())
  two = json.loads((tmp_path / 'b' / 'before.json').read_text())
  assert one['validation_loss'] == pytest.approx(two['validation_loss'])
  wrong = {'model.adapter': str(tmp_path / 'out'), 'method': 'lora(rank=2)'}
  with pytest.raises(ValueError, match='set config.method to .molora'):
    train.train(card(base, **wrong), str(tmp_path / 'c'))


@pytest.mark.parametrize(
  ('method', 'said'),
  [
    (f'molora(experts=3, rank=2, alpha=32, {SITES})', 'set config.method to'),
    pytest.param(
      f'molora(experts=3, rank=2, router=topk(k=1), {SITES})',
      'set config.method to',
      marks=pytest.mark.slow,
    ),
    pytest.param(
      "molora(experts=3, rank=2, targets='*/q')",
      'set config.method to',
      marks=pytest.mark.slow,
    ),
  ],
)
def test_an_adapter_that_computes_something_else_is_refused(
  begun, tmp_path, method, said
):
  out = str(tmp_path / 'out')
  convert.main(['convert', f'--workdir={begun.workdir}', f'--output={out}'])
  changes = {'model.adapter': out, 'method': method}
  with pytest.raises(ValueError, match=said):
    train.train(card(begun.base, **changes), str(tmp_path / 'w'))


def test_an_adapter_of_another_base_is_refused(begun, tmp_path):
  out, other = str(tmp_path / 'out'), str(tmp_path / 'other')
  convert.main(['convert', f'--workdir={begun.workdir}', f'--output={out}'])
  hf.save(other, CONFIG, init_params(t5.T5(CONFIG), small.batch(), 9)['params'])
  with pytest.raises(ValueError, match='trained on another base'):
    train.train(card(other, **{'model.adapter': out}), str(tmp_path / 'w'))


def test_generation_answers_from_a_run(begun):
  _, model, variables, words, step = generate.open_run(begun.workdir)
  texts = generate.answer(model, variables, words, ['ab', 'longer'], 5)
  assert len(texts) == 2 and step == 4


@pytest.mark.slow
def test_router_losses_are_summed_into_the_objective(base, tmp_path):
  plain = train.train(card(base), str(tmp_path), dry_run=True)
  changes = {'router_losses.load_balance': 0.5, 'router_losses.z': 0.1}
  train.train(card(base, **changes, steps=1), str(tmp_path / 'w'))
  (row,) = read(str(tmp_path / 'w' / 'metrics.jsonl'))
  # Balance is at least 1, z about (ln 3)^2.
  assert row['router_loss'] > 0.5
  assert row['loss'] == pytest.approx(plain['loss'], rel=1e-5)


def test_a_dry_run_goes_on_from_an_adapter_and_writes_no_file(begun, tmp_path):
  out = str(tmp_path / 'out')
  convert.main(['convert', f'--workdir={begun.workdir}', f'--output={out}'])
  # Noise is no part of an adapter: a run may have another.
  without_noise = f'molora(experts=3, rank=2, {SITES})'
  changes = {'model.adapter': out, 'method': without_noise}
  train.train(card(begun.base, **changes), str(tmp_path / 'w'), dry_run=True)
  assert not (tmp_path / 'w').exists()


@pytest.mark.slow
def test_an_expert_that_holds_too_much_raises_an_alarm(base, tmp_path, capsys):
  changes = {
    'method': 'molora(experts=3, rank=2, router=topk(k=1))',
    'router_collapse_threshold': 0.1,
    'log.every_steps': 1,
  }
  train.train(card(base, **changes), str(tmp_path))
  output = capsys.readouterr().out
  assert (
    'router alarm: decoder/layers/cross/k/molora, layer 0: expert' in output
  )
  # Every site is over a tenth in each of the four logs: at the third, five
  # alarms are printed, and how many there are besides.
  assert output.count(' of the tokens, the entropy of a token') == 5
  assert output.count('(config.router_collapse_threshold=0.1)') == 5
  assert (
    output.index('step 3/4')
    < output.index('router alarm')
    < output.index('step 4/4')
  )
  assert ' other layers are collapsed, too' in output


@pytest.mark.slow
def test_a_dense_router_raises_no_alarm_at_its_start(base, tmp_path, capsys):
  # Nearly even weights: the share of argmax says nothing of them.
  changes = {'router_collapse_threshold': 0.3, 'log.every_steps': 1}
  train.train(card(base, **changes), str(tmp_path))
  assert 'router alarm' not in capsys.readouterr().out
  rows = read(str(tmp_path / 'metrics.jsonl'))
  (site, *_) = rows[-1]['routing'].values()
  np.testing.assert_allclose(np.sum(site['weight'], -1), 1, atol=1e-3)


@pytest.mark.parametrize(
  'change',
  [
    {'method': 'lora'},
    {'seed': 1},
    {'batch_size': 2},
    {'data.tasks': 'C'},
    {'optimizer.max_grad_norm': 0.5},
    {'optimizer.name': 'adafactor'},
    {'semantics': 'paper'},
  ],
  ids=str,
)
def test_going_on_with_an_edited_config_is_refused(begun, change):
  (key,) = change
  with pytest.raises(ValueError, match=f'a run with config.{key}='):
    train.train(card(begun.base, **change), begun.workdir)


@pytest.mark.slow
def test_what_no_step_depends_on_may_change(begun, tmp_path):
  shutil.copytree(begun.workdir, tmp_path / 'w')
  changes = {'log.every_steps': 1, 'evaluation.tasks': 'C', 'steps': 5}
  allowed = changes | {'batch_size': 2}
  workdir = str(tmp_path / 'w')
  train.train(card(begun.base, **allowed), workdir, may_differ=['batch_size'])
  rows = read(f'{workdir}/metrics.jsonl')
  assert [row['step'] for row in rows if 'loss' in row] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize('name', ['steps', 'config.steps'])
def test_steps_of_a_falling_rate_may_differ_where_it_is_said(tmp_path, name):
  changes = {'optimizer.schedule': 'cosine'}
  (tmp_path / 'checkpoints' / '4').mkdir(parents=True)
  (tmp_path / 'config.json').write_text(card('', **changes).to_json())
  longer = card('', **changes, steps=5)
  with pytest.raises(ValueError, match='config.steps=4, now it is 5'):
    check_unchanged(Run(str(tmp_path)), longer)
  check_unchanged(Run(str(tmp_path)), longer, [name])


@pytest.mark.parametrize(
  'change',
  [{'early_stopping_patience': 2}, {'checkpoint.keep_best': True}],
  ids=str,
)
def test_what_goes_by_validation_losses_needs_some(tmp_path, change):
  with pytest.raises(ValueError, match='set config.evaluation.every_steps'):
    train.train(card('', **change), str(tmp_path))


def test_validation_without_a_held_out_row_is_refused(base, tmp_path):
  row = {'inputs': 'q', 'targets': 'a'}
  (tmp_path / 'rows.jsonl').write_text(json.dumps(row) + '\n')
  source = {'data.source': 'jsonl', 'data.path': str(tmp_path / 'rows.jsonl')}
  config = card(base, **source, **{'evaluation.every_steps': 2})
  with pytest.raises(ValueError, match='no row is held out to validate on'):
    train.train(config, str(tmp_path / 'w'))


def test_a_moved_base_is_the_same_and_a_changed_one_is_not(begun, tmp_path):
  shutil.copytree(begun.workdir, tmp_path / 'w')
  shutil.copytree(begun.base, tmp_path / 'moved')
  moved = card(str(tmp_path / 'moved'))
  train.train(moved, str(tmp_path / 'w'))
  params = hf.load(begun.base).params
  params['decoder']['norm']['scale'] = params['decoder']['norm']['scale'] + 1
  hf.save(str(tmp_path / 'moved'), CONFIG, params, overwrite=True)
  with pytest.raises(ValueError, match='another base'):
    train.train(moved, str(tmp_path / 'w'))


def test_a_flipped_byte_in_a_checkpoint_is_noticed(begun, tmp_path):
  shutil.copytree(begun.workdir, tmp_path, dirs_exist_ok=True)
  folder = tmp_path / 'checkpoints' / '4' / 'trainable'
  data = max(folder.glob('d/*'), key=lambda file: file.stat().st_size)
  broken = bytearray(data.read_bytes())
  broken[len(broken) // 2] ^= 1
  data.write_bytes(broken)
  with pytest.raises(ValueError, match='checkpoints/4'):
    restore_adapter(str(tmp_path))


def test_a_flipped_byte_in_the_optimizer_is_noticed(begun, tmp_path):
  shutil.copytree(begun.workdir, tmp_path, dirs_exist_ok=True)
  folder = tmp_path / 'checkpoints' / '4' / 'rest'
  for data in folder.glob('**/d/*'):
    broken = bytearray(data.read_bytes())
    if len(broken) > 2000:  # not an index
      broken[len(broken) // 2] ^= 1
      data.write_bytes(broken)
  with pytest.raises(ValueError, match='checkpoints/4.*go on from step 2'):
    train.train(card(begun.base, steps=5), str(tmp_path))


@pytest.mark.slow
def test_before_is_always_of_this_run(base, tmp_path):
  (tmp_path / 'before.json').write_text('{"rows": [], "means": {"B": 9}}')
  changes = {'steps': 1, 'evaluation.before': True, 'evaluation.tasks': 'stars'}
  train.train(card(base, **changes), str(tmp_path))
  actual = json.loads((tmp_path / 'before.json').read_text())
  assert [row['task'] for row in actual['rows']] == ['stars', 'stars']


@pytest.mark.slow
def test_long_examples_are_counted_and_told(base, tmp_path, capsys):
  changes = {'steps': 1, 'data.inputs_length': 9}
  train.train(card(base, **changes), str(tmp_path), dry_run=True)
  output = capsys.readouterr().out
  assert '500 of the first 500 training examples are cut' in output


@pytest.mark.slow
def test_rows_at_hand_are_evaluated_alone(begun, tmp_path):
  row = {'task': 'x', 'inputs': 'q', 'choices': ['a', 'b'], 'label': 1}
  path = tmp_path / 'mine.jsonl'
  path.write_text(json.dumps(row) + '\n')
  output = tmp_path / 'found.json'
  flags = [f'--workdir={begun.workdir}', f'--data={path}']
  done = commands.run('moepeft.evaluate', *flags, f'--output={output}')
  assert done.returncode == 0, done.stderr
  actual = json.loads(output.read_text())
  assert [(r['group'], r['task'], r['examples']) for r in actual['rows']] == [
    ('evaluation', 'x', 1)
  ]
  assert 'templates' not in done.stdout and 'before' not in done.stdout


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'model.path': '/no/where'}, '/no/where'),
    ({'model.path': 'package:none'}, "ships no 'none'"),
    (
      {'model.path': '', 'model.family': 't5'},
      'would adapt random weights',
    ),
    ({'model.path': ''}, 'config.model.family is one of'),
    ({'model.family': 'rnn'}, 'config.model.family is one of'),
    ({'model.family': 'llama'}, "config.model.family is 'llama'; set it to"),
    ({'method': 'molorra'}, 'there is no method'),
    ({'semantics': 'mine'}, 'semantics is one of'),
    ({'data.tasks': 'Z'}, 'there is no task or group'),
    ({'data.source': 'jsonl', 'data.path': '/no/rows'}, 'does not exist'),
    ({'optimizer.name': 'sgd'}, 'config.optimizer.name'),
    ({'optimizer.schedule': 'step'}, 'config.optimizer.schedule'),
    ({'objective': 'dpoo'}, 'config.objective is one of'),
    (
      {'batch_size': 0},
      'config.batch_size is at least 1 and at most 1,048,576; got 0',
    ),
    ({'steps': 0}, 'config.steps is at least 1'),
    (
      {'checkpoint.max_to_keep': 0},
      'config.checkpoint.max_to_keep is at least 1',
    ),
    ({'evaluation.max_examples': 0}, 'config.evaluation.max_examples is at'),
    ({'optimizer.learning_rate': -1.0}, 'learning_rate is above 0'),
    (
      {'data.validation_fraction': 3.0},
      'config.data.validation_fraction is at least 0 and below',
    ),
    ({'data.inputs_length': 0}, 'config.data.inputs_length is at least 2'),
    ({'model.dtype': 'float33'}, 'config.model.dtype is one of'),
    ({'evaluation.tasks': 'Z'}, 'there is no task or group'),
    ({'evaluation.path': '/no/rows'}, '/no/rows'),
    ({'model.remat': 'some'}, 'remat is one of'),
    ({'model.dtype': 'float16'}, 'config.model.dtype is one of'),
    ({'loss.average_over': 'row'}, 'config.loss.average_over is one of'),
    ({'gradient_accumulation_steps': 2}, 'config.batch_size 3 does not divide'),
    ({'sharding.preset': 'pp'}, 'pp'),
    ({'data.path': 'rows.jsonl'}, 'config.data.path=.* does nothing with'),
    ({'data.on_bad_row': 'skip'}, 'on_bad_row=.* only with jsonl or datasets'),
    (
      {'optimizer.decay_initial_step': 5},
      'config.optimizer.decay_initial_step=5 does nothing',
    ),
    ({'model.adapter': '/no/adapter'}, '/no/adapter'),
  ],
)
def test_bad_input_is_one_clear_sentence(base, tmp_path, changes, said):
  with pytest.raises(ValueError, match=said):
    train.train(card(base, **changes), str(tmp_path / 'w'))


def test_what_is_refused_is_refused_before_the_evaluation(
  base, tmp_path, monkeypatch
):
  def judged(*_):
    raise AssertionError('it was evaluated first')

  monkeypatch.setattr(Evaluator, '__call__', judged)
  changes = {'log.trackers': 'wandb', 'log.wandb_project': 'a project'}
  changes |= {'evaluation.before': True}
  # As where it is not installed.
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(ValueError, match='needs the package wandb'):
    train.train(card(base, **changes), str(tmp_path))


def test_a_wrong_model_is_not_told_as_a_wrong_vocabulary(tmp_path):
  config = card('/no/model', **{'data.tokenizer': ''})
  with pytest.raises(ValueError, match='/no/model') as e:
    train.train(config, str(tmp_path))
  assert 'config.data.tokenizer' not in str(e.value)


# Of the logger alone: test_a_broken_gradient_stops_the_run_before_it_is_saved.
@pytest.mark.slow
def test_an_exploding_loss_stops_with_the_step(base, tmp_path, monkeypatch):
  # Rates that are allowed do not explode in the few steps of a test.
  allowed = ranges.ALLOWED
  monkeypatch.setitem(allowed, 'optimizer.learning_rate', Range(0, 1e38))
  changes = {'optimizer.learning_rate': 1e30, 'optimizer.max_grad_norm': 0.0}
  with pytest.raises(ValueError, match='at step .*learning_rate'):
    train.train(card(base, **changes), str(tmp_path / 'w'))


def test_a_broken_gradient_stops_the_run_before_it_is_saved():
  rows, mask = [], np.ones((2, 3), bool)
  tracker = types.SimpleNamespace(write=rows.append)
  logger = MetricsLogger([tracker], lambda step: 0.1, 0.9)
  for step, norm in ((5, 2.0), (6, 3.0), (7, np.inf), (8, 1.0)):
    metrics = {'loss': 1.5, 'gradient_norm': norm, 'routing': {}}
    metrics |= {'nll': 4.0, 'tokens': 2, 'correct': 1, 'router_loss': 0.0}
    logger.add(step, {'inputs_mask': mask, 'targets_mask': mask}, metrics)
  with pytest.raises(ValueError, match='gradient norm is inf at step 7; try'):
    logger.flush(Progress(9, 0))
  # What led to it is there.
  assert [row['step'] for row in rows] == [5, 6]
  assert [row['gradient_norm'] for row in rows] == [2.0, 3.0]
  assert rows[1]['nll'] == 2.0


@pytest.mark.parametrize(
  ('args', 'said'),
  [
    (['--config=configs/none.py'], "'configs/none.py' does not exist"),
    (['--config.stepz=3'], 'there is no config.stepz'),
    (['--config=README.md'], 'is not Python'),
    (['--config.steps=many'], 'many'),
    (['--config=configs/molora_t5.py:rankk=3'], "no value 'rankk'"),
    (['extra'], "unexpected argument 'extra'"),
    (['--config.method=lora(rank'], 'cannot read the method'),
  ],
)
def test_wrong_flags_end_with_one_line_and_code_two(args, said):
  done = commands.run('moepeft.train', *args)
  assert done.returncode == 2, done.stderr
  lines = done.stderr.strip().splitlines()
  assert said in lines[-1] and lines[-1].startswith('error: ')
  assert 'Traceback' not in done.stderr


def test_an_unwritable_workdir_is_named(base, tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(ValueError, match='cannot write to the work directory'):
    train.train(card(base), str(tmp_path / 'file' / 'w'))


def test_rows_of_steps_to_come_and_a_torn_line_are_dropped(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
  MetricsLog(str(path), step=2).write({'step': 3, 'new': True})
  assert read(str(path)) == [
    {'step': 1},
    {'step': 2},
    {'step': 3, 'new': True},
  ]

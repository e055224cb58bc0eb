# SPDX-License-Identifier: Apache-2.0
"""The table of what fine-tuning costs on a device: what it is made of."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from moepeft.models.t5 import model as t5
from moepeft.objectives import seq2seq
from moepeft.objectives.cross_entropy import mean_loss
from moepeft.peft import build
from tests import ROOT

BENCHMARKS = ROOT / 'benchmarks'


def load(name):
  spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  spec.loader.exec_module(module)
  return module


ROW, TABLE = load('device_row'), load('device_table')

SMALLEST = t5.T5Config(
  vocab=11,
  d_model=5,
  heads=2,
  head_dim=3,
  ffn=7,
  encoder_layers=1,
  decoder_layers=1,
)


def test_model_flops_are_those_counted_by_hand():
  # Attention's weights 4 d nh = 120, the feed-forward's 3 d f = 105. A token
  # of inputs meets the encoder's 225 and keys and values of cross-attention,
  # 60; of targets 225, cross q and o 60, the head 55.
  # 2 rows of s = 3 and t = 2: 2 (285 * 3 + 340 * 2) = 3070 weights. Pairs of
  # tokens: 9 + 4 + 6 = 19; both products over nh = 6: 2 * 2 * 2 * 6 * 19 = 912
  # forward, thrice that with backward.
  arguments = SMALLEST, 2, 3, 2
  assert TABLE.flops(*arguments, full=False) == 4 * 3070 + 3 * 912
  assert TABLE.flops(*arguments, full=True) == 6 * 3070 + 3 * 912


WIDE = t5.T5Config(
  vocab=4099,
  d_model=521,
  heads=7,
  head_dim=61,
  ffn=1031,
  encoder_layers=3,
  decoder_layers=3,
  dropout=0.0,
)


@pytest.mark.parametrize(
  'method', ['ia3', pytest.param('full', marks=pytest.mark.slow)]
)
def test_model_flops_are_those_of_the_compiled_step(method):
  # Unrolled: XLA counts the body of a scan once. Shapes alone: nothing is run.
  built = build(method, t5.sites(WIDE))
  model = t5.T5(WIDE, built.adapter_map, scan=False)
  row = {'batch': 2, 'inputs': 127, 'targets': 61}
  batch = ROW.example(row, WIDE.vocab)
  key = jax.random.key(0)
  shapes = jax.eval_shape(
    lambda: model.init({'params': key, 'peft': key}, batch)
  )
  frozen = {'params': 'peft', 'peft': 'params'}[built.trainable]

  def loss(trained, rest, batch):
    variables = {built.trainable: trained, frozen: rest}
    return mean_loss(*seq2seq.loss_sums(model.apply, variables, batch, None))

  arguments = shapes[built.trainable], shapes.get(frozen, {}), batch
  compiled = jax.jit(jax.grad(loss)).lower(*arguments).compile()
  counted = compiled.cost_analysis()['flops']
  expected = TABLE.flops(WIDE, 2, 127, 61, method == 'full')
  if method == 'ia3':
    # Below the lowest adapters, of k and v, XLA leaves out what has no use:
    # the gradients of the embedded tokens through q, k and v, and q's own.
    d, nh = WIDE.d_model, WIDE.heads * WIDE.head_dim
    expected -= 2 * 2 * (127 + 61) * 3 * d * nh
    expected -= 2 * 2 * (127**2 + 61**2) * nh
  # Norms, softmaxes and activations are counted too, 5 to 20 to a number; the
  # products are 500 and more to a number. One gradient of the weights of one
  # kind of projection would be 1 to 6 % more.
  assert counted == pytest.approx(expected, rel=0.008)


@pytest.mark.slow
def test_a_row_is_measured_by_the_loops_own_update():
  row = {
    'side': 'moepeft',
    'size': 'tiny',
    'method': 'molora(experts=3, rank=2)',
    'remat': 'full',
    'batch': 2,
    'inputs': 13,
    'targets': 7,
    'steps': 1,
  }
  actual = ROW.measurement_of(row)
  assert actual['seconds'] > 0
  # CPU does not tell of its memory.
  assert actual['bytes'] is None


@pytest.mark.slow
def test_weights_are_drawn_on_the_device_as_the_model_starts_them():
  advice = build('molora(experts=3, rank=2)', t5.sites(SMALLEST)).adapter_map
  model = t5.T5(SMALLEST, advice, param_dtype=jnp.bfloat16)
  drawn = ROW.drawn(model)
  q = drawn['peft']['encoder']['layers']['self']['q']['molora']
  assert q['b'].dtype == jnp.float32 and not q['b'].any()
  # 5 * 3 * 2 draws of 0.02: their deviation errs by 13 %.
  assert 0.012 < q['a'].std() < 0.03
  table = drawn['params']['embed']['embedding']
  assert table.dtype == jnp.bfloat16
  # 55 draws of 1.
  assert 0.7 < table.astype(jnp.float32).std() < 1.3


def test_batches_are_packed_and_every_token_is_real():
  batch = ROW.example({'batch': 3, 'inputs': 17, 'targets': 5}, 11)
  assert batch['inputs'].shape == (3, 17)
  assert batch['inputs_mask'].all() and batch['targets_mask'].all()
  assert set(batch['inputs_segments'][2]) == {1, 2, 3, 4}
  assert set(batch['targets_segments'][2]) == {1, 2, 3, 4}
  assert batch['inputs'].min() >= 2 and batch['inputs'].max() < 11


PLAN = {
  'size': 'tiny',
  'side': 'moepeft',
  'method': 'ia3',
  'remat': 'none',
  'inputs': 10,
  'targets': 6,
}


def test_a_full_device_halves_the_batch_in_a_row_that_can_be_seen(monkeypatch):
  def run(row):
    if row['batch'] > 2:
      return {'out_of_memory': True}
    return {'seconds': 0.25, 'bytes': 3_000_000_000}

  monkeypatch.setattr(TABLE, 'run', run)
  shown = [TABLE.cells(row) for row in TABLE.measured(PLAN, 8, None)]
  assert [cell[3:] for cell in shown] == [
    ('8', 'out of memory', '-', '-'),
    ('4', 'out of memory', '-', '-'),
    # 2 * 16 tokens in a quarter of a second.
    ('2', '128', '-', '3.0'),
  ]


def test_a_device_that_holds_not_even_a_row_ends_the_ladder(monkeypatch):
  monkeypatch.setattr(TABLE, 'run', lambda row: {'out_of_memory': True})
  batches = [row['batch'] for row in TABLE.measured(PLAN, 5, None)]
  assert batches == [5, 2, 1]


def test_mfu_is_the_share_of_the_peak(monkeypatch):
  monkeypatch.setattr(TABLE, 'run', lambda row: {'seconds': 0.5, 'bytes': None})
  (row,) = TABLE.measured(PLAN, 3, 1e9)
  work = TABLE.flops(t5.config('tiny'), 3, 10, 6, full=False)
  assert row['mfu'] == work / 0.5 / 1e9
  assert TABLE.cells(row)[-2:] == (f'{100 * row["mfu"]:.1f} %', '-')


def test_jax_out_of_memory_is_known_from_other_errors():
  # 4 EB.
  with pytest.raises(jax.errors.JaxRuntimeError) as full:
    jax.block_until_ready(jnp.zeros(1 << 60, jnp.float32))
  assert ROW.out_of_memory(full.value)
  assert not ROW.out_of_memory(ValueError('no such method'))


def test_an_unknown_accelerator_is_asked_for_its_peak():
  assert TABLE.peak_of('NVIDIA H100 80GB HBM3', 'gpu', None) == 989e12
  assert TABLE.peak_of('NVIDIA X1', 'gpu', 7.0) == 7e12
  assert TABLE.peak_of('cpu', 'cpu', None) is None
  with pytest.raises(ValueError, match='--peak_tflops'):
    TABLE.peak_of('NVIDIA X1', 'gpu', None)


def test_goals_are_of_the_best_rows_and_the_worst_size():
  def row(size, side, speed, mfu=None, method='lora(rank=4)'):
    return {
      'size': size,
      'side': side,
      'method': method,
      'seconds': 1.0,
      'tokens_per_s': speed,
      'mfu': mfu,
    }

  rows = [
    row('large', 'moepeft', 300),
    row('large', 'peft', 100),
    row('xl', 'moepeft', 120, 0.4),
    row('xl', 'moepeft', 150, 0.5),
    row('xl', 'peft', 60),
    row('xl', 'peft', 75),
    # Faster, but no LoRA; and one that did not fit.
    row('xl', 'moepeft', 999, 0.9, 'ia3'),
    {'size': 'xl', 'side': 'peft', 'method': 'x', 'out_of_memory': True},
  ]
  # 150 / 75 at xl; 300 / 100 at large.
  assert TABLE.goals(rows) == {'mfu_xl': 0.5, 'lora_over_peft': 2.0}
  none = {'mfu_xl': None, 'lora_over_peft': None}
  assert TABLE.goals([row('large', 'moepeft', 300)]) == none


WRONG = {
  'sizes': (['tiny', 'foo'], "T5 comes as .*; got 'foo'"),
  'remat': (['none', 'foo'], "--remat takes none, dots, full; got 'foo'"),
  'methods': (['ia3', 'foo'], 'foo'),
}


@pytest.mark.parametrize('name', WRONG)
def test_a_wrong_name_is_refused_before_any_process_starts(name, monkeypatch):
  # Not even the device is asked for.
  monkeypatch.setattr(TABLE, 'run', lambda row: pytest.fail(f'ran {row}'))
  values, why = WRONG[name]
  options = TABLE.Options(**{'sizes': ['tiny'], name: values})
  with pytest.raises(ValueError, match=why):
    TABLE.show(options, None, None)
  empty = TABLE.Options(**{'sizes': ['tiny'], name: []})
  with pytest.raises(ValueError, match=f'--{name} is empty'):
    TABLE.show(empty, None, None)


def test_a_missing_folder_is_met_before_any_process_starts(
  monkeypatch, tmp_path
):
  monkeypatch.setattr(TABLE, 'run', lambda row: pytest.fail(f'ran {row}'))
  with pytest.raises(ValueError, match='make the folder'):
    TABLE.show(TABLE.Options(), None, str(tmp_path / 'no' / 'rows.json'))


def test_no_row_is_run_on_a_device_whose_peak_is_not_known(monkeypatch):
  requests = []

  def run(row):
    requests.append(row['side'])
    return {'kind': 'NVIDIA X1', 'platform': 'gpu'}

  monkeypatch.setattr(TABLE, 'run', run)
  with pytest.raises(ValueError, match='--peak_tflops'):
    TABLE.show(TABLE.Options(), None, None)
  assert requests == ['device']


@pytest.mark.parametrize(
  'flag, why',
  [
    ('--sizes=foo', "got 'foo'"),
    pytest.param('--batch=0', 'batch', marks=pytest.mark.slow),
    pytest.param('tiny', "unexpected argument 'tiny'", marks=pytest.mark.slow),
  ],
)
def test_the_command_answers_a_wrong_flag_in_a_sentence(flag, why):
  done = subprocess.run(
    [sys.executable, str(BENCHMARKS / 'device_table.py'), flag],
    env={**os.environ, 'PYTHONPATH': str(BENCHMARKS.parent)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: ') and why in line
  assert not done.stdout


def test_a_failure_is_told_by_its_error_and_not_by_what_follows():
  table = load('device_table')
  said = (
    'Traceback ...\n  File "x"\nValueError: k=3 of 2\n----\nFor simplicity, ...'
  )
  assert table.reason(said) == 'ValueError: k=3 of 2'
  assert table.reason('Killed\n') == 'Killed'
  assert table.reason('') == 'it said nothing'


@pytest.mark.slow
def test_the_command_prints_a_row_of_each_side_and_keeps_them(tmp_path):
  file = tmp_path / 'rows.json'
  done = subprocess.run(
    [
      sys.executable,
      str(BENCHMARKS / 'device_table.py'),
      '--sizes=tiny',
      '--methods=lora(rank=4)',
      # Builds, and is met by the router when it is called.
      '--methods=mov(experts=2, router=topk(k=3))',
      '--remat=full',
      '--batch=2',
      '--inputs=16',
      '--targets=8',
      '--steps=1',
      '--peak_tflops=1',
      f'--json={file}',
    ],
    stdout=subprocess.PIPE,
    text=True,
  )
  # A row that failed does not end the table, but tells.
  assert done.returncode == 1
  assert 'failed: exit code 1: ValueError' in done.stdout
  rows = json.loads(file.read_text())['rows']
  assert rows[0]['mfu'] > 0
  if importlib.util.find_spec('torch') and importlib.util.find_spec('peft'):
    assert rows[-1]['side'] == 'peft' and rows[-1]['seconds'] > 0
    assert 'lora_over_peft: not' not in done.stdout
  else:
    assert 'no rows of peft' in done.stdout

# SPDX-License-Identifier: Apache-2.0
"""Bases in few bits: their codes, their memory, and what advice sees."""

import dataclasses
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moepeft import config as config_lib
from moepeft import train
from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints import quantize, run_metadata
from moepeft.checkpoints.count_parameters import count
from moepeft.inference import loaded_model
from moepeft.models import weight_mapping
from moepeft.models.decoder.model import Decoder, DecoderConfig, sites
from moepeft.models.t5 import model as t5
from moepeft.nn.initializers import init_params, logical_axes
from moepeft.nn.quantization import (
  BLOCK,
  FORMATS,
  LEVELS,
  from_int8,
  from_nf4,
  to_int8,
  to_nf4,
)
from moepeft.peft import build

from ..contracts import small

DECODER = DecoderConfig(
  vocab=37,
  d_model=22,
  heads=3,
  kv_heads=1,
  head_dim=10,
  ffn=71,
  layers=2,
  attention_bias=True,
)
BATCH = {'inputs': jnp.array([[3, 7, 11, 30, 2], [9, 4, 5, 36, 1]])}
METHODS = (
  'lora(rank=3)',
  'dora(rank=3)',
  'ia3',
  'mov(experts=3)',
  # At every site, compiling takes three times as long.
  "molora(experts=3, rank=2, targets='*/q|*/wo')",
)
every_kind = pytest.mark.parametrize('kind', FORMATS)


def test_the_levels_are_quantiles_of_a_normal_distribution():
  # QLoRA, appendix E: eight of one sign and seven of the other, evenly spread
  # in probability from 0.9677083 to the middle, over the largest.
  inverse, most = statistics.NormalDist().inv_cdf, 0.9677083
  above = [inverse(most + (0.5 - most) * i / 8) for i in range(8)]
  below = [-inverse(most + (0.5 - most) * i / 7) for i in range(7)]
  levels = np.array(sorted([*above, 0.0, *below])) / above[0]
  np.testing.assert_allclose(LEVELS, levels, rtol=0, atol=1e-6)


def test_int8_codes_by_hand():
  # 1.27 is the largest of the first output: a step is 0.01. The second is
  # all zeros, and stays.
  kernel = np.array([[-1.27, 0], [0.634, 0], [0.012, 0]], np.float32)
  codes, scale = to_int8(kernel, 1)
  assert codes.tolist() == [[-127, 0], [63, 0], [1, 0]]
  np.testing.assert_allclose(scale, [0.01, 0], rtol=1e-6)
  expected = [[-1.27, 0], [0.63, 0], [0.01, 0]]
  np.testing.assert_allclose(from_int8(codes, scale, ()), expected, rtol=1e-6)


def test_nf4_codes_by_hand():
  # Over the largest, 2: 1, -0.5 and 0.25; nearest are the levels 15 (1),
  # 2 (-0.525) and 10 (0.246). Two in a byte, the first one high; where inputs
  # are odd the last byte's low half is nobody's.
  kernel = np.array([[2.0], [-1.0], [0.5]], np.float32)
  codes, scale = to_nf4(kernel, 1)
  assert codes.tolist() == [[15 * 16 + 2], [10 * 16]]
  assert scale.tolist() == [[2.0]]
  actual = from_nf4(codes, scale, kernel.shape)
  expected = [[2.0], [-2 * 0.5250730514526367], [2 * 0.24611230194568634]]
  np.testing.assert_allclose(actual, expected, rtol=1e-6)


# Two blocks and a shorter one; inputs and outputs of two axes; odd ones.
SHAPES = [((131,), (3,)), ((7, 13), (5,)), ((64,), (3, 5)), ((11,), ())]


@every_kind
@pytest.mark.parametrize(('inside', 'outside'), SHAPES)
def test_errors_are_bounded_by_half_a_step(kind, inside, outside):
  rng = np.random.default_rng(0)
  kernel = rng.standard_normal((*inside, *outside)).astype(np.float32)
  form = FORMATS[kind]
  codes, scale = form.encode(kernel, len(inside))
  layout = form.layout(inside, outside, 'nh'[: len(inside)], 'df')
  assert (codes.shape, scale.shape) == (layout['codes'][0], layout['scale'][0])
  assert codes.dtype == form.dtype
  actual = form.decode(codes, scale, kernel.shape)
  error = np.abs(actual - kernel).reshape(-1, *outside)
  if kind == 'int8':
    bound = scale / 2
  else:
    # Between -1 and -0.696 is the widest gap.
    bound = np.repeat(scale, BLOCK, axis=0)[: len(error)] * 0.15191
  assert (error <= bound * (1 + 1e-5)).all()
  # And no better: a kernel kept whole would pass too.
  assert error.max() > 0.1 * bound.min()


def decoder_params():
  return init_params(Decoder(DECODER), BATCH, 0)['params']


def made(method, config):
  family = t5 if config is small.GATED else Decoder
  if family is t5:
    return t5.T5(
      config, build(method, t5.sites(config)).adapter_map
    ), small.batch()
  return Decoder(config, build(method, sites(config)).adapter_map), BATCH


def noisy(variables):
  return small.moved(variables, 0.1, 1)


CASES = [
  pytest.param(
    method,
    config,
    marks=() if config is DECODER and 'molora' in method else pytest.mark.slow,
  )
  for method, config in (
    *((method, DECODER) for method in METHODS),
    (METHODS[4], small.GATED),
  )
]


@pytest.mark.parametrize(
  ('method', 'config'),
  CASES,
  ids=lambda v: v if isinstance(v, str) else v.family,
)
def test_any_advice_sees_the_decoded_weight(method, config):
  model, batch = made(method, config)
  params = decoder_params() if config is DECODER else small.params()
  packed = quantize.pack(params, config, 'nf4')
  assert quantize.kind_of(packed) == 'nf4'
  peft = noisy(init_params(model, batch, 1, packed)['peft'])
  wide = quantize.unpack(packed, config)
  shapes = lambda tree: jax.tree.map(np.shape, tree)  # noqa: E731
  assert shapes(wide) == shapes(params)

  def loss(peft, params):
    logits = model.apply({'params': params, 'peft': peft}, batch)
    return jnp.mean(logits**2)

  run = jax.jit(jax.value_and_grad(loss))
  actual, expected = run(peft, packed), run(peft, wide)
  # The same sums, compiled into two programs.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    actual,
    expected,
  )
  assert abs(run(peft, params)[0] - actual[0]) > 1e-4


@every_kind
def test_every_axis_says_its_letter(kind):
  model, _ = made(METHODS[0], DECODER)
  params = quantize.pack(decoder_params(), DECODER, kind)
  said = weight_mapping.flatten(logical_axes(model, BATCH, params)['params'])
  actual = weight_mapping.flatten(params)
  assert said.keys() == actual.keys()
  assert all(len(said[path]) == actual[path].ndim for path in actual)
  at = 'decoder/layers/self/o/kernel'
  whole = P('layers', 'heads', 'head_dim', 'embed')
  blocks, rows = P('layers', 'heads', 'embed'), P('layers', 'embed')
  assert said[f'{at}_{kind}'] == {'int8': whole, 'nf4': blocks}[kind]
  assert said[f'{at}_scale'] == {'int8': rows, 'nf4': blocks}[kind]


@every_kind
def test_shapes_and_counts_need_no_weights(kind):
  params = decoder_params()
  packed = quantize.pack(params, DECODER, kind)
  actual = quantize.shapes(params, DECODER, kind)
  of = lambda tree: {  # noqa: E731
    path: (leaf.shape, np.dtype(leaf.dtype))
    for path, leaf in weight_mapping.flatten(tree).items()
  }
  assert of(actual) == of(packed)
  total = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert quantize.parameters(packed, DECODER) == total
  assert quantize.parameters(params, DECODER) == total


# Weights are nearly all that a program of two tokens holds.
DEEP = dataclasses.replace(
  DECODER, d_model=128, head_dim=64, kv_heads=3, ffn=256, layers=8
)


def test_memory_falls_to_the_bits_that_are_kept():
  params = init_params(Decoder(DEEP), BATCH, 0)['params']
  model = Decoder(
    DEEP, build("lora(rank=1, targets='*/q')", sites(DEEP)).adapter_map
  )
  peft = init_params(model, BATCH, 1, params)['peft']
  batch = {'inputs': jnp.array([[3, 7]])}

  def loss(peft, params):
    return jnp.mean(model.apply({'params': params, 'peft': peft}, batch) ** 2)

  def program(params):
    run = jax.jit(jax.grad(loss)).lower(peft, params)
    return run.compile().memory_analysis()

  wide = program(params)
  # d x (3 + 3 + 3) 64 for q, k, v, o's 192 x d, and 3 x 128 x 256, 8 layers.
  kernels = 8 * (4 * 128 * 192 + 3 * 128 * 256)
  for kind, bits in (('int8', 8), ('nf4', 4)):
    packed = quantize.pack(params, DEEP, kind)
    saved = quantize.size(params) - quantize.size(packed)
    # The scales: one of 64 weights (nf4), or of an output (128 at least).
    scales = kernels * 4 / 64
    assert kernels * (32 - bits) / 8 - scales <= saved
    narrow = program(packed)
    actual = wide.argument_size_in_bytes - narrow.argument_size_in_bytes
    assert actual == pytest.approx(saved, rel=0.01)
    # Decoded one layer at a time: not all are kept for the gradient.
    more = narrow.temp_size_in_bytes - wide.temp_size_in_bytes
    assert more < kernels * 4 / 2


def config_of(**model):
  c = config_lib.default()
  c.model.update(model)
  return c


def test_the_hash_is_of_the_base_before_and_the_card_says_the_kind():
  plain = base_lib.load(config_of().model)
  c = config_of(quantize='nf4', param_dtype='bfloat16')
  base, again = base_lib.load(c.model), base_lib.load(c.model)
  assert base.sha256 == plain.sha256
  # Of what is stored, not of what the rest is cast to.
  expected = quantize.pack(plain.params, plain.config, 'nf4', 'bfloat16')
  for actual in (base.params, again.params):
    for path, leaf in weight_mapping.flatten(expected).items():
      assert weight_mapping.flatten(actual)[path].tobytes() == leaf.tobytes(), (
        path
      )
  _, built = base_lib.module(base, c)
  card = run_metadata.describe_run(base, built, 0)
  assert card['base'] == {
    'path': 'package:t5_tiny',
    'sha256': plain.sha256,
    'quantise': 'nf4',
  }
  assert 'quantise' not in run_metadata.describe_run(plain, built, 0)['base']


def test_the_count_says_what_memory_the_weights_take():
  sizes = {
    kind: count(config_of(quantize=kind))['megabytes']['params']
    for kind in ('', 'int8', 'nf4')
  }
  base = base_lib.load(config_of(quantize='nf4').model)
  assert sizes['nf4'] == round(quantize.size(base.params) / 1e6, 3)
  assert sizes['nf4'] < sizes['int8'] < sizes['']


@pytest.mark.parametrize(
  ('model', 'said'),
  [
    ({'quantize': 'int4'}, "one of int8, nf4; got 'int4'"),
    (
      {'quantize': 'nf4', 'path': '', 'family': 't5'},
      'set config.model.path',
    ),
  ],
)
def test_what_cannot_be_quantised_is_one_sentence(model, said):
  with pytest.raises(ValueError, match=said):
    base_lib.load(config_of(**model).model)


def run_config(**model):
  c = config_of(quantize='nf4', **model)
  c.method, c.steps, c.batch_size = 'lora(rank=1)', 1, 2
  c.evaluation.before = c.evaluation.after = False
  c.log.trackers, c.log.plots = '', False
  return c


def test_full_fine_tuning_of_a_quantised_base_is_refused(tmp_path):
  c = run_config()
  c.method = 'full'
  with pytest.raises(ValueError, match='keeps frozen weights, and full'):
    train.train(c, str(tmp_path / 'run'), dry_run=True)


@pytest.mark.slow
def test_a_run_is_reloaded_with_its_own_bits_and_no_others(tmp_path, capsys):
  c, workdir = run_config(), str(tmp_path / 'run')
  train.train(c, workdir)
  assert 'projections in nf4: 0.8732 MB in all' in capsys.readouterr().out
  run = loaded_model.load_run(workdir)
  base = base_lib.load(c.model)
  assert run.base_parameters == quantize.parameters(base.params, base.config)
  for path, leaf in weight_mapping.flatten(base.params).items():
    actual = np.asarray(weight_mapping.flatten(run.variables['params'])[path])
    assert actual.tobytes() == leaf.tobytes(), path
  other = run_config()
  other.model.quantize = 'int8'
  other.steps = 2
  with pytest.raises(ValueError, match='quantize'):
    train.train(other, workdir, may_differ=('model.quantize',))


def test_merging_into_packed_kernels_is_refused():
  from moepeft.peft.merge import merge

  built = build('lora(rank=3)', sites(DECODER))
  model = Decoder(DECODER, built.adapter_map)
  packed = quantize.pack(decoder_params(), DECODER, 'int8')
  with pytest.raises(ValueError, match=r'quantised \(int8\): merge into'):
    merge(built, init_params(model, BATCH, 1, packed))

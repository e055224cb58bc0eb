# SPDX-License-Identifier: Apache-2.0
"""VeRA, BitFit and LN tuning, by hand and as peft computes them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.core.types import Context
from moepeft.nn.adapter_hook import AdapterMap
from moepeft.nn.norms import NormForm
from moepeft.peft import build
from moepeft.peft.merge import merge
from moepeft.peft.methods.vera import uniform

from ..contracts import small, small_decoders
from .test_semantics import adapter, call, normal, projection

# float32's rounding of sums of tens of products.
CLOSE = dict(rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('place', ['q', 'o', 'wo'])
def test_vera_scales_between_frozen_matrices_as_peft_does(place):
  torch = pytest.importorskip('torch')
  peft = pytest.importorskip('peft')

  f, x, y, inside, outside = projection(place)
  module = adapter("vera(rank=3, seed=5, targets='*/k')")
  d, b = normal('d', 3), normal('b', *outside)
  kernel = np.asarray(f.kernel()).reshape(np.prod(inside), -1)
  model = torch.nn.Sequential(torch.nn.Linear(*kernel.shape, bias=False))
  model[0].weight.data = torch.tensor(kernel.T.copy())
  config = peft.VeraConfig(r=3, target_modules=['0'])
  layer = peft.get_peft_model(model, config).base_model.model[0]
  matrix_a, matrix_b = map(np.asarray, module.matrices(inside, outside))
  # peft's own are as large: the bounds are sqrt(6 / in) and sqrt(6 / r).
  for ours, theirs in (
    (matrix_a, layer.vera_A['default']),
    (matrix_b, layer.vera_B['default']),
  ):
    bound = (6 / theirs.shape[1]) ** 0.5
    assert 0.8 * bound < np.abs(ours).max() <= bound
    assert 0.8 * bound < np.abs(theirs.numpy()).max() <= bound
  layer.vera_A['default'] = torch.tensor(matrix_a.reshape(-1, 3).T.copy())
  layer.vera_B['default'] = torch.tensor(matrix_b.reshape(3, -1).T.copy())
  with torch.no_grad():
    layer.vera_lambda_d['default'].copy_(torch.tensor(d))
    layer.vera_lambda_b['default'].copy_(torch.tensor(b.reshape(-1)))
    flat = torch.tensor(x.reshape(2, 7, -1), dtype=torch.float32)
    expected = layer(flat).numpy().reshape(y.shape)
  np.testing.assert_allclose(
    call(module, {'d': d, 'b': b}, f, x), expected, **CLOSE
  )


def test_vera_starts_with_d_at_its_value_and_b_at_zero():
  # q and v of 2 + 2 x 3 attentions, each with rank 3 and outputs of 3 x 5.
  peft = small.variables('vera(rank=3)')['peft']
  leaves = jax.tree.leaves_with_path(peft)
  assert sum(a.size for _, a in leaves) == 16 * (3 + 15)
  for path, array in leaves:
    expected = {'d': 0.1, 'b': 0}[path[-1].key]
    np.testing.assert_array_equal(array, np.float32(expected))


def test_a_smaller_frozen_matrix_is_the_corner_of_a_larger_one():
  large = np.asarray(uniform(5, 0, 400, 300))
  np.testing.assert_array_equal(uniform(5, 0, 7, 11), large[:7, :11])
  # U(-1, 1): the mean 0 and the variance 1/3, within four deviations of the
  # mean of 120,000 draws; rows and columns are not alike.
  assert abs(large.mean()) < 4 * (1 / 3 / large.size) ** 0.5
  assert abs((large**2).mean() - 1 / 3) < 4 * (4 / 45 / large.size) ** 0.5
  rows = np.corrcoef(large[:100])
  assert np.abs(rows - np.eye(100)).max() < 5 / 300**0.5
  for other in (uniform(6, 0, 400, 300), uniform(5, 1, 400, 300)):
    assert abs(np.corrcoef(large.ravel(), np.ravel(other))[0, 1]) < 0.02


def test_the_hash_stays_as_adapters_have_it():
  # Of lowbias32 by hand: the adapters of a seed depend on it.
  def mix(x):
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16

  row, column = mix((2 + mix(5)) % 2**32), mix(3 ^ mix(1))
  bits = mix((row + column) % 2**32)
  expected = (bits >> 8) / 2**23 - 1
  assert uniform(5, 1, 4, 5)[2, 3] == np.float32(expected)


def test_bitfit_adds_a_bias_of_each_output():
  f, x, y, _, outside = projection('q')
  bias = normal('bias', *outside)
  actual = call(adapter("bitfit(targets='*/k')"), {'bias': bias}, f, x)
  np.testing.assert_allclose(actual, y + bias, **CLOSE)


@pytest.mark.parametrize('centred', [True, False])
@pytest.mark.parametrize('offset', [0.0, 1.0])
def test_ln_tuning_is_a_norm_with_other_weights(centred, offset):
  if centred and offset:
    pytest.skip('no model has it')
  form = NormForm(centred=centred, offset=offset)
  module = adapter('ln_tuning', site='encoder/norm')
  names = ('scale', 'bias') if centred else ('scale',)
  base = {name: jnp.float32(normal(f'base {name}', 11)) for name in names}
  other = {name: jnp.float32(normal(name, 11)) for name in names}
  x = jnp.float32(normal('x', 2, 7, 11))
  adapted = form.at('norm', AdapterMap((('norm', module),)), jnp.float32)
  plain = form.at('norm', AdapterMap(), jnp.float32)
  peft = {'ln_tuning': other}
  np.testing.assert_allclose(
    jax.jit(adapted.apply)({'params': base, 'peft': peft}, x, Context()),
    jax.jit(plain.apply)({'params': other}, x, Context()),
    **CLOSE,
  )


def test_a_bias_that_the_base_lacks_has_no_merge():
  _, built = small.make('bitfit')
  with pytest.raises(ValueError, match='no array .*/q/bias to merge into'):
    merge(built, small.variables('bitfit'))


@pytest.mark.parametrize(
  ('family', 'method'),
  [
    # LayerNorms, with biases everywhere.
    ('gpt2', 'bitfit + ln_tuning'),
    # Norms of heads; norms that store their scale - 1, after sublayers too.
    pytest.param('qwen3', 'ln_tuning', marks=pytest.mark.slow),
    pytest.param('gemma2', 'ln_tuning', marks=pytest.mark.slow),
  ],
)
def test_biases_and_norms_merge(family, method):
  config = small_decoders.CONFIGS[family]
  model, variables = small_decoders.make(config, method, noise=0.1)
  built = build(method, small_decoders.sites(config))
  merged = jax.jit(functools.partial(merge, built))(variables)
  plain, _ = small_decoders.make(config)
  batch = small_decoders.batch()
  np.testing.assert_allclose(
    small.jitted(plain)({'params': merged}, batch),
    small.jitted(model)(variables, batch),
    **CLOSE,
  )

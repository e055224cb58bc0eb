# SPDX-License-Identifier: Apache-2.0
"""LoRA that starts from the base's kernel: PiSSA, OLoRA and GOAT's chunks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.core.types import Context
from moepeft.models.t5 import model as t5
from moepeft.moe import router_state
from moepeft.nn.adapter_hook import flatten_features
from moepeft.nn.linear import base_projection
from moepeft.peft import METHODS, build

from ..contracts import small
from .test_semantics import adapter, call, normal, projection

# Singular values 6 to 1, and axes that are turned, so that none is a unit one.
VALUES = np.arange(6, 0, -1.0)
U, V = (np.linalg.qr(normal(name, 7, 7))[0][:, :6] for name in ('u', 'v'))
KERNEL = (U * VALUES) @ V.T
F = base_projection(
  'btd,df->btf', jnp.asarray(KERNEL, jnp.float32), jnp.float32
)
X = normal('x', 2, 3, 7)
# float32's rounding of a decomposition, and of sums of tens of products.
CLOSE = dict(rtol=1e-4, atol=1e-4)


def initial(method):
  """(module, its initial arrays) at KERNEL."""
  module = adapter(method)
  x = jnp.asarray(X, jnp.float32)
  run = functools.partial(module.init, f=F, x=x, ctx=Context())
  return module, jax.jit(lambda key: run({'peft': key}))(jax.random.key(0))[
    'peft'
  ]


def part(*rows):
  return (U[:, rows] * VALUES[list(rows)]) @ V[:, rows].T


def test_pissa_takes_the_largest_singular_values():
  _, tree = initial("lora(rank=2, alpha=3.0, init_weights='pissa')")
  # scale A B is the part of W with the values 6 and 5; each of A and B has the
  # root of the values over the scale of 3 / 2.
  np.testing.assert_allclose(1.5 * tree['a'] @ tree['b'], part(0, 1), **CLOSE)
  for factor in (tree['a'].T, tree['b']):
    lengths = np.linalg.norm(factor, axis=1)
    np.testing.assert_allclose(lengths**2, [6 / 1.5, 5 / 1.5], **CLOSE)


def test_each_expert_takes_the_largest_values_of_its_chunk():
  module, tree = initial("goat(experts=3, rank=1, alpha=8.0, targets='*/k')")
  # Chunks (6, 5), (4, 3), (2, 1), of rank one each: 6, 4 and 2, over rho = 10.
  for e, row in enumerate((0, 2, 4)):
    term = 8 * tree['a'][:, e] @ tree['b'][e]
    np.testing.assert_allclose(term, part(row) / 10, **CLOSE)
  # With the weights of its router, the mean of the experts' terms subtracted.
  p = router_weights(np.asarray(tree['router']['kernel']))
  terms = [X @ part(row) / 10 for row in (0, 2, 4)]
  expected = X @ KERNEL + sum(
    (p[..., e : e + 1] - 1 / 3) * terms[e] for e in range(3)
  )
  np.testing.assert_allclose(call(module, tree, F, X), expected, **CLOSE)


def router_weights(kernel):
  """Two of three probabilities, over their sum."""
  logits = X @ kernel
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  p = np.where(p > p.min(-1, keepdims=True), p, 0)
  return p / p.sum(-1, keepdims=True)


def test_goat_starts_away_from_the_base_where_its_router_chooses():
  module, tree = initial("goat(experts=3, rank=1, alpha=8.0, targets='*/k')")
  assert np.abs(call(module, tree, F, X) - X @ KERNEL).max() > 0.1


@pytest.mark.parametrize(
  ('place', 'init'),
  [
    ('q', 'pissa'),
    ('wo', 'olora'),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        ('o', 'pissa'),
        ('wo', 'pissa'),
        ('q', 'olora'),
        ('o', 'olora'),
      )
    ),
  ],
)
def test_it_is_peft_s(place, init):
  torch = pytest.importorskip('torch')
  peft = pytest.importorskip('peft')

  f, x, y, inside, outside = projection(place)
  kernel = np.asarray(f.kernel()).reshape(np.prod(inside), -1)
  model = torch.nn.Sequential(torch.nn.Linear(*kernel.shape, bias=False))
  model[0].weight.data = torch.tensor(kernel.T.copy())
  config = peft.LoraConfig(
    r=3, lora_alpha=4, target_modules=['0'], init_lora_weights=init
  )
  layer = peft.get_peft_model(model, config).base_model.model[0]
  a0, b0 = (
    factor['default'].weight.detach().numpy().T.copy()
    for factor in (layer.lora_A, layer.lora_B)
  )
  module = adapter(
    f"lora(rank=3, alpha=4.0, init_weights='{init}', targets='*/k')"
  )
  run = functools.partial(module.init, f=f, ctx=Context())
  start = jax.jit(lambda x: run({'peft': jax.random.key(0)}, x=x))
  tree = start(jnp.asarray(x, jnp.float32))['peft']
  ours = tree['a'].reshape(-1, 3) @ tree['b'].reshape(3, -1)
  np.testing.assert_allclose(ours, a0 @ b0, **CLOSE)
  # peft's base has the residual, ours the kernel: the same without the term.
  residual = layer.base_layer.weight.detach().numpy().T
  np.testing.assert_allclose(kernel - 4 / 3 * ours, residual, **CLOSE)
  # After training, with peft's factors.
  more_a, more_b = normal('a', *a0.shape), normal('b', *b0.shape)
  with torch.no_grad():
    layer.lora_A['default'].weight += torch.tensor(more_a.T)
    layer.lora_B['default'].weight += torch.tensor(more_b.T)
    flat = flatten_features(jnp.asarray(x, jnp.float32))
    expected = layer(torch.tensor(np.asarray(flat))).numpy()
  trained = {
    'a': (a0 + more_a).reshape(*inside, 3),
    'b': (b0 + more_b).reshape(3, *outside),
    'initial_a': a0.reshape(*inside, 3),
    'initial_b': b0.reshape(3, *outside),
  }
  actual = call(module, trained, f, x)
  np.testing.assert_allclose(actual, expected.reshape(y.shape), **CLOSE)


def test_the_copies_stay_as_they_are_and_the_model_starts_as_the_base():
  method = "lora(rank=3, init_weights='pissa', targets='*/q|*/wo')"
  model, built = small.make(method)
  variables = small.variables(method)
  trained, rest = router_state.split(variables['peft'], built.frozen_arrays)
  names = lambda tree: {  # noqa: E731
    path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(tree)
  }
  assert names(trained) == {'a', 'b'}
  assert names(rest) == {'initial_a', 'initial_b'}
  # To the bit: the same term is added and subtracted.
  base = small.jitted(t5.T5(small.GATED))
  np.testing.assert_array_equal(
    small.jitted(model)(variables, small.batch()),
    base({'params': variables['params']}, small.batch()),
  )


@pytest.mark.parametrize(
  ('method', 'said'),
  [
    (
      "molora(init_weights='pissa')",
      "molora: init_weights='pissa' would start all experts",
    ),
    (
      "lora(init_weights='svd_chunks')",
      "for one adapter write init_weights='pissa'",
    ),
    ("goat(share='a')", 'goat: .* drop share'),
    ('goat(experts_per_layer=[2, 3])', 'drop experts_per_layer'),
    ("goat(combine='parameters')", 'drop combine'),
    ("lora(init_weights='pissa', a_groups=2)", 'a_groups .* init_weights'),
    ("dora(init_weights='pissa')", "dora's option init_weights is one of zero"),
  ],
)
def test_a_start_that_cannot_be_is_refused(method, said):
  with pytest.raises(ValueError, match=said):
    build(method, t5.sites(small.GATED))


@pytest.mark.parametrize(
  ('method', 'said'),
  [
    (
      "lora(rank=9, init_weights='olora')",
      r'9 x 1 directions of a kernel of \(7, 7\)',
    ),
    ('goat(experts=3, rank=3)', '3 x 3 directions'),
  ],
)
def test_more_directions_than_the_kernel_has_are_refused(method, said):
  with pytest.raises(ValueError, match=said):
    initial(method)


def test_every_other_form_of_lora_starts_from_zero():
  starts = {
    name: entry.options()['init_weights'].default
    for name, entry in METHODS.items()
    if 'init_weights' in entry.options()
  }
  assert {n for n, start in starts.items() if start != 'zero'} == {'goat'}

# SPDX-License-Identifier: Apache-2.0
"""Groups of layers that have an array in common, and Lily, which has two."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moepeft.core.types import State
from moepeft.models.t5 import model as t5
from moepeft.objectives import Objective
from moepeft.peft import build
from moepeft.peft.tied_layers import first_layers, spare_sizes, tie
from moepeft.training.step import make_train_step

from ..contracts import small
from .test_semantics import adapter, call, normal, projection

# 2 encoder layers and 3 decoder layers: two groups of one, and of two and one.
LILY = "lily(experts=3, rank=2, a_groups=2, b_groups=1, targets='*/self/q')"


def test_groups_are_of_consecutive_layers():
  np.testing.assert_array_equal(first_layers(5, 2), [0, 0, 0, 3, 3])
  np.testing.assert_array_equal(first_layers(32, 4), np.arange(32) // 8 * 8)
  # No more groups than layers.
  np.testing.assert_array_equal(first_layers(3, 4), [0, 1, 2])


def test_the_first_layer_has_the_gradient_of_its_group():
  # The sum over layers of (l + 1) w_l, with groups {0, 1} and {2}: 1 + 2 and 3.
  tree = {'layers': {'lora': {'a': jnp.arange(3.0), 'b': jnp.arange(3.0)}}}
  groups = {'/lora/a$': 2}
  tied = tie(tree, groups)['layers']['lora']
  np.testing.assert_array_equal(tied['a'], [0, 0, 2])
  np.testing.assert_array_equal(tied['b'], [0, 1, 2])
  slope = jax.grad(
    lambda tree: tie(tree, groups)['layers']['lora']['a'] @ jnp.arange(1.0, 4)
  )(tree)
  np.testing.assert_array_equal(slope['layers']['lora']['a'], [3, 0, 3])
  # One of three values is a copy.
  assert spare_sizes(tree, groups, {}) == {'layers/lora/a': 1}


def test_training_keeps_the_layers_of_a_group_equal():
  # The loss calls no model: the sum of squares of (l + 1) times the arrays.
  model, built = small.make(LILY)
  site = {'a': (3, 11, 2), 'b': (3, 3, 2, 5), 'router': {'kernel': (3, 2, 3)}}
  site = jax.tree.map(
    lambda shape: jnp.asarray(normal(str(shape), *shape), jnp.float32),
    site,
    is_leaf=lambda leaf: isinstance(leaf, tuple),
  )
  peft = {'decoder': {'layers': {'self': {'q': {'lily': site}}}}}

  def loss(apply, variables, rows, rngs):
    def of(array):
      scale = jnp.arange(1, 4).reshape(3, *(1,) * (array.ndim - 1))
      return jnp.sum((scale * array) ** 2)

    total = sum(map(of, jax.tree.leaves(variables['peft'])))
    return total, {'weight': jnp.float32(1), 'routing': {}}

  optimizer = optax.adamw(1e-2)
  step = make_train_step(model, built, Objective(loss), optimizer)
  state = State(
    step=jnp.int32(0),
    trainable=peft,
    frozen={},
    opt=optimizer.init(peft),
    rng=jax.random.key(0),
  )
  state, _ = jax.jit(step)(state, {})
  lily = state.trainable['decoder']['layers']['self']['q']['lily']
  a, b, router = lily['a'], lily['b'], lily['router']['kernel']
  np.testing.assert_array_equal(a[0], a[1])
  assert (a[0] != a[2]).any() and (a[0] != site['a'][0]).any()
  np.testing.assert_array_equal(b, np.broadcast_to(b[:1], b.shape))
  assert (router[0] != router[1]).any()


def test_layers_with_unlike_arrays_have_none_in_common():
  sites = t5.sites(small.GATED)
  for options in ('experts_per_layer=[2, 3]', "from_adapters=['a']"):
    with pytest.raises(ValueError, match='drop one of them'):
      build(
        f"mixture(expert=lora(b_groups=1), {options}, targets='*/q')", sites
      )


def peft_lily(tree, x):
  """peft's term of a layer at the input [b, t, in]."""
  torch = pytest.importorskip('torch')
  layer = pytest.importorskip('peft.tuners.lily.layer')
  from peft import LilyConfig

  tensor = lambda a: torch.tensor(np.asarray(a, np.float32))  # noqa: E731
  experts, rank, size = tree['b'].shape
  base = torch.nn.Linear(x.shape[-1], size, bias=False)
  config = LilyConfig(r=rank, num_B=experts, scaling=1.0)
  module = layer.Linear(base, 'default', rank, config)
  with torch.no_grad():
    base.weight.zero_()
    module.lily_A['default'].weight.copy_(tensor(tree['a'].T))
    # peft's is [out, e r], of a linear layer, and is read as [e, r, out].
    module.lily_B['default'] = torch.nn.Linear(size, experts * rank, bias=False)
    stacked = tensor(tree['b'].reshape(experts * rank, size))
    module.lily_B['default'].weight.copy_(stacked)
    router = tensor(tree['router']['kernel'].T)
    module.lily_router['default'].weight.copy_(router)
    return module(tensor(x)).numpy()


@pytest.mark.parametrize(
  ('router', 'tokens'), [('token_mean', 7), ('softmax', 1)]
)
def test_lily_equals_peft_s(router, tokens):
  # The mean over an example is that over the batch where it is all of it, and
  # one token is routed by itself.
  f, x, y, inside, outside = projection('wo')
  x, y = x[:1, :tokens], y[:1, :tokens]
  tree = {
    'a': normal('a', *inside, 2),
    'b': normal('b', 3, 2, *outside),
    'router': {'kernel': normal('kernel', 2, 3)},
  }
  options = f"router={router}, targets='encoder/self/k'"
  mixture = adapter(f'lily(experts=3, rank=2, alpha=2.0, {options})')
  np.testing.assert_allclose(
    call(mixture, tree, f, x), y + peft_lily(tree, x), rtol=1e-4, atol=1e-4
  )


def test_a_mean_over_later_tokens_is_for_encoders():
  sites = t5.sites(small.GATED)
  with pytest.raises(ValueError, match='reads later tokens'):
    build('lily(router=token_mean)', sites)
  build("lily(router=token_mean, targets='encoder/*/q')", sites)

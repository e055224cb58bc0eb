# SPDX-License-Identifier: Apache-2.0
"""With one expert a mixture is the adapter that its expert is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.moe import ROUTERS
from moepeft.peft import METHODS
from moepeft.peft.kinds import Kinds
from moepeft.peft.method import options_of
from moepeft.peft.mixture import Mixture
from tests.contracts.router_cases import context, make
from tests.peft.test_semantics import adapter, call, normal, projection

# At most float32's rounding of a weight that is exp(0) / exp(0).
CLOSE = dict(rtol=1e-6, atol=1e-6)
NORMALIZED = [name for name, entry in ROUTERS.items() if entry.normalized]


def stacked(tree, axes):
  """The arrays with an axis of one expert."""
  return {name: np.expand_dims(a, axes[name]) for name, a in tree.items()}


@pytest.mark.parametrize('router', NORMALIZED)
@pytest.mark.parametrize('combine', ['outputs', 'parameters'])
def test_one_low_rank_expert_is_lora(router, combine):
  f, x, _, inside, outside = projection('q')
  tree = {'a': normal('a', *inside, 19), 'b': normal('b', 19, *outside)}
  options = {'k': 1} if 'k' in options_of(ROUTERS[router].module) else {}
  mixture = Mixture(
    adapter('lora(rank=19)'),
    experts=1,
    router=make(router, 1, **options),
    combine=combine,
  )
  experts = stacked(tree, {'a': 1, 'b': 0})
  experts['router'] = parameters(router, mixture)
  expected = call(adapter('lora(rank=19)'), tree, f, x)
  tree, x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (experts, x))
  ctx = context(2, 7)
  actual = jax.jit(lambda tree: mixture.apply({'peft': tree}, f, x, ctx))(tree)
  np.testing.assert_allclose(actual, expected, **CLOSE)


def parameters(name, mixture):
  """Random parameters of a mixture's router, which reads 11 features."""
  variables = jax.eval_shape(
    mixture.router.init,
    {'peft': jax.random.key(0), 'router': jax.random.key(0)},
    jnp.zeros((2, 7, 11)),
    context(2, 7),
  )
  shapes = variables.get('peft', {})
  return {key: normal(f'{name}{key}', *a.shape) for key, a in shapes.items()}


def test_one_vector_is_ia3():
  f, x, _, _, outside = projection('q')
  scale = normal('scale', *outside)
  expected = call(adapter('ia3'), {'scale': scale}, f, x)
  mixture = adapter("mov(experts=1, reads='input')")
  tree = {'scale': scale[None], 'router': {'kernel': normal('k', 11, 1)}}
  np.testing.assert_allclose(call(mixture, tree, f, x), expected, **CLOSE)


def test_every_expert_form_is_tried():
  forms = {entry.expert.module for entry in METHODS.values() if entry.expert}
  # Feed-forwards, cores and bottlenecks: tests/peft/test_presets.py; several
  # kinds: tests/peft/test_kinds.py.
  tried = {
    METHODS[name].module
    for name in ('lora', 'ia3', 'ffn_lora', 'moslora', 'bottleneck')
  }
  assert forms == tried | {Kinds}

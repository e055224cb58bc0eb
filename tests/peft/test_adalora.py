# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA as peft computes it: its term, its loss, its allocation of ranks."""

import types

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moepeft.checkpoints.adapter import AdapterWeights, folded
from moepeft.models.t5 import model as t5
from moepeft.peft import build
from moepeft.peft.methods import adalora
from moepeft.peft.methods.adalora import AdaLora

from ..contracts import small
from .test_semantics import CLOSE, adapter, call, normal, projection

STEPS, RATE = 12, 0.1
ADALORA = AdaLora(
  rank=4,
  target_rank=2,
  alpha=5.0,
  tinit=2,
  tfinal=3,
  delta_t=2,
  name='adalora',
  parent=None,
)
# {module in torch: (site, layer in a stack, inputs, outputs)}.
MODULES = {
  'q0': ('layers/q', 0, 5, 7),
  'q1': ('layers/q', 1, 5, 7),
  'head': ('head', None, 3, 2),
}


@pytest.mark.parametrize('place', ['q', 'o', 'wo'])
def test_the_term_is_that_of_peft(place):
  torch = pytest.importorskip('torch')
  peft = pytest.importorskip('peft')

  f, x, y, inside, outside = projection(place)
  a, e, b = normal('a', *inside, 4), normal('e', 4), normal('b', 4, *outside)
  module = adapter("adalora(rank=4, target_rank=2, alpha=5.0, targets='*/k')")
  tree = {'a': a, 'e': e, 'b': b}
  kernel = np.asarray(f.kernel()).reshape(np.prod(inside), -1)
  model = torch.nn.Sequential(torch.nn.Linear(*kernel.shape, bias=False))
  model[0].weight.data = torch.tensor(kernel.T.copy())
  config = peft.AdaLoraConfig(
    init_r=4, lora_alpha=5, total_step=9, target_modules=['0']
  )
  layer = peft.get_peft_model(model, config).base_model.model[0]
  with torch.no_grad():
    layer.lora_A['default'].copy_(torch.tensor(a.reshape(-1, 4).T.copy()))
    layer.lora_E['default'].copy_(torch.tensor(e[:, None]))
    layer.lora_B['default'].copy_(torch.tensor(b.reshape(4, -1).T.copy()))
    flat = torch.tensor(x.reshape(2, 7, -1), dtype=torch.float32)
    expected = layer(flat).numpy().reshape(y.shape)
  # peft divides by r + 1e-5, 2.5e-6 of the term.
  actual = call(module, tree, f, x)
  np.testing.assert_allclose(actual, expected, **CLOSE)
  weight = jnp.asarray(f.kernel())
  merged = adalora.merge(tree, weight, adapter=module, eqn=f.eqn)
  np.testing.assert_allclose(np.einsum(f.eqn, x, merged), actual, **CLOSE)


def test_an_export_is_the_lora_of_the_values_that_are_left():
  e = np.array([[1.0, 0, -2], [3, 4, 0]])
  tree = {'a': normal('a', 2, 5, 3), 'e': e, 'b': normal('b', 2, 3, 7)}
  method = "adalora(rank=3, target_rank=2, tinit=9, targets='*/q')"
  actual = folded(AdapterWeights(method, {'layers': {'q': {'adalora': tree}}}))
  assert actual.method == "lora(rank=3, alpha=16.0, targets='*/q')"
  lora = actual.tree['layers']['q']['lora']
  np.testing.assert_array_equal(lora['a'], tree['a'])
  np.testing.assert_array_equal(lora['b'], e[..., None] * tree['b'])


def test_the_budget_falls_with_the_third_power_of_the_steps_that_are_left():
  # Two sites of rank 3 to a mean of 1: 6 triplets to 2, in the 6 steps from 2
  # to 8. At step 4 2/3 of them are left, int(4 * 8 / 27 + 2) = 3 triplets; at
  # step 6 1/3, int(4 / 27 + 2) = 2; at step 8 none, 2.
  module = AdaLora(rank=3, target_rank=1, tinit=2, tfinal=2, delta_t=2)
  actual = adalora.removed_triplets(module, 10, 6)
  np.testing.assert_array_equal(actual, [0, 0, 0, 0, 3, 0, 4, 0, 4, 0])
  # The last allocation is at its step, whatever the interval.
  module = AdaLora(rank=3, target_rank=1, tinit=2, tfinal=1, delta_t=4)
  actual = adalora.removed_triplets(module, 8, 6)
  # At step 4 3/5 are left: int(4 * 27 / 125 + 2) = 2.
  np.testing.assert_array_equal(actual, [0, 0, 0, 0, 4, 0, 0, 4])


def initial_tree():
  tree = {'encoder': {'layers': {'q': {}}, 'head': {}}}
  shapes = {'a': (5, 4), 'e': (4,), 'b': (4, 7)}
  tree['encoder']['layers']['q']['adalora'] = {
    leaf: normal(f'q{leaf}', 2, *shape) for leaf, shape in shapes.items()
  }
  shapes = {'a': (3, 4), 'e': (4,), 'b': (4, 2)}
  tree['encoder']['head']['adalora'] = {
    leaf: normal(f'head{leaf}', *shape) for leaf, shape in shapes.items()
  }
  return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)


def gradients(step):
  """As if of a batch; the first layer matters most."""
  scale = {'encoder/layers/q': np.array([3.0, 1.0]), 'encoder/head': 1.0}

  def draw(path, array):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    factor = np.asarray(scale[name.partition('/adalora')[0]])
    factor = factor.reshape(*factor.shape, *(1,) * (array.ndim - factor.ndim))
    noise = normal(f'{name}{step}', *array.shape)
    return jnp.asarray(0.1 * factor * noise, jnp.float32)

  return jax.tree_util.tree_map_with_path(draw, initial_tree())


def torch_leaf(tree, name, leaf):
  site, layer, _, _ = MODULES[name]
  node = tree['encoder']
  for key in site.split('/'):
    node = node[key]
  array = np.asarray(node['adalora'][leaf])
  array = array if layer is None else array[layer]
  return array[:, None] if leaf == 'e' else array.T


def peft_run(torch, peft):
  """(losses of orthogonality, {(module, leaf): array}, those of the moving
  averages) of each step."""

  class Linear(torch.nn.Module):
    """A model whose loss is linear in its adapter's parameters."""

    def __init__(self):
      super().__init__()
      for name, (_, _, inputs, outputs) in MODULES.items():
        self.add_module(name, torch.nn.Linear(inputs, outputs, bias=False))

    def forward(self, gradient):
      loss = 0
      for name in MODULES:
        layer = getattr(self, name)
        for leaf in 'aeb':
          weight = getattr(layer, f'lora_{leaf.upper()}')['default']
          slope = torch_leaf(gradient, name, leaf)
          loss = loss + (weight * torch.tensor(slope.copy())).sum()
      return types.SimpleNamespace(loss=loss, linear=loss.item())

  config = peft.AdaLoraConfig(
    init_r=4,
    target_r=2,
    lora_alpha=5,
    tinit=2,
    tfinal=3,
    deltaT=2,
    total_step=STEPS,
    target_modules=[*MODULES],
  )
  model = peft.get_peft_model(Linear(), config)
  weights = {
    (name, leaf): getattr(
      getattr(model.base_model.model, name), f'lora_{leaf.upper()}'
    )['default']
    for name in MODULES
    for leaf in 'aeb'
  }
  with torch.no_grad():
    for (name, leaf), weight in weights.items():
      weight.copy_(torch.tensor(torch_leaf(initial_tree(), name, leaf).copy()))
  optimizer = torch.optim.SGD(weights.values(), lr=RATE)
  losses, trees, averages = [], [], []
  allocator = model.base_model.rankallocator
  for step in range(STEPS):
    # The PeftModel around it would leave out the orthogonality.
    output = model.base_model(gradients(step))
    losses.append(output.loss.item() - output.linear)
    optimizer.zero_grad()
    output.loss.backward()
    optimizer.step()
    model.base_model.update_and_allocate(step)
    trees.append({k: w.detach().numpy().copy() for k, w in weights.items()})
    averages.append(
      [
        {
          (name, leaf): mean[f'{name}.lora_{leaf.upper()}.default'].numpy()
          for name, leaf in weights
          if mean
        }
        for mean in (allocator.exp_avg_ipt, allocator.exp_avg_unc)
      ]
    )
  return losses, trees, averages


def run(optimizer, steps=STEPS):
  """The trees and the states of each step."""
  tree, trees, states = initial_tree(), [], []
  state = optimizer.init(tree)
  update = jax.jit(optimizer.update)
  for step in range(steps):
    changes, state = update(gradients(step), state, tree)
    tree = optax.apply_updates(tree, changes)
    trees.append(tree)
    states.append(state)
  return trees, states


def ranks(tree):
  values = [a for p, a in jax.tree.leaves_with_path(tree) if "'e'" in str(p)]
  return sum(np.count_nonzero(value) for value in values)


def test_every_step_is_that_of_peft():
  torch = pytest.importorskip('torch')
  peft = pytest.importorskip('peft')
  losses, expected, averages = peft_run(torch, peft)
  actual, states = run(adalora.allocate_ranks(optax.sgd(RATE), ADALORA, STEPS))
  before = [initial_tree(), *actual[:-1]]
  for step in range(STEPS):
    sites = adalora._sites(adalora._arrays_of(ADALORA, before[step]))
    # 0.5 is the weight in both.
    loss = 0.5 * adalora.orthogonality(sites)
    np.testing.assert_allclose(loss, losses[step], rtol=1e-5)
    for (name, leaf), array in expected[step].items():
      mine = torch_leaf(actual[step], name, leaf)
      # The differences of 12 steps of float32; numbers of about 1.
      np.testing.assert_allclose(mine, array, rtol=1e-4, atol=1e-6)
      # The same values are zero, exactly.
      np.testing.assert_array_equal(mine == 0, array == 0)
    means = states[step].sensitivity, states[step].uncertainty
    for mean, theirs in zip(means, averages[step], strict=True):
      mean = flax.traverse_util.unflatten_dict(mean, sep='/')
      for (name, leaf), array in theirs.items():
        np.testing.assert_allclose(
          torch_leaf(mean, name, leaf), array, rtol=1e-4, atol=1e-6
        )
  # The last allocation, at step 9, is by the averages of the step before.
  jax.tree.map(
    np.testing.assert_array_equal, states[9].sensitivity, states[8].sensitivity
  )
  # Three matrices of rank 4 to a mean of 2; the first, which matters most,
  # keeps all.
  counts = [ranks(tree) for tree in actual]
  assert counts[:4] == [12] * 4 and counts[-4:] == [6] * 4
  assert len({*counts}) > 2
  kept = [np.count_nonzero(torch_leaf(actual[-1], n, 'e')) for n in MODULES]
  assert kept[0] == 4


def test_a_resumed_run_allocates_as_the_whole_one():
  optimizer = adalora.allocate_ranks(optax.adam(RATE), ADALORA, STEPS)
  whole, _ = run(optimizer)
  half, states = run(optimizer, steps=7)
  # Through the host, as a checkpoint.
  state = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), states[-1])
  tree, update = half[-1], jax.jit(optimizer.update)
  for step in range(7, STEPS):
    changes, state = update(gradients(step), state, tree)
    tree = optax.apply_updates(tree, changes)
  jax.tree.map(np.testing.assert_array_equal, tree, whole[-1])


def test_other_adapters_are_trained_as_without_it():
  tree = {'layers': {'q': {'adalora': {}, 'lora': {'a': jnp.ones((2, 3, 1))}}}}
  tree['layers']['q']['adalora'] = initial_tree()['encoder']['layers']['q'][
    'adalora'
  ]
  built = build(
    "lora(rank=1, targets='*/q') + adalora(rank=4, target_rank=2)",
    t5.sites(small.GATED),
  )
  optimizer = built.wrap_optimizer(optax.sgd(1.0), 9)
  gradient = jax.tree.map(jnp.ones_like, tree)
  changes, _ = optimizer.update(gradient, optimizer.init(tree), tree)
  np.testing.assert_array_equal(
    changes['layers']['q']['lora']['a'], -np.ones((2, 3, 1))
  )


def test_a_schedule_without_a_step_to_lower_ranks_is_refused():
  sites = t5.sites(small.GATED)
  built = build('adalora(tinit=5, tfinal=5)', sites)
  with pytest.raises(ValueError, match='leave none of the 10 steps'):
    built.wrap_optimizer(optax.sgd(1.0), 10)
  built.wrap_optimizer(optax.sgd(1.0), 11)
  with pytest.raises(ValueError, match='target_rank=4 .* take lora'):
    build('adalora(rank=4, target_rank=4)', sites)

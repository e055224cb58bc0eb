# SPDX-License-Identifier: Apache-2.0
"""Routers of every kind, in training: own loss, state, prompt pooling.

Under scan, remat, packing and accumulation they compute the same; on eight
devices, see test_devices.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moepeft import config as config_lib
from moepeft.core.types import State
from moepeft.models import weight_mapping
from moepeft.moe import router_state, router_stats, task_names
from moepeft.training.setup import build_train_step

from . import router_probes, small

# Sums in float32 in another order.
CLOSE = dict(rtol=2e-5, atol=2e-6)
# One program of both: compiling is what takes long here.
METHOD = (
  'molora(experts=3, rank=2, router=balanced(k=2, rate=0.125),'
  " targets='encoder/self/k|decoder/mlp/wo')"
  ' + molora(experts=3, rank=2, router=squared,'
  " targets='encoder/mlp/wo|decoder/self/q')"
  ' + molora(experts=3, rank=2, router=sentence,'
  " targets='encoder/self/v|decoder/cross/q')"
  ' + molora(experts=3, rank=2, router=task('
  "tasks=['cola', 'mrpc', 'rte']), targets='*/self/o')"
)
BATCH = small.batch(rows=6)


@pytest.fixture(autouse=True, scope='module')
def _registered():
  with router_probes.registered():
    yield


def two_steps(parts=1, batch=BATCH, weight=0.5, **options):
  """(flat trained tree, metrics of the first step) after two updates."""
  config = config_lib.default()
  config.batch_size, config.gradient_accumulation_steps = 6, parts
  config.router_losses.square = weight
  model, built = small.make(METHOD, **options)
  variables = small.variables(METHOD, noise=0.1)
  if not options.get('scan', True):
    variables = {key: small.unstack(tree) for key, tree in variables.items()}
  optimizer = optax.sgd(1.0)
  state = State(
    step=jnp.int32(0),
    trainable=variables['peft'],
    frozen=variables['params'],
    opt=router_state.optimizer_init(optimizer)(variables['peft']),
    rng=jax.random.key(0),
  )
  step = jax.jit(build_train_step(config, model, built, optimizer))
  state, metrics = step(state, batch)
  state, _ = step(state, batch)
  return weight_mapping.flatten(state.trainable), metrics


@pytest.fixture(scope='module')
def reference():
  return two_steps()


def test_a_loss_of_its_own_is_in_the_training_loss(reference):
  _, metrics = reference
  sites = router_stats.collect(metrics['routing']).values()
  values = [
    np.mean(sums.aux['square'] / sums.count[..., None])
    for sums in sites
    if 'square' in sums.aux
  ]
  # Encoder and decoder.
  assert len(values) == 2
  np.testing.assert_allclose(
    metrics['router_loss'], 0.5 * np.mean(values), rtol=1e-5
  )


def test_state_follows_the_sums_of_the_batch(reference):
  trained, metrics = reference
  sums = router_stats.collect(metrics['routing'])
  before = weight_mapping.flatten(small.variables(METHOD, noise=0.1)['peft'])
  paths = [path for path in before if router_state.is_state(path)]
  assert len(paths) == 2
  # The first step's is known; the second adds or subtracts the rate again.
  for path in paths:
    share = np.asarray(sums[path.removesuffix('/router/state_bias')].share)
    assert share.shape == before[path].shape
    first = before[path] + 0.125 * np.sign(
      share.mean(-1, keepdims=True) - share
    )
    second = np.asarray(trained[path] - first)
    np.testing.assert_allclose(
      np.minimum(np.abs(second), np.abs(np.abs(second) - 0.125)), 0, atol=1e-6
    )
    assert np.abs(second).max() > 0.1


def test_an_optimizer_has_nothing_for_state():
  peft = small.variables(METHOD)['peft']
  opt = router_state.optimizer_init(optax.adamw(0.1))(peft)
  paths = str(jax.tree_util.tree_structure(opt))
  assert "'kernel'" in paths and 'state_bias' not in paths
  trained, state = router_state.split(peft)
  assert jax.tree.structure(router_state.join(trained, state)) == (
    jax.tree.structure(peft)
  )


def test_state_acts_on_the_routing_and_a_forward_pass_leaves_it_alone():
  model, _ = small.make(METHOD)
  variables = small.variables(METHOD, noise=0.1)
  trained, state = router_state.split(variables['peft'])
  # Expert 2 is what everybody takes.
  state = jax.tree.map(lambda a: a.at[..., 2].set(9.0), state)
  peft = router_state.join(trained, state)
  _, collections = jax.jit(
    lambda v: model.apply(v, small.batch(), mutable=['weights', 'routing'])
  )({**variables, 'peft': peft})
  assert collections.keys() == {'weights', 'routing'}
  sums_by_site = router_stats.collect(collections['routing'])
  sparse = [sums for sums in sums_by_site.values() if sums.sparse]
  assert len(sparse) == 2
  for sums in sparse:
    np.testing.assert_array_equal(sums.share[..., 2], sums.count)


@pytest.mark.parametrize(
  'options',
  [dict(parts=3, remat='full'), dict(parts=2), dict(remat='dots')],
  ids=str,
)
@pytest.mark.slow
def test_remat_and_accumulation_change_nothing(reference, options):
  check_equal(two_steps(**options)[0], reference[0])


def check_equal(trained, expected):
  assert trained.keys() == expected.keys()
  for path, array in trained.items():
    np.testing.assert_allclose(array, expected[path], **CLOSE, err_msg=path)


@pytest.mark.slow
def test_layers_that_are_not_scanned_have_the_same_state():
  # No loss, which is the mean over stacks: apart, each layer is a stack.
  expected, _ = two_steps(weight=0.0)
  looped, _ = two_steps(weight=0.0, scan=False)
  for path, array in expected.items():
    for layer in range(len(array)):
      one = looped[path.replace('/layers/', f'/layers_{layer}/')]
      np.testing.assert_allclose(one, array[layer], **CLOSE, err_msg=path)


@pytest.mark.parametrize(
  'options',
  [
    # All at once, in one program; alone, each is slow.
    dict(parts=3, remat='full'),
    pytest.param({}, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_packing_remat_and_accumulation_change_nothing(reference, options):
  # Rows 0 and 1, 2 and 3, ... in one.
  packed = {
    k: jnp.concatenate([a[0::2], a[1::2]], axis=1) for k, a in BATCH.items()
  }
  for side in ('inputs', 'targets'):
    mask = BATCH[f'{side}_mask']
    packed[f'{side}_segments'] = jnp.concatenate(
      [mask[0::2] * 1, mask[1::2] * 2], axis=1
    ).astype(jnp.int32)
  check_equal(two_steps(batch=packed, **options)[0], reference[0])


def test_a_router_of_the_future_is_refused_in_a_decoder():
  method = 'molora(experts=3, router=future)'
  with pytest.raises(ValueError, match='router future reads later tok'):
    small.make(method)
  small.make("molora(experts=3, router=future, targets='encoder/*/q')")


def test_the_prompt_is_what_comes_before_the_first_trained_token():
  from moepeft.models.sites import context

  trained = jnp.array([[0, 0, 1, 1, 0, 1, 0, 0, 1, 0]], bool)
  segments = jnp.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 0]])
  ids = jnp.ones((1, 10), jnp.int32)
  batch = {'inputs': ids, 'targets_mask': trained}
  # Place i is trained to give token i + 1: tokens 3 and later are answers.
  np.testing.assert_array_equal(
    context(batch, 'inputs', ids, True).prompt_mask[0],
    [1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
  )
  packed = context(
    batch | {'inputs_segments': segments}, 'inputs', ids, True
  ).prompt_mask[0]
  np.testing.assert_array_equal(packed[:9], [1, 1, 1, 0, 0, 1, 0, 0, 0])
  # An encoder has nothing but the prompt; its decoder the token to begin with.
  both = batch | {'decoder_inputs': ids, 'targets_mask': trained | True}
  assert context(both, 'inputs', ids, True).prompt_mask.all()
  decoder_ids = both['decoder_inputs'] + 0
  np.testing.assert_array_equal(
    context(both, 'targets', decoder_ids, True).prompt_mask[0],
    [1] + [0] * 9,
  )


def test_an_answer_does_not_move_its_own_routing():
  model, _ = small.make(METHOD)
  variables = small.variables(METHOD, noise=0.1)
  targets = BATCH['decoder_inputs']
  changed = BATCH | {'decoder_inputs': targets.at[:, 2:].set(5)}

  @jax.jit
  def weights(batch):
    return model.apply(variables, batch, mutable=['weights'])[1]['weights']

  one, two = (weight_mapping.flatten(weights(b)) for b in (BATCH, changed))
  checked = 0
  for path, array in one.items():
    if path.startswith('decoder'):
      # The first tokens are routed as before, [l, b, t, e].
      before, after = array[0][:, :, :2], two[path][0][:, :, :2]
      np.testing.assert_array_equal(before, after)
      checked += 1
  assert checked


def test_a_task_trains_its_own_row_of_a_table(reference):
  trained, _ = reference
  start = weight_mapping.flatten(small.variables(METHOD, noise=0.1)['peft'])
  tables = [p for p in trained if p.endswith('/o/molora_4/router/embedding')]
  assert len(tables) == 2
  for path in tables:
    moved = np.abs(trained[path] - start[path]).max(axis=(0, 2))
    # Padding, tasks 1 and 2 that the rows are of, task 3 that none is of.
    assert (moved > 0).tolist() == [False, True, True, False]


def test_routers_of_a_method_have_one_list_of_tasks():
  method = (
    "molora(router=task(tasks=['a', 'b']), targets='*/q')"
    " + molora(router=task(tasks=['b', 'a']), targets='*/v')"
  )
  with pytest.raises(ValueError, match='the same list of tasks; got'):
    task_names.task_names(small.make(method)[1].adapter_map)


def test_a_batch_without_tasks_is_refused():
  batch = {k: a for k, a in BATCH.items() if not k.endswith('_tasks')}
  model, _ = small.make(METHOD)
  with pytest.raises(ValueError, match='the batch has no task ids'):
    jax.eval_shape(model.apply, small.variables(METHOD, noise=0.1), batch)

# SPDX-License-Identifier: Apache-2.0
"""Routers that read a task, a prompt or an example equal the equations.

Axes: b 2, t 9: two examples of 5 and 3 tokens in row 0, one of 7 in row 1;
i 13, e 5.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.core.types import Context
from moepeft.moe import ROUTERS
from moepeft.moe.aux_losses import auxiliary_loss
from moepeft.moe.router_stats import router_stats
from tests.reference import router_equations_context as equations

E, INPUTS = 5, 13
IDS = np.array([[1] * 5 + [2] * 3 + [0], [1] * 7 + [0] * 2])
# Row, tokens, of them the prompt, task.
EXAMPLES = [
  (0, slice(0, 5), 2, 1),
  (0, slice(5, 8), 1, 3),
  (1, slice(0, 7), 4, 2),
]


def normal(name, *shape):
  return np.random.default_rng(list(name.encode())).standard_normal(shape)


X = normal('x', 2, 9, INPUTS)
KERNEL = normal('kernel', INPUTS, E)
BIAS = normal('bias', E) / 4
TABLE = normal('table', 4, E)
EMBEDDING, TASK_KERNEL = normal('embedding', 4, 7), normal('task', 7, E)
SCALE, SHIFT, KERNEL_SCALE = (
  normal(name, INPUTS) for name in ('scale', 'shift', 'kernel_scale')
)
TASKS = ('a', 'b', 'c')
HYBRID = {
  'kernel': KERNEL,
  'bias': BIAS,
  'prompt_kernel': normal('prompt kernel', INPUTS, E),
  'prompt_bias': normal('prompt bias', E),
  'depth': np.float64(0.5),
}


def hybrid(x, prompt, k=0):
  # Outside of a stack the layer is in the middle: sigmoid(0 + shift + depth).
  task = HYBRID['prompt_kernel'], HYBRID['prompt_bias']
  weight = 1 / (1 + np.exp(-0.75))
  return equations.hybrid(x, prompt, (KERNEL, BIAS), task, weight, k)


def context(**options):
  prompt = np.zeros_like(IDS, bool)
  tasks = np.zeros_like(IDS)
  for row, tokens, length, task in EXAMPLES:
    prompt[row, tokens.start : tokens.start + length] = True
    tasks[row, tokens] = task
  arrays = dict(
    token_mask=IDS > 0, segment_ids=IDS, prompt_mask=prompt, task_ids=tasks
  )
  return Context(**{k: jnp.asarray(a) for k, a in arrays.items()}, **options)


# Router, options, parameters, (x of an example, its prompt, its task) ->
# weights.
CASES = {
  'balanced': (
    {'k': 2},
    {'kernel': KERNEL, 'state_bias': BIAS},
    lambda x, prompt, task: [
      equations.balanced(token, KERNEL, BIAS, 2) for token in x
    ],
  ),
  'balanced renormalized': (
    {'k': 3, 'renormalize': True},
    {'kernel': KERNEL, 'state_bias': BIAS},
    lambda x, prompt, task: [
      equations.balanced(token, KERNEL, BIAS, 3, True) for token in x
    ],
  ),
  'task': (
    {'tasks': TASKS, 'task_size': 7},
    {'embedding': EMBEDDING, 'kernel': TASK_KERNEL},
    lambda x, prompt, task: equations.task(EMBEDDING[task], TASK_KERNEL),
  ),
  'sentence': (
    {},
    {
      'kernel': KERNEL,
      'kernel_scale': KERNEL_SCALE,
      'scale': SCALE,
      'bias': SHIFT,
    },
    lambda x, prompt, task: equations.sentence(
      x, prompt, KERNEL, KERNEL_SCALE, SCALE, SHIFT
    ),
  ),
  'hybrid': (
    {'shift': 0.25},
    HYBRID,
    lambda x, prompt, task: hybrid(x, prompt),
  ),
  'hybrid top': (
    {'shift': 0.25, 'k': 2},
    HYBRID,
    lambda x, prompt, task: hybrid(x, prompt, 2),
  ),
  'switch': (
    {'capacity': 1},
    {'kernel': KERNEL},
    lambda x, prompt, task: equations.switch(x, KERNEL),
  ),
  'switch training': (
    {'capacity': 1},
    {'kernel': KERNEL},
    lambda x, prompt, task: equations.switch(x, KERNEL, 1),
  ),
  'expert_choice': (
    {'capacity_factor': 1.5},
    {'kernel': KERNEL},
    lambda x, prompt, task: equations.expert_choice(x, KERNEL, 1.5),
  ),
  'poly': (
    {'tasks': TASKS},
    {'table': TABLE},
    lambda x, prompt, task: equations.poly(TABLE[task]),
  ),
  'random_then_mean': ({}, {}, lambda x, prompt, task: np.full(E, 1 / E)),
}


def run(name, seed=0):
  options, parameters, _ = CASES[name]
  name, _, rest = name.partition(' ')
  router = ROUTERS[name].module(experts=E, **options)
  tree = {k: jnp.asarray(a, jnp.float32) for k, a in parameters.items()}
  ctx = context(train=rest == 'training')
  rngs = {'router': jax.random.key(seed)}
  return jax.jit(
    lambda tree: jax.jit(router.apply)(
      {'peft': tree}, jnp.asarray(X, jnp.float32), ctx, rngs=rngs
    )
  )(tree)


@pytest.mark.parametrize('name', CASES)
def test_weights_equal_the_equation(name):
  actual = run(name).combine_weights
  for row, tokens, prompt, task in EXAMPLES:
    x = X[row, tokens]
    expected = np.broadcast_to(CASES[name][2](x, prompt, task), (len(x), E))
    # float32 logits of 13 products.
    np.testing.assert_allclose(
      actual[row, tokens], expected, rtol=1e-4, atol=1e-6
    )


def test_the_cases_show_what_they_are_of():
  # A bias chooses otherwise, and a capacity of 1 takes weight away.
  plain = [equations.balanced(token, KERNEL, 0 * BIAS, 2) for token in X[0]]
  moved = [equations.balanced(token, KERNEL, BIAS, 2) for token in X[0]]
  assert (np.array(plain) != moved).any()
  kept = run('switch training').combine_weights[IDS > 0]
  whole = run('switch').combine_weights[IDS > 0]
  assert 0 < (kept > 0).sum() < (whole > 0).sum() == 15


def test_a_bias_moves_against_the_load_by_hand():
  # Top 1 of 2 experts for 3 real tokens with p = (3/4, 1/4) and one of
  # padding: loads 3 and 0, mean 3/2. Expert 0 falls by the rate, 1 rises.
  router = ROUTERS['balanced'].module(experts=2, rate=0.125)
  tree = {'kernel': jnp.array([[np.log(3), 0.0]]), 'state_bias': jnp.zeros(2)}
  x = jnp.ones((1, 4, 1))
  mask = jnp.array([[True, True, True, False]])
  routing = jax.jit(router.apply)({'peft': tree}, x, Context(token_mask=mask))
  np.testing.assert_allclose(
    routing.combine_weights, [[[0.75, 0]] * 4], rtol=1e-6
  )
  sums = router_stats(routing, mask)
  moved = ROUTERS['balanced'].update(router, {'bias': jnp.zeros(2)}, sums)
  np.testing.assert_array_equal(moved['bias'], [-0.125, 0.125])
  assert equations.next_bias([0, 0], [3, 0], 0.125) == [-0.125, 0.125]
  # After three steps, 1/4 + 3/8 > 3/4 - 3/8: expert 1 is chosen, and has p.
  bias = 3 * moved['bias']
  routing = jax.jit(router.apply)(
    {'peft': tree | {'state_bias': bias}}, x, Context()
  )
  np.testing.assert_allclose(
    routing.combine_weights, [[[0, 0.25]] * 4], rtol=1e-6
  )


@pytest.mark.parametrize('name', ['balanced', 'magnitude'])
def test_the_mean_load_is_that_of_the_experts_that_a_layer_has(name):
  # Loads 2, 1, 0 of 2 experts and an absent one: the mean is 3/2, not 1.
  entry = ROUTERS[name]
  mask = jnp.array([True, True, False])
  weights = jnp.array([[[1.0, 0, 0], [1, 0, 0], [0, 1, 0]]])
  routing = entry.module(experts=3).init_with_output(
    jax.random.key(0), jnp.ones((1, 3, 3)), Context(expert_mask=mask)
  )[0]
  sums = router_stats(routing.replace(combine_weights=weights), None, mask)
  router = entry.module(experts=3, rate=0.5)
  moved = entry.update(router, {'bias': jnp.zeros(3)}, sums)['bias']
  np.testing.assert_array_equal(moved, [-0.5, 0.5, 0])


def test_dropped_experts_are_never_chosen_for_their_bias():
  router = ROUTERS['balanced'].module(experts=3, dropout=0.99, renormalize=True)
  tree = {'kernel': jnp.eye(3), 'state_bias': jnp.array([0.0, 9, 9])}
  # Expert 0 is each token's best, so that it alone is sure to stay.
  x = jnp.broadcast_to(jnp.array([2.0, 0, 0]), (5, 7, 3))
  weights = jax.jit(router.apply)(
    {'peft': tree}, x, Context(train=True), rngs={'router': jax.random.key(0)}
  ).combine_weights
  np.testing.assert_allclose(jnp.sum(weights, -1), 1, rtol=1e-6)


def test_a_capacity_of_two_by_hand():
  # Logits (ln 3, 0): p = (3/4, 1/4), or the other way round where x is -1.
  # Places 0, 1 and 3 choose expert 0, which takes two; 2 chooses expert 1.
  # Padding at 4 takes nothing from the next example, nor does that of place 3.
  router = ROUTERS['switch'].module(experts=2, capacity=2)
  tree = {'kernel': jnp.array([[np.log(3) / 2, -np.log(3) / 2]])}
  x = jnp.array([1.0, 1, -1, 1, 1, 1])[None, :, None]
  ctx = Context(
    token_mask=jnp.array([[True] * 4 + [False] + [True]]),
    segment_ids=jnp.array([[1, 1, 1, 1, 1, 2]]),
    train=True,
  )
  weights = jax.jit(router.apply)({'peft': tree}, x, ctx).combine_weights[0]
  expected = [[0.75, 0], [0.75, 0], [0, 0.75], [0, 0], [0.75, 0]]
  np.testing.assert_allclose(np.delete(weights, 4, axis=0), expected, rtol=1e-6)


def test_experts_choose_their_tokens_by_hand():
  # p of expert 0 rises with x. Each of 2 experts takes 1 * 4 / 2 = 2 tokens:
  # expert 0 the places 1 and 3, expert 1 the places 0 and 2.
  router = ROUTERS['expert_choice'].module(experts=2, capacity_factor=1.0)
  x = jnp.array([-1.0, 2, 0, 1, 9])[None, :, None]
  ctx = Context(token_mask=jnp.array([[True] * 4 + [False]]))
  tree = {'kernel': jnp.array([[1.0, 0.0]])}
  weights = jax.jit(router.apply)({'peft': tree}, x, ctx).combine_weights[0, :4]
  np.testing.assert_array_equal(
    weights > 0, [[False, True], [True, False], [False, True], [True, False]]
  )
  # Sigmoids of -1, 2, 0 and 1.
  np.testing.assert_allclose(
    jnp.sum(weights, -1), [0.731059, 0.880797, 0.5, 0.731059], rtol=1e-5
  )


def test_a_task_by_hand():
  # Vector (ln 3, 0) and W = 1: softmax(ln 3, 0) = (3/4, 1/4) for task 1, the
  # other way round for task 2.
  router = ROUTERS['task'].module(experts=2, tasks=('a', 'b'), task_size=2)
  ln3 = np.log(3)
  tree = {
    'embedding': jnp.array([[0, 0], [ln3, 0], [0, ln3]], jnp.float32),
    'kernel': jnp.eye(2),
  }
  ctx = Context(task_ids=jnp.array([[1, 2]]))
  weights = jax.jit(router.apply)({'peft': tree}, jnp.ones((1, 2, 3)), ctx)
  np.testing.assert_allclose(
    weights.combine_weights, [[[0.75, 0.25], [0.25, 0.75]]], rtol=1e-6
  )


def test_a_sentence_by_hand():
  # The prompt's mean is (100, 0), its layer norm (1, -1); those of the columns
  # of W are (1, -1) and (-1, 1). With the scale ln 3 / 4 the logits are
  # ln 3 / 2 and -ln 3 / 2: p = (3/4, 1/4). Variances of 2,500 and more leave
  # nothing of the epsilon, 1e-5. The answer and the padding do not count.
  router = ROUTERS['sentence'].module(experts=2)
  tree = {
    'kernel': jnp.array([[100.0, -100.0], [-100.0, 100.0]]),
    'kernel_scale': jnp.full(2, np.log(3) / 4),
    'scale': jnp.ones(2),
    'bias': jnp.zeros(2),
  }
  x = jnp.array([[[300.0, 0], [-100, 0], [-9000, 5], [7000, -7000]]])
  ctx = Context(
    token_mask=jnp.array([[True, True, True, False]]),
    prompt_mask=jnp.array([[True, True, False, True]]),
  )
  weights = jax.jit(router.apply)({'peft': tree}, x, ctx).combine_weights
  np.testing.assert_allclose(weights, [[[0.75, 0.25]] * 4], rtol=1e-6)


def test_prompts_weigh_more_in_higher_layers():
  # Layer 0 of 3: sigmoid(-2) = 0.119203; layer 1: 1/2; layer 2: 0.880797. A
  # token's routing is (1, 0) nearly, its prompt's (0, 1).
  router = ROUTERS['hybrid'].module(experts=2)
  zeros = jnp.zeros((1, 2))
  tree = {'kernel': zeros, 'prompt_kernel': zeros, 'depth': jnp.float32(0)}
  tree |= {'bias': jnp.array([50.0, 0]), 'prompt_bias': jnp.array([0, 50.0])}
  mask = jnp.ones((1, 1), bool)
  for layer, expected in enumerate([0.119203, 0.5, 0.880797]):
    ctx = Context(prompt_mask=mask, layer=jnp.int32(layer), layer_count=3)
    weights = jax.jit(router.apply)({'peft': tree}, jnp.ones((1, 1, 1)), ctx)
    np.testing.assert_allclose(
      weights.combine_weights[0, 0], [1 - expected, expected], rtol=1e-5
    )
    assert abs(equations.layer_weight(layer, 3, 2.0, 0.0) - expected) < 1e-6


def test_the_two_divergences_equal_the_released_code():
  sums = router_stats(run('hybrid'), jnp.asarray(IDS > 0))
  token = equations.softmax(X[IDS > 0] @ KERNEL + BIAS)
  prompt = np.array(
    [
      equations.softmax(
        X[row, tokens][:length].mean(0) @ HYBRID['prompt_kernel']
        + HYBRID['prompt_bias']
      )
      for row, tokens, length, _ in EXAMPLES
    ]
  )
  for name, p in (('token_js', token), ('prompt_js', prompt)):
    expected = equations.bounded_js(p, 0.98, 0.5)
    actual = auxiliary_loss({'a': sums}, {name: 1.0})
    assert expected > 0.01
    # float32 logits of 13 products.
    np.testing.assert_allclose(actual, expected, rtol=1e-4)


def test_poly_by_hand():
  # sigmoid(ln 3) = 3/4 and sigmoid(-ln 3) = 1/4; a masked expert has 0.
  router = ROUTERS['poly'].module(experts=3, tasks=('a',))
  ln3 = np.log(3)
  tree = {'table': jnp.array([[0, 0, 0], [ln3, -ln3, 5]], jnp.float32)}
  ctx = Context(
    task_ids=jnp.array([[1]]), expert_mask=jnp.array([True, True, False])
  )
  weights = jax.jit(router.apply)({'peft': tree}, jnp.ones((1, 1, 2)), ctx)
  np.testing.assert_allclose(
    weights.combine_weights, [[[0.75, 0.25, 0]]], rtol=1e-6
  )


def test_poly_weights_each_split_of_a_task_apart():
  router = ROUTERS['poly'].module(experts=3, tasks=('a',), splits=2)
  table = normal('table', 2, 2, 3)
  tree = {'table': jnp.asarray(table, jnp.float32)}
  ctx = Context(task_ids=jnp.ones((1, 1), jnp.int32))
  routing = jax.jit(router.apply)({'peft': tree}, jnp.ones((1, 1, 5)), ctx)
  expected = [equations.poly(part) for part in table[1]]
  np.testing.assert_allclose(routing.combine_weights[0, 0], expected, rtol=1e-5)


def test_poly_draws_a_relaxed_bernoulli_variable_for_each_example():
  router = ROUTERS['poly'].module(experts=2, tasks=('a',))
  tree = {'table': jnp.array([[0.0, 0.0], [1.0, 1.0]])}
  rows = 4001
  ctx = Context(task_ids=jnp.ones((rows, 3), jnp.int32), train=True)
  weights = jax.jit(router.apply)(
    {'peft': tree},
    jnp.ones((rows, 3, 2)),
    ctx,
    rngs={'router': jax.random.key(0)},
  ).combine_weights
  np.testing.assert_array_equal(weights[:, :1], weights[:, 1:2])
  uniform = np.random.default_rng(0).random((rows, 2))
  expected = [equations.poly(1.0, u) for u in uniform]
  # Weights of both samples: mean and deviation of 4,001 draws of deviation
  # 0.2 have a standard error of 0.003 each; differences are below four.
  actual = np.asarray(weights[:, 0, 0])
  assert abs(actual.mean() - np.mean(expected, 0)[0]) < 0.02
  assert abs(actual.std() - np.std(expected, 0)[0]) < 0.02


def test_a_random_expert_of_an_example_has_all_the_weight_in_training():
  router = ROUTERS['random_then_mean'].module(experts=3)
  mask = jnp.array([True, True, False])
  ctx = Context(train=True, expert_mask=mask)
  draw = lambda seed: jax.jit(router.apply)(  # noqa: E731
    {}, jnp.ones((101, 3, 2)), ctx, rngs={'router': jax.random.key(seed)}
  )
  routing = draw(0)
  weights = np.asarray(routing.combine_weights)
  np.testing.assert_array_equal(weights[:, :1], weights[:, 1:2])
  assert set(np.unique(weights)) == {0, 1} and routing.sparse
  np.testing.assert_array_equal(weights.sum(-1), 1)
  # Binomial(101, 1/2) is within four deviations of 5 of its mean.
  assert 30 < weights[:, 0, 0].sum() < 71 and weights[..., 2].sum() == 0
  assert (weights != draw(1).combine_weights).any()


@pytest.mark.parametrize('name', ['task', 'poly'])
def test_a_router_of_tasks_needs_their_names(name):
  with pytest.raises(
    ValueError, match=f"write router={name}\\(tasks=\\['cola'"
  ):
    ROUTERS[name].module(experts=2).init(
      jax.random.key(0), jnp.ones((1, 2, 3)), context()
    )


def test_a_router_of_prompts_needs_to_know_them():
  with pytest.raises(ValueError, match='does not say what is trained'):
    ROUTERS['sentence'].module(experts=2).init(
      jax.random.key(0), jnp.ones((1, 2, 3)), Context()
    )


def test_experts_of_sentences_are_dropped_for_all_tokens_of_an_example():
  router = ROUTERS['sentence'].module(experts=E, dropout=0.5)
  ctx = context(train=True)
  routing, _ = router.init_with_output(
    {'peft': jax.random.key(0), 'router': jax.random.key(1)},
    jnp.asarray(X, jnp.float32),
    ctx,
  )
  dropped = np.asarray(routing.combine_weights == 0)
  patterns = []
  for row, tokens, _, _ in EXAMPLES:
    assert (dropped[row, tokens] == dropped[row, tokens][:1]).all()
    patterns.append(tuple(dropped[row, tokens][0]))
  assert len(set(patterns)) > 1

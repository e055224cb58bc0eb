# SPDX-License-Identifier: Apache-2.0
"""A budget is solved within 1 %, and a scale is that of its baseline."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft import config as config_lib
from moepeft.checkpoints import solve_method
from moepeft.checkpoints.count_parameters import count
from moepeft.checkpoints.solve_method import with_explicit_method
from moepeft.core.types import Context
from moepeft.runs.resume import with_stored_method
from moepeft.runs.run import Run

from .. import commands
from ..peft.test_semantics import adapter, call, normal, projection

T5_TINY = {'model.path': 'package:t5_tiny'}
# Shapes alone.
LLAMA = {'model.path': '', 'model.family': 'llama', 'model.size': 'tiny'}
SMOLLM2 = {**LLAMA, 'model.size': 'smollm2-135m'}
# They have mixtures of other sites, experts, routers and ways to share arrays.
PRESETS = (
  'molora',
  'mola',
  'hydralora',
  'adamole',
  'dynmole',
  'ldmole',
  'loramoe',
  'smear',
  'comol',
  'mixlora',
  "poly(router=poly(tasks=['a', 'b']))",
)

# Steps of their rank are larger than 2 % of the budgets below.
TOO_COARSE = (
  'molora',
  'mola(experts=5)',
  'adamole',
  'dynmole',
  'ldmole',
  'loramoe',
  'smear',
  'comol',
  'mixlora',
  "poly(router=poly(tasks=['a', 'b']))",
)


def config_of(method, base=LLAMA, **changes):
  config = config_lib.default()
  config.update_from_flattened_dict({**base, 'method': method, **changes})
  return config


def solve(method, base=LLAMA, **changes):
  return with_explicit_method(config_of(method, base, **changes))


def error_of(method, **changes):
  with pytest.raises(ValueError) as error:
    solve(method, **changes)
  return str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('base', 'budget'),
  [(T5_TINY, 4_000_000), (SMOLLM2, 40_000_000)],
  ids=['t5_tiny', 'smollm2'],
)
@pytest.mark.parametrize('method', PRESETS)
def test_a_solved_budget_is_within_one_percent_by_count(method, base, budget):
  solved = solve(method, base, budget=f'params:{budget}')
  assert (solved.budget, solved.method == method) == ('', False)
  assert abs(count(solved)['peft'] - budget) <= 0.01 * budget


@pytest.mark.slow
@pytest.mark.parametrize(
  ('base', 'budget'),
  [(T5_TINY, 540_000), (SMOLLM2, 11_940_000)],
  ids=['t5_tiny', 'smollm2'],
)
@pytest.mark.parametrize('method', TOO_COARSE)
def test_rank_and_experts_together_meet_a_budget_that_no_rank_meets(
  method, base, budget
):
  request = {'budget': f'params:{budget}'}
  with pytest.raises(ValueError, match='within 1 %'):
    solve(method, base, **request)
  size = 'size' if method == 'smear' else 'rank'
  solved = solve(method, base, **request, budget_option=f'{size},experts')
  assert abs(count(solved)['peft'] - budget) <= 0.01 * budget


@pytest.mark.parametrize(
  ('method', 'changes', 'solved'),
  [
    # A decoder of 4 layers: d 128, q 128, k and v 64, f 352. A column of rank
    # has in + out numbers at a site: q 256, k and v 192, o 256, gate and down
    # 480, which is 1,856 a layer and 7,424 in all. 10 of them are 74,240.
    ('lora', {'budget': 'params:74240'}, 'lora(rank=10)'),
    pytest.param(
      'lora(rank=300)',
      {'budget': 'params:74240'},
      'lora(rank=10)',
      marks=pytest.mark.slow,
    ),
    pytest.param(
      'lora',
      {'budget': 'params:lora(rank=7)'},
      'lora(rank=7)',
      marks=pytest.mark.slow,
    ),
    pytest.param(
      "lora(budget='params:74240')", {}, 'lora(rank=10)', marks=pytest.mark.slow
    ),
    # An expert of rank 2 has 14,848, and 4 routers' columns, 128 five times and
    # 352: 3,968.
    pytest.param(
      'molora(rank=2)',
      {'budget': 'params:94080', 'budget_option': 'experts'},
      'molora(rank=2, experts=5)',
      marks=pytest.mark.slow,
    ),
    (
      "lora(rank=1) + molora(experts=5, budget='params:101504')",
      {},
      'lora(rank=1) + molora(experts=5, rank=2)',
    ),
    # 6 experts of rank 2 have 14,848 + 3,968 each. 5 of rank 2 have 94,080, of
    # rank 3 131,200.
    pytest.param(
      "molora(experts=5, budget='params:112896', budget_option='rank,experts')",
      {},
      'molora(experts=6, rank=2)',
      marks=pytest.mark.slow,
    ),
    pytest.param(
      'lora(rank=1) + mixture(expert=lora, experts=5)',
      {'budget': 'params:101504'},
      'lora(rank=1) + mixture(expert=lora(rank=2), experts=5)',
      marks=pytest.mark.slow,
    ),
    # The two ranks 1 and 2 of rank 2's arrays, as count has them: 22,272, and
    # two experts' routers, 7,936.
    pytest.param(
      "molora(ranks=[1, 2]) + lora(budget='params:37632')",
      {},
      'molora(ranks=[1, 2]) + lora(rank=1)',
      marks=pytest.mark.slow,
    ),
    ('lora(rank=8)', {'scale': 'matched'}, 'lora(rank=8, alpha=32.0)'),
    (
      "ia3 + lora(rank=3, scale='matched:lora(rank=2, alpha=10)')",
      {},
      'ia3 + lora(rank=3, alpha=15.0)',
    ),
    (
      "mixture(expert=[lora(rank=2), bottleneck(targets='*/mlp')], experts=2)",
      {'scale': 'matched'},
      'mixture(expert=[lora(rank=2, alpha=8.0), '
      "bottleneck(targets='*/mlp')], experts=2)",
    ),
  ],
)
def test_the_solved_method_is_written_out(method, changes, solved):
  assert solve(method, **changes).method == solved


@pytest.mark.slow
def test_a_percent_is_that_of_the_base():
  base = count(config_of('full'))['params']
  solved = solve('lora', budget='params:9.2%')
  assert abs(count(solved)['peft'] - 0.092 * base) <= 0.01 * 0.092 * base


@pytest.mark.parametrize(
  ('method', 'changes', 'message'),
  [
    (
      'lora',
      {'budget': 'params:11000'},
      'no rank of lora gives 11,000 parameters within 1 %: rank=1 gives 7,424 '
      'and rank=2 gives 14,848; ask for one of these, ',
    ),
    ('lora', {'budget': 'params:100'}, ' 1 %: rank=1 gives 7,424; ask for one'),
    # Three experts are the fewest of three for each token.
    pytest.param(
      'molora(experts=4, rank=1, router=topk(k=3))',
      {'budget': 'params:9000', 'budget_option': 'experts'},
      'experts=3 gives 34,176 (2 is not possible: ',
      marks=pytest.mark.slow,
    ),
    ('lora', {'budget': '1000'}, "a budget is written like 'params:4976640'"),
    ('lora', {'budget': 'params:-1'}, 'a budget is written like'),
    ('lora', {'budget': 'params:1,000'}, 'a budget is written like'),
    ('lora', {'budget': 'params:nan'}, 'a budget is written like'),
    ('lora', {'budget': 'params:wora'}, "there is no method 'wora'; did you"),
    (
      'lora',
      {'budget': 'params:abc'},
      "budget='params:abc' is neither a number, a percent nor a method: there "
      "is no method 'abc'; ",
    ),
    ('lora', {'budget_option': 'rank'}, 'does nothing without a budget beside'),
    ("lora(budget_option='rank')", {}, "budget_option='rank' does nothing "),
    (
      'lora',
      {'budget_option': 'rank', 'scale': 'matched'},
      "budget_option='rank' does nothing without a budget beside it; set both",
    ),
    (
      "lora(budget_option='rank') + lora(budget='params:10')",
      {},
      "budget_option='rank' does nothing without a budget beside it; set both",
    ),
    (
      'molora',
      {'budget': 'params:10', 'budget_option': 'rank, rank'},
      "is an option like rank, or two with a comma, rank,experts; got 'rank, ",
    ),
    (
      'molora',
      {'budget': 'params:10', 'budget_option': 'rank,'},
      'is an option like rank, or two with a comma, rank,experts; got ',
    ),
    (
      'lora',
      {'budget': 'params:10', 'budget_option': 'rank,experts'},
      'lora has no option experts to solve a budget for; set ',
    ),
    pytest.param(
      'molora',
      {'budget': 'params:10', 'budget_option': 'rank,experts'},
      # 7,424 for each expert of rank 1 and 3,968 of its router, twice.
      'no rank with any experts of molora gives 10 parameters within 1 %: '
      'rank=1, experts=2 gives 22,784; ask for',
      marks=pytest.mark.slow,
    ),
    ('bitfit', {'budget': 'params:10'}, 'bitfit has no option like rank or'),
    (
      'lora',
      {'budget': 'params:10', 'budget_option': 'experts'},
      'lora has no option experts to solve a budget for; set '
      'config.budget_option to one of rank',
    ),
    (
      'mola',
      {'budget': 'params:10', 'budget_option': 'experts'},
      "mola has experts_per_layer='inverted_triangle', so that a budget cannot",
    ),
    (
      'molora(ranks=[1, 2])',
      {'budget': 'params:10'},
      'has ranks=(1, 2), so that a budget cannot be solved for rank; ',
    ),
    (
      'lora + bitfit',
      {'budget': 'params:10'},
      "does not say which adapter of 'lora + bitfit' is solved; give it as ",
    ),
    (
      "lora(budget='params:10')",
      {'budget': 'params:10'},
      'a method has one budget, of all its adapters; ',
    ),
    ('lora', {'scale': 'equal'}, "a scale is 'matched', alpha / r of lora(r"),
    ('lora', {'scale': 'matched:ia3'}, 'is one adapter with alpha and rank, '),
    ('mov', {'scale': 'matched'}, 'mov has no alpha and rank, so that its '),
    ("mov(scale='matched')", {}, 'mov has no alpha and rank, so that its '),
    (
      "lora(scale='matched')",
      {'scale': 'matched'},
      'the scale is given twice; give config.scale, for all adapters, or the ',
    ),
    (
      'molora(ranks=[1, 2])',
      {'scale': 'matched'},
      'molora has ranks, whose experts have scales of their own; leave ',
    ),
  ],
)
def test_a_request_that_cannot_be_solved_is_one_sentence(
  method, changes, message
):
  error = error_of(method, **changes)
  assert message in error
  assert len(error.splitlines()) == 1


@pytest.mark.slow
def test_the_nearest_value_is_taken_where_the_caller_allows_its_error():
  # 12,000 is nearer to 14,848 than to 7,424.
  changes = {'budget': 'params:12000', 'budget_tolerance': 0.5}
  assert solve('lora', **changes).method == 'lora(rank=2)'


def test_nothing_is_built_from_a_request_that_is_not_solved():
  with pytest.raises(ValueError, match="^'lora; budget=params:100' is not "):
    count(config_of('lora', budget='params:100'))
  with pytest.raises(ValueError, match='budget is an option of config.method '):
    adapter("lora(budget='params:100')")


def test_an_explicit_method_is_not_changed():
  config = config_of('bottleneck(scale=2.0)')
  assert with_explicit_method(config) is config


# {method: the scale of its term, without a match}; the baseline has 16 / 4.
# mixlora adapts whole feed-forwards, whose output is no product to scale.
SCALED = {
  'lora(rank=9)': 16 / 9,
  'lora(rank=9, rslora=True)': 16 / 3,
  'moslora(rank=7)': 16 / 7,
  'molora(experts=3, rank=7)': 16 / 7,
  "hydralora(experts=3, rank=7, targets='*/self/k')": 32 / 7,
  'mola(experts=3, rank=7)': 16 / 7,
  "loramoe(experts=3, rank=7, targets='*/self/k')": 32 / 7,
  'hmora(experts=3, rank=9)': 8 / 3,
  'lily(rank=7)': 16 / 7,
  'mixture(expert=lora(rank=16, rslora=True), experts=3)': 16 / 4,
}


def term(method):
  """The adapter's output, all experts with the same A and B of rank 4."""
  f, x, y, inside, outside = projection('q')
  module = adapter(method)
  real = jnp.ones(x.shape[:2], bool)
  ctx = Context(token_mask=real, prompt_mask=real)
  keys = {name: jax.random.key(0) for name in ('params', 'router', 'dropout')}
  tree = module.init(keys, f, jnp.asarray(x, jnp.float32), ctx)['peft']
  a, b = normal('a', *inside, 4), normal('b', 4, *outside)
  # Columns of zeros give any rank the same product.
  more = tree['a'].shape[-1] - 4
  a = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, more)])
  b = np.pad(b, [(0, more)] + [(0, 0)] * (b.ndim - 1))
  # Experts are the last axis but one of A, if it has them, and the first of B.
  if tree['a'].ndim > a.ndim:
    a = a[..., None, :]
  tree |= {
    'a': np.broadcast_to(a, tree['a'].shape),
    'b': np.broadcast_to(b, tree['b'].shape),
  }
  if 'core' in tree:
    tree['core'] = np.eye(4 + more)
  return call(module, tree, f, x, ctx) - y


@pytest.mark.parametrize(
  'method',
  [
    method
    if 'molora' in method
    else pytest.param(method, marks=pytest.mark.slow)
    for method in SCALED
  ],
)
def test_a_matched_scale_gives_the_norm_of_the_baseline_at_equal_weights(
  method,
):
  baseline = np.linalg.norm(term('lora(rank=4)'))
  matched = solve(method, T5_TINY, scale='matched').method
  # float32, and the weights of experts sum to one within rounding.
  np.testing.assert_allclose(np.linalg.norm(term(matched)), baseline, rtol=1e-5)
  np.testing.assert_allclose(
    np.linalg.norm(term(method)), baseline * SCALED[method] / 4, rtol=1e-5
  )


def test_count_prints_the_solved_method():
  options = [f'--config.{key}={value}' for key, value in LLAMA.items()]
  result = commands.run(
    'moepeft.count',
    *options,
    '--config.method=lora',
    '--config.budget=params:74240',
    '--config.scale=matched',
    '--noflops',
  )
  counts = json.loads(result.stdout)
  assert (counts['method'], counts['peft']) == (
    'lora(rank=10, alpha=40.0)',
    74_240,
  )


def test_a_resumed_run_keeps_its_method_and_does_not_solve(
  tmp_path, monkeypatch
):
  config = config_of('lora', budget='params:74240', scale='matched')
  run = Run(str(tmp_path))
  assert with_stored_method(run, config) is config
  started = with_explicit_method(config)
  (tmp_path / 'config.json').write_text(started.to_json())
  (tmp_path / 'checkpoints' / '2').mkdir(parents=True)
  # A run's config needs no solver.
  assert run.load_config().method == 'lora(rank=10, alpha=40.0)'
  monkeypatch.setattr(solve_method, 'count', None)
  resumed = with_explicit_method(with_stored_method(run, config))
  assert resumed.to_json() == started.to_json()
  other = config_of('lora', budget='params:75000', scale='matched')
  assert with_stored_method(run, other) is other

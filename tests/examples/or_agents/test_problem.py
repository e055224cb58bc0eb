# SPDX-License-Identifier: Apache-2.0
"""A problem survives its compact JSON form, and two solvers agree about it."""

import json

import pytest

from examples.or_agents import problem as problem_lib
from examples.or_agents.problem import Constraint, Problem, Variable, solve

# max 3 x + 5 y, x <= 4, 2 y <= 12, 3 x + 2 y <= 18: the corner (2, 6) has 36
# (Hillier and Lieberman's Wyndor Glass).
GLASS = Problem(
  'max',
  (Variable('doors'), Variable('windows')),
  (3, 5),
  (
    Constraint((1, 0), '<=', 4),
    Constraint((0, 2), '<=', 12),
    Constraint((3, 2), '<=', 18),
  ),
  'glass',
)
# Bounds, a free variable, decimals and all types: min x - y + 0.5 z, x >= -2,
# z in {0, 1}, y <= 2.5 whole, x + z >= -1: x = -2, z = 1 costs -1.5 - y, and
# x = -1, z = 0 costs -1 - y; y = 2. So the optimum is -3.5.
MIXED = Problem(
  'min',
  (
    Variable('x1', 'continuous', -2, None),
    Variable('x2', 'integer', None, 2.5),
    Variable('x3', 'binary', 0, 1),
  ),
  (1, -1, 0.5),
  (Constraint((1, 0, 1), '>=', -1),),
)
SOLVERS = [pytest.param(name, id=name) for name in problem_lib.SOLVERS]


@pytest.fixture(params=SOLVERS)
def solver(request):
  pytest.importorskip({'highs': 'highspy', 'scip': 'pyscipopt'}[request.param])
  return request.param


@pytest.mark.parametrize('by_variable', (False, True))
@pytest.mark.parametrize('problem', (GLASS, MIXED))
def test_json_and_back(problem, by_variable):
  assert Problem.from_json(problem.to_json(by_variable)) == problem


def test_json_is_short():
  plain = Problem('max', (Variable('x1'),), (2.0,), (Constraint((1,), '=', 3),))
  assert plain.to_json() == '{"s":"max","v":"c","o":[2],"c":[[1,"=",3]]}'
  assert plain.to_json(by_variable=True) == (
    '{"s":"max","x":{"x1":[2,1]},"v":"c","c":[["=",3]]}'
  )


@pytest.mark.parametrize(
  ('edit', 'reason'),
  (
    ({'x': [[1, 2]]}, '"x" is an object'),
    ({'x': {'a': 3, 'b': [1, 2]}}, '"x" of a is a list'),
    ({'x': {'a': [3], 'b': [1, 2]}}, '"x" of a has'),
    ({'x': {'a': [3, 4], 'b': [1, None]}}, 'is a number'),
    ({'x': {}}, '"n" has 2 entries'),
    ({'c': [[1, 2, '<=', 3]]}, 'constraint 1 has 2 entries'),
    ({'o': [1, 2]}, "not known: 'o'"),
    ({'v': 'c'}, '"n" has 1 entries'),
  ),
)
def test_a_malformed_form_by_variable_has_one_reason(edit, reason):
  plain = Problem(
    'max',
    (Variable('a'), Variable('b')),
    (3, 5),
    (Constraint((1, 2), '<=', 8),),
  )
  form = json.loads(plain.to_json(by_variable=True)) | edit
  with pytest.raises(ValueError) as e:
    Problem.from_json(json.dumps(form))
  assert reason in str(e.value)


@pytest.mark.parametrize(
  ('edit', 'reason'),
  (
    ({'s': 'most'}, "the sense is 'max' or 'min'"),
    ({'s': None}, "the sense is 'max' or 'min'"),
    ({'v': 'cx'}, 'letters c, i and b'),
    ({'v': ['c', 'c']}, 'letters c, i and b'),
    ({'v': ''}, '"n" has 0 entries'),
    ({'o': [1]}, '"o" has 2 entries'),
    ({'o': [1, True]}, 'is a number; got True'),
    ({'o': [1, '2']}, "is a number; got '2'"),
    ({'o': [1, 1e300]}, 'is a number of at most 1e+12'),
    ({'o': [1, float('nan')]}, 'is a number of at most 1e+12'),
    ({'o': {'x': 1}}, '"o" is a list'),
    ({'c': [[1, 2, '<=']]}, 'constraint 1 has 4 entries'),
    ({'c': [[1, 2, '<', 3]]}, "is one of <=, >=, =; got '<'"),
    ({'c': [[1, 2, ['<='], 3]]}, 'is one of <=, >=, ='),
    ({'c': [[1, 2, '<=', None]]}, 'right-hand side of constraint 1'),
    ({'c': 3}, '"c" is a list'),
    ({'l': [5, 0], 'u': [4, None]}, 'above its upper one'),
    ({'n': ['a', 'a']}, 'two variables have one name'),
    ({'n': [1, 'a']}, '"n" is a list of texts'),
    ({'name': 3}, '"name" is a text'),
    ({'y': 3}, "not known: 'y'"),
    ({'v': 'cb', 'u': [None, 2]}, 'within 0 and 1'),
  ),
)
def test_a_malformed_formulation_has_one_reason(edit, reason):
  form = json.loads(GLASS.to_json()) | edit
  with pytest.raises(ValueError) as e:
    Problem.from_json(json.dumps(form))
  assert reason in str(e.value)


@pytest.mark.parametrize(
  'text',
  (
    '',
    '{',
    '[]',
    '{"s":"max"}',
    '[' * 100_000,
    '{"s":"max","s":"min"}',
    '1' * 9999,
  ),
)
def test_what_is_no_formulation_is_refused(text):
  with pytest.raises(ValueError):
    Problem.from_json(text)


def test_known_optima(solver):
  for problem, value in ((GLASS, 36), (MIXED, -3.5)):
    solution = solve(problem, solver)
    assert solution.status == 'optimal'
    assert solution.value == pytest.approx(value, abs=1e-7)


def test_a_problem_without_optimum_has_its_status(solver):
  x = (Variable('x1'),)
  unbounded = Problem('max', x, (1,), (Constraint((1,), '>=', 1),))
  infeasible = Problem(
    'max', x, (1,), (Constraint((1,), '<=', 1), Constraint((1,), '>=', 2))
  )
  never = Problem('max', x, (-1,), (Constraint((0,), '>=', 1),))
  assert solve(unbounded, solver).status == 'unbounded'
  assert solve(infeasible, solver).status == 'infeasible'
  assert solve(never, solver).status == 'infeasible'
  assert solve(infeasible, solver).value is None


def test_an_integer_gap_is_closed(solver):
  # HiGHS stops at a gap of 1e-4 by default: 100,001 would pass for 100,002.
  problem = Problem(
    'max',
    (Variable('x1', 'integer', 0, 1), Variable('x2', 'integer', 0, 1)),
    (100_001, 100_002),
    (Constraint((1, 1), '<=', 1),),
  )
  assert solve(problem, solver).value == pytest.approx(100_002, abs=1e-6)


def test_a_missing_package_is_named(monkeypatch):
  def fail(name):
    raise ImportError(name)

  monkeypatch.setattr(problem_lib.importlib, 'import_module', fail)
  with pytest.raises(ImportError, match=r'pip install -e "\.\[or\]"'):
    solve(GLASS)


def test_an_unknown_solver_is_refused():
  with pytest.raises(ValueError, match='one of highs, scip; got glpk'):
    solve(GLASS, 'glpk')

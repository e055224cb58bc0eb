# SPDX-License-Identifier: Apache-2.0
"""A symbolic LP or MILP, its compact JSON form, and its solution.

The JSON form is short, so that a small model at byte level can write it:

  {"s":"max","v":"ic","o":[3,5],"c":[[2,1,"<=",40],[0,1,">=",2]],"u":[9,null]}

"s" is the sense, "v" a letter for each variable (c, i or b: continuous,
integer, binary), "o" the objective's coefficients, "c" the constraints, each
its coefficients, relation and right-hand side. "l" and "u" are the bounds and
are left out where all lower bounds are 0 and no upper bound is set; a binary
variable is in [0, 1]. "n" are the variables' names, left out where they are
x1, x2, ..., and "name" is the problem's. The same by variable, where numbers
stand beside the names that a text has beside them:

  {"s":"max","x":{"scarf":[3,2],"vest":[5,1]},"v":"ic","c":[["<=",40]]}

"x" has the name of each variable with its coefficients in the objective and in
each constraint, in place of "o", "n" and the coefficients of "c".
"""

import dataclasses
import importlib
import json
import math
from typing import Any

SENSES = ('max', 'min')
RELATIONS = ('<=', '>=', '=')
TYPES = ('continuous', 'integer', 'binary')
SOLVERS = ('highs', 'scip')
# Solvers treat larger numbers as infinite or lose digits.
LARGEST = 1e12


@dataclasses.dataclass(frozen=True)
class Variable:
  """A decision variable.

  Attributes:
    name: unique in the problem.
    type: 'continuous', 'integer' or 'binary'.
    lower, upper: bounds; None for no bound.
  """

  name: str
  type: str = 'continuous'
  lower: float | None = 0
  upper: float | None = None


@dataclasses.dataclass(frozen=True)
class Constraint:
  """A linear constraint: sum of coefficients times variables, relation, right.

  Attributes:
    coefficients: one number for each variable of the problem.
    relation: '<=', '>=' or '='.
    right: the right-hand side.
  """

  coefficients: tuple[float, ...]
  relation: str
  right: float


@dataclasses.dataclass(frozen=True)
class Problem:
  """A linear program, with integer variables or without.

  Attributes:
    sense: 'max' or 'min'.
    variables: at least one.
    objective: one coefficient for each variable.
    constraints: any number.
    name: any text.

  Raises:
    ValueError: a part is malformed, or the parts do not fit together.
  """

  sense: str
  variables: tuple[Variable, ...]
  objective: tuple[float, ...]
  constraints: tuple[Constraint, ...] = ()
  name: str = ''

  def __post_init__(self):
    if self.sense not in SENSES:
      raise ValueError(f"the sense is 'max' or 'min'; got {self.sense!r}")
    if not self.variables:
      raise ValueError('a problem has at least one variable; got none')
    names = [variable.name for variable in self.variables]
    if len(set(names)) != len(names):
      raise ValueError(f'two variables have one name: {", ".join(names)}')
    for variable in self.variables:
      _check_variable(variable)
    self._check_row('the objective', self.objective)
    for i, constraint in enumerate(self.constraints, 1):
      where = f'constraint {i}'
      self._check_row(where, constraint.coefficients)
      if constraint.relation not in RELATIONS:
        raise ValueError(
          f'the relation of {where} is one of {", ".join(RELATIONS)}; got '
          f'{constraint.relation!r}'
        )
      _check_number(f'the right-hand side of {where}', constraint.right)

  def _check_row(self, where: str, coefficients: tuple[float, ...]) -> None:
    if len(coefficients) != len(self.variables):
      raise ValueError(
        f'{where} has {len(coefficients)} coefficients; the problem has '
        f'{len(self.variables)} variables'
      )
    for coefficient in coefficients:
      _check_number(f'a coefficient of {where}', coefficient)

  def to_json(self, by_variable: bool = False) -> str:
    """Returns the compact form, in one line."""
    variables = self.variables
    names = [variable.name for variable in variables]
    kinds = ''.join(variable.type[0] for variable in variables)
    objective = [_short(c) for c in self.objective]
    rows = [[*map(_short, c.coefficients)] for c in self.constraints]
    ends = [[c.relation, _short(c.right)] for c in self.constraints]
    form: dict[str, Any] = {'s': self.sense}
    if by_variable:
      columns = zip(objective, *rows, strict=True)
      form['x'] = dict(zip(names, map(list, columns), strict=True))
      form |= {'v': kinds, 'c': ends}
    else:
      form |= {'v': kinds, 'o': objective}
      form['c'] = [row + end for row, end in zip(rows, ends, strict=True)]
    binary = [variable.type == 'binary' for variable in variables]
    lower = [_short(variable.lower) for variable in variables]
    upper = [_short(variable.upper) for variable in variables]
    if any(bound != 0 for bound in lower):
      form['l'] = lower
    if any(
      bound != (1 if is_binary else None)
      for bound, is_binary in zip(upper, binary, strict=True)
    ):
      form['u'] = upper
    if not by_variable and names != default_names(len(names)):
      form['n'] = names
    if self.name:
      form['name'] = self.name
    return json.dumps(form, separators=(',', ':'), ensure_ascii=False)

  @classmethod
  def from_json(cls, text: str) -> 'Problem':
    """Reads the compact form, strictly.

    Raises:
      ValueError: one sentence about the first fault.
    """
    form = _read_object(text)
    kinds = form['v']
    letters = {kind[0]: kind for kind in TYPES}
    if not isinstance(kinds, str) or set(kinds) - set(letters):
      raise ValueError(
        f'"v" is a text of the letters c, i and b, one a variable; got '
        f'{kinds!r}'
      )
    count = len(kinds)
    upper = [1 if kind == 'b' else None for kind in kinds]
    lists = {
      key: _list(form.get(key, default), f'"{key}"', count)
      for key, default in (
        ('n', default_names(count)),
        ('l', [0] * count),
        ('u', upper),
        ('o', None),
      )
    }
    for name in lists['n']:
      if not isinstance(name, str):
        raise ValueError(f'"n" is a list of texts; got {name!r}')
    variables = tuple(
      Variable(name, letters[kind], low, high)
      for name, kind, low, high in zip(
        lists['n'], kinds, lists['l'], lists['u'], strict=True
      )
    )
    constraints = []
    for i, row in enumerate(_list(form['c'], '"c"'), 1):
      row = _list(row, f'constraint {i}', count + 2)
      constraints.append(Constraint(tuple(row[:-2]), row[-2], row[-1]))
    name = form.get('name', '')
    if not isinstance(name, str):
      raise ValueError(f'"name" is a text; got {name!r}')
    return cls(
      form['s'], variables, tuple(lists['o']), tuple(constraints), name
    )


@dataclasses.dataclass(frozen=True)
class Solution:
  """The outcome of a solver.

  Attributes:
    status: 'optimal', 'infeasible', 'unbounded', 'time' (the limit was reached
      before a proof) or 'error'.
    value: the optimal value; None unless optimal.
    point: the variables' values; empty unless optimal.
  """

  status: str
  value: float | None = None
  point: tuple[float, ...] = ()


def default_names(count: int) -> list[str]:
  """The variables' names where a problem gives none: x1, x2, ..."""
  return [f'x{i}' for i in range(1, count + 1)]


def solve(
  problem: Problem, solver: str = 'highs', seconds: float = 10
) -> Solution:
  """Solves a problem to proven optimality, in one thread.

  Args:
    solver: 'highs' or 'scip'.
    seconds: the time limit.

  Raises:
    ValueError: there is no such solver.
    ImportError: its package is not installed; the sentence says what to do.
  """
  if solver not in SOLVERS:
    raise ValueError(f'the solver is one of {", ".join(SOLVERS)}; got {solver}')
  run = _solve_highs if solver == 'highs' else _solve_scip
  solution = run(problem, seconds)
  if solution.status == 'infeasible or unbounded':
    # Presolve proves only that; without an objective one of the two is left.
    zeros = (0,) * len(problem.variables)
    feasible = run(dataclasses.replace(problem, objective=zeros), seconds)
    status = 'unbounded' if feasible.status == 'optimal' else feasible.status
    return Solution(status)
  return solution


def _solve_highs(problem: Problem, seconds: float) -> Solution:
  highspy = _package('highspy')
  inf = highspy.kHighsInf

  class SilentHighs(highspy.Highs):
    def enableCallbacks(self):
      # The constructor calls it, and it prints a banner unless output is off.
      self.setOptionValue('output_flag', False)
      super().enableCallbacks()

  highs = SilentHighs()
  for option, value in (
    ('threads', 1),
    ('time_limit', float(seconds)),
    ('mip_rel_gap', 0.0),
    ('mip_abs_gap', 0.0),
  ):
    highs.setOptionValue(option, value)
  for i, variable in enumerate(problem.variables):
    lower, upper = variable.lower, variable.upper
    highs.addVar(
      -inf if lower is None else lower, inf if upper is None else upper
    )
    highs.changeColCost(i, problem.objective[i])
    if variable.type != 'continuous':
      highs.changeColIntegrality(i, highspy.HighsVarType.kInteger)
  for constraint in problem.constraints:
    columns = [i for i, c in enumerate(constraint.coefficients) if c]
    right = constraint.right
    highs.addRow(
      -inf if constraint.relation == '<=' else right,
      inf if constraint.relation == '>=' else right,
      len(columns),
      columns,
      [float(constraint.coefficients[i]) for i in columns],
    )
  maximize = problem.sense == 'max'
  sense = highspy.ObjSense
  highs.changeObjectiveSense(sense.kMaximize if maximize else sense.kMinimize)
  highs.run()
  statuses = highspy.HighsModelStatus
  status = {
    statuses.kOptimal: 'optimal',
    statuses.kInfeasible: 'infeasible',
    statuses.kUnbounded: 'unbounded',
    statuses.kUnboundedOrInfeasible: 'infeasible or unbounded',
    statuses.kTimeLimit: 'time',
  }.get(highs.getModelStatus(), 'error')
  if status != 'optimal':
    return Solution(status)
  value = highs.getInfo().objective_function_value
  return Solution(status, value, tuple(highs.getSolution().col_value))


def _solve_scip(problem: Problem, seconds: float) -> Solution:
  pyscipopt = _package('pyscipopt')
  model = pyscipopt.Model()
  model.hideOutput()
  model.setParam('limits/time', float(seconds))
  variables = [
    model.addVar(
      f'x{i}',
      vtype='C' if variable.type == 'continuous' else 'I',
      lb=variable.lower,
      ub=variable.upper,
    )
    for i, variable in enumerate(problem.variables)
  ]
  for constraint in problem.constraints:
    left = pyscipopt.quicksum(
      c * x for c, x in zip(constraint.coefficients, variables, strict=True)
    )
    # A constraint without variables is not one of SCIP's: a fixed variable
    # keeps it, so that 0 >= 1 stays infeasible.
    if not any(constraint.coefficients):
      left = left + model.addVar(lb=0, ub=0)
    model.addCons(
      left <= constraint.right
      if constraint.relation == '<='
      else left >= constraint.right
      if constraint.relation == '>='
      else left == constraint.right
    )
  model.setObjective(
    pyscipopt.quicksum(
      c * x for c, x in zip(problem.objective, variables, strict=True)
    ),
    'maximize' if problem.sense == 'max' else 'minimize',
  )
  model.optimize()
  status = {
    'optimal': 'optimal',
    'infeasible': 'infeasible',
    'unbounded': 'unbounded',
    'inforunbd': 'infeasible or unbounded',
    'timelimit': 'time',
  }.get(model.getStatus(), 'error')
  if status != 'optimal':
    return Solution(status)
  point = tuple(model.getVal(x) for x in variables)
  return Solution(status, model.getObjVal(), point)


def _package(name: str) -> Any:
  try:
    return importlib.import_module(name)
  except ImportError as e:
    raise ImportError(
      f'solving needs the package {name}: pip install -e ".[or]"'
    ) from e


def _check_variable(variable: Variable) -> None:
  name = variable.name
  if variable.type not in TYPES:
    raise ValueError(
      f'the type of {name} is one of {", ".join(TYPES)}; got {variable.type!r}'
    )
  for bound in (variable.lower, variable.upper):
    if bound is not None:
      _check_number(f'a bound of {name}', bound)
  lower = -math.inf if variable.lower is None else variable.lower
  upper = math.inf if variable.upper is None else variable.upper
  if lower > upper:
    raise ValueError(
      f'the lower bound of {name} is above its upper one: {lower} > {upper}'
    )
  if variable.type == 'binary' and (lower < 0 or upper > 1):
    raise ValueError(
      f'the binary variable {name} is within 0 and 1; got the bounds {lower} '
      f'and {upper}'
    )


def _check_number(where: str, number: Any) -> None:
  if isinstance(number, bool) or not isinstance(number, int | float):
    raise ValueError(f'{where} is a number; got {number!r}')
  if not abs(number) <= LARGEST:
    raise ValueError(
      f'{where} is a number of at most {LARGEST:g} in size; got {number!r:.40}'
    )


def _read_object(text: str) -> dict[str, Any]:
  """The JSON object of a text, with the right keys."""
  try:
    form = json.loads(text, object_pairs_hook=_unique_keys)
  except json.JSONDecodeError as e:
    raise ValueError(f'the formulation is not JSON: {e}') from e
  except RecursionError as e:
    raise ValueError('the formulation is nested too deeply') from e
  if not isinstance(form, dict):
    raise ValueError(
      f'the formulation is a JSON object; got {type(form).__name__}'
    )
  by_variable = 'x' in form
  missing = [
    key for key in ('sxvc' if by_variable else 'svoc') if key not in form
  ]
  if missing:
    raise ValueError(f'the formulation has no {", ".join(missing)}')
  keys = {*('sxvclu' if by_variable else 'svoclun'), 'name'}
  unknown = sorted(form.keys() - keys)
  if unknown:
    raise ValueError(
      f'the formulation has a key that is not known: {unknown[0]!r}'
    )
  return _by_constraint(form) if by_variable else form


def _by_constraint(form: dict[str, Any]) -> dict[str, Any]:
  """The form with "o", "n" and whole rows of "c" in place of "x"."""
  if not isinstance(form['x'], dict):
    raise ValueError(f'"x" is an object; got {form["x"]!r:.40}')
  ends = _list(form['c'], '"c"')
  columns = [
    _list(column, f'"x" of {name}', len(ends) + 1)
    for name, column in form['x'].items()
  ]
  rows = [
    [*(column[i] for column in columns), *_list(end, f'constraint {i}', 2)]
    for i, end in enumerate(ends, 1)
  ]
  objective = [column[0] for column in columns]
  return form | {'n': list(form['x']), 'o': objective, 'c': rows}


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  form = dict(pairs)
  if len(form) != len(pairs):
    raise ValueError('the formulation has a key twice')
  return form


def _list(value: Any, where: str, length: int | None = None) -> list[Any]:
  if not isinstance(value, list):
    raise ValueError(f'{where} is a list; got {value!r:.40}')
  if length is not None and len(value) != length:
    raise ValueError(f'{where} has {length} entries; got {len(value)}')
  return value


def _short(number: float | None) -> float | None:
  """2.0 as 2, which is the same number in fewer bytes."""
  if isinstance(number, float) and number.is_integer():
    return int(number)
  return number

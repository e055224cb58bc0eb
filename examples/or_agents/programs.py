# SPDX-License-Identifier: Apache-2.0
"""A problem as a program in each language of the agents, and wrong variants.

The programs print the line that examples/or_agents/execution.py reads.
"""

import dataclasses
from collections.abc import Iterator, Sequence

from examples.or_agents.problem import Constraint, Problem, Variable

_OPPOSITE = {'<=': '>=', '>=': '<=', '=': '<='}

_PYOMO = """import json

import pyomo.environ as pyo

model = pyo.ConcreteModel()
{variables}
model.objective = pyo.Objective(
  expr={objective},
  sense=pyo.{sense}imize,
)
{constraints}

solver = pyo.SolverFactory('appsi_highs')
results = solver.solve(model, load_solutions=False)
status = str(results.solver.termination_condition)
answer = {{'status': status, 'objective': None}}
if status == 'optimal':
  model.solutions.load_from(results)
  answer['objective'] = pyo.value(model.objective)
elif status == 'infeasibleOrUnbounded':
  answer['status'] = 'infeasible'
print(json.dumps(answer))
"""

_CVXPY = """import json

import cvxpy as cp

{variables}
constraints = [
{constraints}
]
problem = cp.Problem(cp.{sense}imize({objective}), constraints)
problem.solve(solver=cp.HIGHS)

answer = {{'status': problem.status, 'objective': None}}
if problem.status == 'optimal':
  answer['objective'] = float(problem.value)
elif problem.status == 'infeasible_or_unbounded':
  answer['status'] = 'infeasible'
print(json.dumps(answer))
"""

_PYSCIPOPT = """import json

from pyscipopt import Model

model = Model()
model.hideOutput()
{variables}
model.setObjective({objective}, '{sense}imize')
{constraints}
model.optimize()

status = model.getStatus()
answer = {{'status': status, 'objective': None}}
if status == 'optimal':
  answer['objective'] = model.getObjVal()
elif status == 'inforunbd':
  answer['status'] = 'infeasible'
print(json.dumps(answer))
"""


def program(problem: Problem, language: str) -> str:
  """Writes a problem in a language.

  Args:
    language: 'json', 'pyomo', 'cvxpy' or 'pyscipopt'.

  Raises:
    ValueError: there is no such language.
  """
  if language not in LANGUAGES:
    raise ValueError(
      f'the languages are {", ".join(LANGUAGES)}; got {language!r}'
    )
  return LANGUAGES[language](problem)


def wrong_variants(problem: Problem) -> Iterator[tuple[str, Problem]]:
  """Yields (fault, problem) for the mistakes that programs usually have.

  A variant may have the same optimal value as the problem.
  """
  replace = dataclasses.replace
  rows = problem.constraints
  sense = 'min' if problem.sense == 'max' else 'max'
  yield 'the objective has the wrong direction', replace(problem, sense=sense)
  for i, row in enumerate(rows):
    relation = replace(row, relation=_OPPOSITE[row.relation])
    yield (
      f'constraint {i + 1} has the wrong relation',
      replace(problem, constraints=(*rows[:i], relation, *rows[i + 1 :])),
    )
    yield (
      f'constraint {i + 1} is missing',
      replace(problem, constraints=rows[:i] + rows[i + 1 :]),
    )
    columns = [j for j, c in enumerate(row.coefficients) if c]
    if len(columns) > 1:
      yield (
        f'two coefficients of constraint {i + 1} are exchanged',
        replace(
          problem,
          constraints=(
            *rows[:i],
            replace(row, coefficients=_exchanged(row.coefficients, columns)),
            *rows[i + 1 :],
          ),
        ),
      )
  columns = [j for j, c in enumerate(problem.objective) if c]
  if len(columns) > 1:
    yield (
      'two coefficients of the objective are exchanged',
      replace(problem, objective=_exchanged(problem.objective, columns)),
    )
  for kind, new in (('integer', 'continuous'), ('continuous', 'integer')):
    if any(variable.type == kind for variable in problem.variables):
      yield (
        f'{kind} variables are {new}',
        replace(
          problem,
          variables=tuple(
            replace(v, type=new) if v.type == kind else v
            for v in problem.variables
          ),
        ),
      )


def linear_terms(coefficients: Sequence[float], names: Sequence[str]) -> str:
  """'2 * x1 + x3 - 4 * x4', without the terms that are zero."""
  text = ''
  for coefficient, name in zip(coefficients, names, strict=True):
    if coefficient:
      sign = '-' if coefficient < 0 else '+'
      size = abs(coefficient)
      term = name if size == 1 else f'{size} * {name}'
      text += f' {sign} {term}' if text else f'{"-" * (sign == "-")}{term}'
  return text or f'0 * {names[0]}'


def _exchanged(
  coefficients: Sequence[float], columns: Sequence[int]
) -> tuple[float, ...]:
  """The coefficients with those of the first and last column exchanged."""
  first, last = columns[0], columns[-1]
  exchanged = list(coefficients)
  exchanged[first], exchanged[last] = coefficients[last], coefficients[first]
  return tuple(exchanged)


def _comparison(row: Constraint, names: Sequence[str]) -> str:
  relation = '==' if row.relation == '=' else row.relation
  return f'{linear_terms(row.coefficients, names)} {relation} {row.right}'


def _pyomo(problem: Problem) -> str:
  domains = {'continuous': 'Reals', 'integer': 'Integers', 'binary': 'Binary'}
  names = [f'model.x{i + 1}' for i in range(len(problem.variables))]
  return _PYOMO.format(
    sense=problem.sense,
    variables='\n'.join(
      f'{name} = pyo.Var(domain=pyo.{domains[v.type]}, '
      f'bounds=({v.lower}, {v.upper}))'
      for name, v in zip(names, problem.variables, strict=True)
    ),
    objective=linear_terms(problem.objective, names),
    constraints='\n'.join(
      f'model.c{i} = pyo.Constraint(expr={_comparison(row, names)})'
      for i, row in enumerate(problem.constraints, 1)
    ),
  )


def _cvxpy(problem: Problem) -> str:
  options = {
    'continuous': '',
    'integer': 'integer=True',
    'binary': 'boolean=True',
  }
  names = [f'x{i + 1}' for i in range(len(problem.variables))]
  bounds = [
    f'{name} {relation} {bound}'
    for name, v in zip(names, problem.variables, strict=True)
    for relation, bound in (('>=', v.lower), ('<=', v.upper))
    if bound is not None and v.type != 'binary'
  ]
  rows = [_comparison(row, names) for row in problem.constraints]
  return _CVXPY.format(
    sense=problem.sense.capitalize(),
    variables='\n'.join(
      f'{name} = cp.Variable({options[v.type]})'
      for name, v in zip(names, problem.variables, strict=True)
    ),
    objective=linear_terms(problem.objective, names),
    constraints='\n'.join(f'  {line},' for line in bounds + rows),
  )


def _pyscipopt(problem: Problem) -> str:
  names = [f'x{i + 1}' for i in range(len(problem.variables))]

  def declaration(name: str, variable: Variable) -> str:
    letter = variable.type[0].upper()
    bounds = f'lb={variable.lower}, ub={variable.upper}'
    return f"{name} = model.addVar('{name}', vtype='{letter}', {bounds})"

  return _PYSCIPOPT.format(
    sense=problem.sense,
    variables='\n'.join(map(declaration, names, problem.variables)),
    objective=linear_terms(problem.objective, names),
    constraints='\n'.join(
      f'model.addCons({_comparison(row, names)})' for row in problem.constraints
    ),
  )


LANGUAGES = {
  'json': Problem.to_json,
  'pyomo': _pyomo,
  'cvxpy': _cvxpy,
  'pyscipopt': _pyscipopt,
}

# SPDX-License-Identifier: Apache-2.0
"""Rows to train the agents on, from solved problems.

Prompts are those of examples/or_agents/pipeline.py. Files by name:

  components, formulation        conversations of the first two agents
  verify_components,             drafts, half of them with a fault, and what
  verify_formulation             the verifier answers
  pyomo, cvxpy, pyscipopt, json  programs of each language
  repair_error,                  a program that does not run or that has no
  repair_no_optimum              optimum, and its repair
  direct                         text -> JSON, as inputs and targets
  pairs                          a right and a wrong program, by the solver

All but direct and pairs are OpenAI's messages (config.data.source=chat); direct
is for config.data.source=jsonl, pairs for preference. python -m moepeft.data
shows what a model would see of them.
"""

import collections
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from examples.or_agents import languages
from examples.or_agents.families import Instance
from examples.or_agents.problem import Problem, solve
from examples.or_agents.programs import (
  LANGUAGES,
  linear_terms,
  program,
  wrong_variants,
)
from examples.or_agents.vote import agree
from moepeft.tasks.stable_random import StableRandom

_LATEX = {'<=': r'\le', '>=': r'\ge', '=': '='}
_SETS = {
  'continuous': r'\mathbb{R}',
  'integer': r'\mathbb{Z}',
  'binary': r'\{0, 1\}',
}
_STREAM = 2508_03118
# Seconds in the prompt of programs: the default of the agents.
_SECONDS = '60'
Rows = dict[str, list[dict[str, Any]]]


def by_agent(samples: Iterable[Any], seed: int = 0) -> Rows:
  """Makes rows of each agent.

  Args:
    samples: of `generate.samples`.
    seed: draws which faults the wrong programs have.

  Returns:
    {file name without ending: rows}.
  """
  prompts = languages.load_prompts('en')
  rows: Rows = collections.defaultdict(list)
  for i, sample in enumerate(samples):
    rng = StableRandom(seed, _STREAM, i)
    instance, text = sample.instance, sample.row['text']
    wrong = judged_variants(instance.problem, sample.row['value'])
    drafts = {
      'components': functools.partial(components, instance),
      'formulation': functools.partial(formulation, instance),
    }
    right = {name: draft(instance.problem) for name, draft in drafts.items()}

    def ask(name: str, text=text, **parts: str) -> dict[str, str]:
      content = prompts[name].substitute(text=text, **parts)
      return {'role': 'user', 'content': content}

    rows['components'].append(
      _conversation(ask('components'), right['components'])
    )
    rows['formulation'].append(
      _conversation(
        ask('formulation', components=right['components']), right['formulation']
      )
    )
    for name, draft in drafts.items():
      fault, problem = None, instance.problem
      if wrong and rng.random_bool():
        fault, problem, _ = rng.choice(wrong)
      shown = draft(problem)
      # A list in words may not show the fault, exchanged coefficients say.
      is_same = shown == right[name]
      rows[f'verify_{name}'].append(
        _conversation(
          ask(f'verify_{name}', draft=shown),
          'OK' if is_same or fault is None else f'{fault}.',
        )
      )
    _add_programs(rows, rng, instance.problem, ask, right['formulation'], wrong)
    rows['direct'].append(direct_row(sample.row, i))
    if wrong:
      rows['pairs'].append(
        {
          'prompt': text,
          'chosen': instance.problem.to_json(),
          'rejected': rng.choice(wrong)[1].to_json(),
        }
      )
  return dict(rows)


def direct_row(row: Mapping[str, Any], idx: int) -> dict[str, Any]:
  """Text and formulation in the form of config.data.source=jsonl."""
  return {
    'inputs': row['text'],
    'targets': row['problem'],
    'dataset': row['family'],
    'template': row['template'],
    'idx': idx,
  }


def judged_variants(
  problem: Problem, value: float
) -> list[tuple[str, Problem, str]]:
  """(fault, problem, status) of the wrong variants with another outcome.

  Args:
    value: the right optimal value.
  """
  variants = []
  for fault, variant in wrong_variants(problem):
    solution = solve(variant)
    if solution.value is None or not agree(solution.value, value):
      variants.append((fault, variant, solution.status))
  return variants


def components(instance: Instance, problem: Problem) -> str:
  """The list of a problem's components, in the prompt's five sections."""
  names = [f'x{i + 1}' for i in range(len(problem.variables))]
  sense = 'maximize' if problem.sense == 'max' else 'minimize'
  lines = ['Sets:', *_sets(instance.fields)]
  lines += ['Parameters:', *_parameters(instance.fields), 'Variables:']
  for name, meaning, variable in zip(
    names, instance.variables, problem.variables, strict=True
  ):
    lower = (
      'no lower bound' if variable.lower is None else f'>= {variable.lower}'
    )
    upper = (
      'no upper bound' if variable.upper is None else f'<= {variable.upper}'
    )
    lines.append(f'{name}: {meaning}, {variable.type}, {lower}, {upper}')
  lines.append(f'Objective: {sense} {instance.goal}')
  lines.append('Constraints:')
  relations = {'<=': 'at most', '>=': 'at least', '=': 'exactly'}
  rows = _with_meanings(instance, problem)
  lines += [
    f'{meaning} is {relations[row.relation]} {row.right}'
    for meaning, row in rows
  ]
  return '\n'.join(lines)


def formulation(instance: Instance, problem: Problem) -> str:
  """The problem as a mathematical program in LaTeX."""
  names = [f'x_{{{i + 1}}}' for i in range(len(problem.variables))]

  def terms(coefficients) -> str:
    return linear_terms(coefficients, names).replace(' * ', ' ')

  lines = [
    f'{name} \\in {_SETS[v.type]}, {_bounds(name, v)} % {meaning}'
    for name, v, meaning in zip(
      names, problem.variables, instance.variables, strict=True
    )
  ]
  lines.append(
    f'\\{problem.sense} {terms(problem.objective)} % {instance.goal}'
  )
  lines += [
    f'{terms(row.coefficients)} {_LATEX[row.relation]} {row.right} % {meaning}'
    for meaning, row in _with_meanings(instance, problem)
  ]
  return '\n'.join(lines)


def _with_meanings(instance: Instance, problem: Problem) -> list[tuple]:
  """(meaning, constraint) of each constraint, which a variant may lack."""
  by_coefficients = {
    tuple(sorted(row.coefficients)) + (row.right,): meaning
    for row, meaning in zip(
      instance.problem.constraints, instance.rows, strict=True
    )
  }
  same_length = len(problem.constraints) == len(instance.rows)
  return [
    (
      instance.rows[i]
      if same_length
      else by_coefficients[(*sorted(row.coefficients), row.right)],
      row,
    )
    for i, row in enumerate(problem.constraints)
  ]


def _bounds(name: str, variable: Any) -> str:
  lower = '' if variable.lower is None else f'{variable.lower} \\le '
  upper = '' if variable.upper is None else f' \\le {variable.upper}'
  return f'{lower}{name}{upper}'


def _sets(fields: Mapping[str, Any]) -> list[str]:
  lines = []
  for key, value in fields.items():
    if isinstance(value, list):
      members = [
        entry.get('name')
        or ' to '.join(v for v in entry.values() if _is_text(v))
        if isinstance(entry, dict)
        else entry
        for entry in value
      ]
      lines.append(f'{key}: {", ".join(members)}')
  return lines


def _parameters(fields: Mapping[str, Any]) -> list[str]:
  """Every number of the fields with its names."""
  lines = []

  def visit(value: Any, path: tuple[str, ...]) -> None:
    if isinstance(value, dict):
      head = [v for v in value.values() if _is_text(v)]
      for key, part in value.items():
        if not _is_text(part):
          visit(part, (*path, *head, key))
    elif isinstance(value, list):
      for part in value:
        visit(part, path)
    elif isinstance(value, int | float) and not isinstance(value, bool):
      lines.append(f'{" ".join(path)}: {value}')

  visit(dict(fields), ())
  return lines


def _is_text(value: Any) -> bool:
  return isinstance(value, str)


def _add_programs(
  rows: Rows,
  rng: StableRandom,
  problem: Problem,
  ask: Callable[..., dict[str, str]],
  formulated: str,
  wrong: list[tuple[str, Problem, str]],
) -> None:
  """Adds programs, repairs and pairs of programs."""
  without_optimum = [entry for entry in wrong if entry[2] != 'optimal']
  for name in LANGUAGES:
    language = languages.LANGUAGES[name]
    question = ask(
      'program' if language.is_program else 'json',
      language=language.title,
      example=language.example,
      seconds=_SECONDS,
      formulation=formulated,
    )
    block = 'python' if language.is_program else 'json'

    def fenced(code: str, block=block) -> str:
      return f'```{block}\n{code.strip()}\n```'

    right = fenced(program(problem, name))
    rows[name].append(_conversation(question, right))
    broken, output = _broken(program(problem, name), rng)
    if broken is not None and language.is_program:
      rows['repair_error'].append(
        _conversation(
          question,
          right,
          (fenced(broken), ask('repair_error', output=output)),
        )
      )
    if without_optimum:
      _, variant, status = rng.choice(without_optimum)
      repair = ask('repair_no_optimum', status=status)
      rows['repair_no_optimum'].append(
        _conversation(question, right, (fenced(program(variant, name)), repair))
      )
    if wrong:
      rows['pairs'].append(
        {
          'prompt': [question],
          'chosen': right,
          'rejected': fenced(program(rng.choice(wrong)[1], name)),
        }
      )


def _broken(code: str, rng: StableRandom) -> tuple[str | None, str]:
  """A program with an error, and the error's line; (None, '') without one."""
  lines = code.splitlines()
  declared = [i for i, line in enumerate(lines) if 'x1 = ' in line]
  if not declared:
    return None, ''
  if rng.random_bool():
    # The variable's declaration is missing.
    i = declared[0]
    is_attribute = 'model.x1' in lines[i]
    error = (
      "AttributeError: 'ConcreteModel' object has no attribute 'x1'"
      if is_attribute
      else "NameError: name 'x1' is not defined"
    )
    return '\n'.join(lines[:i] + lines[i + 1 :]), error
  i = next(i for i, line in enumerate(lines) if line.startswith('import json'))
  error = "NameError: name 'json' is not defined"
  return '\n'.join(lines[:i] + lines[i + 1 :]), error


def _conversation(
  question: Mapping[str, str],
  answer: str,
  earlier: tuple[str, Mapping[str, str]] | None = None,
) -> dict[str, Any]:
  """A conversation; the answer before a repair is not trained."""
  messages: list[dict[str, Any]] = [dict(question)]
  if earlier:
    draft, repair = earlier
    messages.append({'role': 'assistant', 'content': draft, 'weight': 0})
    messages.append(dict(repair))
  messages.append({'role': 'assistant', 'content': answer})
  return {'messages': messages}

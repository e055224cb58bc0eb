# SPDX-License-Identifier: Apache-2.0
"""Runs programs of a model in the sandbox and reads the line they end with."""

import dataclasses
import re
from collections.abc import Mapping

from examples.or_agents import problem
from moepeft.agent.sandbox import bubblewrap
from moepeft.agent.sandbox.process import ResourceLimits
from moepeft.core.untrusted import Malformed, check_shape, parse_json

# Conclusions of a solver; everything else is an error.
STATUSES = ('optimal', 'infeasible', 'unbounded')
_ANSWER = {
  'status': str,
  'objective': (float, None),
  'variables?': {str: float},
}
# Solvers map libraries of gigabytes, of which they use little.
_ADDRESS_SPACE = 8 << 30
# Bytes of output, for the repair.
_OUTPUT = 4000
_CODE = re.compile(r'^```[^\n`]*\n(.*?)^```', re.MULTILINE | re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Execution:
  """The end of a program, or of a JSON formulation.

  Attributes:
    status: one of STATUSES, or 'error'.
    value: the optimal value; None unless optimal.
    variables: values of variables by name; may be empty.
    output: the output of a program, or why there is none.
  """

  status: str
  value: float | None = None
  variables: Mapping[str, float] = dataclasses.field(default_factory=dict)
  output: str = ''


def make_sandbox(seconds: float, memory_mb: int) -> bubblewrap.Sandbox:
  """Makes the sandbox of the programs.

  Raises:
    ValueError: bubblewrap does not work here.
  """
  if why := bubblewrap.unavailable_reason():
    raise ValueError(
      f'programs of the model run in bubblewrap alone, but {why}; install it, '
      'or use --languages=json, which runs no program'
    )
  return bubblewrap.Sandbox(
    ResourceLimits(
      seconds=seconds,
      memory=memory_mb << 20,
      address_space=max(_ADDRESS_SPACE, memory_mb << 20),
      output=_OUTPUT,
    )
  )


def extract_code(reply: str) -> str:
  """The last fenced block of a reply; the whole reply if it has no fence."""
  blocks = _CODE.findall(reply)
  return (blocks[-1] if blocks else reply).strip()


def run_program(sandbox: bubblewrap.Sandbox, code: str) -> Execution:
  """Runs a program, whose last line has to be the answer as JSON."""
  result = sandbox.python_program(code)
  if result.exit_code != 0:
    return Execution('error', output=str(result))
  lines = result.output.strip().splitlines()
  try:
    return _read_answer(lines[-1] if lines else '', result.output)
  except Malformed as e:
    problem_text = f'the last line of the output is wrong: {e}'
    return Execution('error', output=f'{result}\n[{problem_text}]')


def _read_answer(line: str, output: str) -> Execution:
  """
  Raises:
    Malformed: the line is not an answer in the required form.
  """
  answer = parse_json(line, unique_keys=True)
  check_shape(answer, _ANSWER)
  if unknown := answer.keys() - {'status', 'objective', 'variables'}:
    raise Malformed(f'{min(unknown)!r} is not one of its keys')
  status, value = answer['status'], answer['objective']
  if status not in STATUSES:
    raise Malformed(f"'status' is {status!r}, expected {', '.join(STATUSES)}")
  if (value is not None) != (status == 'optimal'):
    raise Malformed(f"'objective' is {value} where the status is {status!r}")
  return Execution(
    status,
    None if value is None else float(value),
    answer.get('variables', {}),
    output,
  )


def solve_formulation(text: str, seconds: float) -> Execution:
  """Solves a problem in its compact JSON form with HiGHS, in this process."""
  try:
    formulation = problem.Problem.from_json(text)
  except ValueError as e:
    return Execution('error', output=str(e))
  solution = problem.solve(formulation, seconds=seconds)
  if solution.status not in STATUSES:
    return Execution('error', output=f'the solver ended with {solution.status}')
  names = [variable.name for variable in formulation.variables]
  variables = dict(zip(names, solution.point, strict=False))
  return Execution(solution.status, solution.value, variables)

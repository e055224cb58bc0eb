# SPDX-License-Identifier: Apache-2.0
"""Rewards of answers by a solver's verdict: it runs, its optimum is right.

For reinforcement learning, for preference pairs and for measurements.
"""

import dataclasses

from examples.or_agents import execution
from examples.or_agents.execution import Execution
from examples.or_agents.vote import TOLERANCE, agree
from moepeft.agent.sandbox.bubblewrap import Sandbox


@dataclasses.dataclass(frozen=True)
class Verdict:
  """The outcome of an answer.

  Attributes:
    runs: whether a solver comes to a conclusion about it.
    is_right: whether its optimal value is the expected one.
    fault: why it does not run; '' if it does.
  """

  runs: bool
  is_right: bool
  fault: str = ''

  @property
  def reward(self) -> float:
    """1 for the right value, 0.1 for another conclusion, 0 for none."""
    return 1.0 if self.is_right else 0.1 if self.runs else 0.0


def judge(
  answer: str,
  expected: float,
  sandbox: Sandbox | None = None,
  seconds: float = 5,
  tolerance: float = TOLERANCE,
) -> Verdict:
  """The verdict on a reply of a model.

  Args:
    answer: a formulation in compact JSON, or with a sandbox a program.
    expected: the right optimal value.
    sandbox: runs a program.
    seconds: the time limit of the solver of a formulation.
    tolerance: of `vote.agree`.
  """
  code = execution.extract_code(answer)
  if sandbox is None:
    outcome = execution.solve_formulation(code, seconds)
  else:
    outcome = execution.run_program(sandbox, code)
  return judge_outcome(outcome, expected, tolerance)


def judge_outcome(
  outcome: Execution, expected: float, tolerance: float = TOLERANCE
) -> Verdict:
  """The verdict on a conclusion, of a program or of a formulation."""
  runs = outcome.status != 'error'
  is_right = outcome.value is not None and agree(
    outcome.value, expected, tolerance
  )
  return Verdict(runs, is_right, '' if runs else outcome.output)

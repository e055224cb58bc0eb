# SPDX-License-Identifier: Apache-2.0
"""Rewards of answers by a solver's verdict: it runs, its optimum is right.

For reinforcement learning, for preference pairs and for measurements.
"""

import dataclasses

from examples.or_agents.problem import Problem, solve

# Two values agree up to this share of the larger one, or of 1.
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Verdict:
  """The outcome of an answer.

  Attributes:
    runs: whether a solver comes to a conclusion about it.
    is_right: whether its optimal value is the expected one.
    value: its optimal value; None without one.
    fault: why it does not run; '' if it does.
  """

  runs: bool
  is_right: bool
  value: float | None = None
  fault: str = ''

  @property
  def reward(self) -> float:
    """1 for the right value, 0.1 for another conclusion, 0 for none."""
    return 1.0 if self.is_right else 0.1 if self.runs else 0.0


def judge_value(
  status: str, value: float | None, expected: float, fault: str = ''
) -> Verdict:
  """The verdict on a conclusion, of a program or of a formulation.

  Args:
    status: 'optimal', 'infeasible' or 'unbounded'; any other is none.
    expected: the right optimal value.
  """
  runs = status in ('optimal', 'infeasible', 'unbounded')
  is_right = value is not None and is_close(value, expected)
  return Verdict(runs, is_right, value, '' if runs else fault or status)


def judge(answer: str, expected: float, seconds: float = 5) -> Verdict:
  """The verdict on a formulation in compact JSON, by HiGHS.

  Args:
    answer: the text of a model.
    expected: the right optimal value.
    seconds: the solver's time limit.
  """
  try:
    problem = Problem.from_json(answer.strip())
  except ValueError as e:
    return Verdict(False, False, fault=str(e))
  solution = solve(problem, seconds=seconds)
  return judge_value(solution.status, solution.value, expected)


def is_close(a: float, b: float) -> bool:
  """Whether two optimal values are the same but for a solver's tolerance."""
  return abs(a - b) <= TOLERANCE * max(1.0, abs(a), abs(b))

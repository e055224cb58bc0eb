# SPDX-License-Identifier: Apache-2.0
"""The workshop of the prompts' example, with right and wrong programs.

Its optimum: 4 t + 2 c = 40 and t + c = 16 give 4 tables and 12 chairs, hence
4 * 30 + 12 * 20 = 360. The other corners have 320 (no tables) and 300 (no
chairs).
"""

from examples.or_agents.languages import LANGUAGES

TEXT = (
  'A workshop makes tables at a profit of 30 and chairs at a profit of 20. A '
  'table takes 4 kg of wood, a chair 2 kg; there are 40 kg. Each takes an hour '
  'of work; there are 16 hours. How many of each give the largest profit?'
)
VALUE = 360

PYOMO, CVXPY, SCIP = (
  LANGUAGES[name].example for name in ('pyomo', 'cvxpy', 'pyscipopt')
)
FORMULATION = LANGUAGES['json'].example


def edit(code: str, old: str, new: str) -> str:
  """The code with its only `old` replaced."""
  assert code.count(old) == 1, (old, code)
  return code.replace(old, new)


# An attribute that PySCIPOpt does not have.
BUGGY_SCIP = edit(SCIP, 'quicksum(x.values())', 'quicksum(x.amounts())')
# At least 60 pieces would take 120 kg of wood.
INFEASIBLE_SCIP = edit(SCIP, '(x.values()) <= 16', '(x.values()) >= 60')
# A profit of 31 in place of 30: 4 * 31 + 12 * 20 = 364.
WRONG_SCIP = edit(SCIP, "'tables': 30", "'tables': 31")
WRONG_VALUE = 364


def fenced(code: str, kind: str = 'python') -> str:
  """A reply with a block of code."""
  return f'Here it is.\n\n```{kind}\n{code}\n```\n'

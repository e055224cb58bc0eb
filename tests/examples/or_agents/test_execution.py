# SPDX-License-Identifier: Apache-2.0
"""Programs run in the sandbox, and the last line of their output is read."""

import re

import pytest

pytest.importorskip('openai')

from examples.or_agents import execution, languages  # noqa: E402
from examples.or_agents.languages import LANGUAGES  # noqa: E402
from moepeft.agent.sandbox import bubblewrap  # noqa: E402
from tests.examples.or_agents import cases  # noqa: E402

# The limit of hours, and a demand that the wood does not allow; the limit of
# wood, and a demand, so that the profit has no limit.
HOURS = {
  'pyomo': ('for i in profit) <= 16', 'for i in profit) >= 60'),
  'cvxpy': ('cp.sum(x) <= 16', 'cp.sum(x) >= 60'),
  'pyscipopt': ('(x.values()) <= 16', '(x.values()) >= 60'),
  'gurobipy': ('x.sum() <= 16', 'x.sum() >= 60'),
  'docplex': ('(x.values()) <= 16', '(x.values()) >= 60'),
}
WOOD = {
  'pyomo': ('for i in wood) <= 40', 'for i in wood) >= 40'),
  'cvxpy': ('2 * x[1] <= 40', '2 * x[1] >= 40'),
  'pyscipopt': ('for i in wood) <= 40', 'for i in wood) >= 40'),
  'gurobipy': ('x.prod(wood) <= 40', 'x.prod(wood) >= 40'),
  'docplex': ('for i in wood) <= 40', 'for i in wood) >= 40'),
}


def require(language):
  for package in LANGUAGES[language].packages:
    pytest.importorskip(package)


@pytest.mark.parametrize('language', HOURS)
def test_the_example_of_the_prompt_runs(language, sandbox):
  require(language)
  ran = execution.run_program(sandbox, LANGUAGES[language].example)
  assert ran.status == 'optimal', ran.output
  assert ran.value == pytest.approx(cases.VALUE)
  assert ran.variables == pytest.approx({'tables': 4, 'chairs': 12})


# Importing CVXPY takes seconds.
@pytest.mark.slow
@pytest.mark.parametrize('language', HOURS)
def test_the_example_finds_that_there_is_no_optimum(language, sandbox):
  require(language)
  code = LANGUAGES[language].example
  infeasible = cases.edit(code, *HOURS[language])
  ran = execution.run_program(sandbox, infeasible)
  assert (ran.status, ran.value) == ('infeasible', None), ran.output
  unbounded = cases.edit(infeasible, *WOOD[language])
  ran = execution.run_program(sandbox, unbounded)
  # Presolve may prove only that one of the two holds.
  assert ran.status in ('infeasible', 'unbounded'), ran.output


@pytest.mark.parametrize(
  'code, reason',
  [
    ('1 / 0', 'ZeroDivisionError'),
    ('pass', 'the last line of the output is wrong: not JSON'),
    ('print(7)', 'the last line .* an object'),
    ('print(\'{"status": "optimal"}\')', "'objective' is absent"),
    (
      'print(\'{"status": "optimal", "objective": NaN}\')',
      "a finite number in 'objective'",
    ),
    (
      'print(\'{"status": "optimal", "objective": null}\')',
      "'objective' is None where the status is 'optimal'",
    ),
    (
      'print(\'{"status": "infeasible", "objective": 3}\')',
      "'objective' is 3 where the status is 'infeasible'",
    ),
    (
      'print(\'{"status": "time limit", "objective": null}\')',
      "'status' is 'time limit'",
    ),
    (
      'print(\'{"status": "optimal", "objective": 1, "x": 2}\')',
      "'x' is not one of its keys",
    ),
    (
      'print(\'{"status": "optimal", "objective": 1}\')\nprint("done")',
      'not JSON',
    ),
    (
      'print(\'{"status": "optimal", "objective": 1}\')\nraise SystemExit(3)',
      r'\[exit status 3\]',
    ),
  ],
)
def test_what_has_not_the_required_form_is_an_error(code, reason, sandbox):
  ran = execution.run_program(sandbox, code)
  assert (ran.status, ran.value) == ('error', None)
  assert re.search(reason, ran.output), ran.output


def test_output_before_the_last_line_is_allowed(sandbox):
  code = 'print("solving")\nprint(\'{"status": "optimal", "objective": -2}\')'
  ran = execution.run_program(sandbox, code)
  assert (ran.status, ran.value) == ('optimal', -2.0)


def test_a_program_beyond_its_limits_is_ended(sandbox):
  del sandbox
  # Memory that the kernel uses for other programs counts, too.
  limited = execution.make_sandbox(seconds=1, memory_mb=8192)
  ran = execution.run_program(limited, 'import time\ntime.sleep(60)')
  assert ran.status == 'error' and 'killed after 1 s' in ran.output
  limited = execution.make_sandbox(seconds=60, memory_mb=256)
  code = "import time\nx = b'x' * (400 << 20)\ntime.sleep(60)"
  ran = execution.run_program(limited, code)
  assert ran.status == 'error' and '256 MB' in ran.output


def test_without_bubblewrap_no_program_runs(monkeypatch):
  monkeypatch.setattr(
    bubblewrap, 'unavailable_reason', lambda: 'bwrap is not installed'
  )
  with pytest.raises(ValueError, match='bwrap is not installed; install it'):
    execution.make_sandbox(seconds=1, memory_mb=256)


def test_the_last_block_of_a_reply_is_the_code():
  reply = 'First:\n```\nx\n```\nBetter:\n```python\ny = 1\nz\n```\nDone.'
  assert execution.extract_code(reply) == 'y = 1\nz'
  assert execution.extract_code(' {"s": 1}\n') == '{"s": 1}'


def test_a_formulation_is_solved_without_a_sandbox():
  pytest.importorskip('highspy')
  ran = execution.solve_formulation(cases.FORMULATION, seconds=10)
  assert (ran.status, ran.value) == ('optimal', pytest.approx(cases.VALUE))
  assert ran.variables == pytest.approx({'tables': 4, 'chairs': 12})
  infeasible = cases.edit(cases.FORMULATION, '"<=",16', '">=",60')
  assert execution.solve_formulation(infeasible, 10).status == 'infeasible'
  unbounded = '{"s":"max","v":"c","o":[1],"c":[]}'
  assert execution.solve_formulation(unbounded, 10).status == 'unbounded'
  ran = execution.solve_formulation('{"s":"max"}', 10)
  assert ran.status == 'error' and 'the formulation has no' in ran.output


def test_languages_are_chosen_by_name(monkeypatch):
  monkeypatch.setattr(
    languages.importlib.util, 'find_spec', lambda name: name != 'docplex'
  )
  names = [language.name for language in languages.choose_languages()]
  assert names == ['pyomo', 'cvxpy', 'pyscipopt', 'gurobipy']
  with pytest.raises(ValueError, match='docplex needs docplex: pip install'):
    languages.choose_languages(['docplex'])
  with pytest.raises(ValueError, match="got 'ampl'"):
    languages.choose_languages(['pyomo', 'ampl'])
  with pytest.raises(ValueError, match='name each once'):
    languages.choose_languages(['json', 'json'])


def test_prompts_of_both_languages_have_the_same_parts():
  prompts = {
    name: languages.load_prompts(name) for name in languages.PROMPT_LANGUAGES
  }
  english, chinese = prompts['en'], prompts['zh']
  assert english.keys() == chinese.keys()
  for name, template in english.items():
    assert sorted(template.get_identifiers()) == sorted(
      chinese[name].get_identifiers()
    )
    # No template has a dollar that is not a part.
    assert template.is_valid() and chinese[name].is_valid()

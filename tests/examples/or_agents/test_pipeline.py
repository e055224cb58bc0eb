# SPDX-License-Identifier: Apache-2.0
"""The agents with a scripted model, and real programs in the real sandbox."""

import pytest

for name in ('openai', 'cvxpy', 'highspy', 'pyomo', 'pyscipopt'):
  pytest.importorskip(name)

from examples.or_agents import languages, pipeline, report  # noqa: E402
from examples.or_agents.pipeline import Settings  # noqa: E402
from moepeft.agent.chat_model import ChatReply, ReplyError  # noqa: E402
from tests.examples.or_agents import cases  # noqa: E402
from tests.examples.or_agents.cases import fenced  # noqa: E402

# Components, the verifier, formulation, the verifier.
ACCEPTED = ('Variables: t, c', 'OK', r'\max 30t + 20c', 'OK.')


class ScriptedModel:
  """A model that gives the replies of a list; a ReplyError is raised.

  Attributes:
    requests: the requests so far.
  """

  def __init__(self, *replies):
    self._replies, self.requests = list(replies), []

  def __call__(self, request, on_text, seconds):
    self.requests.append(request)
    reply = self._replies.pop(0)
    if isinstance(reply, ReplyError):
      raise reply
    if isinstance(reply, ChatReply):
      return reply
    return ChatReply({'role': 'assistant', 'content': reply})

  def left(self):
    return len(self._replies)


def solve(model, names, sandbox=None, **settings):
  outcome = pipeline.solve_text(
    cases.TEXT,
    model,
    languages.choose_languages(names),
    sandbox,
    Settings(**settings),
  )
  assert model.left() == 0
  return outcome


def statuses(program):
  return [ran.status for ran in program.executions]


def test_programs_of_three_languages_agree(sandbox):
  codes = (cases.PYOMO, cases.CVXPY, cases.SCIP)
  model = ScriptedModel(*ACCEPTED, *map(fenced, codes))
  outcome = solve(model, ['pyomo', 'cvxpy', 'pyscipopt'], sandbox)
  assert outcome.value == pytest.approx(cases.VALUE)
  assert outcome.agreeing == ('pyomo', 'cvxpy', 'pyscipopt')
  assert report.summary(outcome).startswith(
    'The optimal value is 360: 3 of 3 programs agree (pyomo, cvxpy, pyscipopt)'
  )


def test_an_injected_bug_is_repaired(sandbox):
  model = ScriptedModel(*ACCEPTED, fenced(cases.BUGGY_SCIP), fenced(cases.SCIP))
  outcome = solve(model, ['pyscipopt'], sandbox)
  (program,) = outcome.programs
  assert statuses(program) == ['error', 'optimal']
  assert (program.repairs, outcome.value) == (1, pytest.approx(cases.VALUE))
  # The model saw its program and the error.
  question, answer, repair = model.requests[-1]['messages']
  assert answer['content'] == fenced(cases.BUGGY_SCIP)
  assert "AttributeError: 'dict' object has no attribute" in repair['content']


def test_an_infeasible_model_is_repaired(sandbox):
  model = ScriptedModel(
    *ACCEPTED, fenced(cases.INFEASIBLE_SCIP), fenced(cases.SCIP)
  )
  outcome = solve(model, ['pyscipopt'], sandbox)
  assert statuses(outcome.programs[0]) == ['infeasible', 'optimal']
  assert outcome.value == pytest.approx(cases.VALUE)
  repair = model.requests[-1]['messages'][-1]['content']
  assert 'the solver reports: infeasible' in repair


def test_a_wrong_program_is_outvoted(sandbox):
  codes = (cases.WRONG_SCIP, cases.PYOMO, cases.FORMULATION)
  model = ScriptedModel(*ACCEPTED, *map(fenced, codes))
  outcome = solve(model, ['pyscipopt', 'pyomo', 'json'], sandbox)
  assert outcome.programs[0].last.value == pytest.approx(cases.WRONG_VALUE)
  assert outcome.value == pytest.approx(cases.VALUE)
  assert outcome.agreeing == ('pyomo', 'json')
  assert 'outvoted: pyscipopt has 364' in report.summary(outcome)


def test_total_failure_says_so_after_the_last_repair(sandbox):
  model = ScriptedModel(*ACCEPTED, *['I cannot.'] * 7)
  outcome = solve(model, ['pyscipopt'], sandbox)
  assert (outcome.status, outcome.value) == ('failed', None)
  assert statuses(outcome.programs[0]) == ['error'] * 7
  summary = report.summary(outcome)
  assert summary.startswith('No program has an optimal value (failed): pyscipo')
  assert 'after 6 repairs' in summary and '\n' not in summary


def formulation(value):
  """A formulation whose optimum is `value`."""
  return f'{{"s":"max","v":"c","o":[1],"c":[[1,"<=",{value}]]}}'


def test_a_formulation_in_json_is_repaired_too():
  model = ScriptedModel(
    *ACCEPTED, '{"s": "max"}', fenced(formulation(7), 'json')
  )
  outcome = solve(model, ['json'])
  assert statuses(outcome.programs[0]) == ['error', 'optimal']
  assert outcome.value == 7


def test_every_agent_sees_the_original_text():
  infeasible = '{"s":"max","v":"c","o":[1],"c":[[1,"<=",-1]]}'
  replies = ('draft', 'wrong', 'better', 'm', 'wrong', 'n', '{', infeasible)
  for prompts, word in (('en', 'Problem:'), ('zh', '问题：')):
    model = ScriptedModel(*replies, formulation(7))
    outcome = solve(model, ['json'], prompts=prompts)
    assert len(model.requests) == 9
    for request in model.requests:
      first = request['messages'][0]['content']
      assert f'{word}\n{cases.TEXT}' in first
    assert outcome.value == 7


def test_a_verifier_s_faults_are_corrected_once():
  model = ScriptedModel(
    'draft', 'The wood is missing.', 'better', 'm', 'OK', formulation(7)
  )
  outcome = solve(model, ['json'])
  assert (outcome.components, outcome.formulation) == ('better', 'm')
  revision = model.requests[2]['messages']
  assert [m['role'] for m in revision] == ['user', 'assistant', 'user']
  assert 'The wood is missing.' in revision[-1]['content']
  # The modeler gets the corrected components.
  assert 'better' in model.requests[3]['messages'][0]['content']


def test_a_model_can_confirm_that_there_is_no_optimum():
  infeasible = '{"s":"max","v":"c","o":[1],"c":[[1,"<=",-1]]}'
  model = ScriptedModel(*ACCEPTED, infeasible, infeasible)
  outcome = solve(model, ['json'])
  assert (outcome.status, outcome.value) == ('infeasible', None)
  assert report.summary(outcome) == (
    'No program has an optimal value (infeasible): json ended as infeasible '
    'after 0 repairs.'
  )


def test_a_program_without_a_reply_does_not_end_the_vote(sandbox):
  model = ScriptedModel(*ACCEPTED, ReplyError('too long'), formulation(7))
  outcome = solve(model, ['pyscipopt', 'json'], sandbox)
  assert (outcome.value, outcome.agreeing) == (7, ('json',))
  assert outcome.programs[0].last.output == 'no reply: too long'


def test_a_reply_that_is_cut_off_is_not_run_but_repaired():
  # Its text is a right formulation by chance.
  message = {'role': 'assistant', 'content': formulation(8)}
  cut = ChatReply(message, 'length')
  model = ScriptedModel(*ACCEPTED, cut, formulation(7))
  outcome = solve(model, ['json'])
  assert statuses(outcome.programs[0]) == ['error', 'optimal']
  assert outcome.value == 7
  assert 'was cut off' in model.requests[-1]['messages'][-1]['content']


def test_without_a_formulation_there_is_no_outcome():
  model = ScriptedModel(*ACCEPTED[:2], ReplyError('no server'))
  with pytest.raises(ReplyError, match='no server'):
    solve(model, ['json'])


def test_direct_asks_for_the_form_with_the_text_alone():
  model = ScriptedModel(formulation(7))
  outcome = solve(model, ['json'], direct=True, options={'temperature': 0})
  assert model.requests == [
    {'messages': [{'role': 'user', 'content': cases.TEXT}], 'temperature': 0}
  ]
  assert outcome.value == 7
  # A wrong form is not repaired: the model does not know the prompts for it.
  outcome = solve(ScriptedModel('{'), ['json'], direct=True)
  assert (outcome.status, len(outcome.programs[0].executions)) == ('failed', 1)


def test_the_trace_has_every_request_and_execution():
  events = []
  model = ScriptedModel(*ACCEPTED, '{', formulation(7))
  outcome = pipeline.solve_text(
    cases.TEXT,
    model,
    languages.choose_languages(['json']),
    None,
    Settings(),
    events.append,
  )
  assert list(outcome.trace) == events
  kinds = [event['event'] for event in events]
  assert kinds == [
    'started',
    *['asked', 'replied'] * 4,
    *['asked', 'replied', 'ran'] * 2,
    'voted',
  ]
  assert [e['status'] for e in events if e['event'] == 'ran'] == [
    'error',
    'optimal',
  ]
  assert events[-1]['value'] == 7 and events[-1]['agreeing'] == ['json']

# SPDX-License-Identifier: Apache-2.0
"""A problem in words -> components -> formulation -> programs -> vote.

After OptiTrust (Lima et al., Toward a Trustworthy Optimization Modeling Agent
via Verifiable Synthetic Data Generation, arXiv:2508.03117, 2025). Events of the
trace are JSON dicts with the key 'event':

  started  text, languages
  asked    agent, messages
  replied  agent, text, reason, tokens; or error
  ran      language, repairs, code, status, value, variables, output
  voted    value, status, agreeing
"""

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from examples.or_agents import execution, languages, vote
from examples.or_agents.execution import Execution
from examples.or_agents.languages import Language
from moepeft.agent.chat_model import ChatModel, ChatReply, Message, ReplyError
from moepeft.agent.loop import EventSink, ignore_event
from moepeft.agent.sandbox.bubblewrap import Sandbox

# For the model, and for the user's report.
_CUT_OFF = 'the reply was cut off at its maximum of tokens; write a shorter one'
_ACCEPTED = re.compile(r'\W*OK\W*', re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of the pipeline.

  Attributes:
    prompts: the language of the prompts, 'en' or 'zh'.
    max_rounds: the maximum number of repairs of a program.
    seconds: the time limit of a program and of a solver.
    tolerance: the tolerance of the vote.
    direct: whether the problem's text alone is the prompt of each language, as
      for a model that was trained to answer with a JSON formulation; there are
      no components, no formulation and no repairs.
    options: options of each request: temperature, seed, max_tokens.
  """

  prompts: str = 'en'
  max_rounds: int = 6
  seconds: float = 60
  tolerance: float = vote.TOLERANCE
  direct: bool = False
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Program:
  """A program, or a JSON formulation, with its executions.

  Attributes:
    language: the name of its language.
    code: its last version.
    executions: of each version; at least one.
  """

  language: str
  code: str
  executions: tuple[Execution, ...]

  @property
  def last(self) -> Execution:
    """The execution of the last version."""
    return self.executions[-1]

  @property
  def repairs(self) -> int:
    """The number of versions after the first one."""
    return len(self.executions) - 1


@dataclasses.dataclass(frozen=True)
class Report:
  """The outcome for a problem.

  Attributes:
    status: 'optimal' if there is a value; else 'infeasible' or 'unbounded' if
      that is what most programs without an error say; else 'failed'.
    value: the optimal value that won the vote; None without one.
    agreeing: the languages of the programs that have this value.
    components, formulation: the texts of the first two agents.
    programs: one for each language.
    trace: all events.
  """

  status: str
  value: float | None
  agreeing: tuple[str, ...]
  components: str
  formulation: str
  programs: tuple[Program, ...]
  trace: tuple[Mapping[str, Any], ...]


def solve_text(
  text: str,
  model: ChatModel,
  chosen: Sequence[Language],
  sandbox: Sandbox | None,
  settings: Settings,
  on_event: EventSink = ignore_event,
) -> Report:
  """Solves a problem in words.

  Args:
    text: the problem, which every agent sees.
    model: the model of all agents.
    chosen: the languages; one program is written in each.
    sandbox: runs the programs; None if all languages are JSON.
    on_event: called with each event of the trace.

  Raises:
    ReplyError: the model gives no components, no formulation or no program.
  """
  agents = _Agents(text, model, sandbox, settings, on_event)
  agents.emit('started', text=text, languages=[each.name for each in chosen])
  components = formulation = ''
  if not settings.direct:
    components = agents.write_verified('components')
    formulation = agents.write_verified('formulation', components=components)
  programs = [agents.write_program(each, formulation) for each in chosen]
  if not any(event['event'] == 'ran' for event in agents.trace):
    raise ReplyError(programs[0].last.output)
  value, group = vote.vote(
    [program.last.value for program in programs],
    [program.repairs for program in programs],
    settings.tolerance,
  )
  status = 'optimal' if group else _common_status(programs)
  agreeing = tuple(programs[i].language for i in group)
  agents.emit('voted', value=value, status=status, agreeing=list(agreeing))
  return Report(
    status,
    value,
    agreeing,
    components,
    formulation,
    tuple(programs),
    tuple(agents.trace),
  )


def _common_status(programs: Sequence[Program]) -> str:
  """The most common conclusion of programs without a value."""
  counts = collections.Counter(program.last.status for program in programs)
  del counts['error']
  return counts.most_common(1)[0][0] if counts else 'failed'


class _Agents:
  """The agents of a problem.

  Attributes:
    trace: the events so far.
  """

  def __init__(self, text, model, sandbox, settings, on_event):
    self._text, self._model, self._sandbox = text, model, sandbox
    self._settings, self._on_event = settings, on_event
    self._prompts = languages.load_prompts(settings.prompts)
    self.trace: list[dict[str, Any]] = []

  def emit(self, event: str, **fields: Any) -> None:
    """Adds an event to the trace."""
    self.trace.append({'event': event, **fields})
    self._on_event(self.trace[-1])

  def _prompt(self, name: str, **parts: Any) -> Message:
    content = self._prompts[name].substitute(text=self._text, **parts)
    return {'role': 'user', 'content': content}

  def _ask(self, agent: str, messages: Sequence[Message]) -> ChatReply:
    """Asks the model.

    Raises:
      ReplyError: there is no reply.
    """
    self.emit('asked', agent=agent, messages=list(messages))
    request = {'messages': messages, **self._settings.options}
    try:
      reply = self._model(request, ignore_event, None)
    except ReplyError as e:
      self.emit('replied', agent=agent, error=str(e))
      raise
    self.emit(
      'replied',
      agent=agent,
      text=reply.message['content'],
      reason=reply.reason,
      tokens=reply.tokens,
    )
    return reply

  def write_verified(self, agent: str, **parts: str) -> str:
    """An agent's text, revised once if a verifier reports faults."""
    question = self._prompt(agent, **parts)
    draft = self._ask(agent, [question]).message
    check = self._prompt(f'verify_{agent}', draft=draft['content'])
    faults = self._ask(f'verify_{agent}', [check]).message['content']
    if _ACCEPTED.fullmatch(faults):
      return draft['content']
    revise = self._prompt('revise', faults=faults)
    return self._ask(agent, [question, draft, revise]).message['content']

  def write_program(self, language: Language, formulation: str) -> Program:
    """A program that is repaired until it has an optimal value."""
    question, executions, code = self._question(language, formulation), [], ''
    messages = [question]
    max_repairs = 0 if self._settings.direct else self._settings.max_rounds
    while True:
      try:
        reply = self._ask(language.name, messages)
      except ReplyError as e:
        if not executions:
          executions.append(Execution('error', output=f'no reply: {e}'))
        break
      previous, code = (
        code,
        execution.extract_code(reply.message['content']),
      )
      if executions and executions[-1].status != 'error' and code == previous:
        # The model confirms that there is no optimum.
        break
      executions.append(
        Execution('error', output=_CUT_OFF)
        if reply.reason == 'length'
        else self._execute(language, code)
      )
      self.emit(
        'ran',
        language=language.name,
        repairs=len(executions) - 1,
        code=code,
        **dataclasses.asdict(executions[-1]),
      )
      status = executions[-1].status
      if status == 'optimal' or len(executions) > max_repairs:
        break
      name = 'repair_error' if status == 'error' else 'repair_no_optimum'
      output = executions[-1].output.strip()
      repair = self._prompt(name, status=status, output=output)
      messages = [question, reply.message, repair]
    return Program(language.name, code, tuple(executions))

  def _question(self, language: Language, formulation: str) -> Message:
    if self._settings.direct:
      return {'role': 'user', 'content': self._text}
    return self._prompt(
      'program' if language.is_program else 'json',
      language=language.title,
      example=language.example,
      seconds=f'{self._settings.seconds:g}',
      formulation=formulation,
    )

  def _execute(self, language: Language, code: str) -> Execution:
    if language.is_program:
      return execution.run_program(self._sandbox, code)
    return execution.solve_formulation(code, self._settings.seconds)

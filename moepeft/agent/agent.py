# SPDX-License-Identifier: Apache-2.0
"""An agent: a model, its tools and its memory, asked one question at a time."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moepeft.agent import calls, events
from moepeft.agent.calls import Limits
from moepeft.agent.events import Outcome, Tell, ignore
from moepeft.agent.forms import FORMS
from moepeft.agent.loop import MODES, Budget, Run, RunCalls
from moepeft.agent.memory import Memory
from moepeft.agent.model import Model
from moepeft.agent.tools import Tool


class Agent:
  """Answers questions; what was said before is its memory."""

  def __init__(
    self,
    model: Model,
    tools: Sequence[Tool] = (),
    system: str = '',
    memory: Memory | None = None,
    form: str = 'native',
    mode: str = 'act',
    budget: Budget | None = None,
    limits: Limits | None = None,
    options: Mapping[str, Any] | None = None,
    tell: Tell = ignore,
    clock: Callable[[], float] = time.monotonic,
    run_calls: RunCalls = calls.run,
  ):
    """Looks at its parts; nothing is asked yet.

    Args:
      model: as `model.Served`.
      tools: what it may call.
      system: the system prompt; rules on tools are added to it.
      memory: of the conversation; a new one without a limit by default.
      form: 'native', or 'react' for models without tool calls.
      mode: 'act', or 'plan' for plan, act and reflect.
      budget: of each question.
      limits: of tool calls.
      options: of each request: temperature, seed, max_tokens ...
      tell: called with each event, from the thread that asks.
      clock: seconds, for the budget.
      run_calls: how tools are run; another one in a replay.

    Raises:
      ValueError: two tools have one name, or there is no such form or mode.
    """
    if form not in FORMS:
      raise ValueError(f'form is one of {", ".join(FORMS)}; got {form!r}')
    if mode not in MODES:
      raise ValueError(f'mode is one of {", ".join(MODES)}; got {mode!r}')
    self.model, self.form, self.mode = model, FORMS[form], mode
    self.tools = _by_name(tools)
    self.memory = memory or Memory()
    self.budget, self.limits = budget or Budget(), limits or Limits()
    self.options = dict(options or {})
    self.tell, self.clock, self.run_calls = tell, clock, run_calls
    self._given = system

  @property
  def system(self) -> str:
    """The whole system prompt."""
    tools = list(self.tools.values())
    parts = [self._given, calls.RULE, self.form.system(tools)]
    return '\n\n'.join(part for part in (parts if tools else parts[:1]) if part)

  def ask(self, question: str) -> Outcome:
    """Answers; never raises for what a model, tool or server does.

    A question that is interrupted (Ctrl-C) leaves no trace in memory.
    """
    kept, summary = list(self.memory.units), self.memory.summary
    self.tell(events.Started(question, self._settings(), len(kept)))
    run = Run(
      self.model,
      self.form,
      self.tools,
      self.memory,
      self.system,
      self.options,
      self.budget,
      self.limits,
      self.tell,
      self.clock,
      self.run_calls,
    )
    self.memory.question(question)
    try:
      outcome = MODES[self.mode](run)
    except BaseException:
      self.memory.units, self.memory.summary = kept, summary
      raise
    self._close(outcome)
    self.tell(events.Ended(outcome))
    return outcome

  def _close(self, outcome: Outcome) -> None:
    """Memory says how a question ended that the model did not answer."""
    last = self.memory.units[-1].messages[-1]
    if last['role'] != 'assistant' or last.get('tool_calls'):
      text = f'(no answer: {outcome.why})'
      self.memory.step([{'role': 'assistant', 'content': text}])

  def _settings(self) -> dict[str, Any]:
    return {
      'model': getattr(self.model, 'name', ''),
      'system': self._given,
      'form': self.form.name,
      'mode': self.mode,
      'memory': self.memory.limit,
      'summarised': self.memory.summarise is not None,
      'budget': dataclasses.asdict(self.budget),
      'limits': dataclasses.asdict(self.limits),
      'options': self.options,
      'tools': [
        [tool.name, tool.description, tool.schema]
        for tool in self.tools.values()
      ],
    }


def _by_name(tools: Sequence[Tool]) -> dict[str, Tool]:
  found: dict[str, Tool] = {}
  for tool in tools:
    if tool.name in found:
      raise ValueError(
        f'two tools are named {tool.name!r}; give one another name'
      )
    found[tool.name] = tool
  return found

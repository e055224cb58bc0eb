# SPDX-License-Identifier: Apache-2.0
"""An agent: a model with tools and a memory that answers questions."""

import collections
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moepeft.agent import react, tool_calls
from moepeft.agent.chat_model import ChatModel, Request
from moepeft.agent.loop import (
  AgentRun,
  Budget,
  EventSink,
  Outcome,
  ignore_event,
)
from moepeft.agent.memory import Memory, merge_user_turns
from moepeft.agent.tool_calls import ToolResult
from moepeft.agent.tools import Tool

FORMS, MODES = ('native', 'react'), ('act', 'plan')


@dataclasses.dataclass
class Agent:
  """Answers questions; its memory has the conversation so far.

  Attributes:
    model: the model, for example a `chat_model.ServerModel`.
    tools: the tools that the model may call.
    system: the system prompt; a rule on tools is added to it.
    memory: the conversation; unlimited by default.
    form: 'native', or 'react' for models without tool calls.
    mode: 'act', or 'plan' for plan, act and reflect.
    budget: the limits of each question.
    options: options of each request: temperature, seed, max_tokens, ...;
      tool_choice applies to a question's first call only, as it would otherwise
      force calls forever.
    on_event: called with each event, in the thread of `ask`.
    clock: returns seconds, for the budget.
    run_calls: runs tool calls; a replay replaces it.

  Raises:
    ValueError: two tools have the same name, or form or mode is unknown.
  """

  model: ChatModel
  tools: Sequence[Tool] = ()
  system: str = ''
  memory: Memory = dataclasses.field(default_factory=Memory)
  form: str = 'native'
  mode: str = 'act'
  budget: Budget = Budget()
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  on_event: EventSink = ignore_event
  clock: Callable[[], float] = time.monotonic
  run_calls: Callable[..., Sequence[ToolResult]] = tool_calls.run_calls

  def __post_init__(self):
    for attribute, choices in (('form', FORMS), ('mode', MODES)):
      if (value := getattr(self, attribute)) not in choices:
        raise ValueError(
          f'{attribute} is one of {", ".join(choices)}; got {value!r}'
        )
    names = collections.Counter(tool.name for tool in self.tools)
    for name, count in names.items():
      if count > 1:
        raise ValueError(f'two tools are named {name!r}; rename one')

  def request(self, tools: Sequence[Tool], options: Mapping) -> Request:
    """Makes the next request to the model."""
    parts = [self.system, tool_calls.SYSTEM_RULE if self.tools else '']
    system = '\n\n'.join(filter(None, parts))
    system_messages = [{'role': 'system', 'content': system}] if system else []
    request: Request = {
      **options,
      'messages': [*system_messages, *self.memory.messages],
    }
    if tools:
      request = {**request, 'tools': [tool.declared() for tool in tools]}
    request = (
      react.to_text_request(request) if self.form == 'react' else request
    )
    return {**request, 'messages': merge_user_turns(request['messages'])}

  def prompt(self) -> str:
    """The whole system prompt."""
    messages = self.request(self.tools, {})['messages']
    return messages[0]['content'] if messages else ''

  def ask(self, question: str) -> Outcome:
    """Answers a question; errors of model, tools and server do not raise.

    After an interrupt (Ctrl-C), the memory is as before the question.
    """
    memory = self.memory
    snapshot = list(memory.messages), memory.question_start
    self.on_event(
      {
        'event': 'started',
        'question': question,
        'earlier': len(memory.messages),
        'settings': self._settings(),
      }
    )
    memory.add_question(question)
    try:
      run = AgentRun(self)
      outcome = run.act() if self.mode == 'act' else run.plan_act_reflect()
    except BaseException:
      memory.messages, memory.question_start = snapshot
      raise
    last = memory.messages[-1]
    if last['role'] != 'assistant' or last.get('tool_calls'):
      text = f'(no answer: {outcome.why})'
      memory.messages.append({'role': 'assistant', 'content': text})
    self.on_event({'event': 'ended', 'outcome': dataclasses.asdict(outcome)})
    return outcome

  def _settings(self) -> dict[str, Any]:
    keys = ('system', 'form', 'mode', 'options')
    return {
      **{key: getattr(self, key) for key in keys},
      'memory': self.memory.limit,
      'budget': dataclasses.asdict(self.budget),
      'tools': [[t.name, t.description, t.schema] for t in self.tools],
    }

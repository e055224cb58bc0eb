# SPDX-License-Identifier: Apache-2.0
"""The agent loop: sends requests, runs tool calls, returns their results.

Events are JSON dicts with the key 'event':

  started   question, settings (what a replay needs), earlier messages
  counted   tokens of a request, if memory has a limit
  forgotten messages that memory dropped
  asked     request, seconds since the question
  piece     text of a stream
  replied   message, reason, tokens, estimated; or error, late
  called    calls that will run in parallel
  returned  a call's id, name, arguments, text, failed, trusted
  ended     outcome
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moepeft.agent import react, tool_calls
from moepeft.agent.chat_model import (
  ChatReply,
  Message,
  ReplyError,
  ReplyTimeout,
  Request,
)
from moepeft.agent.memory import MemoryFullError
from moepeft.agent.tool_calls import ToolResult
from moepeft.agent.tools import Tool

Event = Mapping[str, Any]
EventSink = Callable[[Event], None]
_PLAN_PROMPT = (
  'Before you begin: write a short numbered plan of how you will answer this, '
  'at most five lines. Do not answer yet.'
)
_ACT_PROMPT = 'Now carry the plan out, and answer.'
_REFLECT_PROMPT = (
  'Check your answer: does it answer the question, and does what you found '
  'support it? Reply with OK alone if so, else with what is wrong in a line.'
)
_RETRY_PROMPT = 'Now mend that, and answer anew.'
_REPEATED_NOTE = (
  '\nThe same call gave the same output before. Do something else, or answer.'
)


def ignore_event(event: Any) -> None:
  """Drops an event."""
  del event


@dataclasses.dataclass(frozen=True)
class Budget:
  """The limits of a question; None for no limit.

  Attributes:
    steps: requests to the model.
    calls: tool calls; the model can still answer after the last one.
    tokens: tokens of all prompts and answers, counted after each reply, so that
      the last one may exceed it.
    seconds: wall-clock time; it interrupts replies, but not running tools.
    repeats: how often a call may have the same output.
    malformed: consecutive replies that break the protocol.
    call_seconds: time limit of a call, if its tool has none.
    output: characters of a tool output that the model receives.
  """

  steps: int = 10
  calls: int = 30
  tokens: int | None = None
  seconds: float | None = None
  repeats: int = 3
  malformed: int = 3
  call_seconds: float = 60.0
  output: int = 8000

  def __post_init__(self):
    for name, limit in dataclasses.asdict(self).items():
      if limit is not None and (limit < 0 or (not limit and name != 'calls')):
        raise ValueError(f'the budget of {name} is above 0; got {limit}')


@dataclasses.dataclass(frozen=True)
class Outcome:
  """The result of a question.

  Attributes:
    state: 'answered', 'unsure' (the model's check objects), 'cut' (the reply
      reached its maximum length), 'budget', 'loop' (repeated calls),
      'malformed' (protocol errors) or 'failed' (no reply).
    text: the answer, maybe a partial one.
    why: the reason of any state but 'answered'.
    steps, calls, tokens, seconds: the used budget.
    estimated: whether `tokens` is partly an estimate.
  """

  state: str
  text: str = ''
  why: str = ''
  steps: int = 0
  calls: int = 0
  tokens: int = 0
  seconds: float = 0.0
  estimated: bool = False


class AgentRun:
  """The state of one question: steps, calls, tokens and seconds used."""

  def __init__(self, agent: Any):
    """Starts the clock; `agent` is an `agent.Agent`."""
    self.agent, self.budget, self.memory = agent, agent.budget, agent.memory
    self.start = agent.clock()
    self.steps = self.calls = self.tokens = self.malformed = 0
    self.seconds, self.estimated = 0.0, False
    self.call_counts: collections.Counter = collections.Counter()

  def end(self, state: str, text: str = '', why: str = '') -> Outcome:
    """The outcome with the budget used so far."""
    counters = ('steps', 'calls', 'tokens', 'seconds', 'estimated')
    return Outcome(
      state, text, why, *(getattr(self, name) for name in counters)
    )

  def add_message(self, role: str, content: str) -> None:
    self.memory.messages.append({'role': role, 'content': content})

  def ask(self, tools: Sequence[Tool]) -> ChatReply | Outcome:
    """Sends a request; returns an outcome if there is no budget or no reply."""
    agent, budget = self.agent, self.budget
    self.seconds = round(agent.clock() - self.start, 3)
    for name in ('steps', 'tokens', 'seconds'):
      limit, used = getattr(budget, name), getattr(self, name)
      if limit is not None and used >= limit:
        why = f'the budget of {limit:,} {name} is spent ({used:,} used)'
        return self.end('budget', why=why)
    try:
      request = self._fit_memory(tools)
    except MemoryFullError as e:
      return self.end('budget', why=str(e))
    agent.on_event(
      {'event': 'asked', 'request': request, 'seconds': self.seconds}
    )
    self.steps += 1
    remaining = budget.seconds and budget.seconds - self.seconds
    try:
      reply = agent.model(
        request,
        lambda text: agent.on_event({'event': 'piece', 'text': text}),
        remaining,
      )
    except ReplyError as e:
      timed_out = isinstance(e, ReplyTimeout)
      agent.on_event({'event': 'replied', 'error': str(e), 'late': timed_out})
      return self.end('budget' if timed_out else 'failed', why=str(e))
    agent.on_event({'event': 'replied', **dataclasses.asdict(reply)})
    self.tokens += reply.tokens
    self.estimated |= reply.estimated
    return reply

  def _fit_memory(self, tools: Sequence[Tool]) -> Request:
    """Makes the next request; drops messages until it fits into memory."""
    memory, options = self.memory, dict(self.agent.options)
    if not tools or self.calls:
      options.pop('tool_choice', None)
    if not tools:
      options.pop('parallel_tool_calls', None)
    while True:
      request = self.agent.request(tools, options)
      if memory.limit is None:
        return request
      tokens = memory.count(request)
      self.agent.on_event({'event': 'counted', 'tokens': tokens})
      if tokens <= memory.limit:
        return request
      if not (forgotten := memory.forget()):
        raise MemoryFullError(
          f'the question and its latest step have {tokens:,} tokens, but '
          f'memory holds {memory.limit:,}; raise its limit, or shorten tool '
          'outputs'
        )
      self.agent.on_event({'event': 'forgotten', 'messages': forgotten})

  def act(self) -> Outcome:
    """Takes steps until there is an outcome."""
    while (outcome := self.step()) is None:
      pass
    return outcome

  def step(self) -> Outcome | None:
    """Sends a request and runs its tool calls; the outcome if it is final."""
    reply = self.ask(self.agent.tools)
    if isinstance(reply, Outcome):
      return reply
    message, format_fault = reply.message, ''
    text = message['content']
    if self.agent.form == 'react' and self.agent.tools:
      message, text, format_fault = react.parse_reply(message, self.steps)
    self.memory.messages.append(tool_calls.replayable_message(message))
    if message.get('tool_calls'):
      self.malformed = 0
      return self._call(message['tool_calls'])
    if reply.reason == 'length':
      why = 'the server ended the answer at its length; raise max_tokens'
      return self.end('cut', text, why)
    if format_fault:
      self.malformed += 1
      if self.malformed >= self.budget.malformed:
        why = f'{self.malformed} replies in a row were not in the protocol'
        return self.end('malformed', text, why)
      self.add_message('user', format_fault)
      return None
    if not text.strip():
      return self.end('failed', why='the model answered nothing')
    return self.end('answered', text)

  def _call(self, calls: Sequence[Message]) -> Outcome | None:
    """Runs calls; refused calls also get a result, as the API requires one."""
    agent, limits = self.agent, self.budget
    remaining = limits.calls - self.calls
    allowed, refused = calls[:remaining], calls[remaining:]
    agent.on_event({'event': 'called', 'calls': allowed})
    tools = {tool.name: tool for tool in agent.tools}
    results = list(
      agent.run_calls(tools, allowed, limits.call_seconds, limits.output)
    )
    for result in results:
      agent.on_event({'event': 'returned', **dataclasses.asdict(result)})
    self.calls += len(allowed)
    used = f'the budget of {limits.calls} calls is spent'
    results += [
      ToolResult(call['id'], *call['function'].values(), used, True)
      for call in refused
    ]
    # Equal calls in one reply are no loop, as the model saw no output.
    keys = [tool_calls.result_key(result) for result in results]
    self.call_counts.update(set(keys))
    counts = [self.call_counts[key] for key in keys]
    for result, count in zip(results, counts, strict=True):
      note = _REPEATED_NOTE if count > 1 else ''
      self.memory.messages.append(
        {
          'role': 'tool',
          'tool_call_id': result.id,
          'content': tool_calls.quote_output(result) + note,
        }
      )
    if (max_count := max(counts)) >= limits.repeats:
      name = results[counts.index(max_count)].name
      why = f'{name} was called {max_count} times with the same arguments and '
      return self.end('loop', why=f'{why}the same output')
    return self.end('budget', why=used) if refused else None

  def instruct(self, instruction: str) -> str | Outcome:
    """The model's reply to an instruction, without tools."""
    self.add_message('user', instruction)
    reply = self.ask(())
    if isinstance(reply, Outcome):
      return reply
    text = reply.message['content']
    self.add_message('assistant', text)
    return text.strip()

  def plan_act_reflect(self, rounds: int = 2) -> Outcome:
    """Plans, answers and checks the answer; `rounds` is the maximum of answers.

    An answer is 'unsure' if the last check objects or fails.
    """
    if isinstance(plan := self.instruct(_PLAN_PROMPT), Outcome):
      return plan
    self.add_message('user', _ACT_PROMPT)
    for remaining in range(rounds - 1, -1, -1):
      outcome = self.act()
      if outcome.state != 'answered':
        return outcome
      verdict = self.instruct(_REFLECT_PROMPT)
      if isinstance(verdict, Outcome):
        why = f'the answer was not checked: {verdict.why}'
        return self.end('unsure', outcome.text, why)
      first = verdict.splitlines()[0] if verdict else ''
      if first.strip('."\'*').lower() == 'ok':
        return self.end('answered', outcome.text)
      if remaining:
        self.add_message('user', _RETRY_PROMPT)
    why = f'its own check objects: {verdict or "it did not say"}'
    return self.end('unsure', outcome.text, why)

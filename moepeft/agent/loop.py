# SPDX-License-Identifier: Apache-2.0
"""The loop: asks the model, runs its tools, returns their results to it.

Events are dicts of JSON with the key 'event':

  started   question, settings (what a replay needs), earlier messages
  counted   tokens of a request, where memory has a limit
  forgotten messages that memory lost
  asked     request, seconds since the question
  piece     text, as it streams
  replied   message, reason, tokens, estimated; or error, late
  called    calls that are about to run, at once
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
  """The budget of a question; None is no limit.

  Attributes:
    steps: requests to the model.
    calls: of tools; after the last one it may still answer.
    tokens: of all prompts and answers, counted after each reply: the last one
      may go over.
    seconds: of the clock on the wall; a reply is broken off then, tools that
      run are waited for.
    repeats: times that a call may give the same output.
    malformed: replies in a row that may break the protocol.
    call_seconds: that a call may take, where its tool does not say.
    output: characters of a tool's output that the model is shown.
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
    state: 'answered'; 'unsure' (its own check objects), 'cut' (the server
      ended it at its length), 'budget', 'loop' (the same calls again and
      again), 'malformed' (not in the protocol) or 'failed' (no reply).
    text: the answer, or what there was of one.
    why: a sentence where it is not 'answered'.
    steps, calls, tokens, seconds: that were used.
    estimated: whether `tokens` is in part a guess.
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
    """The outcome, with what was used so far."""
    counters = ('steps', 'calls', 'tokens', 'seconds', 'estimated')
    return Outcome(
      state, text, why, *(getattr(self, name) for name in counters)
    )

  def add_message(self, role: str, content: str) -> None:
    self.memory.messages.append({'role': role, 'content': content})

  def ask(self, tools: Sequence[Tool]) -> ChatReply | Outcome:
    """One request; an outcome where there is no budget or no reply."""
    agent, budget = self.agent, self.budget
    self.seconds = round(agent.clock() - self.start, 3)
    for name in ('steps', 'tokens', 'seconds'):
      limit, spent = getattr(budget, name), getattr(self, name)
      if limit is not None and spent >= limit:
        why = f'the budget of {limit:,} {name} is spent ({spent:,} used)'
        return self.end('budget', why=why)
    try:
      request = self._fitted(tools)
    except MemoryFullError as e:
      return self.end('budget', why=str(e))
    agent.on_event(
      {'event': 'asked', 'request': request, 'seconds': self.seconds}
    )
    self.steps += 1
    left = budget.seconds and budget.seconds - self.seconds
    try:
      reply = agent.model(
        request,
        lambda text: agent.on_event({'event': 'piece', 'text': text}),
        left,
      )
    except ReplyError as e:
      late = isinstance(e, ReplyTimeout)
      agent.on_event({'event': 'replied', 'error': str(e), 'late': late})
      return self.end('budget' if late else 'failed', why=str(e))
    agent.on_event({'event': 'replied', **dataclasses.asdict(reply)})
    self.tokens += reply.tokens
    self.estimated |= reply.estimated
    return reply

  def _fitted(self, tools: Sequence[Tool]) -> Request:
    """The request, with so much forgotten that memory holds it."""
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
          f'the question and its latest step have {tokens:,} tokens, memory '
          f'holds {memory.limit:,}; give it more, or show less of tool outputs'
        )
      self.agent.on_event({'event': 'forgotten', 'messages': forgotten})

  def act(self) -> Outcome:
    """Steps until one ends it."""
    while (outcome := self.step()) is None:
      pass
    return outcome

  def step(self) -> Outcome | None:
    """Asks once and runs what is called for; the outcome where that ends it."""
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

  def _call(self, requested: Sequence[Message]) -> Outcome | None:
    """Runs calls; each has its answer, or there would be no conversation."""
    agent, limits = self.agent, self.budget
    left = limits.calls - self.calls
    accepted, refused = requested[:left], requested[left:]
    agent.on_event({'event': 'called', 'calls': accepted})
    tools = {tool.name: tool for tool in agent.tools}
    results = list(
      agent.run_calls(tools, accepted, limits.call_seconds, limits.output)
    )
    for result in results:
      agent.on_event({'event': 'returned', **dataclasses.asdict(result)})
    self.calls += len(accepted)
    spent = f'the budget of {limits.calls} calls is spent'
    results += [
      ToolResult(call['id'], *call['function'].values(), spent, True)
      for call in refused
    ]
    # Twice in one reply is no loop: its output was not seen between.
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
    if (most := max(counts)) >= limits.repeats:
      name = results[counts.index(most)].name
      why = f'{name} was called {most} times with the same arguments and '
      return self.end('loop', why=f'{why}the same output')
    return self.end('budget', why=spent) if refused else None

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
    """A plan, an answer, and a check of it; answers anew so many times at most.

    An answer that the last check objects to is 'unsure', never 'answered'; one
    that could not be checked is too.
    """
    if isinstance(ended := self.instruct(_PLAN_PROMPT), Outcome):
      return ended
    self.add_message('user', _ACT_PROMPT)
    for left in range(rounds - 1, -1, -1):
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
      if left:
        self.add_message('user', _RETRY_PROMPT)
    why = f'its own check objects: {verdict or "it did not say"}'
    return self.end('unsure', outcome.text, why)

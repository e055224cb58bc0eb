# SPDX-License-Identifier: Apache-2.0
"""The loop: ask the model, run its tools, tell it the results, until it ends.

Acting, planning and reflecting are functions over the same `step`.
"""

import collections
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moepeft.agent import events
from moepeft.agent.calls import Limits, Result
from moepeft.agent.events import Outcome, Tell
from moepeft.agent.forms import Form, Said
from moepeft.agent.memory import Full, Memory
from moepeft.agent.model import Call, Failed, Late, Model, Reply
from moepeft.agent.tools import Tool

RunCalls = Callable[
  [Mapping[str, Tool], Sequence[Call], Limits], Sequence[Result]
]
_PLAN = (
  'Before you begin: write a short numbered plan of how you will answer this, '
  'at most five lines. Do not answer yet.'
)
_ACT = 'Now carry the plan out, and answer.'
_REFLECT = (
  'Check your answer: does it answer the question, and does what you found '
  'support it? Reply with OK alone if so, else with what is wrong in a line.'
)
_AGAIN = 'Now mend that, and answer anew.'
_SAME = (
  '\nThe same call gave the same output before. Do something else, or answer.'
)


@dataclasses.dataclass(frozen=True)
class Budget:
  """What a question may cost; None is no limit.

  Attributes:
    steps: requests to the model.
    calls: of tools; after the last one it may still answer.
    tokens: of all prompts and answers, counted after each reply: the last one
      may go over.
    seconds: of the clock on the wall; a reply is broken off then, tools that
      run are waited for (see `Limits`).
    repeats: times that a call may give the same output.
    malformed: replies in a row that may break the protocol.
  """

  steps: int = 10
  calls: int = 30
  tokens: int | None = None
  seconds: float | None = None
  repeats: int = 3
  malformed: int = 3


class Run:
  """A question under way: what it has used, and what it works with."""

  def __init__(
    self,
    model: Model,
    form: Form,
    tools: Mapping[str, Tool],
    memory: Memory,
    system: str,
    options: Mapping[str, Any],
    budget: Budget,
    limits: Limits,
    tell: Tell,
    clock: Callable[[], float],
    run_calls: RunCalls,
  ):
    """Begins now."""
    self.model, self.form, self.tools = model, form, tools
    self.memory, self.system, self.options = memory, system, options
    self.budget, self.limits = budget, limits
    self.tell, self.clock, self.run_calls = tell, clock, run_calls
    self.begun, self.elapsed = clock(), 0.0
    self.steps = self.calls = self.tokens = self.malformed = 0
    self.estimated = False
    self.seen: collections.Counter = collections.Counter()

  def spent(self) -> str:
    """Which limit is reached, a sentence; '' for none. Looks at the clock."""
    self.elapsed = round(self.clock() - self.begun, 3)
    for name in ('steps', 'tokens', 'seconds'):
      limit = getattr(self.budget, name)
      used = self.elapsed if name == 'seconds' else getattr(self, name)
      if limit is not None and used >= limit:
        return f'the budget of {limit:,} {name} is spent ({used:,} used)'
    return ''

  def end(self, state: str, text: str = '', why: str = '') -> Outcome:
    """The outcome, with what was used so far."""
    return Outcome(
      state,
      text,
      why,
      self.steps,
      self.calls,
      self.tokens,
      self.estimated,
      self.elapsed,
    )

  def ask(self, tools: Sequence[Tool]) -> Reply | Outcome:
    """One request; an outcome where there is no budget or no reply."""
    if why := self.spent():
      return self.end(events.BUDGET, why=why)
    try:
      messages = self.memory.messages(self.system, self.tell)
    except Full as e:
      return self.end(events.BUDGET, why=str(e))
    request = {
      'messages': messages,
      **self.form.request(tools),
      **self.options,
    }
    self.tell(events.Asked(request, self.elapsed))
    self.steps += 1
    try:
      reply = self.model(request, self._piece, self._left())
    except Failed as e:
      late = isinstance(e, Late)
      self.tell(events.Replied(None, str(e), late))
      state = events.BUDGET if late else events.FAILED
      return self.end(state, why=str(e))
    self.tell(events.Replied(reply))
    self.tokens += reply.tokens
    self.estimated = self.estimated or reply.estimated
    return reply

  def _left(self) -> float | None:
    if self.budget.seconds is None:
      return None
    return max(0.001, self.budget.seconds - self.elapsed)

  def _piece(self, text: str) -> None:
    self.tell(events.Piece(text))


def step(run: Run) -> Outcome | None:
  """Asks once and runs what is called for; the outcome where that ends it."""
  reply = run.ask(list(run.tools.values()))
  if isinstance(reply, Outcome):
    return reply
  said = run.form.read(reply, run.steps)
  if said.calls:
    run.malformed = 0
    return _run_calls(run, said)
  if said.wrong:
    return _wrong(run, said)
  run.memory.step([said.message])
  if reply.reason == 'length':
    why = 'the server ended the answer at its length; raise max_tokens'
    return run.end(events.CUT, said.text, why)
  if not said.text.strip():
    return run.end(events.FAILED, why='the model answered nothing')
  return run.end(events.ANSWERED, said.text)


def _wrong(run: Run, said: Said) -> Outcome | None:
  """A reply outside the protocol: the model is told, some times."""
  run.malformed += 1
  if run.malformed >= run.budget.malformed:
    run.memory.step([said.message])
    why = f'{run.malformed} replies in a row were not in the protocol'
    return run.end(events.MALFORMED, said.text, why)
  run.memory.step([said.message, {'role': 'user', 'content': said.wrong}])
  return None


def _run_calls(run: Run, said: Said) -> Outcome | None:
  left = max(0, run.budget.calls - run.calls)
  taken, refused = said.calls[:left], said.calls[left:]
  run.tell(events.Called(taken))
  results = list(run.run_calls(run.tools, taken, run.limits)) if taken else []
  run.calls += len(taken)
  for result in results:
    run.tell(events.Returned(result))
  # Each call has its answer, or the conversation would not be one.
  why = f'the budget of {run.budget.calls} calls is spent'
  results += [Result(call, why, True) for call in refused]
  counts = [_seen(run, result) for result in results]
  notes = [_SAME if count > 1 else '' for count in counts]
  told = run.form.results(list(zip(results, notes, strict=True)))
  run.memory.step([said.message, *told])
  if max(counts) >= run.budget.repeats:
    name = results[counts.index(max(counts))].call.name
    return run.end(
      events.LOOP,
      why=f'{name} was called {max(counts)} times with the same arguments and '
      'the same output',
    )
  return run.end(events.BUDGET, why=why) if refused else None


def _seen(run: Run, result: Result) -> int:
  """How often a call has given this output."""
  try:
    arguments = json.dumps(json.loads(result.call.arguments), sort_keys=True)
  except ValueError:
    arguments = result.call.arguments
  key = (result.call.name, arguments, result.text)
  run.seen[key] += 1
  return run.seen[key]


def act(run: Run) -> Outcome:
  """Steps until one ends it."""
  while (outcome := step(run)) is None:
    pass
  return outcome


def say(run: Run, instruction: str) -> Reply | Outcome:
  """One request without tools, kept in memory with its instruction."""
  run.memory.step([{'role': 'user', 'content': instruction}])
  reply = run.ask(())
  if isinstance(reply, Reply):
    # A pair, so that the roles stay in turns when one is forgotten.
    asked = run.memory.units.pop().messages
    answer = {'role': 'assistant', 'content': reply.text}
    run.memory.step([*asked, answer])
  return reply


def plan(run: Run) -> Outcome | None:
  """Has the model write a plan first; an outcome where it could not."""
  reply = say(run, _PLAN)
  if isinstance(reply, Outcome):
    return reply
  run.memory.step([{'role': 'user', 'content': _ACT}])
  return None


def reflect(run: Run) -> str | Outcome:
  """What the model has against its answer; '' for nothing."""
  reply = say(run, _REFLECT)
  if isinstance(reply, Outcome):
    return reply
  text = reply.text.strip()
  is_ok = text.strip('."\'*').lower() == 'ok' or text.lower().startswith('ok\n')
  return '' if is_ok else text or 'it did not say'


def plan_act_reflect(run: Run, rounds: int = 2) -> Outcome:
  """A plan, an answer, and a check of it; answers anew so many times at most.

  An answer that the last check objects to is UNSURE, never ANSWERED; one that
  could not be checked is too.
  """
  if ended := plan(run):
    return ended
  for left in range(rounds - 1, -1, -1):
    outcome = act(run)
    if outcome.state != events.ANSWERED:
      return outcome
    objection = reflect(run)
    if isinstance(objection, Outcome):
      why = f'the answer was not checked: {objection.why}'
      return run.end(events.UNSURE, outcome.text, why)
    if not objection:
      return run.end(events.ANSWERED, outcome.text)
    if left:
      run.memory.step([{'role': 'user', 'content': _AGAIN}])
  why = f'its own check objects: {objection}'
  return run.end(events.UNSURE, outcome.text, why)


MODES = {'act': act, 'plan': plan_act_reflect}

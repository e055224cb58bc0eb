# SPDX-License-Identifier: Apache-2.0
"""A dialogue with states and slots, which may end with a person.

  open       no request is known
  filling    a request is known, and some of its slots are empty
  confirming all slots are filled; the customer says yes or no
  done       the request was carried out
  handed_over  a person continues, with what is known so far

A model of language only reads a message (`understand`); this file decides.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

from examples.knowledge_base.answer import Answer

STATES = ('open', 'filling', 'confirming', 'done', 'handed_over')


@dataclasses.dataclass(frozen=True)
class Slot:
  """A value that a request needs.

  Attributes:
    prompt: the question for it.
    pattern: a regular expression of the value in a message; '' for a choice.
    choices: {value: example phrases}, for a slot without pattern.
  """

  prompt: str
  pattern: str = ''
  choices: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)


_ORDER = Slot(
  'What is the number of your order? It has two letters and five digits.',
  r'\b[A-Z]{2}-?\d{5}\b',
)
_EMAIL = Slot('What is your e-mail address?', r'\b[\w.+-]+@[\w-]+\.[\w.-]*\w\b')
_REASON = Slot(
  'Why do you return it: damaged, wrong item, or not needed?',
  choices={
    'damaged': ('It is broken.', 'It arrived damaged.', 'It has a crack.'),
    'wrong item': (
      'You sent another article.',
      'It is the wrong item.',
      'I got something that I did not order.',
    ),
    'not needed': (
      'I do not need it any more.',
      'I changed my mind.',
      'I do not like it.',
    ),
  },
)
_ADDRESS = Slot(
  'What is the new address? Street and number, postal code and town.',
  r'\b[A-Z]\w+(?: [A-Z]\w+)* \d+[a-z]?, ?\d{5} [A-Z]\w+',
)


@dataclasses.dataclass(frozen=True)
class Request:
  """A kind of request: its slots, and phrases that ask for it."""

  summary: str
  slots: Mapping[str, Slot]
  examples: Sequence[str]


REQUESTS = {
  'return': Request(
    'a return of order {order} ({reason})',
    {'order': _ORDER, 'reason': _REASON},
    (
      'I want to send something back.',
      'How can I return my order?',
      'I want to return order 12345.',
      'I would like a refund.',
      'Please take this article back.',
      'The lamp is broken, I want my money back.',
    ),
  ),
  'track': Request(
    'news on order {order}, sent to {email}',
    {'order': _ORDER, 'email': _EMAIL},
    (
      'Where is my parcel?',
      'When will my order arrive?',
      'My package has not come yet.',
      'Track my delivery, please.',
      'Is my order on its way?',
    ),
  ),
  'address': Request(
    'a new address for order {order}: {address}',
    {'order': _ORDER, 'address': _ADDRESS},
    (
      'I have moved, please change my address.',
      'Send it to another address.',
      'The delivery address is wrong.',
      'Can you deliver it to my office instead?',
      'My street has changed.',
    ),
  ),
}
# Messages that are no request.
MESSAGES = {
  'human': (
    'I want to speak to a person.',
    'Give me a real human.',
    'Connect me with an employee.',
    'Let me talk to your manager.',
    'I do not want to talk to a bot.',
    'This is useless, get me a human agent.',
  ),
  'yes': ('Yes.', 'That is right.', 'Correct, go ahead.', 'Yes, please do.'),
  'no': ('No.', 'That is wrong.', 'No, stop.', 'Please do not do that.'),
  'question': (
    'How long do I have to send something back?',
    'What does shipping cost?',
    'Which ways of payment are there?',
    'Do you ship to other countries?',
    'Is there a guarantee?',
    'When are you open?',
    'How long does a delivery take?',
    'Do you have a shop in town?',
  ),
}


@dataclasses.dataclass(frozen=True)
class Understanding:
  """The content of a message.

  Attributes:
    intent: a name of REQUESTS or MESSAGES; '' if it is none.
    slots: values in the message.
  """

  intent: str
  slots: Mapping[str, str]


def pattern_slots(message: str) -> dict[str, str]:
  """Values in a message of the slots that have a pattern."""
  slots = {
    name: slot for r in REQUESTS.values() for name, slot in r.slots.items()
  }
  return {
    name: match[0]
    for name, slot in slots.items()
    if slot.pattern and (match := re.search(slot.pattern, message))
  }


@dataclasses.dataclass
class Dialogue:
  """A conversation with a customer.

  Attributes:
    understand: (message, name of the slot that was asked for) -> its content.
    answer: question -> answer from documents.
    max_failures: messages in a row that help nothing, until a person takes
      over.
    request: a name of REQUESTS, or ''.
    slots: values so far, which the customer wrote.
    reason: why a person takes over.
    transcript: (speaker, text).
  """

  understand: Callable[[str, str], Understanding]
  answer: Callable[[str], Answer]
  max_failures: int = 2
  state: str = 'open'
  request: str = ''
  slots: dict[str, str] = dataclasses.field(default_factory=dict)
  reason: str = ''
  transcript: list[tuple[str, str]] = dataclasses.field(default_factory=list)
  _failures: int = 0

  def respond(self, message: str) -> str:
    """The reply to a message; moves to the next state.

    Raises:
      ValueError: the dialogue is over.
    """
    if self.state in ('done', 'handed_over'):
      raise ValueError(f'the dialogue is {self.state}; begin another one')
    self.transcript.append(('customer', message))
    reply = self._reply(self.understand(message, self._next_slot()))
    self.transcript.append(('service', reply))
    return reply

  def hand_over(self) -> dict:
    """The card for the person who takes over."""
    return {
      'reason': self.reason,
      'request': self.request,
      'slots': dict(self.slots),
      'transcript': list(self.transcript),
    }

  def _reply(self, content: Understanding) -> str:
    if content.intent == 'human':
      return self._to_person('the customer asks for a person')
    if self.state == 'confirming' and content.intent in ('yes', 'no'):
      return self._confirmed(content.intent == 'yes')
    started = not self.request and content.intent in REQUESTS
    if started:
      self.request = content.intent
    progress = self._fill(content.slots) or started
    if progress:
      self.state = 'filling' if self._next_slot() else 'confirming'
    is_question = content.intent == 'question'
    # A message that does not advance a request may be a question, too.
    if is_question or (self.request and not progress):
      answer = self.answer(self.transcript[-1][1])
      if answer.citations:
        self._failures = 0
        return f'{answer} {self._prompt()}'
    if not progress:
      problem = 'the documents do not answer it'
      return self._failed(
        problem if is_question else 'the messages are not understood'
      )
    self._failures = 0
    return self._prompt()

  def _fill(self, slots: Mapping[str, str]) -> bool:
    """Takes values of the request's slots; whether there is a new one."""
    needed = REQUESTS[self.request].slots if self.request else {}
    new = {
      name: value
      for name, value in slots.items()
      if name in needed and self.slots.get(name) != value
    }
    self.slots |= new
    return bool(new)

  def _confirmed(self, yes: bool) -> str:
    if yes:
      self.state = 'done'
      return 'Done. You will get an e-mail about it.'
    # Which value is wrong is unknown: all are asked for again.
    self.slots, self.state = {}, 'filling'
    return self._failed('the customer does not confirm')

  def _failed(self, reason: str) -> str:
    self._failures += 1
    if self._failures > self.max_failures:
      return self._to_person(reason)
    return f'Sorry, I cannot help with that. {self._prompt()}'.strip()

  def _to_person(self, reason: str) -> str:
    self.state, self.reason = 'handed_over', reason
    return 'I connect you with a colleague, who can read what you wrote.'

  def _next_slot(self) -> str:
    needed = REQUESTS[self.request].slots if self.request else {}
    return next((name for name in needed if name not in self.slots), '')

  def _prompt(self) -> str:
    if not self.request:
      return 'Is it about a return, a parcel or an address?'
    if name := self._next_slot():
      return REQUESTS[self.request].slots[name].prompt
    summary = REQUESTS[self.request].summary.format(**self.slots)
    return f'I note {summary}. Is that right?'

# SPDX-License-Identifier: Apache-2.0
"""Plays generated customers against the dialogue, and counts how it ends.

  python -m moepeft.serve --model=smollm2 --embeddings=minilm
  python -m examples.customer_service.evaluate

A customer has a request and its values, in words that are not among the
examples, and answers what the service asks. Some also ask a question in
between, want a person, or speak of something that the service does not do.
"""

import dataclasses
import random
from collections.abc import Iterator, Sequence

from examples.customer_service.chat import TERMS
from examples.customer_service.dialogue import REQUESTS, Dialogue
from examples.customer_service.understand import ByExamples, ByModel
from examples.knowledge_base import answer as answer_lib
from examples.knowledge_base import client as client_lib
from examples.knowledge_base import evaluate, loaders, search
from examples.knowledge_base.search import Embedder, KnowledgeBase
from examples.knowledge_base.stores.sqlite import SqliteStore

_MAX_TURNS = 12
_OPENINGS = {
  'return': (
    'The thing I bought should go back to you.',
    'I am not happy with my purchase and want to give it back.',
    'Refund please!',
  ),
  'track': (
    'I am still waiting for my delivery.',
    'Has my stuff been shipped?',
    'The parcel should have been here on Monday, where is it?',
  ),
  'address': (
    'We live somewhere else now, update where you send it.',
    'You have my old address.',
    'Can the parcel go to a different street?',
  ),
  'human': (
    'Is there anybody real I can talk to?',
    'Please put me through to someone from your team.',
    'No robots, I need a staff member.',
  ),
  'unknown': (
    'My cat sings in the morning.',
    'Write me a poem on the sea.',
    'The capital of France is nice in spring.',
  ),
}
_VALUES = {
  'reason': {
    'damaged': ('The screen is shattered.', 'It came in pieces.'),
    'wrong item': ('I ordered shoes and got a hat.', 'That is not my article.'),
    'not needed': ('I have no use for it.', 'It does not please me.'),
  }
}
_CONFIRM = ('Yes, exactly.', 'That is correct.', 'Right.')
_QUESTIONS = (
  ('How much is the postage?', '4.90'),
  ('Until when can goods be given back?', '30 days'),
  ('Can I pay on invoice?', 'invoice'),
  ('Are batteries covered by the guarantee?', 'six months'),
)


@dataclasses.dataclass(frozen=True)
class Customer:
  """A generated customer.

  Attributes:
    goal: a name of REQUESTS, 'human' or 'unknown'.
    slots: the values of the request.
    replies: {slot: message with its value}.
    question: (question, text that its answer has), asked second; or None.
  """

  goal: str
  opening: str
  slots: dict[str, str]
  replies: dict[str, str]
  question: tuple[str, str] | None
  confirmation: str


def customers(count: int, seed: int) -> Iterator[Customer]:
  rng = random.Random(seed)
  for i in range(count):
    goal = list(_OPENINGS)[i % len(_OPENINGS)]
    order = (
      f'{rng.choice("KLM")}{rng.choice("XYZ")}-{rng.randint(10000, 99999)}'
    )
    email = f'{rng.choice(["ada", "ben", "eva"])}{rng.randint(1, 99)}@mail.test'
    address = f'{rng.choice(["Mill", "Oak"])} Road {rng.randint(1, 99)}, '
    address += f'{rng.randint(10000, 99999)} {rng.choice(["Arden", "Bruck"])}'
    reason = rng.choice(list(_VALUES['reason']))
    values = {'order': order, 'email': email, 'address': address}
    values['reason'] = reason
    replies = {name: f'It is {value}.' for name, value in values.items()}
    replies['reason'] = rng.choice(_VALUES['reason'][reason])
    needed = REQUESTS[goal].slots if goal in REQUESTS else {}
    yield Customer(
      goal,
      rng.choice(_OPENINGS[goal]),
      {name: values[name] for name in needed},
      {name: replies[name] for name in needed},
      rng.choice(_QUESTIONS)
      if goal in REQUESTS and rng.random() < 0.5
      else None,
      rng.choice(_CONFIRM),
    )


@dataclasses.dataclass(frozen=True)
class Result:
  """The end of a dialogue.

  Attributes:
    right: whether the request was done with the customer's values, or a person
      took over where one should.
    answered: whether the question was answered; None without one.
    turns: messages of the customer.
  """

  right: bool
  answered: bool | None
  turns: int
  state: str


def play(dialogue: Dialogue, customer: Customer) -> Result:
  """Lets a customer talk until the dialogue is over."""
  dialogue.respond(customer.opening)
  turns, answered = 1, None
  if customer.question and dialogue.state not in ('done', 'handed_over'):
    question, value = customer.question
    answered = value in dialogue.respond(question)
    turns += 1
  while dialogue.state not in ('done', 'handed_over') and turns < _MAX_TURNS:
    dialogue.respond(_next_message(dialogue, customer))
    turns += 1
  if customer.goal in REQUESTS:
    right = (
      dialogue.state == 'done'
      and dialogue.request == customer.goal
      and dialogue.slots == customer.slots
    )
  else:
    right = dialogue.state == 'handed_over'
  return Result(right, answered, turns, dialogue.state)


def _next_message(dialogue: Dialogue, customer: Customer) -> str:
  if dialogue.state == 'confirming':
    right = dialogue.request == customer.goal
    same = right and dialogue.slots == customer.slots
    return customer.confirmation if same else 'No, that is not right.'
  prompts = {
    slot.prompt: name
    for request in REQUESTS.values()
    for name, slot in request.slots.items()
  }
  last = dialogue.transcript[-1][1]
  for prompt, name in prompts.items():
    if last.endswith(prompt) and name in customer.replies:
      return customer.replies[name]
  return customer.opening


def main(argv: Sequence[str] | None = None) -> None:
  parser = client_lib.parser('customer_service.evaluate', __doc__)
  parser.add_argument('--customers', type=int, default=100)
  parser.add_argument('--seed', type=int, default=0)
  help_text = 'Do not measure the chat model.'
  parser.add_argument('--examples_only', action='store_true', help=help_text)
  flags = parser.parse_args(argv)
  client = client_lib.connect(flags)
  embed = Embedder(client, flags.embeddings)
  store = SqliteStore(':memory:', embed.model)
  base = KnowledgeBase(store, embed, rerank=search.by_sentences(embed))
  base.add(loaders.load(str(TERMS)), 50, 10)

  def answer(question: str):
    hits = base.search(question, 5)
    return answer_lib.quote(embed, question, hits, 0.4)

  readers = {'examples': ByExamples(embed)}
  if not flags.examples_only:
    readers['model'] = ByModel(client_lib.chat_model(flags, client))
  rows = []
  for name, understand in readers.items():
    results: dict[str, list[Result]] = {}
    for customer in customers(flags.customers, flags.seed):
      result = play(Dialogue(understand, answer), customer)
      results.setdefault(customer.goal, []).append(result)
    for goal, group in results.items():
      answered = [r.answered for r in group if r.answered is not None]
      rows.append(
        (
          *(name, goal, len(group)),
          sum(r.right for r in group),
          f'{sum(answered)} of {len(answered)}',
          sum(r.turns for r in group) / len(group),
        )
      )
  head = (
    'understood by',
    'goal',
    'customers',
    'right end',
    'answered',
    'turns',
  )
  evaluate.print_table(head, rows)


if __name__ == '__main__':
  client_lib.run(main)

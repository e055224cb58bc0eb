# SPDX-License-Identifier: Apache-2.0
"""Talks to a customer on the terminal.

  python -m moepeft.serve --model=smollm2 --embeddings=minilm
  python -m examples.customer_service.chat

Questions are answered from --documents, by default the shop's terms beside this
file. A hand-over is printed as JSON, for the software of a service desk.
"""

import json
import pathlib
import sys
from collections.abc import Sequence

from examples.customer_service.dialogue import Dialogue
from examples.customer_service.understand import ByExamples, ByModel
from examples.knowledge_base import ask as knowledge_ask
from examples.knowledge_base import client as client_lib
from examples.knowledge_base import loaders
from moepeft.core import terminal

TERMS = pathlib.Path(__file__).parent / 'terms.md'


def main(argv: Sequence[str] | None = None) -> None:
  parser = client_lib.parser('customer_service.chat', __doc__)
  client_lib.add_search_flags(parser)
  knowledge_ask.add_answer_flags(parser)
  parser.set_defaults(documents=str(TERMS), answer='quote', size=50, overlap=10)
  parser.add_argument(
    '--understand',
    choices=('examples', 'model'),
    default='examples',
    help='By example phrases, or by the chat model.',
  )
  flags = parser.parse_args(argv)
  client = client_lib.connect(flags)
  base = client_lib.open_knowledge_base(flags, client)
  knowledge_ask.index(base, loaders.load(flags.documents), flags)
  model = None
  if 'model' in (flags.answer, flags.understand):
    model = client_lib.chat_model(flags, client)
  understand = (
    ByModel(model) if flags.understand == 'model' else ByExamples(base.embed)
  )
  answering = model if flags.answer == 'model' else None

  def answer(question: str):
    hits = base.search(question, flags.k)
    return knowledge_ask.answer_hits(base, answering, question, hits, flags)

  dialogue = Dialogue(understand, answer)
  terminal.show('Good day! What can I do for you?')
  for line in filter(str.strip, sys.stdin):
    terminal.show(dialogue.respond(line.strip()))
    if dialogue.state in ('done', 'handed_over'):
      break
  if dialogue.state == 'handed_over':
    terminal.show(json.dumps(dialogue.hand_over(), indent=2))


if __name__ == '__main__':
  client_lib.run(main)

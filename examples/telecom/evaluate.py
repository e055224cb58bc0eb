# SPDX-License-Identifier: Apache-2.0
"""Asks the base and the adapter, with retrieval and without.

  python -m moepeft.serve --model=smollm2 --adapter=telecom=workdirs/telecom \\
    --embeddings=minilm
  python -m examples.telecom.evaluate --model=smollm2 --adapter=telecom

An answer is right if it has the value of the question: of this year's tariffs,
which are in documents, or of a router's code, which the adapter has learned.
"""

import dataclasses
import pathlib
import tempfile
from collections.abc import Sequence

from examples.knowledge_base import client as client_lib
from examples.knowledge_base import evaluate, search
from examples.knowledge_base.corpus import Question
from examples.knowledge_base.search import Embedder, KnowledgeBase
from examples.telecom import data
from moepeft.agent.chat_model import ServerModel


def share_right(
  model: ServerModel,
  base: KnowledgeBase | None,
  questions: Sequence[Question],
  k: int,
) -> float:
  """The share of right answers.

  Args:
    base: None for no retrieval.
  """
  right = 0
  for question in questions:
    hits = base.search(question.text, k) if base else []
    text = data.prompt(question.text, [hit.passage.indexed for hit in hits])
    request = {'messages': [{'role': 'user', 'content': text}]}
    reply = model(
      request | {'temperature': 0, 'max_tokens': 40}, lambda text: None, None
    )
    right += question.answer.lower() in reply.message['content'].lower()
  return right / len(questions)


def main(argv: Sequence[str] | None = None) -> None:
  parser = client_lib.parser('telecom.evaluate', __doc__)
  add = parser.add_argument
  add('--adapter', default='telecom', help="The adapter's name.")
  add('--questions', type=int, default=50, help='On tariffs.')
  add('--k', type=int, default=2, help='Passages that the model reads.')
  flags = parser.parse_args(argv)
  client = client_lib.connect(flags)
  embed = Embedder(client, flags.embeddings)
  model = client_lib.chat_model(flags, client)
  adapter = ServerModel(client, flags.adapter, stream=False)
  corpus = data.tariffs('current')
  questions = {
    'tariffs': corpus.sample(True, flags.questions, seed=0),
    'codes': list(data.code_questions([data.HELD_OUT_CODE_QUESTION])),
  }
  with tempfile.TemporaryDirectory() as folder:
    base = evaluate.index(corpus, pathlib.Path(folder), embed, 25, 5)
  base = dataclasses.replace(base, rerank=search.by_sentences(embed))
  recalled = evaluate.recall(base, questions['tariffs'])
  print('recall of tariffs:', *[f'{share:.2f}' for share in recalled])
  print('at', *evaluate.DEPTHS, 'passages\n')
  evaluate.print_table(
    ('model', 'retrieval', *questions),
    (
      (
        *(chat.name, 'yes' if retrieval else 'no'),
        *(share_right(chat, retrieval, q, flags.k) for q in questions.values()),
      )
      for chat in (model, adapter)
      for retrieval in (None, base)
    ),
  )


if __name__ == '__main__':
  client_lib.run(main)

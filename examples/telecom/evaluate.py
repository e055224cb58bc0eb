# SPDX-License-Identifier: Apache-2.0
"""Asks the base and the adapter, with retrieval and without.

  python -m moepeft.serve --model=package:t5_tiny --embeddings=minilm \\
    --adapter=telecom=workdirs/telecom --places=512
  python -m examples.telecom.evaluate

An answer is right if it is the value of the question: of this year's tariffs,
which are in documents, or of a router's code, which the adapter has learned.
"""

import pathlib
import tempfile
from collections.abc import Sequence

import openai

from examples.knowledge_base import client as client_lib
from examples.knowledge_base import evaluate
from examples.knowledge_base.corpus import Question
from examples.knowledge_base.search import Embedder, KnowledgeBase, by_sentences
from examples.telecom import data
from moepeft.agent.chat_model import list_models, send


def share_right(
  client: openai.OpenAI,
  model: str,
  base: KnowledgeBase | None,
  questions: Sequence[Question],
  k: int,
) -> float:
  """The share of right answers.

  Args:
    base: None for no retrieval.
  """
  prompts = []
  for question in questions:
    hits = base.search(question.text, k) if base else []
    prompts.append(data.prompt(question.text, [hit.passage for hit in hits]))
  reply = send(
    client,
    lambda: client.completions.create(
      model=model, prompt=prompts, temperature=0, max_tokens=32
    ),
  )
  answers = [choice.text.strip().lower() for choice in reply.choices]
  right = [
    q.answer.lower() == a for q, a in zip(questions, answers, strict=True)
  ]
  return sum(right) / len(right)


def main(argv: Sequence[str] | None = None) -> None:
  parser = client_lib.parser('telecom.evaluate', __doc__)
  add = parser.add_argument
  add('--adapter', default='telecom', help="The adapter's name.")
  add('--questions', type=int, default=60, help='On tariffs.')
  add('--k', type=int, default=2, help='Passages that the model reads.')
  flags = parser.parse_args(argv)
  client = client_lib.connect(flags)
  served = list_models(client)
  if flags.adapter not in served:
    raise ValueError(
      f'the server has no adapter {flags.adapter!r}, only {", ".join(served)}; '
      f'start it with --adapter={flags.adapter}=WORKDIR, or name another with '
      '--adapter'
    )
  embed = Embedder(client, flags.embeddings)
  corpus = data.tariffs(data.CURRENT_YEAR)
  questions = {
    'tariffs': corpus.sample(True, flags.questions, seed=0),
    'codes': data.code_questions([data.HELD_OUT_CODE_QUESTION]),
  }
  with tempfile.TemporaryDirectory() as folder:
    # Passages of one sentence, as the adapter has learned to read.
    base = evaluate.index(corpus, pathlib.Path(folder), embed, 16, 0)
  base.rerank = by_sentences(embed)
  recalled = evaluate.recall(base, questions['tariffs'])
  print('recall of tariffs:', *[f'{share:.2f}' for share in recalled])
  print('at', *evaluate.DEPTHS, 'passages\n')
  names = client_lib.chat_model(flags, client).name, flags.adapter
  evaluate.print_table(
    ('model', 'retrieval', *questions),
    (
      (
        *(name, 'yes' if retrieval else 'no'),
        *(
          share_right(client, name, retrieval, group, flags.k)
          for group in questions.values()
        ),
      )
      for name in names
      for retrieval in (None, base)
    ),
  )


if __name__ == '__main__':
  client_lib.run(main)

# SPDX-License-Identifier: Apache-2.0
"""Answers from passages, with citations, or 'not in the documents'."""

import dataclasses
from collections.abc import Sequence

from examples.knowledge_base.search import Embedder, Hit, best_sentences
from examples.knowledge_base.splitter import Passage, terms
from moepeft.agent.chat_markers import escape_markers
from moepeft.agent.chat_model import ChatModel, Message
from moepeft.agent.loop import ignore_event

NOT_IN_DOCUMENTS = 'not in the documents'
_STOP_WORDS = frozenset(
  terms(
    'a an and are as at be by can do does for from has have how in is it its '
    'may no not of on or that the there this to was what when where which who '
    'will with you your'
  )
)
_SYSTEM = (
  'You answer questions from passages alone, in one short sentence with the '
  'words of a passage. If no passage has the answer, answer: '
  f'{NOT_IN_DOCUMENTS}.'
)
_REWRITE = (
  'Rewrite the last question of this conversation as one question that can be '
  'understood alone. Do not answer it.'
)


@dataclasses.dataclass(frozen=True)
class Answer:
  """An answer and the passages that support it.

  Attributes:
    text: the answer, or NOT_IN_DOCUMENTS.
    citations: the passages; none if the text is NOT_IN_DOCUMENTS.
    support: between 0 and 1, see `support`; for a quote the cosine.
    draft: the model's answer, which its passages may not support.
  """

  text: str
  citations: tuple[Passage, ...] = ()
  support: float = 0.0
  draft: str = ''

  def __str__(self) -> str:
    places = dict.fromkeys(passage.source for passage in self.citations)
    return ' '.join([self.text, *(f'[{place}]' for place in places)])


def support(answer: str, question: str, passages: Sequence[Passage]) -> float:
  """The share of an answer's terms that its passages have.

  Terms of the question and stop words do not count. An answer with a number
  that no passage has is without support.
  """
  evidence = {t for passage in passages for t in terms(passage.indexed)}
  content = set(terms(answer)) - _STOP_WORDS
  numbers = {t for t in content if any(c.isdigit() for c in t)}
  if not passages or not content or numbers - evidence:
    return 0.0
  # An answer may consist of the question's terms, as 'Yes, A causes B' does.
  content = content - set(terms(question)) or content
  return len(content & evidence) / len(content)


def quote(
  embed: Embedder, question: str, hits: Sequence[Hit], threshold: float
) -> Answer:
  """The sentence nearest to the question, without a language model.

  Args:
    threshold: the smallest cosine of a sentence that is an answer.
  """
  best = best_sentences(embed, question, hits)
  if not best:
    return Answer(NOT_IN_DOCUMENTS)
  index = max(best, key=lambda i: best[i][1])
  sentence, score = best[index]
  if score < threshold:
    return Answer(NOT_IN_DOCUMENTS, support=score, draft=sentence)
  return Answer(sentence, (hits[index].passage,), score, sentence)


def cite(
  answer: str, question: str, passages: Sequence[Passage]
) -> tuple[tuple[Passage, ...], float]:
  """The fewest passages that support an answer best, and its support.

  They are taken from the texts, as a model may name a wrong one.
  """
  chosen: list[Passage] = []
  score = 0.0
  for _ in passages:
    shares = [support(answer, question, [*chosen, p]) for p in passages]
    if max(shares) <= score:
      break
    score = max(shares)
    chosen.append(passages[shares.index(score)])
  return tuple(chosen), score


def ask(
  model: ChatModel,
  question: str,
  hits: Sequence[Hit],
  min_support: float,
  max_tokens: int = 60,
) -> Answer:
  """The model's answer, if passages support it.

  Args:
    min_support: the smallest `support` of an answer.
  """
  if not hits:
    return Answer(NOT_IN_DOCUMENTS)
  passages = [hit.passage for hit in hits]
  texts = '\n\n'.join(escape_markers(p.indexed) for p in passages)
  request = {
    'messages': [
      {'role': 'system', 'content': _SYSTEM},
      {'role': 'user', 'content': f'{texts}\n\nQuestion: {question}'},
    ],
    'temperature': 0,
    'max_tokens': max_tokens,
  }
  draft = model(request, ignore_event, None).message['content'].strip()
  cited, score = cite(draft, question, passages)
  if NOT_IN_DOCUMENTS in draft.lower() or score < min_support or not cited:
    return Answer(NOT_IN_DOCUMENTS, support=score, draft=draft)
  return Answer(draft, cited, score, draft)


def rewrite(model: ChatModel, history: Sequence[Message]) -> list[str]:
  """Queries for a conversation: its last question, and that rewritten.

  Both are searched for, as a rewritten question may lose what is asked.
  """
  question = history[-1]['content']
  turns = '\n'.join(f'{turn["role"]}: {turn["content"]}' for turn in history)
  request = {
    'messages': [{'role': 'user', 'content': f'{turns}\n\n{_REWRITE}'}],
    'temperature': 0,
    'max_tokens': 60,
  }
  reply = model(request, ignore_event, None)
  rewritten = ' '.join(reply.message['content'].split())
  return [*dict.fromkeys([question, rewritten or question])]

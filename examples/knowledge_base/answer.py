# SPDX-License-Identifier: Apache-2.0
"""Answers from passages, with citations, or 'not in the documents'."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import pydantic

from examples.knowledge_base.search import Embedder, Hit, best_sentences
from examples.knowledge_base.splitter import Passage, terms
from moepeft.agent.chat_markers import escape_markers
from moepeft.agent.chat_model import ChatModel, Message
from moepeft.agent.structured_output import ask_structured

NOT_IN_DOCUMENTS = 'not in the documents'
_STOP_WORDS = frozenset(
  terms(
    'a an and are as at be by can do does for from has have how in is it its '
    'may no not of on or that the there this to was what when where which who '
    'will with you your'
  )
)
_SYSTEM = (
  'You answer questions from numbered passages alone. Name the passage that '
  'has the answer, then answer in one short sentence with the words of the '
  f'passage. If no passage has the answer, answer: {NOT_IN_DOCUMENTS}.'
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


def ask(
  model: ChatModel,
  question: str,
  hits: Sequence[Hit],
  min_support: float,
  max_tokens: int = 120,
) -> Answer:
  """The model's answer, if the passage that it names supports it.

  The numbers of passages are part of the JSON schema, so that a model cannot
  cite others.

  Args:
    min_support: the smallest `support` of an answer.
  """
  if not hits:
    return Answer(NOT_IN_DOCUMENTS)
  numbers = tuple(range(1, len(hits) + 1))
  draft_type = pydantic.create_model(
    'Draft',
    passage=(Literal[numbers], ...),
    answer=(Annotated[str, pydantic.Field(max_length=200)], ...),
  )
  passages = '\n\n'.join(
    f'[{number}] {escape_markers(hit.passage.indexed)}'
    for number, hit in zip(numbers, hits, strict=True)
  )
  messages: list[Message] = [
    {'role': 'system', 'content': _SYSTEM},
    {'role': 'user', 'content': f'{passages}\n\nQuestion: {question}'},
  ]
  options = {'temperature': 0, 'max_tokens': max_tokens}
  draft = ask_structured(model, draft_type, messages, 1, options)
  cited = (hits[draft.passage - 1].passage,)
  score = support(draft.answer, question, cited)
  refused = NOT_IN_DOCUMENTS in draft.answer.lower()
  if refused or score < min_support:
    return Answer(NOT_IN_DOCUMENTS, support=score, draft=draft.answer)
  return Answer(draft.answer.strip(), cited, score, draft.answer)


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
  reply = model(request, lambda text: None, None)
  rewritten = ' '.join(reply.message['content'].split())
  return [*dict.fromkeys([question, rewritten or question])]

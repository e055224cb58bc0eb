# SPDX-License-Identifier: Apache-2.0
"""Answers questions from documents, with citations.

  python -m examples.knowledge_base.ask --documents=docs 'What is MoLoRA?'
  python -m examples.knowledge_base.ask --store=FILE --answer=quote

Without a question, the program reads one question per line. With --documents
and without --store, the index is in memory. Modes:

  search   the best passages of --search and --rerank
  graph    also passages that share names with those of the question
  global   an answer of each community of the graph
  agent    the model decides when and what to search
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence

from examples.knowledge_base import answer as answer_lib
from examples.knowledge_base import client as client_lib
from examples.knowledge_base import loaders
from examples.knowledge_base.agentic import AgenticSearch
from examples.knowledge_base.answer import NOT_IN_DOCUMENTS, Answer
from examples.knowledge_base.graph import PassageGraph
from examples.knowledge_base.loaders import Document
from examples.knowledge_base.search import Hit, KnowledgeBase
from moepeft.agent.chat_model import ChatModel, Message
from moepeft.core import terminal

MODES = ('search', 'graph', 'global', 'agent')
# Queries, of which the first is the question -> answers; only a global question
# has several.
Answerer = Callable[[Sequence[str]], list[Answer]]


def answer_hits(
  base: KnowledgeBase,
  model: ChatModel | None,
  question: str,
  hits: Sequence[Hit],
  flags: argparse.Namespace,
) -> Answer:
  """Answers from passages, if a sentence of them is near to the question.

  Args:
    model: None for a quote of that sentence.
    flags: those of `add_answer_flags`.
  """
  nearest = answer_lib.quote(base.embed, question, hits, flags.threshold)
  if model is None or not nearest.citations:
    return nearest
  return answer_lib.ask(model, question, hits, flags.support)


def make_answerer(
  base: KnowledgeBase, model: ChatModel | None, flags: argparse.Namespace
) -> Answerer:
  """Makes the function that answers in the mode of the flags."""

  def answer(question: str, hits: Sequence[Hit]) -> Answer:
    return answer_hits(base, model, question, hits, flags)

  if flags.mode == 'agent':
    agent = AgenticSearch(base, model, flags.k, flags.support, flags.form)
    return lambda queries: [agent.ask(queries[0])]
  if flags.mode == 'search':
    return lambda queries: [answer(queries[0], base.search(queries, flags.k))]
  graph = PassageGraph(base)
  if flags.mode == 'graph':
    return lambda queries: [
      answer(queries[0], graph.local_search(queries[0], flags.k))
    ]

  def answer_globally(queries: Sequence[str]) -> list[Answer]:
    parts = [
      answer(queries[0], hits) for hits in graph.global_search(queries[0])
    ]
    return [p for p in parts if p.citations] or [Answer(NOT_IN_DOCUMENTS)]

  return answer_globally


def index(
  base: KnowledgeBase, documents: Sequence[Document], flags: argparse.Namespace
) -> int:
  """Indexes documents; the number of passages.

  Raises:
    ValueError: the store has passages already.
  """
  if len(base.store):
    raise ValueError(
      f'--store={flags.store} already has {len(base.store)} passages; name a '
      'new one, or ask without --documents'
    )
  return base.add(documents, flags.size, flags.overlap)


def add_answer_flags(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument
  help_text = 'quote: the nearest sentence of a passage, without a chat model.'
  add('--answer', choices=('model', 'quote'), default='model', help=help_text)
  help_text = 'The least cosine of a sentence and the question.'
  add('--threshold', type=float, default=0.5, help=help_text)
  help_text = "The least share of an answer's terms in its passage."
  add('--support', type=float, default=0.7, help=help_text)


def main(argv: Sequence[str] | None = None) -> None:
  parser = client_lib.parser('knowledge_base.ask', __doc__)
  client_lib.add_search_flags(parser)
  add_answer_flags(parser)
  add = parser.add_argument
  add('question', nargs='?')
  add('--mode', choices=MODES, default='search')
  help_text = 'react: tool calls of --mode=agent as text.'
  add('--form', choices=('native', 'react'), default='native', help=help_text)
  help_text = 'Search for what a question means in the conversation, too.'
  add('--rewrite', action='store_true', help=help_text)
  flags = parser.parse_args(argv)
  if flags.mode == 'agent' and flags.answer == 'quote':
    raise ValueError('--mode=agent needs a chat model: leave out --answer')
  if flags.rewrite and flags.mode != 'search':
    raise ValueError('--rewrite is for --mode=search')
  client = client_lib.connect(flags)
  base = client_lib.open_knowledge_base(flags, client)
  if flags.documents:
    index(base, loaders.load(flags.documents), flags)
  if not len(base.store):
    raise ValueError('nothing is indexed; name your --documents or a --store')
  needs_model = flags.answer == 'model' or flags.rewrite
  model = client_lib.chat_model(flags, client) if needs_model else None
  answer = make_answerer(
    base, model if flags.answer == 'model' else None, flags
  )
  history: list[Message] = []
  for question in _questions(flags.question):
    history.append({'role': 'user', 'content': question})
    queries = [question]
    if flags.rewrite and len(history) > 1:
      queries = answer_lib.rewrite(model, history)
    answers = answer(queries)
    text = '\n'.join(result.text for result in answers)
    history.append({'role': 'assistant', 'content': text})
    for result in answers:
      terminal.show(result)


def _questions(question: str | None) -> Iterator[str]:
  if question is not None and not question.strip():
    raise ValueError('the question is empty; write one')
  lines = [question] if question is not None else sys.stdin
  return (line.strip() for line in lines if line.strip())


if __name__ == '__main__':
  client_lib.run(main)

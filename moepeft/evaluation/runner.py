# SPDX-License-Identifier: Apache-2.0
"""What an evaluation measures of which prompts, and the measuring."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

from moepeft.core.progress import Pass
from moepeft.core.ranges import suggestion
from moepeft.data import Sources
from moepeft.data.batching.collators import scored_lengths
from moepeft.evaluation import eval_sets as sets
from moepeft.evaluation import metrics as measures
from moepeft.evaluation import scores as scoring
from moepeft.evaluation.eval_sets import Prompt
from moepeft.evaluation.greedy_answers import Answering
from moepeft.evaluation.loglikelihood import Likelihood
from moepeft.evaluation.rank_classification import Ranker
from moepeft.evaluation.scores import About, Row
from moepeft.evaluation.unfinished import Unfinished
from moepeft.models import decoder_only
from moepeft.runs.run import Run
from moepeft.tasks import Example

# Sets of prompts by the measure that is taken of them.
Work = dict[str, list[Prompt]]
Take = Callable[[Sequence[Prompt], About, measures.Progress], list[Row]]
# Examples that are measured together: a kill loses no more than these, and
# fewer would leave more batches half empty.
_PORTION = 512


def check(names: Sequence[str]) -> None:
  """Looks at the names of measures.

  Raises:
    ValueError: one is not of `scoring.MEASURES`.
  """
  for name in names:
    if name not in scoring.MEASURES:
      raise ValueError(
        f'--measures names some of {", ".join(scoring.MEASURES)}; got {name!r}'
        f'{suggestion(name, scoring.MEASURES)}'
      )


def check_room(run: Run, names: Sequence[str]) -> None:
  """Looks whether a decoder has places for what it is to generate.

  Raises:
    ValueError: it has not, in the lengths of the run's config.
  """
  data, model = run.config.data, run.model
  if not decoder_only(model) or not set(names) & set(measures.TEXTS):
    return
  if data.length > model.config.length:
    raise ValueError(
      f'prompts and generated answers have config.data.length={data.length:,} '
      f'tokens in this run, and the model has room for '
      f'{model.config.length:,}; leave out '
      f'{", ".join(n for n in names if n in measures.TEXTS)}, or train with a '
      'lower length'
    )


def of_rows(rows: Sequence[Example], names: Sequence[str], most: int) -> Work:
  """What is measured of the rows of a file or directory.

  Args:
    names: of `scoring.MEASURES`; none for accuracy where rows have choices
      and loss where they have none.
    most: examples of a prompt.
  """
  if names:
    found = sets.prompts(sets.EVALUATION, rows, most)
    return {name: found for name in scoring.MEASURES if name in names}
  work = {}
  for name, closed in (('accuracy', True), ('loss', False)):
    some = [row for row in rows if bool(row.choices) == closed]
    if some:
      work[name] = sets.prompts(sets.EVALUATION, some, most)
  return work


def of_run(run: Run, found: Sources, names: Sequence[str] = ()) -> Work:
  """What is measured of a run's own held-out rows.

  Args:
    names: of `scoring.MEASURES`; none for what there is of accuracy and loss.

  Raises:
    ValueError: no held-out rows, or none with choices, have what is asked for.
  """
  ranked = sets.own_prompts(run.config, found)
  held_out = sets.examples_of(found.held_out)
  whole = sets.whole_tasks(held_out, run.config.evaluation.max_examples)
  work = {
    name: ranked if name == 'accuracy' else whole
    for name in scoring.MEASURES
    if name in (names or ('accuracy', 'loss'))
  }
  lacking = [name for name, prompts in work.items() if not prompts]
  if names and lacking:
    raise ValueError(
      f"--measures asks for {', '.join(lacking)}, of which the run's own "
      'held-out rows have none (accuracy is of rows with choices); name other '
      'rows with --data'
    )
  return {name: prompts for name, prompts in work.items() if prompts}


def measure(run: Run, work: Work, about: About, kept: Unfinished) -> list[Row]:
  """Rows of everything in `work`, with progress on stderr.

  Args:
    kept: what is there is not measured again; the rest is added, some prompts
      at a time.
  """
  wanted = [(p, name) for name, prompts in work.items() for p in prompts]
  there = sum(kept.get(*one) is not None for one in wanted)
  if there:
    print(f'{there} of {len(wanted)} rows are in {kept.path}; going on')
  rows = []
  for names, prompts in _passes(work):
    left = [p for p in prompts if any(kept.get(p, n) is None for n in names)]
    if left:
      if names[0] in measures.TEXTS:
        measures.check(names, left)
      take, what = _measure(run, names)
      with _told(sum(len(p.examples) for p in left), what) as done:
        for some in _portions(left):
          kept.add(take(some, about, done))
    found = [kept.get(p, name) for p in prompts for name in names]
    # Of a prompt that cannot be ranked there is none.
    rows += [row for row in found if row is not None]
  return rows


def _passes(work: Work) -> list[tuple[tuple[str, ...], list[Prompt]]]:
  """(measures, their prompts), those of generated texts together."""
  texts = tuple(name for name in measures.TEXTS if name in work)
  alone = [(name,) for name in work if name not in texts]
  return [(names, work[names[0]]) for names in (*alone, texts) if names]


def _measure(run: Run, names: tuple[str, ...]) -> tuple[Take, str]:
  """(what measures prompts, what it has done to examples)."""
  variables = run.variables
  lengths = scored_lengths(run.config.data, run.model)
  common = run.model, run.words, *lengths, run.config.evaluation.batch_size
  if names == ('accuracy',):
    ranker = Ranker(*common)
    return functools.partial(measures.accuracy, ranker, variables), 'ranked'
  if names == ('loss',):
    likelihood = Likelihood(*common)
    return functools.partial(measures.loss, likelihood, variables), 'scored'
  answering = Answering(*common, ends=run.ends)
  return functools.partial(
    measures.texts, answering, variables, names
  ), 'answered'


def _portions(prompts: Sequence[Prompt]) -> Iterator[list[Prompt]]:
  """Prompts in their order, as few together as have `_PORTION` examples."""
  some = []
  for prompt in prompts:
    some.append(prompt)
    if sum(len(p.examples) for p in some) >= _PORTION:
      yield some
      some = []
  if some:
    yield some


@contextlib.contextmanager
def _told(total: int, what: str) -> Iterator[Callable[[int], None]]:
  shown = Pass(total, what)
  try:
    yield shown
  finally:
    shown.close()

# SPDX-License-Identifier: Apache-2.0
"""What an evaluation measures of which prompts, and the measuring."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

from moepeft import measures, scoring, sets
from moepeft.answering import Answering
from moepeft.data import Sources
from moepeft.likelihood import Likelihood
from moepeft.progress import Pass
from moepeft.ranking import Ranker
from moepeft.runs import Run
from moepeft.scoring import About, Row
from moepeft.sets import Prompt
from moepeft.tasks import Example

# Sets of prompts by the measure that is taken of them.
Work = dict[str, list[Prompt]]


def check(names: Sequence[str]) -> None:
  """Looks at the names of measures.

  Raises:
    ValueError: one is not of `scoring.MEASURES`.
  """
  for name in names:
    if name not in scoring.MEASURES:
      raise ValueError(
        f'--measures names some of {", ".join(scoring.MEASURES)}; got {name!r}'
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
  whole = sets.whole_tasks(found.held_out, run.config.evaluation.max_examples)
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


def measure(run: Run, work: Work, about: About) -> list[Row]:
  """Rows of everything in `work`, with progress on stderr."""
  data, e = run.config.data, run.config.evaluation
  common = run.model, run.words, data.inputs_length
  length, size = data.targets_length, e.batch_size
  rows = []
  for name, prompts in work.items():
    total = sum(len(prompt.examples) for prompt in prompts)
    if name == 'accuracy':
      ranker = Ranker(*common, length, size)
      with _told(total, 'ranked') as done:
        rows += measures.accuracy(ranker, run.variables, prompts, about, done)
    elif name == 'loss':
      likelihood = Likelihood(*common, length, size)
      with _told(total, 'scored') as done:
        rows += measures.loss(likelihood, run.variables, prompts, about, done)
  texts = [name for name in measures.TEXTS if name in work]
  if texts:
    answering, prompts = Answering(*common, length, size), work[texts[0]]
    total = sum(len(prompt.examples) for prompt in prompts)
    with _told(total, 'answered') as done:
      rows += measures.texts(
        answering, run.variables, prompts, texts, about, done
      )
  return rows


@contextlib.contextmanager
def _told(total: int, what: str) -> Iterator[Callable[[int], None]]:
  shown = Pass(total, what)
  try:
    yield shown
  finally:
    shown.close()

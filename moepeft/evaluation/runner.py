# SPDX-License-Identifier: Apache-2.0
"""What an evaluation measures of which prompts, and the measuring."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints.manager import card
from moepeft.core import sharding
from moepeft.core.progress import Pass
from moepeft.core.ranges import suggestion
from moepeft.core.types import Tree
from moepeft.data import TrainingData
from moepeft.data.batching import collators
from moepeft.data.batching.collators import scoring_lengths
from moepeft.data.preference import dataset as preference_dataset
from moepeft.data.registry import preferences
from moepeft.evaluation import eval_sets, metrics, scores
from moepeft.evaluation.eval_sets import Prompt
from moepeft.evaluation.greedy_answers import Answering
from moepeft.evaluation.loglikelihood import Likelihood
from moepeft.evaluation.rank_classification import Ranker
from moepeft.evaluation.scores import About, Row
from moepeft.evaluation.validator import Judge
from moepeft.inference.loaded_model import LoadedModel
from moepeft.models import decoder_only
from moepeft.objectives import (
  OBJECTIVES,
  build_validation_objective,
  reference_model,
)
from moepeft.objectives.batches import make_collator
from moepeft.objectives.paired_batch import ReferenceFn
from moepeft.peft.methods.prompt_tuning import before
from moepeft.runs.metrics_log import MetricsLog
from moepeft.tasks import Example


def form_of(run: LoadedModel) -> collators.Collator:
  """The form of the batches that a run's objective reads."""
  config = run.config
  front = before(run.model)
  own = collators.make_model_collator(
    config.data, run.tokenizer, run.model, config.seed, front
  )
  return make_collator(config, own)


def validation(
  run: LoadedModel, found: TrainingData, workdir: str
) -> dict[str, float]:
  """{'validation_loss': ...} and the objective's figures; {} without rows.

  Args:
    found: the run's data.
    workdir: of the run, where precomputed references are.

  Raises:
    ValueError: the run's reference is not there any more, or other than it
      was.
  """
  config, own = run.config, form_of(run)
  variables = run.variables
  reference, adapters, found = _referred(run, found, own, workdir)
  objective = build_validation_objective(config, reference)
  if adapters:
    variables = variables | {'reference': adapters}
  rows = eval_sets.pairs_to_judge(config, found, own)
  if not rows:
    return {}
  judge = Judge(
    config, run.model, run.tokenizer, rows, {}, own=own, objective=objective
  )
  return judge.validation(variables)


def _referred(
  run: LoadedModel,
  found: TrainingData,
  own: preference_dataset.PairCollator,
  workdir: str,
) -> tuple[ReferenceFn | None, Tree, TrainingData]:
  """(reference, its adapters, the data with what was computed before)."""
  config = run.config
  if not OBJECTIVES.lookup(config.objective).needs_reference:
    return None, {}, found
  base, against = base_lib.load(config.model), config.preference.reference
  model, built = base_lib.module(base, config)
  if against != reference_model.PRECOMPUTED:
    return *reference_model.make_reference(against, model, built, base), found
  # Of the policy as it began.
  start = base_lib.initialise(base, model, config.seed)
  if config.model.adapter:
    start = base_lib.with_adapter(start, built, config.model.adapter, base)
  log_p = reference_model.precomputed(
    workdir,
    found.compared,
    own,
    model,
    start,
    card(base, built, config.seed),
    sharding.make_mesh(),
    config.evaluation.batch_size,
  )
  compared = found.compared.with_references(log_p)
  return None, {}, preferences(compared, config.data, config.seed)


# Sets of prompts by the measure that is taken of them.
Work = dict[str, list[Prompt]]
Take = Callable[[Sequence[Prompt], About, metrics.Progress], list[Row]]
# Examples that are measured together: a kill loses no more than these, and
# fewer would leave more batches half empty.
_PORTION = 512


def check(names: Sequence[str]) -> None:
  """Looks at the names of measures.

  Raises:
    ValueError: one is not of `scoring.MEASURES`.
  """
  for name in names:
    if name not in scores.MEASURES:
      raise ValueError(
        f'--measures names some of {", ".join(scores.MEASURES)}; got {name!r}'
        f'{suggestion(name, scores.MEASURES)}'
      )


def check_room(run: LoadedModel, names: Sequence[str]) -> None:
  """Looks whether a decoder has places for what it is to generate.

  Raises:
    ValueError: it has not, in the lengths of the run's config.
  """
  data, model = run.config.data, run.model
  if not decoder_only(model) or not set(names) & set(metrics.TEXTS):
    return
  if data.length > model.config.length:
    raise ValueError(
      f'prompts and generated answers have config.data.length={data.length:,} '
      f'tokens in this run, and the model has room for '
      f'{model.config.length:,}; leave out '
      f'{", ".join(n for n in names if n in metrics.TEXTS)}, or train with a '
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
    found = eval_sets.prompts(eval_sets.EVALUATION, rows, most)
    return {name: found for name in scores.MEASURES if name in names}
  work = {}
  for name, closed in (('accuracy', True), ('loss', False)):
    some = [row for row in rows if bool(row.choices) == closed]
    if some:
      work[name] = eval_sets.prompts(eval_sets.EVALUATION, some, most)
  return work


def of_run(
  run: LoadedModel, found: TrainingData, names: Sequence[str] = ()
) -> Work:
  """What is measured of a run's own held-out rows.

  Args:
    names: of `scoring.MEASURES`; none for what there is of accuracy and loss.

  Raises:
    ValueError: no held-out rows, or none with choices, have what is asked for.
  """
  ranked = eval_sets.own_prompts(run.config, found)
  held_out = eval_sets.examples_of(found.held_out)
  whole = eval_sets.whole_tasks(held_out, run.config.evaluation.max_examples)
  work = {
    name: ranked if name == 'accuracy' else whole
    for name in scores.MEASURES
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


class Unfinished:
  """A file that gets each row once it is measured, and gives it back later."""

  def __init__(self, path: str, about: About):
    """Rows of another evaluation than `about`'s are passed over.

    Args:
      path: of the file; '' for none.

    Raises:
      ValueError: a line but the last, which a kill may have torn, is no row.
    """
    self.path = path
    self._file = None
    self._found: dict[tuple[str, str, str], Row] = {}
    if not path:
      return
    # This cuts a torn line off.
    self._file = MetricsLog(path, about.step)
    own = {key: value for key, value in vars(about).items() if key != 'run'}
    for row in scores.read(path) if os.path.getsize(path) else ():
      if own.items() <= vars(row).items():
        # The work directory may be spelt in another way.
        self._keep(dataclasses.replace(row, run=about.run))

  def get(self, prompt: Prompt, measure: str) -> Row | None:
    """The row of a prompt, if it is there and of the same examples."""
    row = self._found.get((prompt.task, prompt.name, measure))
    if row is None or row.examples + row.left_out != len(prompt.examples):
      return None
    return row if {*row.idx} <= {e.idx for e in prompt.examples} else None

  def add(self, rows: Iterable[Row]) -> None:
    """Keeps rows, in the file too.

    Raises:
      OSError: the disk is full.
    """
    for row in rows:
      self._keep(row)
      if self._file is not None:
        self._file.write(vars(row))

  def close(self) -> None:
    if self._file is not None:
      self._file.close()

  def _keep(self, row: Row) -> None:
    self._found[row.task, row.prompt, row.measure] = row


def measure(
  run: LoadedModel, work: Work, about: About, kept: Unfinished
) -> list[Row]:
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
      if names[0] in metrics.TEXTS:
        metrics.check(names, left)
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
  texts = tuple(name for name in metrics.TEXTS if name in work)
  alone = [(name,) for name in work if name not in texts]
  return [(names, work[names[0]]) for names in (*alone, texts) if names]


def _measure(run: LoadedModel, names: tuple[str, ...]) -> tuple[Take, str]:
  """(what measures prompts, what it has done to examples)."""
  variables = run.variables
  lengths = scoring_lengths(run.config.data, run.model)
  common = run.model, run.tokenizer, *lengths, run.config.evaluation.batch_size
  if names == ('accuracy',):
    ranker = Ranker(*common)
    return functools.partial(metrics.accuracy, ranker, variables), 'ranked'
  if names == ('loss',):
    likelihood = Likelihood(*common)
    return functools.partial(metrics.loss, likelihood, variables), 'scored'
  answering = Answering(*common, ends=run.eos_token_ids)
  return functools.partial(
    metrics.texts, answering, variables, names
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

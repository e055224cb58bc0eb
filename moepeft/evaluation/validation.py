# SPDX-License-Identifier: Apache-2.0
"""What training reports of a run's held-out rows, measured once more."""

from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints.manager import card
from moepeft.core import sharding
from moepeft.core.types import Tree
from moepeft.data import Sources
from moepeft.data.batching import collators as forms
from moepeft.data.preference import dataset as answers
from moepeft.data.registry import preferences
from moepeft.evaluation import eval_sets as sets
from moepeft.evaluation.validator import Judge
from moepeft.objectives import (
  COMPARED,
  REFERRING,
  Objective,
  batch_kind,
  objective_of,
)
from moepeft.objectives import reference_model as references
from moepeft.objectives.paired_batch import LogP
from moepeft.objectives.preference_losses import preference_of
from moepeft.peft.methods.prompt_tuning import before
from moepeft.runs.run import Run


def form_of(run: Run) -> forms.Form:
  """The form of the batches that a run's objective reads."""
  config = run.config
  front = before(run.model)
  own = forms.form(config.data, run.words, run.model, config.seed, front)
  return answers.form_of(
    config.data, config.objective, batch_kind(config.objective), own
  )


def validation(run: Run, found: Sources, workdir: str) -> dict[str, float]:
  """{'validation_loss': ...} and the objective's figures; {} without rows.

  Args:
    found: the run's data.
    workdir: of the run, where precomputed references are.

  Raises:
    ValueError: the run's reference is not there any more, or other than it
      was.
  """
  config, own = run.config, form_of(run)
  objective, variables = None, run.variables
  if config.objective in COMPARED:
    reference, adapters, found = _referred(run, found, own, workdir)
    objective = _objective(run, reference)
    variables = variables | ({'reference': adapters} if adapters else {})
  rows = sets.pairs_to_judge(config, found, own)
  if not rows:
    return {}
  judge = Judge(
    config, run.model, run.words, rows, {}, own=own, objective=objective
  )
  return judge.validation(variables)


def _objective(run: Run, reference: LogP | None) -> Objective:
  name = run.config.objective
  settings = preference_of(name, run.config.preference)
  return objective_of(name, preference=settings, reference=reference)


def _referred(
  run: Run, found: Sources, own: answers.Sides, workdir: str
) -> tuple[LogP | None, Tree, Sources]:
  """(reference, its adapters, the data with what was computed before)."""
  config = run.config
  if config.objective not in REFERRING:
    return None, {}, found
  base, against = base_lib.load(config.model), config.preference.reference
  model, built = base_lib.module(base, config)
  if against != references.PRECOMPUTED:
    return *references.reference_of(
      config.objective, against, model, built, base
    ), found
  # Of the policy as it began.
  start = base_lib.initialise(base, model, config.seed)
  if config.model.adapter:
    start = base_lib.with_adapter(start, built, config.model.adapter, base)
  log_p = references.precomputed(
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

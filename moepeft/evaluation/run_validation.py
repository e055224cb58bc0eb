# SPDX-License-Identifier: Apache-2.0
"""The validation loss of a run, as training reports it.

Preference objectives are validated by their own loss and margins, all others
by plain cross-entropy, whatever config.loss is, so that their runs compare.
"""

from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints.run_metadata import describe_run
from moepeft.core import sharding
from moepeft.core.types import Tree
from moepeft.data import TrainingData
from moepeft.data.batching import collators
from moepeft.data.preference import dataset as preference_dataset
from moepeft.data.preference.dataset import preference_data
from moepeft.evaluation import eval_sets
from moepeft.evaluation.evaluator import Evaluator
from moepeft.inference.loaded_model import LoadedModel
from moepeft.objectives import (
  OBJECTIVES,
  build_validation_objective,
  reference_model,
)
from moepeft.objectives.batches import make_collator
from moepeft.objectives.paired_batch import ReferenceFn


def collator_of(run: LoadedModel) -> collators.Collator:
  """The collator of the batches that a run's objective reads."""
  config = run.config
  return make_collator(
    config,
    collators.make_model_collator(
      config.data,
      run.tokenizer,
      run.model,
      config.seed,
      run.model.adapter_map,
    ),
  )


def run_validation(
  run: LoadedModel, sources: TrainingData, workdir: str
) -> dict[str, float]:
  """{'validation_loss': ...} and the objective's metrics; {} without rows.

  Args:
    sources: the run's data.
    workdir: of the run, where precomputed references are.

  Raises:
    ValueError: the run's reference model has changed or is gone.
  """
  config, collator, variables = run.config, collator_of(run), run.variables
  reference, adapters, sources = _with_reference(
    run, sources, collator, workdir
  )
  if adapters:
    variables = variables | {'reference': adapters}
  rows = eval_sets.validation_rows(config, sources, collator)
  if not rows:
    return {}
  evaluator = Evaluator(
    run.model,
    run.tokenizer,
    collators.scoring_lengths(config.data, run.model),
    config.evaluation.batch_size,
    validation=rows,
    collator=collator,
    objective=build_validation_objective(config, reference),
  )
  return evaluator.validation(variables)


def _with_reference(
  run: LoadedModel,
  sources: TrainingData,
  collator: preference_dataset.PairCollator,
  workdir: str,
) -> tuple[ReferenceFn | None, Tree, TrainingData]:
  """(reference, its adapters, the data with precomputed log-probabilities)."""
  config = run.config
  if not OBJECTIVES.lookup(config.objective).needs_reference:
    return None, {}, sources
  base, name = base_lib.load(config.model), config.preference.reference
  model, built = base_lib.module(base, config)
  if name != reference_model.PRECOMPUTED:
    reference = reference_model.make_reference(name, model, built, base)
    return *reference, sources
  # By the policy as it began.
  start = base_lib.initialise(base, model, config.seed)
  if config.model.adapter:
    start = base_lib.with_adapter(start, built, config.model.adapter, base)
  log_p = reference_model.precomputed(
    workdir,
    sources.preferences,
    collator,
    model,
    start,
    describe_run(base, built, config.seed),
    sharding.make_mesh(),
    config.evaluation.batch_size,
  )
  preferences = sources.preferences.with_references(log_p)
  return None, {}, preference_data(preferences, config.data, config.seed)

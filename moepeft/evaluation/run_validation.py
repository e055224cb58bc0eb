# SPDX-License-Identifier: Apache-2.0
"""Computes the validation loss of a run, as training reports it.

Preference objectives are validated by their own loss and margins. All others
are validated by plain cross-entropy, so that runs with different config.loss
compare.
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


def make_run_collator(run: LoadedModel) -> collators.Collator:
  """Makes the collator of a run's objective."""
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
  """The run's validation loss and the objective's metrics; {} without rows.

  Args:
    sources: the run's data.
    workdir: the run's directory, which has precomputed references.

  Raises:
    ValueError: the run's reference model has changed or is missing.
  """
  config, variables = run.config, run.variables
  collator = make_run_collator(run)
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
  spec = OBJECTIVES.lookup(config.objective)
  if not spec.needs_reference:
    return None, {}, sources
  base, name = base_lib.load(config.model), config.preference.reference
  model, built = base_lib.module(base, config)
  if name != reference_model.PRECOMPUTED:
    reference = reference_model.make_reference(
      name, model, built, base, spec.reference_output
    )
    return *reference, sources
  # The reference is the policy before training.
  initial_params = base_lib.initialise(base, model, config.seed)
  if config.model.adapter:
    initial_params = base_lib.with_adapter(
      initial_params, built, config.model.adapter, base
    )
  log_p = reference_model.precompute_logps(
    workdir,
    sources.preferences,
    collator,
    model,
    initial_params,
    describe_run(base, built, config.seed),
    sharding.make_mesh(),
    config.evaluation.batch_size,
  )
  preferences = sources.preferences.with_references(log_p)
  return None, {}, preference_data(preferences, config.data, config.seed)

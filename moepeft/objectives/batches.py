# SPDX-License-Identifier: Apache-2.0
"""The collator of an objective's batches: single, pair, judged or custom."""

from ml_collections import ConfigDict

from moepeft.data.batching.collators import Collator
from moepeft.data.preference.dataset import objective_collator
from moepeft.objectives import OBJECTIVES


def make_collator(config: ConfigDict, model_collator: Collator) -> Collator:
  """Makes an objective's collator from the model's collator.

  Raises:
    ValueError: config.data.source has no rows for this objective.
  """
  spec = OBJECTIVES.lookup(config.objective)
  if spec.collator is not None:
    return spec.collator(config.data, model_collator)
  return objective_collator(
    config.data, config.objective, spec.batch, model_collator
  )

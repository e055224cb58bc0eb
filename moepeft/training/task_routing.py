# SPDX-License-Identifier: Apache-2.0
"""The experts' shares in the tokens of each task, measured during training."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moepeft.core import sharding
from moepeft.core.sharding import Layout
from moepeft.core.types import Tree
from moepeft.data.batching.bucketing import make_buckets
from moepeft.data.batching.collators import Collator
from moepeft.evaluation.routing.collect import encode
from moepeft.runs import metrics_log
from moepeft.training.metrics_logger import routing_rows


class TaskRouting:
  """Routes the same few rows of each task, with one program for all steps.

  It fetches the routers' sums over each task's rows: the weights of single
  tokens, as in `evaluation.routing.collect`, may not fit beside a training
  state.

  Attributes:
    tasks: the names of the tasks.
  """

  def __init__(
    self,
    model: Any,
    collator: Collator,
    rows: Mapping[str, Sequence],
    layout: Layout,
  ):
    """
    Args:
      model: with the method's adapters.
      collator: of the model.
      rows: of each task, `Example`s or encoded rows. Those of a task with fewer
        rows are repeated, so that all tasks share a program.
      layout: of the variables. The rows are not sharded.
    """
    self.tasks = tuple(rows)
    most = max(map(len, rows.values()))
    encoded = [
      encode(collator, [*itertools.islice(itertools.cycle(examples), most)])
      for examples in rows.values()
    ]
    lengths, _ = collator.sizes([row for batch in encoded for row in batch])
    shortest = (1,) * len(collator.lengths)
    # The bucket of all rows.
    ((shape, _),) = make_buckets(
      lengths, shortest, collator.lengths, len(lengths)
    )
    padded = collator.resized(shape)
    self._batches = [padded.pad(batch) for batch in encoded]
    self._replicated = layout.replicated
    self._sums = jax.jit(
      lambda variables, batch: model.apply(
        variables, batch, mutable=['routing']
      )[1]['routing'],
      out_shardings=layout.replicated,
    )

  def share_programs(self, routing: 'TaskRouting') -> None:
    """Uses the compiled programs of one of an equal model and layout."""
    self._sums = routing._sums

  def __call__(self, variables: Tree) -> dict[str, np.ndarray]:
    """{path of a site: [g, l, e]} of its experts' shares in g tasks.

    The shares of a layer's experts have the sum 1; of a sparse router they are
    shares of tokens, else of weights. They are NaN where a layer has fewer
    experts or a task no tokens. Sites with one expert are left out.
    """
    by_task = []
    for batch in self._batches:
      batch = sharding.put(batch, self._replicated)
      by_task.append(routing_rows(self._sums(variables, batch)))
    shares = {
      site: np.stack([_shares(sites[site]) for sites in by_task])
      for site in by_task[0]
    }
    return {
      site: array for site, array in shares.items() if array.shape[-1] > 1
    }


def _shares(site: Mapping[str, Any]) -> np.ndarray:
  """Shares [l, e] of a site of `routing_rows`, divided by their sum."""
  _, shares = metrics_log.share_array(site)
  total = np.nansum(shares, axis=-1, keepdims=True)
  return shares / np.where(total > 0, total, np.nan)

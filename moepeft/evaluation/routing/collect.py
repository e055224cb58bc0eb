# SPDX-License-Identifier: Apache-2.0
"""Collects the routing of rows, by whole calls of the model."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moepeft.core.types import Tree
from moepeft.data.batching.bucketing import make_buckets, repeat_last
from moepeft.data.batching.collators import Collator
from moepeft.data.batching.decoder_only import CausalCollator, prepend_prefix
from moepeft.evaluation.routing.overlap import Moments
from moepeft.evaluation.routing.rows import LabeledRow
from moepeft.evaluation.routing.site_routing import (
  CollectedRouting,
  RoutedText,
)
from moepeft.evaluation.routing.site_sums import SiteSums
from moepeft.evaluation.routing.sown_weights import (
  RoutedBatch,
  site_weights,
  token_sides,
)
from moepeft.nn.adapter_hook import AdapterMap
from moepeft.runs.history import short_names, site_order

# The shortest (inputs, targets) lengths of a batch, to limit compilations.
_MIN_LENGTHS = 64, 16


def has_router(adapter_map: AdapterMap) -> bool:
  """Whether an adapter of the method chooses among experts."""
  return any(
    getattr(adapter, 'router', None) is not None and adapter.experts > 1
    for _, adapter in adapter_map.entries
  )


def check_has_router(adapter_map: AdapterMap, method: str) -> None:
  """
  Raises:
    ValueError: no adapter of the method chooses among experts.
  """
  if not has_router(adapter_map):
    raise ValueError(
      f'the method {method} has no router that chooses among experts; name a '
      'run of a mixture, such as molora(experts=10)'
    )


def collect(
  model: Any,
  variables: Tree,
  collator: Collator,
  rows: Sequence[LabeledRow],
  batch_size: int,
  shown: Sequence[int] = (),
  progress: Callable[[int], None] = lambda rows: None,
) -> CollectedRouting:
  """Collects the routing of the rows.

  Args:
    model, variables: with the adapter, without dropout and noise.
    collator: of the model; texts longer than its lengths lose their ends.
    shown: indices of the rows whose tokens' weights are kept.
    progress: called after each batch with its number of rows.

  Raises:
    ValueError: a router is inside of another mixture's experts.
  """
  tasks = sorted({row.task for row in rows})
  languages = sorted({row.language for row in rows} - {''})
  task = np.array([tasks.index(row.task) for row in rows])
  language = np.array(
    [languages.index(r.language) if r.language else -1 for r in rows]
  )
  sums: dict[str, SiteSums] = {}
  moments: dict[tuple, Moments] = {}
  tokens: dict[str, int] = {}
  texts: dict[int, RoutedText] = {}
  for indices, sides, weights in _batches(
    model, variables, collator, [row.item for row in rows], batch_size
  ):
    for side, (_, mask) in sides.items():
      tokens[side] = tokens.get(side, 0) + int(mask.sum())
    for stack, paths in _stacks(weights).items():
      mask = sides[stack[1]][1]
      moments.setdefault(stack, Moments()).add(
        {path: weights[path].shares[mask] for path in paths}
      )
    for path, routed in weights.items():
      ids, mask = sides[routed.side]
      row = np.array(indices)[np.nonzero(mask)[0]]
      site_sums = sums.setdefault(
        path, SiteSums(routed.side, len(tasks), len(languages))
      )
      arrays = routed.shares[mask], routed.weights[mask]
      site_sums.add(*arrays, ids[mask], task[row], language[row])
    for place, i in enumerate(indices):
      if i in shown:
        texts[i] = _text(rows[i], place, sides, weights)
    progress(len(indices))
  adapters = {adapter.name: adapter for _, adapter in model.adapter_map.entries}
  names = short_names(sums)
  return CollectedRouting(
    tuple(
      sums[path].result(path, names[path], adapters[path.rpartition('/')[2]])
      for path in sorted(sums, key=site_order)
    ),
    tuple(tasks),
    tuple(languages),
    len(rows),
    tokens,
    tuple(texts[i] for i in shown),
    tuple(stack.result() for stack in moments.values()),
  )


def _batches(
  model: Any,
  variables: Tree,
  collator: Collator,
  items: Sequence,
  batch_size: int,
) -> Iterator[tuple[list[int], dict, dict]]:
  """(indices of the items, `token_sides`, `site_weights`) of each batch.

  Rows that fill the last batch are masked.
  """
  encoded = encode(collator, items)
  lengths, _ = collator.sizes(encoded)
  route = jax.jit(
    lambda variables, batch: model.apply(variables, batch, mutable=['weights'])[
      1
    ]['weights']
  )
  shortest = _MIN_LENGTHS[: len(collator.lengths)]
  for shape, indices in make_buckets(
    lengths, shortest, collator.lengths, batch_size
  ):
    padded = [encoded[i] for i in repeat_last(indices, batch_size)]
    batch = collator.resized(shape).pad(padded)
    sides = token_sides(batch, model.config.vocab)
    for _, mask in sides.values():
      mask[len(indices) :] = False
    weights = jax.device_get(route(variables, batch))
    yield indices, sides, site_weights(weights, sides)


def _text(
  row: LabeledRow, place: int, sides: Mapping, weights: Mapping
) -> RoutedText:
  """The row at a place of a batch."""
  masks = {side: mask[place] for side, (_, mask) in sides.items()}
  return RoutedText(
    row.task,
    row.language,
    {side: ids[place][masks[side]] for side, (ids, _) in sides.items()},
    {
      path: routed.shares[place][masks[routed.side]]
      for path, routed in weights.items()
    },
  )


def _stacks(
  weights: Mapping[str, RoutedBatch],
) -> dict[tuple[str, str, int], list[str]]:
  """Paths of the sites with the same (stack, side, number of layers)."""
  stacks: dict[tuple[str, str, int], list[str]] = {}
  for path in sorted(weights, key=site_order):
    routed = weights[path]
    key = path.split('/')[0], routed.side, routed.shares.shape[2]
    stacks.setdefault(key, []).append(path)
  return stacks


def encode(collator: Collator, items: Sequence) -> list:
  """Encodes items; a row without a trained token is kept, unlike in training.

  A decoder's rows that are too long lose their ends.
  """
  if not isinstance(collator, CausalCollator):
    return collator.encode(items)
  # The last token of a sample is a target alone.
  length = collator.max_lengths[0] + 1
  return [
    prepend_prefix(
      collator.prefix_ids,
      dataclasses.replace(
        sample, ids=sample.ids[:length], loss_mask=sample.loss_mask[:length]
      ),
    )
    for sample in collator.encode_uncut(items)
  ]

# SPDX-License-Identifier: Apache-2.0
"""Combine weights of a batch that a whole call of the model has sown."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from moepeft.core.types import Batch, Tree


def token_sides(
  batch: Batch, vocab: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """{side: (ids [b, t], mask [b, t] of real tokens)} that sites read.

  The placeholders of soft prompts, whose ids are beyond the vocabulary, are
  left out.
  """
  sides = {'inputs': (batch['inputs'], batch['inputs_mask'])}
  if 'decoder_inputs' in batch:
    sides['targets'] = (batch['decoder_inputs'], batch['targets_mask'])
  return {
    side: (np.asarray(ids), np.asarray(mask, bool) & (np.asarray(ids) < vocab))
    for side, (ids, mask) in sides.items()
  }


class RoutedBatch(NamedTuple):
  """The routing of a batch by one site.

  Attributes:
    side: the tokens that it routes, 'inputs' or 'targets'.
    shares: float32 [b, t, l, e], the combine weights over their sum.
    weights: float32 [b, t, l, e], the combine weights.
  """

  side: str
  shares: np.ndarray
  weights: np.ndarray


def site_weights(
  collection: Tree, sides: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, RoutedBatch]:
  """{path of a site: its routing} of the sown weights.

  Sites with one expert are left out.

  Args:
    collection: the collection 'weights' of a whole call of a model whose
      layers are scanned.
    sides: from `token_sides`.

  Raises:
    ValueError: a router is inside of another mixture's experts.
  """
  result = {}
  for path, calls in _sown(collection, ()):
    if calls[0].shape[-1] < 2:
      continue
    side = _side(path, len(sides) > 1)
    stacked = 'layers' in path.split('/')
    # The embedding of an encoder-decoder reads both sides, the inputs first.
    by_side = (
      zip(sides, [[call] for call in calls], strict=True)
      if len(calls) == len(sides) > 1 and not stacked
      else [(side, calls)]
    )
    for side, side_calls in by_side:
      arrays = [
        _by_token(path, a if stacked else a[None], sides[side][0].shape)
        for a in side_calls
      ]
      stack = {'inputs': 'encoder', 'targets': 'decoder'}[side]
      name = path if side_calls is calls else f'{stack}/{path}'
      result[name] = RoutedBatch(side, *np.mean(arrays, axis=0))
  return result


def _sown(
  tree: Tree, path: tuple[str, ...]
) -> Iterator[tuple[str, tuple[np.ndarray, ...]]]:
  """(path of the site, an array for each call)."""
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from _sown(value, (*path, key))
    else:
      yield '/'.join(path), value


def _side(path: str, has_encoder: bool) -> str:
  """The tokens that a site reads, 'inputs' or 'targets'."""
  parts = [part for part in path.split('/') if part != 'layers']
  reads_source = parts[:2] == ['decoder', 'cross'] and parts[2] in ('k', 'v')
  if not has_encoder or parts[0] == 'encoder' or reads_source:
    return 'inputs'
  return 'targets'


def _by_token(
  path: str, weights: np.ndarray, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
  """Weights [l, b, t, ..., e] -> (shares, weights), [b, t, l, e] each."""
  if weights.shape[1:3] != shape:
    raise ValueError(
      f'the router at {path} is inside of the experts of another mixture and '
      'routes each token once for each of them, which is not shown; name a run '
      'whose mixtures are not nested'
    )
  weights = np.asarray(weights, np.float32)
  total = weights.sum(axis=-1, keepdims=True)
  shares = weights / np.where(total == 0, 1, total)
  rows = (*weights.shape[:3], -1, weights.shape[-1])
  return tuple(
    np.moveaxis(a.reshape(rows).mean(axis=3), 0, 2) for a in (shares, weights)
  )

# SPDX-License-Identifier: Apache-2.0
"""Collects the routing of rows, by whole calls of the model.

The share of an expert is the mean over tokens of its combine weight, divided by
the sum of the token's weights; a token without any expert has shares of 0. The
weights of heads, columns of the rank and parts of a projection are averaged.
In the shapes, n is the number of tokens, g that of groups of rows.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from moepeft.core.types import Batch, Tree
from moepeft.data.batching.bucketing import make_buckets, repeat_last
from moepeft.data.batching.collators import Collator
from moepeft.data.batching.decoder_only import CausalCollator, prepend_prefix
from moepeft.evaluation.routing.overlap import Moments, SiteOverlap
from moepeft.evaluation.routing.rows import LabeledRow
from moepeft.nn.adapter_hook import AdapterMap
from moepeft.peft.mixture import layer_counts
from moepeft.runs.history import short_names, site_order
from moepeft.runs.router_diagnosis import DEAD_SHARE

# The shortest (inputs, targets) lengths of a batch, to limit compilations.
_MIN_LENGTHS = 64, 16


@dataclasses.dataclass(frozen=True)
class SiteRouting:
  """The routing of one site with a router.

  Attributes:
    path: as in the metrics log, 'encoder/layers/self/k/molora'.
    name: the short name, 'encoder/self/k'.
    reads: the tokens that it routes, 'inputs' or 'targets'; a decoder-only
      model has 'inputs' alone.
    counts: the number of experts of each layer.
    identity_experts: the number of experts, the last ones, that add nothing.
    share: float64 [l, e], the experts' shares; NaN for experts that a layer
      does not have.
    by_task, by_language: float64 [g, l, e], the same of a group's tokens; NaN
      for a group without tokens. The languages are those of the rows that name
      one.
    weight_by_task: float64 [g, l, e], the mean combine weights, not divided.
    token_ids: int [n], the different tokens.
    token_counts: int [n], how often each was routed.
    by_token: float64 [n, l, e], the shares of each token's occurrences.
  """

  path: str
  name: str
  reads: str
  counts: tuple[int, ...]
  identity_experts: int
  share: np.ndarray
  by_task: np.ndarray
  by_language: np.ndarray
  weight_by_task: np.ndarray
  token_ids: np.ndarray
  token_counts: np.ndarray
  by_token: np.ndarray

  @property
  def even(self) -> np.ndarray:
    """[l]: the share of each expert of a layer, if all have the same."""
    return 1 / np.array(self.counts)

  @property
  def dead(self) -> np.ndarray:
    """bool [l, e]: whether an expert's share is at most 1 % of the even one.

    Experts that add nothing are never dead.
    """
    has_parameters = np.arange(self.share.shape[1]) < (
      np.array(self.counts)[:, None] - self.identity_experts
    )
    return has_parameters & (self.share <= DEAD_SHARE * self.even[:, None])

  @property
  def task_information(self) -> np.ndarray:
    """[l]: how much of the task an expert tells, from 0 to 1.

    It is the mutual information of the expert and the task, with equally
    frequent tasks, over ln min(g, e): 0 if all tasks use the experts alike, 1
    if each of g <= e tasks has experts of its own. NaN with fewer than two
    tasks.
    """
    tasks = self.by_task[~np.isnan(self.by_task).all(axis=(1, 2))]
    if len(tasks) < 2:
      return np.full(len(self.counts), np.nan)
    shares = np.nan_to_num(tasks)
    shares = shares / np.maximum(shares.sum(-1, keepdims=True), 1e-12)
    nats = _entropy(shares.mean(0)) - _entropy(shares).mean(0)
    most = np.log(np.minimum(len(tasks), np.maximum(self.counts, 2)))
    return np.maximum(nats, 0) / most


def _entropy(shares: np.ndarray) -> np.ndarray:
  return -np.sum(shares * np.log(np.maximum(shares, 1e-300)), axis=-1)


@dataclasses.dataclass(frozen=True)
class RoutedText:
  """One row whose tokens are shown with their experts.

  Attributes:
    task, language: as in `LabeledRow`.
    ids: side -> int [t], the real tokens of 'inputs' or 'targets'.
    weights: path of a site -> float32 [t, l, e], the tokens' shares.
  """

  task: str
  language: str
  ids: Mapping[str, np.ndarray]
  weights: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class CollectedRouting:
  """The routing of all rows.

  Attributes:
    sites: in the order of the model.
    tasks, languages: the names of the groups.
    rows: the number of rows.
    tokens: side -> the number of tokens.
    texts: rows with all their tokens' weights.
    overlap: of the sites that route the same tokens.
  """

  sites: tuple[SiteRouting, ...]
  tasks: tuple[str, ...]
  languages: tuple[str, ...]
  rows: int
  tokens: Mapping[str, int]
  texts: tuple[RoutedText, ...]
  overlap: tuple[SiteOverlap, ...]


def check_has_router(adapter_map: AdapterMap, method: str) -> None:
  """
  Raises:
    ValueError: no adapter of the method chooses among experts.
  """
  if not any(
    getattr(adapter, 'router', None) is not None and adapter.experts > 1
    for _, adapter in adapter_map.entries
  ):
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
  sums: dict[str, _SiteSums] = {}
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
        path, _SiteSums(routed.side, len(tasks), len(languages))
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
  weights: Mapping[str, 'RoutedBatch'],
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


class _SiteSums:
  """Sums of a site's shares over tokens, by task, language and token."""

  def __init__(self, side: str, tasks: int, languages: int):
    self._side = side
    self._groups = {'task': tasks, 'language': languages}
    self._sums: dict[str, np.ndarray] = {}
    self._weights = np.zeros((tasks, 1, 1))
    self._counts = {kind: np.zeros(n) for kind, n in self._groups.items()}
    self._tokens: dict[int, int] = {}
    self._token_sums = np.zeros((0, 1, 1))
    self._token_counts = np.zeros(0, np.int64)

  def add(
    self,
    shares: np.ndarray,
    weights: np.ndarray,
    ids: np.ndarray,
    task: np.ndarray,
    language: np.ndarray,
  ) -> None:
    """Adds tokens: shares, weights [n, l, e]; ids, task, language [n]."""
    self._weights = self._weights + np.stack(
      [
        weights[task == g].sum(axis=0, dtype=np.float64)
        for g in range(self._groups['task'])
      ]
    )
    for kind, group in (('task', task), ('language', language)):
      size = self._groups[kind]
      zeros = np.zeros((size, *shares.shape[1:]))
      sums = self._sums.setdefault(kind, zeros)
      for g in range(size):
        sums[g] += shares[group == g].sum(axis=0, dtype=np.float64)
        self._counts[kind][g] += np.sum(group == g)
    unique, place, counts = np.unique(
      ids, return_inverse=True, return_counts=True
    )
    slots = [self._tokens.setdefault(int(i), len(self._tokens)) for i in unique]
    added = len(self._tokens) - len(self._token_counts)
    if added:
      zeros = np.zeros((added, *shares.shape[1:]))
      old = self._token_sums if len(self._token_sums) else zeros[:0]
      self._token_sums = np.concatenate([old, zeros])
      self._token_counts = np.pad(self._token_counts, (0, added))
    np.add.at(self._token_sums, np.array(slots, int)[place], shares)
    self._token_counts[slots] += counts

  def result(self, path: str, name: str, adapter: nn.Module) -> SiteRouting:
    """The site's shares.

    Args:
      adapter: the site's mixture.
    """
    layers, experts = self._token_sums.shape[1:]
    counts = (experts,) * layers
    if adapter.experts_per_layer:
      counts = layer_counts(adapter.experts_per_layer, layers)
    present = np.arange(experts) < np.array(counts)[:, None]

    def mean(sums, number):
      number = np.asarray(number, np.float64).reshape(
        -1, *(1,) * (sums.ndim - 1)
      )
      shares = sums / np.where(number > 0, number, np.nan)
      return np.where(present, shares, np.nan)

    order = np.argsort(list(self._tokens))
    by_task, task_counts = self._sums['task'], self._counts['task']
    return SiteRouting(
      path,
      name,
      self._side,
      counts,
      adapter.identity_experts,
      mean(by_task.sum(axis=0)[None], [task_counts.sum()])[0],
      mean(by_task, task_counts),
      mean(self._sums['language'], self._counts['language']),
      mean(self._weights, task_counts),
      np.array(list(self._tokens))[order],
      self._token_counts[order],
      mean(self._token_sums, self._token_counts)[order],
    )

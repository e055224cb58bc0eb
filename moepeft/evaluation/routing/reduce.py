# SPDX-License-Identifier: Apache-2.0
"""Smaller adapters out of a mixture: with fewer experts, or as one LoRA.

Both are approximations. Their error is the loss on the same rows, and for a
LoRA also what is left out of each site's averaged change.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax
import flax.linen as nn
import numpy as np

from moepeft.config.method_string import Spec, parse_method
from moepeft.core.types import AXIS_NAMES, Tree
from moepeft.evaluation.routing.similarity import factors
from moepeft.evaluation.routing.site_routing import (
  CollectedRouting,
  SiteRouting,
)
from moepeft.nn.adapter_hook import AdapterMap


@dataclasses.dataclass(frozen=True)
class DerivedAdapter:
  """An adapter that is made out of a trained one.

  Attributes:
    method: its method string.
    peft: its collection 'peft'.
    left_out: path of a site -> float64 [l], the part of the change that the
      rank leaves out, as a ratio of Frobenius norms; {} where none is.
  """

  method: str
  peft: Tree
  left_out: Mapping[str, np.ndarray]


def prune(
  method: str,
  adapter_map: AdapterMap,
  peft: Tree,
  axes: Tree,
  routing: CollectedRouting,
  experts: int,
) -> DerivedAdapter:
  """The mixture with the experts of the largest shares at each site and layer.

  The router chooses among those that stay; routers that normalize give them
  the weight of the others.

  Args:
    method: its canonical text.
    axes: the logical axes of the arrays in `peft`.
    experts: the number of experts to keep.

  Raises:
    ValueError: there are fewer experts, or the mixture has options that name
      its experts.
  """
  mixture = _mixture(adapter_map)
  total = mixture.experts
  if not 1 <= experts < total:
    raise ValueError(f'the mixture has {total} experts; got {experts} to keep')
  for option in (
    *('experts_per_layer', 'ranks', 'from_adapters'),
    *('shared_experts', 'identity_experts'),
  ):
    if getattr(mixture, option):
      raise ValueError(
        f'the mixture has {option}; only one whose experts are all counted by '
        '`experts` can have fewer'
      )
  flat = flax.traverse_util.flatten_dict(peft, sep='/')
  flat_axes = flax.traverse_util.flatten_dict(axes, sep='/')
  for site in routing.sites:
    order = np.argsort(-site.share, axis=-1, kind='stable')
    chosen = np.sort(order[:, :experts], axis=-1)
    for path in [p for p in flat if p.startswith(f'{site.path}/')]:
      names = tuple(flat_axes[path])
      if AXIS_NAMES['e'] not in names:
        continue
      axis = names.index(AXIS_NAMES['e'])
      array = np.asarray(flat[path])
      if names.count(AXIS_NAMES['e']) > 1 or array.shape[axis] != total:
        raise ValueError(
          f'{path} has no entry for each expert alone, so that none can be '
          'left out'
        )
      stacked = names[0] == AXIS_NAMES['l']
      layers = array if stacked else array[None]
      pruned = np.stack(
        [
          np.take(layer, indices, axis=axis - stacked)
          for layer, indices in zip(layers, chosen, strict=True)
        ]
      )
      flat[path] = pruned if stacked else pruned[0]
  (spec,) = parse_method(method)
  text = str(spec.replace(experts=experts))
  return DerivedAdapter(text, _unflatten(flat), {})


def merge_to_lora(
  adapter_map: AdapterMap,
  peft: Tree,
  routing: CollectedRouting,
  rank: int,
  task: str = '',
) -> DerivedAdapter:
  """One LoRA of the mean change of the tokens of a task, or of all tasks.

  At each site and layer it is the best approximation of rank `rank` of
  scale * sum_e p_e A_e B_e, where p_e is the mean weight of the expert.

  Args:
    task: the name of a task of the routing; '' for the mean over tasks.

  Raises:
    ValueError: the experts are no LoRAs that a weighted sum merges, or there
      is no such task.
  """
  mixture = _mixture(adapter_map)
  if task and task not in routing.tasks:
    raise ValueError(
      f'the rows are of the tasks {", ".join(routing.tasks)}; got {task!r}'
    )
  if mixture.combine != 'outputs' or mixture.by_column:
    raise ValueError(
      'one LoRA can stand for experts whose outputs are weighted, not for '
      f'those of combine={mixture.combine!r}, by_column={mixture.by_column}'
    )
  flat = flax.traverse_util.flatten_dict(peft, sep='/')
  merged: dict[str, np.ndarray] = {}
  left_out, targets = {}, []
  for site in routing.sites:
    arrays = {
      path.removeprefix(f'{site.path}/'): np.asarray(array, np.float64)
      for path, array in flat.items()
      if path.startswith(f'{site.path}/')
    }
    if {p for p in arrays if not p.startswith('router/')} != {'a', 'b'}:
      raise ValueError(
        f'the experts at {site.name} are no plain LoRAs, which one LoRA could '
        'stand for'
      )
    weights = _mean_weights(site, routing, task)
    a, b, left_out[site.path] = low_rank_mean(
      mixture, arrays, weights, rank, 'layers' in site.path.split('/')
    )
    parent = site.path.rpartition('/')[0]
    merged |= {f'{parent}/lora/a': a, f'{parent}/lora/b': b}
    targets.append(target_of(parent))
  # With alpha = rank the term is A B.
  options = {'rank': rank, 'alpha': float(rank), 'targets': '|'.join(targets)}
  method = str(Spec('lora', tuple(options.items())))
  return DerivedAdapter(method, _unflatten(merged), left_out)


def low_rank_mean(
  mixture: nn.Module,
  arrays: Mapping[str, np.ndarray],
  weights: np.ndarray,
  rank: int,
  stacked: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(A [(l,) *in, r], B [(l,) r, *out], part left out [l]) of a weighted sum.

  Args:
    mixture: of LoRA experts.
    arrays: 'a' and 'b' of its experts.
    weights: [l, e].
    rank: r of the result; missing singular values are zeros.
  """
  layered = {k: a if stacked else a[None] for k, a in arrays.items()}
  a, b = factors(mixture, layered, 'a', 'b')
  expert, e = mixture.expert, mixture.experts
  always_on = np.ones((len(weights), mixture.shared_experts))
  weights = np.concatenate([weights[:, :e], always_on], axis=1)
  scales = (
    expert.column_scales(mixture.ranks) if mixture.ranks else expert.scale
  )
  a = a * (weights[:, :, None] * scales)[:, None]
  results = []
  for a_layer, b_layer in zip(a, b, strict=True):
    u, s, v = low_rank_svd(
      a_layer.reshape(len(a_layer), -1), b_layer.reshape(-1, b_layer.shape[-1])
    )
    root = np.sqrt(s[:rank])
    low_a = np.zeros((len(a_layer), rank))
    low_b = np.zeros((rank, b_layer.shape[-1]))
    low_a[:, : len(root)] = u[:, : len(root)] * root
    low_b[: len(root)] = (v[:, : len(root)] * root).T
    norm = np.linalg.norm(s)
    lost = np.linalg.norm(s[rank:]) / norm if norm else 0.0
    results.append((low_a, low_b, lost))
  low_a, low_b, lost = (np.stack(part) for part in zip(*results, strict=True))
  inside, outside = _feature_shapes(mixture, layered)
  low_a = low_a.reshape(len(a), *inside, rank).astype(np.float32)
  low_b = low_b.reshape(len(a), rank, *outside).astype(np.float32)
  return (low_a, low_b, lost) if stacked else (low_a[0], low_b[0], lost)


def low_rank_svd(
  a: np.ndarray, b: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(U [in, k], singular values [k], V [out, k]) of a [in, k] times b [k, out].

  The product is never built: its singular values are those of the product of
  two matrices [k, k].
  """
  left, r_left = np.linalg.qr(a)
  right, r_right = np.linalg.qr(b.T)
  u, s, v = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
  return left @ u, s, right @ v.T


def target_of(site: str) -> str:
  """The pattern of `targets` that is the site at a path of arrays alone."""
  return '/'.join(part for part in site.split('/') if part != 'layers')


def _feature_shapes(
  mixture: nn.Module, arrays: Mapping[str, np.ndarray]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The input's and output's axes of stacked arrays 'a' and 'b'."""
  a_end = -1 if 'a' in mixture.share else -2
  b_start = 2 if 'b' in mixture.share else 3
  return arrays['a'].shape[1:a_end], arrays['b'].shape[b_start:]


def _mean_weights(
  site: SiteRouting, routing: CollectedRouting, task: str
) -> np.ndarray:
  """[l, e]: the mean combine weights of a task's tokens; of all tasks', ''."""
  weights = np.nan_to_num(site.weight_by_task)
  if task:
    return weights[routing.tasks.index(task)]
  return weights.mean(axis=0)


def _mixture(adapter_map: AdapterMap) -> nn.Module:
  """The only adapter of a method, a mixture whose sites have routers each.

  Raises:
    ValueError: there are other adapters, or sites share routers.
  """
  adapters = {adapter.name: adapter for _, adapter in adapter_map.entries}
  mixture = next(iter(adapters.values()))
  if len(adapters) > 1 or not hasattr(mixture, 'router'):
    raise ValueError(
      f'expected a method of one mixture alone; got {", ".join(adapters)}'
    )
  if mixture.shares_routing:
    raise ValueError(
      f'sites of {mixture.name} share routers, and their experts are not '
      'measured apart; a smaller adapter needs a router at each site'
    )
  return mixture


def _unflatten(flat: Mapping[str, Any]) -> Tree:
  return flax.traverse_util.unflatten_dict(flat, sep='/')

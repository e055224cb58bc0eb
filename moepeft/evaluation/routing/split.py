# SPDX-License-Identifier: Apache-2.0
"""A mixture out of one LoRA (upcycling)."""

import flax
import flax.linen as nn
import numpy as np

from moepeft.core.types import Tree
from moepeft.evaluation.routing.reduce import (
  DerivedAdapter,
  low_rank_svd,
  target_of,
)
from moepeft.nn.adapter_hook import AdapterMap


def split_lora(
  adapter_map: AdapterMap, peft: Tree, experts: int, router: str
) -> DerivedAdapter:
  """A mixture whose experts divide the singular values of a LoRA.

  Expert i has every i-th of them in descending order, times the number of
  experts, so that the experts' mean is the LoRA: with even weights the mixture
  computes the same. Experts of one LoRA's copies would do so too, but they stay
  alike, as their gradients do.

  Args:
    adapter_map: of a method of one LoRA alone.
    router: its method text. The adapter lacks the router's arrays.

  Raises:
    ValueError: the method is another one, or the rank is too small.
  """
  lora = _lora(adapter_map)
  if not 2 <= experts <= lora.rank:
    raise ValueError(
      f'a LoRA of rank {lora.rank} can be split into 2 to {lora.rank} experts; '
      f'got {experts}'
    )
  rank = -(-lora.rank // experts)
  flat = flax.traverse_util.flatten_dict(peft, sep='/')
  parts: dict[str, np.ndarray] = {}
  targets = []
  for site in [p.removesuffix('/lora/a') for p in flat if p.endswith('/a')]:
    stacked = 'layers' in site.split('/')
    a, b = (
      np.asarray(flat[f'{site}/lora/{leaf}'], np.float64) for leaf in 'ab'
    )
    if not stacked:
      a, b = a[None], b[None]
    layers = [
      _split_layer(a_layer * lora.scale, b_layer, experts, rank)
      for a_layer, b_layer in zip(a, b, strict=True)
    ]
    for leaf, arrays in zip('ab', zip(*layers, strict=True), strict=True):
      array = np.stack(arrays).astype(np.float32)
      parts[f'{site}/molora/{leaf}'] = array if stacked else array[0]
    targets.append(target_of(site))
  # With alpha = rank the term of an expert is A B.
  method = (
    f'molora(experts={experts}, rank={rank}, alpha={float(rank)}, '
    f"router={router}, targets='{'|'.join(targets)}')"
  )
  tree = flax.traverse_util.unflatten_dict(parts, sep='/')
  return DerivedAdapter(method, tree, {})


def _split_layer(
  a: np.ndarray, b: np.ndarray, experts: int, rank: int
) -> tuple[np.ndarray, np.ndarray]:
  """(A [*in, e, r], B [e, r, *out]) of a layer's a [*in, k] and b [k, *out]."""
  inside, outside = a.shape[:-1], b.shape[1:]
  u, s, v = low_rank_svd(a.reshape(-1, a.shape[-1]), b.reshape(len(b), -1))
  root = np.sqrt(experts * s)
  left = np.zeros((len(u), rank, experts))
  right = np.zeros((rank, experts, len(v)))
  # Row-major: the i-th singular value is that of expert i % experts.
  left.reshape(len(u), -1)[:, : len(s)] = u * root
  right.reshape(-1, len(v))[: len(s)] = (v * root).T
  return (
    left.swapaxes(1, 2).reshape(*inside, experts, rank),
    right.swapaxes(0, 1).reshape(experts, rank, *outside),
  )


def _lora(adapter_map: AdapterMap) -> nn.Module:
  adapters = {adapter.name: adapter for _, adapter in adapter_map.entries}
  lora = next(iter(adapters.values()))
  if (
    len(adapters) > 1
    or not getattr(lora, 'takes_splits', False)
    or lora.tied_arrays
  ):
    raise ValueError(
      'a mixture is split from one plain LoRA, without init_weights, a_groups '
      f'and b_groups; got {", ".join(adapters)}'
    )
  return lora

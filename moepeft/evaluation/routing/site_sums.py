# SPDX-License-Identifier: Apache-2.0
"""Sums of a site's shares over tokens, by task, language and token."""

import flax.linen as nn
import numpy as np

from moepeft.evaluation.routing.site_routing import SiteRouting
from moepeft.peft.mixture import layer_counts


class SiteSums:
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

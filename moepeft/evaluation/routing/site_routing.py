# SPDX-License-Identifier: Apache-2.0
"""Collected routing: the shares of the experts of each site.

The share of an expert is the mean over tokens of its combine weight, divided by
the sum of the token's weights; a token without any expert has shares of 0. The
weights of heads, columns of the rank and parts of a projection are averaged.
In the shapes, n is the number of tokens, g that of groups of rows.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from moepeft.evaluation.routing.overlap import SiteOverlap
from moepeft.runs.router_diagnosis import DEAD_SHARE


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

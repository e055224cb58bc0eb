# SPDX-License-Identifier: Apache-2.0
"""The routers of a run in a few figures; letters: l layers, e experts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Routing:
  """Over every site and layer that has more than one expert.

  Attributes:
    entropy: the mean of the routers' entropies over ln e: 1 is even, 0
      certain. Of the softmax of the logits, before any selection.
    tops: {key of rows.SHARES: (mean, largest)} of the shares of the fullest
      experts, over the sites that have this kind of share.
  """

  entropy: float
  tops: Mapping[str, tuple[float, float]]


def summary(sites: Mapping[str, tuple[str, Any, Any]]) -> Routing | None:
  """The figures of one row of metrics.jsonl; None where nothing is routed.

  Args:
    sites: {site: (key of rows.SHARES, shares [l, e], entropies in nats [l])}.
  """
  entropies: list[np.ndarray] = []
  tops: dict[str, list[np.ndarray]] = {}
  for kind, shares, nats in sites.values():
    shares = np.asarray(shares, np.float64)
    if shares.shape[-1] > 1:
      nats = np.atleast_1d(np.asarray(nats, np.float64))
      entropies.append(nats / np.log(shares.shape[-1]))
      tops.setdefault(kind, []).append(shares.max(axis=-1))
  if not tops:
    return None
  each = {kind: np.concatenate(own) for kind, own in tops.items()}
  return Routing(
    float(np.concatenate(entropies).mean()),
    {kind: (float(own.mean()), float(own.max())) for kind, own in each.items()},
  )

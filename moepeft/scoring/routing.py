# SPDX-License-Identifier: Apache-2.0
"""How routers of a run ended up, in three figures; letters: l layers, e."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Routing:
  """Over every site and layer that has more than one expert.

  Attributes:
    entropy: the mean of the routers' entropies over ln e: 1 is even, 0
      certain. Of the softmax of the logits, before any selection.
    top: the mean share of the tokens that the fullest expert gets; 1/e is
      even, 1 a collapse.
    worst: the largest of these shares.
  """

  entropy: float
  top: float
  worst: float


def summary(row: Mapping[str, Any]) -> Routing | None:
  """The figures of a row of metrics.jsonl; None where nothing is routed.

  Args:
    row: its `routing` is {site: {'load': [l, e] or [e], 'entropy': [l] or
      one number, in nats}}.
  """
  entropies, tops = [], []
  for site in row.get('routing', {}).values():
    load = np.atleast_2d(np.asarray(site['load'], np.float64))
    if load.shape[-1] > 1:
      nats = np.atleast_1d(np.asarray(site['entropy'], np.float64))
      entropies.append(nats / np.log(load.shape[-1]))
      tops.append(load.max(axis=-1))
  if not tops:
    return None
  each = np.concatenate(tops)
  return Routing(
    float(np.concatenate(entropies).mean()),
    float(each.mean()),
    float(each.max()),
  )


def latest(rows: Iterable[Mapping[str, Any]]) -> Routing | None:
  """The figures of the last row of a run that tells of routers."""
  found = None
  for row in rows:
    found = row if row.get('routing') else found
  return summary(found) if found else None

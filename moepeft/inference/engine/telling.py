# SPDX-License-Identifier: Apache-2.0
"""From a step's arrays on the host to what a request is told."""

from collections.abc import Mapping

import numpy as np

from moepeft.inference.engine.sequence import Running


def top_of(
  ids: np.ndarray, logprobs: np.ndarray, count: int | None
) -> tuple[tuple[int, float], ...]:
  """(id, log-probability) of the first `count`."""
  pairs = zip(ids[: count or 0], logprobs[: count or 0], strict=True)
  return tuple((int(i), float(p)) for i, p in pairs)


def experts_of(
  told: Mapping[str, np.ndarray], i: int, row: Running
) -> dict[str, tuple[float, ...]] | None:
  """The weights [e] at each site where the row's own adapter routes.

  Args:
    told: {path: [n, e]} of all forms, a path being a site's with the names
      of the adapter and its router in it.
    i: the row's number there.

  Returns:
    None where none was asked for, or its adapter does not route.
  """
  if not row.request.routing:
    return None
  found = {}
  for path, weights in told.items():
    keys = path.split('/')
    for at, key in enumerate(keys):
      # A whole sublayer's adapters lie beside it.
      site = '/'.join(keys[:at]).replace('/around_', '/')
      if site in row.held.sites.get(key, ()):
        found[site] = tuple(float(w) for w in weights[i])
  return found or None

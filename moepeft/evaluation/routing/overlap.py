# SPDX-License-Identifier: Apache-2.0
"""Overlap between sites: how alike two sites route the same tokens.

The experts of two sites have nothing in common but their numbers, so that the
measure is linear CKA (Kornblith et al., arXiv:1905.00414), which no order of
the experts changes.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

# Below this variance, in all experts together, all tokens are routed alike.
_LEAST_VARIANCE = 1e-9


@dataclasses.dataclass(frozen=True)
class SiteOverlap:
  """The overlap of the sites of one stack that route the same tokens.

  Attributes:
    paths: of the sites, s of them.
    values: float64 [l, s, s], between 0 and 1; NaN for a site that routes all
      tokens alike.
  """

  paths: tuple[str, ...]
  values: np.ndarray


class Moments:
  """Sums of the shares of all sites of a stack, and of their products."""

  def __init__(self):
    self._sizes: dict[str, int] = {}
    self._count, self._first, self._second = 0, 0.0, 0.0

  def add(self, shares: Mapping[str, np.ndarray]) -> None:
    """Adds tokens.

    Args:
      shares: path of a site -> [n, l, e].
    """
    self._sizes = {path: a.shape[-1] for path, a in shares.items()}
    x = np.concatenate([*shares.values()], axis=-1).astype(np.float64)
    self._count += len(x)
    self._first = self._first + x.sum(axis=0)
    x = np.moveaxis(x, 1, 0)
    self._second = self._second + x.swapaxes(1, 2) @ x

  def result(self) -> SiteOverlap:
    """The overlap of the tokens so far."""
    mean = self._first / self._count
    covariance = self._second / self._count - np.einsum(
      'li,lj->lij', mean, mean
    )
    ends = np.cumsum([0, *self._sizes.values()])
    spans = [slice(*pair) for pair in zip(ends, ends[1:], strict=False)]
    squares = np.stack(
      [
        np.stack(
          [np.sum(covariance[:, i, j] ** 2, axis=(1, 2)) for j in spans], -1
        )
        for i in spans
      ],
      axis=1,
    )
    variance = np.stack(
      [np.einsum('lii->l', covariance[:, i, i]) for i in spans], axis=-1
    )
    norms = np.sqrt(np.einsum('lss->ls', squares))
    norms = np.where(variance > _LEAST_VARIANCE, norms, np.nan)
    values = squares / norms[:, :, None] / norms[:, None, :]
    return SiteOverlap(tuple(self._sizes), values)

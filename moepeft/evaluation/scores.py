# SPDX-License-Identifier: Apache-2.0
"""What evaluations are made of: rows, intervals and the paper's measure.

Numpy and libraries only; no program of JAX and no config.
"""

from moepeft.evaluation.paper_measure import Score, draws, scores
from moepeft.evaluation.results import (
  MEASURES,
  About,
  Row,
  majority,
  measured,
  read,
  write,
)

__all__ = (
  'MEASURES',
  'About',
  'Row',
  'Score',
  'draws',
  'majority',
  'measured',
  'read',
  'scores',
  'write',
)

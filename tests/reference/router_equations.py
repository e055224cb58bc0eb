# SPDX-License-Identifier: Apache-2.0
"""Published routers in NumPy, float64, one token at a time.

Nothing of moepeft is imported. Each function takes one token's features x [i]
and the router's parameters, and returns the weights [e] of the experts.
"""

import numpy as np


def softmax(z):
  e = np.exp(z - z.max())
  return e / e.sum()


def soft(x, kernel):
  """Zadouri et al., arXiv:2309.05444, equation 3."""
  return softmax(x @ kernel)


def top_k(x, kernel, k, renormalize):
  """Shazeer et al., arXiv:1701.06538, equations 3 to 5, without noise.

  Renormalised, the kept probabilities are the softmax of the kept logits.
  """
  p = softmax(x @ kernel)
  kept = np.argsort(-p, kind='stable')[:k]
  weights = np.zeros_like(p)
  weights[kept] = p[kept]
  return weights / weights.sum() if renormalize else weights


def threshold(x, kernel, threshold_kernel, bias, max_threshold=None):
  """Liu and Luo, arXiv:2405.00361, equations 4 to 6."""
  p = softmax(x @ kernel)
  max_threshold = max_threshold or 1 / len(p)
  t = max_threshold / (1 + np.exp(-(x @ threshold_kernel + bias)))
  weights = np.array([max(p_e - t, 0) for p_e in p])
  return weights / weights.sum() if weights.sum() else weights


def threshold_balance(tokens):
  """AdaMoeLayer.get_layer_loss of the released code.

  Args:
    tokens: (p [e], t) of each token.
  """
  experts, count = len(tokens[0][0]), len(tokens)
  fractions = sum((p - t >= 0).astype(float) for p, t in tokens) / count
  probabilities = sum(p - t for p, t in tokens) / count
  return experts * float(fractions @ probabilities)


def magnitude(z, bias, k):
  """Zou et al., arXiv:2510.08396, equations 4 to 6."""
  kept = np.argsort(-np.abs(z + bias), kind='stable')[:k]
  return np.isin(np.arange(len(z)), kept).astype(float)


def arrow(x, prototypes, k, temperature=1.0):
  """Ostapenko et al., arXiv:2405.11157, equations 2 and 3."""
  scores = np.abs(x @ prototypes) / temperature
  kept = np.argsort(-scores, kind='stable')[:k]
  weights = np.zeros_like(scores)
  weights[kept] = softmax(scores[kept])
  return weights


def load_balance(tokens, k):
  """Fedus et al., arXiv:2101.03961, equations 4 to 6, top-k of them 1/k each.

  Args:
    tokens: p [e] of each token.
  """
  experts, count = len(tokens[0]), len(tokens)
  f = np.zeros(experts)
  for p in tokens:
    f[np.argsort(-p, kind='stable')[:k]] += 1 / k / count
  return experts * float(f @ (sum(tokens) / count))

# SPDX-License-Identifier: Apache-2.0
"""Published routers in NumPy, float64, one token at a time.

Nothing of moepeft is imported. Each function takes one token's features x [i]
and the router's parameters, and returns the weights [e] of the experts. An
equation has its number where that was verified; for the others a docstring
names what of the released code was read.
"""

import numpy as np


def softmax(z):
  e = np.exp(z - z.max())
  return e / e.sum()


def soft(x, kernel):
  """Zadouri et al., arXiv:2309.05444; routing.py of the released code."""
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
  """Liu and Luo, arXiv:2405.00361; AdaMoeLayer.forward of its code."""
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
  """Zou et al., arXiv:2510.08396; FlyLoRALinear.forward of its code."""
  kept = np.argsort(-np.abs(z + bias), kind='stable')[:k]
  return np.isin(np.arange(len(z)), kept).astype(float)


def arrow(x, prototypes, k, temperature=1.0):
  """Ostapenko et al., arXiv:2405.11157; ArrowLoraLinearLayer of peft."""
  scores = np.abs(x @ prototypes) / temperature
  kept = np.argsort(-scores, kind='stable')[:k]
  weights = np.zeros_like(scores)
  weights[kept] = softmax(scores[kept])
  return weights


def phatgoose(x, gates, k):
  """Muqeeth et al., arXiv:2402.05859; Router._forward of its released code.

  Args:
    gates: [i, e].
  """
  standardize = lambda v: (v - v.mean()) / np.sqrt(v.var() + 1e-5)  # noqa: E731
  scores = np.array([standardize(x) @ standardize(v) for v in gates.T])
  scores /= len(x) ** 0.5
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


def sigmoid(z):
  """MoA, arXiv:2506.05928: a gate for each expert by itself."""
  return 1 / (1 + np.exp(-z))


def swiglu(x, gate_kernel, up_kernel, kernel, gate_bias=0, up_bias=0, bias=0):
  """MoA's released code, class Router: w2(silu(w1(x)) * w3(x))."""
  gate = x @ gate_kernel + gate_bias
  hidden = gate * sigmoid(gate) * (x @ up_kernel + up_bias)
  return hidden @ kernel + bias


def thresholded_sigmoid(z, x, kernel, bias, largest):
  """MoA's released code, sparse variant: gates below the threshold are zero."""
  gates, threshold = sigmoid(z), largest * sigmoid(x @ kernel + bias)
  return gates * (gates >= threshold)


def relu(x, kernel):
  """Wang et al., arXiv:2412.14711: R(x) = ReLU(x W)."""
  return np.array([max(z, 0) for z in x @ kernel])


def l1(weights):
  """The same paper's regularisation: the mean over tokens of ||R(x)||_1.

  Args:
    weights: [e] of each token.
  """
  return sum(np.abs(w).sum() for w in weights) / len(weights)


def top_p(x, kernel, p, renormalize):
  """Huang et al., arXiv:2403.07652: the smallest set that sums to p."""
  probabilities = softmax(x @ kernel)
  weights = np.zeros_like(probabilities)
  for e in np.argsort(-probabilities, kind='stable'):
    weights[e] = probabilities[e]
    if weights.sum() >= p:
      break
  return weights / weights.sum() if renormalize else weights


def hard(z):
  """Bengio et al., arXiv:1308.3432: the forward pass alone."""
  return np.eye(len(z))[np.argmax(z)]


def noisy_top_k(x, kernel, noise_kernel, noise, k):
  """Shazeer et al., arXiv:1701.06538, equations 3 to 5."""
  h = x @ kernel + noise * np.log1p(np.exp(x @ noise_kernel))
  kept = np.argsort(-h, kind='stable')[:k]
  weights = np.zeros_like(h)
  weights[kept] = softmax(h[kept])
  return weights


def importance(weights):
  """The same paper, equations 6 and 7, without w_importance.

  Args:
    weights: [e] of each token.
  """
  total = sum(weights)
  return total.std() ** 2 / total.mean() ** 2


def sparsity(x, hidden_kernel, hidden_bias, output_kernel, output_bias):
  """LD-MoLE, arXiv:2509.25684; the released code's GlobalSparsegen, l."""
  hidden = np.maximum(x @ hidden_kernel + hidden_bias, 0)
  score = hidden @ output_kernel + output_bias
  return -np.log1p(np.exp(-score)) + 0.99


def sparsegen(z, sparsity):
  """Laha et al., arXiv:1810.11975, sparsegen-lin: the nearest point of the
  simplex to z / (1 - sparsity), by bisection of its threshold."""
  z = z / (1 - sparsity)
  low, high = z.min() - 1, z.max()
  for _ in range(200):
    middle = (low + high) / 2
    if np.maximum(z - middle, 0).sum() > 1:
      low = middle
    else:
      high = middle
  return np.maximum(z - high, 0)


def sparsegen_balance(weights):
  """LoadBalancingLoss of LD-MoLE's released code.

  Args:
    weights: [e] of each token.
  """
  counts = sum((w > 0).astype(float) for w in weights)
  freq, prop = counts / counts.sum(), sum(weights) / len(weights)
  return len(freq) * float(freq @ prop)


def sparsegen_gap(tokens, k):
  """RegularizationLoss and lambda_interval_k of the same.

  Args:
    tokens: (z [e], sparsity) of each token.
  """
  gaps = []
  for z, sparsity in tokens:
    u = np.sort(z)[::-1]
    lower = 1 - (u[:k].sum() - k * u[k])
    gaps.append(max(lower - sparsity, 0))
  return np.mean(gaps)


def tsallis(p, q):
  """Normalised, of p + 1e-5: tsallis_entropy of MoE-PEFT's branch."""
  entropy = (1 - ((p + 1e-5) ** q).sum()) / (q - 1)
  return entropy / ((1 - len(p) ** (1 - q)) / (q - 1))


def entropy_adaptive(z, limit, least, threshold, q):
  """DynMoLE, arXiv:2504.00661; _dynamic_routing of the released code."""
  p = softmax(z)
  if tsallis(p, q) > threshold:
    return p
  weights, total = np.zeros_like(p), 0
  for place, e in enumerate(np.argsort(-p, kind='stable')):
    total += p[e]
    if place < least or total <= limit:
      weights[e] = p[e]
  return weights


def adaptive_balance(tokens):
  """The load balance of _dynamic_load_balancing_loss_func of the same.

  Args:
    tokens: (weights [e], p [e]) of each token.
  """
  weights = sum(w for w, _ in tokens) / len(tokens)
  p = sum(p for _, p in tokens) / len(tokens)
  return len(p) * float(weights @ p)


def generalized_js(tokens, balance, certainty):
  """HMoRA (openreview lTkHiXeuDl), without the released code's bounds.

  Args:
    tokens: p [e] of each token.
  """
  entropy = lambda p: -(p * np.log(p)).sum()  # noqa: E731
  most = np.log(len(tokens[0]))
  divergence = entropy(sum(tokens) / len(tokens)) - np.mean(
    [entropy(p) for p in tokens]
  )
  return max((balance - certainty) * most - divergence, 0) / most


def product_key(x, first, second, experts, k):
  """Lample et al., arXiv:1907.05242: the k largest sums of the k best of each
  table, softmax.

  Expert e is (e // m, e % m). Where pairs are no expert, as many more of each
  table are tried.
  """
  s, t = x @ first, x @ second
  columns = len(t)
  tried = k + len(s) * columns - experts
  sums = [
    (s[i] + t[j], i * columns + j)
    for i in np.argsort(-s, kind='stable')[:tried]
    for j in np.argsort(-t, kind='stable')[:tried]
    if i * columns + j < experts
  ]
  best = sorted(sums, reverse=True)[:k]
  weights = np.zeros(experts)
  weights[[e for _, e in best]] = softmax(np.array([z for z, _ in best]))
  return weights


def hash_experts(token, layer, experts, k, seed):
  """Roller et al., arXiv:2106.04426: a random, fixed assignment of a token's
  id; here by the finalizer of MurmurHash3."""

  def mix(h):
    h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
    h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
    return h ^ (h >> 16)

  h = mix((mix(seed) + layer + 1) % 2**32)
  h = mix(h ^ token)
  draws = [mix((h + e * 0x9E3779B9) % 2**32) >> 8 for e in range(experts)]
  weights = np.zeros(experts)
  weights[np.argsort(-np.array(draws), kind='stable')[:k]] = 1 / k
  return weights

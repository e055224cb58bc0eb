# SPDX-License-Identifier: Apache-2.0
"""Published routers that read more than one token, in NumPy, float64.

Nothing of moepeft is imported. Each function takes the features x [t, i] of
the real tokens of one example, or its task, and returns the weights of the
experts, [t, e] or [e].
"""

import math

import numpy as np


def softmax(z):
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def balanced(x, kernel, bias, k, renormalize=False):
  """Wang et al., arXiv:2408.15664, the biased gate of one token x [i]."""
  p = softmax(x @ kernel)
  chosen = np.argsort(-(p + bias), kind='stable')[:k]
  weights = np.zeros_like(p)
  weights[chosen] = p[chosen]
  return weights / weights.sum() if renormalize else weights


def next_bias(bias, counts, rate):
  """Wang et al., arXiv:2408.15664: b + u sign(mean - count)."""
  mean = sum(counts) / len(counts)
  return [
    b + rate * ((c < mean) - (c > mean))
    for b, c in zip(bias, counts, strict=True)
  ]


def task(vector, kernel):
  """Liu et al., arXiv:2310.18339, the task-motivated gate: softmax(W e)."""
  return softmax(vector @ kernel)


def layer_norm(x):
  """torch.nn.LayerNorm without its scale and bias."""
  return (x - x.mean()) / math.sqrt(x.var() + 1e-5)


def sentence(x, prompt, kernel, kernel_scale, scale, bias):
  """Muqeeth et al., arXiv:2306.03745; Router.forward of its code.

  Args:
    prompt: the number of the tokens in the prompt.
  """
  v = layer_norm(sum(x[:prompt]) / prompt) * scale + bias
  columns = [layer_norm(w) * kernel_scale for w in kernel.T]
  return softmax(np.array([v @ w for w in columns]))


def hybrid(x, prompt, token, task, weight, k=0):
  """HMoRA (openreview lTkHiXeuDl); TokenRouter.forward of its released code.

  Args:
    prompt: the number of the tokens in the prompt.
    token, task: (kernel, bias) of the two routers.
    weight: a_l of the layer.
  """
  m = sum(x[:prompt]) / prompt
  p = softmax(x @ token[0] + token[1])
  weights = (1 - weight) * p + weight * softmax(m @ task[0] + task[1])
  if not k:
    return weights
  for row in weights:
    row[np.argsort(-row, kind='stable')[k:]] = -np.inf
  return softmax(weights)


def layer_weight(layer, layers, epsilon, shift):
  """a_l of the same code, TokenRouter.__init__, where layers count from 0."""
  alpha = -epsilon + 2 * epsilon * layer / (layers - 1) + shift
  return 1 / (1 + math.exp(-alpha))


def bounded_js(rows, balance, certainty):
  """divergence_loss of the same code, of the probabilities [n, e]."""
  entropy = lambda p: -(p * np.log(p)).sum()  # noqa: E731
  most = np.log(rows.shape[1])
  of_mean = min(entropy(rows.mean(0)), balance * most)
  mean = np.mean([max(entropy(p), certainty * most) for p in rows])
  return max((balance - certainty) * most - (of_mean - mean), 0) / most


def switch(x, kernel, capacity=math.inf):
  """Fedus et al., arXiv:2101.03961: p of the best expert, up to a capacity."""
  taken = [0] * kernel.shape[1]
  weights = np.zeros((len(x), kernel.shape[1]))
  for row, p in zip(weights, softmax(x @ kernel), strict=True):
    best = p.argmax()
    if taken[best] < capacity:
      row[best] = p[best]
      taken[best] += 1
  return weights


def expert_choice(x, kernel, capacity_factor):
  """Zhou et al., arXiv:2202.09368: each expert takes its k best tokens."""
  s = softmax(x @ kernel)
  tokens, experts = s.shape
  k = math.ceil(capacity_factor * tokens / experts)
  weights = np.zeros_like(s)
  for e in range(experts):
    chosen = np.argsort(-s[:, e], kind='stable')[:k]
    weights[chosen, e] = s[chosen, e]
  return weights


def poly(logits, uniform=None):
  """Ponti et al., arXiv:2202.13914, the Gumbel-sigmoid at temperature 1.

  Args:
    uniform: draws [e] from U(0, 1), in training.
  """
  noise = 0 if uniform is None else np.log(uniform / (1 - uniform))
  z = 1 / (1 + np.exp(-(logits + noise)))
  return z / z.sum()


def localized_balance(examples, in_group, delta):
  """Dou et al., arXiv:2312.09979; Linear.cv_squared of its released code.

  Args:
    examples: for each, the weights [t, e] of its tokens.
    in_group: for each, whether its task is of the first half of the experts.
  """
  z = []
  for weights, first in zip(examples, in_group, strict=True):
    experts = weights.shape[1]
    for e in range(experts):
      alike = first == (e < experts // 2)
      z.append(weights[:, e].sum() * (1 + delta if alike else 1 - delta))
  return np.var(z, ddof=1) / (np.mean(z) ** 2 + 1e-10)

# SPDX-License-Identifier: Apache-2.0
# %% [markdown] lang="en"
# # Generation: sampling, KV cache, beam search
#
# A language model gives a distribution over the next token. Turning it into
# text takes a choice at every step, and a way not to compute everything again
# at every step. You write both: temperature, top-k, top-p, min-p, penalties,
# beam search, and the KV cache with its cost counted; each piece is compared
# with the package's.
# %% [markdown] lang="zh"
# # 文本生成：采样、KV cache、beam search
#
# 语言模型给出下一个 token 的分布。要得到文本，每一步都要做选择，
# 而且不应每一步都从头计算。本篇把两部分都写出来：temperature、top-k、top-p、
# min-p、各种惩罚、beam search，以及带开销计数的 KV cache；每一部分都与 moepeft
# 的实现比较。
# %% [markdown] lang="en"
# ## What you will understand
#
# - temperature, and how it moves the entropy between 0 and $\ln V$;
# - top-k, top-p and min-p: three answers to "which tokens are noise", and where
#   they differ;
# - the KV cache: why it gives the same numbers, what it saves and what it
#   costs;
# - beam search, its length penalty, and how it relates to exhaustive search;
# - why greedy text repeats, and what repetition and frequency penalties do.
#
# Time: 75 minutes to read, about one minute to run. Before this: notebooks 08
# (block) and 10 (GPT).
# %% [markdown] lang="zh"
# ## 你将理解什么
#
# - temperature，以及它怎样把熵在 0 与 $\ln V$ 之间移动；
# - top-k、top-p、min-p：对"哪些 token 是噪声"的三种回答，差别在哪里；
# - KV cache：为什么结果不变，省了什么，花了什么；
# - beam search、length penalty，以及它与穷举搜索的关系；
# - 为什么贪心解码会重复，repetition penalty 和 frequency penalty 做了什么。
#
# 用时：阅读约 75 分钟，运行约一分钟。前置：08（block）与 10（GPT）。
# %%
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import moepeft
from moepeft.core.types import Context
from moepeft.inference import sampling
from moepeft.inference.adapters.fixed import FixedAdapter
from moepeft.inference.api import Request
from moepeft.inference.beam_search import BeamConfig
from moepeft.inference.engine.engine import Engine
from moepeft.inference.engine.limits import EngineConfig
from moepeft.models import FAMILIES
from moepeft.models.decoder.model import Decoder
from moepeft.nn import initializers

# %% [markdown] lang="en"
# ## 1. A small model
#
# A Llama of two layers over characters, trained for a few seconds on the
# sonnets of notebook 10. Its text is poor, its distributions are real: sharp
# inside words, flat where a word begins. The weights come from the package;
# everything after this section is computed by hand.
# %% [markdown] lang="zh"
# ## 1. 一个小模型
#
# 两层的字符级 Llama，在 10 的十四行诗上训练几秒钟。它写的文本很差，
# 但分布是真实的：在单词内部很集中，在词首很分散。权重来自 moepeft，
# 本节之后的计算全部手写。
# %%
repository = Path(moepeft.__file__).parents[1]
text = (repository / 'notebooks/data/sonnets.txt').read_text('utf-8')
alphabet = sorted(set(text))
vocab = len(alphabet)
ids = np.array([alphabet.index(c) for c in text])
config = dataclasses.replace(
  FAMILIES['llama'].sizes['tiny'],
  vocab=vocab,
  d_model=64,
  heads=4,
  kv_heads=2,
  head_dim=16,
  ffn=168,
  layers=2,
)
model = Decoder(config)


def encode(text):
  return [alphabet.index(c) for c in text]


def decode(ids):
  return ''.join(alphabet[i] for i in ids)


# %%
@jax.jit
def step(params, state, window):
  def loss(params):
    logits = model.apply({'params': params}, {'inputs': window[:, :-1]})
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, window[:, 1:]
    ).mean()

  value, gradient = jax.value_and_grad(loss)(params)
  updates, state = optimizer.update(gradient, state, params)
  return optax.apply_updates(params, updates), state, value


STEPS = 250
optimizer = optax.adamw(optax.cosine_decay_schedule(5e-3, STEPS))
params = initializers.init_params(model, {'inputs': ids[None, :2]}, 0)['params']
params = jax.tree.map(jnp.asarray, params)
state = optimizer.init(params)
rng = np.random.default_rng(0)
for _ in range(STEPS):
  at = rng.integers(0, len(ids) - 49, 16)
  params, state, loss = step(params, state, ids[at[:, None] + np.arange(49)])
print('loss of the last batch:', float(loss), 'ln V:', np.log(vocab))
assert loss < 2.4, 'the samples below need a trained model'
# By hand in float64, so that checks can be sharp.
params32 = jax.tree.map(np.asarray, params)
params = jax.tree.map(np.float64, params32)


# %% [markdown] lang="en"
# ## 2. The KV cache
#
# To generate token $t + 1$ the model needs the last position's logits only. In
# that position's attention, the query is new; the keys and values of the
# earlier tokens are what they were in the step before, because with a causal
# mask nothing before position $t$ depends on token $t$. So we keep them: the
# *KV cache*, for each layer two arrays $[s, k, h]$ for $s$ tokens and $k$
# key-value heads of size $h$. Reading the prompt, many tokens in one call, is
# called *prefill*; the steps of one token that follow are *decoding*.
#
# `forward` reads new tokens after those of the cache and appends their keys and
# values. With an empty cache and the whole text it is the ordinary forward
# pass. It counts multiply-adds as it goes.
# %% [markdown] lang="zh"
# ## 2. KV cache
#
# 生成第 $t + 1$ 个 token 只需要最后一个位置的 logits。在这个位置的 attention
# 中，query 是新的；之前 token 的 key 和 value 与上一步相同，因为有 causal
# mask，位置 $t$ 之前的一切都不依赖 token $t$。所以把它们保存下来，这就是 *KV
# cache*：每层两个数组 $[s, k, h]$，$s$ 是 token 数，$k$ 是大小为 $h$ 的
# key-value head 的个数。一次读入整个 prompt 叫做 *prefill*，之后每步一个 token
# 叫做 *decode*（解码）。
#
# `forward` 读入 cache 之后的新 token，并把它们的 key 和 value 接到 cache 上。
# cache 为空、输入为全文时，就是普通的前向计算。它同时统计乘加次数。
# %%
class Counter:
  multiply_adds = 0


def product(eqn, x, y):
  """einsum that counts its multiply-adds: the product of all axes' sizes."""
  inputs = eqn.split('->')[0].split(',')
  sizes = {a: n for s, z in zip(inputs, (x, y), strict=True)
           for a, n in zip(s, z.shape, strict=True)}  # fmt: skip
  Counter.multiply_adds += int(np.prod(list(sizes.values())))
  return np.einsum(eqn, x, y, optimize=True)


def rms_norm(x, p):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.eps) * p['scale']


def rotate(x, positions):
  """Rotary embedding of x [t, n, h]."""
  half = x.shape[-1] // 2
  rates = config.rope.theta ** -(np.arange(half) / half)
  angles = positions[:, None, None] * rates
  a, b = x[..., :half], x[..., half:]
  cos, sin = np.cos(angles), np.sin(angles)
  return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def softmax(z):
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


# %%
def attention(x, p, cache):
  """x [t, d] after the cached tokens -> ([t, d], the longer cache)."""
  old = cache[0].shape[0]
  positions = old + np.arange(len(x))
  q, k, v = (product('td,dnh->tnh', x, p[a]['kernel']) for a in 'qkv')
  q, k = rotate(q, positions), rotate(k, positions)
  k, v = (np.concatenate(pair) for pair in zip(cache, (k, v), strict=True))
  groups = q.reshape(len(x), k.shape[1], -1, q.shape[-1])
  logits = product('tkgh,skh->kgts', groups, k) * q.shape[-1] ** -0.5
  visible = np.arange(len(k)) <= positions[:, None]
  weights = softmax(np.where(visible, logits, -np.inf))
  y = product('kgts,skh->tkgh', weights, v).reshape(q.shape)
  return product('tnh,nhd->td', y, p['o']['kernel']), (k, v)


def feed_forward(x, p):
  gate, up = (product('td,df->tf', x, p[w]['kernel']) for w in ('wi_0', 'wi_1'))
  hidden = gate / (1 + np.exp(-gate)) * up
  return product('tf,fd->td', hidden, p['wo']['kernel'])


def empty_cache():
  shape = (0, config.kv_heads, config.head_dim)
  return [(np.zeros(shape), np.zeros(shape)) for _ in range(config.layers)]


def forward(ids, caches):
  """New ids [t] -> (logits of all of them [t, v], the longer caches)."""
  x, new_caches = params['embed']['embedding'][np.asarray(ids)], []
  for i, cache in enumerate(caches):
    p = jax.tree.map(lambda a, i=i: a[i], params['decoder']['layers'])
    y, cache = attention(rms_norm(x, p['self']['norm']), p['self'], cache)
    x = x + y
    x = x + feed_forward(rms_norm(x, p['mlp']['norm']), p['mlp'])
    new_caches.append(cache)
  x = rms_norm(x, params['decoder']['norm'])
  return product('td,dv->tv', x, params['head']['kernel']), new_caches


# %% [markdown] lang="en"
# Three checks. The forward pass is the package's. The text in pieces, through
# the cache, gives the same logits as in one piece. And the package's own cached
# step, `Decoder.extend`, gives them too. NumPy computes in float64 here, the
# package in float32; logits are of size 10, where neighbouring float32 numbers
# differ by $10^{-6}$, and $10^{-4}$ leaves room for the rounding in many sums.
# %% [markdown] lang="zh"
# 三个检验：前向计算与 moepeft 一致；文本分段经过 cache，与一次输入得到同样的
# logits；moepeft 自己的带 cache 的步骤 `Decoder.extend` 也给出同样的结果。这里
# NumPy 使用 float64，moepeft 使用 float32；logits 大小约为 10，此处相邻的
# float32 数相差 $10^{-6}$，$10^{-4}$ 为多次求和的舍入误差留有余量。
# %%
prompt = encode("Shall I compare thee to a summer's")
whole, _ = forward(prompt, empty_cache())
expected = model.apply({'params': params32}, {'inputs': jnp.array([prompt])})[0]
assert np.abs(whole - expected).max() < 1e-4, 'compare with notebook 08'

caches, pieces = empty_cache(), []
for piece in (prompt[:11], prompt[11:12], prompt[12:29], prompt[29:]):
  logits, caches = forward(piece, caches)
  pieces.append(logits)
difference = np.abs(np.concatenate(pieces) - whole).max()
print('cached and uncached logits differ by at most', difference)
assert difference < 1e-9, 'look at positions, and at the order of the cache'
# %%
variables, cached = {'params': params32}, []
for start, stop in ((0, 20), (20, 21), (21, len(prompt))):
  ctx = Context(
    None,
    positions=jnp.arange(start, stop)[None],
    decode=True,
    cache_length=48,
  )
  logits, cache = model.apply(
    variables,
    jnp.array([prompt[start:stop]]),
    ctx,
    method=model.extend,
    mutable=['cache'],
  )
  variables = variables | cache
  cached.append(logits[0])
assert np.abs(np.concatenate(cached) - whole).max() < 1e-4
# %% [markdown] lang="en"
# ### What it saves
#
# Let $P$ be the number of weights in all matrices that a token is multiplied
# with, the head included. One token costs $P$ multiply-adds in them, and
# $2 d_a s$ in each of the $L$ layers for attention over $s$ keys: $d_a s$ for
# the logits and as many for the sum of the values, where $d_a = nh$ with $n$
# query heads. Generating $T$ tokens without a cache reads $1, 2, \ldots, T$
# tokens:
#
# $$\text{uncached} = \sum_{t=1}^{T} (tP + 2 L d_a t^2) \approx \tfrac12 P T^2 +
# \tfrac23 L d_a T^3, \qquad
# \text{cached} = PT + 2 L d_a \sum_t t \approx PT + L d_a T^2.$$
#
# (The uncached attention computes all $t \times t$ logits, as `forward` does,
# masked ones included.) The counter agrees with the formula exactly:
# %% [markdown] lang="zh"
# ### 省了多少
#
# 设 $P$ 是一个 token 要乘的矩阵的权重总数（包括 head）。一个 token 在矩阵中花费
# $P$ 次乘加；$L$ 层中每层 attention 对 $s$ 个 key 花费 $2 d_a s$ 次：logits 要
# $d_a s$ 次，对 value 求和也要 $d_a s$ 次，$d_a = nh$，$n$ 是 query head 数。
# 生成 $T$ 个 token，不用 cache 要依次读 $1, 2, \ldots, T$ 个 token：
#
# $$\text{uncached} = \sum_{t=1}^{T} (tP + 2 L d_a t^2) \approx \tfrac12 P T^2 +
# \tfrac23 L d_a T^3, \qquad
# \text{cached} = PT + 2 L d_a \sum_t t \approx PT + L d_a T^2.$$
#
# （不用 cache 时按 `forward` 的做法计算全部 $t \times t$ 个 logits，包括被 mask
# 的。）计数器与公式完全一致：
# %%
d_a, length = config.heads * config.head_dim, 40
matrices = config.d_model * vocab + config.layers * (
  config.d_model * (2 * d_a + 2 * config.kv_heads * config.head_dim)
  + 3 * config.d_model * config.ffn
)


def greedy(prompt, length, use_cache):
  """The text [length] that takes the most probable token at each step."""
  text, caches = list(prompt), empty_cache()
  new = text
  while len(text) < length:
    logits, longer = forward(new, caches)
    text.append(int(logits[-1].argmax()))
    if use_cache:
      new, caches = text[-1:], longer
    else:
      new = text
  return text


counts, texts = {}, {}
for use_cache in (False, True):
  Counter.multiply_adds = 0
  texts[use_cache] = greedy(encode('S'), length + 1, use_cache)
  counts[use_cache] = Counter.multiply_adds
t = np.arange(1, length + 1)
formula = {
  False: (t * matrices + 2 * config.layers * d_a * t**2).sum(),
  True: (matrices + 2 * config.layers * d_a * t).sum(),
}
assert texts[False] == texts[True], 'the cache changed the text'
assert counts == formula, (counts, formula)
print(counts, 'ratio', round(counts[False] / counts[True], 1))
cache_bytes = 2 * config.layers * config.kv_heads * config.head_dim * 4
print('the price:', cache_bytes, 'bytes for each token in float32')


# %% [markdown] lang="en"
# ## 3. Temperature
#
# For logits $z_i$, $p_T(i) \propto \exp(z_i / T)$. $T \to 0$ puts all
# probability on the largest logit (greedy), $T = 1$ is the model,
# $T \to \infty$ is uniform. The entropy grows with $T$: its derivative with
# respect to $\beta = 1/T$ is $-\beta \operatorname{Var}_{p_T}(z) \le 0$. So
# temperature changes the entropy; the order of the tokens stays the same.
# %% [markdown] lang="zh"
# ## 3. Temperature
#
# 设 logits 为 $z_i$，$p_T(i) \propto \exp(z_i / T)$。$T \to 0$
# 时全部概率在最大的 logit 上（贪心），$T = 1$ 是模型本身，$T \to \infty$
# 是均匀分布。熵随 $T$ 增大：它对 $\beta = 1/T$ 的导数是
# $-\beta \operatorname{Var}_{p_T}(z) \le 0$。因此 temperature 改变的是熵，token
# 按概率的排序不变。
# %%
def entropy(p):
  return -(p * np.log(np.maximum(p, 1e-300))).sum(-1)


# The distributions after each of 300 characters of the text.
sample_logits = forward(ids[:300], empty_cache())[0]
temperatures = (0.1, 0.5, 1.0, 2.0, 10.0)
entropies = [entropy(softmax(sample_logits / t)).mean() for t in temperatures]
for t, h in zip(temperatures, entropies, strict=True):
  print(f'T = {t}: mean entropy {h:.2f} nats of {np.log(vocab):.2f}')
assert (np.diff(entropies) > 0).all(), 'entropy has to grow with T'
expected = sampling.apply_temperature(jnp.array(sample_logits), 0.7)
assert np.allclose(sample_logits / 0.7, expected, atol=1e-4)


# %% [markdown] lang="en"
# ## 4. Top-k, top-p, min-p
#
# At $T = 1$ each token of a long tail has a small probability, but together
# they may have 10 % at every step; over 100 steps it is almost sure that one of
# them is drawn. Filters set the tail to zero and renormalize what remains:
#
# - **top-k**: the $k$ most probable tokens.
# - **top-p** (nucleus): the fewest most probable tokens whose probabilities sum
#   to at least $p$.
# - **min-p**: tokens with probability at least $p_{\min} \cdot \max_i p_i$.
#
# Top-k takes the same number where the model is sure and where it is not. The
# other two adapt. A remark on ties: top-k and min-p keep all tokens that are as
# probable as the last one kept. Top-p keeps only as many of them as it needs;
# the package prefers greater ids, `np.argsort` promises no order, and the
# logits below have no such ties.
# %% [markdown] lang="zh"
# ## 4. Top-k、top-p、min-p
#
# $T = 1$ 时，长尾中每个 token 的概率都很小，但合起来每一步可能有 10 %；100
# 步里几乎必然抽到其中一个。过滤器把尾部置零，再对剩下的归一化：
#
# - **top-k**：概率最大的 $k$ 个 token。
# - **top-p**（nucleus）：概率之和至少为 $p$ 的最少的 token。
# - **min-p**：概率至少为 $p_{\min} \cdot \max_i p_i$ 的 token。
#
# 不管模型有没有把握，top-k 都取同样多的 token；另外两种会随分布变化。
# 关于概率相等的情况：top-k 和 min-p 会保留所有与最后一个入选 token 概率相同的
# token；top-p 只保留所需的个数，moepeft 优先取 id 较大的，`np.argsort`
# 不保证顺序，而下面的 logits 没有这种情况。
# %%
def top_k(z, k):
  """z [v]: keeps the k largest, others become -inf."""
  return np.where(z >= np.sort(z)[-k], z, -np.inf)


def top_p(z, p):
  order = np.argsort(-z)
  cumulative = np.cumsum(softmax(z)[order])
  # The first token at which the sum reaches p is the last one to keep.
  count = int(np.searchsorted(cumulative, p)) + 1
  y = np.full_like(z, -np.inf)
  y[order[:count]] = z[order[:count]]
  return y


def min_p(z, p):
  probabilities = softmax(z)
  return np.where(probabilities >= p * probabilities.max(), z, -np.inf)


z32 = sample_logits.astype(np.float32)
FILTERS = {
  'top-k, 8': (top_k, sampling.top_k, 8),
  'top-p, 0.9': (top_p, sampling.top_p, 0.9),
  'min-p, 0.1': (min_p, sampling.min_p, 0.1),
}
sizes = {}
for name, (by_hand, package, value) in FILTERS.items():
  mine = np.stack([by_hand(z, value) for z in z32])
  theirs = np.asarray(package(jnp.array(z32), value))
  assert np.array_equal(mine, theirs), f'{name} keeps other tokens'
  sizes[name] = np.isfinite(mine).sum(1)
  print(f'{name}: keeps {sizes[name].min()} to {sizes[name].max()} tokens')
# %%
h = entropy(softmax(z32))
figure, axis = plt.subplots(figsize=(6, 2.8))
for name, marker in zip(FILTERS, '_.x', strict=True):
  axis.plot(h, sizes[name], marker, label=name, alpha=0.6)
axis.set(xlabel='entropy of the distribution, nats', ylabel='tokens kept')
axis.legend(fontsize=8)
figure.tight_layout()
plt.show()
# %% [markdown] lang="en"
# Each point is one position of the text. Where the model is sure (left), top-p
# and min-p keep few tokens, and top-k still keeps 8. In the middle top-p keeps
# more than min-p. At the flat end the best token is improbable itself, min-p's
# threshold falls with it, and it keeps as many as top-p or more.
#
# The order matters when they are combined: temperature first changes what top-p
# sees. The package, like `transformers`, applies temperature, top-k, top-p,
# min-p.
# %% [markdown] lang="zh"
# 每个点是文本中的一个位置。模型有把握时（左侧），top-p 和 min-p 只留少数
# token，而 top-k 仍留 8 个。中间部分 top-p 比 min-p 留得多。在分布很平的一端，
# 最好的 token 概率也很小，min-p 的阈值随之降低，留下的与 top-p 一样多甚至更多。
#
# 组合使用时顺序很重要：先用 temperature 会改变 top-p 看到的分布。moepeft 与
# `transformers` 一样，依次应用 temperature、top-k、top-p、min-p。
# %%
z = z32[150]
mine = min_p(top_p(top_k(z / np.float32(1.5), 20), 0.95), 0.05)
settings = sampling.Sampling(temperature=1.5, top_k=20, top_p=0.95, min_p=0.05)
expected = np.asarray(sampling.filter_logits(jnp.array(z[None]), settings))[0]
assert np.array_equal(np.isfinite(mine), np.isfinite(expected))

draws = 20_000
keys = jax.random.split(jax.random.key(0), draws)
tokens = sampling.sample_tokens(jnp.tile(z, (draws, 1)), settings, keys)
frequency = np.bincount(np.asarray(tokens), minlength=vocab) / draws
p = softmax(mine)
deviation = np.abs(frequency - p) / np.sqrt(p * (1 - p) / draws + 1e-12)
print('drawn', draws, 'times; largest deviation', deviation.max(), 'sigma')
# Of at most 20 frequencies, one beyond 5 sigma has a chance of 1 in 80,000.
assert deviation[p > 0].max() < 5 and frequency[p == 0].sum() == 0


# %% [markdown] lang="en"
# ## 5. Repetition
#
# Greedy text falls into loops: once a phrase has occurred, the model's
# attention makes its continuation more probable, and greedy never leaves the
# most probable path. Remedies change the logits of tokens that occurred:
#
# - the *repetition penalty* (CTRL, arXiv:1909.05858) divides these logits by
#   $\theta > 1$; implementations multiply negative ones instead, so that they
#   fall, too. Adding a constant to all logits would not change the
#   distribution, but it changes what this rule does. It is in wide use all the
#   same;
# - the *frequency penalty* subtracts $\alpha \cdot \text{count}$, the *presence
#   penalty* $\beta$ once.
#
# With characters as tokens they are crude: all letters have occurred after a
# few lines, so the penalty below looks at the last 20 characters only.
# Repetition is measured as the share of 6-grams (6 characters in a row) that
# have occurred before.
# %% [markdown] lang="zh"
# ## 5. 重复
#
# 贪心解码会陷入循环：某个短语出现过之后，attention 会使它的后续概率更大，
# 而贪心从不离开概率最大的路径。对策是改变出现过的 token 的 logits：
#
# - *repetition penalty*（CTRL，arXiv:1909.05858）：把这些 logit 除以
#   $\theta > 1$；各种实现对负的 logit 改为乘以 $\theta$，使它们同样变小。给所有
#   logits 加同一常数不会改变分布，却会改变这条规则的效果。尽管如此，
#   它用得很广；
# - *frequency penalty* 减去 $\alpha \cdot \text{count}$，*presence penalty*
#   只减一次 $\beta$。
#
# 以字符为 token 时这些方法很粗糙：几行之后所有字母都出现过，
# 所以下面的惩罚只看最近 20 个字符。重复程度用先前已出现过的 6-gram（连续 6
# 个字符）所占的比例来衡量。
# %%
def repetition_penalty(z, previous, theta):
  y = z.copy()
  seen = list(set(previous))
  y[seen] = np.where(z[seen] < 0, z[seen] * theta, z[seen] / theta)
  return y


def count_penalties(z, previous, frequency, presence):
  counts = np.bincount(previous, minlength=vocab)
  return z - frequency * counts - presence * (counts > 0)


previous = encode('my love is my love')
occurred = np.isin(np.arange(vocab), previous)
counts = np.bincount(previous, minlength=vocab)[None]
z = z32[:1]
expected = sampling.apply_repetition_penalty(z, occurred[None], 1.3)
assert np.allclose(repetition_penalty(z[0], previous, 1.3), expected[0])
expected = sampling.apply_count_penalties(z, counts, 0.4, 0.3)
assert np.allclose(
  count_penalties(z[0], previous, 0.4, 0.3), expected[0], atol=1e-5
)


# %%
def generate(prompt, length, choose):
  """The prompt and `length` tokens, each from choose(logits, text)."""
  text, caches, new = list(prompt), empty_cache(), list(prompt)
  for _ in range(length):
    logits, caches = forward(new, caches)
    new = [int(choose(logits[-1], text))]
    text += new
  return text


def repeated(text, n=6):
  grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
  return 1 - len(set(grams)) / len(grams)


def draw(z, rng):
  return rng.choice(vocab, p=softmax(z))


rng = np.random.default_rng(1)
RULES = {
  'greedy': lambda z, text: z.argmax(),
  'greedy, penalty 1.3': lambda z, text: repetition_penalty(
    z, text[-20:], 1.3
  ).argmax(),
  'T = 1': lambda z, text: draw(z, rng),
  'T = 0.8, top-p 0.9': lambda z, text: draw(top_p(z / 0.8, 0.9), rng),
  'T = 1.5': lambda z, text: draw(z / 1.5, rng),
}
results = {name: generate(encode('When '), 160, f) for name, f in RULES.items()}
for name, result in results.items():
  line = decode(result)[:90].replace('\n', ' / ')
  print(f'{name} (repeated {repeated(result):.0%}): {line}')
assert repeated(results['greedy']) > 2 * repeated(results['T = 1'])
# %% [markdown] lang="en"
# ## 6. Beam search
#
# Greedy takes the best token at each step, which need not give the best
# sequence. Beam search keeps the $m$ best prefixes, the *beams*: it extends
# each by every token, and of the $mV$ candidates it keeps the $m$ with the
# highest sum of log-probabilities. Prefixes that end (here with a newline, the
# end of a verse) move to a list of finished answers.
#
# Sums of log-probabilities fall with every token, so longer answers have lower
# sums. The *length penalty* compares $\frac{1}{|y|^{\alpha}} \sum_i \ln p(y_i)$
# for answers $y$ of $|y|$ tokens: $\alpha = 0$ is the sum, $\alpha = 1$ the
# mean, and greater $\alpha$ favours longer answers.
#
# The rules below are those of `transformers`, which the package follows. Of the
# $2m$ best candidates, those that end are finished answers if they are among
# the first $m$, and the first $m$ that do not end go on. (With one end token at
# most $m$ of the $2m$ end, so $m$ are left.) The search stops when $m$ answers
# are finished and no beam has a better score than the worst of them.
# %% [markdown] lang="zh"
# ## 6. Beam search
#
# 贪心每一步取最好的 token，但不一定得到最好的序列。Beam search 保留 $m$
# 个最好的前缀，称为 *beam*：每个前缀用每个 token 扩展，在 $mV$
# 个候选中保留对数概率之和最大的 $m$ 个。结束的前缀（这里以换行结束，
# 即一行诗的结尾）移入已完成的列表。
#
# 对数概率之和随每个 token 减小，因此答案越长和越小。*Length penalty* 对有 $|y|$
# 个 token 的答案 $y$ 比较 $\frac{1}{|y|^{\alpha}} \sum_i \ln p(y_i)$：
# $\alpha = 0$ 是和，$\alpha = 1$ 是平均，$\alpha$ 越大越偏向长答案。
#
# 下面的规则与 `transformers` 相同，moepeft 也遵循。在最好的 $2m$ 个候选中，
# 已结束且排在前 $m$ 的成为完成的答案，前 $m$ 个未结束的继续。（结束 token
# 只有一个时，$2m$ 个中至多 $m$ 个结束，还剩 $m$ 个。）已有 $m$ 个完成的答案，
# 且没有 beam 的分数高于其中最差的一个时，搜索停止。
# %%
END = encode('\n')[0]


def log_softmax(z):
  z = z - z.max(-1, keepdims=True)
  return z - np.log(np.exp(z).sum(-1, keepdims=True))


def beam_search(prompt, m, steps, alpha=1.0):
  """The m best answers (ids, score), best first; END or `steps` ends one."""
  logits, caches = forward(prompt, empty_cache())
  # A beam: (sum of log-probabilities, answer, logits, caches).
  beams, finished = [(0.0, [], logits[-1], caches)], []
  for length in range(1, steps + 1):
    candidates = []
    for total, answer, logits, caches in beams:
      logp = log_softmax(logits)
      for token in np.argsort(-logp)[: 2 * m]:
        candidates.append((total + logp[token], [*answer, int(token)], caches))
    candidates.sort(key=lambda c: -c[0])
    running = []
    for rank, (total, answer, caches) in enumerate(candidates[: 2 * m]):
      if answer[-1] == END or length == steps:
        if rank < m:
          finished.append((answer, total / length**alpha))
      elif len(running) < m:
        running.append((total, answer, caches))
    finished = sorted(finished, key=lambda a: -a[1])[:m]
    if not running:
      break
    if len(finished) == m and running[0][0] / length**alpha <= finished[-1][1]:
      break
    beams = []
    for total, answer, caches in running:
      logits, caches = forward(answer[-1:], caches)
      beams.append((total, answer, logits[-1], caches))
  return finished


# %% [markdown] lang="en"
# Check one: with as many beams as there are tokens, the search over two steps
# is exhaustive. We compare with all $V^2$ continuations.
# %% [markdown] lang="zh"
# 检验一：beam 数等于 token 数时，两步的搜索就是穷举。与全部 $V^2$ 个续写比较。
# %%
prompt = encode('Shall I ')
first = log_softmax(forward(prompt, empty_cache())[0][-1])
second = np.stack(
  [
    log_softmax(forward([*prompt, i], empty_cache())[0][-1])
    for i in range(vocab)
  ]
)
total = first[:, None] + second
# An answer that ended after one token has no second one.
total[END] = -np.inf
best = np.unravel_index(total.argmax(), total.shape)
answers = beam_search(prompt, vocab, 2, alpha=0.0)
two_tokens = [a for a in answers if len(a[0]) == 2]
assert two_tokens[0][0] == [int(i) for i in best], 'exhaustive search differs'
assert abs(two_tokens[0][1] - total.max()) < 1e-9
# %% [markdown] lang="en"
# Check two: the package's engine, which runs beams in slots of its KV cache,
# finds the same answers with the same scores.
# %% [markdown] lang="zh"
# 检验二：moepeft 的 engine 在 KV cache 的 slot 中运行各个 beam，
# 找到同样的答案和同样的分数。
# %%
engine = Engine(
  model,
  params32,
  FixedAdapter(model),
  EngineConfig(slots=4, max_model_len=64, chunk=16, batch_sizes=(4,)),
)
request = Request('0', tuple(prompt), 30, eos_token_ids=(END,))
theirs = engine.beam_search([request], BeamConfig(4, length_penalty=1.0))[0]
mine = beam_search(prompt, 4, 30, alpha=1.0)
for (answer, score), theirs_one in zip(mine, theirs, strict=True):
  print(f'{score:.4f} {decode(answer)!r}')
  assert answer == theirs_one.ids, decode(theirs_one.ids)
  # Sums of 30 float32 numbers of size 1.
  assert abs(score - theirs_one.score) < 1e-4


# %% [markdown] lang="en"
# Beam search looks for the most probable text, which need not be good text:
# here it is a loop of frequent words. It helps in tasks whose input nearly
# fixes the answer (translation, speech recognition); for open text, sampling is
# better.
#
# The length penalty is best seen on one fixed set of finished answers: 40
# sampled verses with their sums of log-probabilities. As $\alpha$ grows, the
# winner never gets shorter. (For two answers with sums $S_1 > S_2$ and lengths
# $n_1 < n_2$, the ratio of the scores $\frac{S_1}{S_2} (n_2 / n_1)^\alpha$
# grows with $\alpha$; scores are negative, so the longer answer gains.)
# %% [markdown] lang="zh"
# Beam search 寻找概率最大的文本，但它不一定是好文本：这里是常见词的循环。
# 对答案基本由输入决定的任务（翻译、语音识别）有帮助；对开放式文本，采样更合适。
#
# 在一组固定的已完成答案上最容易看清 length penalty：采样 40 行诗，
# 记下各自的对数概率之和。$\alpha$ 增大时，胜出的答案不会变短。（设两个答案的和
# $S_1 > S_2$，长度 $n_1 < n_2$，分数之比 $\frac{S_1}{S_2} (n_2 / n_1)^\alpha$
# 随 $\alpha$ 增大；分数是负的，所以较长的答案占优。）
# %%
def sample_verse(rng, longest=60):
  """(a verse up to END, its sum of log-probabilities)."""
  logits, caches = forward(prompt, empty_cache())
  verse, total = [], 0.0
  while len(verse) < longest and (not verse or verse[-1] != END):
    token = int(draw(logits[-1], rng))
    total += log_softmax(logits[-1])[token]
    verse.append(token)
    logits, caches = forward([token], caches)
  return verse, total


rng = np.random.default_rng(0)
verses = [sample_verse(rng) for _ in range(40)]
sums = np.array([total for _, total in verses])
lengths = np.array([len(verse) for verse, _ in verses])
chosen = []
for alpha in (0.0, 0.5, 1.0, 1.5, 2.0):
  winner = (sums / lengths**alpha).argmax()
  chosen.append(lengths[winner])
  print(alpha, lengths[winner], repr(decode(verses[winner][0])))
assert (np.diff(chosen) >= 0).all(), 'a greater alpha favours longer answers'
assert chosen[-1] > chosen[0]
# %% [markdown] lang="en"
# ## Exercises
#
# 1. (Easy) Find by bisection the temperature at which the mean entropy of
#    `sample_logits` is 1 nat.
# 2. (Medium) Write `no_repeat(z, text, n)`: forbid every token that would
#    complete an n-gram that already occurred. Show that greedy text with
#    $n = 6$ has no repeated 6-gram.
# 3. (Hard) Samples from one prompt can share its cache: take the first 200
#    characters of the text as the prompt, generate four samples of 30
#    characters with one prefill, and count the multiply-adds saved. Then show
#    that each sample is the same as with a prefill of its own.
# %% [markdown] lang="zh"
# ## 练习
#
# 1. （易）用二分法求使 `sample_logits` 平均熵为 1 nat 的 temperature。
# 2. （中）写出 `no_repeat(z, text, n)`：禁止所有会构成已出现过的 n-gram 的
#    token。验证 $n = 6$ 时贪心文本没有重复的 6-gram。
# 3. （难）同一个 prompt 的各个样本可以共用 cache：以文本的前 200 个字符为
#    prompt，只做一次 prefill，生成四个 30 字符的样本，计算省下的乘加次数。
#    再验证每个样本与各自做 prefill 得到的相同。
# %% [markdown] lang="en"
# ## Interview questions
#
# **What does a KV cache cost for Llama 3 8B (32 layers, 8 key-value heads of
# size 128) with 8192 tokens in bfloat16, and what are the ways to shrink it?**
#
# <details><summary>Answer</summary>
#
# $2 \cdot L \cdot k \cdot h \cdot 2$ bytes a token:
# $2 \cdot 32 \cdot 8 \cdot 128 \cdot 2 = 131072$ bytes, so 1 GiB for 8192
# tokens and one sequence. Fewer key-value heads (MQA, GQA: here 8 instead of
# 32, a factor of 4), latent attention (MLA), a sliding window, quantized keys
# and values, paged memory against fragmentation, sharing of common prefixes.
# See notebook 14.
#
# </details>
#
# **Decoding a token for 8 sequences at once takes nearly as long as for one.
# Why, and does the same hold for prefill?**
#
# <details><summary>Answer</summary>
#
# A decode step multiplies each weight with one vector per sequence: the time is
# that of reading the weights from memory, which all sequences share. Prefill
# multiplies with hundreds of tokens at once and is bound by arithmetic, so it
# scales with the number of tokens. The reads of the KV cache are not shared,
# and become dominant for long contexts and large batches.
#
# </details>
# %% [markdown] lang="zh"
# ## 面试题
#
# **Llama 3 8B（32 层，8 个大小为 128 的 key-value head）、8192 个
# token、bfloat16 的 KV cache 有多大？有哪些缩小的办法？**
#
# <details><summary>答案</summary>
#
# 每个 token $2 \cdot L \cdot k \cdot h \cdot 2$ 字节：
# $2 \cdot 32 \cdot 8 \cdot 128 \cdot 2 = 131072$ 字节，一个序列 8192 个 token
# 就是 1 GiB。办法：减少 key-value head（MQA、GQA：这里 8 个而不是 32 个，缩小 4
# 倍），潜在注意力（MLA），滑动窗口，量化 key 和 value，用分页内存减少碎片，
# 共享公共前缀。见 14。
#
# </details>
#
# **batch 为 8 时解码一个 token 的时间与 batch 为 1 时几乎相同，为什么？prefill
# 也是这样吗？**
#
# <details><summary>答案</summary>
#
# 解码一步中，每个权重只与每个序列的一个向量相乘：时间取决于从内存读取权重，
# 而这是所有序列共用的。Prefill 一次乘以几百个 token，受算力限制，时间与 token
# 数成正比。KV cache 的读取不能共用，长 context、大 batch 时会占主导。
#
# </details>
# %% [markdown] lang="en"
# ## In the package
#
# - {{moepeft.inference.sampling}} has the filters as pure functions, whose
#   settings may differ by row; {{moepeft.inference.engine.sampler}} runs them
#   one row at a time, so that rows without filters need no sort.
# - {{moepeft.nn.causal_attention.CausalAttention}} writes keys and values at
#   each row's position; {{moepeft.inference.engine.kv_cache.read_rows}} copies
#   the rows of the running sequences out of a cache with slots.
# - {{moepeft.inference.engine.prefix_cache}} shares the cache of common
#   prefixes between requests; {{moepeft.inference.engine.prompt_lookup}}
#   proposes several tokens and verifies them in one step.
# - {{moepeft.inference.beam_search.search}} runs beams of several requests in
#   one batch, and copies a slot when two beams continue the same one.
#
# Papers: top-p arXiv:1904.09751, min-p 2407.01082, repetition penalty
# 1909.05858, grouped-query attention 2305.13245.
# %% [markdown] lang="zh"
# ## 在 moepeft 中
#
# - {{moepeft.inference.sampling}} 把各过滤器写成纯函数，每行可以有不同的设置；
#   {{moepeft.inference.engine.sampler}} 逐行运行，不用过滤器的行不需要排序。
# - {{moepeft.nn.causal_attention.CausalAttention}} 在每行各自的位置写入 key 和
#   value；{{moepeft.inference.engine.kv_cache.read_rows}} 从带 slot 的 cache
#   中取出正在运行的序列。
# - {{moepeft.inference.engine.prefix_cache}} 让请求之间共享公共前缀的 cache；
#   {{moepeft.inference.engine.prompt_lookup}} 一次提出多个 token，
#   并在一步中验证。
# - {{moepeft.inference.beam_search.search}} 在一个 batch 中运行多个请求的
#   beam，两个 beam 延续同一个 beam 时复制 slot。
#
# 论文：top-p arXiv:1904.09751，min-p 2407.01082，repetition penalty
# 1909.05858，grouped-query attention 2305.13245。
# %% [markdown] lang="en" tags=["solution"]
# # Solutions: generation
# %% [markdown] lang="zh" tags=["solution"]
# # 解答：文本生成
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 1
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 1
# %% tags=["solution"]
low, high = 0.05, 20.0
for _ in range(40):
  middle = (low + high) / 2
  if entropy(softmax(sample_logits / middle)).mean() < 1:
    low = middle
  else:
    high = middle
print('temperature', middle)
assert abs(entropy(softmax(sample_logits / middle)).mean() - 1) < 1e-6


# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 2
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 2
# %% tags=["solution"]
def no_repeat(z, text, n):
  y, start = z.copy(), text[len(text) - n + 1 :]
  for i in range(len(text) - n + 1):
    if text[i : i + n - 1] == start:
      y[text[i + n - 1]] = -np.inf
  return y


result = generate(
  encode('When '), 160, lambda z, text: no_repeat(z, text, 6).argmax()
)
print(decode(result))
assert repeated(result) == 0
assert repeated(results['greedy']) > 0
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 3
#
# The arrays of the cache are never changed in place, so samples may start from
# the same ones.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 3
#
# cache 的数组从不原地修改，因此各个样本可以从同一份开始。
# %% tags=["solution"]
prompt = ids[:200].tolist()


def continue_from(logits, caches, seed):
  rng, answer = np.random.default_rng(seed), []
  for _ in range(30):
    answer.append(int(draw(logits[-1], rng)))
    logits, caches = forward(answer[-1:], caches)
  return answer


Counter.multiply_adds = 0
prefilled = forward(prompt, empty_cache())
shared = [continue_from(*prefilled, seed) for seed in range(4)]
with_sharing, Counter.multiply_adds = Counter.multiply_adds, 0
separate = [
  continue_from(*forward(prompt, empty_cache()), seed) for seed in range(4)
]
saved = 1 - with_sharing / Counter.multiply_adds
print('saved', f'{saved:.0%}', 'of', Counter.multiply_adds)
assert shared == separate
assert saved > 0.5

# SPDX-License-Identifier: Apache-2.0

# %% [markdown] lang="en"
# # Positions
#
# Attention sees a set of tokens, not a sequence. This notebook derives the five
# ways by which language models tell positions apart: sinusoids, learned
# vectors, T5's relative buckets, rotary embedding (RoPE) and ALiBi. Each is
# written by hand and compared with the package's. At the end six small models
# are trained on texts of 32 characters and measured on texts of 128.
#
# ## What you will understand
#
# - which symmetry of attention makes positions necessary, and what a causal
#   mask alone already gives away
# - why sines of many frequencies turn a shift into a rotation
# - how T5 puts all distances into 32 buckets
# - why RoPE makes logits depend on the distance alone, and what its base does
# - which methods still work beyond the trained length, by measurement
#
# Time: about 75 minutes. Before it: notebook 06.
# %% [markdown] lang="zh"
# # 位置编码
#
# 注意力看到的是 token 的集合，不是序列。本笔记推导语言模型区分位置的五种办法：
# 正弦编码、可学习的位置向量、T5 的相对位置分桶、旋转位置编码（RoPE）和 ALiBi。
# 每种都手写一遍，并与代码库比较。最后，用 32 个字符长的文本训练六个小模型，再在
# 128 个字符长的文本上测量。
#
# ## 你将理解什么
#
# - 注意力的哪种对称性使位置编码成为必需，仅有因果掩码又能透露多少位置信息
# - 为什么许多频率的正弦能把平移变成旋转
# - T5 怎样把所有距离放进 32 个桶
# - 为什么 RoPE 让 logits 只依赖距离，它的 base 起什么作用
# - 超出训练长度后哪些方法仍然有效：用测量回答
#
# 时间：约 75 分钟。先修：笔记 06。
# %%
import functools
import math

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from moepeft.core import files
from moepeft.nn import positions as package
from moepeft.nn import rope as package_rope
from moepeft.nn.attention import Heads, attend

plt.rcParams['figure.dpi'] = 72
rng = np.random.default_rng(0)


# %% [markdown] lang="en"
# ## 1. Attention has no order
#
# Let $\Pi$ be a permutation of the rows of $x\in\mathbb{R}^{t\times d}$. Every
# projection acts on each row alone, so $q,k,v$ become $\Pi q,\Pi k,\Pi v$. The
# softmax acts on each row, so it commutes with $\Pi$, and $\Pi^\top\Pi=I$.
# Without the factor $1/\sqrt h$, for brevity:
#
# $$\mathrm{softmax}(\Pi q k^\top\Pi^\top)\,\Pi v
# = \Pi\,\mathrm{softmax}(qk^\top)\,\Pi^\top\Pi v
# = \Pi\,\mathrm{softmax}(qk^\top)v .$$
#
# The outputs are permuted and otherwise equal: attention is *permutation
# equivariant*. In "dog bites man" and "man bites dog", each word gets the same
# vector in both sentences. A causal mask breaks the symmetry: the first token
# sees one token, the second two.
# %% [markdown] lang="zh"
# ## 1. 注意力没有顺序
#
# 设 $\Pi$ 是 $x\in\mathbb{R}^{t\times d}$ 各行的一个置换。
# 每个投影只作用于单行，所以 $q,k,v$ 变成 $\Pi q,\Pi k,\Pi v$。softmax
# 逐行计算，因此与 $\Pi$ 可交换，而且 $\Pi^\top\Pi=I$。为简洁略去因子
# $1/\sqrt h$：
#
# $$\mathrm{softmax}(\Pi q k^\top\Pi^\top)\,\Pi v
# = \Pi\,\mathrm{softmax}(qk^\top)\,\Pi^\top\Pi v
# = \Pi\,\mathrm{softmax}(qk^\top)v .$$
#
# 输出只是跟着置换，其余完全相等：注意力具有*置换等变性*。
# 同一个词在“狗咬人”和“人咬狗”两句中得到的向量相同。因果掩码打破了这种对称：
# 第一个 token 看到一个 token，第二个看到两个。
# %%
def softmax(z):
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def self_attention(x, weights, bias=0.0):
  """x [t, d], weights [3, d, d], bias [t, s] of the logits."""
  q, k, v = x @ weights
  return softmax(q @ k.T / np.sqrt(q.shape[-1]) + bias) @ v


t, d = 6, 8
x = rng.standard_normal((t, d))
weights = rng.standard_normal((3, d, d)) / np.sqrt(d)
order = np.array([3, 0, 5, 1, 4, 2])
plain = self_attention(x, weights)
assert np.allclose(self_attention(x[order], weights), plain[order])
causal = np.where(np.tril(np.ones((t, t), bool)), 0, -np.inf)
masked = self_attention(x, weights, causal)
assert not np.allclose(self_attention(x[order], weights, causal), masked[order])


# %% [markdown] lang="en"
# ## 2. Sinusoids: a shift is a rotation
#
# The first transformer (arXiv:1706.03762) adds a fixed vector to the embedding
# of the token at position $p$, with $d/2$ frequencies from 1 down to about
# $1/10000$:
#
# $$e_p = [\sin(\omega_0p),\dots,\sin(\omega_{d/2-1}p),\
# \cos(\omega_0p),\dots,\cos(\omega_{d/2-1}p)],\qquad\omega_i=10000^{-2i/d}.$$
#
# (The paper interleaves sines and cosines; the order of features makes no
# difference.) Each frequency gives an angle $\omega_ip$ that grows with the
# position: the fastest tells neighbours apart and repeats after $2\pi$
# positions, the slowest after up to $2\pi\cdot10000\approx 63{,}000$. The sum
# formulas of sine and cosine say that a shift by $m$ rotates each pair:
#
# $$\begin{pmatrix}\sin\omega(p+m)\\\cos\omega(p+m)\end{pmatrix}=
# \begin{pmatrix}\cos\omega m&\sin\omega m\\
# -\sin\omega m&\cos\omega m\end{pmatrix}
# \begin{pmatrix}\sin\omega p\\\cos\omega p\end{pmatrix}.$$
#
# The matrix depends on $m$ alone, so a linear layer can express "three tokens
# back" for all positions at once. Also $e_p\cdot e_{p+m}=\sum_i\cos(\omega_im)$
# depends only on $m$.
# %% [markdown] lang="zh"
# ## 2. 正弦编码：平移就是旋转
#
# 最早的 transformer（arXiv:1706.03762）给位置 $p$ 的 token 的 embedding
# 加上一个固定向量，其中有 $d/2$ 个频率，从 1 降到约 $1/10000$：
#
# $$e_p = [\sin(\omega_0p),\dots,\sin(\omega_{d/2-1}p),\
# \cos(\omega_0p),\dots,\cos(\omega_{d/2-1}p)],\qquad\omega_i=10000^{-2i/d}.$$
#
# （论文把正弦和余弦交错排列；特征的顺序没有影响。）
# 每个频率给出一个随位置增大的角度 $\omega_ip$：最快的区分相邻位置，每 $2\pi$
# 个位置重复一次；最慢的最多要 $2\pi\cdot10000\approx 63{,}000$ 个位置才重复。
# 由正弦、余弦的和角公式，平移 $m$ 就是旋转每一对分量：
#
# $$\begin{pmatrix}\sin\omega(p+m)\\\cos\omega(p+m)\end{pmatrix}=
# \begin{pmatrix}\cos\omega m&\sin\omega m\\
# -\sin\omega m&\cos\omega m\end{pmatrix}
# \begin{pmatrix}\sin\omega p\\\cos\omega p\end{pmatrix}.$$
#
# 矩阵只依赖 $m$，所以一个线性层就能对所有位置同时表达“往前三个 token”。此外
# $e_p\cdot e_{p+m}=\sum_i\cos(\omega_im)$ 也只依赖 $m$。
# %%
def sinusoidal(positions, d):
  """positions [t] -> [t, d]."""
  frequencies = 10000.0 ** (-2 * np.arange(d // 2) / d)
  angles = positions[:, None] * frequencies
  return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)


d = 64
positions = np.arange(200)
e = sinusoidal(positions, d)
same = package.sinusoidal(jnp.asarray(positions)[None], d)[0]
# Angles up to 200 have a float32 error of about 200 x 6e-8.
assert np.abs(e - same).max() < 1e-4, 'sines first, then cosines'

m = 7
angle = m * 10000.0 ** (-2 * np.arange(d // 2) / d)
sines, cosines = np.split(e, 2, axis=-1)
shifted = np.concatenate(
  [
    sines * np.cos(angle) + cosines * np.sin(angle),
    cosines * np.cos(angle) - sines * np.sin(angle),
  ],
  axis=-1,
)
assert np.allclose(shifted, sinusoidal(positions + m, d)), 'rotate each pair'
products = e @ e.T
assert np.allclose(np.diagonal(products, m), products[0, m])
# %% [markdown] lang="en"
# ## 3. Learned vectors
#
# GPT-2 and BERT add a row of a trained table instead. It can represent
# anything, but only for positions that occur in training: the gradient of the
# others is exactly zero, so at test time position 32 of a model trained on 32
# tokens has its random initial vector, or does not exist.
# %% [markdown] lang="zh"
# ## 3. 可学习的位置向量
#
# GPT-2 和 BERT 改为加上一张训练出来的表中的一行。它什么都能表示，
# 但只限训练中出现过的位置：其余位置的梯度恰好为零，所以用 32 个 token
# 训练的模型，测试时位置 32 用的仍是随机初始向量，或者根本没有这一行。
# %%
table = jnp.asarray(rng.standard_normal((128, d)) * 0.1)
embedded = jnp.asarray(rng.standard_normal((32, d)))  # 32 tokens of training


def some_loss(table):
  x = embedded + table[:32]
  return jnp.sum(jnp.tanh(x @ x.T))


gradient = jax.grad(some_loss)(table)
untrained = np.flatnonzero(np.abs(gradient).max(-1) == 0)
print('rows without gradient:', untrained[0], 'to', untrained[-1])
assert np.array_equal(untrained, np.arange(32, 128))


# %% [markdown] lang="en"
# ## 4. T5: a bias for each bucket of distances
#
# T5 (arXiv:1910.10683) adds nothing to the embeddings. It adds a trained number
# to each logit that depends on the head and on the position of the key relative
# to the query. Let $\delta=|s-t|$ be their distance. Small distances have a
# bucket each; larger ones share buckets that grow logarithmically up to the
# distance $D=128$; all that are larger still share the last. For $B$ buckets of
# one direction, of which $E=B/2$ hold one distance each:
#
# $$\mathrm{bucket}(\delta)=\begin{cases}\delta&\delta<E\\
# \min\Big(B-1,\
# E+\Big\lfloor\dfrac{\ln(\delta/E)}{\ln(D/E)}(B-E)\Big\rfloor\Big)
# &\text{else}\end{cases}$$
#
# A decoder sees only keys at or before the query and has $B=32$. An encoder
# splits its 32 buckets into two halves of $B=16$, for keys before and after the
# query.
# %% [markdown] lang="zh"
# ## 4. T5：每个距离桶一个偏置
#
# T5（arXiv:1910.10683）不往 embedding 上加任何东西，而是给每个 logit
# 加一个训练得到的数，它取决于头以及 key 相对于 query 的位置。设二者的距离为
# $\delta=|s-t|$。近距离各占一个桶；较远的距离共用按对数增长的桶，直到距离
# $D=128$；更远的都落在最后一个桶。设一个方向有 $B$ 个桶，其中 $E=B/2$
# 个各只含一个距离：
#
# $$\mathrm{bucket}(\delta)=\begin{cases}\delta&\delta<E\\
# \min\Big(B-1,\
# E+\Big\lfloor\dfrac{\ln(\delta/E)}{\ln(D/E)}(B-E)\Big\rfloor\Big)
# &\text{else}\end{cases}$$
#
# decoder 只看到 query 处及之前的 key，$B=32$。encoder 把 32 个桶分成两半，
# 分别给 query 之前和之后的 key，各有 $B=16$。
# %%
def bucket(relative, buckets=32, max_distance=128, bidirectional=True):
  """relative = key position - query position, an integer."""
  start = 0
  if bidirectional:
    buckets //= 2
    start = buckets if relative > 0 else 0
    distance = abs(relative)
  else:
    distance = max(-relative, 0)  # keys after the query are masked anyway
  exact = buckets // 2
  if distance < exact:
    return start + distance
  growth = math.log(distance / exact) / math.log(max_distance / exact)
  return start + min(exact + int(growth * (buckets - exact)), buckets - 1)


relative = np.arange(-300, 301)
for bidirectional in (True, False):
  hand = np.array(
    [bucket(int(i), bidirectional=bidirectional) for i in relative]
  )
  expected = package.relative_bucket(
    jnp.asarray(relative), 32, 128, bidirectional
  )
  # In float32 the logarithm of an exact power may fall below an integer.
  differ = relative[hand != np.asarray(expected)]
  print(f'bidirectional={bidirectional}: buckets differ at {differ}')
  assert len(differ) <= 4, 'distance = -relative; half of the buckets are exact'
  if bidirectional:
    encoder_buckets = hand


# %% [markdown] lang="en"
# ## 5. RoPE: rotate queries and keys
#
# RoPE (arXiv:2104.09864) uses the rotation itself. Take the two numbers
# $(x_i,x_{i+h/2})$ of a query or key at position $p$ as a complex number and
# multiply it by $e^{\mathrm{i}\,\omega_ip}$, where
# $\omega_i=\mathrm{base}^{-2i/h}$ for $i<h/2$ and the base is 10000. For one
# pair, a query at $t$ and a key at $s$ have the real inner product
#
# $$\mathrm{Re}\big[(q\,e^{\mathrm{i}\omega t})\,
# \overline{(k\,e^{\mathrm{i}\omega s})}\big]
# =\mathrm{Re}\big[q\,\bar k\,e^{\mathrm{i}\omega(t-s)}\big] .$$
#
# The absolute positions cancel. Nothing is added to the embeddings, the norms
# of $q$ and $k$ stay the same, values are not rotated, and it works with a KV
# cache, because a key is rotated once by its own position. The package pairs
# $x_i$ with $x_{i+h/2}$, as Hugging Face's checkpoints do; the paper pairs
# neighbours $(x_{2i},x_{2i+1})$. These differ by a permutation of features,
# which a converter must apply to $W_q$ and $W_k$ (exercise 1).
# %% [markdown] lang="zh"
# ## 5. RoPE：旋转 query 和 key
#
# RoPE（arXiv:2104.09864）直接使用旋转。把位置 $p$ 的 query 或 key 的两个数
# $(x_i,x_{i+h/2})$ 看成一个复数，乘以 $e^{\mathrm{i}\,\omega_ip}$，其中
# $\omega_i=\mathrm{base}^{-2i/h}$，$i<h/2$，base 取 10000。对其中一对，位置 $t$
# 的 query 与位置 $s$ 的 key 的实内积为
#
# $$\mathrm{Re}\big[(q\,e^{\mathrm{i}\omega t})\,
# \overline{(k\,e^{\mathrm{i}\omega s})}\big]
# =\mathrm{Re}\big[q\,\bar k\,e^{\mathrm{i}\omega(t-s)}\big] .$$
#
# 绝对位置消掉了。不需要往 embedding 上加任何向量，$q$ 和 $k$ 的模不变，value
# 不旋转，也能与 KV cache 配合，因为每个 key 只按自己的位置旋转一次。代码库把
# $x_i$ 与 $x_{i+h/2}$ 配对，与 Hugging Face 的 checkpoint 一致；论文把相邻的
# $(x_{2i},x_{2i+1})$ 配对。二者只差特征的一个置换，转换权重时必须对 $W_q$ 和
# $W_k$ 做这个置换（练习 1）。
# %%
def rotate(x, positions, base=10000.0):
  """x [t, h], positions [t] -> [t, h], by complex numbers."""
  half = x.shape[-1] // 2
  frequencies = base ** (-np.arange(half) / half)
  z = x[:, :half] + 1j * x[:, half:]
  z = z * np.exp(1j * positions[:, None] * frequencies)
  return np.concatenate([z.real, z.imag], axis=-1)


h = 16
q, k = rng.standard_normal((2, 1, h))
rotation = rotate(np.repeat(q, 200, 0), positions)
same = package_rope.rotate(
  jnp.asarray(np.repeat(q, 200, 0), jnp.float32)[None, :, None],
  jnp.asarray(positions)[None],
  package_rope.Rope(),
)
assert np.abs(rotation - same[0, :, 0]).max() < 1e-4, 'pairs are i and i + h/2'
assert np.allclose(np.linalg.norm(rotation, axis=-1), np.linalg.norm(q))
for t, s in ((5, 2), (105, 102), (1005, 1002)):
  logit = rotate(q, np.array([t]))[0] @ rotate(k, np.array([s]))[0]
  print(f'query at {t:4}, key at {s:4}: {logit:.6f}')
  reference = rotate(q, np.array([3]))[0] @ k[0]
  assert abs(logit - reference) < 1e-9, 'only the distance may matter'
# %% [markdown] lang="en"
# A pair of frequency $\omega$ has turned a full circle after $2\pi/\omega$
# tokens. With base 10000 and $h=128$ the slowest pair needs more than 50,000:
# over 4096 trained tokens it has turned by a fraction of a circle only. At a
# larger distance it takes angles that the model has never seen, and this is
# where RoPE fails to extrapolate. There are three remedies. A larger base
# (500,000 in Llama 3) makes all pairs but the first slower; *position
# interpolation* (arXiv:2306.15595) divides positions by a factor, which divides
# all frequencies by it; YaRN (arXiv:2309.00071) divides only the slow
# frequencies.
# %% [markdown] lang="zh"
# 频率为 $\omega$ 的一对，经过 $2\pi/\omega$ 个 token 转满一圈。base 为 10000、
# $h=128$ 时，最慢的一对要五万多个 token 才转一圈：训练的 4096 个 token
# 里它只转了一小部分圆周。距离更大时，它会转到模型从未见过的角度，这正是 RoPE
# 外推失败的原因。补救办法有三种：更大的 base（Llama 3 用 500,000）
# 让除第一对以外的各对都转得更慢；*位置插值*（position interpolation，
# arXiv:2306.15595）把位置除以一个因子，等于把所有频率都除以它；
# YaRN（arXiv:2309.00071）只把慢频率除以因子。
# %%
for base in (10000.0, 500000.0):
  frequencies, _ = package_rope.frequencies(package_rope.Rope(base), 128)
  assert np.allclose(frequencies, base ** (-np.arange(64) / 64), rtol=1e-6)
  turns = 4096 * frequencies / (2 * math.pi)
  print(
    f'base {base:8.0f}: slowest pair {2 * math.pi / frequencies[-1]:10.0f} '
    f'tokens a turn; {np.sum(turns < 1)} of 64 pairs turn less than once '
    'in 4096 tokens'
  )
# %% [markdown] lang="en"
# ## 6. ALiBi: a penalty for distance
#
# ALiBi (arXiv:2108.12409) adds $-m_n\,(t-s)$ to the logits of head $n$, with
# fixed slopes $m_n=2^{-8n/N}$, $n=1..N$, for $N$ heads. Nothing is trained. A
# head with a large slope sees a few tokens, one with a small slope sees far.
# Because a softmax does not change when a constant is added to all logits of a
# row, $-m(t-s)$ and $+ms$ are the same bias: a causal ALiBi head has an
# *absolute* form. The figure shows, from left to right, the inner product of
# two sinusoidal vectors, the bucket of each relative position in T5's encoder,
# and the weights of the last query under ALiBi if all $q\cdot k$ are equal.
# %% [markdown] lang="zh"
# ## 6. ALiBi：对距离的惩罚
#
# ALiBi（arXiv:2108.12409）给头 $n$ 的 logits 加上 $-m_n\,(t-s)$，斜率固定为
# $m_n=2^{-8n/N}$，$n=1..N$，$N$ 是头数。没有任何可训练参数。
# 斜率大的头只看附近几个 token，斜率小的看得远。因为给一行 logits
# 加上同一个常数不改变 softmax，所以 $-m(t-s)$ 与 $+ms$ 是同样的偏置：因果的
# ALiBi 头有一个*绝对*位置的写法。图中从左到右依次是：两个正弦位置向量的内积、T5
# 的 encoder 中每个相对位置所属的桶，以及所有 $q\cdot k$ 相等时，ALiBi
# 下最后一个 query 的权重。
# %%
heads, t = 8, 50
slopes = 2.0 ** (-8 * np.arange(1, heads + 1) / heads)
distance = np.arange(t)[:, None] - np.arange(t)[None, :]
bias = -slopes[:, None, None] * distance
place = jnp.arange(t)
assert np.allclose(bias, package.alibi(heads, place[None], place)[0])
row = np.where(distance >= 0, bias, -np.inf)
absolute = slopes[:, None, None] * np.arange(t)
absolute = np.where(distance >= 0, absolute, -np.inf)
assert np.allclose(softmax(row), softmax(absolute))

fig, axes = plt.subplots(1, 3, figsize=(7, 2.4))
axes[0].plot(np.arange(-99, 100), products[100, 1:][:199])
axes[0].set(title=r'sinusoids: $e_p\cdot e_{p+m}$', xlabel='m')
axes[1].plot(relative, encoder_buckets)
axes[1].set(title="T5's bucket", xlabel='s - t')
axes[2].plot(np.arange(t), softmax(row)[[0, 3, 5, 7], -1].T)
axes[2].set(title='ALiBi: weights at t = 49', xlabel='s')
axes[2].legend([f'm = {slopes[i]:.3f}' for i in (0, 3, 5, 7)], fontsize=7)
fig.tight_layout()
# %% [markdown] lang="en"
# ## 7. Beyond the trained length: a measurement
#
# The text is 100 kB of small English stories that ships with the package. A
# decoder of two layers predicts the next character. It is trained on windows of
# 32 characters and measured on windows of 128 from the last tenth of the text,
# at each position: what happens after position 32? "none" has no positions but
# the causal mask (NoPE). Everything else is equal: the initial weights, the
# batches, the optimizer. Norms, residual connections and the feed-forward
# network of the decoder are the subject of notebook 08; here only the lines
# that read `kind` matter. The curves are means over 8 positions, so a jump
# begins up to four positions before its place.
# %% [markdown] lang="zh"
# ## 7. 超出训练长度：测量
#
# 文本是代码库自带的 100 kB 英文小故事。一个两层的 decoder 预测下一个字符。
# 训练窗口是 32 个字符，测量时取文本最后十分之一中 128 个字符的窗口，
# 逐位置计算损失：位置 32 之后会怎样？“none”没有位置编码，只有因果掩码（NoPE）。
# 其余全部相同：初始权重、batch、优化器。decoder 中的 norm、
# 残差连接和前馈网络在笔记 08 中讲；这里只需看用到 `kind` 的几行。图中曲线是 8
# 个位置的滑动平均，所以跳变最多会提前四个位置出现。
# %%
path = files.local_path('package:text') + '/text.txt'
with open(path, encoding='utf-8') as file:
  stories = [a for a in file.read().split('\n\n') if a.isascii()]
text = '\n\n'.join(stories)
letters = sorted(set(text))
ids = np.array([letters.index(letter) for letter in text], np.int32)
train_ids, test_ids = np.split(ids, [len(ids) * 9 // 10])
D, N, LAYERS, LENGTH, STEPS, BATCH = 32, 4, 2, 32, 400, 16
ROPE = package_rope.Rope()


def windows(ids, count, length, seed):
  start = np.random.default_rng(seed).integers(0, len(ids) - length - 1, count)
  return ids[start[:, None] + np.arange(length + 1)]


batches = windows(train_ids, STEPS * BATCH, LENGTH, 1)
batches = batches.reshape(STEPS, BATCH, LENGTH + 1)
test_windows = windows(test_ids, 128, 128, 2)
print(f'{len(text):,} characters, {len(letters)} different')


# %%
def initial_params(kind, seed=0):
  rng = np.random.default_rng(seed)

  def matrix(i, o, scale=1.0):
    a = rng.standard_normal((i, o)) * scale / np.sqrt(i)
    return jnp.asarray(a, jnp.float32)

  params = {
    'embed': jnp.asarray(
      rng.standard_normal((len(letters), D)) * 0.1, jnp.float32
    ),
    'layers': [
      {
        'qkv': matrix(D, 3 * D),
        'o': matrix(D, D, 0.5),
        'up': matrix(D, 4 * D),
        'down': matrix(4 * D, D, 0.5),
      }
      for _ in range(LAYERS)
    ],
  }
  if kind == 'learned':
    params['positions'] = jnp.asarray(
      rng.standard_normal((128, D)) * 0.1, jnp.float32
    )
  if kind == 't5':
    params['bias'] = jnp.zeros((16, N))  # 16 buckets up to a distance of 32
  return params


def norm(x):
  return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def position_bias(params, kind, t):
  """[1, n, t, s] or None."""
  place = jnp.arange(t)
  if kind == 'alibi':
    return package.alibi(N, place[None], place)
  if kind == 't5':
    relative = place[None, :] - place[:, None]
    rows = package.relative_bucket(relative, 16, 32, False)
    return params['bias'][rows].transpose(2, 0, 1)[None]
  return None


# %%
def logits(params, ids, kind, rope=ROPE, window=1000):
  b, t = ids.shape
  place = jnp.broadcast_to(jnp.arange(t), (b, t))
  x = params['embed'][ids]
  if kind == 'learned':
    x += params['positions'][:t]
  if kind == 'sinusoidal':
    x += 0.1 * package.sinusoidal(place, D)  # as large as the embedding
  bias = position_bias(params, kind, t)
  distance = jnp.arange(t)[:, None] - jnp.arange(t)[None, :]
  mask = ((distance >= 0) & (distance < window))[None, None]
  for layer in params['layers']:
    q, k, v = jnp.split(norm(x) @ layer['qkv'], 3, -1)
    q, k, v = (a.reshape(b, t, N, D // N) for a in (q, k, v))
    if kind == 'rope':
      q, k = (package_rope.rotate(a, place, rope) for a in (q, k))
    y = attend(Heads(q, k, v, bias, mask), (D // N) ** -0.5)
    x += y.reshape(b, t, D) @ layer['o']
    x += jax.nn.gelu(norm(x) @ layer['up']) @ layer['down']
  return 2 * norm(x) @ params['embed'].T


def losses(params, ids, kind, rope=ROPE, window=1000):
  """[b, t], nats a character."""
  z = logits(params, ids[:, :-1], kind, rope, window)
  return optax.softmax_cross_entropy_with_integer_labels(z, ids[:, 1:])


# %%
optimizer = optax.adamw(
  optax.warmup_cosine_decay_schedule(0.0, 5e-3, 20, STEPS), weight_decay=0.01
)


@functools.partial(jax.jit, static_argnames='kind')
def train(params, batches, kind):
  def step(carry, ids):
    params, state = carry
    gradient = jax.grad(lambda p: losses(p, ids, kind).mean())(params)
    updates, state = optimizer.update(gradient, state, params)
    return (optax.apply_updates(params, updates), state), None

  carry = params, optimizer.init(params)
  (params, _), _ = jax.lax.scan(step, carry, batches)
  return params


evaluate = jax.jit(losses, static_argnames=('kind', 'rope', 'window'))
KINDS = ('none', 'sinusoidal', 'learned', 't5', 'rope', 'alibi')
PARTS = ((16, 32), (32, 64), (64, 128))
trained, by_position = {}, {}
print('nats a character at positions', *PARTS)
for kind in KINDS:
  trained[kind] = train(initial_params(kind), batches, kind)
  by_position[kind] = np.asarray(
    evaluate(trained[kind], test_windows, kind).mean(0)
  )
  print(
    f'{kind:10}', *(f'{by_position[kind][a:b].mean():8.2f}' for a, b in PARTS)
  )
# %%
fig, axis = plt.subplots(figsize=(7, 3))
for kind, loss in by_position.items():
  smooth = np.convolve(loss, np.ones(8) / 8, mode='valid')
  axis.plot(np.arange(len(smooth)) + 4, smooth, label=kind, lw=1.5)
axis.axvline(LENGTH, color='gray', lw=1, ls=':')
axis.set(
  xlabel='position (trained: left of the line)',
  ylabel='nats a character',
  ylim=(0, 5),
)
axis.legend(fontsize=8, ncol=3)
fig.tight_layout()
# %% [markdown] lang="en"
# The checks below say what can be claimed on every machine. With ALiBi the loss
# at positions 64 to 128 stays near that at 16 to 32. With sinusoids, learned
# vectors and RoPE it rises by more than a nat. With the causal mask alone it
# rises as well, from a higher loss within the trained length. T5's buckets lie
# between: every larger distance falls into the last bucket, so that its bias is
# a trained one, but ever more keys share it and draw attention to far tokens.
# One small model, one text and one seed decide nothing about which method is
# best *within* the trained length: look at the first column, but do not rank by
# it.
# %% [markdown] lang="zh"
# 下面的检查写出了在任何机器上都成立的结论。用 ALiBi 时，位置 64 到 128 的损失与
# 16 到 32 相近。用正弦编码、可学习的位置向量和 RoPE 时，损失上升超过一个 nat。
# 只有因果掩码时损失也上升，而且在训练长度之内就已较高。T5 的分桶居中：
# 更大的距离都落入最后一个桶，偏置是训练过的，但共用它的 key 越来越多，
# 把注意力引向远处的 token。一个小模型、一份文本、
# 一个随机种子不足以判断训练长度*之内*哪种方法最好：可以看第一列，
# 但不要据此排名。
# %%
inside = {kind: loss[16:32].mean() for kind, loss in by_position.items()}
beyond = {kind: loss[64:].mean() for kind, loss in by_position.items()}
# A model that guesses by frequency alone:
counts = np.bincount(train_ids, minlength=len(letters)) + 1
unigram = -np.log(counts / counts.sum())[test_ids].mean()
print(f'guess by frequency: {unigram:.2f} nats')
for kind in KINDS:
  assert inside[kind] < unigram - 0.5, f'{kind} has learned nothing'
rise = {kind: beyond[kind] - inside[kind] for kind in KINDS}
print({kind: round(float(value), 2) for kind, value in rise.items()})
steep = min(rise[kind] for kind in ('sinusoidal', 'learned', 'rope'))
assert rise['alibi'] < 0.3 and steep > 1
assert rise['alibi'] < rise['t5'] < steep


# %% [markdown] lang="en"
# ## Exercises
#
# 1. *Two conventions.* Write `rotate_neighbours(x, positions)`, which turns the
#    pairs $(x_{2i},x_{2i+1})$ as the RoPE paper does, and find the permutation
#    of the features after which it equals `rotate`. What must a converter do to
#    $W_q$ and $W_k$?
# 2. *Positions from the mask alone.* Let every token attend equally to all
#    tokens that the causal mask allows (all logits 0). Choose values so that
#    the output at position $t$ is $1/(t+1)$. What does the model need to know
#    of the first token?
# 3. *Repairing RoPE.* Measure the trained RoPE model beyond position 64 in two
#    more ways without training, by arguments of `evaluate`: with interpolated
#    positions (`rope=package_rope.Rope(kind='linear', factor=4.0)`) and with a
#    sliding window of 32 tokens (`window=32`). Which one works here, and what
#    does each lose?
#
# ## Interview questions
#
# **Why does RoPE encode relative positions although each key is rotated by its
# absolute position?**
#
# <details><summary>Answer</summary>
#
# The rotations $R_t$ of one pair commute and $R_t^\top R_s=R_{s-t}$, so
# $(R_tq)^\top(R_sk)=q^\top R_{s-t}k$: absolute positions cancel in the inner
# product. Since each key is rotated by its own position only, it can be cached.
# The logits are relative, but a frequency that has not made a full turn within
# the trained length takes unseen angles at larger distances, so "relative" does
# not mean "extrapolates". Values are not rotated, so the output carries
# positions only through the attention weights.
#
# </details>
#
# **You want a model that was trained with RoPE on 4k tokens to read 32k. What
# are the options?**
#
# <details><summary>Answer</summary>
#
# Position interpolation divides positions by 8, so all angles are seen ones,
# but neighbours come closer and it needs some fine-tuning; a larger base or
# YaRN keeps the fast pairs (neighbours) and stretches the slow ones, and needs
# less fine-tuning; a sliding window keeps distances within the trained range
# without training, but tokens further back are seen only through layers;
# retrieval or summaries avoid the problem. In any case measure: perplexity at
# long positions *and* a task that needs far tokens, since a window gives good
# perplexity and fails the second.
#
# </details>
#
# ## In the package
#
# - {{moepeft.nn.rope.rotate}} and {{moepeft.nn.rope.frequencies}}: RoPE with
#   linear, Llama 3 and YaRN scaling, compared with `transformers` in the tests.
# - {{moepeft.nn.positions.relative_bucket}} and
#   {{moepeft.nn.positions.RelativeBias}}: T5's, with a table per stack that all
#   layers share, as in the released models.
# - {{moepeft.nn.positions.alibi}}: also for numbers of heads that are no powers
#   of two. {{moepeft.nn.positions.sinusoidal}}: as in tensor2tensor, not
#   interleaved.
# - {{moepeft.models.decoder.config.POSITIONS}}: what a decoder's config can
#   choose.
# - {{moepeft.nn.attention_mask.AttentionMask}} carries positions and ALiBi's
#   slopes in $O(t)$ numbers, for packed rows too: each text of a row starts at
#   position 0.
#
# Papers: sinusoids 1706.03762, T5 1910.10683, RoPE 2104.09864, ALiBi
# 2108.12409, position interpolation 2306.15595, YaRN 2309.00071, NoPE
# 2305.19466.
# %% [markdown] lang="zh"
# ## 练习
#
# 1. *两种约定。* 写 `rotate_neighbours(x, positions)`，像 RoPE
#    论文那样旋转相邻的 $(x_{2i},x_{2i+1})$，并找出特征的一个置换，使它与
#    `rotate` 相等。转换权重时要对 $W_q$ 和 $W_k$ 做什么？
# 2. *只靠掩码得到位置。* 让每个 token 均匀关注因果掩码允许的所有 token（logits
#    全为 0）。选择 value，使位置 $t$ 的输出为 $1/(t+1)$。模型需要知道第一个
#    token 的什么信息？
# 3. *修补 RoPE。* 不再训练，通过 `evaluate` 的参数，用另外两种办法测量 RoPE
#    模型在位置 64 之后的损失：
#    位置插值（`rope=package_rope.Rope(kind='linear', factor=4.0)`），以及 32 个
#    token 的滑动窗口（`window=32`）。哪一种在这里有效？各自损失了什么？
#
# ## 面试题
#
# **每个 key 是按绝对位置旋转的，为什么说 RoPE 编码的是相对位置？**
#
# <details><summary>答案</summary>
#
# 同一对分量的旋转可交换，且 $R_t^\top R_s=R_{s-t}$，所以
# $(R_tq)^\top(R_sk)=q^\top R_{s-t}k$：绝对位置在内积中消掉。又因为每个 key
# 只按自己的位置旋转，所以可以缓存。logits 是相对的，
# 但在训练长度内没转满一圈的频率，遇到更大的距离就会出现没见过的角度，所以“相对”
# 不等于“能外推”。value 不旋转，因此位置信息只通过注意力权重进入输出。
#
# </details>
#
# **一个用 RoPE 在 4k token 上训练的模型，要读 32k，有哪些办法？**
#
# <details><summary>答案</summary>
#
# 位置插值把位置除以 8，所有角度都是见过的，但相邻 token 靠得更近，
# 需要一些微调；增大 base 或 YaRN 保留快频率（相邻关系）、只拉伸慢频率，
# 需要的微调更少；滑动窗口不经训练就能把距离限制在训练范围内，但更早的 token
# 只能通过多层间接看到；检索或摘要则绕开这个问题。无论如何都要测量：既测长位置的
# perplexity，*也*测需要远处 token 的任务，因为滑动窗口的 perplexity 很好，
# 却做不了后者。
#
# </details>
#
# ## 在 moepeft 中
#
# - {{moepeft.nn.rope.rotate}} 与 {{moepeft.nn.rope.frequencies}}：RoPE，含
#   linear、Llama 3 和 YaRN 缩放，测试中与 `transformers` 比较。
# - {{moepeft.nn.positions.relative_bucket}} 与
#   {{moepeft.nn.positions.RelativeBias}}：T5 的相对偏置，每个 stack 一张表，
#   各层共享，与公开的模型一致。
# - {{moepeft.nn.positions.alibi}}：头数不是 2 的幂时也适用。
#   {{moepeft.nn.positions.sinusoidal}}：与 tensor2tensor 一致，不交错。
# - {{moepeft.models.decoder.config.POSITIONS}}：decoder 的 config
#   可选的位置编码。
# - {{moepeft.nn.attention_mask.AttentionMask}} 用 $O(t)$ 个数携带位置和 ALiBi
#   的斜率，也适用于打包（packing）的行：一行中每段文本都从位置 0 开始。
#
# 论文：正弦编码 1706.03762，T5 1910.10683，RoPE 2104.09864，ALiBi 2108.12409，
# position interpolation 2306.15595，YaRN 2309.00071，NoPE 2305.19466。
# %% [markdown] lang="en" tags=["solution"]
# # Positions: solutions
#
# ## Exercise 1
#
# Feature $2i$ of the paper's order is feature $i$ of the package's, and $2i+1$
# is $i+h/2$. A converter permutes the output columns of $W_q$ and $W_k$ of each
# head in the same way; the logits stay equal, because both sides of the inner
# product are permuted alike. $W_v$ is not touched.
# %% [markdown] lang="zh" tags=["solution"]
# # 位置编码：答案
#
# ## 练习 1
#
# 论文顺序中的特征 $2i$ 对应代码库的特征 $i$，$2i+1$ 对应 $i+h/2$。转换权重时，
# 对每个头的 $W_q$、$W_k$ 的输出列做同样的置换；logits 不变，
# 因为内积两边做了相同的置换。$W_v$ 不用动。
# %% tags=["solution"]
def rotate_neighbours(x, positions, base=10000.0):
  half = x.shape[-1] // 2
  angles = positions[:, None] * base ** (-np.arange(half) / half)
  even, odd = x[:, ::2], x[:, 1::2]
  result = np.empty_like(x)
  result[:, ::2] = even * np.cos(angles) - odd * np.sin(angles)
  result[:, 1::2] = odd * np.cos(angles) + even * np.sin(angles)
  return result


x = rng.standard_normal((9, 16))
order = np.concatenate([np.arange(0, 16, 2), np.arange(1, 16, 2)])
hand = rotate_neighbours(x, np.arange(9))[:, order]
assert np.allclose(hand, rotate(x[:, order], np.arange(9)))
assert not np.allclose(
  rotate_neighbours(x, np.arange(9)), rotate(x, np.arange(9))
)
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 2
#
# If only the first token has the value 1 and all others 0, the mean over $t+1$
# tokens is $1/(t+1)$. The model must recognize the first token, for which a BOS
# token is enough; a later layer can then compute from the position.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 2
#
# 只有第一个 token 的 value 为 1，其余为 0，则 $t+1$ 个 token 的平均就是
# $1/(t+1)$。模型必须认得第一个 token，有一个 BOS token 就够了；
# 后面的层便可以用这个位置继续计算。
# %% tags=["solution"]
t = 20
value = np.zeros((1, t, 1, 4), np.float32)
value[0, 0] = 1
zero = jnp.zeros((1, t, 1, 4))
mask = jnp.tril(jnp.ones((1, 1, t, t), bool))
y = attend(Heads(zero, zero, jnp.asarray(value), mask=mask))[0, :, 0, 0]
assert np.allclose(y, 1 / np.arange(1, t + 1))
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 3
#
# The window works: no distance is larger than in training, and a text of
# characters needs little beyond 32 of them. Interpolation without fine-tuning
# does not: in the fastest pair, neighbours differ by an angle of 1, and the
# model now sees 1/4, so it loses already within the trained length.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 3
#
# 滑动窗口有效：没有任何距离超过训练时的距离，而字符级文本很少需要 32
# 个字符以外的信息。不微调的位置插值无效：在最快的一对中，模型学到的相邻 token
# 的夹角是 1，现在看到的是 1/4，因此在训练长度之内就已经变差。
# %% tags=["solution"]
linear = package_rope.Rope(kind='linear', factor=4.0)
interpolated, windowed = (
  np.asarray(evaluate(trained['rope'], test_windows, 'rope', **options).mean(0))
  for options in ({'rope': linear}, {'window': 32})
)
for name, loss in (
  ('as trained', by_position['rope']),
  ('interpolated', interpolated),
  ('window', windowed),
):
  print(f'{name:13}', *(f'{loss[a:b].mean():6.2f}' for a, b in PARTS))
assert windowed[64:].mean() < inside['rope'] + 0.25, 'distances are known'
assert interpolated[16:32].mean() > inside['rope'] + 0.5

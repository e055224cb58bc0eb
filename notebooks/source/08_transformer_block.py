# SPDX-License-Identifier: Apache-2.0
# %% [markdown] lang="en"
# # The transformer block
#
# A transformer is one block, repeated. The block has two sublayers, attention
# and a feed-forward network, and around each of them a norm and a residual
# connection. You build all of it in NumPy, run it on the weights of a small
# Llama of the package, and get the package's numbers. Then you measure why
# nobody leaves out the residual connection.
# %% [markdown] lang="zh"
# # Transformer block
#
# Transformer 就是把同一种 block 重复很多层。一个 block 有两个子层：attention 和
# feed-forward network，每个子层外面各有一个 norm 和一条残差连接。本篇用 NumPy
# 把这些全部写出来，装入 moepeft 中一个小 Llama 的权重，得到与 moepeft
# 相同的数值；然后用测量说明为什么没有人去掉残差连接。
# %% [markdown] lang="en"
# ## What you will understand
#
# - what LayerNorm and RMSNorm compute, what they leave unchanged, and what
#   their gradient looks like;
# - the residual stream: why the output of a model is a *sum* of what its
#   sublayers wrote;
# - pre-norm and post-norm, and where each puts the norm;
# - the gated feed-forward (SwiGLU), and why its width is about $8d/3$;
# - what happens to gradients and to tokens in 24 layers without residual
#   connections.
#
# Time: 60 minutes to read, under 30 seconds to run. Before this: notebooks 02
# (residual networks), 06 (attention) and 07 (positions).
# %% [markdown] lang="zh"
# ## 你将理解什么
#
# - LayerNorm 与 RMSNorm 计算什么、对哪些变换保持不变、梯度有什么特点；
# - residual stream（残差流）：为什么模型的输出是各子层写入量的*和*；
# - pre-norm 与 post-norm 分别把 norm 放在哪里；
# - 带门控的 feed-forward（SwiGLU），以及它的宽度为什么约为 $8d/3$；
# - 没有残差连接时，24 层之后梯度和 token 表示会变成什么样。
#
# 用时：阅读约 60 分钟，运行不到 30 秒。前置：02（残差网络）、06（attention）与
# 07（位置编码）。
# %%
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from moepeft.core.types import Context
from moepeft.models import FAMILIES
from moepeft.models.decoder.model import Decoder, DecoderBlock
from moepeft.nn import initializers, norms
from moepeft.nn.mlp import Mlp

rng = np.random.default_rng(0)
# %% [markdown] lang="en"
# ## 1. LayerNorm
#
# Every token is a vector $x \in \mathbb{R}^d$. LayerNorm (Ba et al.,
# arXiv:1607.06450) subtracts the mean of its $d$ numbers and divides by their
# standard deviation, then applies a learned scale $g$ and bias $b$, both in
# $\mathbb{R}^d$:
#
# $$\mu = \frac1d \sum_i x_i, \qquad \sigma^2 = \frac1d \sum_i (x_i - \mu)^2,
# \qquad
# y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \odot g + b.$$
#
# The statistics are of *one token*: no other token and no other row of the
# batch enters. That is the difference from batch normalization, and the reason
# why training and generation compute the same.
# %% [markdown] lang="zh"
# ## 1. LayerNorm
#
# 每个 token 是一个向量 $x \in \mathbb{R}^d$。LayerNorm（Ba 等，
# arXiv:1607.06450）减去这 $d$ 个数的均值，除以它们的标准差，再乘以可学习的缩放
# $g$、加上偏置 $b$（都属于 $\mathbb{R}^d$）：
#
# $$\mu = \frac1d \sum_i x_i, \qquad \sigma^2 = \frac1d \sum_i (x_i - \mu)^2,
# \qquad
# y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \odot g + b.$$
#
# 统计量只来自*一个 token*，与其他 token、与 batch 中其他行都无关。这是它与
# batch normalization 的区别，也是训练和生成时计算一致的原因。


# %%
def layer_norm(x, scale, bias, eps):
  """x [..., d] -> [..., d]."""
  centred = x - x.mean(-1, keepdims=True)
  variance = (centred**2).mean(-1, keepdims=True)
  return centred / np.sqrt(variance + eps) * scale + bias


d = 48
x = rng.normal(2, 3, (2, 5, d)).astype(np.float32)
scale, bias = rng.normal(1, 0.2, d), rng.normal(0, 0.2, d)
y = layer_norm(x, 1, 0, 1e-5)
print(
  'mean and standard deviation of a token before:',
  x[0, 0].mean(),
  x[0, 0].std(),
)
print('the same after the norm:', y[0, 0].mean(), y[0, 0].std())
# %% [markdown] lang="en"
# The check: the package's LayerNorm and Flax's give the same numbers. The
# arrays are float32 there, with 24 bits of mantissa, so results of size 1 agree
# to about $10^{-6}$; a tolerance of $10^{-5}$ leaves room for sums in another
# order, and is far below what a wrong formula would change.
# %% [markdown] lang="zh"
# 检验：moepeft 和 Flax 的 LayerNorm 给出同样的数值。它们使用 float32（24
# 位尾数），大小为 1 的结果一致到约 $10^{-6}$；容差取 $10^{-5}$，
# 给不同的求和顺序留余地，同时远小于写错公式带来的差异。
# %%
tolerance = 1e-5
expected = norms.layer_norm(jnp.array(x), scale, bias, 1e-5)
difference = np.abs(layer_norm(x, scale, bias, 1e-5) - expected).max()
assert difference < tolerance, f'{difference}: look at the axis and at eps'
variables = {'params': {'scale': scale, 'bias': bias}}
flax_norm = nn.LayerNorm(epsilon=1e-5).apply(variables, x)
difference = np.abs(layer_norm(x, scale, bias, 1e-5) - flax_norm).max()
assert difference < tolerance, f'{difference}: not what Flax computes'
# %% [markdown] lang="en"
# ## 2. RMSNorm
#
# RMSNorm (Zhang and Sennrich, arXiv:1910.07467) leaves out the mean and the
# bias:
#
# $$\operatorname{rms}(x) = \sqrt{\tfrac1d \textstyle\sum_i x_i^2}, \qquad y =
# \frac{x}{\sqrt{\operatorname{rms}(x)^2 + \epsilon}} \odot g.$$
#
# It has $d$ parameters, LayerNorm has $2d$. T5, Llama, Qwen, Gemma and DeepSeek
# use it. Two facts connect the two:
#
# - LayerNorm is RMSNorm of the centred vector, plus the bias.
# - LayerNorm does not change if you replace $x$ by $ax + c\mathbf{1}$ with
#   $a > 0$; RMSNorm does not change for $ax$, but it does for $+ c\mathbf{1}$.
#
# Both are exact for $\epsilon = 0$ only; $\epsilon$ keeps a token of zeros from
# a division by zero.
# %% [markdown] lang="zh"
# ## 2. RMSNorm
#
# RMSNorm（Zhang 与 Sennrich，arXiv:1910.07467）去掉了均值和偏置：
#
# $$\operatorname{rms}(x) = \sqrt{\tfrac1d \textstyle\sum_i x_i^2}, \qquad y =
# \frac{x}{\sqrt{\operatorname{rms}(x)^2 + \epsilon}} \odot g.$$
#
# 它有 $d$ 个参数，LayerNorm 有 $2d$ 个。T5、Llama、Qwen、Gemma、DeepSeek 都用
# RMSNorm。两者的联系：
#
# - LayerNorm 等于对中心化后的向量做 RMSNorm，再加偏置。
# - 把 $x$ 换成 $ax + c\mathbf{1}$（$a > 0$），LayerNorm 不变；RMSNorm 对 $ax$
#   不变，对 $+ c\mathbf{1}$ 会变。
#
# 严格来说这两点只在 $\epsilon = 0$ 时精确成立；$\epsilon$ 防止全零的 token
# 除以零。


# %%
def rms_norm(x, scale, eps):
  """x [..., d] -> [..., d]."""
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


expected = norms.rms_norm(jnp.array(x), scale, 1e-6)
difference = np.abs(rms_norm(x, scale, 1e-6) - expected).max()
assert difference < tolerance, f'{difference}: is there a mean left?'

centred = x - x.mean(-1, keepdims=True)
assert np.allclose(layer_norm(x, 1, 0, 0), rms_norm(centred, 1, 0), atol=1e-5)
assert np.allclose(
  layer_norm(7 * x + 3, 1, 0, 0), layer_norm(x, 1, 0, 0), atol=1e-5
), 'LayerNorm changed under scale and shift'
assert np.allclose(rms_norm(7 * x, 1, 0), rms_norm(x, 1, 0), atol=1e-5)
shifted = np.abs(rms_norm(x + 3, 1, 0) - rms_norm(x, 1, 0)).max()
print('a shift by 3 changes RMSNorm by up to', round(float(shifted), 2))
assert shifted > 0.1, 'RMSNorm is not invariant to a shift; is the mean gone?'
# %% [markdown] lang="en"
# ### The gradient of a norm
#
# Write $\hat x = x / r$ with $r = \operatorname{rms}(x)$ and $\epsilon = 0$,
# $g = 1$. Since $\partial r / \partial x_j = x_j / (d r)$,
#
# $$\frac{\partial \hat x_i}{\partial x_j} = \frac1r \Big( \delta_{ij} -
# \frac{\hat x_i \hat x_j}{d} \Big).$$
#
# Two consequences. The factor $1/r$: the gradient that passes a norm is divided
# by the size of its input, so a norm that reads a large vector sends back a
# small gradient. And the projection: $\hat x^\top \hat x = d$, so the part of
# the gradient along $x$ is removed; a change of length alone cannot change the
# output. JAX computes the same Jacobian, $[d, d]$:
# %% [markdown] lang="zh"
# ### norm 的梯度
#
# 记 $\hat x = x / r$，$r = \operatorname{rms}(x)$，取 $\epsilon = 0$、$g = 1$。
# 由 $\partial r / \partial x_j = x_j / (d r)$ 得
#
# $$\frac{\partial \hat x_i}{\partial x_j} = \frac1r \Big( \delta_{ij} -
# \frac{\hat x_i \hat x_j}{d} \Big).$$
#
# 有两个推论。因子 $1/r$：穿过 norm 的梯度要除以输入的大小，输入越大，
# 传回的梯度越小。投影：由于 $\hat x^\top \hat x = d$，梯度中沿 $x$
# 方向的分量被去掉；只改变长度不会改变输出。JAX 算出的 Jacobian（$[d, d]$）
# 与此相同：
# %%
token = x[0, 0]
r = np.sqrt((token**2).mean())
by_hand = (np.eye(d) - np.outer(token, token) / (r * r * d)) / r
jacobian = jax.jacobian(lambda x: norms.rms_norm(x, jnp.ones(d), 0.0))(token)
assert np.allclose(by_hand, jacobian, atol=1e-5), 'look at the outer product'
along = np.abs(jacobian @ token).max()
print('the change of the output for a change of x along x:', along)
assert along < 1e-5, 'the direction of x itself has to be projected out'
# %% [markdown] lang="en"
# ## 3. The residual stream
#
# A sublayer does not replace its input, it adds to it:
#
# $$x \leftarrow x + F(\operatorname{norm}(x)).$$
#
# Unrolled over all $2L$ sublayers of $L$ blocks, with the embedding $x_0$:
#
# $$x_{2L} = x_0 + \sum_{i=1}^{2L} F_i(\operatorname{norm}(x_{i-1})).$$
#
# The vector $x$, which runs through all layers unchanged except for additions,
# is called the *residual stream*. Sublayers read from it and write to it. The
# derivative of one step is $I + \partial F / \partial x$: through the identity,
# the gradient of the last layer reaches the first one without passing any $F$.
#
# *Pre-norm* is the form above: the norm stands inside the branch, and nothing
# but additions is on the stream. *Post-norm*, in the original Transformer
# (arXiv:1706.03762), normalizes the sum,
# $x \leftarrow \operatorname{norm}(x + F(x))$: the norm is on the stream
# itself, and each one divides the gradient that passes by the size of its
# input.
#
# ```text
# pre-norm   x ──┬──────────────► + ──┬─────────────► + ─► ... ─► norm ─► head
#                └► norm ► attn ──┘   └► norm ► ffn ──┘
# post-norm  x ──┬───────► + ► norm ──┬──────► + ► norm ─► ... ─► head
#                └► attn ──┘          └► ffn ──┘
# ```
#
# A pre-norm model needs one more norm at the end, because the stream itself is
# not normalized.
# %% [markdown] lang="zh"
# ## 3. 残差流
#
# 子层不替换输入，而是把结果加到输入上：
#
# $$x \leftarrow x + F(\operatorname{norm}(x)).$$
#
# 设 $L$ 个 block 共 $2L$ 个子层，embedding 为 $x_0$，展开后：
#
# $$x_{2L} = x_0 + \sum_{i=1}^{2L} F_i(\operatorname{norm}(x_{i-1})).$$
#
# 向量 $x$ 穿过所有层，只被做加法，叫做 *residual stream*（残差流）：
# 各子层从中读取，再写回去。一步的导数是 $I + \partial F / \partial x$：
# 通过单位矩阵，最后一层的梯度不经过任何 $F$ 就能到达第一层。
#
# *Pre-norm* 就是上面的形式：norm 在支路里，残差流上只有加法。
# *Post-norm*（最初的 Transformer，arXiv:1706.03762）对和做归一化：
# $x \leftarrow \operatorname{norm}(x + F(x))$，norm 在残差流上，每个 norm
# 都会把经过的梯度除以其输入的大小。
#
# ```text
# pre-norm   x ──┬──────────────► + ──┬─────────────► + ─► ... ─► norm ─► head
#                └► norm ► attn ──┘   └► norm ► ffn ──┘
# post-norm  x ──┬───────► + ► norm ──┬──────► + ► norm ─► ... ─► head
#                └► attn ──┘          └► ffn ──┘
# ```
#
# Pre-norm 模型末尾还需要一个 norm，因为残差流本身没有归一化。
# %% [markdown] lang="en"
# ## 4. The feed-forward sublayer
#
# Attention moves information between tokens; the feed-forward works on each
# token alone. The original is a two-layer network, $\phi(x W_i)\,W_o$ with an
# activation function $\phi$, $W_i: [d, f]$, $W_o: [f, d]$ and $f = 4d$. Llama,
# Qwen and T5 1.1 use a *gated* form (Shazeer, arXiv:2002.05202):
#
# $$\operatorname{FFN}(x) = \big(\phi(x W_0) \odot x W_1\big) W_o, \qquad W_0,
# W_1: [d, f],\; W_o: [f, d].$$
#
# With $\phi(z) = \operatorname{silu}(z) = z / (1 + e^{-z})$ it is called
# SwiGLU, with GELU GEGLU. Both factors depend on $x$, so a hidden unit can
# scale one feature by another, which a sum of activations can only approximate.
#
# Three matrices instead of two: to keep the number of parameters, the width
# $f'$ must satisfy $3 d f' = 2 d \cdot 4d$, so $f' = 8d/3$. Llama 2's 7B model
# has $d = 4096$ and $f = 11008$, which is $8d/3 = 10922.\overline{6}$ rounded
# up to a multiple of 256.
# %% [markdown] lang="zh"
# ## 4. Feed-forward 子层
#
# Attention 在 token 之间传递信息；feed-forward 对每个 token 单独计算。
# 最初是两层网络 $\phi(x W_i)\,W_o$，$\phi$ 是激活函数，$W_i: [d, f]$，
# $W_o: [f, d]$，$f = 4d$。Llama、Qwen 和 T5 1.1 使用*带门控*的形式（Shazeer，
# arXiv:2002.05202）：
#
# $$\operatorname{FFN}(x) = \big(\phi(x W_0) \odot x W_1\big) W_o, \qquad W_0,
# W_1: [d, f],\; W_o: [f, d].$$
#
# 取 $\phi(z) = \operatorname{silu}(z) = z / (1 + e^{-z})$ 时叫 SwiGLU，取 GELU
# 时叫 GEGLU。两个因子都依赖 $x$，所以一个隐藏单元能用一个特征去缩放另一个特征；
# 只对激活求和则只能近似做到。
#
# 矩阵从两个变成三个：要保持参数量不变，由 $3 d f' = 2 d \cdot 4d$ 得
# $f' = 8d/3$。Llama 2 7B 的 $d = 4096$、$f = 11008$，正是
# $8d/3 = 10922.\overline{6}$ 向上取到 256 的倍数。


# %%
def silu(z):
  return z / (1 + np.exp(-z))


def feed_forward(x, p):
  """x [b, t, d] -> [b, t, d], gated."""
  gate = silu(x @ p['wi_0']['kernel'])
  return (gate * (x @ p['wi_1']['kernel'])) @ p['wo']['kernel']


assert 256 * -(-(8 * 4096 // 3) // 256) == FAMILIES['llama'].sizes['2-7b'].ffn
f = 128


def kernel(*shape):
  return rng.normal(0, shape[0] ** -0.5, shape)


p = {name: {'kernel': kernel(d, f)} for name in ('wi_0', 'wi_1')}
p['wo'] = {'kernel': kernel(f, d)}
# The package's module has sites for adapters; an empty map has none of them.
no_adapters = Decoder(FAMILIES['llama'].sizes['tiny']).adapter_map
mlp = Mlp(d, f, True, 'silu', 'decoder/mlp', no_adapters)
p32 = jax.tree.map(jnp.float32, p)
expected = mlp.apply({'params': p32}, jnp.array(x), Context(None))
difference = np.abs(feed_forward(x, p) - expected).max()
# Outputs are of size 10, so float32 leaves about 1e-5.
assert difference < 1e-4, f'{difference}: is silu on wi_0, and on it alone?'
print(
  'a gated feed-forward has',
  3 * d * f,
  'parameters; largest difference',
  difference,
)
# %% [markdown] lang="en"
# ## 5. A whole block, with the weights of a Llama
#
# Notebooks 06 and 07 built attention and rotary positions; here they are in
# compact form. A small Llama: $d = 48$, 4 query heads, 2 key-value heads
# (grouped-query attention), head size 12. The package makes its weights; we
# only read them. Arrays of all layers are stacked on a first axis `l`, so
# `layer(i)` takes one of them.
# %% [markdown] lang="zh"
# ## 5. 完整的 block，使用 Llama 的权重
#
# 06 和 07 已经写过 attention 和 rotary 位置编码，这里给出紧凑的形式。一个小
# Llama：$d = 48$，4 个 query head，2 个 key-value head（grouped-query
# attention），head size 为 12。权重由 moepeft 生成，我们只读取。
# 所有层的数组堆叠在第一个轴 `l` 上，`layer(i)` 取出其中一层。
# %%
config = dataclasses.replace(
  FAMILIES['llama'].sizes['tiny'],
  vocab=97,
  d_model=d,
  heads=4,
  kv_heads=2,
  head_dim=12,
  ffn=f,
  layers=3,
)
model = Decoder(config)
ids = rng.integers(0, config.vocab, (2, 11))
params = initializers.init_params(model, {'inputs': ids}, seed=0)['params']
# Scales of 1 would hide an error in their use.
params = jax.tree.map(lambda a: a + 0.1 * rng.standard_normal(a.shape), params)
stacked = params['decoder']['layers']
print(jax.tree.map(np.shape, stacked))


def layer(i):
  return jax.tree.map(lambda a: np.asarray(a[i]), stacked)


# %%
def rotate(x, theta):
  """Rotary embedding of x [b, t, n, h]: pairs (i, i + h / 2)."""
  half = x.shape[-1] // 2
  angles = np.arange(x.shape[1])[:, None] * theta ** -(np.arange(half) / half)
  cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
  first, second = x[..., :half], x[..., half:]
  return np.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )


def softmax(z):
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def attention(x, p):
  """Causal grouped-query attention, x [b, t, d] -> [b, t, d]."""
  q, k, v = (np.einsum('btd,dnh->btnh', x, p[a]['kernel']) for a in 'qkv')
  q, k = rotate(q, config.rope.theta), rotate(k, config.rope.theta)
  groups = q.shape[2] // k.shape[2]
  k, v = np.repeat(k, groups, axis=2), np.repeat(v, groups, axis=2)
  logits = np.einsum('btnh,bsnh->bnts', q, k) * q.shape[-1] ** -0.5
  causal = np.tril(np.ones(logits.shape[-2:], bool))
  weights = softmax(np.where(causal, logits, -np.inf))
  y = np.einsum('bnts,bsnh->btnh', weights, v)
  return np.einsum('btnh,nhd->btd', y, p['o']['kernel'])


# %% [markdown] lang="en"
# The block itself is two lines, one for each sublayer. Its parameters are
# $d h (2n + 2k) + 3df + 2d$: for $n$ query heads and $k$ key-value heads of
# size $h$, the matrices q and o have $dnh$ numbers each, k and v have $dkh$;
# the feed-forward has $3df$ and the two norms have $2d$.
# %% [markdown] lang="zh"
# Block 本身只有两行，每个子层一行。参数量为 $d h (2n + 2k) + 3df + 2d$：有 $n$
# 个 query head、$k$ 个 key-value head，head size 为 $h$；q 和 o 各有 $dnh$
# 个数，k 和 v 各有 $dkh$ 个；feed-forward 有 $3df$ 个，两个 norm 共 $2d$ 个。


# %%
def block(x, p):
  """One pre-norm block, x [b, t, d] -> [b, t, d]."""

  def norm(x, p):
    return rms_norm(x, p['norm']['scale'], config.eps)

  x = x + attention(norm(x, p['self']), p['self'])
  return x + feed_forward(norm(x, p['mlp']), p['mlp'])


n, k, h = config.heads, config.kv_heads, config.head_dim
size = sum(a.size for a in jax.tree.leaves(layer(0)))
assert size == d * h * (2 * n + 2 * k) + 3 * d * f + 2 * d, size
print('a block has', size, 'parameters, of them in the feed-forward', 3 * d * f)

states_in = rng.standard_normal((2, 11, d)).astype(np.float32)
positions = jnp.broadcast_to(jnp.arange(11), (2, 11))
ctx = Context(jnp.ones((2, 11), bool), positions=positions, layer=jnp.int32(0))
causal = jnp.tril(jnp.ones((11, 11), bool))[None, None]
expected = DecoderBlock(config).apply(
  {'params': jax.tree.map(jnp.float32, layer(0))},
  jnp.array(states_in),
  ctx,
  None,  # no bias of positions
  causal,
  None,  # no mask of a window
  None,  # no structured mask
)
difference = np.abs(block(states_in, layer(0)) - expected).max()
print('largest difference from the package:', difference)
assert difference < 1e-4, 'compare sublayer by sublayer; begin with attention'
# %% [markdown] lang="en"
# And the model: embedding, three blocks, the last norm, the head. We also keep
# what each block wrote to the stream, and check that the stream is the sum.
# %% [markdown] lang="zh"
# 整个模型：embedding、三个 block、最后的 norm、head。同时记录每个 block
# 写入残差流的量，并检验残差流确实是它们的和。


# %%
def forward(ids):
  """ids [b, t] -> (logits [b, t, v], what was written to the stream)."""
  x = np.asarray(params['embed']['embedding'])[ids]
  writes = [x]
  for i in range(config.layers):
    y = block(x, layer(i))
    writes.append(y - x)
    x = y
  x = rms_norm(x, params['decoder']['norm']['scale'], config.eps)
  return x @ params['head']['kernel'], writes


logits, writes = forward(ids)
expected = model.apply(
  {'params': jax.tree.map(jnp.float32, params)}, {'inputs': jnp.array(ids)}
)
difference = np.abs(logits - expected).max()
print('logits', logits.shape, 'largest difference', difference)
assert difference < 1e-3, 'each block agreed, so look at embed, norm and head'
total = rms_norm(sum(writes), params['decoder']['norm']['scale'], config.eps)
assert np.allclose(total @ params['head']['kernel'], logits, atol=1e-9)
writers = ['embedding', *(f'block {i}' for i in range(config.layers))]
for writer, write in zip(writers, writes, strict=True):
  rms = np.sqrt((write**2).mean())
  print(f'{writer} wrote a vector of rms {rms:.3f}')
# %% [markdown] lang="en"
# ## 6. Why residual connections: measure the gradient
#
# Stack 24 blocks at their initial random weights and ask how large the gradient
# of a loss is with respect to the output of each layer, that is of each block.
# The loss is $\sum_{t} c_t \cdot x_{L,t}$, where $x_{L,t}$ is the state of
# token $t$ after the last block and the $c_t$ are fixed random vectors (`probe`
# in the code). There are five forms of a sublayer, where $F$ is attention or
# the feed-forward:
#
# - **neither**: $x \leftarrow F(x)$,
# - **norm only**: $x \leftarrow F(\operatorname{norm}(x))$,
# - **no norm**: $x \leftarrow x + F(x)$,
# - **post-norm**: $x \leftarrow \operatorname{norm}(x + F(x))$,
# - **pre-norm**: $x \leftarrow x + F(\operatorname{norm}(x))$.
#
# We measure a second quantity in the forward pass. Attention averages values
# over tokens, and repeated averaging makes all tokens alike: without residual
# connections their differences shrink layer by layer (Dong et al.,
# arXiv:2103.03404, *rank collapse*). The measure is the share of $x$ that is
# not the mean over tokens, $\lVert x - \bar x \rVert / \lVert x \rVert$.
# Attention sees all tokens here, and the feed-forward is the ungated one with
# GELU, whose output grows about in proportion to its input; both keep the
# comparison simple. The right plot draws values below $10^{-8}$, zero included,
# at $10^{-8}$.
# %% [markdown] lang="zh"
# ## 6. 为什么要残差连接：测量梯度
#
# 堆 24 个随机初始化的 block，看 loss 对每一层（每个 block）输出的梯度有多大。
# loss 取 $\sum_{t} c_t \cdot x_{L,t}$，其中 $x_{L,t}$ 是 token $t$ 经过最后一个
# block 的状态，$c_t$ 是固定的随机向量（代码中的 `probe`）。子层有五种形式，
# $F$ 是 attention 或 feed-forward：
#
# - **neither**：$x \leftarrow F(x)$；
# - **norm only**：$x \leftarrow F(\operatorname{norm}(x))$；
# - **no norm**：$x \leftarrow x + F(x)$；
# - **post-norm**：$x \leftarrow \operatorname{norm}(x + F(x))$；
# - **pre-norm**：$x \leftarrow x + F(\operatorname{norm}(x))$。
#
# 第二个量在前向计算中测量。Attention 对各 token 的 value 求平均，
# 反复求平均会使所有 token 越来越像：没有残差连接时，token
# 之间的差异逐层缩小（Dong 等，arXiv:2103.03404，称为 *rank collapse*）。度量是
# $x$ 中不属于 token 均值的部分：$\lVert x - \bar x \rVert / \lVert x \rVert$。
# 为了便于比较，这里的 attention 能看到所有 token，feed-forward 用不带门控的
# GELU 版本，其输出大致与输入成正比。右图把低于 $10^{-8}$ 的值（包括零）画在
# $10^{-8}$ 处。
# %%
depth, width, length = 24, 64, 16


def init_layer(key):
  shapes = {'q': 1, 'k': 1, 'v': 1, 'o': 1, 'wi': 4}
  keys = dict(zip([*shapes, 'wo'], jax.random.split(key, 6), strict=True))

  def normal(name, a, b):
    return jax.random.normal(keys[name], (a, b)) * a**-0.5

  p = {name: normal(name, width, m * width) for name, m in shapes.items()}
  return p | {'wo': normal('wo', 4 * width, width)}


def unit_norm(x):
  return norms.rms_norm(x, jnp.ones(width), 1e-6)


def attend(x, p):
  """One head, no mask; x [t, d]."""
  logits = (x @ p['q']) @ (x @ p['k']).T * width**-0.5
  return jax.nn.softmax(logits) @ (x @ p['v']) @ p['o']


def feed(x, p):
  return jax.nn.gelu(x @ p['wi']) @ p['wo']


FORMS = {
  'neither': lambda f, x, p: f(x, p),
  'norm only': lambda f, x, p: f(unit_norm(x), p),
  'no norm': lambda f, x, p: x + f(x, p),
  'post-norm': lambda f, x, p: unit_norm(x + f(x, p)),
  'pre-norm': lambda f, x, p: x + f(unit_norm(x), p),
}
# %% [markdown] lang="en"
# To get the gradient with respect to *every* layer's output from one backward
# pass, add a zero array to each output and differentiate with respect to the
# zeros.
# %% [markdown] lang="zh"
# 要用一次反向传播得到对*每一层*输出的梯度，可以给每层输出加一个全零数组，
# 再对这些零求导。
# %%
layers = jax.vmap(init_layer)(jax.random.split(jax.random.key(0), depth))
x0 = jax.random.normal(jax.random.key(1), (length, width))
probe = jax.random.normal(jax.random.key(2), (length, width))


def run(form, zeros):
  """Returns (loss, the states after each layer [l, t, d])."""

  def step(x, inputs):
    p, zero = inputs
    x = FORMS[form](attend, x, p)
    x = FORMS[form](feed, x, p) + zero
    return x, x

  x, states = jax.lax.scan(step, x0, (layers, zeros))
  return jnp.sum(x * probe), states


gradients, spread, size = {}, {}, {}
zeros = jnp.zeros((depth, length, width))
for form in FORMS:
  grad, states = jax.grad(lambda z, f=form: run(f, z), has_aux=True)(zeros)
  gradients[form] = np.sqrt((grad**2).sum((1, 2)))
  size[form] = np.sqrt((states**2).mean((1, 2)))
  rest = states - states.mean(1, keepdims=True)
  spread[form] = np.sqrt((rest**2).sum((1, 2)) / (states**2).sum((1, 2)))
  print(
    f'{form:9}  gradient, layer 1 / layer {depth}: '
    f'{gradients[form][0] / gradients[form][-1]:.0e}   rms of x: '
    f'{size[form][-1]:.0e}   tokens differ: {spread[form][-1]:.0e}'
  )
# %%
figure, axes = plt.subplots(1, 2, figsize=(7, 2.8))
for form in FORMS:
  axes[0].semilogy(range(1, depth + 1), gradients[form], label=form)
  axes[1].semilogy(
    range(1, depth + 1), np.maximum(spread[form], 1e-8), label=form
  )
axes[0].set(title='norm of the gradient', xlabel='layer')
axes[1].set(title='share of x that differs by token', xlabel='layer')
axes[0].legend(fontsize=7)
figure.tight_layout()
plt.show()
# %% [markdown] lang="en"
# What the curves say, for random weights:
#
# - *neither*: each layer makes $x$ and the gradient smaller, and 24 layers
#   multiply up to many orders of magnitude. The first layers get almost no
#   gradient.
# - *norm only*: the norm repairs the size of the gradient. But the tokens
#   differ by no more than the rounding of float32 (about $10^{-7}$): every
#   position has the same state, and no head can tell them apart. A gradient
#   that is not zero is not enough.
# - *no norm*: the identity keeps tokens apart for longer, but each layer
#   multiplies the size of $x$, and so that of the gradient.
# - *post-norm*: sizes are 1 by construction. Each norm divides stream and
#   gradient; the share of the first layers in $x_L$ decays geometrically, and
#   with it the difference between tokens.
# - *pre-norm*: the stream grows slowly, by additions of similar size, hence
#   about with the square root of the depth; the gradient differs by a small
#   factor between first and last layer, and tokens stay apart.
#
# Post-norm models can be trained: the original Transformer and BERT are
# post-norm. They need a warm-up of the learning rate, because at the start the
# gradients of the parameters near the output are large (Xiong et al.,
# arXiv:2002.04745). Pre-norm has a price as well: as the stream grows, the
# write of a late layer is a smaller part of it.
# %% [markdown] lang="zh"
# 对随机权重，曲线说明：
#
# - *neither*：每层都使 $x$ 和梯度变小，24 层相乘就是许多个数量级。
#   前面的层几乎得不到梯度。
# - *norm only*：norm 修复了梯度的大小，但 token 之间的差异只剩 float32
#   的舍入误差（约 $10^{-7}$）：每个位置的状态都相同，任何 head 都无法区分。
#   梯度不为零还不够。
# - *no norm*：单位矩阵使 token 的差异保留得更久，但每层都会放大 $x$，
#   梯度也随之放大。
# - *post-norm*：$x$ 的大小恒为 1。每个 norm 都除一次残差流和梯度，前面各层在
#   $x_L$ 中的占比按几何级数衰减，token 之间的差异也随之衰减。
# - *pre-norm*：残差流由大小相近的写入量相加，大致按深度的平方根缓慢增长；
#   第一层与最后一层的梯度只差一个不大的倍数，token 之间的差异得以保留。
#
# Post-norm 模型可以训练：最初的 Transformer 和 BERT 都是 post-norm。
# 但需要学习率 warm-up，因为开始时靠近输出的参数梯度很大（Xiong 等，
# arXiv:2002.04745）。Pre-norm 也有代价：残差流越来越大，
# 后面的层写入的量占比就越来越小。
# %%
ratio = {form: g[0] / g[-1] for form, g in gradients.items()}
assert ratio['neither'] < 1e-4, 'without residuals and norms it vanishes'
assert ratio['no norm'] > 1e4 and size['no norm'][-1] > 1e3
assert 1 / 20 < ratio['pre-norm'] < 20, 'is the norm inside the branch?'
assert spread['norm only'][-1] < 1e-5, 'all tokens should have one state'
assert spread['pre-norm'][-1] > 0.1 > spread['post-norm'][-1]
# About the square root: four times the layers, about twice the size.
growth = size['pre-norm'][-1] / size['pre-norm'][depth // 4 - 1]
print('pre-norm, four times the layers: size times', round(float(growth), 2))
assert 1.5 < growth < 3


# %% [markdown] lang="en"
# ## Exercises
#
# 1. (Easy) GPT-2's feed-forward is not gated and has biases:
#    $\operatorname{gelu}(x W_i + b_i) W_o + b_o$ with the tanh approximation of
#    GELU. Write it, compare it with
#    `Mlp(..., gated=False, activation='gelu', bias=True)`, and count its
#    parameters. They are `wi` and `wo`, each with a `kernel` and a `bias`.
# 2. (Medium) Gemma 2 also normalizes the *output* of each sublayer, before it
#    is added. Write `sandwich_block` and compare it with the package's
#    `DecoderBlock` for a config with `post_norms=True`; its parameters have
#    `self_post_norm` and `mlp_post_norm` beside `self` and `mlp`.
# 3. (Hard) Write the backward pass of RMSNorm for a batch: from $dy$
#    `[b, t, d]` to $dx$ and $dg$, with $\epsilon > 0$ and without building a
#    $d \times d$ matrix. Check it against `jax.vjp`.
# %% [markdown] lang="zh"
# ## 练习
#
# 1. （易）GPT-2 的 feed-forward 没有门控，有偏置：
#    $\operatorname{gelu}(x W_i + b_i) W_o + b_o$，GELU 用 tanh 近似。写出来，与
#    `Mlp(..., gated=False, activation='gelu', bias=True)` 比较，并计算参数量。
#    参数是 `wi` 和 `wo`，各有 `kernel` 和 `bias`。
# 2. （中）Gemma 2 在相加之前还对每个子层的*输出*做归一化。写出
#    `sandwich_block`，与 config 为 `post_norms=True` 时的 `DecoderBlock` 比较；
#    它的参数在 `self`、`mlp` 之外还有 `self_post_norm` 和 `mlp_post_norm`。
# 3. （难）写出 RMSNorm 对一个 batch 的反向传播：由 $dy$ `[b, t, d]` 求 $dx$ 和
#    $dg$，$\epsilon > 0$，不构造 $d \times d$ 矩阵。用 `jax.vjp` 检验。
# %% [markdown] lang="en"
# ## Interview questions
#
# **Why do current models use pre-norm and RMSNorm?**
#
# <details><summary>Answer</summary>
#
# Pre-norm leaves the residual stream free of norms, so the derivative of the
# last state with respect to an early one contains the identity: gradients
# neither vanish nor explode with depth, and training is stable with little or
# no warm-up. The price: the stream grows with depth, late layers write a
# relatively smaller part, and a final norm is needed. RMSNorm drops the mean
# and the bias: one statistic in place of two, half the parameters, less memory
# traffic, and about the same quality in the published comparisons. Centring is
# not what makes a norm work; the division by the size is.
#
# </details>
#
# **A model has $d = 4096$. How wide is its SwiGLU feed-forward, and why not
# $4d$?**
#
# <details><summary>Answer</summary>
#
# Gating needs three matrices of $d \times f$ instead of two. For the parameters
# of $f = 4d$ without a gate, $3df' = 8d^2$, so $f' = 8d/3 \approx 10923$,
# rounded up to a multiple that suits the hardware: 11008 in Llama 2 7B. It is a
# convention, not a law: Llama 3 8B has 14336 $= 3.5d$ and spends there the
# parameters that grouped-query attention saves.
#
# </details>
# %% [markdown] lang="zh"
# ## 面试题
#
# **为什么现在的模型用 pre-norm 和 RMSNorm？**
#
# <details><summary>答案</summary>
#
# Pre-norm 的残差流上没有 norm，最后的状态对前面状态的导数含有单位矩阵：
# 梯度不随深度消失或爆炸，几乎不用 warm-up 就能稳定训练。代价是：
# 残差流随深度增长，后面的层写入量占比变小，而且末尾需要一个 norm。RMSNorm
# 去掉均值和偏置：只需一个统计量，参数减半，访存更少，
# 在公开的对比中质量基本相同。起作用的是除以大小，而不是中心化。
#
# </details>
#
# **模型的 $d = 4096$，它的 SwiGLU feed-forward 有多宽？为什么不是 $4d$？**
#
# <details><summary>答案</summary>
#
# 门控需要三个 $d \times f$ 的矩阵，而不是两个。要与不带门控、$f = 4d$
# 时参数量相同：$3df' = 8d^2$，得 $f' = 8d/3 \approx 10923$，
# 再向上取整到适合硬件的倍数：Llama 2 7B 取 11008。这是惯例，不是定律：Llama 3
# 8B 取 14336 $= 3.5d$，把 grouped-query attention 省下的参数用在这里。
#
# </details>
# %% [markdown] lang="en"
# ## In the package
#
# - {{moepeft.nn.norms.rms_norm}} and {{moepeft.nn.norms.layer_norm}} compute in
#   float32 also for bfloat16 inputs: the sum of $d$ squares loses too much in 8
#   bits of mantissa. {{moepeft.nn.norms.NormForm}} says which of them a model
#   has.
# - {{moepeft.nn.mlp.Mlp}} is the feed-forward of all models;
#   {{moepeft.nn.causal_attention.CausalAttention}} the attention of decoders.
# - {{moepeft.models.decoder.model.DecoderBlock}} is the block of every
#   decoder-only family; the family is a config,
#   {{moepeft.models.decoder.config.DecoderConfig}}.
# - Beyond the version by hand: every projection, norm and sublayer is a *site*
#   where an adapter may act ({{moepeft.nn.adapter_hook.apply_adapters}});
#   layers are scanned, so that the program does not grow with depth
#   ({{moepeft.nn.scan_layers.scan_layers}}); dropout, remat, a KV cache and
#   other dtypes.
#
# Papers: LayerNorm arXiv:1607.06450, RMSNorm 1910.07467, gated feed-forwards
# 2002.05202, pre-norm and post-norm 2002.04745, rank collapse 2103.03404,
# Transformer 1706.03762.
# %% [markdown] lang="zh"
# ## 在 moepeft 中
#
# - {{moepeft.nn.norms.rms_norm}} 和 {{moepeft.nn.norms.layer_norm}} 对 bfloat16
#   输入也用 float32 计算：8 位尾数对 $d$ 个平方求和损失太大。
#   {{moepeft.nn.norms.NormForm}} 说明模型用哪一种。
# - {{moepeft.nn.mlp.Mlp}} 是所有模型的 feed-forward；
#   {{moepeft.nn.causal_attention.CausalAttention}} 是 decoder 的 attention。
# - {{moepeft.models.decoder.model.DecoderBlock}} 是所有 decoder-only 系列的
#   block；不同系列只是 config 不同，见
#   {{moepeft.models.decoder.config.DecoderConfig}}。
# - 比手写版本多的：每个投影、norm 和子层都是一个 *site*，adapter
#   可以在那里起作用（{{moepeft.nn.adapter_hook.apply_adapters}}）；各层用 scan
#   执行，程序大小不随深度增长（{{moepeft.nn.scan_layers.scan_layers}}）；还有
#   dropout、remat、KV cache 和其他 dtype。
#
# 论文：LayerNorm arXiv:1607.06450，RMSNorm 1910.07467，带门控的 feed-forward
# 2002.05202，pre-norm 与 post-norm 2002.04745，rank collapse 2103.03404，
# Transformer 1706.03762。
# %% [markdown] lang="en" tags=["solution"]
# # Solutions: the transformer block
# %% [markdown] lang="zh" tags=["solution"]
# # 解答：Transformer block
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 1
#
# Parameters: $2df$ in the matrices, $f + d$ in the biases.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 1
#
# 参数量：矩阵 $2df$，偏置 $f + d$。
# %% tags=["solution"]
def gelu(z):
  return z / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (z + 0.044715 * z**3)))


def gpt2_feed_forward(x, p):
  hidden = gelu(x @ p['wi']['kernel'] + p['wi']['bias'])
  return hidden @ p['wo']['kernel'] + p['wo']['bias']


p = {
  'wi': {'kernel': kernel(d, f), 'bias': rng.normal(size=f)},
  'wo': {'kernel': kernel(f, d), 'bias': rng.normal(size=d)},
}
mlp = Mlp(d, f, False, 'gelu', 'decoder/mlp', no_adapters, bias=True)
expected = mlp.apply(
  {'params': jax.tree.map(jnp.float32, p)}, jnp.array(x), Context(None)
)
difference = np.abs(gpt2_feed_forward(x, p) - expected).max()
assert difference < 1e-4, difference
assert sum(a.size for a in jax.tree.leaves(p)) == 2 * d * f + f + d


# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 2
#
# The two further norms need scales of their own; random ones, so that an error
# shows.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 2
#
# 多出的两个 norm 有自己的缩放；取随机值，错误才会显现。
# %% tags=["solution"]
def sandwich_block(x, p):
  def norm(x, scale):
    return rms_norm(x, scale, config.eps)

  for name, sublayer in (('self', attention), ('mlp', feed_forward)):
    y = sublayer(norm(x, p[name]['norm']['scale']), p[name])
    x = x + norm(y, p[f'{name}_post_norm']['scale'])
  return x


p = layer(1) | {
  f'{name}_post_norm': {'scale': rng.normal(1, 0.2, d)}
  for name in ('self', 'mlp')
}
with_post_norms = dataclasses.replace(config, post_norms=True)
expected = DecoderBlock(with_post_norms).apply(
  {'params': jax.tree.map(jnp.float32, p)},
  jnp.array(states_in),
  ctx,
  None,
  causal,
  None,
  None,
)
difference = np.abs(sandwich_block(states_in, p) - expected).max()
assert difference < 1e-4, difference
assert np.abs(block(states_in, layer(1)) - expected).max() > 0.1


# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 3
#
# With $r = \sqrt{\operatorname{mean}(x^2) + \epsilon}$, $\hat x = x/r$ and
# $u = dy \odot g$:
# $dx = \big(u - \hat x \operatorname{mean}(u \odot \hat x)\big) / r$, and $dg$
# is the sum of $dy \odot \hat x$ over all tokens. The $\epsilon$ needs no term
# of its own: $\partial r / \partial x_j = x_j / (dr)$ holds with it.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 3
#
# 记 $r = \sqrt{\operatorname{mean}(x^2) + \epsilon}$，$\hat x = x/r$，
# $u = dy \odot g$：
# $dx = \big(u - \hat x \operatorname{mean}(u \odot \hat x)\big) / r$，$dg$ 是
# $dy \odot \hat x$ 对所有 token 求和。$\epsilon$ 不需要单独的项：有它时
# $\partial r / \partial x_j = x_j / (dr)$ 仍成立。
# %% tags=["solution"]
def rms_norm_backward(x, scale, eps, dy):
  r = np.sqrt((x**2).mean(-1, keepdims=True) + eps)
  x_hat, u = x / r, dy * scale
  dx = (u - x_hat * (u * x_hat).mean(-1, keepdims=True)) / r
  return dx, (dy * x_hat).sum((0, 1))


dy = rng.standard_normal(x.shape).astype(np.float32)
# A large eps, so that an error in its use shows.
eps = 0.5
_, vjp = jax.vjp(
  lambda x, g: norms.rms_norm(x, g, eps), jnp.array(x), jnp.float32(scale)
)
for mine, expected in zip(
  rms_norm_backward(x, scale, eps, dy), vjp(jnp.array(dy)), strict=True
):
  assert np.abs(mine - expected).max() < 1e-4, 'compare with eps = 0 first'

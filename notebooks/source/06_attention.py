# SPDX-License-Identifier: Apache-2.0

# %% [markdown] lang="en"
# # Attention by hand
#
# This notebook builds the attention layer of today's language models in NumPy,
# one piece at a time: the scaled dot product, the causal mask, several heads,
# shared key-value heads (GQA), the KV cache, and multi-head latent attention
# (MLA). Each piece is compared with the function that moepeft runs in training
# and serving, and with `jax.nn.dot_product_attention`. At the end you count
# what each variant costs in FLOPs and in bytes.
#
# ## What you will understand
#
# - why logits are divided by $\sqrt{h}$, and what the softmax's gradient does
#   without it
# - why the mask must act before the softmax, and how to test that nothing leaks
#   from the future
# - which axis each einsum contracts in multi-head and grouped-query attention
# - why a KV cache changes no result, and how many bytes it takes per token
# - how MLA caches one small vector per token, why that is multi-query attention
#   in disguise, and why its position part is kept apart
#
# Time: about 90 minutes. Before it: notebook 01 (matrix products and softmax in
# NumPy). Positions are the subject of notebook 07.
# %% [markdown] lang="zh"
# # 手写注意力
#
# 本笔记用 NumPy 从零搭出当今语言模型的注意力层，一次只加一个部件：缩放点积、
# 因果掩码、多头、共享 key-value 头（GQA）、KV cache，
# 以及多头潜在注意力（MLA）。每个部件都与 moepeft 在训练和推理中真正调用的函数、
# 以及 `jax.nn.dot_product_attention` 逐数值比较。最后，你会数清每种变体需要多少
# FLOPs、多少字节。
#
# ## 你将理解什么
#
# - 为什么 logits 要除以 $\sqrt{h}$，不除时 softmax 的梯度会怎样
# - 为什么掩码必须作用在 softmax 之前，以及怎样检验没有泄漏未来的信息
# - 多头注意力和 GQA 的每个 einsum 究竟对哪个轴求和
# - 为什么 KV cache 不改变任何结果，每个 token 又占多少字节
# - MLA 怎样做到每个 token 只缓存一个小向量，为什么它等价于一种 multi-query
#   attention，以及为什么位置部分要单独处理
#
# 时间：约 90 分钟。先修：笔记 01（NumPy 中的矩阵乘法与 softmax）。
# 位置编码在笔记 07 中讲。
# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from moepeft.nn import attention as moepeft_attention
from moepeft.nn.rope import Rope, rotate

plt.rcParams['figure.dpi'] = 72
rng = np.random.default_rng(0)


# %% [markdown] lang="en"
# Letters of axes, the same as in the package: $b$ batch, $t$ query position,
# $s$ key position, $d$ model width, $n$ query heads, $k$ key-value heads, $h$
# size of a head, $r$ rank (width of a latent vector). `btnh` is an array with
# the axes batch, position, head, feature of the head. In the text, $q$, $k$ and
# $v$ are also the names of queries, keys and values.
# `np.einsum('btnh,bsnh->bnts', q, k)` multiplies its arrays along equal letters
# and sums over the letters that are missing to the right of the arrow, here
# $h$.
#
# ## 1. A lookup that has a gradient
#
# A Python dictionary returns the value whose key *equals* the query. Attention
# returns an average of *all* values, weighted by how similar each key is to the
# query. For a query $q\in\mathbb{R}^h$, keys $K\in\mathbb{R}^{s\times h}$ and
# values $V\in\mathbb{R}^{s\times h}$:
#
# $$p = \mathrm{softmax}(K q)\in\mathbb{R}^{s},\qquad
# y = p^\top V\in\mathbb{R}^{h},\qquad
# \mathrm{softmax}(z)_i = \frac{e^{z_i}}{\sum_j e^{z_j}}.$$
#
# The softmax subtracts the largest logit first. This changes nothing, because
# the factor $e^{-\max z}$ cancels in the quotient, but it keeps $e^{z}$ from
# overflowing.
# %% [markdown] lang="zh"
# 轴的字母与代码库一致：$b$ batch，$t$ query 的位置，$s$ key 的位置，$d$
# 模型宽度，$n$ query 头数，$k$ key-value 头数，$h$ 每个头的维度，$r$
# 秩（潜在向量的宽度）。`btnh` 表示一个数组的轴依次是 batch、位置、头、
# 头内特征。正文中 $q$、$k$、$v$ 也是 query、key、value 的名字。
# `np.einsum('btnh,bsnh->bnts', q, k)` 把相同字母的轴对齐相乘，
# 再对箭头右边没有出现的字母（这里是 $h$）求和。
#
# ## 1. 有梯度的查表
#
# Python 字典返回 key 与查询*相等*的那个值。注意力返回*所有*值的加权平均，
# 权重取决于每个 key 与 query 的相似程度。设 query 为 $q\in\mathbb{R}^h$，key 为
# $K\in\mathbb{R}^{s\times h}$，value 为 $V\in\mathbb{R}^{s\times h}$：
#
# $$p = \mathrm{softmax}(K q)\in\mathbb{R}^{s},\qquad
# y = p^\top V\in\mathbb{R}^{h},\qquad
# \mathrm{softmax}(z)_i = \frac{e^{z_i}}{\sum_j e^{z_j}}.$$
#
# 计算 softmax 时先减去最大的 logit。分子分母同乘 $e^{-\max z}$ 会约掉，
# 结果不变，但可以避免 $e^{z}$ 溢出。
# %%
def softmax(z):
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


keys = np.eye(4)  # four orthogonal keys
values = np.array([[10.0], [20.0], [30.0], [40.0]])
for sharpness in (0, 1, 5, 20):
  p = softmax(keys @ (sharpness * keys[2]))
  print(f'{sharpness:2}: weights {p.round(3)}, result {p @ values}')
assert np.allclose(softmax(np.array([1e4, 1e4])), 0.5), 'subtract the maximum'


# %% [markdown] lang="en"
# With a query of large norm the result is the dictionary's (30); with the query
# 0 it is the mean of all values (25). In between, the result is a smooth
# function of the query, so gradients can teach the model what to look up.
#
# ## 2. Why divide by $\sqrt{h}$
#
# Let the entries of $q$ and of a key be independent with mean 0 and variance 1.
# Then
#
# $$\mathrm{Var}(q\cdot k)=\sum_{i=1}^{h}\mathrm{Var}(q_i k_i)=h ,$$
#
# because the terms are uncorrelated and $E[q_i^2k_i^2]=E[q_i^2]\,E[k_i^2]=1$.
# So logits have a standard deviation of $\sqrt{h}$: 8 for $h=64$, 16 for
# $h=256$. A difference of 16 between two logits is a ratio of
# $e^{16}\approx 9\cdot10^6$ between their weights. The softmax is then close to
# one-hot, and its Jacobian
#
# $$\frac{\partial p_i}{\partial z_j}=p_i(\delta_{ij}-p_j)$$
#
# is close to zero: where $p$ is one-hot, every entry vanishes. The layer could
# not learn to look elsewhere. Division by $\sqrt{h}$ makes the variance 1 for
# every $h$. Measure both:
# %% [markdown] lang="zh"
# query 的模很大时，结果就是字典的结果（30）；query 为 0 时，
# 结果是所有值的平均（25）。二者之间，结果是 query 的光滑函数，
# 因此模型可以靠梯度学会该查什么。
#
# ## 2. 为什么除以 $\sqrt{h}$
#
# 设 $q$ 与 key 的各分量相互独立，均值 0，方差 1，则
#
# $$\mathrm{Var}(q\cdot k)=\sum_{i=1}^{h}\mathrm{Var}(q_i k_i)=h ,$$
#
# 因为各项互不相关，且 $E[q_i^2k_i^2]=E[q_i^2]\,E[k_i^2]=1$。所以 logits
# 的标准差是 $\sqrt{h}$：$h=64$ 时为 8，$h=256$ 时为 16。两个 logits 相差 16，
# 权重之比就是 $e^{16}\approx 9\cdot10^6$。此时 softmax 接近 one-hot，而它的
# Jacobian
#
# $$\frac{\partial p_i}{\partial z_j}=p_i(\delta_{ij}-p_j)$$
#
# 接近零：$p$ 为 one-hot 时每一项都是零，这一层就学不会去看别处。除以 $\sqrt{h}$
# 后，无论 $h$ 多大，方差都是 1。两种情况都测一下：
# %%
def jacobian_norm(p):
  """The mean Frobenius norm of the softmax's Jacobian; p [..., s]."""
  eye = np.eye(p.shape[-1])
  jacobian = p[..., :, None] * (eye - p[..., None, :])
  return np.sqrt((jacobian**2).sum((-2, -1))).mean()


sizes = 2 ** np.arange(1, 12)
largest, gradient = [], []  # [sizes, 2], without and with the scale
for size in sizes:
  q = rng.standard_normal((400, 1, size))
  many_keys = rng.standard_normal((400, 16, size))
  z = (many_keys @ q.swapaxes(1, 2))[..., 0]  # [400, 16]
  p = [softmax(z), softmax(z / np.sqrt(size))]
  largest.append([a.max(-1).mean() for a in p])
  gradient.append([jacobian_norm(a) for a in p])
  variance = (z / np.sqrt(size)).var()
  assert abs(variance - 1) < 0.15, 'the variance of the logits should be 1'

fig, axes = plt.subplots(1, 2, figsize=(7, 2.6))
axes[0].plot(sizes, largest, 'o-', ms=3)
axes[0].set(xscale='log', xlabel='h', title='largest of 16 weights')
axes[1].plot(sizes, gradient, 'o-', ms=3)
axes[1].set(xscale='log', xlabel='h', title='norm of the Jacobian')
axes[1].legend([r'$q\cdot k$', r'$q\cdot k/\sqrt{h}$'])
fig.tight_layout()
# %%
# The columns are without and with the scale, the last row is h = 2048.
gradient = np.array(gradient)
print(gradient[[0, 5, -1]].round(3))
assert gradient[-1, 0] < gradient[:, 0].max() / 2, 'the unscaled one saturates'
change = gradient[-1, 1] / gradient[3, 1] - 1
assert abs(change) < 0.2, 'the scaled one does not'


# %% [markdown] lang="en"
# ## 3. Self-attention of one head
#
# In *self*-attention, queries, keys and values are three projections of the
# same sequence $x\in\mathbb{R}^{t\times d}$, with learned
# $W_q,W_k,W_v\in\mathbb{R}^{d\times h}$:
#
# $$Y=\mathrm{softmax}\Big(\frac{(xW_q)(xW_k)^\top}{\sqrt h}\Big)\,xW_v .$$
#
# There are three matrices and not one, because what a token looks for (query),
# what it is found by (key) and what it passes on (value) differ. With $W_q=W_k$
# the logits would be a symmetric matrix: token 2 would give token 5 the same
# logit that token 5 gives token 2.
#
# ## 4. The causal mask
#
# A language model is trained on all next-token predictions of a text in one
# pass. Position $t$ must then not see positions $s>t$, because they contain the
# token that it has to predict. Logits of those pairs are set to $-\infty$, so
# that their weights are exactly 0 and the other weights sum to 1.
# %% [markdown] lang="zh"
# ## 3. 单头自注意力
#
# *自*注意力中，query、key、value 是同一序列 $x\in\mathbb{R}^{t\times d}$
# 的三个投影，参数 $W_q,W_k,W_v\in\mathbb{R}^{d\times h}$ 由学习得到：
#
# $$Y=\mathrm{softmax}\Big(\frac{(xW_q)(xW_k)^\top}{\sqrt h}\Big)\,xW_v .$$
#
# 需要三个矩阵而不是一个，因为一个 token 要找什么（query）、
# 凭什么被找到（key）、传递什么内容（value）是三件事。若 $W_q=W_k$，logits
# 就是对称矩阵：token 5 对 token 2 的 logit 必然等于 token 2 对 token 5 的
# logit。
#
# ## 4. 因果掩码
#
# 训练语言模型时，一次前向就计算一段文本中所有位置的 next-token 预测。位置 $t$
# 不能看到 $s>t$ 的位置，因为要预测的 token 就在那里。这些位置对的 logits 置为
# $-\infty$，权重就恰好为 0，其余权重之和为 1。
# %%
def one_head(x, w_q, w_k, w_v, mask=None):
  """x [t, d] -> (y [t, h], weights [t, s])."""
  q, k, v = x @ w_q, x @ w_k, x @ w_v
  logits = q @ k.T / np.sqrt(q.shape[-1])
  if mask is not None:
    logits = np.where(mask, logits, -np.inf)
  weights = softmax(logits)
  return weights @ v, weights


t, d, h = 7, 12, 5
x = rng.standard_normal((t, d))
w_q, w_k, w_v = rng.standard_normal((3, d, h)) / np.sqrt(d)
causal = np.tril(np.ones((t, t), bool))
_, free = one_head(x, w_q, w_k, w_v)
y, weights = one_head(x, w_q, w_k, w_v, causal)

fig, axes = plt.subplots(1, 2, figsize=(6, 2.6))
for axis, a, title in zip(
  axes, (free, weights), ('no mask', 'causal'), strict=True
):
  image = axis.imshow(a, vmin=0, vmax=1, cmap='viridis')
  axis.set(xlabel='key position s', title=title)
axes[0].set_ylabel('query position t')
fig.colorbar(image, ax=axes)
plt.show()


# %% [markdown] lang="en"
# A test for leaks needs no theory: change a token, and look at which outputs
# change. Below, a common mistake is tested too: computing the softmax over all
# keys and multiplying the weights by the mask *afterwards*.
# %% [markdown] lang="zh"
# 检验泄漏不需要理论：改动一个 token，看哪些输出变了。下面同时检验一个常见错误：
# 先对所有 key 做 softmax，*之后*再把权重乘以掩码。
# %%
def mask_too_late(x):
  _, weights = one_head(x, w_q, w_k, w_v)
  return (weights * causal) @ (x @ w_v)


changed = x.copy()
changed[5] += 1.0
for name, run in {
  'mask before softmax': lambda x: one_head(x, w_q, w_k, w_v, causal)[0],
  'mask after softmax': mask_too_late,
  'no mask': lambda x: one_head(x, w_q, w_k, w_v)[0],
}.items():
  difference = np.abs(run(changed) - run(x)).max(-1)
  print(f'{name:20} outputs that change: {np.flatnonzero(difference)}')
  if name == 'mask before softmax':
    assert not difference[:5].any(), 'outputs 0 to 4 must not see token 5'
    assert (difference[5:] > 0).all(), 'outputs 5 and 6 must see token 5'
  else:
    assert (difference[:5] > 0).any(), 'this version should leak'
assert np.allclose(weights.sum(-1), 1)


# %% [markdown] lang="en"
# Masking after the softmax leaks through the denominator: $\sum_j e^{z_j}$
# still contains the future.
#
# ## 5. Several heads
#
# One head has one weight for each pair of positions, so it can look at one kind
# of thing at a time. Multi-head attention runs $n$ heads of size $h$ (mostly
# $nh=d$) side by side and mixes their outputs by
# $W_o\in\mathbb{R}^{n\times h\times d}$:
#
# $$q_{tnh}=\sum_d x_{td}W^q_{dnh},\quad
# z_{nts}=\frac{1}{\sqrt h}\sum_h q_{tnh}k_{snh},\quad
# o_{tnh}=\sum_s p_{nts}v_{snh},\quad
# y_{td}=\sum_{n,h}o_{tnh}W^o_{nhd},$$
#
# where $k_{snh}$ and $v_{snh}$ are projections like $q_{tnh}$, and $p_{nts}$ is
# the softmax of $z_{nts}$ over $s$. The indices of each sum are the letters of
# its einsum in the code. No sum before the last runs over $n$, so heads do not
# mix before $W_o$.
#
# ## 6. Fewer key-value heads: MQA and GQA
#
# In generation, keys and values of all earlier tokens are read again for each
# new token. Grouped-query attention (GQA, arXiv:2305.13245) has $k<n$ key-value
# heads; each serves $n/k$ neighbouring query heads. $k=n$ is multi-head, $k=1$
# is multi-query attention (MQA, arXiv:1911.02150). One function covers all
# three: repeat each key-value head $n/k$ times.
# %% [markdown] lang="zh"
# softmax 之后再乘掩码，会通过分母泄漏：$\sum_j e^{z_j}$ 里仍含有未来的 token。
#
# ## 5. 多头
#
# 一个头对每对位置只有一个权重，一次只能关注一类信息。多头注意力让 $n$ 个维度为
# $h$ 的头并行（通常 $nh=d$），再由 $W_o\in\mathbb{R}^{n\times h\times d}$
# 混合各头的输出：
#
# $$q_{tnh}=\sum_d x_{td}W^q_{dnh},\quad
# z_{nts}=\frac{1}{\sqrt h}\sum_h q_{tnh}k_{snh},\quad
# o_{tnh}=\sum_s p_{nts}v_{snh},\quad
# y_{td}=\sum_{n,h}o_{tnh}W^o_{nhd},$$
#
# 其中 $k_{snh}$、$v_{snh}$ 与 $q_{tnh}$ 一样由投影得到，$p_{nts}$ 是 $z_{nts}$
# 对 $s$ 的 softmax。每个求和式的下标就是代码中 einsum 的字母。
# 最后一个式子之前没有对 $n$ 的求和，所以在 $W_o$ 之前各头互不混合。
#
# ## 6. 更少的 key-value 头：MQA 与 GQA
#
# 生成时，每产生一个新 token，都要重新读取之前所有 token 的 key 和 value。
# 分组查询注意力（GQA，arXiv:2305.13245）只有 $k<n$ 个 key-value 头，
# 每个服务相邻的 $n/k$ 个 query 头。$k=n$ 是多头注意力，$k=1$ 是 multi-query
# attention（MQA，arXiv:1911.02150）。一个函数就能涵盖三者：把每个 key-value
# 头重复 $n/k$ 次。
# %%
def attend(q, k, v, mask=None, scale=None):
  """q [b, t, n, h]; k, v [b, s, k, h] -> [b, t, n, h]."""
  n, h = q.shape[2:]
  groups = n // k.shape[2]
  k, v = np.repeat(k, groups, axis=2), np.repeat(v, groups, axis=2)
  logits = np.einsum('btnh,bsnh->bnts', q, k) * (scale or h**-0.5)
  if mask is not None:
    logits = np.where(mask, logits, -np.inf)
  return np.einsum('bnts,bsnh->btnh', softmax(logits), v)


b, t, n, h = 2, 7, 6, 5
causal = np.tril(np.ones((t, t), bool))[None, None]  # [1, 1, t, s]
for kv_heads in (6, 3, 1):
  q = rng.standard_normal((b, t, n, h))
  k, v = rng.standard_normal((2, b, t, kv_heads, h))
  y = attend(q, k, v, causal)
  # Head 4 uses the key-value head 4 // (n / k).
  j = 4 // (n // kv_heads)
  z = np.where(causal[0, 0], q[0, :, 4] @ k[0, :, j].T / np.sqrt(h), -np.inf)
  assert np.allclose(y[0, :, 4], softmax(z) @ v[0, :, j]), 'repeat, do not tile'
  print(f'{n} query heads, {kv_heads} key-value heads: {y.shape}')


# %% [markdown] lang="en"
# `np.repeat` gives heads 0 0 1 1 2 2, `np.tile` would give 0 1 2 0 1 2. Both
# have the right shape; a checkpoint loaded with the wrong one produces
# nonsense.
#
# Now the same numbers through the package and through JAX. moepeft has three
# implementations: `naive` is the formula, `chunked` never builds all logits at
# once (exercise 3), `fused` calls JAX's function. Each takes a `Heads` object,
# and `scale` is an argument, since T5 uses 1 (it has $1/\sqrt h$ in the initial
# weights). They compute in float32, which has a relative precision of
# $6\cdot 10^{-8}$; sums of a few dozen terms of size 1 stay well within
# $10^{-5}$.
# %% [markdown] lang="zh"
# `np.repeat` 得到头 0 0 1 1 2 2，`np.tile` 会得到 0 1 2 0 1 2。两者形状都对；
# 但用错一个去加载 checkpoint，模型就会输出乱码。
#
# 现在让同样的数值经过代码库和 JAX。moepeft 有三种实现：`naive` 就是公式，
# `chunked` 从不一次生成全部 logits（练习 3），`fused` 调用 JAX 的函数。
# 它们都接收一个 `Heads` 对象，`scale` 是参数，因为 T5 用 1（它把 $1/\sqrt h$
# 放进了初始权重）。它们用 float32 计算，相对精度 $6\cdot 10^{-8}$；几十个量级为
# 1 的数相加，误差远小于 $10^{-5}$。
# %%
def package_attend(q, k, v, mask=None, scale=None, implementation='naive'):
  heads = moepeft_attention.Heads(
    *(jnp.asarray(a, jnp.float32) for a in (q, k, v)),
    mask=None if mask is None else jnp.asarray(mask),
  )
  run = moepeft_attention.IMPLEMENTATIONS[implementation]
  return np.asarray(run(heads, scale or q.shape[-1] ** -0.5))


for kv_heads in (6, 3, 1):
  k, v = rng.standard_normal((2, b, t, kv_heads, h))
  y = attend(q, k, v, causal)
  jax_y = jax.nn.dot_product_attention(
    *(jnp.asarray(a, jnp.float32) for a in (q, k, v)), is_causal=True
  )
  error = {'jax.nn': np.abs(y - jax_y).max()}
  for name in moepeft_attention.IMPLEMENTATIONS:
    same = package_attend(q, k, v, causal, implementation=name)
    error[f'moepeft {name}'] = np.abs(y - same).max()
  print({name: f'{value:.0e}' for name, value in error.items()})
  assert max(error.values()) < 1e-5, 'compare scale, mask and head order'
mask = moepeft_attention.attention_mask(
  jnp.ones((b, t), bool), jnp.ones((b, t), bool), causal=True
)
assert np.array_equal(np.broadcast_to(causal, (b, 1, t, t)), mask)
# %% [markdown] lang="en"
# ## 7. The KV cache
#
# Generation adds one token at a time. In a causal model the keys and values of
# old tokens do not depend on new ones (as the leak test of section 4 shows), so
# they are computed once and kept. A step then projects one token and attends
# from one query to all cached keys. No mask is needed: everything in the cache
# is in the past.
# %% [markdown] lang="zh"
# ## 7. KV cache
#
# 生成时一次加一个 token。在因果模型中，旧 token 的 key 和 value 不依赖新
# token（第 4 节的泄漏检验已说明这一点），所以算一次存下来即可。每一步只投影一个
# token，用一个 query 去看缓存中所有 key。不需要掩码：缓存里只有过去的 token。
# %%
d, n, kv_heads, h = 24, 6, 2, 4
w = {
  'q': rng.standard_normal((d, n, h)) / np.sqrt(d),
  'k': rng.standard_normal((d, kv_heads, h)) / np.sqrt(d),
  'v': rng.standard_normal((d, kv_heads, h)) / np.sqrt(d),
  'o': rng.standard_normal((n, h, d)) / np.sqrt(n * h),
}


def layer(x):
  """Full causal pass, x [b, t, d] -> [b, t, d]."""
  q, k, v = (np.einsum('btd,dnh->btnh', x, w[name]) for name in 'qkv')
  mask = np.tril(np.ones((x.shape[1],) * 2, bool))
  return np.einsum('btnh,nhd->btd', attend(q, k, v, mask), w['o'])


def step(x, cache):
  """One new token, x [b, 1, d]; appends to the cache."""
  q, k, v = (np.einsum('btd,dnh->btnh', x, w[name]) for name in 'qkv')
  cache['k'] = np.concatenate([cache['k'], k], axis=1)
  cache['v'] = np.concatenate([cache['v'], v], axis=1)
  o = attend(q, cache['k'], cache['v'])
  return np.einsum('btnh,nhd->btd', o, w['o'])


x = rng.standard_normal((1, 20, d))
cache = {name: np.zeros((1, 0, kv_heads, h)) for name in 'kv'}
steps = [step(x[:, i : i + 1], cache) for i in range(x.shape[1])]
assert np.allclose(np.concatenate(steps, axis=1), layer(x)), 'cache is wrong'
print({name: array.shape for name, array in cache.items()})


# %% [markdown] lang="en"
# The cache needs, for each token,
#
# $$\text{bytes} = 2\cdot l\cdot k\cdot h\cdot(\text{bytes of a number})$$
#
# with $l$ layers and the 2 for keys and values. The number of *query* heads
# does not appear. What it saves: without a cache, step $t$ projects and attends
# all $t$ tokens again, so that $T$ tokens need $\sum_t t = T(T+1)/2$
# projections instead of $T$.
# %% [markdown] lang="zh"
# 缓存中每个 token 需要
#
# $$\text{字节数} = 2\cdot l\cdot k\cdot h\cdot(\text{每个数的字节数})$$
#
# 其中 $l$ 是层数，2 表示 key 和 value。*query* 头数不出现在式中。它省下了什么：
# 没有缓存时，第 $t$ 步要把全部 $t$ 个 token 重新投影、重新计算注意力，于是生成
# $T$ 个 token 需要 $\sum_t t = T(T+1)/2$ 次投影，而不是 $T$ 次。
# %%
def kv_bytes_per_token(layers, kv_heads, head_dim, bytes_each=2):
  return 2 * layers * kv_heads * head_dim * bytes_each


measured = sum(a.nbytes for a in cache.values()) / x.shape[1]
assert measured == kv_bytes_per_token(1, kv_heads, h, bytes_each=8)
# 70B-class: 80 layers, 64 query heads, 8 key-value heads of 128 (Llama 3).
for kv_heads_70b, name in ((64, 'MHA'), (8, 'GQA'), (1, 'MQA')):
  size = kv_bytes_per_token(80, kv_heads_70b, 128)
  print(
    f'{name}: {size:>9,} bytes a token, '
    f'{size * 32768 / 2**30:5.1f} GiB for one text of 32,768 tokens'
  )
# %% [markdown] lang="en"
# ## 8. Multi-head latent attention
#
# GQA saves memory by having fewer different keys. MLA (DeepSeek-V2,
# arXiv:2405.04434) keeps $n$ different keys and values per token, but makes
# them all from one short *latent* vector $c$ and caches only that:
#
# $$c_s = x_s W^{dkv}\in\mathbb{R}^{r},\qquad
# k_{sn} = c_s W^{uk}_n,\quad v_{sn} = c_s W^{uv}_n\in\mathbb{R}^{h},$$
#
# with $W^{dkv}\in\mathbb{R}^{d\times r}$ ("down" to $r$ numbers) and
# $W^{uk},W^{uv}\in\mathbb{R}^{r\times n\times h}$ ("up" to keys and values).
# This is a factorization of rank $r$ of the key and value projections, the same
# idea as LoRA's $AB$ (notebook 15), but in the base model itself.
#
# Recomputing $k_{sn}$ for all cached tokens at each step would be slow. It is
# not needed, because the product is associative:
#
# $$q_{tn}\cdot k_{sn} = q_{tn}\,(W^{uk}_n)^\top c_s^\top
# = \tilde q_{tn}\cdot c_s,\qquad
# \tilde q_{tn} = q_{tn}(W^{uk}_n)^\top\in\mathbb{R}^{r} .$$
#
# $W^{uk}$ is *absorbed* into the query. The same holds on the value side:
# $\sum_s p_{nts}\,c_sW^{uv}_n = \big(\sum_s p_{nts}c_s\big)W^{uv}_n$. So all
# heads attend to the same "key" $c_s$ and the same "value" $c_s$: in the
# absorbed order, MLA *is* multi-query attention with one key-value head of
# width $r$.
# %% [markdown] lang="zh"
# ## 8. 多头潜在注意力（MLA）
#
# GQA 节省内存的办法是减少不同的 key。MLA（DeepSeek-V2，arXiv:2405.04434）
# 仍为每个 token 保留 $n$ 组不同的 key 和 value，但它们都由一个短的*潜在*向量
# $c$ 生成，只缓存 $c$：
#
# $$c_s = x_s W^{dkv}\in\mathbb{R}^{r},\qquad
# k_{sn} = c_s W^{uk}_n,\quad v_{sn} = c_s W^{uv}_n\in\mathbb{R}^{h},$$
#
# 其中 $W^{dkv}\in\mathbb{R}^{d\times r}$（down，降到 $r$ 维），
# $W^{uk},W^{uv}\in\mathbb{R}^{r\times n\times h}$（up，升到 key 和 value）。
# 这是对 key、value 投影的秩 $r$ 分解，与 LoRA 的 $AB$（笔记 15）思路相同，
# 只是发生在基座模型内部。
#
# 如果每一步都为所有缓存的 token 重算 $k_{sn}$，会很慢。其实不必，
# 因为矩阵乘法满足结合律：
#
# $$q_{tn}\cdot k_{sn} = q_{tn}\,(W^{uk}_n)^\top c_s^\top
# = \tilde q_{tn}\cdot c_s,\qquad
# \tilde q_{tn} = q_{tn}(W^{uk}_n)^\top\in\mathbb{R}^{r} .$$
#
# $W^{uk}$ 被*吸收*进了 query。value 一侧同理：
# $\sum_s p_{nts}\,c_sW^{uv}_n = \big(\sum_s p_{nts}c_s\big)W^{uv}_n$。
# 于是所有头看的是同一个“key”$c_s$ 和同一个“value”$c_s$：按吸收后的顺序计算，MLA
# *就是*只有一个宽度为 $r$ 的 key-value 头的 multi-query attention。
# %%
d, n, h, r, h_rope = 24, 6, 4, 8, 2
mla = {
  'q': rng.standard_normal((d, n, h)) / np.sqrt(d),
  'dkv': rng.standard_normal((d, r)) / np.sqrt(d),
  'uk': rng.standard_normal((r, n, h)) / np.sqrt(r),
  'uv': rng.standard_normal((r, n, h)) / np.sqrt(r),
  'q_rope': rng.standard_normal((d, n, h_rope)) / np.sqrt(d),
  'k_rope': rng.standard_normal((d, 1, h_rope)) / np.sqrt(d),
}
x = rng.standard_normal((1, 9, d))
causal = np.tril(np.ones((9, 9), bool))
c = np.einsum('btd,dr->btr', x, mla['dkv'])
q = np.einsum('btd,dnh->btnh', x, mla['q'])

# Expanded: n different keys and values.
k = np.einsum('bsr,rnh->bsnh', c, mla['uk'])
v = np.einsum('bsr,rnh->bsnh', c, mla['uv'])
expanded = attend(q, k, v, causal)
# Absorbed: one key-value head, which is c itself.
q_absorbed = np.einsum('btnh,rnh->btnr', q, mla['uk'])
o = attend(q_absorbed, c[:, :, None], c[:, :, None], causal, scale=h**-0.5)
absorbed = np.einsum('btnr,rnh->btnh', o, mla['uv'])
assert np.allclose(expanded, absorbed), 'contract uk over h, uv over r'
# %% [markdown] lang="en"
# The scale stays $1/\sqrt h$, although the absorbed vectors have width $r$: it
# is the same logit.
#
# ### Why the position part is separate
#
# RoPE (notebook 07) rotates queries and keys by matrices $R_t$, $R_s$ that
# depend on the position. With it the logit is
#
# $$(q_{tn}R_t)(c_sW^{uk}_nR_s)^\top
# = q_{tn}\,R_tR_s^\top\,(W^{uk}_n)^\top c_s^\top .$$
#
# $R_tR_s^\top$ stands between $q$ and $W^{uk}$, and it is different for every
# pair. So no absorbed query exists that serves all $s$. MLA therefore splits
# the head: a *content* part of width $h$ without position, as above, and a
# *position* part of width $h_r$ whose query $q^R_{tn}$ and key $k^R_s$ are two
# further projections of $x$, rotated; this key is shared by all heads and
# cached as it is:
#
# $$z_{nts}=
# \frac{q_{tn}\cdot k_{sn}+q^{R}_{tn}\cdot k^{R}_{s}}{\sqrt{h+h_r}} .$$
#
# The cache has $r+h_r$ numbers per token and layer. It is again multi-query
# attention: query $[\tilde q_{tn}, q^R_{tn}]$, key $[c_s, k^R_s]$, value $c_s$.
# Below, the value is padded with zeros so that the package's function, whose
# values are as wide as its keys, computes it as well. (The published layer also
# norms $c_s$ and makes queries from a latent vector of their own; neither
# changes the argument.)
# %% [markdown] lang="zh"
# 缩放仍是 $1/\sqrt h$，尽管吸收后的向量宽度是 $r$：因为 logit 还是同一个数。
#
# ### 为什么位置部分要单独处理
#
# RoPE（笔记 07）用依赖位置的矩阵 $R_t$、$R_s$ 旋转 query 和 key。这时 logit 为
#
# $$(q_{tn}R_t)(c_sW^{uk}_nR_s)^\top
# = q_{tn}\,R_tR_s^\top\,(W^{uk}_n)^\top c_s^\top .$$
#
# $R_tR_s^\top$ 夹在 $q$ 和 $W^{uk}$ 之间，而且每对位置都不同，
# 因此不存在一个对所有 $s$ 都适用的吸收 query。MLA 于是把头拆开：*内容*部分宽
# $h$，不含位置，如上所述；*位置*部分宽 $h_r$，它的 query $q^R_{tn}$ 和 key
# $k^R_s$ 是 $x$ 的另外两个投影，经过旋转；这个 key 由所有头共享，
# 旋转后直接缓存：
#
# $$z_{nts}=
# \frac{q_{tn}\cdot k_{sn}+q^{R}_{tn}\cdot k^{R}_{s}}{\sqrt{h+h_r}} .$$
#
# 每个 token、每层的缓存是 $r+h_r$ 个数。它仍是 multi-query attention：query 为
# $[\tilde q_{tn}, q^R_{tn}]$，key 为 $[c_s, k^R_s]$，value 为 $c_s$。下面用零把
# value 补宽，因为代码库的函数要求 value 与 key 等宽，这样它也能算出同样的结果。
# （公开的 MLA 层还对 $c_s$ 做 norm，query 也由另一个潜在向量生成；
# 这不影响上面的论证。）
# %%
positions = np.arange(9)[None]


def rotated(x, weight):
  a = np.einsum('btd,dnh->btnh', x, weight).astype(np.float32)
  return np.asarray(rotate(jnp.asarray(a), jnp.asarray(positions), Rope()))


q_rope, k_rope = rotated(x, mla['q_rope']), rotated(x, mla['k_rope'])
scale = (h + h_rope) ** -0.5
# Expanded, term by term as in the formula.
z = np.einsum('btnh,bsnh->bnts', q, k)
z = (z + np.einsum('btnh,bsh->bnts', q_rope, k_rope[:, :, 0])) * scale
p = softmax(np.where(causal, z, -np.inf))
expanded = np.einsum('bnts,bsnh->btnh', p, v)
# Absorbed, from a cache of r + h_rope numbers a token.
cache = np.concatenate([c[:, :, None], k_rope], axis=-1)  # [b, s, 1, r + h_r]
query = np.concatenate([q_absorbed, q_rope], axis=-1)
value = cache * (np.arange(r + h_rope) < r)
for run in (attend, package_attend):
  o = run(query, cache, value, causal, scale)[..., :r]
  error = np.abs(np.einsum('btnr,rnh->btnh', o, mla['uv']) - expanded).max()
  print(f'{run.__name__}: {error:.0e}')
  assert error < 1e-5, 'one key-value head [c, k_rope], the scale of h + h_r'
assert cache[0, 0].size == r + h_rope < 2 * n * h


# %% [markdown] lang="en"
# Is RoPE on the content part really impossible to absorb? Test the claim:
# rotate $q$ and $k$ of width $h$, then solve for the one vector per query whose
# inner products with all $c_s$ would be the right logits (least squares: 9
# equations, one for each key, and $r=8$ unknowns). Without RoPE the residual is
# zero up to rounding; with RoPE it is not.
# %% [markdown] lang="zh"
# 内容部分加了 RoPE 就真的无法吸收吗？检验一下：旋转宽度为 $h$ 的 $q$ 和 $k$，
# 然后对每个 query 求一个向量，使它与所有 $c_s$ 的内积都给出正确的
# logits（最小二乘：每个 key 一个方程，共 9 个，$r=8$ 个未知数）。不加 RoPE
# 时残差只有舍入误差；加了 RoPE 就不是。
# %%
def residual(q, k):
  """How far the logits of head 0 are from any q' with q' . c_s for all s."""
  z = q[0, :, 0] @ k[0, :, 0].T  # [t, s]
  solution = np.linalg.lstsq(c[0], z.T, rcond=None)[0]
  return np.abs(c[0] @ solution - z.T).max()


with_rope = [
  np.asarray(rotate(jnp.asarray(a, jnp.float32), positions, Rope()))
  for a in (q, k)
]
print(
  f'without RoPE {residual(q, k):.0e}, with RoPE {residual(*with_rope):.0e}'
)
assert residual(q, k) < 1e-9 and residual(*with_rope) > 1e-3


# %% [markdown] lang="en"
# ## 9. What it costs
#
# A product of $[a,b]$ and $[b,c]$ needs $2abc$ FLOPs (a multiplication and an
# addition). For a layer over $t$ tokens, without use of the causal triangle:
#
# | part | FLOPs |
# | --- | --- |
# | projections q, o | $2\cdot 2\,t\,d\,nh$ |
# | projections k, v | $2\cdot 2\,t\,d\,kh$ |
# | logits $qk$ and $pv$ | $2\cdot 2\,t^2\,nh$ |
#
# The last row is quadratic in $t$, and GQA does not change it: it saves memory
# traffic, not logits. With $nh=kh=d$ the two kinds are equal where
# $8td^2=4t^2d$, at $t=2d$. An independent count: XLA reports the FLOPs of the
# compiled program.
# %% [markdown] lang="zh"
# ## 9. 代价是多少
#
# $[a,b]$ 与 $[b,c]$ 的乘积需要 $2abc$ FLOPs（一次乘、一次加）。一层处理 $t$ 个
# token，不利用因果三角形时：
#
# | 部分 | FLOPs |
# | --- | --- |
# | 投影 q、o | $2\cdot 2\,t\,d\,nh$ |
# | 投影 k、v | $2\cdot 2\,t\,d\,kh$ |
# | logits $qk$ 与 $pv$ | $2\cdot 2\,t^2\,nh$ |
#
# 最后一行是 $t$ 的二次方，GQA 不改变它：GQA 省的是内存带宽，不是 logits
# 的计算。当 $nh=kh=d$ 时，两类开销在 $8td^2=4t^2d$ 即 $t=2d$ 处相等。
# 独立的核对：XLA 会报告编译后程序的 FLOPs。
# %%
def layer_flops(t, d, n, k, h):
  return 4 * t * d * n * h + 4 * t * d * k * h + 4 * t * t * n * h


def xla_flops(t, d, n, k, h):
  def jax_layer(x, w_q, w_k, w_v, w_o):
    q, k, v = (jnp.einsum('btd,dnh->btnh', x, w) for w in (w_q, w_k, w_v))
    heads = moepeft_attention.Heads(q, k, v)
    y = moepeft_attention.attend(heads, h**-0.5)
    return jnp.einsum('btnh,nhd->btd', y, w_o)

  shapes = (1, t, d), (d, n, h), (d, k, h), (d, k, h), (n, h, d)
  args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return jax.jit(jax_layer).lower(*args).compile().cost_analysis()['flops']


for t, k in ((64, 8), (512, 8), (512, 2)):
  ratio = xla_flops(t, 512, 8, k, 64) / layer_flops(t, 512, 8, k, 64)
  print(f't={t}, {k} key-value heads: XLA / formula = {ratio:.3f}')
  # XLA also counts the softmax: a few operations for each logit, beside the
  # 2 x 2 x 64 of its two products.
  assert 1 <= ratio < 1.05, 'count two operations for each product'
# %% [markdown] lang="en"
# Now the sizes of published models. DeepSeek-V2 has 60 layers, 128 heads of
# 128, $r=512$, $h_r=64$ (numbers of its paper). The left plot shows FLOPs of
# one layer with $nh=kh=d=4096$, split as above, with a dotted line at $t=2d$.
# The right one shows the cache of one text for DeepSeek-V2's layers and heads
# with four kinds of attention.
# %% [markdown] lang="zh"
# 现在看已发布模型的规模。DeepSeek-V2 有 60 层、128 个维度为 128 的头，$r=512$，
# $h_r=64$（论文中的数值）。左图是 $nh=kh=d=4096$ 时一层的 FLOPs，按上表拆开，
# 虚线在 $t=2d$ 处；右图按 DeepSeek-V2 的层数和头数，
# 画出四种注意力下一段文本的缓存。
# %%
lengths = 2 ** np.arange(8, 18)
layers, n, h, r, h_rope = 60, 128, 128, 512, 64
per_token = {
  'MHA': kv_bytes_per_token(layers, n, h),
  'GQA, 8 heads': kv_bytes_per_token(layers, 8, h),
  'MLA': 2 * layers * (r + h_rope),  # 2 bytes a number, one vector
  'MQA': kv_bytes_per_token(layers, 1, h),
}
fig, axes = plt.subplots(1, 2, figsize=(7, 2.8))
d = 4096
axes[0].plot(lengths, 8 * lengths * d**2, label='projections')
axes[0].plot(lengths, 4.0 * lengths**2 * d, label='logits and values')
axes[0].axvline(2 * d, color='gray', lw=1, ls=':')
axes[0].set(title='FLOPs of a layer, d = 4096', xlabel='tokens')
for name, size in per_token.items():
  axes[1].plot(lengths, size * lengths / 2**30, label=name)
axes[1].set(title='KV cache, GiB (60 layers)', xlabel='tokens')
for axis, corner in zip(axes, ('upper left', 'lower right'), strict=True):
  axis.set(xscale='log', yscale='log')
  axis.legend(fontsize=7, loc=corner)
fig.tight_layout()
for name, size in per_token.items():
  print(f'{name:13} {size:>9,} bytes a token')
heads = per_token['MLA'] / kv_bytes_per_token(layers, 1, h)
print(f'MLA caches as much as GQA with {heads:.2f} key-value heads')
assert per_token['MHA'] / per_token['MLA'] > 50 and heads == 2.25
# %% [markdown] lang="en"
# MLA does not have the smallest cache: MQA's is smaller. The reason for MLA is
# the quality of a model with a cache of that size (the paper compares them;
# nothing here measures it). And the absorbed order is not free: its logits cost
# $2t^2n(r+h_r)$ and its values $2t^2nr$ FLOPs instead of $2t^2n(h+h_r)$ and
# $2t^2nh$. So implementations expand keys and values for long prompts, where
# arithmetic takes the time, and absorb in generation, where reading the cache
# does.
# %% [markdown] lang="zh"
# MLA 的缓存并不是最小的：MQA 更小。MLA
# 的优势在于缓存这样小时模型的质量（论文有比较；这里没有测量）。
# 吸收后的顺序也不是免费的：logits 需要 $2t^2n(r+h_r)$、value 需要 $2t^2nr$
# FLOPs，而不是 $2t^2n(h+h_r)$ 和 $2t^2nh$。因此实现上，处理长 prompt
# 时瓶颈是计算，就展开 key 和 value；生成时瓶颈是读缓存，就用吸收的顺序。
# %%
pair_flops = {
  'expanded': 2 * n * (h + h_rope) + 2 * n * h,
  'absorbed': 2 * n * (r + h_rope) + 2 * n * r,
}
ratio = pair_flops['absorbed'] / pair_flops['expanded']
print(f'absorbed / expanded FLOPs for a pair of tokens: {ratio:.1f}')
# In generation: FLOPs for each byte that is read from the cache (bfloat16).
for name, flops, size in (
  ('MHA', 4 * n * h, 2 * 2 * n * h),
  ('GQA, 8 heads', 4 * n * h, 2 * 2 * 8 * h),
  ('MLA absorbed', pair_flops['absorbed'], 2 * (r + h_rope)),
):
  print(f'{name:13} {flops / size:6.1f} FLOPs a byte')
assert 3 < ratio < 4


# %% [markdown] lang="en"
# One decoding step of multi-head attention does 1 FLOP for each byte of the
# cache that it reads. A GPU can do a few hundred FLOPs in the time in which it
# reads a byte, so it waits for memory. GQA and MLA raise the ratio: they make
# the cache smaller, and generation faster as well.
#
# ## Exercises
#
# 1. *Sliding window.* Write `window_mask(t, window)`, bool `[t, t]`: token $t$
#    sees itself and the `window - 1` tokens before it. Compare with
#    `moepeft_attention.attention_mask(..., causal=True, window=window)`. How
#    many tokens back can information travel through $l$ layers of it?
# 2. *Padding.* Two texts of 5 and 9 tokens stand in one batch, the first padded
#    on the right to 9. A *key mask* (bool, `[b, 1, 1, s]`) hides padding from
#    all queries. Show with `attend` that it makes the five outputs equal to
#    those of the text alone, and that without the causal mask *and* without a
#    key mask they differ. Is the key mask needed if the mask is causal?
# 3. *Online softmax.* Write attention that reads keys and values in blocks of 4
#    and never holds more than `[t, 4]` logits: keep a running maximum, a
#    running denominator and a running numerator, and rescale them when the
#    maximum grows. It should equal `attend`. This is the core of
#    FlashAttention.
#
# ## Interview questions
#
# **Why is attention scaled by $1/\sqrt{h}$ and not by $1/h$?**
#
# <details><summary>Answer</summary>
#
# At initialization, query and key entries are about independent with variance
# 1, so the dot product has variance $h$ and standard deviation $\sqrt h$;
# dividing by $\sqrt h$ gives logits of variance 1 for every head size, and the
# softmax neither saturates nor is flat. With $1/h$ the logits would have a
# standard deviation of $1/\sqrt h$, and large heads would start with nearly
# uniform weights. ($1/h$ is what muP, arXiv:2203.03466, uses: after training,
# $q$ and $k$ are correlated and the dot product grows like $h$.) T5 has no
# scale at all, as its initial $W_q$ contains the factor.
#
# </details>
#
# **A model of 70B parameters serves texts of 32k tokens. What do you change so
# that more of them fit, and what does each change cost?**
#
# <details><summary>Answer</summary>
#
# Count first: bytes per token are $2\,l\,k\,h$ times the bytes of a number; 80
# layers, 8 heads of 128 in bfloat16 are 320 KiB a token and 10 GiB a text.
# Options: fewer key-value heads (GQA, MQA: needs training or uptraining,
# quality drops at one head); MLA (another architecture, extra FLOPs when
# absorbed); 8- or 4-bit caches (rounding error); sliding windows in some layers
# (no direct access to far tokens); sharing the cache of common prefixes (exact,
# helps only where prompts share them); paged memory (exact, removes
# fragmentation). A causal mask, FlashAttention or a faster GPU does not change
# the size of the cache.
#
# </details>
#
# ## In the package
#
# - {{moepeft.nn.attention.attend}} is the function above in JAX. It computes
#   logits in float32 also in bfloat16 models, masks with $-10^9$ so that a row
#   without any key stays finite, splits causal attention into blocks of queries
#   and so skips most of the masked half, and has dropout and Gemma's soft cap.
# - {{moepeft.nn.causal_attention.CausalAttention}} is the whole layer of
#   decoders: GQA, RoPE, query and key norms, cache.
#   {{moepeft.nn.attention.Attention}} is T5's, with cross-attention. Every
#   projection is a site where an adapter can act.
# - {{moepeft.nn.chunked_attention.attend}} is the online softmax of exercise 3
#   with gradients; {{moepeft.nn.dot_product_attention.attend}} calls JAX's
#   function, which is cuDNN's flash attention on suitable GPUs.
# - {{moepeft.inference.engine.kv_cache}} holds the cache of many requests at
#   once.
# - MLA is not there: no model family of the package uses it.
#
# Papers: attention 1706.03762, MQA 1911.02150, GQA 2305.13245, MLA 2405.04434,
# online softmax 1805.02867, memory-efficient attention 2112.05682,
# FlashAttention 2205.14135.
# %% [markdown] lang="zh"
# 多头注意力解码一步时，每读缓存的一个字节只做 1 次浮点运算。GPU
# 读一个字节的时间里可以做几百次浮点运算，所以它在等内存。GQA 和 MLA
# 提高了这个比值：这就是为什么它们不仅让缓存变小，也让生成变快。
#
# ## 练习
#
# 1. *滑动窗口。* 写 `window_mask(t, window)`，返回 bool `[t, t]`：token $t$
#    能看到自己和之前的 `window - 1` 个 token。与
#    `moepeft_attention.attention_mask(..., causal=True, window=window)` 比较。
#    经过 $l$ 层，信息最多能传多远？
# 2. *填充。* 长度为 5 和 9 的两段文本放在一个 batch 里，第一段右侧填充到
#    9。*key 掩码*（bool，`[b, 1, 1, s]`）使所有 query 都看不到填充。用 `attend`
#    验证：加上 key 掩码后，五个输出与单独计算这段文本时相等；
#    既没有因果掩码*也*没有 key 掩码时则不相等。如果掩码是因果的，还需要 key
#    掩码吗？
# 3. *Online softmax。* 写一个注意力，每次读 4 个 key 和 value，任何时候都只保存
#    `[t, 4]` 的 logits：维护当前最大值、当前分母和当前分子，
#    最大值变大时重新缩放。结果应与 `attend` 相等。这就是 FlashAttention
#    的核心。
#
# ## 面试题
#
# **为什么注意力除以 $\sqrt{h}$，而不是除以 $h$？**
#
# <details><summary>答案</summary>
#
# 初始化时，query 和 key 的分量近似独立、方差为 1，点积的方差是 $h$，标准差是
# $\sqrt h$；除以 $\sqrt h$ 后，无论头多大，logits 的方差都是 1，softmax
# 既不饱和也不过平。若除以 $h$，logits 的标准差是 $1/\sqrt h$，
# 大的头一开始就几乎是均匀权重。（muP，arXiv:2203.03466，用的正是 $1/h$：训练后
# $q$ 与 $k$ 相关，点积按 $h$ 增长。）T5 完全不缩放，因为它的初始 $W_q$
# 已包含这个因子。
#
# </details>
#
# **一个 70B 模型要服务 32k token 的文本。想让更多文本同时放进显存，你会改什么，
# 各有什么代价？**
#
# <details><summary>答案</summary>
#
# 先算：每个 token 的字节数是 $2\,l\,k\,h$ 乘以每个数的字节数；80 层、8 个 128
# 维的头、bfloat16，每个 token 320 KiB，一段文本 10 GiB。可选项：减少 key-value
# 头（GQA、MQA：需要训练或继续训练，只剩一个头时质量下降）；MLA（另一种结构，
# 吸收形式的计算量更大）；8 或 4 bit 缓存（舍入误差）；
# 部分层用滑动窗口（不能直接看到远处的 token）；共享公共前缀的缓存（精确，但只有
# prompt 有公共前缀时才有用）；分页内存（精确，消除碎片）。因果掩码、
# FlashAttention 或更快的 GPU 都不会改变缓存的大小。
#
# </details>
#
# ## 在 moepeft 中
#
# - {{moepeft.nn.attention.attend}} 就是上面函数的 JAX 版本。模型为 bfloat16 时
#   logits 也用 float32 计算；掩码用 $-10^9$，没有任何 key 的行也保持有限；
#   因果注意力按 query 分块，从而跳过被掩盖的大部分；另有 dropout 和 Gemma 的
#   soft cap。
# - {{moepeft.nn.causal_attention.CausalAttention}} 是 decoder 的整层：GQA、
#   RoPE、query 与 key 的 norm、缓存。{{moepeft.nn.attention.Attention}} 是 T5
#   的，含 cross-attention。每个投影都是可以放适配器的挂载点（site）。
# - {{moepeft.nn.chunked_attention.attend}} 是练习 3 的 online softmax，
#   支持梯度；{{moepeft.nn.dot_product_attention.attend}} 调用 JAX 的函数，
#   在合适的 GPU 上就是 cuDNN 的 flash attention。
# - {{moepeft.inference.engine.kv_cache}} 同时保存许多请求的缓存。
# - 代码库中没有 MLA：支持的模型家族都不用它。
#
# 论文：attention 1706.03762，MQA 1911.02150，GQA 2305.13245，MLA 2405.04434，
# online softmax 1805.02867，memory-efficient attention 2112.05682，
# FlashAttention 2205.14135。
# %% [markdown] lang="en" tags=["solution"]
# # Attention by hand: solutions
#
# ## Exercise 1
#
# A token sees `window - 1` tokens back; each layer adds as many, so that $l$
# layers reach $l\,(\text{window}-1)$ tokens back. The code checks this for four
# layers: an entry of the product of their masks is positive exactly where an
# output token depends on an input token.
# %% [markdown] lang="zh" tags=["solution"]
# # 手写注意力：答案
#
# ## 练习 1
#
# 一层中，token 能看到之前的 `window - 1` 个 token；每一层再加这么多，所以 $l$
# 层最远到 $l\,(\text{window}-1)$ 个 token 之前。代码对四层验证这一点：
# 把各层的掩码矩阵相乘，乘积中为正的元素恰好表示哪个输出 token 依赖哪个输入
# token。
# %% tags=["solution"]
def window_mask(t, window):
  distance = np.arange(t)[:, None] - np.arange(t)[None, :]
  return (distance >= 0) & (distance < window)


all_tokens = jnp.ones((1, 20), bool)
for window in (1, 3, 8):
  expected = moepeft_attention.attention_mask(
    all_tokens, all_tokens, causal=True, window=window
  )
  assert np.array_equal(window_mask(20, window), expected[0, 0])
depends = np.linalg.matrix_power(window_mask(20, 3).astype(int), 4) > 0
assert np.array_equal(depends, window_mask(20, 4 * (3 - 1) + 1))
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 2
#
# With a causal mask and padding on the right, real tokens never see padding,
# which comes after them: the key mask changes nothing for them. With padding on
# the left, or without a causal mask (an encoder), it is needed.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 2
#
# 掩码是因果的、填充在右侧时，真实 token 永远看不到排在其后的填充，key
# 掩码对它们没有影响。填充在左侧，或没有因果掩码（encoder）时，就需要 key 掩码。
# %% tags=["solution"]
q, k, v = rng.standard_normal((3, 2, 9, 4, 8))
is_token = np.arange(9) < np.array([[5], [9]])  # [b, s]
key_mask = is_token[:, None, None, :]
alone = attend(q[:1, :5], k[:1, :5], v[:1, :5])
assert np.allclose(attend(q, k, v, key_mask)[0, :5], alone[0])
assert not np.allclose(attend(q, k, v)[0, :5], alone[0])
causal = np.tril(np.ones((9, 9), bool))
assert np.allclose(
  attend(q, k, v, causal)[0, :5], attend(q, k, v, causal & key_mask)[0, :5]
)


# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 3
#
# For a block with logits $z$, the new maximum is $m'=\max(m,\max z)$; the old
# sums were made with $e^{-m}$, so they are multiplied by $e^{m-m'}$.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 3
#
# 对 logits 为 $z$ 的一块，新的最大值是 $m'=\max(m,\max z)$；旧的和是用 $e^{-m}$
# 算的，所以要乘以 $e^{m-m'}$。
# %% tags=["solution"]
def attend_in_blocks(q, k, v, size=4):
  """q [t, h]; k, v [s, h] -> [t, h]."""
  largest = np.full((len(q), 1), -np.inf)
  denominator, numerator = np.zeros((len(q), 1)), np.zeros(q.shape)
  for i in range(0, len(k), size):
    z = q @ k[i : i + size].T / np.sqrt(q.shape[-1])  # [t, size]
    now = np.maximum(largest, z.max(-1, keepdims=True))
    e, rescale = np.exp(z - now), np.exp(largest - now)
    denominator = denominator * rescale + e.sum(-1, keepdims=True)
    numerator = numerator * rescale + e @ v[i : i + size]
    largest = now
  return numerator / denominator


y = attend_in_blocks(q[0, :, 0], k[0, :, 0], v[0, :, 0])
assert np.allclose(y, attend(q, k, v)[0, :, 0])
chunked = package_attend(q, k, v, implementation='chunked')
assert np.abs(y - chunked[0, :, 0]).max() < 1e-5

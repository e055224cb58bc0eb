# SPDX-License-Identifier: Apache-2.0
# %% [markdown] lang="en"
# # MoV and MoLoRA by hand
#
# Two methods of Zadouri et al.
# ([arXiv:2309.05444](https://arxiv.org/abs/2309.05444)) make a mixture of
# experts so small that it can stand beside every frozen layer of a model: in
# MoLoRA an expert is a LoRA, in MoV it is one vector of (IA)³. This notebook
# writes both in a few lines of NumPy, finds the order of products in which they
# are cheap, and shows that the package computes the same numbers.
#
# About 60 minutes. Before it: notebooks 15 (LoRA), 16 ((IA)³) and 25 (mixture
# of experts).
#
# ## What you will understand
#
# - three ways to compute MoLoRA that give equal outputs, and what each of them
#   costs in bytes and operations;
# - why mixing parameters of LoRA experts is *not* the same as mixing their
#   outputs, and why for vectors it is;
# - what the router of MoV reads, and how the released code differs from the
#   text of the paper;
# - how many parameters both have, by formula and by `python -m moepeft.count`;
# - that a mixture of one expert is LoRA, or (IA)³.
# %% [markdown] lang="zh"
# # 手写 MoV 与 MoLoRA
#
# Zadouri 等人的两种方法（[arXiv:2309.05444](https://arxiv.org/abs/2309.05444)）
# 把混合专家做得足够小，可以放在模型每个冻结层的旁边：MoLoRA 的专家是一个 LoRA，
# MoV 的专家是 (IA)³ 的一个向量。本篇用几行 NumPy 写出二者，
# 找出代价小的乘法顺序，并验证 moepeft 得到相同的数值。
#
# 大约 60 分钟。先修：笔记 15（LoRA）、16（(IA)³）、25（混合专家）。
#
# ## 你将理解什么
#
# - MoLoRA 的三种算法，输出相等，而字节数和运算量不同；
# - 对 LoRA 专家，混合参数为什么*不*等于混合输出；对向量为什么相等；
# - MoV 的路由器读什么，官方代码与论文文字有何不同；
# - 二者各有多少参数：用公式，也用 `python -m moepeft.count`；
# - 只有一个专家的混合就是 LoRA 或 (IA)³。
# %%
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import moepeft
from moepeft.checkpoints.count_parameters import count
from moepeft.core.types import Context
from moepeft.models.t5 import model as t5
from moepeft.nn.linear import base_projection
from moepeft.peft.build import build

rng = np.random.default_rng(0)


def normal(*shape):
  return rng.normal(size=shape).astype(np.float32)


def softmax(z):
  z = np.exp(z - z.max(axis=-1, keepdims=True))
  return z / z.sum(axis=-1, keepdims=True)


# %% [markdown] lang="en"
# ## MoLoRA: the definition
#
# A frozen projection $f(x) = xW$ with $W [i, o]$, from width $i$ to width $o$,
# gets $e$ experts of rank $r$. Expert $j$ has $A_j [i, r]$ and $B_j [r, o]$,
# and a router $W_g [i, e]$ weights them for each of the $t$ tokens, the rows of
# $x$:
#
# $$y = xW + \frac{\alpha}{r} \sum_{j=1}^{e} p_j\, (x A_j) B_j, \qquad p =
# \mathrm{softmax}(x W_g).$$
#
# The second summand is the *term* that MoLoRA adds; $\alpha$ is a constant, 16
# in the released code. That code computes it as written: all experts' outputs,
# an array $[t, e, o]$, then their weighted sum.
# %% [markdown] lang="zh"
# ## MoLoRA 的定义
#
# 冻结投影 $f(x) = xW$（$W [i, o]$，从宽度 $i$ 到宽度 $o$）旁有 $e$ 个秩为 $r$
# 的专家。专家 $j$ 有 $A_j [i, r]$ 和 $B_j [r, o]$，路由器 $W_g [i, e]$ 为 $t$
# 个 token（$x$ 的各行）分别给出权重：
#
# $$y = xW + \frac{\alpha}{r} \sum_{j=1}^{e} p_j\, (x A_j) B_j, \qquad p =
# \mathrm{softmax}(x W_g).$$
#
# 第二项就是 MoLoRA 的*附加项*；$\alpha$ 是常数，官方代码取 16。
# 官方代码照定义计算：先得到所有专家的输出，即数组 $[t, e, o]$，再加权求和。
# %%
T, IN, OUT, E, R, ALPHA = 7, 12, 15, 4, 3, 16.0
x, w = normal(T, IN), normal(IN, OUT)
a, b = normal(IN, E, R), normal(E, R, OUT)
w_g = normal(IN, E)
p = softmax(x @ w_g)


def by_outputs(x, p):
  outputs = np.stack([x @ a[:, j] @ b[j] for j in range(E)], axis=1)
  return ALPHA / R * np.einsum('te,teo->to', p, outputs)


term = by_outputs(x, p)
print('outputs of all experts:', (T, E, OUT), ' their sum:', term.shape)
# %% [markdown] lang="en"
# ## Mixing in rank space
#
# $p_j$ is a number, so it can stand anywhere in the product:
# $p_j (xA_j) B_j = (p_j\, xA_j) B_j$. Stack the experts: $A$ as one matrix
# $[i, er]$, $B$ as one matrix $[er, o]$. Then
#
# $$z = xA \in [t, e, r], \qquad z'_{tjk} = p_{tj} z_{tjk}, \qquad \text{term} =
# \mathrm{reshape}(z', [t, er])\; B.$$
#
# Here $t$, $j$ and $k$ are the indices of token, expert and column of the rank,
# and the factor $\alpha / r$ is left out. Two matrix products and a scaling.
# The sum over experts *and* over the rank is
# the inner sum of the second product: nothing of shape $[t, e, o]$ exists. In
# other words, MoLoRA is one LoRA of rank $er$ with a diagonal matrix between
# $A$ and $B$ that depends on the token.
# %% [markdown] lang="zh"
# ## 在秩空间里混合
#
# $p_j$ 是一个数，放在乘积的哪里都行：$p_j (xA_j) B_j = (p_j\, xA_j) B_j$。
# 把专家叠起来：$A$ 看作一个矩阵 $[i, er]$，$B$ 看作 $[er, o]$。于是
#
# $$z = xA \in [t, e, r], \qquad z'_{tjk} = p_{tj} z_{tjk}, \qquad \text{term} =
# \mathrm{reshape}(z', [t, er])\; B.$$
#
# 这里 $t$、$j$、$k$ 分别是 token、专家和秩的下标，系数 $\alpha / r$ 从略。
# 只有两个矩阵乘和一次缩放。对专家求和与对秩求和，合并为第二个矩阵乘的内部求和：
# 任何时候都没有形状 $[t, e, o]$ 的数组。换句话说，MoLoRA 是一个秩为 $er$ 的
# LoRA，$A$ 与 $B$ 之间夹着一个随 token 变化的对角矩阵。
# %%


def in_rank_space(x, p):
  z = (x @ a.reshape(IN, E * R)).reshape(T, E, R)
  z = z * (ALPHA / R * p)[:, :, None]
  return z.reshape(T, E * R) @ b.reshape(E * R, OUT)


def by_merged_kernel(x, p):
  kernels = ALPHA / R * np.einsum('te,ier,ero->tio', p, a, b)
  return np.einsum('ti,tio->to', x, kernels)


for function in (in_rank_space, by_merged_kernel):
  gap = np.abs(function(x, p) - term).max() / np.abs(term).max()
  print(f'{function.__name__:17} relative difference {gap:.1e}')
  # Float32 has 7 digits; the sums have fewer than 200 terms.
  assert gap < 1e-5, function.__name__
# %% [markdown] lang="en"
# ## Bytes and operations
#
# The largest array that each form needs beside $x$ and $y$, for $t$ tokens:
#
# | form | largest array | operations |
# | --- | --- | --- |
# | outputs | $t\,e\,o$ | $2ter(i+o) + 2teo$ |
# | rank space | $t\,e\,r$ | $2ter(i+o) + ter$ |
# | a kernel for each token | $t\,i\,o$ | $2t\,e\,r\,i\,o$ and more |
#
# The operations of the first two differ little: by 18 % in the example below.
# The bytes differ by a factor of $o/r$. In training, the array is kept for the
# backward pass, at each adapted projection. The example is a feed-forward
# projection of T5 large, $i = 1024$, $o = 2816$ and $r = 4$, with the paper's
# batch of 32 rows of 1,024 tokens, in bfloat16 (2 bytes).
# %% [markdown] lang="zh"
# ## 字节数与运算量
#
# 除 $x$ 和 $y$ 之外，每种算法需要的最大数组（$t$ 个 token）：
#
# | 算法 | 最大数组 | 运算量 |
# | --- | --- | --- |
# | 先算输出 | $t\,e\,o$ | $2ter(i+o) + 2teo$ |
# | 秩空间 | $t\,e\,r$ | $2ter(i+o) + ter$ |
# | 每个 token 一个权重矩阵 | $t\,i\,o$ | $2t\,e\,r\,i\,o$ 以上 |
#
# 前两种的运算量相差不大（下例中为 18%），字节数却相差 $o/r$ 倍。训练时，
# 这个数组要为反向传播保留，而且每个被适配的投影都有一个。以 T5 large
# 的前馈投影为例，$i = 1024$、$o = 2816$、$r = 4$，论文的 batch 为 32 行、每行
# 1,024 个 token，bfloat16（2 字节）。
# %%
tokens, d_model, ffn, rank = 32 * 1024, 1024, 2816, 4
experts = np.array([1, 2, 5, 10, 15, 30, 60])
gigabytes = {
  'outputs [t, e, o]': 2 * tokens * experts * ffn / 1e9,
  'rank space [t, e, r]': 2 * tokens * experts * rank / 1e9,
}
fig, ax = plt.subplots(figsize=(5, 2.6))
for name, values in gigabytes.items():
  ax.loglog(experts, values, marker='o', label=name)
ax.set(xlabel='experts', ylabel='GB, one projection')
ax.legend()
fig.tight_layout()
plt.show()
ten = list(experts).index(10)
print({name: round(float(v[ten]), 4) for name, v in gigabytes.items()})
assert round(gigabytes['outputs [t, e, o]'][ten], 2) == 1.85
# %% [markdown] lang="en"
# Does XLA perhaps remove the large array by itself? `memory_analysis` of a
# compiled function has the bytes of its temporary arrays. We compile the
# gradient of both forms, for 512 tokens. The first form needs about twice the
# bytes of $[t, e, o]$: the outputs and their gradient.
# %% [markdown] lang="zh"
# XLA 会不会自己消去这个大数组？编译后的函数有 `memory_analysis`，
# 给出临时数组的字节数。我们为 512 个 token 编译两种算法的梯度。
# 第一种需要约两倍于 $[t, e, o]$ 的字节：各专家的输出及其梯度。
# %%
N, WIDE_I, WIDE_O, MANY = 512, 64, 512, 10


def outputs_jax(x, a, b, p):
  return jnp.einsum('te,teo->to', p, jnp.einsum('ti,ier,ero->teo', x, a, b))


def rank_space_jax(x, a, b, p):
  z = jnp.einsum('ti,ier->ter', x, a) * p[:, :, None]
  return z.reshape(len(x), -1) @ b.reshape(-1, b.shape[-1])


shapes = [
  jax.ShapeDtypeStruct(shape, jnp.float32)
  for shape in ((N, WIDE_I), (WIDE_I, MANY, 4), (MANY, 4, WIDE_O), (N, MANY))
]
temporary = {}
for form in (outputs_jax, rank_space_jax):
  loss = lambda *arrays, form=form: jnp.sum(form(*arrays) ** 2)  # noqa: E731
  compiled = jax.jit(jax.grad(loss, argnums=(1, 2, 3))).lower(*shapes).compile()
  temporary[form.__name__] = compiled.memory_analysis().temp_size_in_bytes
  print(
    f'{form.__name__:15} {temporary[form.__name__] / 1e6:8.2f} MB temporary'
  )
print(f'[t, e, o] would be {4 * N * MANY * WIDE_O / 1e6:.2f} MB')
assert temporary['outputs_jax'] > 3 * temporary['rank_space_jax']
# %% [markdown] lang="en"
# ## Equal to the package
#
# In the package a method is a string, such as `molora(experts=4, rank=3)`.
# `build` turns it into Flax modules for the *sites* of a model, the places
# where an adapter may act. We take the module at the encoder's query
# projection, and give it our arrays and a frozen layer of our own. There $W$
# has the shape $[d, n, h]$ with $n$ heads of size $h$, so we reshape ours:
# $d = i$ and $n h = o$. The string leaves `alpha` at its default, 16.
# %% [markdown] lang="zh"
# ## 与 moepeft 相等
#
# moepeft 用字符串表示方法，例如 `molora(experts=4, rank=3)`。`build` 把它变成
# Flax 模块，放到模型的各个 *site*（适配器可以作用的位置）。取编码器 query
# 投影处的模块，把我们的数组和自己的冻结层交给它。那里 $W$ 的形状是
# $[d, n, h]$，即 $n$ 个大小为 $h$ 的头，所以要把我们的 $W$ 变形：$d = i$，
# $n h = o$。字符串中没有写 `alpha`，默认值为 16。
# %%
sites = t5.sites(t5.config('tiny'))
HEADS = 3


def adapter(method, site, semantics='official'):
  """The module of a method at one site."""
  (module,) = build(method, sites, semantics).adapter_map.at(site)
  return module


def call(module, tree, layer, x):
  return np.asarray(module.apply({'peft': tree}, layer, x[None], Context()))[0]


by_heads = w.reshape(IN, HEADS, -1)
query = base_projection('btd,dnh->btnh', by_heads, jnp.float32)
molora = adapter(f'molora(experts={E}, rank={R})', 'encoder/self/q')
tree = {
  'a': a,
  'b': b.reshape(E, R, HEADS, -1),
  'router': {'kernel': w_g},
}
theirs = call(molora, tree, query, x).reshape(T, OUT)
ours = x @ w + in_rank_space(x, p)
assert np.abs(theirs - ours).max() < 1e-5 * np.abs(ours).max(), 'alpha is 16'
print('largest difference', np.abs(theirs - ours).max())
# %% [markdown] lang="en"
# ## At the first step
#
# $B$ starts at zero, so the term is zero and the model computes its base's
# function. What is the first gradient? For one token (a row $x$) with the
# gradient $g = \partial L/\partial y$ at the output, that of $B_j$ is
# $\frac{\alpha}{r} p_j (xA_j)^\top g$, summed over the tokens; those of $A_j$
# and of $p_j$ have the factor $B_j = 0$. So in the first step **only $B$
# changes**. The experts become different because their random $A_j$ are, and
# because the random router gives them different weights.
# %% [markdown] lang="zh"
# ## 第一步
#
# $B$ 从零开始，所以附加项为零，模型就是基座的函数。第一次的梯度是什么？对单个
# token（行向量 $x$），设损失对输出的梯度为 $g = \partial L/\partial y$，则
# $B_j$ 的梯度是 $\frac{\alpha}{r} p_j (xA_j)^\top g$，再对 token 求和；$A_j$ 和
# $p_j$ 的梯度含因子 $B_j = 0$。所以第一步**只有 $B$ 更新**。
# 专家之间的差别来自随机的 $A_j$，以及随机路由器给出的不同权重。
# %%
target = normal(T, HEADS, OUT // HEADS)


def error(tree, module, layer):
  y = module.apply({'peft': tree}, layer, x[None], Context())
  return jnp.sum((y[0] - target) ** 2)


def norms(gradient):
  flat = jax.tree_util.tree_leaves_with_path(gradient)
  return {
    jax.tree_util.keystr(path): float(jnp.linalg.norm(leaf))
    for path, leaf in flat
  }


at_start = tree | {'b': np.zeros_like(tree['b'])}
unadapted = np.asarray(query(x[None]))[0]
assert (call(molora, at_start, query, x) == unadapted).all(), 'B is zero'
sizes = norms(jax.grad(error)(at_start, molora, query))
print(sizes)
assert sizes["['b']"] > 1 and sizes["['a']"] == 0
assert sizes["['router']['kernel']"] == 0, 'B is zero, so p does nothing yet'
# %% [markdown] lang="en"
# ## What is not equal: mixing the parameters
#
# A tempting shortcut is to merge the experts first, $\bar A = \sum_j p_j A_j$
# and $\bar B = \sum_j p_j B_j$, and to apply one LoRA $\bar A \bar B$. It is
# another function: the product of two sums has the cross terms
# $p_j p_k A_j B_k$. (SMEAR merges parameters on purpose; `combine='parameters'`
# in the package.)
# %% [markdown] lang="zh"
# ## 什么不相等：混合参数
#
# 一个诱人的捷径是先合并专家，$\bar A = \sum_j p_j A_j$、
# $\bar B = \sum_j p_j B_j$，再作用一个 LoRA $\bar A \bar B$。这是另一个函数：
# 两个和的乘积含有交叉项 $p_j p_k A_j B_k$。（SMEAR 有意合并参数；在 moepeft
# 中是 `combine='parameters'`。）
# %%


def by_parameters(x, p):
  z = np.einsum('ti,ier,te->tr', x, a, p)
  return ALPHA / R * np.einsum('tr,ero,te->to', z, b, p)


gap = np.abs(by_parameters(x, p) - term).max() / np.abs(term).max()
print(f'relative difference {gap:.2f}')
assert gap > 0.05, 'these must differ'
# %% [markdown] lang="en"
# ## MoV: a mixture of vectors
#
# (IA)³ multiplies an activation $f(x)$ by a learned vector $l$, ones at first.
# MoV has $e$ vectors and a router. Here merging the parameters **is** mixing
# the outputs, because the output is linear in $l$ and there is one factor only:
#
# $$\sum_j p_j\, (f(x) \odot l_j) = f(x) \odot \Bigl(\sum_j p_j l_j\Bigr).$$
#
# The paper calls it soft merging: first one vector for the token, then one
# multiplication of the activation, of width $o$. The left side would build
# $[t, e, o]$ again.
#
# The vectors act at three places: on keys, on values, and on the hidden
# activation of the feed-forward. Text and released code differ in what the
# router reads at keys and values. In the code, the keys are $[t, n, h]$, the
# router's kernel is $[h, e]$, and *each head of each token has weights of its
# own*, from one router that the heads share. The paper's text has one router on
# the whole width, with a kernel $[n h, e]$. The package calls them
# `reads='heads'` (semantics `official`) and `reads='output'` (`paper`). Both
# read the activation that is then scaled, not the layer's input.
# %% [markdown] lang="zh"
# ## MoV：向量的混合
#
# (IA)³ 把激活 $f(x)$ 乘以一个学到的向量 $l$，初始全为 1。MoV 有 $e$
# 个向量和一个路由器。这里合并参数**就是**混合输出，因为输出对 $l$ 是线性的，
# 而且只有一个因子：
#
# $$\sum_j p_j\, (f(x) \odot l_j) = f(x) \odot \Bigl(\sum_j p_j l_j\Bigr).$$
#
# 论文称之为软合并（soft merging）：先为 token 得到一个向量，再与宽度为 $o$
# 的激活做一次乘法。左边的写法又会构造 $[t, e, o]$。
#
# 向量作用于三处：键、值、前馈的隐藏激活。
# 论文文字与官方代码的差别在于路由器在键和值处读什么。代码里键的形状是
# $[t, n, h]$，路由器的权重矩阵（kernel）为 $[h, e]$，*每个 token
# 的每个头有自己的权重*，各头共用一个路由器。
# 论文文字则是在整个宽度上用一个路由器，kernel 为 $[n h, e]$。moepeft 分别称为
# `reads='heads'`（语义 `official`）与 `reads='output'`（`paper`）。
# 二者读的都是随后要缩放的激活，而不是该层的输入。
# %%
H = OUT // HEADS
vectors = 1 + 0.3 * normal(E, HEADS, H)
kernels = {'official': normal(H, E), 'paper': normal(OUT, E)}
keys = (x @ w).reshape(T, HEADS, H)


def mov(keys, vectors, kernel, semantics):
  if semantics == 'official':
    weights = softmax(keys @ kernel)
    scale = np.einsum('tne,enh->tnh', weights, vectors)
  else:
    weights = softmax(keys.reshape(T, OUT) @ kernel)
    scale = np.einsum('te,enh->tnh', weights, vectors)
  return keys * scale


for semantics, kernel in kernels.items():
  module = adapter(f'mov(experts={E})', 'encoder/self/k', semantics)
  tree = {'scale': vectors, 'router': {'kernel': kernel}}
  theirs = call(module, tree, query, x)
  ours = mov(keys, vectors, kernel, semantics)
  print(f'{semantics:8} reads {module.reads!r}, kernel {kernel.shape}')
  assert np.abs(theirs - ours).max() < 1e-5 * np.abs(ours).max(), semantics

mixed_late = sum(
  softmax(keys @ kernels['official'])[..., j, None] * keys * vectors[j]
  for j in range(E)
)
ours = mov(keys, vectors, kernels['official'], 'official')
assert np.abs(mixed_late - ours).max() < 1e-5, 'soft merging is exact'
# %% [markdown] lang="en"
# MoV starts at the base's function too: all vectors are ones, and weights that
# sum to one give ones. Here, too, one part has no gradient at first: while all
# $l_j$ are equal, the mixed vector does not depend on $p$, so the **router**
# has a zero gradient (but for rounding). For each token, the vectors get $p_j$
# times the same gradient; only the differences between the $p_j$ of the random
# router make them different.
#
# With top-k *without* renormalization the weights sum to less than one, and the
# model does not start at the base's function. For top-1 of $e$ experts, keys,
# values and activations are multiplied by about $1/e$.
# %% [markdown] lang="zh"
# MoV 同样从基座的函数出发：所有向量为 1，权重之和为 1，混合后还是 1。
# 这里也有一处最初没有梯度：只要所有 $l_j$ 相等，混合向量就不依赖 $p$，
# 所以**路由器**的梯度为零（只剩舍入误差）。对每个 token，
# 各向量得到的是同一梯度的 $p_j$ 倍；只有随机路由器给出的 $p_j$
# 之间的差别使它们开始分化。
#
# 若用*不*归一化的 top-k，权重之和小于 1，模型就不再从基座的函数出发。对 $e$
# 个专家的 top-1，键、值和激活都被乘以约 $1/e$。
# %%
ones = np.ones_like(vectors)
small = {'kernel': 0.02 * kernels['official']}
tree = {'scale': ones, 'router': small}
module = adapter(f'mov(experts={E})', 'encoder/self/k')
sizes = norms(jax.grad(error)(tree, module, query))
print(sizes)
assert sizes["['scale']"] > 1
# Zero but for rounding of sum p = 1.
assert sizes["['router']['kernel']"] < 1e-4 * sizes["['scale']"]

for renormalize in (True, False):
  text = f'mov(experts={E}, router=topk(k=1, renormalize={renormalize}))'
  # One routing for all heads here, so that the ratio is one number a token.
  sparse = adapter(text, 'encoder/self/k', 'paper')
  kernel = {'kernel': 0.02 * kernels['paper']}
  y = call(sparse, {'scale': ones, 'router': kernel}, query, x)
  ratio = float(np.median(y / keys))
  print(f'top-1, renormalize={renormalize!s:5} scales the keys by {ratio:.3f}')
  assert abs(ratio - 1) < 1e-3 if renormalize else ratio < 2 / E
# %% [markdown] lang="en"
# ## One expert
#
# The softmax of one logit is 1, so a mixture of one expert is the expert, and
# its router has no effect. This is a good test of any implementation, and it
# shows the meaning of $\alpha$ and $r$: MoLoRA's rank is that of *one* expert,
# and so is its scale $\alpha/r$.
# %% [markdown] lang="zh"
# ## 一个专家
#
# 单个 logit 的 softmax 是 1，所以一个专家的混合就是该专家本身，路由器不起作用。
# 这对任何实现都是好测试，也说明了 $\alpha$ 与 $r$ 的含义：MoLoRA
# 的秩是*单个*专家的秩，缩放 $\alpha/r$ 也是。
# %%
one_a, one_b = a[:, 0], b[0].reshape(R, HEADS, H)
lora = adapter(f'lora(rank={R})', 'encoder/self/q')
mixture = adapter(f'molora(experts=1, rank={R})', 'encoder/self/q')
alone = call(lora, {'a': one_a, 'b': one_b}, query, x)
router = {'kernel': normal(IN, 1)}
tree = {'a': one_a[:, None], 'b': one_b[None], 'router': router}
mixed = call(mixture, tree, query, x)
assert np.abs(alone - mixed).max() < 1e-5 * np.abs(alone).max()
assert np.abs(alone.reshape(T, OUT) - x @ w).max() > 1, 'the term is not zero'

ia3 = adapter('ia3', 'encoder/self/k')
mixture = adapter('mov(experts=1)', 'encoder/self/k')
alone = call(ia3, {'scale': vectors[0]}, query, x)
tree = {'scale': vectors[:1], 'router': {'kernel': normal(H, 1)}}
assert np.abs(alone - call(mixture, tree, query, x)).max() < 1e-5
# %% [markdown] lang="en"
# ## Counting parameters
#
# At a projection $i \to o$, a LoRA has $r(i + o)$ parameters and MoLoRA
# $e\,r(i+o)$ and a router of $e\,i$. In the released code, MoV has at a key or
# value projection $e\,o$ and a router of $e\,h$, and at the feed-forward's
# activation, of width $f$, $e\,f$ and a router of $e\,f$. T5's feed-forward is
# gated: $\mathrm{gelu}(x W_0) \odot (x W_1)$, then $W_o$, whose sites are
# `wi_0`, `wi_1` and `wo`. The released code adapts these sites of T5:
#
# - LoRA and MoLoRA: q, k, v, o of every attention, and `wi_0` and `wo` of every
#   feed-forward (not `wi_1`);
# - (IA)³ and MoV: k and v of every attention, and the activation of `wi_0`.
#
# An encoder layer has one attention, a decoder layer two (self and cross). In
# the code, `d` is the model's width and `k`, $n h$, the width of all heads. The
# cell prints per cent of the base's parameters: the base is tiny, so that ten
# experts of MoLoRA are half of it.
# %% [markdown] lang="zh"
# ## 参数计数
#
# 在投影 $i \to o$ 处，LoRA 有 $r(i + o)$ 个参数，MoLoRA 有 $e\,r(i+o)$，
# 外加路由器 $e\,i$。官方代码中，MoV 在键或值投影处有 $e\,o$ 和路由器 $e\,h$；
# 在宽度为 $f$ 的前馈激活处有 $e\,f$ 和路由器 $e\,f$。T5 的前馈带门控：
# $\mathrm{gelu}(x W_0) \odot (x W_1)$，再乘 $W_o$，对应的位置是 `wi_0`、`wi_1`
# 和 `wo`。官方代码在 T5 的这些位置放适配器：
#
# - LoRA 与 MoLoRA：每个注意力的 q、k、v、o，以及每个前馈的 `wi_0` 和 `wo`（没有
#   `wi_1`）；
# - (IA)³ 与 MoV：每个注意力的 k 和 v，以及 `wi_0` 之后的激活。
#
# 编码器层有一个注意力，解码器层有两个（自注意力和交叉注意力）。代码中 `d`
# 为模型宽度，`k` 即 $n h$，为所有头的总宽度。打印的是占基座参数量的百分比：
# 基座很小，所以 MoLoRA 的十个专家约为它的一半。
# %%


def lora_count(c, experts, rank, router):
  """MoLoRA's parameters; with one expert and no router, LoRA's."""
  d, k, f = c.d_model, c.heads * c.head_dim, c.ffn
  places = [(d, k)] * 3 + [(k, d)]
  feed_forward = [(d, f), (f, d)]
  pairs = (places + feed_forward) * c.encoder_layers + (
    2 * places + feed_forward
  ) * c.decoder_layers
  return sum(experts * (rank * (i + o) + router * i) for i, o in pairs)


def vector_count(c, experts, router):
  k, f = c.heads * c.head_dim, c.ffn
  attentions = c.encoder_layers + 2 * c.decoder_layers
  feed_forwards = c.encoder_layers + c.decoder_layers
  in_attention = 2 * attentions * (k + router * c.head_dim)
  return experts * (in_attention + feed_forwards * (f + router * f))


config = moepeft.load_config('configs/molora_t5.py')
tiny = moepeft.load('package:t5_tiny').loaded.model.config
formulas = {
  'lora(rank=4)': lora_count(tiny, 1, 4, 0),
  'molora(experts=10, rank=4)': lora_count(tiny, 10, 4, 1),
  'ia3': vector_count(tiny, 1, 0),
  'mov(experts=10)': vector_count(tiny, 10, 1),
}
for config.method, formula in formulas.items():
  counts = count(config)
  print(f'{config.method:27} {formula:9,} {counts["percent"]:8.3f} %')
  assert counts['peft'] == formula, config.method
# %% [markdown] lang="en"
# The same from the command line. It counts from shapes and allocates nothing,
# so it works for the paper's models of 11 billion parameters as well (notebook
# 29 does that).
# %% [markdown] lang="zh"
# 命令行给出同样的结果。它只看形状，不分配内存，所以对论文中 110
# 亿参数的模型也能用（见笔记 29）。
# %%
command = [
  *(sys.executable, '-m', 'moepeft.count', '--noflops'),
  '--config=configs/molora_t5.py:experts=3,rank=2',
]
output = subprocess.run(command, capture_output=True, text=True, check=True)
counts = json.loads(output.stdout)
print({key: counts[key] for key in ('method', 'params', 'peft', 'percent')})
assert counts['peft'] == lora_count(tiny, 3, 2, 1)
# %% [markdown] lang="en"
# ## Exercises
#
# 1. *A budget.* For T5 large (`t5.config('large')`), find the rank at which a
#    LoRA has about the parameters of `molora(experts=10, rank=4)`. How many of
#    MoLoRA's parameters are routers?
# 2. *When can it be merged?* For a router that gives all tokens the same
#    weights, write MoLoRA as one kernel $W'$ and check it on data. Then show
#    with two tokens that no kernel exists for our router `w_g`.
# 3. *Cross terms.* Expand $\bar A \bar B$ into a double sum over experts and
#    compute it by an einsum. Show that the package's
#    `mixture(expert=lora(rank=3), experts=4, combine='parameters')` computes
#    this function.
#
# Solutions are in `solutions/`.
#
# ## Interview questions
#
# **Why can a LoRA be merged into the base's weights, and a MoLoRA not? What
# does this mean for serving?**
#
# <details><summary>Answer</summary>
#
# LoRA adds $\frac{\alpha}{r} xAB$, a linear map that is the same for all
# tokens, so
# $W + \frac{\alpha}{r}AB$ computes the same. MoLoRA's map depends on the token
# through $p(x)$; it is not linear in $x$, and no fixed kernel has this
# function. A served MoLoRA therefore pays its two thin products and a router at
# each site and token. In exchange the frozen base stays shared, and one batch
# can mix requests for different adapters.
#
# </details>
#
# **A colleague reports that MoLoRA needs ten times the activation memory of
# LoRA. Where do you look?**
#
# <details><summary>Answer</summary>
#
# At the order of the products. Computing each expert's output and then the
# weighted sum keeps $[t, e, o]$ for the backward pass. Weighting $xA$ instead
# keeps $[t, e, r]$, smaller by $o/r$, which is hundreds. The result is the
# same, since the weights are numbers and the sum over experts can be part of
# the second product.
#
# </details>
#
# ## In the package
#
# - {{moepeft.peft.mixture.Mixture}}: a mixture of any expert form;
#   {{moepeft.peft.methods.presets.MOLORA}} and
#   {{moepeft.peft.methods.presets.MOV}} are presets of it, not modules of their
#   own.
# - {{moepeft.peft.methods.lora.Lora.mix}} mixes in rank space; for sparse
#   routers it also has a path that sorts tokens by expert.
#   {{moepeft.peft.methods.ia3.Ia3.mix}} merges vectors, in float32 as the
#   released code does.
# - {{moepeft.nn.low_rank_matmul.low_rank_matmul}}: the thin products with a
#   gradient that is fast on CPU.
# - {{moepeft.checkpoints.count_parameters.count}} counts from shapes, with
#   layers that have unlike numbers of experts.
# - Papers: MoV and MoLoRA [arXiv:2309.05444](https://arxiv.org/abs/2309.05444),
#   LoRA [arXiv:2106.09685](https://arxiv.org/abs/2106.09685), (IA)³
#   [arXiv:2205.05638](https://arxiv.org/abs/2205.05638), SMEAR
#   [arXiv:2306.03745](https://arxiv.org/abs/2306.03745).
# %% [markdown] lang="zh"
# ## 练习
#
# 1. *预算。* 对 T5 large（`t5.config('large')`），求 LoRA 的秩，
#    使其参数量约等于 `molora(experts=10, rank=4)`。MoLoRA
#    的参数中有多少是路由器？
# 2. *何时可以合并？* 若路由器对所有 token 给出相同权重，把 MoLoRA
#    写成一个权重矩阵 $W'$ 并用数据验证。再用两个 token 说明：对我们的路由器
#    `w_g`，这样的矩阵不存在。
# 3. *交叉项。* 把 $\bar A \bar B$ 展开为对专家的双重求和，用 einsum 计算。验证
#    moepeft 的 `mixture(expert=lora(rank=3), experts=4, combine='parameters')`
#    正是这个函数。
#
# 答案在 `solutions/`。
#
# ## 面试题
#
# **LoRA 为什么能合并进基座权重，而 MoLoRA 不能？这对部署意味着什么？**
#
# <details><summary>答案</summary>
#
# LoRA 加的是 $\frac{\alpha}{r} xAB$，对所有 token 都是同一个线性映射，所以
# $W + \frac{\alpha}{r}AB$ 算出同样的结果。MoLoRA 的映射通过 $p(x)$ 依赖 token；
# 它对 $x$ 不是线性的，没有一个固定的权重矩阵等于它。因此部署 MoLoRA 时，
# 每个位置、每个
# token 都要付出两个窄矩阵乘和一个路由器的代价。好处是冻结的基座仍可共享，一个
# batch 里可以混合不同适配器的请求。
#
# </details>
#
# **同事说 MoLoRA 的激活内存是 LoRA 的十倍。你会检查哪里？**
#
# <details><summary>答案</summary>
#
# 检查乘法顺序。先算每个专家的输出再加权求和，会为反向传播保留 $[t, e, o]$。
# 改为对 $xA$ 加权，只保留 $[t, e, r]$，小 $o/r$ 倍，也就是几百倍。结果相同，
# 因为权重只是数，而对专家的求和可以并入第二个矩阵乘。
#
# </details>
#
# ## 在 moepeft 中
#
# - {{moepeft.peft.mixture.Mixture}}：任意专家形式的混合；
#   {{moepeft.peft.methods.presets.MOLORA}} 与
#   {{moepeft.peft.methods.presets.MOV}} 只是它的预设，没有自己的模块。
# - {{moepeft.peft.methods.lora.Lora.mix}} 在秩空间混合；
#   对稀疏路由器还有按专家排序 token 的路径。
#   {{moepeft.peft.methods.ia3.Ia3.mix}} 合并向量，与官方代码一样用 float32。
# - {{moepeft.nn.low_rank_matmul.low_rank_matmul}}：窄矩阵乘，梯度在 CPU
#   上很快。
# - {{moepeft.checkpoints.count_parameters.count}}：只看形状计数，
#   也支持各层专家数不同的情形。
# - 论文：MoV 与 MoLoRA [arXiv:2309.05444](https://arxiv.org/abs/2309.05444)、
#   LoRA [arXiv:2106.09685](https://arxiv.org/abs/2106.09685)、(IA)³
#   [arXiv:2205.05638](https://arxiv.org/abs/2205.05638)、SMEAR
#   [arXiv:2306.03745](https://arxiv.org/abs/2306.03745)。
# %% [markdown] lang="en" tags=["solution"]
# # MoV and MoLoRA: solutions
#
# ## Exercise 1
# %% [markdown] lang="zh" tags=["solution"]
# # MoV 与 MoLoRA：答案
#
# ## 练习 1
# %% tags=["solution"]
large = t5.config('large')
target_count = lora_count(large, 10, 4, 1)
experts_alone = lora_count(large, 10, 4, 0)
equal_rank = min(
  range(1, 100),
  key=lambda rank: abs(lora_count(large, 1, rank, 0) - target_count),
)
at_equal = lora_count(large, 1, equal_rank, 0)
print(f'MoLoRA {target_count:,}, of which routers', end=' ')
print(f'{target_count - experts_alone:,}; LoRA of rank {equal_rank}')
# Without routers the rank would be e r = 40.
assert equal_rank > 40 and abs(at_equal / target_count - 1) < 0.02
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 2
#
# With constant $p$, the map is $W' = W + \frac{\alpha}{r}\sum_j p_j A_j B_j$.
# For a linear map, the outputs of two tokens and of their sum satisfy
# $y(x_1 + x_2) = y(x_1) + y(x_2)$; with our router they do not.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 2
#
# $p$ 为常数时，映射是 $W' = W + \frac{\alpha}{r}\sum_j p_j A_j B_j$。
# 线性映射满足 $y(x_1 + x_2) = y(x_1) + y(x_2)$；用我们的路由器时不满足。
# %% tags=["solution"]
constant = np.tile(softmax(normal(1, E)), (T, 1))
merged = w + ALPHA / R * np.einsum('e,ier,ero->io', constant[0], a, b)
direct = x @ w + in_rank_space(x, constant)
assert np.abs(x @ merged - direct).max() < 1e-5 * np.abs(direct).max()


def routed(row):
  rows = np.tile(row, (T, 1))
  return (rows @ w + in_rank_space(rows, softmax(rows @ w_g)))[0]


gap = np.abs(routed(x[0] + x[1]) - routed(x[0]) - routed(x[1])).max()
print(f'y(x1 + x2) - y(x1) - y(x2): {gap:.2f}')
assert gap > 0.1 * np.abs(routed(x[0])).max()
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 3
#
# $\bar A\bar B = \sum_{j,k} p_j p_k A_j B_k$: all pairs of an $A$ and a $B$.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 3
#
# $\bar A\bar B = \sum_{j,k} p_j p_k A_j B_k$：所有 $A$ 与 $B$ 的配对。
# %% tags=["solution"]
pairs = ALPHA / R * np.einsum('ti,te,tg,ier,gro->to', x, p, p, a, b)
assert np.abs(pairs - by_parameters(x, p)).max() < 1e-4 * np.abs(pairs).max()
text = f"mixture(expert=lora(rank={R}), experts={E}, combine='parameters')"
soft = adapter(text, 'encoder/self/q')
tree = {'a': a, 'b': b.reshape(E, R, HEADS, H), 'router': {'kernel': w_g}}
theirs = call(soft, tree, query, x).reshape(T, OUT)
assert np.abs(theirs - (x @ w + pairs)).max() < 1e-4 * np.abs(theirs).max()

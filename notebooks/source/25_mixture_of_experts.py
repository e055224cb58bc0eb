# SPDX-License-Identifier: Apache-2.0
# %% [markdown] lang="en"
# # Mixture of experts, from nothing
#
# A mixture-of-experts (MoE) layer holds several feed-forward networks, the
# *experts*, and a small *router* that gives each token a weight for each
# expert. This notebook builds the layer with NumPy, first dense, then sparse;
# it lets the router collapse, and repairs it in two ways. Every piece is
# compared with the package.
#
# About 60 minutes. Before it: notebooks 01 (softmax, gradients), 06
# (attention), 08 (the Transformer block) and, for one example, 15 (LoRA).
#
# ## What you will understand
#
# - why a router's weight must multiply the expert's output, and what top-k with
#   and without renormalization does to the size of the output;
# - how tokens are sorted by expert, so that a sparse layer costs k experts and
#   not e;
# - what collapse is, how the load-balancing loss pushes against it, and what
#   the router z-loss is for;
# - what a capacity is, and which tokens are dropped;
# - how a bias balances the loads without any loss.
# %% [markdown] lang="zh"
# # 从零实现混合专家（MoE）
#
# 混合专家层里有若干个前馈网络，称为*专家*（expert），
# 还有一个很小的*路由器*（router），它为每个 token 给出每个专家的权重。本篇用
# NumPy 先写稠密版，再写稀疏版；然后让路由器坍缩（collapse），
# 再用两种办法修好它。每一步都与 moepeft 的实现对照。
#
# 大约 60 分钟。先修：笔记 01（softmax、梯度）、06（注意力）、08（Transformer
# 块）；其中一例用到 15（LoRA）。
#
# ## 你将理解什么
#
# - 路由权重为什么必须乘在专家输出上；top-k 之后是否重新归一化，
#   对输出大小有什么影响；
# - 怎样按专家给 token 排序，使稀疏层只花 k 个专家的计算，而不是 e 个；
# - 什么是坍缩，负载均衡损失怎样纠正它，router z-loss 又有什么用；
# - 什么是容量（capacity），哪些 token 会被丢弃；
# - 怎样不加任何损失、只用偏置来均衡负载。
# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from moepeft.core.types import Context, Routing
from moepeft.moe.aux_losses import load_balance, router_z_loss
from moepeft.moe.dispatch import dispatch
from moepeft.moe.router_state import against_load
from moepeft.moe.router_stats import router_stats
from moepeft.moe.routers.balanced import Balanced
from moepeft.moe.routers.softmax import Softmax
from moepeft.moe.routers.switch import Switch
from moepeft.moe.routers.topk import TopK
from moepeft.nn.adapter_hook import BaseLayer
from moepeft.peft.methods.lora import Lora
from moepeft.peft.mixture import Mixture

rng = np.random.default_rng(0)
# %% [markdown] lang="en"
# ## A dense mixture
#
# There are $t$ tokens, each a vector of width $d$: the rows of $x$, $[t, d]$.
# There are $e$ experts. Expert $i$ is a feed-forward network with a hidden
# layer of width $f$, $E_i(x) = \mathrm{relu}(x W^{in}_i)\, W^{out}_i$; all of
# them together are $W^{in} [e, d, f]$ and $W^{out} [e, f, d]$. The router is
# one matrix $W_g [d, e]$. Its logits $z$ become the weight $p_{ni}$ of expert
# $i$ for token $n$:
#
# $$z = x W_g, \qquad p = \mathrm{softmax}(z) \in [t, e], \qquad
# y_n = \sum_{i=1}^{e} p_{ni}\, E_i(x_n).$$
#
# The softmax is over the experts, so that the weights of a token sum to one.
# They depend on the token, which an average of experts does not: if $p$ were
# the same for all tokens and the experts were linear, the sum would be one
# linear layer.
# %% [markdown] lang="zh"
# ## 稠密混合
#
# 共有 $t$ 个 token，每个是宽度为 $d$ 的向量，即 $x$ 的一行，$x$ 的形状为
# $[t, d]$。共有 $e$ 个专家。第 $i$ 个专家是隐藏层宽度为 $f$ 的前馈网络
# $E_i(x) = \mathrm{relu}(x W^{in}_i)\, W^{out}_i$；合在一起，$W^{in}$ 的形状为
# $[e, d, f]$，$W^{out}$ 为 $[e, f, d]$。路由器只是一个矩阵 $W_g [d, e]$，由它的
# logits $z$ 得到 token $n$ 对专家 $i$ 的权重 $p_{ni}$：
#
# $$z = x W_g, \qquad p = \mathrm{softmax}(z) \in [t, e], \qquad
# y_n = \sum_{i=1}^{e} p_{ni}\, E_i(x_n).$$
#
# softmax 对专家计算，所以每个 token 的权重之和为 1。权重随 token 而变，
# 这正是混合与平均的区别：假如所有 token 的 $p$ 都相同，而专家又是线性的，
# 那么整个求和就只是一个线性层。
# %%
TOKENS, MODEL, FFN, EXPERTS = 12, 6, 16, 4
x = rng.normal(size=(TOKENS, MODEL)).astype(np.float32)
w_in = rng.normal(size=(EXPERTS, MODEL, FFN)).astype(np.float32) / MODEL**0.5
w_out = rng.normal(size=(EXPERTS, FFN, MODEL)).astype(np.float32) / FFN**0.5
w_gate = rng.normal(size=(MODEL, EXPERTS)).astype(np.float32)


def expert(i, x):
  return np.maximum(x @ w_in[i], 0) @ w_out[i]


def softmax(z):
  z = np.exp(z - z.max(axis=-1, keepdims=True))
  return z / z.sum(axis=-1, keepdims=True)


def dense_mixture(x, p):
  outputs = np.stack([expert(i, x) for i in range(EXPERTS)], axis=1)
  return np.einsum('te,ted->td', p, outputs)


p = softmax(x @ w_gate)
y_dense = dense_mixture(x, p)
print('weights of the first token:', p[0].round(3), 'sum', p[0].sum().round(6))
# %% [markdown] lang="en"
# The package has the routers in files of their own. A router is a Flax module
# `(x, ctx) -> Routing`; its one parameter is the kernel, $W_g$ here, and it
# reads $[b, t, d]$ with an axis $b$ for the rows of a batch. We give it our
# matrix and compare. Both compute in float32; only the order of the additions
# differs, hence the tolerance of $10^{-6}$.
# %% [markdown] lang="zh"
# moepeft 中每个路由器一个文件。路由器是 Flax 模块 `(x, ctx) -> Routing`，
# 唯一的参数是 kernel，即这里的 $W_g$，输入形状为 $[b, t, d]$，$b$ 是 batch 轴。
# 把我们的矩阵交给它，比较结果。
# 两边都是 float32，只有加法顺序不同，所以容差取 $10^{-6}$。
# %%


def package_weights(router, x, ctx=None):
  variables = {'peft': {'kernel': w_gate}}
  routing = router.apply(variables, x[None], ctx or Context())
  return np.asarray(routing.combine_weights[0])


theirs = package_weights(Softmax(EXPERTS), x)
assert np.abs(theirs - p).max() < 1e-6, 'look at softmax and at x @ w_gate'
# %% [markdown] lang="en"
# ## Top-k routing
#
# The dense mixture computes all $e$ experts for each token. A *sparse* one
# keeps the $k$ largest weights of a token and sets the others to zero, so that
# only $k$ experts need to be computed. For one token, without its index $n$:
#
# $$w_i = \begin{cases} p_i & i \in \mathrm{top}_k(p) \\
# 0 & \text{else}\end{cases}
# \qquad\text{or, renormalized,}\qquad w_i' = \frac{w_i}{\sum_j w_j}.$$
#
# Two facts decide whether such a layer trains.
#
# *The weight must multiply the output.* The choice of the top k has no gradient
# (it is piecewise constant). The router learns only through $w_i$ in
# $y = \sum w_i E_i$. With $k = 1$ and renormalization, $w = 1$ always: the
# logits still choose the expert, but a small change of them does not change the
# output. The router gets **no gradient**; computed in float32, what remains is
# rounding. We check it below.
#
# *Without renormalization the sum is less than one.* A fresh router has
# $p_i \approx 1/e$, so the sum of the weights is about $k/e$.
# %% [markdown] lang="zh"
# ## Top-k 路由
#
# 稠密混合要为每个 token 计算全部 $e$ 个专家。*稀疏*混合只保留每个 token 最大的
# $k$ 个权重，其余置零，于是只需计算 $k$ 个专家。对单个 token（省略下标 $n$）：
#
# $$w_i = \begin{cases} p_i & i \in \mathrm{top}_k(p) \\
# 0 & \text{其他}\end{cases}
# \qquad\text{或重新归一化}\qquad w_i' = \frac{w_i}{\sum_j w_j}.$$
#
# 有两点决定这样的层能否训练。
#
# *权重必须乘在输出上。* “选前 k 个”这个操作没有梯度（它分段为常数）。
# 路由器只能通过 $y = \sum w_i E_i$ 中的 $w_i$ 学习。当 $k = 1$ 且重新归一化时，
# $w$ 恒为 1：logits 仍决定选哪个专家，但它的微小变化不改变输出。
# 路由器**没有梯度**；用 float32 计算时，剩下的只是舍入误差。下面会验证。
#
# *不归一化时，权重之和小于 1。* 刚初始化的路由器有 $p_i \approx 1/e$，
# 所以权重之和约为 $k/e$。
# %%


def top_k_weights(p, k, renormalize):
  chosen = np.argsort(-p, axis=1, kind='stable')[:, :k]
  mask = np.zeros_like(p)
  np.put_along_axis(mask, chosen, 1, axis=1)
  weights = p * mask
  if renormalize:
    weights = weights / weights.sum(axis=1, keepdims=True)
  return weights


for k in (1, 2, 3):
  for renormalize in (False, True):
    w = top_k_weights(p, k, renormalize)
    theirs = package_weights(TopK(EXPERTS, k=k, renormalize=renormalize), x)
    assert np.abs(theirs - w).max() < 1e-6, (k, renormalize)
    print(f'k={k} renormalize={renormalize!s:5} sums {w.sum(1)[:4].round(2)}')
# %% [markdown] lang="en"
# The gradient of the router for top-1 and top-2, with and without
# renormalization. The loss is any function of the output; here, the sum of
# squares. Three of the four largest entries are above 1; that of top-1 with
# renormalization is below $10^{-6}$, which is rounding of $p_i / p_i$.
# %% [markdown] lang="zh"
# top-1 与 top-2 时路由器的梯度，分别为不归一化与归一化。
# 损失可取输出的任意函数，这里取平方和。四个最大分量中有三个大于 1；top-1
# 且归一化时小于 $10^{-6}$，那是 $p_i / p_i$ 的舍入误差。
# %%


def squares(kernel, k, renormalize):
  router = TopK(EXPERTS, k=k, renormalize=renormalize)
  routing = router.apply({'peft': {'kernel': kernel}}, x[None], Context())
  outputs = np.stack([expert(i, x) for i in range(EXPERTS)], axis=1)
  y = jnp.einsum('te,ted->td', routing.combine_weights[0], outputs)
  return jnp.sum(y**2)


largest = {
  (k, renormalize): float(
    jnp.abs(jax.grad(squares)(w_gate, k, renormalize)).max()
  )
  for k in (1, 2)
  for renormalize in (False, True)
}
for key, value in largest.items():
  print('k, renormalize =', key, ' largest gradient', f'{value:.2e}')
assert largest[1, True] < 1e-4 * largest[1, False], 'w is 1 whatever p is'
assert min(largest[2, True], largest[2, False], largest[1, False]) > 1e-2
# %% [markdown] lang="en"
# ## Computing only the chosen experts
#
# Setting weights to zero saves nothing by itself. To save time, each expert
# must see only its tokens: **gather** the rows that chose it, compute, multiply
# by the weight, and **scatter** (add) the result back. The result equals the
# dense formula with zeros in it.
#
# One expert costs $4df$ operations for a token: two products of $2df$, a
# multiplication and an addition for each entry of its matrices. The dense layer
# costs $4edf$, the sparse one $4kdf$, and the router $2de$ in both.
# %% [markdown] lang="zh"
# ## 只计算被选中的专家
#
# 仅仅把权重置零并不省时间。要省时间，每个专家只能看到自己的
# token：**收集**（gather）选中它的行，计算，乘以权重，再**散布**（scatter，
# 累加）回去。结果等于带零权重的稠密公式。
#
# 一个专家处理一个 token 需要 $4df$ 次运算：两个乘积，各 $2df$，
# 矩阵的每个元素一次乘法和一次加法。稠密层需要 $4edf$，稀疏层 $4kdf$，
# 路由器在两种情况下都是 $2de$。
# %%


def sparse_mixture(x, weights):
  y, rows = np.zeros_like(x), 0
  for i in range(EXPERTS):
    tokens = np.flatnonzero(weights[:, i])
    y[tokens] += weights[tokens, i, None] * expert(i, x[tokens])
    rows += len(tokens)
  return y, rows


K = 2
w = top_k_weights(p, K, renormalize=True)
y_sparse, rows = sparse_mixture(x, w)
print(f'rows through experts: {rows} sparse, {TOKENS * EXPERTS} dense')
assert rows == K * TOKENS
# The same sums in another order, in float32.
assert np.abs(y_sparse - dense_mixture(x, w)).max() < 1e-5
# %% [markdown] lang="en"
# This loop cannot be compiled: the lengths of its arrays depend on the routing,
# and `jit` needs shapes that do not depend on values. The package's `dispatch`
# sorts the (token, expert) pairs by expert and pads each expert's rows with
# zeros to whole *blocks*. A row of the padded array is a *slot*. A block then
# belongs to one expert, all blocks have one shape, and the product is one
# batched product over blocks. The rows of a block (a power of two from 8 to
# 128) and the number of blocks depend on $t$, $k$ and $e$ alone.
# %% [markdown] lang="zh"
# 循环中各数组长度不同，就无法编译：`jit` 要求形状不依赖于数值。moepeft 的
# `dispatch` 把（token，专家）对按专家排序，
# 并用零把每个专家的行补齐到整数个*块*（block）；补齐后数组的一行称为一个
# *slot*。这样每块只属于一个专家，所有块形状相同，
# 整个计算就是一次按块的批量矩阵乘。每块的行数（8 到 128 之间的 2 的幂）
# 和块数只取决于 $t$、$k$ 和 $e$。
# %%
slots = dispatch(jnp.asarray(w), K)
hidden = jnp.maximum(slots.matmul(slots.to_slots(jnp.asarray(x)), w_in), 0)
y_slots = slots.from_slots(slots.matmul(hidden, w_out) * slots.weights[:, None])
block = len(slots.pair) // len(slots.expert)
print(f'{rows} rows in {len(slots.expert)} blocks of {block};', end=' ')
print('expert of each block:', np.asarray(slots.expert))
assert np.abs(y_slots - y_sparse).max() < 1e-5, 'compare slots.pair and slot'
# %% [markdown] lang="en"
# Here padding is more than half of the work, 24 rows in 56 slots: 12 tokens are
# too few. The padding is at most $e$ blocks of at most 128 slots, whatever $t$
# is, while the rows grow with $t$.
#
# ## A shared expert
#
# Some knowledge is needed by every token. If it lives in routed experts, each
# of them learns a copy. DeepSeekMoE
# ([arXiv:2401.06066](https://arxiv.org/abs/2401.06066)) adds *shared experts*
# whose weight is always one; the routed experts learn what remains:
#
# $$y = \sum_{s} E_s(x) + \sum_{i} w_i E_i(x),$$
#
# with $s$ over the shared and $i$ over the routed experts. In arithmetic it is
# a column of ones beside the router's weights.
#
# The package's `Mixture` has the option `shared_experts`, for experts of any
# form. The cell below has two routed and one shared expert, each a LoRA
# $x A_i B_i$ of rank 2, beside a frozen linear layer $x W$ (more in the next
# notebook). `BaseLayer` describes the frozen layer, and `alpha=RANK` makes
# LoRA's factor $\alpha / r$ equal to 1.
# %% [markdown] lang="zh"
# 这里超过一半的工作是补零，56 个 slot 中只有 24 行有效：12 个 token 太少了。
# 无论 $t$ 多大，补零最多 $e$ 块、每块最多 128 个 slot，而有效行数随 $t$ 增长。
#
# ## 共享专家
#
# 有些知识每个 token 都需要。如果它只能放在被路由的专家里，
# 每个专家都要学一份拷贝。DeepSeekMoE
# （[arXiv:2401.06066](https://arxiv.org/abs/2401.06066)）增加权重恒为 1
# 的*共享专家*（shared expert），被路由的专家只学剩下的部分：
#
# $$y = \sum_{s} E_s(x) + \sum_{i} w_i E_i(x),$$
#
# 其中 $s$ 取遍共享专家，$i$ 取遍被路由的专家。算术上就是在路由权重旁边加一列
# 1。
#
# moepeft 的 `Mixture` 有选项 `shared_experts`，支持任意形式的专家。
# 下面的代码在冻结线性层 $x W$ 旁放两个被路由的专家和一个共享专家，每个都是秩为
# 2 的 LoRA $x A_i B_i$（详见下一篇）。`BaseLayer` 描述冻结层；`alpha=RANK` 使
# LoRA 的系数 $\alpha / r$ 等于 1。
# %%
RANK = 2
base = rng.normal(size=(MODEL, MODEL)).astype(np.float32)
layer = BaseLayer(lambda x: x @ base, 'btd,dc->btc', base.shape, 'd', 'd')
a = rng.normal(size=(MODEL, 3, RANK)).astype(np.float32)
b = rng.normal(size=(3, RANK, MODEL)).astype(np.float32)
gate = w_gate[:, :2]
mixture = Mixture(
  expert=Lora(RANK, alpha=RANK),
  experts=2,
  router=Softmax(2),
  shared_experts=1,
)
tree = {'a': a, 'b': b, 'router': {'kernel': gate}}
theirs = mixture.apply({'peft': tree}, layer, x[None], Context())[0]

weights = np.concatenate([softmax(x @ gate), np.ones((TOKENS, 1))], axis=1)
terms = np.stack([x @ a[:, i] @ b[i] for i in range(3)], axis=1)
ours = x @ base + np.einsum('te,ted->td', weights, terms)
assert np.abs(theirs - ours).max() < 1e-4, 'the last expert is the shared one'
# %% [markdown] lang="en"
# ## Collapse
#
# A router that prefers an expert sends it more tokens; the expert then gets
# more gradient and becomes better; so the router prefers it more. The result is
# *collapse*: a few experts do all the work. Its usual cause is simple: the
# hidden states of a Transformer share a large common direction, so that even a
# random router gives all tokens similar logits.
#
# We reproduce it on a small problem. Inputs come from eight clusters around a
# common mean, each cluster has a linear map of its own, and there are eight
# linear experts: one for each cluster, with weights near one, would solve the
# problem. Routing is top-1 (Switch), weights are not renormalized.
# %% [markdown] lang="zh"
# ## 坍缩
#
# 路由器偏爱某个专家，就会送给它更多 token；该专家得到更多梯度，变得更好；
# 于是路由器更偏爱它。结果就是*坍缩*：少数专家包揽所有工作。起因通常很简单：
# Transformer 的隐状态有一个很大的公共方向，所以即使随机初始化的路由器，
# 也会给所有 token 相近的 logits。
#
# 我们在一个小问题上重现它。输入来自围绕公共均值的八个簇，
# 每个簇有自己的线性映射，专家也是八个线性层：每个簇一个专家、权重接近 1，
# 就能解决这个问题。路由为 top-1（Switch），权重不归一化。
# %%
CLUSTERS = WIDE = 8
DIM, BATCH, STEPS = 16, 256, 600
common = 3 * rng.normal(size=DIM)
centers = common + 1.5 * rng.normal(size=(CLUSTERS, DIM))
maps = rng.normal(size=(CLUSTERS, DIM, DIM)) / DIM**0.5


def sample(rng, count):
  cluster = rng.integers(CLUSTERS, size=count)
  inputs = centers[cluster] + 0.5 * rng.normal(size=(count, DIM))
  targets = np.einsum('td,tdc->tc', inputs, maps[cluster])
  return inputs.astype(np.float32), targets.astype(np.float32), cluster


train_x, train_y, _ = sample(rng, 4096)
test_x, test_y, test_cluster = sample(rng, 2048)
# %% [markdown] lang="en"
# ## The load-balancing loss
#
# Switch Transformer ([arXiv:2101.03961](https://arxiv.org/abs/2101.03961)) adds
# to the loss $\alpha L$ with
#
# $$L = e \sum_{i=1}^{e} f_i P_i, \qquad
# f_i = \frac{1}{t}\sum_{n=1}^{t} [\,i = \arg\max_j p_{nj}\,], \qquad
# P_i = \frac{1}{t}\sum_{n=1}^{t} p_{ni}.$$
#
# The index $n$ runs over the $t$ tokens of a batch. $f_i$ is the *load*, the
# fraction of tokens that expert $i$ gets (the paper's letter; the width $f$ has
# no index); it is piecewise constant and has no gradient. $P_i$ is smooth. So
# $\partial L / \partial P_i = e f_i$: the loss pushes the probability of an
# expert down in proportion to its load. With even loads $L = 1$; with
# everything on one expert and sharp probabilities $L = e$.
#
# The value of $L$ does not measure the loads: with even *probabilities*,
# $P_i = 1/e$, it is 1 for any loads. A log of $L$ alone can therefore look fine
# while one expert has all tokens; log the loads too.
#
# The router z-loss of ST-MoE
# ([arXiv:2202.08906](https://arxiv.org/abs/2202.08906)) has another aim:
# $\frac{1}{t}\sum_n (\log\sum_i \exp z_{ni})^2$ keeps the logits small, since
# large ones have large rounding errors in the softmax. It does not balance.
# %% [markdown] lang="zh"
# ## 负载均衡损失
#
# Switch Transformer（[arXiv:2101.03961](https://arxiv.org/abs/2101.03961)）
# 在损失上加 $\alpha L$：
#
# $$L = e \sum_{i=1}^{e} f_i P_i, \qquad
# f_i = \frac{1}{t}\sum_{n=1}^{t} [\,i = \arg\max_j p_{nj}\,], \qquad
# P_i = \frac{1}{t}\sum_{n=1}^{t} p_{ni}.$$
#
# $n$ 取遍一个 batch 的 $t$ 个 token。$f_i$ 是*负载*（load），即专家 $i$ 得到的
# token 比例（沿用论文的记号；不带下标的 $f$ 仍是宽度）；它分段为常数，
# 没有梯度。$P_i$ 是光滑的。所以 $\partial L / \partial P_i = e f_i$：
# 某专家负载越大，它的概率被压得越低。负载均匀时 $L = 1$；
# 全部集中于一个专家且概率很尖时，$L = e$。
#
# $L$ 的值并不度量负载：*概率*均匀（$P_i = 1/e$）时，不管负载如何，值都是 1。
# 所以只看 $L$ 的曲线可能一切正常，而某个专家已经拿走全部 token；
# 应当同时记录负载。
#
# ST-MoE 的 router
# z-loss（[arXiv:2202.08906](https://arxiv.org/abs/2202.08906)）目的不同：
# $\frac{1}{t}\sum_n (\log\sum_i \exp z_{ni})^2$ 让 logits 保持较小，因为 logits
# 很大时 softmax 的舍入误差也大。它不均衡负载。
# %%


def switch_loss(logits):
  p = jax.nn.softmax(logits)
  load = jnp.mean(jax.nn.one_hot(jnp.argmax(p, axis=1), p.shape[1]), axis=0)
  return p.shape[1] * jnp.sum(load * jnp.mean(p, axis=0))


def z_loss(logits):
  return jnp.mean(jax.nn.logsumexp(logits, axis=1) ** 2)


def package_sums(logits):
  p = jax.nn.softmax(logits)
  weights = p * jax.nn.one_hot(jnp.argmax(p, axis=1), p.shape[1])
  return router_stats(Routing(logits[None], weights[None], k=1), None)


logits = jnp.asarray(rng.normal(size=(500, WIDE)))
for ours, theirs in ((switch_loss, load_balance), (z_loss, router_z_loss)):
  value, reference = ours(logits), theirs(package_sums(logits))
  print(f'{ours.__name__:12} {value:.4f}')
  assert abs(value - reference) < 1e-4, ours.__name__

on_one = 20.0 * jax.nn.one_hot(jnp.zeros(500, int), WIDE)
nearly_even = 1e-4 * jax.nn.one_hot(jnp.zeros(500, int), WIDE)
print(f'all on one expert: {switch_loss(on_one):.3f} if sharp,', end=' ')
print(f'{switch_loss(nearly_even):.3f} if the probabilities are nearly even')
assert switch_loss(on_one) > WIDE - 0.01 > 1.01 > switch_loss(nearly_even)
# %% [markdown] lang="en"
# Now three runs from the same start: without balancing, with the loss
# ($\alpha = 1$: the squared error starts far above 1 here and the run is short;
# the paper has 0.01 beside a cross-entropy, in a much longer training), and
# with the bias of the next paragraph. All share the training step of the next
# cell.
#
# ## Balancing by a bias
#
# An auxiliary loss changes what the router learns: its gradient competes with
# that of the task. Wang et al.
# ([arXiv:2408.15664](https://arxiv.org/abs/2408.15664), used in DeepSeek-V3)
# instead add a bias $b$ **to the selection alone**: the experts are the top k
# of $p + b$, their weights remain $p$. After each step $b_i$ moves by a fixed
# amount,
#
# $$b_i \leftarrow b_i + \gamma\; \mathrm{sign}(\bar f - f_i),$$
#
# up where the load is below the mean $\bar f = 1/e$, down where it is above. No
# gradient is involved. $\gamma$ is `RATE` in the code.
# %% [markdown] lang="zh"
# 下面从同一初始状态做三次训练：不均衡、用均衡损失（$\alpha = 1$：
# 这里平方误差起点远大于 1，训练又短；论文在长得多的训练中、与交叉熵相加时用
# 0.01）、以及用下一段的偏置。三者共用下一个代码单元里的训练步。
#
# ## 用偏置均衡
#
# 辅助损失会改变路由器学到的东西：它的梯度与任务的梯度竞争。Wang
# 等人（[arXiv:2408.15664](https://arxiv.org/abs/2408.15664)，DeepSeek-V3 采用）
# 改为**只在选择时**加一个偏置 $b$：选 $p + b$ 的前 k 个，而权重仍是 $p$。
# 每步之后 $b_i$ 移动固定的量：
#
# $$b_i \leftarrow b_i + \gamma\; \mathrm{sign}(\bar f - f_i),$$
#
# 负载低于平均值 $\bar f = 1/e$ 就上调，高于它就下调。全程不用梯度。$\gamma$
# 即代码中的 `RATE`。
# %%
RATE = 0.01
start_gate = 0.3 * rng.normal(size=(DIM, WIDE)) / DIM**0.5
start = {
  'gate': jnp.asarray(start_gate, jnp.float32),
  'expert': jnp.asarray(0.1 * rng.normal(size=(WIDE, DIM, DIM)), jnp.float32),
}


def forward(params, bias, x):
  logits = x @ params['gate']
  p = jax.nn.softmax(logits)
  choice = jax.nn.one_hot(jnp.argmax(p + bias, axis=1), WIDE)
  outputs = jnp.einsum('td,edc->tec', x, params['expert'])
  return jnp.einsum('te,tec->tc', p * choice, outputs), choice, logits


def train(alpha, rate):
  optimizer = optax.adam(3e-3)

  def loss_fn(params, bias, x, y):
    prediction, choice, logits = forward(params, bias, x)
    error = jnp.mean((prediction - y) ** 2)
    return error + alpha * switch_loss(logits), jnp.mean(choice, axis=0)

  @jax.jit
  def step(params, state, bias, x, y):
    gradient, load = jax.grad(loss_fn, has_aux=True)(params, bias, x, y)
    updates, state = optimizer.update(gradient, state)
    bias = bias + rate * jnp.sign(1 / WIDE - load)
    return optax.apply_updates(params, updates), state, bias, load

  params, state, bias = start, optimizer.init(start), jnp.zeros(WIDE)
  loads, order = [], np.random.default_rng(1)
  for _ in range(STEPS):
    rows = order.integers(len(train_x), size=BATCH)
    params, state, bias, load = step(
      params, state, bias, train_x[rows], train_y[rows]
    )
    loads.append(load)
  return params, bias, np.array(loads)


runs = {
  'no balancing': train(0.0, 0.0),
  'loss': train(1.0, 0.0),
  'bias': train(0.0, RATE),
}
# %%
fig, axes = plt.subplots(1, 3, figsize=(7, 2.4), sharey=True)
for ax, (name, (_, _, loads)) in zip(axes, runs.items(), strict=True):
  means = loads.reshape(-1, 20, WIDE).mean(axis=1)  # of 20 steps each
  ax.stackplot(np.arange(10, STEPS, 20), means.T)
  ax.set(title=name, xlabel='step', xlim=(0, STEPS), ylim=(0, 1))
axes[0].set_ylabel('load of 8 experts')
fig.tight_layout()
plt.show()
# %% [markdown] lang="en"
# Each colored band is an expert, its height the share of the tokens. Now the
# numbers on data that was not trained on: experts with more than 1 % of the
# tokens, the largest load, the mean weight $p$ of the chosen expert, and the
# mean squared error, also of the tokens whose weight is below 0.1. The error of
# the best single linear map is the result of an MoE with one expert.
# %% [markdown] lang="zh"
# 每条色带是一个专家，高度是它得到的 token 比例。再看未参与训练的数据：负载超过
# 1% 的专家数、最大负载、被选专家的平均权重 $p$、均方误差，以及权重小于 0.1 的
# token 所占的误差。最佳单一线性映射的误差，就是只有一个专家时能达到的结果。
# %%
single = np.linalg.lstsq(train_x, train_y, rcond=None)[0]
single_error = np.mean((test_x @ single - test_y) ** 2)
print(f'one linear map: error {single_error:.3f}')
used, errors, tops = {}, {}, {}
for name, (params, bias, _) in runs.items():
  prediction, choice, logits = forward(params, bias, test_x)
  weights = np.asarray(jnp.sum(choice * jax.nn.softmax(logits), axis=1))
  squares = np.asarray(jnp.mean((prediction - test_y) ** 2, axis=1))
  small = weights < 0.1
  load = np.asarray(choice).mean(axis=0)
  used[name] = int((load > 0.01).sum())
  tops[name] = float(load.max())
  errors[name] = float(squares.mean())
  print(
    f'{name:16} experts used {used[name]}, largest load '
    f'{load.max():.2f}, mean weight {weights.mean():.2f}, '
    f'error {errors[name]:.3f}\n  weight below 0.1: {small.mean():.0%} of the '
    f'tokens, {squares[small].sum() / squares.sum():.0%} of the error'
  )
assert used['no balancing'] < used['loss'], 'is the loss added?'
assert used['no balancing'] < used['bias'], 'is the bias updated?'
assert max(tops['bias'], tops['loss']) < tops['no balancing']
assert errors['loss'] < errors['no balancing'] < single_error
# %% [markdown] lang="en"
# Both ways of balancing use the experts that collapse left without a token.
# Whether this also lowers the error is a second question. With the loss it
# does: the problem is designed so that more experts help. On a problem without
# clusters, balance alone does not lower the error.
#
# With the bias the error is higher than without balancing, although the loads
# are the most even. The reason is a weakness of the bias in *our* form: it may
# choose an expert whose $p_i$ is tiny, and the output is still multiplied by
# that $p_i$, so that such tokens get nearly no output. They are a tenth of the
# tokens and have more than half of the error; the mean error of the others is
# that of the run without balancing. DeepSeek-V3 chooses 8 of 256 experts, takes
# sigmoids in place of the softmax, and renormalizes over the chosen, so that
# the sum of the weights does not shrink.
#
# Our update and selection are the package's. `Balanced` keeps the bias as
# *router state*, which no optimizer sees, and its `update` reads sums over the
# whole batch.
# %% [markdown] lang="zh"
# 两种均衡方法都用上了坍缩时没有任何 token 的专家。
# 误差是否也随之下降是另一个问题。用损失时误差下降：这个问题是为“专家越多越好”
# 设计的。若数据没有簇结构，单纯的均衡不会降低误差。
#
# 用偏置时，负载虽然最均匀，误差却比不均衡时更高。
# 原因是偏置法在*我们这种写法*下的弱点：它可能选中 $p_i$ 极小的专家，
# 而输出仍要乘以这个 $p_i$，于是这些 token 几乎没有输出。它们只占 token
# 的十分之一，却占误差的一半以上；其余 token 的误差与不均衡时相近。DeepSeek-V3
# 从 256 个专家中选 8 个，用 sigmoid 代替 softmax，并在被选专家上重新归一化，
# 所以权重之和不会缩小。
#
# 我们的更新与选择规则就是 moepeft 的规则。`Balanced`
# 把偏置存为*路由器状态*（router state），优化器看不到它；它的 `update` 读取整个
# batch 上的各项总和。
# %%
params, bias, _ = runs['bias']
batch = test_x[:64]
variables = {'peft': {'kernel': params['gate'], 'state_bias': bias}}
routing = Balanced(WIDE, k=1).apply(variables, batch[None], Context())
_, choice, logits = forward(params, bias, batch)
ours = np.asarray(choice * jax.nn.softmax(logits))
assert np.abs(routing.combine_weights[0] - ours).max() < 1e-6
sums = router_stats(routing, None)
moved = against_load(bias, RATE, sums)
ours = bias + RATE * np.sign(1 / WIDE - np.asarray(choice).mean(axis=0))
assert np.abs(moved - ours).max() < 1e-6, 'the sign is mean load minus load'
# %% [markdown] lang="en"
# ## Capacity
#
# On many devices each expert sits on its own chip, and the chip needs a fixed
# number of rows. The *capacity* is this number, $C = \lceil c\, t / e \rceil$
# with a capacity factor $c$, usually 1 to 2. An expert takes the first $C$
# tokens that choose it; later ones are *dropped*: no expert computes them, and
# only the residual connection carries them on. With even loads few are dropped.
# If all tokens choose one expert, $1 - c/e$ of them are dropped: for $e = 8$,
# that is 7/8 at $c = 1$ and 3/4 at $c = 2$. Our collapsed run uses two experts
# and drops about $1 - 2c/e$ while both are full. The figure has $c$ from 0.5 to
# 4.
# %% [markdown] lang="zh"
# ## 容量
#
# 在多设备上，每个专家位于自己的芯片，芯片需要固定的行数。*容量*（capacity）
# 就是这个行数，$C = \lceil c\, t / e \rceil$，容量系数 $c$ 通常取 1 到 2。
# 专家只收前 $C$ 个选中它的 token；之后的被*丢弃*（dropped）：没有专家计算它们，
# 只靠残差连接传下去。负载均匀时很少丢弃。若所有 token 选同一个专家，
# 丢弃的比例是 $1 - c/e$：$e = 8$ 时，$c = 1$ 为 7/8，$c = 2$ 为 3/4。
# 我们坍缩的那次训练用了两个专家，两者都满时约丢弃 $1 - 2c/e$。图中 $c$ 从 0.5
# 到 4。
# %%


def within_capacity(choice, capacity):
  """choice [t, e] one-hot; drops the tokens beyond an expert's capacity."""
  earlier = np.cumsum(choice, axis=0) - choice
  return choice * (earlier < capacity)


factors = np.linspace(0.5, 4, 15)
fig, ax = plt.subplots(figsize=(5, 2.6))
dropped = {}
for name, (params, bias, _) in runs.items():
  choice = np.asarray(forward(params, bias, test_x)[1])
  capacities = [int(np.ceil(c * len(test_x) / WIDE)) for c in factors]
  served = [within_capacity(choice, c).sum() for c in capacities]
  dropped[name] = 1 - np.array(served) / len(test_x)
  ax.plot(factors, dropped[name], label=name)
ax.set(xlabel='capacity factor', ylabel='dropped tokens', ylim=(0, 1))
ax.legend()
fig.tight_layout()
plt.show()
at_one = list(factors).index(1.0)
assert dropped['bias'][at_one] < dropped['no balancing'][at_one]
# %% [markdown] lang="en"
# The package's `Switch` router has a capacity as well: a number of tokens, not
# a factor, for each example and in training only. We compare again, for our
# first router and a capacity of two.
# %% [markdown] lang="zh"
# moepeft 的 `Switch` 路由器也有容量：它是 token 数而不是系数，按样本计算，
# 只在训练时生效。用最初的路由器、容量为 2 再比较一次。
# %%
choice = top_k_weights(p, 1, renormalize=False)
ours = within_capacity((choice > 0).astype(int), 2) * p
theirs = package_weights(Switch(EXPERTS, capacity=2), x, Context(train=True))
print('tokens of each expert:', (choice > 0).sum(0), '->', (ours > 0).sum(0))
assert (choice > 0).sum(0).max() > 2, 'nothing would be dropped'
assert np.abs(theirs - ours).max() < 1e-6
# %% [markdown] lang="en"
# ## Exercises
#
# 1. *Count.* Write `count(d, f, e, k, shared)` that returns (all parameters,
#    parameters that one token uses) of an MoE layer with a router, $e$ routed
#    and `shared` shared experts. An expert has three matrices (gate, up and
#    down), $3df$ parameters. For $d = 4096$, $f = 14336$, $e = 8$, $k = 2$ and
#    no shared expert (Mixtral's layer), which share of the parameters does a
#    token use?
# 2. *The gradient by hand.* Derive $\partial L / \partial z_{ni}$ of the
#    load-balancing loss for the logits $z$, and compare it with
#    `jax.grad(switch_loss)`.
# 3. *Which tokens are dropped.* `within_capacity` drops the latest tokens.
#    Write `by_priority(p, capacity)` where each expert keeps the tokens with
#    the largest $p$ (batch prioritized routing,
#    [arXiv:2106.05974](https://arxiv.org/abs/2106.05974)). Show that it drops
#    the same number of tokens, that the sum of the dropped weights is at most
#    as large, and say why a decoder may not use it.
#
# Solutions are in `solutions/`.
#
# ## Interview questions
#
# **Why does the Switch loss multiply $f_i$ by $P_i$, and not square $f_i$?**
#
# <details><summary>Answer</summary>
#
# $\sum f_i^2$ would measure the imbalance exactly, and has no gradient: $f_i$
# comes from an argmax. $\sum P_i^2$ has a gradient, but does not know where the
# tokens really go. The product takes the gradient from $P$ and the direction
# from $f$: $\partial L/\partial P_i = e f_i$. The price is that the value is
# not a measure of the loads: with $P$ even it is 1 for any $f$.
#
# </details>
#
# **Top-1 routing with renormalized weights: what goes wrong, and what do Switch
# and top-2 do?**
#
# <details><summary>Answer</summary>
#
# The weight of the one chosen expert is $p_i / p_i = 1$, a constant, so the
# task's loss gives the router no gradient: it never learns to which expert a
# token should go. Switch leaves the weight at $p_i$. Top-2 can be renormalized,
# as the ratio of two weights still depends on the logits.
#
# </details>
#
# ## In the package
#
# - {{moepeft.moe.ROUTERS}}: the registry of routers;
#   {{moepeft.moe.routers.topk.TopK}}, {{moepeft.moe.routers.switch.Switch}},
#   {{moepeft.moe.routers.balanced.Balanced}}.
# - {{moepeft.moe.aux_losses.load_balance}} and
#   {{moepeft.moe.aux_losses.router_z_loss}} read sums
#   ({{moepeft.moe.router_stats.RouterStats}}) that add up over microbatches and
#   devices, so that the loss of a batch in parts equals that of the whole. Ours
#   averages one batch.
# - {{moepeft.moe.router_stats.router_stats}} leaves padding out; ours counts
#   every row.
# - {{moepeft.moe.dispatch.dispatch}} has a gradient that gathers and never
#   scatters, because a scatter is sequential on a CPU.
# - {{moepeft.moe.router_state.against_load}} also takes layers with unlike
#   numbers of experts: the mean load is over the experts that a layer has, and
#   the biases of the others stay.
# - Papers: sparsely gated MoE
#   [arXiv:1701.06538](https://arxiv.org/abs/1701.06538), Switch
#   [arXiv:2101.03961](https://arxiv.org/abs/2101.03961), ST-MoE
#   [arXiv:2202.08906](https://arxiv.org/abs/2202.08906), DeepSeekMoE
#   [arXiv:2401.06066](https://arxiv.org/abs/2401.06066), bias balancing
#   [arXiv:2408.15664](https://arxiv.org/abs/2408.15664).
# %% [markdown] lang="zh"
# ## 练习
#
# 1. *计数。* 写 `count(d, f, e, k, shared)`，返回一个 MoE 层的（全部参数，单个
#    token 用到的参数）；该层有一个路由器、$e$ 个被路由的专家和 `shared`
#    个共享专家，每个专家有三个矩阵（gate、up、down），共 $3df$ 个参数。取
#    $d = 4096$、$f = 14336$、$e = 8$、$k = 2$，没有共享专家（Mixtral 的一层），
#    一个 token 用到参数的多大比例？
# 2. *手推梯度。* 推导负载均衡损失对 logits $z$ 的梯度
#    $\partial L / \partial z_{ni}$，并与 `jax.grad(switch_loss)` 比较。
# 3. *丢弃哪些 token。* `within_capacity` 丢弃后来的 token。写
#    `by_priority(p, capacity)`，让每个专家保留 $p$ 最大的 token（batch
#    prioritized routing，
#    [arXiv:2106.05974](https://arxiv.org/abs/2106.05974)）。验证它丢弃的 token
#    数相同，丢弃的权重之和不会更多；并说明为什么解码器不能用它。
#
# 答案在 `solutions/`。
#
# ## 面试题
#
# **Switch 的损失为什么是 $f_i$ 乘 $P_i$，而不是 $f_i$ 的平方？**
#
# <details><summary>答案</summary>
#
# $\sum f_i^2$ 能准确衡量不均衡，但没有梯度：$f_i$ 来自 argmax。$\sum P_i^2$
# 有梯度，却不知道 token 实际去了哪里。乘积从 $P$ 取梯度，从 $f$ 取方向：
# $\partial L/\partial P_i = e f_i$。代价是这个值并不度量负载：$P$ 均匀时，无论
# $f$ 如何它都是 1。
#
# </details>
#
# **top-1 路由并重新归一化权重会出什么问题？Switch 和 top-2 怎么做？**
#
# <details><summary>答案</summary>
#
# 唯一被选专家的权重是 $p_i / p_i = 1$，是常数，任务损失不给路由器任何梯度：
# 它永远学不会该把 token 送给哪个专家。Switch 保留权重 $p_i$。top-2 可以归一化，
# 因为两个权重之比仍依赖 logits。
#
# </details>
#
# ## 在 moepeft 中
#
# - {{moepeft.moe.ROUTERS}}：路由器注册表；
#   {{moepeft.moe.routers.topk.TopK}}、{{moepeft.moe.routers.switch.Switch}}、
#   {{moepeft.moe.routers.balanced.Balanced}}。
# - {{moepeft.moe.aux_losses.load_balance}} 和
#   {{moepeft.moe.aux_losses.router_z_loss}}
#   读取的是各项总和（{{moepeft.moe.router_stats.RouterStats}}），
#   它们可在微批和设备之间相加，所以分块计算与整批的损失相等。我们只对一个 batch
#   求平均。
# - {{moepeft.moe.router_stats.router_stats}} 不计 padding；
#   我们的版本把每一行都算进去。
# - {{moepeft.moe.dispatch.dispatch}} 的梯度只用 gather，不用 scatter，因为
#   scatter 在 CPU 上是串行的。
# - {{moepeft.moe.router_state.against_load}} 也支持各层专家数不同的情形：
#   平均负载只对该层有的专家计算，其余专家的偏置不变。
# - 论文：稀疏门控 MoE [arXiv:1701.06538](https://arxiv.org/abs/1701.06538)、
#   Switch [arXiv:2101.03961](https://arxiv.org/abs/2101.03961)、ST-MoE
#   [arXiv:2202.08906](https://arxiv.org/abs/2202.08906)、DeepSeekMoE
#   [arXiv:2401.06066](https://arxiv.org/abs/2401.06066)、偏置均衡
#   [arXiv:2408.15664](https://arxiv.org/abs/2408.15664)。
# %% [markdown] lang="en" tags=["solution"]
# # Mixture of experts: solutions
#
# ## Exercise 1
# %% [markdown] lang="zh" tags=["solution"]
# # 混合专家：答案
#
# ## 练习 1
# %% tags=["solution"]


def count(d, f, e, k, shared=0):
  one, router = 3 * d * f, d * e
  return (e + shared) * one + router, (k + shared) * one + router


total, active = count(4096, 14336, 8, 2)
print(f'{total:,} parameters, {active:,} active: {active / total:.4f}')
# All but the router scales with the experts: slightly above k / e.
assert 2 / 8 < active / total < 2 / 8 + 1e-4
# Counted from arrays: two routed experts of three matrices, and a router.
arrays = [np.zeros((8, 5))] * 4 + [np.zeros((5, 8))] * 2 + [np.zeros((5, 2))]
assert count(5, 8, 2, 1)[0] == sum(array.size for array in arrays)
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 2
#
# $L = e\sum_j f_j P_j$, $P_j = \frac1t\sum_n p_{nj}$ and
# $\partial p_{nj}/\partial z_{ni} = p_{nj}([i=j] - p_{ni})$. Hence
#
# $$\frac{\partial L}{\partial z_{ni}} =
# \frac{e}{t}\, p_{ni}\Bigl(f_i - \sum_j f_j p_{nj}\Bigr).$$
#
# $\sum_j f_j p_{nj}$ is the mean load under the token's own probabilities. A
# logit is pushed down where the expert's load is above it.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 2
#
# $L = e\sum_j f_j P_j$，$P_j = \frac1t\sum_n p_{nj}$，且
# $\partial p_{nj}/\partial z_{ni} = p_{nj}([i=j] - p_{ni})$。因此
#
# $$\frac{\partial L}{\partial z_{ni}} =
# \frac{e}{t}\, p_{ni}\Bigl(f_i - \sum_j f_j p_{nj}\Bigr).$$
#
# $\sum_j f_j p_{nj}$ 是该 token 按其概率平均的负载。专家负载高于它时，对应的
# logit 被压低。
# %% tags=["solution"]
z = np.asarray(rng.normal(size=(100, WIDE)), np.float32)
probabilities = softmax(z)
load = np.bincount(probabilities.argmax(1), minlength=WIDE) / len(z)
expected = probabilities @ load
by_hand = WIDE / len(z) * probabilities * (load - expected[:, None])
assert np.abs(by_hand - jax.grad(switch_loss)(jnp.asarray(z))).max() < 1e-6
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 3
#
# An expert that is chosen by more than $C$ tokens keeps exactly $C$ in both
# ways, so the number of dropped tokens is equal; the dropped ones have the
# smallest weights. In a decoder, whether a token is dropped would depend on
# later tokens of the same text: at generation they do not exist yet. The same
# holds between texts of a batch for any capacity of a batch: a text's output
# depends on its neighbors.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 3
#
# 被超过 $C$ 个 token 选中的专家，两种做法都恰好保留 $C$ 个，所以丢弃数相等；
# 按优先级丢弃的是权重最小的。在解码器里，一个 token
# 是否被丢弃会取决于同一文本里之后的 token：生成时它们还不存在。若容量按 batch
# 计算，不同文本之间也有同样的问题：一段文本的输出依赖同批的其他文本。
# %% tags=["solution"]


def by_priority(p, capacity):
  choice = (p == p.max(axis=1, keepdims=True)).astype(int)
  scores = np.where(choice, p, -1)
  rank = np.argsort(np.argsort(-scores, axis=0, kind='stable'), axis=0)
  return choice * (rank < capacity)


many = softmax(np.asarray(rng.normal(size=(200, WIDE)), np.float32))
choice = (many == many.max(axis=1, keepdims=True)).astype(int)
capacity = 20
early, best = within_capacity(choice, capacity), by_priority(many, capacity)
assert early.sum() == best.sum() < len(many)
lost_early = (many * (choice - early)).sum()
lost_best = (many * (choice - best)).sum()
print(f'sum of dropped weights: {lost_early:.2f} latest, {lost_best:.2f} least')
assert lost_best < lost_early
# The choice of a token changes when later tokens do.
changed = many.copy()
changed[100:] = softmax(5 * rng.normal(size=(100, WIDE)))
assert (by_priority(changed, capacity)[:100] != best[:100]).any()
assert (
  within_capacity(
    (changed == changed.max(axis=1, keepdims=True)).astype(int), capacity
  )[:100]
  == early[:100]
).all()

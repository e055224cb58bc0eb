# SPDX-License-Identifier: Apache-2.0
# %% [markdown] lang="en"
# # What experts learn, and what routers may read
#
# A mixture has a part that can be watched: the router. This notebook trains a
# small MoLoRA on data with known groups and asks whether its experts correspond
# to them, by shares, by mutual information, by the similarity of the experts'
# weights, and by removing one. Then it replaces the router, also by a random
# and by a constant one. The last part is a matter of correctness: in a decoder,
# routing must not depend on later tokens, and a test shows it. At the end, the
# same views on a run of the package.
#
# About 60 minutes. Before it: notebooks 25 (mixture of experts), 26 (MoV and
# MoLoRA) and 27 (LoRA or MoLoRA).
#
# ## What you will understand
#
# - what entropy, load and mutual information of a routing say, and what none of
#   them says;
# - how to compare experts by their weights without building their matrices;
# - why a random or constant router is the control that a claim about routing
#   needs;
# - what causality of a router means, how a test finds a violation, and what a
#   sentence router may pool;
# - where the package writes the routing of a run.
# %% [markdown] lang="zh"
# # 专家学到了什么，路由器可以读什么
#
# 混合里有一个可以观察的部分：路由器。本篇在分组已知的数据上训练一个小的
# MoLoRA，用占比、互信息、专家权重的相似度和删除专家来问：专家与分组对应吗？
# 然后替换路由器，包括随机的和恒定的。最后一部分关乎正确性：在解码器里，
# 路由不能依赖之后的 token，我们用测试来证明。结尾在 moepeft
# 的一次运行上看同样的图。
#
# 大约 60 分钟。先修：笔记 25（混合专家）、26（MoV 与 MoLoRA）、27（LoRA 还是
# MoLoRA）。
#
# ## 你将理解什么
#
# - 路由的熵、负载、互信息各说明什么，以及它们都不能说明什么；
# - 怎样不构造大矩阵就比较专家的权重；
# - 为什么关于路由的结论需要随机路由器或恒定路由器作对照；
# - 路由器的因果性是什么，测试怎样发现违例，句子级路由器可以对什么做池化；
# - moepeft 把一次运行的路由写在哪里。
# %%
import functools
import os
import subprocess
import sys
import tempfile

import flax
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import moepeft
from moepeft import tasks
from moepeft.checkpoints.restore import restore_adapter
from moepeft.core.types import Context, Routing
from moepeft.evaluation.routing.similarity import expert_similarity
from moepeft.models.decoder import model as decoder
from moepeft.models.decoder.config import DecoderConfig
from moepeft.models.t5 import model as t5
from moepeft.moe import ROUTERS
from moepeft.moe.router_stats import router_stats, statistics
from moepeft.nn.linear import base_projection
from moepeft.peft.build import build
from moepeft.runs import metrics_log

rng = np.random.default_rng(0)
# %% [markdown] lang="en"
# ## A mixture on data with known groups
#
# The data is like that of the previous notebook, with one layer: inputs from
# four clusters, a frozen $f(x) = xW$, and targets $x(W + \Delta_g)$ with a
# change of rank 2 for each group $g$. MoLoRA has six experts of rank 2, more
# than there are groups. Its adapter is the package's module, trained by Adam;
# three seeds at once with `vmap`.
# %% [markdown] lang="zh"
# ## 在分组已知的数据上训练混合
#
# 数据与上一篇类似，只有一层：输入来自四个簇，冻结层 $f(x) = xW$，目标为
# $x(W + \Delta_g)$，每组 $g$ 有一个秩为 2 的改变量。MoLoRA 有六个秩 2 的专家，
# 多于组数。适配器是 moepeft 的模块，用 Adam 训练，用 `vmap` 同时跑三个种子。
# %%
DIM, GROUPS, E, R = 24, 4, 6, 2
STEPS, BATCH, SEEDS = 300, 64, 3
w = rng.normal(size=(DIM, DIM)) / DIM**0.5
centers = 1.2 * rng.normal(size=(GROUPS, DIM))
changes = (
  np.einsum(
    'gir,gro->gio',
    rng.normal(size=(GROUPS, DIM, 2)),
    rng.normal(size=(GROUPS, 2, DIM)),
  )
  / (2 * DIM) ** 0.5
)


def sample(count):
  group = rng.integers(GROUPS, size=count)
  x = centers[group] + rng.normal(size=(count, DIM))
  y = np.einsum('ti,tio->to', x, w + changes[group])
  return x.astype(np.float32), y.astype(np.float32), group


train_x, train_y, _ = sample(2048)
test_x, test_y, test_group = sample(1000)
layer = base_projection('btd,dc->btc', jnp.asarray(w, jnp.float32), jnp.float32)


def make(router):
  method = f'molora(experts={E}, rank={R}, alpha=4.0, router={router})'
  sites = t5.sites(t5.config('tiny'))
  return build(method, sites).adapter_map.at('encoder/mlp/wo')[0]


def predict(adapter, tree, x, ctx):
  return adapter.apply({'peft': tree}, layer, x[None], ctx)[0]


def train(adapter, seed):
  start, order = jax.random.split(jax.random.key(seed))
  x, y = jnp.asarray(train_x), jnp.asarray(train_y)
  tree = adapter.init({'peft': start}, layer, x[None, :1], Context())['peft']
  adam = optax.scale_by_adam()

  def loss(tree, rows):
    prediction = predict(adapter, tree, x[rows], Context(train=True))
    return jnp.mean((prediction - y[rows]) ** 2)

  def step(carry, i):
    tree, state = carry
    key = jax.random.fold_in(order, i)
    rows = jax.random.randint(key, (BATCH,), 0, len(x))
    update, state = adam.update(jax.grad(loss)(tree, rows), state)
    rate = 0.02 * (1 - i / STEPS)
    tree = jax.tree.map(lambda p, u: p - rate * u, tree, update)
    return (tree, state), None

  (tree, _), _ = jax.lax.scan(step, (tree, adam.init(tree)), jnp.arange(STEPS))
  return tree


@functools.cache
def trained(router):
  """(the adapter, its parameters for each seed)."""
  adapter = make(router)
  run = jax.jit(jax.vmap(functools.partial(train, adapter)))
  stacked = run(jnp.arange(SEEDS))
  return adapter, [
    jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(SEEDS)
  ]


def error(adapter, tree):
  prediction = predict(adapter, tree, jnp.asarray(test_x), Context())
  return float(jnp.mean((prediction - test_y) ** 2))


adapter, trees = trained('softmax')
base_error = float(np.mean((test_x @ w - test_y) ** 2))
print(f'frozen base {base_error:.3f};', end=' ')
print('MoLoRA', [round(error(adapter, tree), 4) for tree in trees])
assert max(error(adapter, tree) for tree in trees) < 0.5 * base_error
# %% [markdown] lang="en"
# ## Shares by group
#
# We take the weights of the first seed's run on the test data, $p [t, e]$.
# $\bar p$ is their mean over all tokens and $\bar p_g$ that over the tokens of
# group $g$, one row of the picture below; $P(g)$ is the share of the tokens
# that are in the group. Beside the picture, three numbers, in nats:
#
# - the mean **entropy** of a token's weights, $H(p) = -\sum_i p_i \ln p_i$: 0
#   if one expert has everything, $\ln e$ if all are equal;
# - the entropy of the **mean** weights, $H(\bar p)$: $\ln e$ if the loads are
#   even;
# - the **mutual information** of group and expert (if each token drew its
#   expert with probabilities $p$), $I = H(\bar p) - \sum_g P(g)\, H(\bar p_g)$:
#   0 if the expert says nothing about the group; at most $\ln 4$ here, with
#   four groups.
#
# An even load is compatible with $I = 0$: each group may be spread over all
# experts alike. "Balanced" is not "specialized".
# %% [markdown] lang="zh"
# ## 按组的占比
#
# 取第一个种子的训练在测试数据上的权重 $p [t, e]$。$\bar p$ 是它对所有 token
# 的平均，$\bar p_g$ 是对第 $g$ 组 token 的平均，即下图中的一行；$P(g)$ 是该组
# token 所占的比例。另外看三个数（单位 nat）：
#
# - 单个 token 权重的平均**熵** $H(p) = -\sum_i p_i \ln p_i$：某专家独占时为 0，
#   全部相等时为 $\ln e$；
# - **平均权重**的熵 $H(\bar p)$：负载均匀时为 $\ln e$；
# - 组与专家的**互信息**（设每个 token 按概率 $p$ 抽取专家）
#   $I = H(\bar p) - \sum_g P(g)\, H(\bar p_g)$：专家与组无关时为 0；
#   这里有四组，至多为 $\ln 4$。
#
# 负载均匀与 $I = 0$ 并不矛盾：每组都可以平均地分给所有专家。
# “均衡”不等于“专业化”。
# %%


def weights_of(adapter, tree, x):
  """The combine weights [t, e] of an adapter's router."""
  _, sown = adapter.apply(
    {'peft': tree}, layer, x[None], Context(), mutable=['weights']
  )
  return np.asarray(sown['weights']['weights'][0][0])


def entropy(p):
  p = np.asarray(p, np.float64)
  return -(p * np.log(np.where(p > 0, p, 1))).sum(axis=-1)


def by_group(p, group):
  return np.stack([p[group == g].mean(axis=0) for g in range(GROUPS)])


def information(p, group):
  frequency = np.bincount(group, minlength=GROUPS) / len(group)
  return entropy(p.mean(axis=0)) - frequency @ entropy(by_group(p, group))


p = weights_of(adapter, trees[0], test_x)
print(f'entropy of a token {entropy(p).mean():.2f},', end=' ')
print(f'of the mean {entropy(p.mean(axis=0)):.2f}, ln e {np.log(E):.2f}')
print(f'information {information(p, test_group):.2f}, at most {np.log(4):.2f}')
shuffled = information(p, rng.permutation(test_group))
assert information(p, test_group) > 5 * shuffled, 'the router sees the groups'
# %% [markdown] lang="en"
# The assertion compares with shuffled group labels: an estimate of the
# information from a sample is never exactly 0, and this is what remains by
# chance.
#
# The package's statistics are the same numbers from sums (so that they add up
# over batches and devices); `weight_entropy` is our first one.
# %% [markdown] lang="zh"
# 上面的断言与打乱的组标签比较：由样本估计的互信息从不恰好为 0，
# 打乱后剩下的就是偶然部分。
#
# moepeft 的统计量由求和得到同样的数（所以可以在 batch 和设备之间相加）；
# `weight_entropy` 就是我们的第一个数。
# %%
routing = Routing(jnp.log(p)[None], jnp.asarray(p)[None])
numbers = statistics(router_stats(routing, None))
assert abs(numbers.weight_entropy - entropy(p).mean()) < 1e-4
assert np.abs(numbers.share - p.mean(axis=0)).max() < 1e-5
# %% [markdown] lang="en"
# ## Similar experts
#
# Two experts that do the same have the same product $A_i B_i$, whatever their
# factors are. We compare products by their cosine, and the inner product of two
# matrices of low rank needs no large matrix:
#
# $$\langle A_1 B_1, A_2 B_2\rangle = \mathrm{tr}\,(B_1^\top A_1^\top A_2 B_2) =
# \mathrm{sum}\bigl((A_1^\top A_2) \odot (B_1 B_2^\top)\bigr),$$
#
# a sum over $[r, r]$. Comparing $A$ with $A$ instead would be wrong: with any
# invertible $M [r, r]$, $A \to A M$ and $B \to M^{-1} B$ leave the expert as it
# is.
# %% [markdown] lang="zh"
# ## 相似的专家
#
# 功能相同的两个专家，乘积 $A_i B_i$ 相同，因子却可以不同。我们比较乘积的余弦；
# 低秩矩阵的内积不需要大矩阵：
#
# $$\langle A_1 B_1, A_2 B_2\rangle = \mathrm{tr}\,(B_1^\top A_1^\top A_2 B_2) =
# \mathrm{sum}\bigl((A_1^\top A_2) \odot (B_1 B_2^\top)\bigr),$$
#
# 只对 $[r, r]$ 求和。直接比较 $A$ 与 $A$ 是错的：对任何可逆的 $M [r, r]$，
# $A \to A M$、$B \to M^{-1} B$ 不改变专家。
# %%


def cosines(a, b):
  """a [i, e, r], b [e, r, o] -> cosines of the products, [e, e]."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  aa = np.einsum('ier,igs->egrs', a, a)
  bb = np.einsum('ero,gso->egrs', b, b)
  inner = (aa * bb).sum(axis=(2, 3))
  norm = np.sqrt(np.diag(inner))
  return inner / np.outer(norm, norm)


tree = trees[0]
similarity = cosines(tree['a'], tree['b'])
arrays = {'a': tree['a'], 'b': tree['b']}
theirs = expert_similarity(adapter, arrays, stacked=False)[0]
assert np.abs(similarity - theirs).max() < 1e-6

# The factors may change, the expert does not.
mix = rng.normal(size=(E, R, R))
a2 = np.einsum('ier,ers->ies', tree['a'], mix)
b2 = np.einsum('ers,eso->ero', np.linalg.inv(mix), tree['b'])
assert np.abs(cosines(a2, b2) - similarity).max() < 1e-3
# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.6))
image = left.imshow(by_group(p, test_group), cmap='Blues', vmin=0, vmax=1)
left.set(xlabel='expert', ylabel='group', title='mean weight')
fig.colorbar(image, ax=left, shrink=0.7)
image = right.imshow(similarity, cmap='RdBu', vmin=-1, vmax=1)
right.set(xlabel='expert', ylabel='expert', title='cosine of A B')
fig.colorbar(image, ax=right)
fig.tight_layout()
plt.show()
# %% [markdown] lang="en"
# ## Removing an expert
#
# Shares show where tokens go, not whether it matters. The direct question is:
# how much does the error of each group grow if one expert is removed? We set
# its weight to zero and renormalize the rest; in the package's terms, an
# `expert_mask`, which takes the expert out before the softmax. In the printed
# table the first row has all experts, and the rows below lack expert 0, 1 and
# so on.
# %% [markdown] lang="zh"
# ## 删除一个专家
#
# 占比只说明 token 去了哪里，不说明是否重要。直接的问题是：删掉一个专家，
# 每组的误差增加多少？我们把它的权重置零并对其余归一化；在 moepeft 中就是
# `expert_mask`，在 softmax 之前去掉该专家。打印的表中，第一行是全部专家，
# 以下各行依次去掉专家 0、1 等。
# %%


def group_errors(adapter, tree, expert_mask=None):
  variables = {'peft': tree['router']}
  ctx = Context(expert_mask=expert_mask)
  routing = adapter.router.apply(variables, test_x[None], ctx)
  p = np.asarray(routing.combine_weights[0])
  z = np.einsum('ti,ier->ter', test_x, tree['a']) * p[:, :, None] * 4.0 / R
  y = test_x @ w + np.einsum('ter,ero->to', z, tree['b'])
  squares = ((y - test_y) ** 2).mean(axis=1)
  return np.array([squares[test_group == g].mean() for g in range(GROUPS)])


whole = group_errors(adapter, tree)
frequency = np.bincount(test_group) / len(test_group)
# Our own forward pass is the module's.
assert abs(whole @ frequency - error(adapter, tree)) < 1e-3 * base_error
removed = np.stack(
  [group_errors(adapter, tree, jnp.arange(E) != i) for i in range(E)]
)
growth = removed - whole
print('error of each group (columns), one expert removed (rows):')
print(np.round(np.vstack([whole, removed]), 3))
shares = by_group(p, test_group).T
correlation = np.corrcoef(shares.ravel(), growth.ravel())[0, 1]
print(f'correlation of share and growth {correlation:.2f}')
assert correlation > 0.5, 'experts with weight in a group should matter there'
# %% [markdown] lang="en"
# Removing an expert raises the error of the groups that give it weight, and
# hardly that of the others. Groups 0 and 3 share two experts here and keep the
# largest errors; the first seed is the worst of the three. Training does not
# always find an expert for each group.
#
# ## Other routers
#
# A claim that *routing* helps needs a control in which everything but the
# routing is there. Two are cheap: `uniform` gives all experts $1/e$ for every
# token (the mixture is then one LoRA of rank $er$), and `random` sends each
# token to an expert by a fixed random projection (nothing is learned; but as
# similar tokens often go to one expert, its information is not 0). All routers
# train the same experts at the same rate; the rate was not tuned for each, so
# read large differences only (notebook 27 shows how to do better). Weights that
# do not sum to one are normalized before entropy and information are computed.
# %% [markdown] lang="zh"
# 删掉一个专家，给它权重的那些组误差上升，其他组几乎不变。这里第 0 组和第 3
# 组共用两个专家，误差仍是最大的；第一个种子也是三个中最差的。
# 训练并不总能为每组找到一个专家。
#
# ## 其他路由器
#
# 要说*路由*有用，需要一个除路由外一切相同的对照。有两个很便宜：`uniform` 给每个
# token 的所有专家 $1/e$（混合就成了一个秩 $er$ 的 LoRA）；`random`
# 用固定的随机投影把 token 送到专家（什么也没学；但相似的 token 常去同一专家，
# 所以互信息不为 0）。所有路由器以同样的学习率训练同样的专家；
# 学习率没有为每个分别调过，所以只看大的差别（笔记 27 说明怎样做得更好）。
# 权重之和不为 1 时，先归一化，再计算熵和互信息。
# %%
NAMES = (
  'softmax',
  'topk(k=2, renormalize=True)',
  'topk(k=1, renormalize=False)',
  'sigmoid',
  'random(k=1)',
  'uniform',
)
results = {}
print(f'{"router":30} {"error":>7} {"entropy":>8} {"information":>12}')
for name in NAMES:
  adapter, trees = trained(name)
  rows = []
  for tree in trees:
    q = weights_of(adapter, tree, test_x)
    q = q / np.maximum(q.sum(axis=1, keepdims=True), 1e-9)
    rows.append(
      (
        error(adapter, tree),
        entropy(q).mean(),
        information(q, test_group),
      )
    )
  results[name] = np.mean(rows, axis=0)
  print('{:30} {:7.4f} {:8.2f} {:12.2f}'.format(name, *results[name]))
assert abs(results['uniform'][1] - np.log(E)) < 1e-3
assert results['softmax'][0] < results['uniform'][0], 'routing should help here'
# %%
fig, ax = plt.subplots(figsize=(5, 2.4))
ax.barh(list(results), [row[0] for row in results.values()], color='C0')
ax.axvline(base_error, color='gray', linestyle=':', label='frozen base')
ax.set(xlabel='test error, mean of 3 seeds')
ax.invert_yaxis()
ax.legend()
fig.tight_layout()
plt.show()
# %% [markdown] lang="en"
# ## Causality
#
# A decoder is trained on all positions of a text at once: position $t$ predicts
# token $t+1$ from tokens up to $t$. This is legitimate only if nothing at
# position $t$ depends on later tokens. Attention has its mask. A *router* that
# reads more than its own token needs the same care. Take a router that pools
# the whole row of $T$ tokens, "one routing for the sentence":
#
# $$p = \mathrm{softmax}\Bigl(\frac1T\sum_{s=1}^{T} x_s W_g\Bigr).$$
#
# In training, the routing of the first token is a function of the tokens that
# it has to predict: the loss looks better than it is, and at generation, where
# later tokens do not exist, the model computes something else. No error appears
# anywhere. So it must be tested: **change the tokens from position $j$ on, and
# compare the routing before $j$.** The cell does it with $j = 5$ in rows of 8
# tokens, for this router and six of the package. Of these, `token_mean` gives
# all tokens of a row the mean of their softmaxes, `expert_choice` lets each
# expert take the tokens of the row with the largest $p$, and `sentence` is
# explained below. `causal` is what the router's entry in the registry says.
# %% [markdown] lang="zh"
# ## 因果性
#
# 解码器一次在文本的所有位置上训练：位置 $t$ 用到 $t$ 为止的 token 预测第 $t+1$
# 个。只有当位置 $t$ 的一切都不依赖之后的 token 时，这才正当。
# 注意力有掩码；*路由器*若读取自身 token 之外的内容，同样要小心。
# 设想一个对整行 $T$ 个 token 做池化的路由器，“整句一个路由”：
#
# $$p = \mathrm{softmax}\Bigl(\frac1T\sum_{s=1}^{T} x_s W_g\Bigr).$$
#
# 训练时，第一个 token 的路由是它要预测的 token 的函数：损失看上去比实际好；
# 而生成时之后的 token 不存在，模型算的是另一个函数。哪里都不会报错。
# 所以必须测试：**改变位置 $j$ 及之后的 token，比较 $j$ 之前的路由。** 下面取
# $j = 5$，每行 8 个 token，检验这个路由器和 moepeft 的六个路由器。其中
# `token_mean` 给一行的所有 token 同一个权重，即各 token softmax 的平均；
# `expert_choice` 让每个专家挑选该行中 $p$ 最大的 token；`sentence` 见下文。
# `causal` 是注册表中该路由器的属性。
# %%
LENGTH, PROMPT = 8, 3
row = rng.normal(size=(1, LENGTH, DIM)).astype(np.float32)
changed = row.copy()
changed[:, PROMPT + 2 :] = rng.normal(size=changed[:, PROMPT + 2 :].shape)
ctx = Context(
  token_mask=jnp.ones((1, LENGTH), bool),
  prompt_mask=jnp.arange(LENGTH)[None] < PROMPT,
)


def pool_everything(x, kernel):
  mean = x.mean(axis=1, keepdims=True) + 0 * x
  return np.asarray(jax.nn.softmax(mean @ kernel))


def leak(weights):
  """The largest change of the routing before the changed tokens."""
  difference = np.abs(weights(row) - weights(changed))
  return float(difference[:, : PROMPT + 2].max())


kernel = rng.normal(size=(DIM, 3)).astype(np.float32)
leaks = {'pools everything': leak(lambda x: pool_everything(x, kernel))}
assert leaks['pools everything'] > 1e-3, 'the test must find this one'

for name, options in (
  ('softmax', {}),
  ('topk', {'k': 2}),
  ('switch', {'capacity': 2}),
  ('sentence', {}),
  ('token_mean', {}),
  ('expert_choice', {'capacity_factor': 1.2}),
):
  router = ROUTERS[name].module(experts=3, **options)
  variables = router.init({'peft': jax.random.key(1)}, row, ctx)
  in_training = ctx.replace(train=True)
  leaks[name] = leak(
    lambda x, router=router, variables=variables, ctx=in_training: np.asarray(
      router.apply({'peft': variables['peft']}, x, ctx).combine_weights
    )
  )
for name, value in leaks.items():
  says = ROUTERS[name].causal if name in ROUTERS else '-'
  print(f'{name:17} leak {value:.1e}   entry says causal: {says}')
for name in leaks.keys() & set(ROUTERS):
  assert (leaks[name] == 0) == ROUTERS[name].causal, name
# %% [markdown] lang="en"
# `sentence` passes although it pools: it takes the mean over the **prompt**
# alone, which is there before the first token is generated. Its entry has
# `pools_prompt=True`. (Within the prompt, later tokens do count; nothing is
# predicted there.) `expert_choice` and `token_mean` are for encoders, and the
# package refuses them elsewhere:
# %% [markdown] lang="zh"
# `sentence` 也做池化，却通过了测试：它只对**提示**（prompt）求平均，
# 而提示在生成第一个 token 之前就已存在。它的属性 `pools_prompt` 为 True。
# （在提示内部，后面的 token 确实有影响，但那里不做预测。）`expert_choice` 和
# `token_mean` 只用于编码器，moepeft 在别处拒绝它们：
# %%
for name, sites, targets in (
  ('encoder', t5.sites(t5.config('tiny')), 'encoder/*/q'),
  ('decoder', decoder.sites(DecoderConfig()), '*/q'),
):
  text = f"molora(router=expert_choice, targets='{targets}')"
  try:
    build(text, sites)
    outcome = 'accepted'
  except ValueError as refusal:
    outcome = f'refused: {refusal}'
  print(f'{name}: {outcome}')
  assert outcome.startswith({'encoder': 'acc', 'decoder': 'ref'}[name])
# %% [markdown] lang="en"
# ## The same on a run
#
# Now a whole T5. The next cell trains MoLoRA on the tasks that the package
# generates, for 24 steps only, at the output projections `wo` of the
# feed-forwards.
# Set the variable `MOEPEFT_WORKDIR` to the directory of a run of your own (a
# mixture) to look at that instead.
# %% [markdown] lang="zh"
# ## 在一次运行上看
#
# 下面换成完整的 T5。下一个代码单元在 moepeft 自己生成的任务上训练 MoLoRA，
# 只训练 24 步，位置是前馈的输出投影 `wo`。把环境变量 `MOEPEFT_WORKDIR`
# 设为你自己的运行目录（需是混合方法），就会改看那次运行。
# %%
workdir = os.environ.get('MOEPEFT_WORKDIR', '')
if not workdir:
  workdir = os.path.join(tempfile.mkdtemp(), 'run')
  command = [
    *(sys.executable, '-m', 'moepeft.train', '--config=configs/molora_t5.py'),
    f'--workdir={workdir}',
    "--config.method=molora(experts=4, rank=4, targets='*/mlp/wo')",
    *('--config.steps=24', '--config.batch_size=16'),
    *('--config.log.every_steps=4', '--config.log.plots=False'),
    '--config.log.trackers=',
    '--config.evaluation.before=False',
    '--config.evaluation.after=False',
  ]
  result = subprocess.run(command, capture_output=True, text=True)
  assert result.returncode == 0, result.stderr[-2000:]
tree, card = restore_adapter(workdir)
for key in ('method', 'semantics', 'seed'):
  print(f'{key:10} {card[key]}')
for path, array in flax.traverse_util.flatten_dict(tree, sep='/').items():
  if path.startswith('encoder/'):
    print(f'{path:40} {array.shape}')
# %% [markdown] lang="en"
# A checkpoint is the adapter alone and a card with the method, the semantics,
# the seed and the base's hash. The first axis of each array is the layer.
# `metrics.jsonl` has a `routing` entry at each log interval: for each site and
# layer the experts' shares (`weight` for dense routers, `tokens` for sparse
# ones) and the mean entropy in nats. On the left of the figure, a row is a
# layer's shares at the last log; on the right is the entropy, a mean over the
# layers, with $\ln e$ dashed.
# %% [markdown] lang="zh"
# 检查点只含适配器和一张卡片：方法、语义、种子、基座的哈希。
# 每个数组的第一个轴是层。`metrics.jsonl` 在每个日志间隔有一项 `routing`：
# 每个位置、每一层的专家占比（稠密路由器为 `weight`，稀疏的为 `tokens`）
# 以及平均熵（单位 nat）。图左每行是最后一次记录时某一层的占比；
# 图右是对各层平均的熵，虚线为 $\ln e$。
# %%
logged = [
  line
  for line in metrics_log.stream(os.path.join(workdir, 'metrics.jsonl'))
  if 'routing' in line
]
last = logged[-1]['routing']
shares = {path: metrics_log.share_array(site)[1] for path, site in last.items()}
labels = [
  f'{path.split("/")[0]} {i}'
  for path, s in shares.items()
  for i in range(len(s))
]
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.4))
stacked = np.concatenate(list(shares.values()))
image = left.imshow(stacked, cmap='Blues', vmin=0, aspect='auto')
fig.colorbar(image, ax=left)
left.set_yticks(range(len(labels)), labels, fontsize=7)
left.set(xlabel='expert', title=f'share, step {logged[-1]["step"]}')
for path in last:
  means = [np.mean(line['routing'][path]['entropy']) for line in logged]
  right.plot([line['step'] for line in logged], means, label=path.split('/')[0])
right.axhline(np.log(stacked.shape[1]), color='gray', linestyle='--')
right.set(xlabel='step', ylabel='entropy, nats')
right.legend(fontsize=7)
fig.tight_layout()
plt.show()
# A router of 0.02-normal weights starts near ln e; it cannot be above.
assert all(
  np.max(line['routing'][path]['entropy']) < np.log(stacked.shape[1]) + 1e-3
  for line in logged
  for path in last
)
assert np.abs(stacked.sum(axis=1) - 1).max() < 1e-3
# %% [markdown] lang="en"
# Last, one text, token by token. The layers return full weights only on
# request, by naming the collection `weights` in `mutable`; `moepeft.load` opens
# the run with its adapter. The cell prints each token with its strongest expert
# in the encoder's last layer; the tokens of this small model are characters.
# %% [markdown] lang="zh"
# 最后逐 token 看一段文本。各层只在请求时返回完整的权重：在 `mutable`
# 中写上集合名 `weights`；`moepeft.load` 打开运行及其适配器。打印的是每个 token
# 及其在编码器最后一层权重最大的专家；这个小模型的 token 是单个字符。
# %%
model = moepeft.load(workdir).loaded
(example,) = tasks.examples(tasks.task_names('B'), 1, seed=1, split='held_out')
ids = [*model.tokenizer.encode(example.inputs), model.tokenizer.eos]
batch = {
  'inputs': np.array([ids], np.int32),
  'decoder_inputs': np.zeros((1, 1), np.int32),
}
_, sown = model.model.apply(model.variables, batch, mutable=['weights'])
flat = flax.traverse_util.flatten_dict(sown['weights'], sep='/')
path = next(path for path in flat if path.startswith('encoder'))
weights = np.asarray(flat[path][0])[-1, 0]  # [l, b, t, e]: the last layer
print(example.inputs)
strongest = weights.argmax(axis=1)
tokens = [model.tokenizer.decode([i]) for i in ids]
print([f'{token}:{i}' for token, i in zip(tokens, strongest, strict=True)][:12])
assert weights.shape == (len(ids), stacked.shape[1])
assert np.abs(weights.sum(axis=1) - 1).max() < 1e-3
# %% [markdown] lang="en"
# The entropy leaves $\ln e$ within a few steps: the routers prefer experts
# early. Whether a preference means something is another question, and these few
# steps do not answer it: use the tools from above (shares by task, removal of
# an expert) on a full run of `configs/molora_t5.py`, which takes minutes.
# `python -m moepeft.routing RUN --output=DIR` writes all of these views as a
# page, with ablations and tokens.
#
# ## Exercises
#
# 1. *Effective number of experts.* $\exp(H(\bar p))$ is 1 if one expert has all
#    weight and $e$ if the loads are even, so it is the number of experts that
#    are used. Compute it for the run with softmax (its first seed, `p`), for
#    each group and in all. Which experts can be dropped with the smallest
#    growth of the error?
# 2. *Causal pooling.* Write a router that pools the tokens up to and including
#    its own (a running mean). Show by `leak` that it is causal, and compute it
#    one token at a time as generation does, from a running sum. Both must
#    agree.
# 3. *Merging a mixture.* Replace the router by its mean weights $\bar p$: the
#    mixture becomes one matrix that could be merged into the base. How much
#    does the error grow, compared with `uniform`? (The package's
#    `evaluation.routing.reduce` does this to runs.)
#
# Solutions are in `solutions/`.
#
# ## Interview questions
#
# **Your MoE's experts have even loads. Does this show that they are
# specialized? Which measurement would?**
#
# <details><summary>Answer</summary>
#
# No. Even loads say that $\bar p$ is even; each kind of token may still be
# spread over all experts alike, as with the router `uniform`. Measure the
# dependence: shares by task or token kind, their mutual information against
# shuffled labels, and above all the effect of removing an expert on each kind.
# The control is a run with a random router of the same size.
#
# </details>
#
# **A decoder with sentence-level routing has a suspiciously low training loss.
# What do you test?**
#
# <details><summary>Answer</summary>
#
# Whether the routing of a position depends on later tokens: change the end of a
# row, and compare routing and logits before the change; they must be bitwise or
# nearly equal. A mean over the whole row leaks the answer into its own
# prediction. Allowed are the token itself, what precedes it, and the prompt.
#
# </details>
#
# ## In the package
#
# - {{moepeft.moe.router.RouterSpec}}: the facts of each router (`causal`,
#   `normalized`, `pools_prompt`, ...). `tests/contracts/test_routers.py` checks
#   each true one and has a counterexample for each false one.
# - {{moepeft.moe.routers.sentence.Sentence}} keeps the prompt's mean in the
#   cache, so that generation computes what training did.
# - {{moepeft.evaluation.routing.collect.collect}},
#   {{moepeft.evaluation.routing.similarity.expert_similarity}} and
#   {{moepeft.evaluation.routing.reduce.prune}} on runs, by task and language.
# - {{moepeft.runs.metrics_log.shares}} reads the log;
#   {{moepeft.checkpoints.restore.restore_adapter}} the adapter and its card.
# - Papers: random routing [arXiv:2303.01610](https://arxiv.org/abs/2303.01610),
#   SMEAR (sentence routing)
#   [arXiv:2306.03745](https://arxiv.org/abs/2306.03745), expert choice
#   [arXiv:2202.09368](https://arxiv.org/abs/2202.09368).
# %% [markdown] lang="zh"
# 几步之内熵就离开了 $\ln e$：路由器很早就有偏好。偏好是否有意义是另一个问题，
# 这几步回答不了：请用前面的工具（按任务的占比、删除专家），在完整的
# `configs/molora_t5.py` 运行上问，它需要几分钟。
# `python -m moepeft.routing RUN --output=DIR` 把这些视图写成网页，
# 包括删除专家的实验和逐 token 的颜色。
#
# ## 练习
#
# 1. *有效专家数。* 某专家独占时 $\exp(H(\bar p))$ 为 1，负载均匀时为 $e$，
#    所以它是实际使用的专家数。对 softmax 的训练（第一个种子，`p`），
#    按组和总体分别计算。去掉哪些专家，误差增加最小？
# 2. *因果池化。* 写一个只对到自身为止的 token 做池化的路由器（累积平均）。用
#    `leak` 验证它是因果的，再像生成那样逐 token 用累加和计算，两者必须一致。
# 3. *合并混合。* 用平均权重 $\bar p$ 代替路由器：
#    混合变成一个可以并入基座的矩阵。与 `uniform` 相比，误差增加多少？（moepeft
#    的 `evaluation.routing.reduce` 对运行做这件事。）
#
# 答案在 `solutions/`。
#
# ## 面试题
#
# **MoE 各专家负载均匀。这说明它们专业化了吗？该测什么？**
#
# <details><summary>答案</summary>
#
# 不能。负载均匀只说明 $\bar p$ 均匀；每类 token 仍可能平均分给所有专家，
# 就像路由器 `uniform` 那样。应测依赖关系：按任务或 token 类别的占比、
# 与打乱标签对比的互信息，最重要的是删除某专家对每类的影响。对照是同样大小、
# 用随机路由器的运行。
#
# </details>
#
# **一个句子级路由的解码器，训练损失低得可疑。你测什么？**
#
# <details><summary>答案</summary>
#
# 测某位置的路由是否依赖之后的 token：改变行尾，比较改变处之前的路由和 logits，
# 必须逐位或几乎相等。对整行求平均会把答案泄漏给自己的预测。允许读取的是 token
# 自身、它之前的内容，以及提示。
#
# </details>
#
# ## 在 moepeft 中
#
# - {{moepeft.moe.router.RouterSpec}}：每个路由器的属性（`causal`、
#   `normalized`、`pools_prompt` 等）。`tests/contracts/test_routers.py`
#   检验每个为真的属性，并为每个为假的属性给出反例。
# - {{moepeft.moe.routers.sentence.Sentence}} 把提示的均值放在缓存里，
#   使生成与训练计算同样的函数。
# - {{moepeft.evaluation.routing.collect.collect}}、
#   {{moepeft.evaluation.routing.similarity.expert_similarity}}、
#   {{moepeft.evaluation.routing.reduce.prune}} 作用于运行，按任务和语言统计。
# - {{moepeft.runs.metrics_log.shares}} 读日志；
#   {{moepeft.checkpoints.restore.restore_adapter}} 读适配器及其卡片。
# - 论文：随机路由 [arXiv:2303.01610](https://arxiv.org/abs/2303.01610)、
#   SMEAR（句子级路由）[arXiv:2306.03745](https://arxiv.org/abs/2306.03745)、
#   expert choice [arXiv:2202.09368](https://arxiv.org/abs/2202.09368)。
# %% [markdown] lang="en" tags=["solution"]
# # Experts and routers: solutions
#
# ## Exercise 1
# %% [markdown] lang="zh" tags=["solution"]
# # 专家与路由器：答案
#
# ## 练习 1
# %% tags=["solution"]
effective = np.exp(entropy(p.mean(axis=0)))
for_groups = np.exp(entropy(by_group(p, test_group)))
print(f'experts in use {effective:.2f}; by group {for_groups.round(2)}')
assert 1 <= for_groups.mean() < effective <= E
total_growth = growth @ frequency
order = np.argsort(total_growth)
print(
  'growth of the error:',
  dict(zip(order.tolist(), total_growth[order].round(3).tolist(), strict=True)),
)
load = p.mean(axis=0)
assert load[order[-1]] > load[order[0]], 'the least missed has less load'
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 2
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 2
# %% tags=["solution"]


def causal_pool(x, kernel):
  count = np.arange(1, x.shape[1] + 1)[None, :, None]
  return np.asarray(jax.nn.softmax(np.cumsum(x, axis=1) / count @ kernel))


assert leak(lambda x: causal_pool(x, kernel)) == 0
total, one_at_a_time = np.zeros(DIM), []
for t in range(LENGTH):
  total = total + row[0, t]
  one_at_a_time.append(jax.nn.softmax(total / (t + 1) @ kernel))
gap = np.abs(np.stack(one_at_a_time) - causal_pool(row, kernel)[0]).max()
assert gap < 1e-5, 'a cache of one running sum is all that generation needs'
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 3
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 3
# %% tags=["solution"]
adapter, (tree, *_) = trained('softmax')
merged = w + 4.0 / R * np.einsum('e,ier,ero->io', load, tree['a'], tree['b'])
merged_error = float(np.mean((test_x @ merged - test_y) ** 2))
print(f'routed {error(adapter, tree):.3f}, merged {merged_error:.3f},', end=' ')
print(f'trained with uniform weights {results["uniform"][0]:.3f}')
assert merged_error > error(adapter, tree)
# Trained with a router, the experts are not made to be averaged.
assert merged_error > results['uniform'][0]

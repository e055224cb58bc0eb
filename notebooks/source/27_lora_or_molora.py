# SPDX-License-Identifier: Apache-2.0
# %% [markdown] lang="en"
# # LoRA or MoLoRA: a fair comparison
#
# "Our method beats LoRA" is easy to print and hard to show. This notebook
# compares MoLoRA with LoRA on one frozen network and two small problems, with
# equal parameters, equal scale, a learning rate that each method chooses for
# itself, several seeds, and an interval for the difference. One problem is made
# so that a mixture could help, the other so that it could not. The result is
# stated as it comes out.
#
# About 45 minutes. Before it: notebooks 15 (LoRA) and 26 (MoV and MoLoRA).
#
# ## What you will understand
#
# - the four things to hold equal before two adapters can be compared, and why
#   the learning rate is *not* one of them;
# - what validation data is for, and why the test data may be used once;
# - a bootstrap interval of a difference, over examples and over seeds;
# - what it means that an interval contains zero, and what it does not mean;
# - on which kind of data a mixture of low-rank experts can do what one LoRA of
#   equal size cannot.
# %% [markdown] lang="zh"
# # LoRA 还是 MoLoRA：一次公平的比较
#
# “我们的方法胜过 LoRA”写出来容易，证明起来难。本篇在同一个冻结网络、
# 两个小问题上比较 MoLoRA 与 LoRA：参数量相等、缩放相等、学习率各自选择、
# 多个随机种子、并给出差值的区间。一个问题是为“混合可能有用”设计的，
# 另一个则相反。结果如实报告。
#
# 大约 45 分钟。先修：笔记 15（LoRA）、26（MoV 与 MoLoRA）。
#
# ## 你将理解什么
#
# - 比较两个适配器之前必须保持相等的四件事，以及为什么学习率*不*在其中；
# - 验证集的用途，以及为什么测试集只能用一次；
# - 差值的 bootstrap 区间：同时对样本和随机种子重采样；
# - 区间包含零意味着什么、不意味着什么；
# - 在怎样的数据上，低秩专家的混合能做到同样大小的单个 LoRA 做不到的事。
# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import moepeft
from moepeft.checkpoints.solve_method import with_explicit_method
from moepeft.core.types import Context
from moepeft.evaluation import bootstrap
from moepeft.models.t5 import model as t5
from moepeft.nn.linear import base_projection
from moepeft.peft.build import build

rng = np.random.default_rng(0)
# %% [markdown] lang="en"
# ## The frozen network and two problems
#
# The base is a network of two layers, $f(x) = \mathrm{relu}(x W_1) W_2$, that
# stays frozen. The data asks for another function: $W_1 + \Delta_1$ and
# $W_2 + \Delta_2$ with changes of low rank.
#
# - *four groups*: inputs come from four clusters, and each cluster has changes
#   of its own, of rank 2. Nothing but the input says to which group it belongs.
# - *one group*: the same four clusters of inputs, but one change for all of
#   them, of rank 8.
#
# Four experts of rank 2 with a router that knows the clusters would solve the
# first exactly. One LoRA of rank 8 would solve the second exactly. Targets have
# noise of variance 0.01, which nobody can predict.
# %% [markdown] lang="zh"
# ## 冻结网络与两个问题
#
# 基座是两层网络 $f(x) = \mathrm{relu}(x W_1) W_2$，保持冻结。
# 数据要求的是另一个函数：$W_1 + \Delta_1$ 与 $W_2 + \Delta_2$，改变量是低秩的。
#
# - *four groups*（四组）：输入来自四个簇，每个簇有自己的秩为 2 的改变量。
#   除输入之外，没有任何信息说明它属于哪一组。
# - *one group*（一组）：输入同样来自四个簇，但所有簇共用一个秩为 8 的改变量。
#
# 四个秩 2 的专家加上认得簇的路由器，可以精确解决第一个问题；一个秩 8 的 LoRA
# 可以精确解决第二个。目标含方差 0.01 的噪声，谁也无法预测。
# %%
DIM, HIDDEN, GROUPS = 32, 64, 4
NOISE = 0.1


def low_rank(i, o, rank):
  return (
    rng.normal(size=(i, rank)) @ rng.normal(size=(rank, o)) / (i * rank) ** 0.5
  )


w1 = rng.normal(size=(DIM, HIDDEN)) / DIM**0.5
w2 = rng.normal(size=(HIDDEN, DIM)) / HIDDEN**0.5
centers = 1.5 * rng.normal(size=(GROUPS, DIM))
per_group = [
  (low_rank(DIM, HIDDEN, 2), low_rank(HIDDEN, DIM, 2)) for _ in range(GROUPS)
]
for_all = [(low_rank(DIM, HIDDEN, 8), low_rank(HIDDEN, DIM, 8))] * GROUPS


def sample(changes, count):
  group = rng.integers(GROUPS, size=count)
  x = centers[group] + rng.normal(size=(count, DIM))
  y = np.zeros_like(x)
  for g, (d1, d2) in enumerate(changes):
    rows = group == g
    y[rows] = np.maximum(x[rows] @ (w1 + d1), 0) @ (w2 + d2)
  y += NOISE * rng.normal(size=y.shape)
  return x.astype(np.float32), y.astype(np.float32)


SIZES = {'train': 2048, 'validation': 512, 'test': 1000}
problems = {
  name: {split: sample(changes, n) for split, n in SIZES.items()}
  for name, changes in (('four groups', per_group), ('one group', for_all))
}
for name, splits in problems.items():
  x, y = splits['test']
  error = np.mean((np.maximum(x @ w1, 0) @ w2 - y) ** 2)
  print(f'{name}: error of the frozen base {error:.3f}')
# %% [markdown] lang="en"
# ## What is held equal
#
# 1. *Parameters.* At a projection $i \to o$, MoLoRA has $e\,r(i+o) + e\,i$,
#    LoRA $r'(i+o)$. For $e = 4$, $r = 2$ we solve for $r'$: the routers count
#    too.
# 2. *Scale.* Both multiply their term by $\frac{\alpha}{r}$, and the default of
#    $\alpha$ does not depend on the rank in most libraries. With $\alpha$
#    equal, the LoRA of a larger rank has a smaller scale, and a comparison at
#    one learning rate compares scales. So $\alpha / r = 2$ for both.
# 3. *Data, steps, batch, optimizer, schedule, frozen weights.*
# 4. *Effort.* Both choose from the same grid of learning rates.
#
# The learning rate itself is not held equal. Its best value depends on the
# parametrization; at one common rate, the method wins whose best rate that
# happens to be.
# %% [markdown] lang="zh"
# ## 哪些保持相等
#
# 1. *参数量。* 在投影 $i \to o$ 处，MoLoRA 有 $e\,r(i+o) + e\,i$ 个参数，LoRA
#    有 $r'(i+o)$ 个。取 $e = 4$、$r = 2$，解出 $r'$：路由器也要计入。
# 2. *缩放。* 两者的附加项都乘以 $\frac{\alpha}{r}$，而在多数库里 $\alpha$
#    的默认值不随秩变化。$\alpha$ 相等时，秩大的 LoRA 缩放较小，
#    在同一学习率下比较，比的其实是缩放。所以两者都取 $\alpha / r = 2$。
# 3. *数据、步数、batch、优化器、学习率曲线、冻结权重。*
# 4. *调参力度。* 两者从同一组学习率里选。
#
# 学习率本身不保持相等。它的最佳值取决于参数化方式；若用同一个学习率，
# 谁的最佳值恰好是它，谁就赢。
# %%
E, R, SCALE = 4, 2, 2.0
PROJECTIONS = ((DIM, HIDDEN), (HIDDEN, DIM))
molora_count = sum(E * R * (i + o) + E * i for i, o in PROJECTIONS)
lora_rank = round(molora_count / sum(i + o for i, o in PROJECTIONS))
METHODS = {
  'LoRA': f'lora(rank={lora_rank}, alpha={SCALE * lora_rank})',
  'MoLoRA': f'molora(experts={E}, rank={R}, alpha={SCALE * R})',
}
layers = (
  base_projection('btd,df->btf', jnp.asarray(w1, jnp.float32), jnp.float32),
  base_projection('btf,fd->btd', jnp.asarray(w2, jnp.float32), jnp.float32),
)


def make(method):
  """The package's module; it is the same for every projection."""
  sites = t5.sites(t5.config('tiny'))
  return build(method, sites).adapter_map.at('encoder/mlp/wo')[0]


def initial(adapter, key):
  """The adapter's parameters at both layers."""
  keys, ctx = jax.random.split(key), Context()
  inputs = (jnp.zeros((1, 1, DIM)), jnp.zeros((1, 1, HIDDEN)))
  return [
    adapter.init({'peft': k}, layer, x, ctx)['peft']
    for k, layer, x in zip(keys, layers, inputs, strict=True)
  ]


counts = {}
for name, method in METHODS.items():
  tree = initial(make(method), jax.random.key(0))
  counts[name] = sum(leaf.size for leaf in jax.tree.leaves(tree))
  print(f'{name:6} {counts[name]:,} parameters: {method}')
assert counts['MoLoRA'] == molora_count
assert abs(counts['LoRA'] / counts['MoLoRA'] - 1) < 0.01, 'equal within 1 %'
# %% [markdown] lang="en"
# Note what the count hides: without routers, MoLoRA has rank $er = 8$ in all. A
# comparison at *equal rank* would give LoRA rank 8 and MoLoRA 25 % more
# parameters.
#
# On a real model the package does this arithmetic: `config.budget` asks for
# another method's number of parameters, and `config.scale` for its scale. For
# the T5 that ships with it:
# %% [markdown] lang="zh"
# 注意计数掩盖的一点：除去路由器，MoLoRA 总秩为 $er = 8$。若按*等秩*比较，LoRA
# 秩为 8，MoLoRA 会多出 25% 的参数。
#
# 在真实模型上，moepeft 会做这个计算：`config.budget` 要求与另一方法参数量相等，
# `config.scale` 要求缩放相等。以自带的 T5 为例：
# %%
config = moepeft.load_config('configs/molora_t5.py')
config.method = 'lora'
config.budget = 'params:molora(experts=10, rank=4)'
config.scale = 'matched:molora(experts=10, rank=4)'
solved = with_explicit_method(config).method
print(solved)
values = dict(part.split('=') for part in solved[len('lora(') : -1].split(', '))
# MoLoRA there has alpha 16 and rank 4.
assert float(values['alpha']) / int(values['rank']) == 16 / 4
# %% [markdown] lang="en"
# ## Training
#
# Adam with a linear decay to zero, 400 steps of 64 examples. The function takes
# a learning rate and a seed; `vmap` trains six of them at once: the grid of six
# rates is one call for each method and problem, and so are the six seeds of the
# final comparison.
# %% [markdown] lang="zh"
# ## 训练
#
# Adam，学习率线性衰减到零，400 步，每步 64 个样本。函数的参数是学习率和种子；
# `vmap` 同时训练六组：对每种方法和每个问题，六个学习率的网格只需一次调用，
# 最终比较的六个种子也是。
# %%
STEPS, BATCH = 400, 64


def predict(adapter, tree, x):
  ctx = Context()
  hidden = adapter.apply({'peft': tree[0]}, layers[0], x[None], ctx)
  hidden = jax.nn.relu(hidden)
  return adapter.apply({'peft': tree[1]}, layers[1], hidden, ctx)[0]


def train(adapter, rate, seed, x, y, held_x, held_y):
  """The squared error of each held-out example, [n]."""
  start, order = jax.random.split(jax.random.key(seed))
  tree, adam = initial(adapter, start), optax.scale_by_adam()

  def loss(tree, rows):
    return jnp.mean((predict(adapter, tree, x[rows]) - y[rows]) ** 2)

  def step(carry, i):
    tree, state = carry
    key = jax.random.fold_in(order, i)
    rows = jax.random.randint(key, (BATCH,), 0, len(x))
    update, state = adam.update(jax.grad(loss)(tree, rows), state)
    now = rate * (1 - i / STEPS)
    tree = jax.tree.map(lambda p, u: p - now * u, tree, update)
    return (tree, state), None

  (tree, _), _ = jax.lax.scan(step, (tree, adam.init(tree)), jnp.arange(STEPS))
  return jnp.mean((predict(adapter, tree, held_x) - held_y) ** 2, axis=1)


@functools.cache
def trainer(method):
  """`train`, compiled, for several rates and seeds at once."""
  run = functools.partial(train, make(method))
  return jax.jit(jax.vmap(run, in_axes=(0, 0, None, None, None, None)))


def errors(method, problem, split, rates, seeds):
  """[example, run] of runs with these rates and seeds."""
  splits = problems[problem]
  held_out = trainer(method)(
    jnp.asarray(rates, jnp.float32),
    jnp.asarray(seeds),
    *splits['train'],
    *splits[split],
  )
  return np.asarray(held_out).T


# %% [markdown] lang="en"
# ## A rate for each method
#
# The rate is chosen on the *validation* split, with a seed (0) that is not used
# afterwards. If the choice is at an end of the grid, the grid is too short:
# extend it before going on.
# %% [markdown] lang="zh"
# ## 为每种方法选学习率
#
# 学习率在*验证集*上选，用一个之后不再使用的种子（0）。如果选中的是网格端点，
# 说明网格太短：应先扩展再继续。
# %%
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
tuned, chosen = {}, {}
for problem in problems:
  for name, method in METHODS.items():
    curve = errors(method, problem, 'validation', RATES, [0] * 6).mean(axis=0)
    # A diverged run has NaN.
    tuned[problem, name] = np.where(np.isfinite(curve), curve, np.inf)
    chosen[problem, name] = RATES[int(np.argmin(tuned[problem, name]))]
    at_end = chosen[problem, name] in (RATES[0], RATES[-1])
    print(
      f'{problem:11} {name:6} rate {chosen[problem, name]:g}'
      + (' (at the end of the grid)' if at_end else '')
    )
# %% [markdown] lang="en"
# ## The table
#
# Six seeds each, at the chosen rate, on the *test* split, once. A seed is
# another initialization and another order of the data. `error` is the mean over
# examples and seeds, `from` and `to` are the smallest and the largest error of
# a seed.
# %% [markdown] lang="zh"
# ## 结果表
#
# 各用六个种子，在选定的学习率下，在*测试集*上测一次。
# 换种子即换初始化和数据顺序。`error` 是对样本和种子的平均，`from` 与 `to`
# 是单个种子的最小与最大误差。
# %%
SEEDS = range(1, 7)
test = {}
print('problem      method  params   rate   error  seeds from    to')
for (problem, name), rate in chosen.items():
  result = errors(METHODS[name], problem, 'test', [rate] * 6, SEEDS)
  test[problem, name] = result
  by_seed = result.mean(axis=0)
  print(
    f'{problem:12} {name:7} {counts[name]:5} {rate:7g} {result.mean():7.4f}'
    f' {by_seed.min():11.4f} {by_seed.max():.4f}'
  )
print(f'noise alone: {NOISE**2:.4f}')
# %% [markdown] lang="en"
# ## The interval of the difference
#
# The table has two sources of chance: which 1,000 examples are in the test
# data, and which seeds were drawn. The *bootstrap* imitates both: draw examples
# with replacement and seeds with replacement, compute the difference of the
# means, and repeat. The middle 95 % of the results is the interval.
#
# Both methods are measured on the same examples, so we resample the
# *difference* of each example, $D_{ns}$ for example $n$ and seed $s$, the
# squared error of LoRA minus that of MoLoRA: an example that is hard for both
# does not widen the interval. A positive mean says that MoLoRA is better.
# %% [markdown] lang="zh"
# ## 差值的区间
#
# 表中有两种偶然：测试集恰好是哪 1,000 个样本，以及恰好抽到哪些种子。*bootstrap*
# 同时模拟二者：对样本有放回抽样，对种子有放回抽样，计算均值之差，重复多次。
# 结果中间的 95% 就是区间。
#
# 两种方法在同样的样本上测量，所以重采样的是每个样本的*差值* $D_{ns}$（样本
# $n$、种子 $s$），即 LoRA 的平方误差减去 MoLoRA 的：
# 对两者都难的样本不会使区间变宽。均值为正表示 MoLoRA 更好。
# %%


def bootstrap_interval(difference, draws=2000, over_seeds=True):
  n, seeds = difference.shape
  draw = np.random.default_rng(0)
  means = np.empty(draws)
  for i in range(draws):
    columns = draw.integers(seeds, size=seeds) if over_seeds else range(seeds)
    by_example = difference[:, columns].mean(axis=1)
    means[i] = by_example[draw.integers(n, size=n)].mean()
  return np.percentile(means, [2.5, 97.5])


def package_interval(difference):
  means = bootstrap.means(difference, np.ones_like(difference))
  weights = bootstrap.seed_weights(difference.shape[1])
  return bootstrap.interval((means * weights).sum(axis=1))


def verdict(low, high):
  if low > 0:
    return 'MoLoRA has the lower error'
  if high < 0:
    return 'LoRA has the lower error'
  return 'the interval contains zero: no difference is shown'


intervals = {}
for problem in problems:
  difference = test[problem, 'LoRA'] - test[problem, 'MoLoRA']
  low, high = intervals[problem] = bootstrap_interval(difference)
  theirs = package_interval(difference)
  # Two sets of 2,000 draws: the ends agree to a fraction of the width.
  assert np.abs(np.array(theirs) - (low, high)).max() < 0.2 * (high - low)
  print(
    f'{problem}: LoRA - MoLoRA {difference.mean():+.4f} '
    f'({low:+.4f} to {high:+.4f})\n  {verdict(low, high)}'
  )
# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.7))
for (problem, name), curve in tuned.items():
  style = '-' if problem == 'four groups' else '--'
  color = 'C0' if name == 'LoRA' else 'C1'
  left.loglog(RATES, curve, style, color=color, label=f'{name}, {problem}')
left.set(xlabel='learning rate', ylabel='validation error')
left.legend(fontsize=7)
for row, (low, high) in enumerate(intervals.values()):
  right.plot([low, high], [row, row], 'k', marker='|')
right.axvline(0, color='gray', linestyle=':')
right.set_yticks(range(len(intervals)), intervals)
right.set(xlabel='LoRA - MoLoRA, test error', ylim=(-0.5, 1.5))
fig.tight_layout()
plt.show()
# %% [markdown] lang="en"
# The printed sentences are the result; read them before this paragraph. What
# can be said beside them:
#
# - Problem *four groups* is built for a mixture: its function changes with the
#   region of the input, and the router can see the region. It shows that a
#   mixture *can* be worth its routers at equal parameters. It does not show
#   that language data is like this.
# - Problem *one group* has nothing to route. A rank of 8 is enough for it, so
#   MoLoRA with even weights could represent the solution that LoRA finds almost
#   to the noise. Within these steps it does not learn that its experts should
#   work together.
# - That a solution exists does not mean that training finds it: on *four
#   groups*, too, MoLoRA's error is far above the noise, and differs by a factor
#   of almost three between seeds.
# - Here neither interval contains zero. One that does would not show that the
#   methods are equal, only that these examples and seeds cannot tell them
#   apart. What one may claim are the ends of the interval: differences outside
#   it are excluded, at the level of 95 %.
# - With six seeds, the resampling of seeds is coarse; papers often have three
#   seeds or one. With one seed it is impossible, and the interval leaves that
#   source out.
# %% [markdown] lang="zh"
# 上面打印的句子就是结果，请先读它们。此外可以说的是：
#
# - *four groups* 是为混合设计的：函数随输入区域而变，路由器能看到区域。
#   它说明在参数相等时，混合*可以*值回路由器的代价；并不说明语言数据就是这样。
# - *one group* 没有什么可路由的。秩 8 已经足够，所以权重均匀的 MoLoRA 可以表示
#   LoRA 几乎达到噪声水平的那个解。但在这些步数内，它没有学会让专家协同工作。
# - 解存在不等于训练能找到它：在 *four groups* 上，MoLoRA 的误差也远高于噪声，
#   不同种子之间相差将近三倍。
# - 这里两个区间都不包含零。即使包含零，也不表示两种方法相等，
#   只表示这些样本和种子分不出高下。能够声称的是区间的两端：区间之外的差别在 95%
#   的水平上被排除。
# - 六个种子时，对种子的重采样很粗糙；论文里常见三个或一个。
#   只有一个种子时无法重采样，区间就不包含这一来源。
# %%
assert intervals['four groups'][0] > 0, 'the router should see the clusters'
share = (
  test['four groups', 'MoLoRA'].mean() / test['four groups', 'LoRA'].mean()
)
print(f'four groups: MoLoRA has {share:.2f} of the error of LoRA')
# %% [markdown] lang="en"
# ## Exercises
#
# 1. *One rate for both.* From `tuned`, compute for each rate of the grid the
#    validation difference LoRA - MoLoRA at that common rate, for problem *one
#    group*. How far do they spread, compared with the difference when each has
#    its own best rate?
# 2. *Is it the routing?* Train
#    `molora(experts=4, rank=2, alpha=4.0, router=uniform)` on *four groups* as
#    above (rate on validation, in a grid that does not end at the best rate;
#    six seeds on test) and give the interval of its difference from MoLoRA.
# 3. *A comparison with nothing to find.* Compare LoRA with itself: seeds 1, 2,
#    3 against 4, 5, 6. Give the interval over examples and seeds, and over
#    examples alone. Which one is narrower, and why is that a problem?
#
# Solutions are in `solutions/`.
#
# ## Interview questions
#
# **A paper compares a mixture with LoRA at equal rank, alpha 16 in both, one
# learning rate, one seed. Name what may explain a difference other than the
# mixture.**
#
# <details><summary>Answer</summary>
#
# Parameters: if the rank is that of one expert, the mixture has $e$ times as
# many, and routers. Scale: if it is the rank of all experts together, each has
# a smaller $r$ and so a larger $\alpha/r$; and the mixture's term is a weighted
# mean of the experts' terms, not their sum. The rate: it was probably chosen
# for one of the two. The seed: one run has no measure of the difference that
# chance makes. Also steps and data may be equal while time and memory are not.
#
# </details>
#
# **What does a 95 % interval of a difference of -0.2 to 1.1 points tell you?**
#
# <details><summary>Answer</summary>
#
# The data is compatible with a small loss, with no difference, and with a gain
# of up to about one point. It excludes larger gains, at the level of 95 %. It
# does not say that zero is likely, and not that the methods are equal. If a
# point matters, take more examples and more seeds.
#
# </details>
#
# ## In the package
#
# - {{moepeft.checkpoints.solve_method.with_explicit_method}} solves
#   `config.budget` and `config.scale` for any method and model, in parameters
#   or FLOPs.
# - {{moepeft.evaluation.bootstrap.means}} and
#   {{moepeft.evaluation.bootstrap.seed_weights}}: ours, for prompts that lack
#   some examples, with draws that all runs share.
# - `python -m moepeft.sweep` trains grids with rates chosen on validation data,
#   and `python -m moepeft.tables` prints a figure in bold only if no interval
#   of its difference from the others contains zero.
# - Papers: LoRA [arXiv:2106.09685](https://arxiv.org/abs/2106.09685), MoLoRA
#   [arXiv:2309.05444](https://arxiv.org/abs/2309.05444), scale and rank: rsLoRA
#   [arXiv:2312.03732](https://arxiv.org/abs/2312.03732).
# %% [markdown] lang="zh"
# ## 练习
#
# 1. *共用一个学习率。* 用 `tuned` 计算 *one group*
#    在网格中每个共同学习率下的验证误差差值 LoRA - MoLoRA。
#    与各自最佳学习率下的差值相比，这些差值分布多宽？
# 2. *是路由的功劳吗？* 在 *four groups* 上按同样流程（验证集选学习率，
#    最佳值不能落在网格端点；测试集六个种子）训练
#    `molora(experts=4, rank=2, alpha=4.0, router=uniform)`，给出它与 MoLoRA
#    差值的区间。
# 3. *没有差别可找的比较。* 让 LoRA 与自己比：种子 1、2、3 对 4、5、6。
#    分别给出对样本和种子重采样、只对样本重采样的区间。哪个更窄？
#    为什么这是问题？
#
# 答案在 `solutions/`。
#
# ## 面试题
#
# **某论文在等秩、alpha 都为 16、同一学习率、单个种子下比较混合与 LoRA。
# 除了混合本身，还有什么能解释差别？**
#
# <details><summary>答案</summary>
#
# 参数量：若秩是单个专家的秩，混合的参数是 $e$ 倍，还要加上路由器。缩放：
# 若秩是所有专家的总和，单个专家的 $r$ 较小，$\alpha/r$ 就较大；
# 而且混合的附加项是各专家附加项的加权平均，不是求和。学习率：
# 多半是为其中一方选的。种子：单次训练无法衡量偶然造成的差别。此外，
# 步数和数据相等时，时间和内存未必相等。
#
# </details>
#
# **差值的 95% 区间为 -0.2 到 1.1 个点，说明什么？**
#
# <details><summary>答案</summary>
#
# 数据与小幅下降、没有差别、以及约一个点以内的提升都相容；在 95% 的水平上，
# 它排除了更大的提升。它不说明差值很可能为零，也不说明两种方法相等。
# 如果一个点很重要，就增加样本和种子。
#
# </details>
#
# ## 在 moepeft 中
#
# - {{moepeft.checkpoints.solve_method.with_explicit_method}}
#   对任何方法和模型求解 `config.budget` 与 `config.scale`，按参数量或 FLOPs。
# - {{moepeft.evaluation.bootstrap.means}} 与
#   {{moepeft.evaluation.bootstrap.seed_weights}}：与我们相同，还支持某些 prompt
#   缺少样本，并让所有运行共用同样的抽样。
# - `python -m moepeft.sweep` 训练网格并在验证集上选学习率；
#   `python -m moepeft.tables`
#   只有当某数字与其他所有数字之差的区间都不含零时才加粗。
# - 论文：LoRA [arXiv:2106.09685](https://arxiv.org/abs/2106.09685)、MoLoRA
#   [arXiv:2309.05444](https://arxiv.org/abs/2309.05444)、缩放与秩：rsLoRA
#   [arXiv:2312.03732](https://arxiv.org/abs/2312.03732)。
# %% [markdown] lang="en" tags=["solution"]
# # LoRA or MoLoRA: solutions
#
# ## Exercise 1
# %% [markdown] lang="zh" tags=["solution"]
# # LoRA 还是 MoLoRA：答案
#
# ## 练习 1
# %% tags=["solution"]
lora_curve = tuned['one group', 'LoRA']
molora_curve = tuned['one group', 'MoLoRA']
usable = np.isfinite(lora_curve) & np.isfinite(molora_curve)
at_one_rate = (lora_curve - molora_curve)[usable]
at_best = lora_curve.min() - molora_curve.min()
for rate, gap in zip(np.array(RATES)[usable], at_one_rate, strict=True):
  print(f'rate {rate:g}: LoRA - MoLoRA {gap:+.4f}')
print(f'each at its best: {at_best:+.4f}')
assert np.ptp(at_one_rate) > abs(at_best), 'the rate matters more'
# %% [markdown] lang="en" tags=["solution"]
# The spread that the choice of a common rate makes is larger than the
# difference between the methods; at one rate even its sign is another.
#
# ## Exercise 2
#
# With weights of 1/4 the mixture is one LoRA of rank 8 at the scale $2/4$. The
# smaller scale needs a larger rate: on the grid above, the best rate is the
# last one. So the grid goes further up here.
# %% [markdown] lang="zh" tags=["solution"]
# 共同学习率的选择造成的差距，比两种方法之间的差别更大；
# 有一个学习率下连符号都相反。
#
# ## 练习 2
#
# 权重都是 1/4 时，混合就是一个秩为 8、缩放为 $2/4$ 的 LoRA。缩放较小，
# 需要较大的学习率：在前面的网格上，最佳值是最后一个。所以这里把网格向上延伸。
# %% tags=["solution"]
even = f'molora(experts={E}, rank={R}, alpha={SCALE * R}, router=uniform)'
rates = (*RATES[2:], 3e-1, 1.0)
curve = errors(even, 'four groups', 'validation', rates, [0] * 6).mean(axis=0)
rate = rates[int(np.nanargmin(curve))]
assert rates[0] < rate < rates[-1], 'the grid is too short'
uniform = errors(even, 'four groups', 'test', [rate] * 6, SEEDS)
low, high = bootstrap_interval(uniform - test['four groups', 'MoLoRA'])
print(f'rate {rate:g}, error {uniform.mean():.4f}')
print(f'uniform - softmax: {low:+.4f} to {high:+.4f}')
assert low > 0, 'without routing the experts are one LoRA of rank 8'
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 3
#
# An interval over examples alone answers another question: how would *these six
# runs* differ on other examples? It says nothing about other runs, and where
# seeds differ more than examples do, it excludes zero although both sides are
# one method.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 3
#
# 只对样本重采样的区间回答的是另一个问题：*这六次运行*在别的样本上会相差多少？
# 它对其他训练什么也没有说明；当种子之间的差别大于样本之间的差别时，
# 即使两边是同一方法，它也会排除零。
# %% tags=["solution"]
runs = test['one group', 'LoRA']
difference = runs[:, :3] - runs[:, 3:]
both = bootstrap_interval(difference)
examples_only = bootstrap_interval(difference, over_seeds=False)
for name, (low, high) in (('both', both), ('examples', examples_only)):
  print(f'over {name:8}: {low:+.5f} to {high:+.5f}')
assert np.ptp(examples_only) < np.ptp(both)

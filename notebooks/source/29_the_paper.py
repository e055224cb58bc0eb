# SPDX-License-Identifier: Apache-2.0
# %% [markdown] lang="en"
# # The paper, line by line
#
# Zadouri et al., "Pushing Mixture of Experts to the Limit"
# ([arXiv:2309.05444](https://arxiv.org/abs/2309.05444)), is the paper behind
# this package. This notebook goes through its settings one by one: where the
# adapters stand, what the routers read, what the optimizer does, how many
# parameters there are, and what a run costs. Each number is computed here and
# compared with the package's configs. Where the paper's text and its released
# code differ, both are shown.
#
# **No row of the paper's tables is trained here**: this is an exercise in
# reading, counting and checking. About 60 minutes. Before it: notebooks 26 (MoV
# and MoLoRA) and 27 (LoRA or MoLoRA).
#
# ## What you will understand
#
# - every setting that a reproduction needs, and which of them the text does not
#   have;
# - how the percentages of parameters come about, and that one of three columns
#   follows another rule;
# - what an optimizer's clock that starts at step 1,100,000 does to Adafactor;
# - how large a first step is for a vector, a router and the two factors of a
#   LoRA;
# - what can be reproduced, at which cost, and what cannot.
# %% [markdown] lang="zh"
# # 逐行读论文
#
# Zadouri 等人的 “Pushing Mixture of Experts to the
# Limit”（[arXiv:2309.05444](https://arxiv.org/abs/2309.05444)）是本项目的基础。
# 本篇逐项过一遍它的设置：适配器放在哪里、路由器读什么、优化器做什么、
# 有多少参数、一次训练花费多少。每个数都在这里计算，并与 moepeft 的配置对照。
# 论文文字与官方代码不同之处，两者都给出。
#
# **本篇不训练论文表格中的任何一行**：这是阅读、计数和核对的练习。大约 60 分钟。
# 先修：笔记 26（MoV 与 MoLoRA）、27（LoRA 还是 MoLoRA）。
#
# ## 你将理解什么
#
# - 复现需要的每一项设置，以及哪些是论文文字里没有的；
# - 参数百分比是怎么来的，三列中有一列用的是另一种规则；
# - 优化器的时钟从第 1,100,000 步开始，对 Adafactor 有什么影响；
# - 对向量、路由器和 LoRA 的两个因子，第一步分别走多大；
# - 什么可以复现、代价多少，什么不能复现。
# %%
import collections
import json
import subprocess
import sys
import types

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import moepeft
from moepeft.checkpoints.count_parameters import count
from moepeft.evaluation import published
from moepeft.evaluation.paper_metric import EIGHT, ROUNDS, scores
from moepeft.evaluation.results import ACCURACY
from moepeft.models.t5 import model as t5
from moepeft.peft.build import build
from moepeft.training.optimizers.adafactor import adafactor

# %% [markdown] lang="en"
# ## The settings of a run
#
# The package has a config for each method and size in `configs/paper`. The
# values come from the run files of the released code.
# %% [markdown] lang="zh"
# ## 一次运行的设置
#
# moepeft 在 `configs/paper` 中为每种方法和大小各有一个配置，
# 数值来自官方代码的运行文件。
# %%


def card(size, method, values=''):
  path = f'configs/paper/t5_{size}_{method}.py'
  return moepeft.load_config(path + (f':{values}' if values else ''))


config = card('large', 'mov', 'experts=10')
settings = {
  'method': config.method,
  'semantics': config.semantics,
  'optimizer': config.optimizer.name,
  'learning rate': config.optimizer.learning_rate,
  'clock starts at': config.optimizer.decay_initial_step,
  'steps': config.steps,
  'rows a step': config.batch_size,
  'packing': config.data.packing,
  'tokens of a row': (config.data.inputs_length, config.data.targets_length),
  'loss averaged over': config.loss.average_over,
  'z-loss': config.loss.z_loss,
  'dropout': config.model.dropout,
  'router losses': dict(config.router_losses),
  'mixture': config.data.mixture,
}
for name, value in settings.items():
  print(f'{name:20} {value}')
assert not any(settings['router losses'].values()), 'the paper uses none'
full = card('large', 'full')
assert (full.optimizer.learning_rate, full.batch_size, full.steps) == (
  1e-3,
  256,
  10_000,
)
# %% [markdown] lang="en"
# What these lines mean:
#
# - *rows a step*: 32 **packed** rows. A row holds several examples, so a step
#   has more than 32 of them, and "batch size 32" means another thing than in a
#   library that pads.
# - *averaged over sequences*: each example weighs the same, however long its
#   target is.
# - *z-loss*: that of the vocabulary's logits, not of a router's.
# - *steps*: 500,000 for adapters, 10,000 with eight times the rows for full
#   fine-tuning: adapters see 6.25 times as many rows. Comparing the two
#   compares these budgets as well.
# - *router losses*: the released `Router` has a flag for load balancing that
#   nothing reads. All routers of the tables are dense, so that no expert is
#   without tokens.
# - *the seed*: there is none, so that runs differ each time. A MoV or MoLoRA
#   run saves a checkpoint every 10,000 steps and keeps up to 60, so all 50; how
#   the reported one was chosen is not documented.
#
# ## Where the adapters stand
#
# A *site* is a place where an adapter can act. `build` resolves a method's
# default sites for a model.
# %% [markdown] lang="zh"
# 这些行的含义：
#
# - *rows a step*：32 个**打包后**的行。一行含多个样本，所以一步不止 32 个样本；
#   “batch size 32”与做 padding 的库不是一回事。
# - *averaged over sequences*：每个样本权重相同，与目标长度无关。
# - *z-loss*：作用于词表的 logits，不是路由器的。
# - *steps*：适配器 500,000 步；全量微调 10,000 步、行数为八倍。
#   适配器看到的行数是 6.25 倍。比较两者，同时也在比较这些预算。
# - *router losses*：官方 `Router` 有负载均衡的开关，但没有代码读它。
#   表中所有路由器都是稠密的，所以没有专家分不到 token。
# - *种子*：没有固定，每次运行都不同。MoV 或 MoLoRA 的一次训练每 10,000
#   步保存一个检查点，最多保留 60 个，即全部 50 个；报告的是哪一个、怎样选的，
#   没有说明。
#
# ## 适配器放在哪里
#
# *site* 是适配器可以作用的位置。`build` 为模型解析方法的默认位置。
# %%
large = t5.config('large')


def placed(method, semantics='official'):
  """{stack and sublayer: names of its adapted sites}."""
  groups = collections.defaultdict(list)
  built = build(method, t5.sites(large), semantics)
  for path, _ in built.adapter_map.entries:
    sublayer, _, site = path.rpartition('/')
    groups[sublayer].append(site)
  return groups


def modules(groups):
  """The number of adapters in all layers."""
  by_side = {'encoder': large.encoder_layers, 'decoder': large.decoder_layers}
  return sum(by_side[g.split('/')[0]] * len(s) for g, s in groups.items())


for method in ('mov', 'molora'):
  groups = placed(method)
  print(f'{method}: {modules(groups)} modules')
  for sublayer, sites in groups.items():
    print(f'  {sublayer:14} {" ".join(sites)}')
assert modules(placed('mov')) == 24 * (3 + 5) == 192
assert modules(placed('molora')) == 24 * (6 + 10) == 384
extra = modules(placed('molora', 'paper')) - modules(placed('molora'))
assert extra == 2 * 24, 'wi_1 of each feed-forward'
# %% [markdown] lang="en"
# ## Where text and code differ
#
# The package calls the released code `official` and the text `paper`;
# `config.semantics` chooses, and each difference is an option that can be set
# by itself.
#
# | | `official`: the released code | `paper`: the text |
# | --- | --- | --- |
# | MoV's router at k and v reads | each head, one kernel | the whole width |
# | LoRA and MoLoRA at the feed-forward | `wi_0`, `wo` | also `wi_1` |
# | top-k | the weights that remain, as they are | renormalized |
#
# The last line matters at the start. With $e$ experts and weights near $1/e$,
# top-k that is not renormalized scales MoV's activations by about $k/e$, so
# that the model does not start at the function of its base. We check what
# `build` makes of each; the cell prints what MoV's router reads, whether top-k
# renormalizes, and whether MoLoRA is at `wi_1`.
# %% [markdown] lang="zh"
# ## 文字与代码的差别
#
# moepeft 称官方代码为 `official`，论文文字为 `paper`；用 `config.semantics`
# 选择，每一处差别也是可单独设置的选项。
#
# | | `official`：官方代码 | `paper`：论文文字 |
# | --- | --- | --- |
# | MoV 在键和值处的路由器读 | 每个头各自，各头共用一个 kernel | 整个宽度 |
# | LoRA 与 MoLoRA 在前馈处 | `wi_0`、`wo` | 还有 `wi_1` |
# | top-k | 剩下的权重保持原值 | 重新归一化 |
#
# 最后一行在起点很要紧。$e$ 个专家、权重接近 $1/e$ 时，不归一化的 top-k 把 MoV
# 的激活缩放到约 $k/e$，模型就不是从基座的函数出发。下面检查 `build` 的结果，
# 依次打印 MoV 的路由器读什么、top-k 是否重新归一化、MoLoRA 是否作用于 `wi_1`。
# %%
facts = {}
for semantics in ('official', 'paper'):
  sites = t5.sites(large)
  mov = build('mov(experts=10, router=topk(k=2))', sites, semantics)
  (module,) = mov.adapter_map.at('encoder/self/k')
  facts[semantics] = (
    module.reads,
    module.router.renormalize,
    'wi_1' in placed('molora', semantics)['encoder/mlp'],
  )
  print(semantics, facts[semantics])
assert facts['official'] == ('heads', False, False)
assert facts['paper'] == ('output', True, True)
# %% [markdown] lang="en"
# ## Counting the tables
#
# The formulas, from the notebook about MoV and MoLoRA: at a projection
# $i \to o$ a LoRA of rank $r$ has $r(i + o)$ and MoLoRA with $e$ experts
# $e(r(i+o) + i)$; MoV has $e(o + h)$ at keys and values, with heads of size
# $h$, and $2ef$ at the feed-forward of width $f$, (IA)³ $o$ and $f$. Full
# fine-tuning trains everything; its count is the base's.
# %% [markdown] lang="zh"
# ## 核对表格的参数量
#
# 公式来自 MoV 与 MoLoRA 一篇：在投影 $i \to o$ 处，秩为 $r$ 的 LoRA 有
# $r(i + o)$ 个，$e$ 个专家的 MoLoRA 有 $e(r(i+o) + i)$ 个；MoV 在键和值处有
# $e(o + h)$ 个（$h$ 为头的大小），在宽度为 $f$ 的前馈处有 $2ef$ 个；(IA)³ 为
# $o$ 和 $f$。全量微调训练全部，参数量就是基座的。
# %%


def low_rank(c, rank, experts=1, router=0, wi_1=False):
  d, k, f = c.d_model, c.heads * c.head_dim, c.ffn
  attention = [(d, k)] * 3 + [(k, d)]
  feed_forward = [(d, f), (f, d)] + [(d, f)] * wi_1
  pairs = 3 * attention + 2 * feed_forward  # an encoder and a decoder layer
  layer = sum(experts * (rank * (i + o) + router * i) for i, o in pairs)
  return c.encoder_layers * layer


def vectors(c, experts=1, router=0):
  k, f = c.heads * c.head_dim, c.ffn
  layer = 6 * (k + router * c.head_dim) + 2 * (f + router * f)
  return c.encoder_layers * experts * layer


def formula(size, method):
  c = t5.config(size)
  name, _, options = method.rstrip(')').partition('(')
  values = dict(o.split('=') for o in options.split(', ') if o)
  e, r = int(values.get('experts', 1)), int(values.get('rank', 4))
  if name in ('ia3', 'mov'):
    return vectors(c, e, int(name == 'mov'))
  return low_rank(c, r, e, int(name == 'molora'))


checked = (
  ('large', 'ia3', ''),
  ('large', 'mov', 'experts=60'),
  ('large', 'lora', 'rank=4'),
  ('xl', 'mov', 'experts=30'),
  ('xl', 'molora', 'experts=15'),
  ('xxl', 'mov', 'experts=60'),
)
bases = {}
for size, method, values in checked:
  config = card(size, method, values)
  counts = count(config)
  bases[size] = counts['params']
  ours = formula(size, config.method)
  print(f't5_{size:5} {config.method:27} {ours:13,} {counts["percent"]:8.4f} %')
  assert ours == counts['peft'], (size, method)
print({size: f'{n:,}' for size, n in bases.items()})
# %% [markdown] lang="en"
# Counting needs shapes only; even the model of 11 billion parameters allocates
# nothing. From a terminal it is one command:
# %% [markdown] lang="zh"
# 计数只需形状；110 亿参数的模型也不分配内存。在终端里是一条命令：
# %%
command = [
  *(sys.executable, '-m', 'moepeft.count', '--noflops'),
  '--config=configs/paper/t5_large_molora.py:experts=10',
]
output = subprocess.run(command, capture_output=True, text=True, check=True)
counts = json.loads(output.stdout)
print(counts['method'], f'{counts["peft"]:,}')
assert counts['peft'] == formula('large', 'molora(experts=10, rank=4)')
# %% [markdown] lang="en"
# ## The percentages
#
# The paper gives parameters in per cent. Of what? We try: the code's count
# divided by the *nominal* size, 770 million, 3 and 11 billion.
# (`moepeft.evaluation.published` has the paper's figures as far as they are
# known to the project; they were transcribed from secondary sources, so look a
# figure up in the paper before you publish it.)
# %% [markdown] lang="zh"
# ## 百分比
#
# 论文以百分比给出参数量。分母是什么？试一试：代码的计数除以*名义*大小，7.7 亿、
# 30 亿、110 亿。（`moepeft.evaluation.published` 收录了项目已知的论文数字；
# 它们抄自二手来源，发表前请对照论文原文。）
# %%
NOMINAL = {'large': 770e6, 'xl': 3e9, 'xxl': 11e9}
agree = {size: [] for size in NOMINAL}
print(f'{"":35} {"paper":>7} {"ours":>8}')
for size, nominal in NOMINAL.items():
  for row in published.table(f't5_{size}'):
    if row.method in ('', 'full') or row.percent is None:
      continue
    ours = 100 * formula(size, row.method) / nominal
    unit = 10.0 ** -len(str(row.percent).partition('.')[2])
    # Cut after the last digit that is printed, not rounded.
    agree[size].append(row.percent <= ours < row.percent + unit)
    mark = '' if agree[size][-1] else '  differs'
    print(f't5_{size:5} {row.method:27} {row.percent:7g} {ours:8.5f}{mark}')
assert all(agree['large']) and all(agree['xxl'])
# Of 3B, only (IA)3 agrees.
assert sum(agree['xl']) == 1
# %% [markdown] lang="en"
# Two columns are reproduced, the 3B column is not. What rule does it follow?
# Fit a line: for MoV and for MoLoRA, per cent as a function of the number of
# experts.
# %% [markdown] lang="zh"
# 两列可以复现，3B 一列不行。它遵循什么规则？拟合直线：MoV 和 MoLoRA
# 的百分比作为专家数的函数。
# %%
xl = t5.config('xl')
lines = {}
for name, one in (
  ('mov', vectors(xl)),
  ('molora', low_rank(xl, 4)),
):
  rows = [r for r in published.table('t5_xl') if r.method.startswith(name)]
  experts = [
    int(r.method.split('experts=')[1].split(',')[0].rstrip(')')) for r in rows
  ]
  slope, offset = np.polyfit(experts, [r.percent for r in rows], 1)
  lines[name] = slope, offset
  print(f'{name:6} {offset:.3f} + {slope:.4f} e;', end=' ')
  print(f'one expert without a router is {100 * one / 3e9:.4f} % of 3e9')
with_wi_1 = 100 * low_rank(xl, 4, wi_1=True) / 3e9
print(f'a LoRA of rank 4 with wi_1 as well: {with_wi_1:.4f} %')
assert abs(lines['mov'][0] - 100 * vectors(xl) / 3e9) < 1e-3
assert all(abs(offset - 0.14) < 0.02 for _, offset in lines.values())
# MoLoRA's slope is near the count of a LoRA with wi_1, not of one without.
assert abs(lines['molora'][0] - with_wi_1) < 0.02
# %% [markdown] lang="en"
# In the 3B column, an expert counts as the adapter alone, and the routers are a
# constant of about 0.14 %, however many experts there are. That cannot be: a
# router has a column for each expert. And LoRA's rows fit projections *with*
# `wi_1`. So the paper's 3B column is not comparable with its other two. A
# percentage needs its count and its denominator beside it; the package prints
# both.
# %% [markdown] lang="zh"
# 在 3B 一列里，一个专家只按适配器本身计数，而路由器是约 0.14% 的常数，
# 不随专家数变化。这不可能：路由器对每个专家都有一列。LoRA 的各行则与*包含*
# `wi_1` 的投影相符。所以论文的 3B 列与另外两列不可比。
# 百分比旁边必须写明计数和分母，moepeft 两者都打印。
# %%
figure_rows = [r for r in published.table('t5_xl') if r.average and r.method]
fig, ax = plt.subplots(figsize=(6, 2.8))
for name, marker in (
  ('lora', 'o'),
  ('mov', 's'),
  ('molora', '^'),
  ('ia3', 'd'),
):
  rows = [r for r in figure_rows if r.method.partition('(')[0] == name]
  percents = [100 * formula('xl', r.method) / bases['xl'] for r in rows]
  ax.semilogx(percents, [r.average for r in rows], marker, label=name)
full_row = next(r for r in figure_rows if r.method == 'full')
ax.axhline(full_row.average, color='gray', linestyle=':', label='full')
ax.set(xlabel='trained parameters, % of 2.85e9', ylabel='average, %')
ax.legend(fontsize=8, ncols=2)
fig.tight_layout()
plt.show()
# %% [markdown] lang="en"
# The picture has the paper's averages over eight held-out datasets at 3B, at
# our counts. All points but (IA)³ lie within about three points of each other
# and of full fine-tuning; each is one run, as far as is known, without an
# interval.
#
# ## Adafactor, and its clock
#
# Adafactor ([arXiv:1804.04235](https://arxiv.org/abs/1804.04235)) without
# factoring keeps, for each parameter $\theta$ with the gradient $g$, a mean $v$
# of squared gradients whose memory grows with the step $t$. With the learning
# rate $\eta$, and rms over the entries of an array:
#
# $$\beta_t = 1 - t^{-0.8},\quad v \leftarrow \beta_t v + (1-\beta_t)\,
# g^2,\quad u = \frac{g}{\sqrt v},\quad
# \hat u = \frac{u}{\max(1, \mathrm{rms}(u))},\quad \theta \leftarrow \theta -
# \eta\,\max(10^{-3}, \mathrm{rms}(\theta))\,\hat u.$$
#
# At $t = 1$, $\beta = 0$: the first $v$ is $g^2$ itself. The released runs
# restore the base's step, 1,100,000, but the adapters' $v$ is new and zero. So
# $1 - \beta = t^{-0.8} \approx 1.5\cdot 10^{-5}$, the first $u$ is $t^{0.4}$
# times the sign of $g$, and $v$ fills up slowly, with nearly equal weight for
# all past steps.
# %% [markdown] lang="zh"
# 图中是论文在 3B 上八个留出数据集的平均值，横轴用我们的计数。除 (IA)³ 外，
# 所有点彼此之间、与全量微调之间相差约三个百分点以内；据我们所知，
# 每个点只是一次训练，没有区间。
#
# ## Adafactor 与它的时钟
#
# 不做分解的 Adafactor（[arXiv:1804.04235](https://arxiv.org/abs/1804.04235)）
# 为每个参数 $\theta$（梯度为 $g$）保存梯度平方的均值 $v$，记忆长度随步数 $t$
# 增长。$\eta$ 为学习率，rms 对一个数组的所有元素计算：
#
# $$\beta_t = 1 - t^{-0.8},\quad v \leftarrow \beta_t v + (1-\beta_t)\,
# g^2,\quad u = \frac{g}{\sqrt v},\quad
# \hat u = \frac{u}{\max(1, \mathrm{rms}(u))},\quad \theta \leftarrow \theta -
# \eta\,\max(10^{-3}, \mathrm{rms}(\theta))\,\hat u.$$
#
# $t = 1$ 时 $\beta = 0$：第一个 $v$ 就是 $g^2$。官方运行恢复了基座的步数
# 1,100,000，而适配器的 $v$ 是新的、为零。于是
# $1 - \beta = t^{-0.8} \approx 1.5\cdot 10^{-5}$，第一个 $u$ 是 $g$ 的符号的
# $t^{0.4}$ 倍，$v$ 缓慢累积，过去所有步的权重几乎相等。
# %%


def unclipped(gradients, start):
  """rms(u) before the clip, at each step, for gradients [steps, n]."""
  v, result = np.zeros(gradients.shape[1]), []
  for step, g in enumerate(gradients):
    beta = 1 - (start + step + 1.0) ** -0.8
    v = beta * v + (1 - beta) * (g**2 + 1e-30)
    result.append(np.sqrt(np.mean(g**2 / v)))
  return np.array(result)


CLOCK = 1_100_000
constant = np.ones((100_000, 1))
late, fresh = (unclipped(constant, start) for start in (CLOCK, 0))
for step in (1, 100, 1000, 10_000, 100_000):
  print(f'step {step:7,}: rms {late[step - 1]:7.2f}, from step 0', end=' ')
  print(f'{fresh[step - 1]:.2f}')
assert round(late[0]) == 261 and abs(fresh - 1).max() < 1e-6
assert late[-1] < 1.2 and late[50_000] > 1
# %% [markdown] lang="en"
# For a constant gradient the clip hides the difference: both clocks make steps
# of rms 1. It shows when gradients change. Let them shrink to a tenth after 100
# steps. With the clock at 0, $v$ then has a memory of about $t^{0.8} = 40$
# steps, so updates shrink at once and recover slowly. With the clock at
# 1,100,000 the rms of $u$ before the clip is about 26 at step 100 and about
# 2.6 after the change, nearly always above 1: **the update keeps its full
# size**, whatever the gradient's size is. It is a normalized gradient for tens
# of thousands of steps.
#
# For both clocks we compare our formula, clipped, with the package's
# `adafactor`, whose option is `decay_initial_step`. The figure has the rms of
# $\hat u$.
# %% [markdown] lang="zh"
# 对恒定梯度，裁剪掩盖了差别：两种时钟的步长 rms 都是 1。梯度变化时差别才显现。
# 让梯度在 100 步后缩小到十分之一。时钟从 0 开始时，$v$ 此时的记忆约为
# $t^{0.8} = 40$ 步，更新会立即变小，再慢慢恢复。时钟从 1,100,000 开始时，裁剪前
# $u$ 的 rms 在第 100 步约为 26，变化后约为 2.6，几乎总是大于
# 1：**更新保持完整大小**，与梯度大小无关。在几万步之内，它就是归一化的梯度。
#
# 对两种时钟，都把我们带裁剪的公式与 moepeft 的 `adafactor`（选项
# `decay_initial_step`）比较。图中是 $\hat u$ 的 rms。
# %%
rng = np.random.default_rng(0)
N, RATE = 5, 3e-4
gradients = rng.normal(size=(160, N)).astype(np.float32)
gradients[100:] *= 0.1


def by_package(start):
  """rms of each update / (rate * parameter scale), from the package."""
  optimizer = adafactor(lambda step: RATE, decay_initial_step=start)
  params = {'scale': jnp.ones(N)}
  state, sizes = optimizer.init(params), []
  for g in gradients:
    updates, state = optimizer.update({'scale': jnp.asarray(g)}, state, params)
    sizes.append(float(jnp.sqrt(jnp.mean(updates['scale'] ** 2))) / RATE)
  return np.array(sizes)


fig, ax = plt.subplots(figsize=(6, 2.6))
for start, label in ((CLOCK, 'clock at 1,100,000'), (0, 'clock at 0')):
  ours = np.minimum(unclipped(gradients.astype(np.float64), start), 1)
  theirs = by_package(start)
  # 1 - beta is 1.5e-5 in float32 arithmetic of 1 - 1.5e-5: three digits.
  assert np.abs(ours - theirs).max() < 0.01, label
  ax.plot(ours, label=label)
  after = ours[100:110].mean()
  print(f'{label}: mean size of the ten updates after the change {after:.2f}')
  assert (after > 0.99) == (start == CLOCK)
ax.set(xlabel='step', ylabel='rms of the update')
ax.legend()
fig.tight_layout()
plt.show()
# %% [markdown] lang="en"
# ## How large is a step?
#
# $\eta = 3\cdot 10^{-4}$ is not the size of a step;
# $\eta \cdot \max(10^{-3}, \mathrm{rms}(\theta))$ is. So at the start one rate
# gives steps of three sizes to four kinds of parameters, as their initial
# values are ones (MoV's vectors), normal with a standard deviation of 0.02
# (routers and $A$) and zeros ($B$):
# %% [markdown] lang="zh"
# ## 一步有多大？
#
# $\eta = 3\cdot 10^{-4}$ 并不是步长；步长是
# $\eta \cdot \max(10^{-3}, \mathrm{rms}(\theta))$。四类参数的初始值是 1（MoV
# 的向量）、标准差 0.02 的正态分布（路由器和 $A$）和 0（$B$），所以起点处，
# 同一个学习率给出三种大小的步长：
# %%
params = {
  'mov vectors': jnp.ones((10, 64)),
  'router': 0.02 * jnp.asarray(rng.normal(size=(64, 10))),
  'lora a': 0.02 * jnp.asarray(rng.normal(size=(64, 4))),
  'lora b': jnp.zeros((4, 64)),
}
optimizer = adafactor(lambda step: RATE, decay_initial_step=CLOCK)
slopes = {k: jnp.asarray(rng.normal(size=p.shape)) for k, p in params.items()}
updates, _ = optimizer.update(slopes, optimizer.init(params), params)
for name, p in params.items():
  expected = RATE * max(1e-3, float(jnp.sqrt(jnp.mean(p**2))))
  actual = float(jnp.sqrt(jnp.mean(updates[name] ** 2)))
  print(f'{name:12} {actual:.1e}')
  assert abs(actual / expected - 1) < 0.05, name
# %% [markdown] lang="en"
# A router moves fifty times more slowly than MoV's vectors, and $B$ a thousand
# times more slowly than them, until it has grown. An experiment with AdamW at
# one rate for all is another experiment: it moves routers relatively faster.
# This is one candidate for why routing looks different under other optimizers;
# a claim about it needs a run.
#
# ## What it costs
#
# A product with a weight costs 2 operations a token forwards and 2 backwards to
# the activations; frozen weights need no gradient of their own. The encoder's
# weights see the 1,024 input tokens of a row, those of the decoder and of the
# head the 256 target tokens, except that the keys and values of cross-attention
# are of the input. Attention scores and adapters are left out.
# %% [markdown] lang="zh"
# 路由器的更新比 MoV 的向量慢五十倍，$B$ 在长大之前比向量慢一千倍。用 AdamW、
# 所有参数同一学习率，是另一个实验：它让路由器相对更新得更快。
# 这可能是换优化器后路由表现不同的原因之一；要下结论，需要实际运行。
#
# ## 代价
#
# 与一个权重相乘，每个 token 前向 2 次运算，反向到激活 2 次；
# 冻结的权重自身不需要梯度。编码器的权重处理一行的 1,024 个输入 token，
# 解码器和输出层的处理 256 个目标 token，只有交叉注意力的键和值属于输入一侧。
# 注意力分数和适配器不计入。
# %%


def training_operations(size, steps=500_000, rows=32):
  c = t5.config(size)
  d, k, f, n = c.d_model, c.heads * c.head_dim, c.ffn, c.encoder_layers
  encoder = n * (4 * d * k + 3 * d * f)
  decoder = n * (6 * d * k + 3 * d * f) + d * c.vocab
  cross = n * 2 * d * k
  row = (encoder + cross) * 1024 + decoder * 256
  return 4 * row * rows * steps


for size in ('large', 'xl', 'xxl'):
  operations = training_operations(size)
  hours = operations / 400e12 / 3600
  print(f't5_{size:5} {operations:.1e} operations, {hours:4.0f} hours')
assert f'{training_operations("large"):.1e}' == '3.0e+19'
# %% [markdown] lang="en"
# Hours are those of one accelerator that sustains 400 TFLOP/s, an assumption.
# The figures agree with `docs/reproduce.md` of this repository, which has the
# data and the commands.
#
# ## What can be reproduced
#
# - **exactly, on a laptop**: shapes, sites, parameter counts, initial values,
#   the optimizer's arithmetic, the metric (median over prompts);
# - **with an accelerator and the data**: a row of the 770M table, in about a
#   day; no seed is given, so only up to the spread between runs;
# - **not from the release**: routing by sentence embeddings (no such router is
#   in it); load balancing (a flag that nothing reads); the choice of the
#   checkpoint; ablations of rate and batch;
# - **not with the documented set-up**: LoRA and MoLoRA; it installs the main
#   branch of the authors' fork of flaxformer, which lacks the sites that they
#   need. The fork's branch `lora` has them.
# %% [markdown] lang="zh"
# 小时数按一块持续 400 TFLOP/s 的加速器估算，这是假设。数字与本仓库的
# `docs/reproduce.md` 一致，那里有数据和命令。
#
# ## 什么可以复现
#
# - **在笔记本上，精确**：形状、位置、参数量、初始值、优化器的算术、评测指标（对
#   prompt 取中位数）。
# - **有加速器和数据**：770M 表的一行，约一天；没有给种子，
#   只能复现到运行间的波动。
# - **发布的代码里没有**：按句向量路由（没有这样的路由器）；
#   负载均衡（没有代码读的开关）；检查点的选择；学习率与 batch 的消融。
# - **按文档的安装步骤做不到**：LoRA 与 MoLoRA；文档安装的是作者的 flaxformer
#   fork 的主分支，缺少它们需要的位置，该 fork 的 `lora` 分支里才有。
# %% [markdown] lang="en"
# ## Exercises
#
# 1. *Equal parameters.* At 3B, which LoRA rank has the parameters of
#    `molora(experts=10, rank=4)`? Which of the paper's LoRA rows is nearest to
#    it? What does this say about the comparison in its table?
# 2. *When does the clip stop?* From the formula of $v$ for a constant gradient,
#    find the step at which the rms before the clip falls below 1.5 with the
#    clock at 1,100,000, in closed form or numerically, and check it with
#    `unclipped`.
# 3. *The metric.* The paper reports, for each dataset, the median accuracy over
#    prompts, and then the mean of eight datasets, where ANLI is the mean of its
#    three rounds' medians. Write it, and compare with
#    {{moepeft.evaluation.paper_metric.scores}} on made-up numbers. It reads
#    `task` (a name in `ROUNDS` or `EIGHT`), `prompt`, `metric` (`ACCURACY`) and
#    `value` of each row, and `each=None` and `majority=None` leave out what is
#    not needed; a `types.SimpleNamespace` will do as a row. How much can one
#    bad prompt of ten change the median, and the mean?
#
# Solutions are in `solutions/`.
#
# ## Interview questions
#
# **You restore a checkpoint at step 1,000,000 and add fresh parameters. What
# can go wrong in the optimizer?**
#
# <details><summary>Answer</summary>
#
# Everything that depends on the step: schedules (warm-up is over, decay may be
# at its end), Adam's bias correction (none at large t, so that with the usual
# 0.9 and 0.999 the first update of fresh zero moments is about three times too
# large), Adafactor's decay (its memory is tens of thousands of steps long, so
# the fresh second moment stays far too small and only the clip bounds the
# update). Give the new parameters an optimizer state of their own, with its own
# step; or state that you did not.
#
# </details>
#
# **A table says "0.32 % of parameters". What do you ask?**
#
# <details><summary>Answer</summary>
#
# Of what: the true number of parameters or the nominal name of the model; with
# or without embeddings. Counted how: routers included, which projections,
# trained or stored. And whether the baselines in the same table were counted by
# the same rule.
#
# </details>
#
# ## In the package
#
# - `configs/paper/`: all settings; {{moepeft.config.defaults.paper}} has those
#   that the runs share, and `gin/` has them in T5X's form.
# - {{moepeft.training.optimizers.adafactor.adafactor}}: with T5X's layout of
#   matrices, layers that are stacked, and factoring where the released code
#   factors.
# - {{moepeft.peft.methods.presets.MOV}} and
#   {{moepeft.peft.methods.lora.METHOD}} have the sites and defaults of both
#   semantics.
# - {{moepeft.evaluation.published.table}}: the tables;
#   {{moepeft.evaluation.paper_metric.scores}}: the metric.
#   `python -m moepeft.tables RUN --paper=t5_xl` puts a run beside them.
# - Papers: [arXiv:2309.05444](https://arxiv.org/abs/2309.05444), Adafactor
#   [arXiv:1804.04235](https://arxiv.org/abs/1804.04235), T0 and its data
#   [arXiv:2110.08207](https://arxiv.org/abs/2110.08207), T5
#   [arXiv:1910.10683](https://arxiv.org/abs/1910.10683).
# %% [markdown] lang="zh"
# ## 练习
#
# 1. *等参数。* 在 3B 上，哪个 LoRA 秩的参数量等于
#    `molora(experts=10, rank=4)`？论文中哪一行 LoRA 与它最接近？
#    这对表中的比较说明什么？
# 2. *裁剪何时停止？* 由恒定梯度下 $v$ 的公式，求时钟从 1,100,000 开始时，裁剪前
#    rms 降到 1.5 以下的步数（闭式或数值），并用 `unclipped` 验证。
# 3. *指标。* 论文对每个数据集取各 prompt 准确率的中位数，再对八个数据集求平均，
#    其中 ANLI 是三轮中位数的平均。请实现它，并用虚构的数与
#    {{moepeft.evaluation.paper_metric.scores}} 比较。它读取每行的
#    `task`（`ROUNDS` 或 `EIGHT` 中的名字）、`prompt`、`metric`（`ACCURACY`）和
#    `value`；`each=None`、`majority=None` 表示略去其余内容；一行可以用
#    `types.SimpleNamespace` 表示。十个 prompt 中有一个很差，
#    中位数和均值各会变多少？
#
# 答案在 `solutions/`。
#
# ## 面试题
#
# **从第 1,000,000 步恢复检查点，并加入全新的参数。优化器里可能出什么问题？**
#
# <details><summary>答案</summary>
#
# 所有依赖步数的部分：学习率曲线（预热已结束，衰减可能到底）；Adam 的偏差修正（t
# 很大时不起作用，在通常的 0.9 和 0.999 下，
# 动量从零开始的新参数第一次更新约大三倍）；Adafactor 的衰减（记忆长达数万步，
# 全新的二阶矩长期过小，只有裁剪在限制更新）。
# 应给新参数单独的优化器状态和步数；否则要明说。
#
# </details>
#
# **表里写着“0.32% 的参数”。你会问什么？**
#
# <details><summary>答案</summary>
#
# 分母是什么：真实参数量还是模型的名义大小，含不含 embedding。怎么计数：
# 是否含路由器，哪些投影，训练的还是存储的。同一张表里的基线是否按同一规则计数。
#
# </details>
#
# ## 在 moepeft 中
#
# - `configs/paper/`：全部设置；{{moepeft.config.defaults.paper}}
#   是各运行共用的部分，`gin/` 是 T5X 形式。
# - {{moepeft.training.optimizers.adafactor.adafactor}}：采用 T5X 的矩阵布局、
#   堆叠的层，并在官方代码做分解之处做分解。
# - {{moepeft.peft.methods.presets.MOV}} 与 {{moepeft.peft.methods.lora.METHOD}}
#   含两种语义的位置与默认值。
# - {{moepeft.evaluation.published.table}}：表格；
#   {{moepeft.evaluation.paper_metric.scores}}：指标。
#   `python -m moepeft.tables RUN --paper=t5_xl` 把一次运行与它们并列。
# - 论文：[arXiv:2309.05444](https://arxiv.org/abs/2309.05444)、Adafactor
#   [arXiv:1804.04235](https://arxiv.org/abs/1804.04235)、T0 及其数据
#   [arXiv:2110.08207](https://arxiv.org/abs/2110.08207)、T5
#   [arXiv:1910.10683](https://arxiv.org/abs/1910.10683)。
# %% [markdown] lang="en" tags=["solution"]
# # The paper: solutions
#
# ## Exercise 1
# %% [markdown] lang="zh" tags=["solution"]
# # 逐行读论文：答案
#
# ## 练习 1
# %% tags=["solution"]
target = formula('xl', 'molora(experts=10, rank=4)')
rank = round(target / low_rank(xl, 1))
print(f'{target:,} parameters: a LoRA of rank {rank}')
nearest = max(
  (r for r in published.table('t5_xl') if r.method.startswith('lora')),
  key=lambda r: formula('xl', r.method),
)
share = formula('xl', nearest.method) / target
print(f'nearest in the table: {nearest.method}, with {share:.2f} of them')
assert rank == 45 and share < 0.4, 'the table has no LoRA of equal size'
# %% [markdown] lang="en" tags=["solution"]
# The table compares MoLoRA with LoRAs of at most about a third of its
# parameters. It does not say which would win at equal size.
#
# ## Exercise 2
#
# Let $s$ be the clock's start and $v_n$ the value after $n$ steps. With
# $g = 1$, $1 - v_n = \prod_{t=s+1}^{s+n} (1 - t^{-0.8})$, about
# $\exp(-n s^{-0.8})$ for $n \ll s$. The rms is $v_n^{-1/2} = 1.5$ at
# $v_n = 4/9$: $n = s^{0.8} \ln(9/5)$.
# %% [markdown] lang="zh" tags=["solution"]
# 该表拿来与 MoLoRA 比较的 LoRA，参数量至多约为其三分之一。
# 它没有回答同样大小时谁更好。
#
# ## 练习 2
#
# 设 $s$ 为时钟的起点，$v_n$ 为 $n$ 步后的值。取 $g = 1$，则
# $1 - v_n = \prod_{t=s+1}^{s+n} (1 - t^{-0.8})$，当 $n \ll s$ 时约为
# $\exp(-n s^{-0.8})$。rms 为 $v_n^{-1/2} = 1.5$，即 $v_n = 4/9$：
# $n = s^{0.8} \ln(9/5)$。
# %% tags=["solution"]
by_formula = CLOCK**0.8 * np.log(9 / 5)
by_loop = int(np.argmax(late < 1.5)) + 1
print(f'{by_formula:,.0f} by formula, {by_loop:,} by the loop')
assert abs(by_formula / by_loop - 1) < 0.03
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 3
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 3
# %% tags=["solution"]


def average(accuracies):
  """accuracies: {dataset or round: [prompts]}."""
  medians = {name: np.median(values) for name, values in accuracies.items()}
  medians['anli'] = np.mean([medians.pop(name) for name in ROUNDS])
  return np.mean([medians[name] for name in EIGHT])


names = [name for name in EIGHT if name != 'anli'] + list(ROUNDS)
accuracies = {name: rng.uniform(30, 90, size=10) for name in names}
rows = [
  types.SimpleNamespace(
    task=name,
    prompt=f'prompt {i}',
    metric=ACCURACY,
    value=float(value),
    each=None,
    majority=None,
  )
  for name, values in accuracies.items()
  for i, value in enumerate(values)
]
theirs = scores(rows)['average'].value
assert abs(average(accuracies) - theirs) < 1e-9
# One bad prompt of ten moves the median to the middle of two neighbors at
# most, and the mean by a tenth of its own change.
one = np.sort(accuracies['cb'])
bad = one.copy()
bad[-1] = 0
print(f'median {np.median(one):.1f} -> {np.median(bad):.1f},', end=' ')
print(f'mean {one.mean():.1f} -> {bad.mean():.1f}')
assert np.median(bad) == (one[3] + one[4]) / 2
assert abs(one.mean() - bad.mean() - one[-1] / 10) < 1e-9

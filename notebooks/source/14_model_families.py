# SPDX-License-Identifier: Apache-2.0
# %% [markdown] lang="en"
# # Model families: GPT-2, Llama 3, Qwen, DeepSeek, GLM
#
# Open models since GPT-2 differ in a handful of choices: which norm, which
# positions, how many key-value heads, which feed-forward, tied or not. You
# write the number of parameters of each family as a formula, and get the
# published totals, from 124 million to 671 billion parameters, most of them to
# the last digit. Then you compare the memory that their KV caches take.
# %% [markdown] lang="zh"
# # 模型系列：GPT-2、Llama 3、Qwen、DeepSeek、GLM
#
# GPT-2 以来的开源模型只在几处选择上不同：哪种 norm、哪种位置编码、多少个
# key-value head、哪种 feed-forward、head 是否共享。
# 本篇把每个系列的参数量写成公式，从 1.24 亿到 6710 亿参数，与公布的总数相符，
# 多数一位不差；再比较它们的 KV cache 占多少内存。
# %% [markdown] lang="en"
# ## What you will understand
#
# - the choices of each family, side by side in one table;
# - how to count a model's parameters from its `config.json`, and where they
#   are;
# - MHA, GQA, MQA and MLA as four ways to store keys and values, and their bytes
#   a token;
# - how multi-head latent attention (MLA) works, and why its cache can be read
#   without expanding it;
# - mixture of experts: total and active parameters.
#
# Time: 60 minutes to read, under 30 seconds to run. Before this: notebooks 06
# to 08 and 11.
# %% [markdown] lang="zh"
# ## 你将理解什么
#
# - 各系列的选择，放在一张表里对比；
# - 怎样由 `config.json` 计算参数量，参数都在哪里；
# - MHA、GQA、MQA、MLA 这四种存储 key 和 value 的方式，以及每个 token 的字节数；
# - multi-head latent attention（MLA）的原理，以及为什么不展开 cache 就能读取；
# - 混合专家（MoE）：总参数与激活参数。
#
# 用时：阅读约 60 分钟，运行不到 30 秒。前置：06 至 08，以及 11。
# %%
import dataclasses

import jax
import matplotlib.pyplot as plt
import numpy as np

from moepeft.models import FAMILIES
from moepeft.models.decoder.model import Decoder


# %% [markdown] lang="en"
# ## 1. The choices
#
# | | GPT-2 | Llama 3 | Qwen2.5 | Qwen3 | DeepSeek-V3 | GLM-4 |
# | --- | --- | --- | --- | --- | --- | --- |
# | year | 2019 | 2024 | 2024 | 2025 | 2024 | 2024 |
# | norm | LayerNorm | RMSNorm | RMSNorm | RMSNorm | RMSNorm | RMSNorm |
# | positions | learned | RoPE | RoPE | RoPE | RoPE, extra part | RoPE, half |
# | attention | MHA | GQA | GQA | GQA | MLA | GQA |
# | biases | all | none | q, k, v | none | none | q, k, v |
# | norm of q, k | no | no | no | yes | latents | no |
# | feed-forward | GELU | SwiGLU | SwiGLU | SwiGLU, MoE | SwiGLU, MoE | SwiGLU |
# | tied head | yes | 1B, 3B | up to 3B | up to 4B | no | no |
#
# The reasons, in brief:
#
# - *RMSNorm* is cheaper than LayerNorm and not worse (notebook 08). *RoPE* (07)
#   has no table of fixed length, and extends to longer contexts by scaling its
#   frequencies.
# - *GQA* shrinks the KV cache by the number of query heads that share a key
#   head; *MLA* caches one latent vector for all heads.
# - *Biases* of q, k, v in Qwen2.5 and GLM-4 are meant to help with contexts
#   longer than those of training (arXiv:2309.16609, 2406.12793); Qwen3 replaces
#   them with norms of q and k, which keep attention logits from growing in
#   training.
# - A *tied* head saves $Vd$ parameters. That matters in a small model: at
#   $V = 152$ thousand and $d = 896$ the table is more than a quarter of Qwen2.5
#   0.5B.
# - *GLM*: the first GLM (arXiv:2103.10360) filled blanks with a prefix that
#   sees both ways; later ones, GLM-4 among them, are causal decoders like the
#   others, with RoPE on half of each head's dimensions.
# %% [markdown] lang="zh"
# ## 1. 各种选择
#
# | | GPT-2 | Llama 3 | Qwen2.5 | Qwen3 | DeepSeek-V3 | GLM-4 |
# | --- | --- | --- | --- | --- | --- | --- |
# | 年份 | 2019 | 2024 | 2024 | 2025 | 2024 | 2024 |
# | norm | LayerNorm | RMSNorm | RMSNorm | RMSNorm | RMSNorm | RMSNorm |
# | 位置 | 可学习 | RoPE | RoPE | RoPE | RoPE，单独一段 | RoPE，一半 |
# | attention | MHA | GQA | GQA | GQA | MLA | GQA |
# | 偏置 | 全部 | 无 | q、k、v | 无 | 无 | q、k、v |
# | q、k 的 norm | 无 | 无 | 无 | 有 | 潜向量 | 无 |
# | feed-forward | GELU | SwiGLU | SwiGLU | SwiGLU、MoE | SwiGLU、MoE | SwiGLU |
# | tied head | 是 | 1B、3B | 至 3B | 至 4B | 否 | 否 |
#
# 理由简述：
#
# - *RMSNorm* 比 LayerNorm 便宜，效果不差（08）。*RoPE*（07）没有固定长度的表，
#   缩放频率就能扩展到更长的 context。
# - *GQA* 让多个 query head 共用一个 key head，KV cache 按这个倍数缩小；*MLA*
#   为所有 head 只缓存一个潜向量。
# - Qwen2.5 和 GLM-4 的 q、k、v *偏置* 意在帮助模型处理比训练时更长的
#   context（arXiv:2309.16609，2406.12793）；Qwen3 改用 q、k 的 norm，防止训练中
#   attention logits 变大。
# - *tied* head 省下 $Vd$ 个参数。这对小模型很重要：$V$ 为 15.2 万、$d = 896$
#   时，这张表占 Qwen2.5 0.5B 的四分之一以上。
# - *GLM*：最初的 GLM（arXiv:2103.10360）是填空式的，前缀双向可见；
#   后来的模型（包括 GLM-4）与其他系列一样是 causal decoder，RoPE 只用在每个
#   head 一半的维度上。
# %% [markdown] lang="en"
# ## 2. A formula
#
# With $V$ vocabulary, $d$ model, $L$ layers, $n$ heads, $k$ key-value heads,
# $h$ head size and $f$ feed-forward, a decoder has
#
# $$N = \underbrace{Vd\,(1 \text{ or } 2)}_{\text{embedding, head}} + L \Big(
# \underbrace{2dnh + 2dkh}_{q,\,o,\,k,\,v} + \underbrace{3df \text{ or }
# 2df}_{\text{feed-forward}} + \underbrace{2d}_{\text{norms}} \Big) + d$$
#
# weights. The embedding counts twice if the head has a table of its own; the
# feed-forward has $3df$ with a gate; the last $d$ is the final norm. Some
# families add biases, a table of positions, or norms of q and k, whose $2h$
# scales all heads of a layer share; a LayerNorm has $2d$, as it has a bias.
# Everything comes from the fields of `config.json`.
# %% [markdown] lang="zh"
# ## 2. 公式
#
# 设 $V$ 为词表，$d$ 为模型宽度，$L$ 层，$n$ 个 head，$k$ 个 key-value head，
# head size 为 $h$，feed-forward 宽度为 $f$，decoder 的权重数为
#
# $$N = \underbrace{Vd\,(1 \text{ or } 2)}_{\text{embedding, head}} + L \Big(
# \underbrace{2dnh + 2dkh}_{q,\,o,\,k,\,v} + \underbrace{3df \text{ or }
# 2df}_{\text{feed-forward}} + \underbrace{2d}_{\text{norms}} \Big) + d$$
#
# head 有自己的表时 embedding 计两次；带门控的 feed-forward 是 $3df$；最后的 $d$
# 是末尾的 norm。有的系列还有偏置、位置表，或 q、k 的 norm（$2h$ 个缩放系数，
# 由一层的所有 head 共用）；LayerNorm 有偏置，所以是 $2d$。所需的数都在
# `config.json` 里。
# %%
@dataclasses.dataclass(frozen=True)
class Dense:
  """The fields of a dense decoder that its size depends on.

  n query heads and k key-value heads of size h; layer_norm instead of RMSNorm.
  """

  v: int
  d: int
  layers: int
  n: int
  k: int
  h: int
  f: int
  tied: bool = False
  gated: bool = True
  qkv_bias: bool = False
  other_biases: bool = False
  qk_norm: bool = False
  layer_norm: bool = False
  positions: int = 0


def attention_size(c):
  size = 2 * c.d * c.n * c.h + 2 * c.d * c.k * c.h
  size += c.qkv_bias * (c.n + 2 * c.k) * c.h + c.other_biases * c.d
  return size + c.qk_norm * 2 * c.h


def feed_forward_size(c):
  return (3 if c.gated else 2) * c.d * c.f + c.other_biases * (c.f + c.d)


def parts(c):
  """{part: its number of parameters}."""
  norm = c.d * (2 if c.layer_norm else 1)
  return {
    'embedding': c.v * c.d + c.positions * c.d,
    'attention': c.layers * attention_size(c),
    'feed-forward': c.layers * feed_forward_size(c),
    'norms': (2 * c.layers + 1) * norm,
    'head': 0 if c.tied else c.v * c.d,
  }


def gpt2(d, layers):
  return Dense(
    50257,
    d,
    layers,
    d // 64,
    d // 64,
    64,
    4 * d,
    tied=True,
    gated=False,
    qkv_bias=True,
    other_biases=True,
    layer_norm=True,
    positions=1024,
  )


# %% [markdown] lang="en"
# The configurations below are those of the published `config.json` files; the
# totals are the numbers of parameters that are published with the checkpoint
# files.
# %% [markdown] lang="zh"
# 下面的配置取自公开的 `config.json`；总数是随 checkpoint 文件公布的参数量。
# %%
CONFIGS = {
  'GPT-2 small': (gpt2(768, 12), 124_439_808),
  'GPT-2 xl': (gpt2(1600, 48), 1_557_611_200),
  'Llama 3.2 1B': (
    Dense(128256, 2048, 16, 32, 8, 64, 8192, tied=True),
    1_235_814_400,
  ),
  'Llama 3.2 3B': (
    Dense(128256, 3072, 28, 24, 8, 128, 8192, tied=True),
    3_212_749_824,
  ),
  'Llama 3 8B': (Dense(128256, 4096, 32, 32, 8, 128, 14336), 8_030_261_248),
  'Llama 3 70B': (Dense(128256, 8192, 80, 64, 8, 128, 28672), 70_553_706_496),
  'Qwen2.5 0.5B': (
    Dense(151936, 896, 24, 14, 2, 64, 4864, tied=True, qkv_bias=True),
    494_032_768,
  ),
  'Qwen2.5 7B': (
    Dense(152064, 3584, 28, 28, 4, 128, 18944, qkv_bias=True),
    7_615_616_512,
  ),
  'Qwen3 0.6B': (
    Dense(151936, 1024, 28, 16, 8, 128, 3072, tied=True, qk_norm=True),
    596_049_920,
  ),
  'Qwen3 8B': (
    Dense(151936, 4096, 36, 32, 8, 128, 12288, qk_norm=True),
    8_190_735_360,
  ),
  'GLM-4 9B': (
    Dense(151552, 4096, 40, 32, 2, 128, 13696, qkv_bias=True),
    9_399_951_360,
  ),
}
for name, (c, published) in CONFIGS.items():
  total = sum(parts(c).values())
  print(f'{name:13} {total:>14,}')
  assert total == published, f'{name}: formula {total}, published {published}'
# %% [markdown] lang="en"
# Second check: the package builds most of these families. `jax.eval_shape` runs
# the initialization on shapes alone, so that a 70-billion model takes no
# memory; `python -m moepeft.count` does the same. (The package's sizes are from
# the same config files, but its arrays come from the modules that compute: a
# formula that forgot one would differ.)
# %% [markdown] lang="zh"
# 第二个检验：moepeft 实现了其中多数系列。`jax.eval_shape` 只用形状执行初始化，
# 700 亿参数的模型也不占内存；`python -m moepeft.count` 也是这样做的。（moepeft
# 的尺寸来自同样的配置文件，但数组来自真正做计算的模块：公式若漏掉一个，
# 就会不同。）
# %%
IN_PACKAGE = {
  'GPT-2 small': ('gpt2', 'small'),
  'GPT-2 xl': ('gpt2', 'xl'),
  'Llama 3.2 1B': ('llama', '3.2-1b'),
  'Llama 3.2 3B': ('llama', '3.2-3b'),
  'Llama 3 8B': ('llama', '3-8b'),
  'Llama 3 70B': ('llama', '3-70b'),
  'Qwen2.5 0.5B': ('qwen2', '2.5-0.5b'),
  'Qwen2.5 7B': ('qwen2', '2.5-7b'),
  'Qwen3 0.6B': ('qwen3', '0.6b'),
  'Qwen3 8B': ('qwen3', '8b'),
}
ids = jax.ShapeDtypeStruct((1, 2), np.int32)


def count_by_shape(family, size):
  config = FAMILIES[family].config(size)
  shapes = jax.eval_shape(
    Decoder(config).init, jax.random.key(0), {'inputs': ids}
  )
  return sum(int(np.prod(a.shape)) for a in jax.tree.leaves(shapes['params']))


for name, (family, size) in IN_PACKAGE.items():
  total = count_by_shape(family, size)
  assert total == sum(parts(CONFIGS[name][0]).values()), name
print(len(IN_PACKAGE), 'models agree with the package')
# %% [markdown] lang="en"
# Where are the parameters? In large dense models two thirds to four fifths are
# in the feed-forward; in small ones the embedding takes a large part.
# %% [markdown] lang="zh"
# 参数在哪里？大的 dense 模型有三分之二到五分之四在 feed-forward；小模型的
# embedding 占很大一部分。
# %%
figure, axis = plt.subplots(figsize=(7, 3))
left = np.zeros(len(CONFIGS))
for part in ('embedding', 'head', 'attention', 'feed-forward'):
  share = np.array([parts(c)[part] / n for c, n in CONFIGS.values()])
  axis.barh(list(CONFIGS), share, left=left, label=part)
  left += share
axis.invert_yaxis()
axis.set(xlabel='share of the parameters', xlim=(0, 1))
axis.legend(fontsize=7, loc='upper left', bbox_to_anchor=(1, 1))
figure.tight_layout()
plt.show()
share = {name: parts(c)['feed-forward'] / n for name, (c, n) in CONFIGS.items()}
print({name: round(value, 2) for name, value in share.items()})
small = parts(CONFIGS['Qwen2.5 0.5B'][0])['embedding'] / 494_032_768
assert share['Llama 3 70B'] > 0.75 and small > 0.25


# %% [markdown] lang="en"
# ## 3. DeepSeek: latent attention and experts
#
# **Mixture of experts.** The feed-forward is replaced by $e$ small ones of
# width $f_e$, of which each token uses a few, chosen by a router, a matrix
# $[d, e]$. DeepSeek adds shared experts that all tokens use, and its first
# layers stay dense. The *active* parameters, those that a token uses, are then
# fewer than the total.
#
# **MLA.** For each token one latent vector $c = x W_{dkv} \in \mathbb{R}^{512}$
# is computed, from which head $i$ gets its key $k_i = c\, W^{uk}_i$ and its
# value $v_i = c\, W^{uv}_i$ (notebook 06). RoPE cannot be applied to keys made
# this way (see section 4), so each head also has a rotary part of 64
# dimensions, whose key all heads share. Queries go through a latent of 1536 in
# the large models. Parameters of the attention:
#
# $$\underbrace{d r_q + r_q n (h_n + h_r)}_{q} + \underbrace{d (r +
# h_r)}_{\text{latent, rotary key}} + \underbrace{r n (h_n +
# h_v)}_{W^{uk},\,W^{uv}} + \underbrace{n h_v d}_{o} + \underbrace{r_q +
# r}_{\text{norms of the latents}}$$
#
# with $n$ heads, latents of $r_q = 1536$ and $r = 512$ numbers, and for each
# head $h_n = 128$ dimensions of q and k without rotation, $h_r = 64$ with it,
# and $h_v = 128$ of the value.
# %% [markdown] lang="zh"
# ## 3. DeepSeek：潜在注意力与专家
#
# **混合专家（MoE）。** feed-forward 换成 $e$ 个宽度为 $f_e$ 的小 feed-forward，
# 每个 token 只用其中几个，由 router（矩阵 $[d, e]$）选择。DeepSeek 另有所有
# token 都用的共享专家，最前面几层仍是 dense。*激活*参数，即一个 token
# 用到的参数，因此少于总参数。
#
# **MLA。** 每个 token 计算一个潜向量 $c = x W_{dkv} \in \mathbb{R}^{512}$，第
# $i$ 个 head 由它得到 key $k_i = c\, W^{uk}_i$ 和 value
# $v_i = c\, W^{uv}_i$（见 06）。RoPE 不能用在这样得到的 key 上（见第 4 节），
# 所以每个 head 另有 64 维的 rotary 部分，其 key 由所有 head 共用。大模型的
# query 也经过 1536 维的潜向量。attention 的参数量：
#
# $$\underbrace{d r_q + r_q n (h_n + h_r)}_{q} + \underbrace{d (r +
# h_r)}_{\text{latent, rotary key}} + \underbrace{r n (h_n +
# h_v)}_{W^{uk},\,W^{uv}} + \underbrace{n h_v d}_{o} + \underbrace{r_q +
# r}_{\text{norms of the latents}}$$
#
# 其中有 $n$ 个 head，潜向量的维数是 $r_q = 1536$ 和 $r = 512$；每个 head 的 q
# 和 k 有 $h_n = 128$ 维不旋转、$h_r = 64$ 维旋转，value 有 $h_v = 128$ 维。
# %%
@dataclasses.dataclass(frozen=True)
class Experts:
  """A decoder with mixtures of experts; GQA if `r` is 0, else MLA."""

  v: int
  d: int
  layers: int
  n: int
  dense_layers: int
  f: int
  experts: int
  active: int
  shared: int
  f_expert: int
  k: int = 0
  h: int = 128
  rq: int = 0
  r: int = 0
  rotary: int = 64
  qk_norm: bool = False
  selection_bias: bool = False


def moe_attention_size(c):
  if not c.r:
    return 2 * c.d * c.h * (c.n + c.k) + c.qk_norm * 2 * c.h
  per_query = c.n * (c.h + c.rotary)
  q = c.d * c.rq + c.rq * per_query + c.rq if c.rq else c.d * per_query
  latent = c.d * (c.r + c.rotary) + c.r
  return q + latent + 2 * c.r * c.n * c.h + c.n * c.h * c.d


def moe_size(c, experts):
  """All parameters, with `experts` routed experts in each layer."""
  expert = 3 * c.d * c.f_expert
  router = c.d * c.experts + c.selection_bias * c.experts
  moe = (experts + c.shared) * expert + router
  sparse = c.layers - c.dense_layers
  size = 2 * c.v * c.d + c.d + c.layers * (moe_attention_size(c) + 2 * c.d)
  return size + c.dense_layers * 3 * c.d * c.f + sparse * moe


SPARSE = {
  'Qwen3 30B-A3B': (
    Experts(151936, 2048, 48, 32, 0, 0, 128, 8, 0, 768, k=4, qk_norm=True),
    30_532_122_624,
  ),
  'DeepSeek-V2 Lite': (
    Experts(102400, 2048, 27, 16, 1, 10944, 64, 6, 2, 1408, r=512),
    15_706_484_224,
  ),
  'DeepSeek-V2': (
    Experts(102400, 5120, 60, 128, 1, 12288, 160, 6, 2, 1536, r=512, rq=1536),
    235_741_434_880,
  ),
  'DeepSeek-V3': (
    Experts(
      129280,
      7168,
      61,
      128,
      3,
      18432,
      256,
      8,
      1,
      2048,
      r=512,
      rq=1536,
      selection_bias=True,
    ),
    671_026_419_200,
  ),
}
active = {}
for name, (c, published) in SPARSE.items():
  total, active[name] = moe_size(c, c.experts), moe_size(c, c.active)
  print(
    f'{name:16} {total:>15,} active {active[name] / 1e9:5.1f} billion, '
    f'{active[name] / total:.0%}'
  )
  assert total == published, f'{name}: formula {total}, published {published}'
# %% [markdown] lang="en"
# DeepSeek-V3 is published as 671 billion. Its files have 14 billion more for
# multi-token prediction, which the count leaves out, so here only the first
# three digits are a check.
#
# The papers name 21 billion active parameters for V2 and 37 billion for V3; the
# count above includes the embedding, of which a token reads one row, and the
# head. Without the embedding:
# %% [markdown] lang="zh"
# DeepSeek-V3 公布的总数是 6710 亿。它的文件中还有 140 亿用于 multi-token
# prediction 的参数，这里不计，所以只有前三位数字可作检验。
#
# 论文给出的激活参数是 V2 210 亿、V3 370 亿；上面的计数包括 embedding（一个
# token 只读其中一行）和 head。去掉 embedding：
# %%
for name, billions in (('DeepSeek-V2', 21), ('DeepSeek-V3', 37)):
  c = SPARSE[name][0]
  without_embedding = (active[name] - c.v * c.d) / 1e9
  print(name, round(without_embedding, 2), 'billion; the paper says', billions)
  assert abs(without_embedding - billions) < 1
# %% [markdown] lang="en"
# ## 4. MLA in twenty lines
#
# What is cached for each token is the latent $c: [r]$ and the rotary key of
# $h_r$ numbers: $512 + 64$ numbers for all heads, where MHA with 128 heads
# would store $2 \cdot 128 \cdot 128$. Must keys and values be expanded at every
# step? No, because matrix products associate. For head $i$, cached tokens $j$
# and attention weights $w_{ij}$:
#
# $$q_i \cdot k_{ij} = q_i \cdot (c_j W^{uk}_i) = (q_i W^{uk\top}_i) \cdot c_j,
# \qquad \sum_j w_{ij}\, c_j W^{uv}_i = \Big(\sum_j w_{ij}\, c_j\Big)
# W^{uv}_i.$$
#
# The query is moved into the latent space instead, once for each step. In this
# *absorbed* form MLA is attention with one key-value head of size 512 that all
# query heads share. It also shows why RoPE needs a part of its own: a rotation
# that depends on $j$ between $W^{uk}$ and $c_j$ could not be moved to the
# query.
# %% [markdown] lang="zh"
# ## 4. 二十行的 MLA
#
# 每个 token 缓存的是潜向量 $c: [r]$ 和 $h_r$ 维的 rotary key：所有 head 共
# $512 + 64$ 个数；128 个 head 的 MHA 则要存 $2 \cdot 128 \cdot 128$ 个。
# 每一步都必须展开 key 和 value 吗？不必，因为矩阵乘法满足结合律。对第 $i$ 个
# head、缓存的第 $j$ 个 token 和 attention 权重 $w_{ij}$：
#
# $$q_i \cdot k_{ij} = q_i \cdot (c_j W^{uk}_i) = (q_i W^{uk\top}_i) \cdot c_j,
# \qquad \sum_j w_{ij}\, c_j W^{uv}_i = \Big(\sum_j w_{ij}\, c_j\Big)
# W^{uv}_i.$$
#
# 改为每一步把 query 变换到潜空间一次。在这种*吸收*形式下，MLA 就是所有 query
# head 共用一个大小为 512 的 key-value head 的 attention。这也说明 RoPE
# 为什么需要单独一段：如果在 $W^{uk}$ 和 $c_j$ 之间有一个依赖 $j$ 的旋转，
# 就无法移到 query 一侧。
# %%
rng = np.random.default_rng(0)
d, n, h, r, rotary, s = 64, 4, 16, 24, 8, 30
w = {
  'q': rng.normal(size=(d, n, h)) / 8,
  'q_rotary': rng.normal(size=(d, n, rotary)) / 8,
  'latent': rng.normal(size=(d, r)) / 8,
  'k_rotary': rng.normal(size=(d, rotary)) / 8,
  'uk': rng.normal(size=(r, n, h)) / 5,
  'uv': rng.normal(size=(r, n, h)) / 5,
}


def rotate(x, position):
  half = x.shape[-1] // 2
  angle = position * 10000.0 ** -(np.arange(half) / half)
  a, b = x[..., :half], x[..., half:]
  cos, sin = np.cos(angle), np.sin(angle)
  return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def softmax(z):
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


x = rng.normal(size=(s, d))
cache = x @ w['latent']
rotary_keys = rotate(x @ w['k_rotary'], np.arange(s)[:, None])
# The query of the last token; rotary parts add to the logits.
q = np.einsum('d,dnh->nh', x[-1], w['q'])
q_rotary = rotate(np.einsum('d,dnh->nh', x[-1], w['q_rotary']), s - 1)
from_positions = q_rotary @ rotary_keys.T
scale = (h + rotary) ** -0.5


def expanded():
  """Keys [s, n, h] and values for every head, as in training."""
  k = np.einsum('sr,rnh->snh', cache, w['uk'])
  v = np.einsum('sr,rnh->snh', cache, w['uv'])
  logits = np.einsum('nh,snh->ns', q, k) + from_positions
  return np.einsum('ns,snh->nh', softmax(logits * scale), v)


def absorbed():
  """Reads the latents only, as in decoding."""
  q_latent = np.einsum('nh,rnh->nr', q, w['uk'])
  weights = softmax((q_latent @ cache.T + from_positions) * scale)
  return np.einsum('nr,rnh->nh', weights @ cache, w['uv'])


assert np.allclose(expanded(), absorbed(), atol=1e-12), 'products associate'
moved = expanded() - absorbed()
print('largest difference', np.abs(moved).max())
print('numbers cached a token:', r + rotary, 'instead of', 2 * n * h)


# %% [markdown] lang="en"
# ## 5. The KV cache
#
# Bytes a token in bfloat16, of 2 bytes a number: $2 \cdot L \cdot 2kh$ for MHA
# ($k = n$), GQA ($1 < k < n$) and MQA ($k = 1$); $2 \cdot L (r + h_r)$ for MLA.
# %% [markdown] lang="zh"
# ## 5. KV cache
#
# bfloat16（每个数 2 字节）下每个 token 的字节数：MHA（$k = n$）、
# GQA（$1 < k < n$）、MQA（$k = 1$）为 $2 \cdot L \cdot 2kh$；MLA 为
# $2 \cdot L (r + h_r)$。
# %%
def cache_bytes(c):
  """Bytes of the KV cache for each token, in bfloat16."""
  if getattr(c, 'r', 0):
    return 2 * c.layers * (c.r + c.rotary)
  return 2 * c.layers * 2 * c.k * c.h


everything = {name: c for name, (c, _) in (CONFIGS | SPARSE).items()}
kilobytes = {name: cache_bytes(c) / 1024 for name, c in everything.items()}
llama = everything['Llama 3 8B']
assert cache_bytes(llama) == 131072
as_mha = cache_bytes(dataclasses.replace(llama, k=llama.n))
print(
  'Llama 3 8B with MHA instead of GQA:', as_mha / cache_bytes(llama), 'times'
)
v3 = everything['DeepSeek-V3']
v3_as_mha = 2 * v3.layers * 2 * v3.n * v3.h
print('DeepSeek-V3 with MHA:', round(v3_as_mha / cache_bytes(v3), 1), 'times')
assert (
  cache_bytes(v3) < cache_bytes(llama) < cache_bytes(everything['Llama 3 70B'])
)
# %%
figure, axes = plt.subplots(1, 2, figsize=(7, 3))
names = sorted(kilobytes, key=kilobytes.get)
axes[0].barh(names, [kilobytes[name] for name in names])
axes[0].set(xlabel='KiB a token')
axes[0].tick_params(labelsize=7)
tokens = np.array([1, 8, 32, 128]) * 1024
for name in (
  'Llama 3 70B',
  'GPT-2 xl',
  'Llama 3 8B',
  'DeepSeek-V3',
  'GLM-4 9B',
):
  gib = cache_bytes(everything[name]) * tokens / 2**30
  axes[1].loglog(tokens / 1024, gib, 'o-', label=name)
axes[1].set(xlabel='thousand tokens', title='GiB of one sequence')
axes[1].legend(fontsize=7)
figure.tight_layout()
plt.show()
# %% [markdown] lang="en"
# GPT-2 xl with its 1.6 billion parameters has a larger cache than Llama 3 8B:
# it has full multi-head attention. (Its context ends at 1024 tokens; the line
# goes on for comparison only.) DeepSeek-V3 with 671 billion parameters caches
# less than Llama 3 8B. GLM-4 9B has the smallest cache of the five: two
# key-value heads.
# %% [markdown] lang="zh"
# 16 亿参数的 GPT-2 xl 的 cache 比 Llama 3 8B 还大，因为它是完整的 multi-head
# attention。（它的 context 到 1024 个 token 为止，曲线后面的部分只作比较。）
# 6710 亿参数的 DeepSeek-V3 的 cache 比 Llama 3 8B 还小。五个模型中 GLM-4 9B 的
# cache 最小：只有两个 key-value head。
# %% [markdown] lang="en"
# ## Exercises
#
# 1. (Easy) Mistral 7B has $V = 32000$, $d = 4096$, 32 layers, 32 heads, 8
#    key-value heads of size 128, $f = 14336$, no biases, untied. Its published
#    total is 7,241,732,096. Check it, and compare with the package's `mistral`.
# 2. (Medium) A rule of thumb says that a forward pass costs $2N$ FLOPs a token,
#    $N$ without the embedding. Write the exact number of multiply-adds of
#    matrices for a dense model at context $s$, attention included, and find the
#    $s$ at which attention over the context costs as much as all weights of
#    Llama 3 8B.
# 3. (Hard) Design: convert Llama 3 8B to MLA so that its cache has the size of
#    GLM-4 9B's. Choose $r$ with $h_r = 64$, keep $n$, $h$ and $d$, no query
#    latent. How many parameters does attention have before and after?
# %% [markdown] lang="zh"
# ## 练习
#
# 1. （易）Mistral 7B：$V = 32000$，$d = 4096$，32 层，32 个 head，8 个大小为
#    128 的 key-value head，$f = 14336$，无偏置，不共享 head。公布的总数是
#    7,241,732,096。检验它，并与 moepeft 的 `mistral` 比较。
# 2. （中）经验法则：前向计算每个 token 花费 $2N$ FLOPs，$N$ 不含 embedding。
#    写出 dense 模型在 context 长度 $s$ 时矩阵乘加次数的精确值，包括 attention；
#    求 $s$，使 Llama 3 8B 对 context 的 attention 与全部权重的开销相同。
# 3. （难）设计：把 Llama 3 8B 改成 MLA，使 cache 与 GLM-4 9B 一样大。取
#    $h_r = 64$ 选择 $r$，保持 $n$、$h$、$d$，query 不用潜向量。attention
#    的参数量改前和改后各是多少？
# %% [markdown] lang="en"
# ## Interview questions
#
# **Estimate the parameters of a model from $d = 4096$, $L = 32$, $V = 128$
# thousand in your head.**
#
# <details><summary>Answer</summary>
#
# A classical layer has $12 d^2$ (attention $4d^2$, feed-forward $8d^2$):
# $12 \cdot 16.8 \cdot 10^6 \approx 201$ million, times 32 is 6.4 billion.
# Embedding and head: $2 \cdot 128 \cdot 10^3 \cdot 4096 \approx 1.05$ billion.
# Together 7.5 billion. Llama 3 8B deviates: GQA takes $1.5 d^2$ from each
# layer, its wide feed-forward adds $3 \cdot 3.5 d^2 - 8 d^2 = 2.5 d^2$, so
# $13 d^2$ a layer: 8.0 billion.
#
# </details>
#
# **What does MLA save compared with GQA, and what does it cost?**
#
# <details><summary>Answer</summary>
#
# It caches one latent (and a small rotary key) for all heads, here 576 numbers
# a layer, less than GQA with 3 key heads of size 128, while every head still
# has keys and values of its own. The cost: in the absorbed form each head's dot
# products are over 512 + 64 dimensions instead of 128 + 64, so decoding does
# more arithmetic for each cached token (acceptable where memory traffic is the
# limit); more matrices; and positions need a separate rotary part.
#
# </details>
# %% [markdown] lang="zh"
# ## 面试题
#
# **已知 $d = 4096$、$L = 32$、$V$ 为 12.8 万，心算模型的参数量。**
#
# <details><summary>答案</summary>
#
# 经典的一层有 $12 d^2$（attention $4d^2$，feed-forward $8d^2$）：
# $12 \cdot 16.8 \cdot 10^6 \approx 2.01$ 亿，乘以 32 是 64 亿。embedding 和
# head：$2 \cdot 128 \cdot 10^3 \cdot 4096 \approx 10.5$ 亿。合计 75 亿。Llama 3
# 8B 的差别：GQA 每层减少 $1.5 d^2$，较宽的 feed-forward 增加
# $3 \cdot 3.5 d^2 - 8 d^2 = 2.5 d^2$，每层 $13 d^2$：80 亿。
#
# </details>
#
# **与 GQA 相比，MLA 省了什么，代价是什么？**
#
# <details><summary>答案</summary>
#
# 它为所有 head 只缓存一个潜向量（和一个小的 rotary key），这里每层 576 个数，比
# 3 个大小为 128 的 key head 的 GQA 还少，而每个 head 仍有自己的 key 和 value。
# 代价：吸收形式下，每个 head 的点积是 512 + 64 维，而不是 128 + 64 维，
# 解码时每个缓存的 token 计算更多（在访存受限时可以接受）；矩阵更多；
# 位置需要单独的 rotary 部分。
#
# </details>
# %% [markdown] lang="en"
# ## In the package
#
# - {{moepeft.models.family.ModelFamily}} is an entry of the families; all
#   decoders are one module, {{moepeft.models.decoder.model.Decoder}}, with
#   different configs: {{moepeft.models.decoder.gpt2.SIZES}},
#   {{moepeft.models.decoder.llama.SIZES}},
#   {{moepeft.models.decoder.qwen2.SIZES}},
#   {{moepeft.models.decoder.qwen3.SIZES}}.
# - {{moepeft.checkpoints.count_parameters.count}} counts base and adapter from
#   shapes; it is what `python -m moepeft.count` prints, with FLOPs by
#   {{moepeft.checkpoints.count_flops.flops_per_token}}.
# - {{moepeft.nn.causal_attention.CausalAttention}} has MHA, GQA and MQA by
#   `kv_heads`. MLA and base models that are mixtures of experts are not in the
#   package; its mixtures are of adapters.
#
# Papers: Llama 3 arXiv:2407.21783, Qwen 2309.16609, Qwen2.5 2412.15115, Qwen3
# 2505.09388, DeepSeek-V2 2405.04434, DeepSeek-V3 2412.19437, GLM 2103.10360,
# GLM-4 2406.12793, GQA 2305.13245, MQA 1911.02150; GPT-2: Radford et al., 2019.
# %% [markdown] lang="zh"
# ## 在 moepeft 中
#
# - {{moepeft.models.family.ModelFamily}} 是一个系列的条目；所有 decoder
#   是同一个模块 {{moepeft.models.decoder.model.Decoder}}，只是 config 不同：
#   {{moepeft.models.decoder.gpt2.SIZES}}、
#   {{moepeft.models.decoder.llama.SIZES}}、
#   {{moepeft.models.decoder.qwen2.SIZES}}、
#   {{moepeft.models.decoder.qwen3.SIZES}}。
# - {{moepeft.checkpoints.count_parameters.count}} 由形状计算 base 和 adapter
#   的参数量，`python -m moepeft.count` 打印的就是它，FLOPs 来自
#   {{moepeft.checkpoints.count_flops.flops_per_token}}。
# - {{moepeft.nn.causal_attention.CausalAttention}} 由 `kv_heads` 决定 MHA、GQA
#   或 MQA。moepeft 没有 MLA，也没有本身是 MoE 的 base 模型；它的混合是 adapter
#   的混合。
#
# 论文：Llama 3 arXiv:2407.21783，Qwen 2309.16609，Qwen2.5 2412.15115，Qwen3
# 2505.09388，DeepSeek-V2 2405.04434，DeepSeek-V3 2412.19437，GLM 2103.10360，
# GLM-4 2406.12793，GQA 2305.13245，MQA 1911.02150；GPT-2：Radford 等，2019。
# %% [markdown] lang="en" tags=["solution"]
# # Solutions: model families
# %% [markdown] lang="zh" tags=["solution"]
# # 解答：模型系列
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 1
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 1
# %% tags=["solution"]
mistral = Dense(32000, 4096, 32, 32, 8, 128, 14336)
total = sum(parts(mistral).values())
assert total == 7_241_732_096
size = next(name for name in FAMILIES['mistral'].sizes if '7b' in name)
assert count_by_shape('mistral', size) == total
print(total, size)


# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 2
#
# One token multiplies with every matrix once, so its multiply-adds are the
# parameters of the matrices (the head included, the embedding not). Attention
# over $s$ keys adds $2nhs$ for each layer: logits and values. They are equal at
# $s = N / (2nhL)$.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 2
#
# 一个 token 与每个矩阵各乘一次，乘加次数就是矩阵的参数量（包括 head，不包括
# embedding）。对 $s$ 个 key 的 attention 每层再加 $2nhs$ 次：logits 和 value。
# 两者在 $s = N / (2nhL)$ 时相等。
# %% tags=["solution"]
def multiply_adds(c, s):
  matrices = attention_size(c) + feed_forward_size(c)
  return c.layers * (matrices + 2 * c.n * c.h * s) + c.v * c.d


weights_only = multiply_adds(llama, 0)
equal = weights_only / (2 * llama.n * llama.h * llama.layers)
print('equal at', round(equal), 'tokens')
assert np.isclose(multiply_adds(llama, equal), 2 * weights_only)
# The rule of thumb, at a short context: within 1 %.
n_without_embedding = CONFIGS['Llama 3 8B'][1] - llama.v * llama.d
assert abs(multiply_adds(llama, 128) / n_without_embedding - 1) < 0.01
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 3
#
# GLM-4 9B caches $40 \cdot 2 \cdot 2 \cdot 128$ numbers a token, so with 32
# layers $r + 64 = 640$.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 3
#
# GLM-4 9B 每个 token 缓存 $40 \cdot 2 \cdot 2 \cdot 128$ 个数，32 层时
# $r + 64 = 640$。
# %% tags=["solution"]
glm = everything['GLM-4 9B']
r = cache_bytes(glm) // (2 * llama.layers) - 64
with_mla = Experts(
  llama.v, llama.d, llama.layers, llama.n, llama.layers, llama.f,
  0, 0, 0, 0, r=r,
)  # fmt: skip
assert cache_bytes(with_mla) == cache_bytes(glm) and r == 576
before, after = attention_size(llama), moe_attention_size(with_mla)
print('parameters of attention in a layer:', before, '->', after)
assert after > before

# SPDX-License-Identifier: Apache-2.0
# %% [markdown] lang="en"
# # QLoRA: a frozen base in four bits
#
# A frozen base needs no gradient, so its weights need no precision for small
# updates: they only have to be read. QLoRA stores them in about four bits each
# and trains a LoRA beside them. This notebook derives the number formats by
# hand (int8, int4, NF4, double quantization), measures their errors on trained
# weights, counts the bytes, and trains LoRA on quantized bases. The codes have
# to equal moepeft's, bit by bit.
#
# ## What you will understand
#
# - absmax quantization and its largest error, with one scale for an output or
#   for a block;
# - where the 16 levels of NF4 come from, and why they fit weights better than
#   even steps;
# - how four bits become 4.5, and 4.127 with double quantization;
# - what LoRA can repair of a quantized base, and what it cannot;
# - why merging into quantized weights is not exact.
#
# About 60 minutes. Before it: 15 (LoRA by hand).
# %% [markdown] lang="zh"
# # QLoRA：四比特的冻结基座
#
# 冻结的基座不需要梯度，它的权重也就不需要为微小更新保留精度：只要能读就行。
# QLoRA 用大约四比特存储每个权重，在旁边训练 LoRA。
# 本 notebook 手工推导各种数值格式（int8、int4、NF4、双重量化），
# 在训练好的权重上测量误差，数清字节，并在量化的基座上训练 LoRA。
# 编码必须与 moepeft 的逐比特相等。
#
# ## 你将理解什么
#
# - absmax 量化和它的最大误差：每个输出一个 scale，或每个块一个 scale；
# - NF4 的 16 个值从哪里来，为什么比等间距更适合权重；
# - 四比特怎样变成 4.5 比特，加上双重量化又怎样变成 4.127 比特；
# - LoRA 能修复量化基座的哪些损失，不能修复哪些；
# - 为什么合并到量化权重里并不精确。
#
# 大约 60 分钟。先修：15（手写 LoRA）。
# %%
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import safetensors.numpy
from sklearn.datasets import load_digits

import moepeft
from moepeft.nn import quantization
from moepeft.nn.linear import base_projection

ASSETS = Path(moepeft.__file__).parent / 'assets'
tensors = safetensors.numpy.load_file(ASSETS / 't5_tiny/model.safetensors')
# Kernels [in, out]: Hugging Face's files have [out, in].
KERNELS = {
  name: tensor.astype(np.float32).T
  for name, tensor in tensors.items()
  if 'SelfAttention.' in name
  and name.split('.')[-2] in 'qkvo'
  or '.wi_' in name
  or '.wo.' in name
}
# Whole blocks of 64 inputs only, to keep the code short.
KERNELS = {n: w for n, w in KERNELS.items() if len(w) % 64 == 0}
kernel = KERNELS['decoder.block.0.layer.2.DenseReluDense.wo.weight']
print(len(KERNELS), 'trained kernels, this one', kernel.shape)


# %% [markdown] lang="en"
# ## int8: one scale for an output
#
# A code is a whole number, a weight is a code times a scale. *Absmax* takes the
# largest absolute value $m$ of a group as the end of the range:
#
# $$
# s = \frac{m}{127}, \qquad
# c = \mathrm{round}(w / s) \in \{-127, \dots, 127\}, \qquad \hat w = s\,c
# $$
#
# Rounding moves a value by half a step at most, so $|w - \hat w| \le s / 2$.
# Everything depends on $m$: a single large weight makes the steps of its whole
# group coarse. So there is one scale for each output (a column of the kernel),
# not one for the matrix.
# %% [markdown] lang="zh"
# ## int8：每个输出一个 scale
#
# 编码是整数，权重等于编码乘以 scale。*absmax* 取一组里绝对值最大的 $m$ 作为范围
# 的端点：
#
# $$
# s = \frac{m}{127}, \qquad
# c = \mathrm{round}(w / s) \in \{-127, \dots, 127\}, \qquad \hat w = s\,c
# $$
#
# 舍入最多移动半步，所以 $|w - \hat w| \le s / 2$。一切取决于 $m$：
# 一个大的权重会让整组的步长变粗。所以每个输出（kernel 的一列）一个 scale，
# 而不是整个矩阵一个。
# %%
def to_int8(kernel):
  """(codes int8 [in, out], scale [out])."""
  scale = np.abs(kernel).max(axis=0) / np.float32(127)
  return np.rint(kernel / scale).astype(np.int8), scale


codes, scale = to_int8(kernel)
error = np.abs(codes * scale - kernel)
assert (error <= scale / 2 * (1 + 1e-5)).all(), 'more than half a step'
their_codes, their_scale = quantization.to_int8(kernel, 1)
assert np.array_equal(codes, their_codes) and np.array_equal(scale, their_scale)
one_scale = np.abs(kernel).max() / 127
print(
  f'step of one scale for all {one_scale:.5f}, of an output '
  f'{scale.min():.5f} to {scale.max():.5f}'
)


# %% [markdown] lang="en"
# ## Sixteen levels from a normal distribution
#
# Four bits give 16 values. Even steps waste them: trained weights are roughly
# normal, so most lie near zero and few near the ends. *NormalFloat* puts the
# values at quantiles of the normal distribution, so that each is used about
# equally often. QLoRA (arXiv:2305.14314, appendix E) wants three properties
# besides: exact $0$ (padding and pruned weights), and exact $\pm 1$ (the
# largest weight of a block). The construction:
#
# - take the probabilities from $\tfrac12$ to
#   $p_{\max} = 1 - \tfrac12 (\tfrac1{32} + \tfrac1{30}) = 0.9677083$, in 8
#   steps for the positive side and in 7 for the negative;
# - $q_i = \Phi^{-1}(p_i)$, mirrored for the negative side; zero is counted
#   once: $8 + 7 + 1 = 16$;
# - divide by the largest.
#
# $p_{\max}$ is the middle between the centers of the last bin for 16 and for 15
# bins; with 1 the last quantile would be infinite.
# %% [markdown] lang="zh"
# ## 由正态分布得到的十六个值
#
# 四比特有 16 个值。等间距会浪费它们：训练好的权重大致是正态分布，多数在零附近，
# 两端很少。*NormalFloat* 把值放在正态分布的分位数上，
# 使每个值被用到的次数大致相同。QLoRA（arXiv:2305.14314，
# 附录 E）另外还要求三点：精确的 $0$（padding 和被剪掉的权重），
# 以及精确的 $\pm 1$（块里最大的权重）。构造如下：
#
# - 概率从 $\tfrac12$ 到
#   $p_{\max} = 1 - \tfrac12 (\tfrac1{32} + \tfrac1{30}) = 0.9677083$，
#   正的一侧分 8 步，负的一侧分 7 步；
# - $q_i = \Phi^{-1}(p_i)$，负的一侧取镜像；零只算一次：$8 + 7 + 1 = 16$；
# - 除以最大的值。
#
# $p_{\max}$ 是 16 个区间与 15 个区间时最后一个区间中心的平均；如果取 1，
# 最后一个分位数就是无穷大。
# %%
def nf4_levels():
  inverse = statistics.NormalDist().inv_cdf
  most = 1 - (1 / 32 + 1 / 30) / 2
  positive = [inverse(0.5 + (most - 0.5) * i / 8) for i in range(1, 9)]
  negative = [-inverse(0.5 + (most - 0.5) * i / 7) for i in range(1, 8)]
  return np.array(sorted([*negative, 0.0, *positive])) / positive[-1]


NF4 = nf4_levels()
print(np.round(NF4, 4))
assert len(NF4) == 16 and 0 in NF4 and NF4[0] == -1 and NF4[-1] == 1
# The package has the published constants, of seven digits.
np.testing.assert_allclose(NF4, quantization.LEVELS, atol=1e-6)
INT4 = np.arange(-7, 8) / 7  # absmax with even steps: 15 of 16 codes
# %%
BLOCK = 64


def to_blocks(kernel):
  """[in, out] -> [blocks, BLOCK, out]: BLOCK inputs of an output."""
  return kernel.reshape(-1, BLOCK, kernel.shape[1])


def quantize(kernel, levels):
  """(codes [in, out], scale [blocks, out]) by the nearest level."""
  blocks = to_blocks(kernel)
  scale = np.abs(blocks).max(axis=1)
  middles = ((levels[1:] + levels[:-1]) / 2).astype(np.float32)
  codes = np.searchsorted(middles, blocks / scale[:, None])
  return codes.reshape(kernel.shape).astype(np.uint8), scale


def dequantize(codes, scale, levels):
  values = levels.astype(np.float32)[codes]
  return values * np.repeat(scale, BLOCK, axis=0)


LEVELS = quantization.LEVELS
codes, scale = quantize(kernel, LEVELS)
packed = codes[0::2] << 4 | codes[1::2]  # two codes in a byte
their_codes, their_scale = quantization.to_nf4(kernel, 1)
assert np.array_equal(packed, their_codes), 'order of the halves, or of blocks'
assert np.array_equal(scale, their_scale)
np.testing.assert_array_equal(
  dequantize(codes, scale, LEVELS),
  quantization.from_nf4(their_codes, their_scale, kernel.shape),
)
print('codes, scales and decoded weights equal the package')


# %% [markdown] lang="en"
# ## Errors on trained weights
#
# The relative error is $\lVert W - \hat W \rVert / \lVert W \rVert$ (root mean
# square over all weights). All four-bit formats have the same blocks of 64
# inputs; only the levels differ. The left figure is the density of weights
# divided by the absmax of their block, which are the numbers that are rounded
# to the levels, with the levels below it. The right one counts NF4's codes for
# one kernel; the dashed line is equal use, 1/16.
# %% [markdown] lang="zh"
# ## 在训练好的权重上的误差
#
# 相对误差是 $\lVert W - \hat W \rVert / \lVert W \rVert$（对所有权重取均方
# 根）。四比特的格式都用同样的块，64 个输入一块；不同的只有值的位置。
# 左图是权重除以本块 absmax 之后的密度，被舍入的正是这些数；
# 下方标出各个值的位置。右图统计一个 kernel 中 NF4 各编码的占比，
# 虚线表示均匀使用，即 1/16。
# %%
def relative_error(decode):
  squares = [np.sum((decode(w) - w) ** 2) for w in KERNELS.values()]
  return float(
    np.sqrt(sum(squares) / sum(np.sum(w**2) for w in KERNELS.values()))
  )


def by_int8(kernel):
  codes, scale = to_int8(kernel)
  return codes * scale


def by_levels(levels):
  return lambda w: dequantize(*quantize(w, levels), levels)


errors = {
  'int8': relative_error(by_int8),
  'NF4': relative_error(by_levels(LEVELS)),
  'int4': relative_error(by_levels(INT4)),
}
for name, error in errors.items():
  print(f'{name:6}{100 * error:6.2f} %')
assert errors['int8'] < errors['NF4'] < errors['int4'], errors
# %%
normed = np.concatenate(
  [
    (to_blocks(w) / np.abs(to_blocks(w)).max(1, keepdims=True)).ravel()
    for w in KERNELS.values()
  ]
)
usage = np.bincount(quantize(kernel, LEVELS)[0].ravel(), minlength=16)
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.6), dpi=72)
left.hist(normed, 81, density=True, color='lightsteelblue')
left.plot(LEVELS, np.full(16, -0.12), '|', ms=14, color='tab:red', label='NF4')
left.plot(INT4, np.full(15, -0.32), '|', ms=14, color='black', label='int4')
left.set(xlabel='weight / absmax of its block', yticks=[])
left.legend(fontsize=8)
right.bar(range(16), usage / usage.sum(), color='tab:red')
right.axhline(1 / 16, color='black', lw=0.8, ls='--')
right.set(xlabel='NF4 code', ylabel='share of weights')
fig.tight_layout()
assert abs(normed).max() == 1


# %% [markdown] lang="en"
# The levels crowd where the weights are. The codes are *not* used equally
# often, although that was the idea: the levels are quantiles of a normal
# distribution of fixed width, and a block is divided by its own largest value,
# so the normed weights are not of that distribution (and with larger blocks
# even less; arXiv:2306.06965). Equal use is not the aim anyway; a small error
# is. Exercise 2 looks for levels with a smaller one.
#
# ## Bytes: 4.5 bits, and 4.127
#
# A scale in float32 for 64 weights adds $32 / 64 = 0.5$ bits to each
# weight. *Double quantization* quantizes the scales: they are positive and
# alike, so their mean is subtracted and the rest stored in 8 bits, with one
# float32 scale for 256 of them. (QLoRA takes an 8-bit float; int8 has the same
# size.)
#
# $$
# 4 + \frac{8}{64} + \frac{32}{64 \cdot 256} = 4.127 \text{ bits}
# $$
#
# In 7 billion weights the difference is 0.37 bits each, 0.3 GB.
# %% [markdown] lang="zh"
# 各个值挤在权重多的地方。编码的使用次数*并不*相等，尽管初衷如此：
# 这些值是固定宽度正态分布的分位数，而每个块要除以自己的最大值，
# 所以归一化后的权重不服从那个分布（块越大越不服从；arXiv:2306.06965）。
# 况且目标不是使用均匀，而是误差小。练习 2 寻找误差更小的值。
#
# ## 字节：4.5 比特与 4.127 比特
#
# 64 个权重一个 float32 的 scale，给每个权重加上 $32 / 64 = 0.5$ 比特。
# *双重量化*再量化这些 scale：它们都是正数，彼此相近，所以先减去平均值，
# 余下的用 8 比特存储，每 256 个共用一个 float32 的 scale。
# （QLoRA 用 8 比特浮点；int8 大小相同。）
#
# $$
# 4 + \frac{8}{64} + \frac{32}{64 \cdot 256} = 4.127 \text{ bits}
# $$
#
# 对 70 亿个权重，差别是每个 0.37 比特，共 0.3 GB。
# %%
def double_quantize(scale, group=256):
  """(codes int8, scales of groups, mean) of the scales of blocks."""
  mean = scale.mean()
  flat = (scale - mean).ravel()
  flat = np.pad(flat, (0, -len(flat) % group)).reshape(-1, group)
  second = np.abs(flat).max(axis=1) / 127
  codes = np.rint(flat / second[:, None]).astype(np.int8)
  return codes.ravel()[: scale.size], second.astype(np.float32), mean


def undo(codes, second, mean, shape, group=256):
  return (codes * np.repeat(second, group)[: codes.size]).reshape(shape) + mean


big = np.random.default_rng(0).normal(0, 0.02, (2048, 2048)).astype(np.float32)
codes, scale = quantize(big, LEVELS)
scale_codes, second, mean = double_quantize(scale)
again = undo(scale_codes, second, mean, scale.shape)
code_bytes = codes.size // 2
single = code_bytes + scale.nbytes
double = code_bytes + scale_codes.nbytes + second.nbytes + 4
for label, size in (('single', single), ('double', double)):
  print(f'{label}: {8 * size / big.size:.4f} bits a weight')
assert 8 * single / big.size == 4.5
assert abs(8 * double / big.size - 4.127) < 0.001
plain, twice = (
  np.linalg.norm(dequantize(codes, s, LEVELS) - big) / np.linalg.norm(big)
  for s in (scale, again)
)
print(f'relative error {100 * plain:.3f} % and {100 * twice:.3f} %')
assert twice < 1.01 * plain, 'double quantization should cost next to nothing'
# %%
billions = 7e9
print('7 B weights            GB')
for label, bits in (
  ('float32', 32),
  ('bfloat16', 16),
  ('int8', 8),
  ('NF4', 4.5),
  ('NF4, double', 4 + 8 / 64 + 32 / (64 * 256)),
):
  print(f'{label:14}{billions * bits / 8 / 1e9:10.2f}')
lora = 2 * 32 * 8 * (4096 + 4096)  # r = 8 at q and v of 32 layers
print(f'LoRA with gradients and Adam {lora * 16 / 1e9:.3f} GB')
print(f'full fine-tuning, float32    {billions * 16 / 1e9:.0f} GB')
# %% [markdown] lang="en"
# ## LoRA on a quantized base
#
# $$
# y = x\,\hat W + \tfrac{\alpha}{r} (x A) B, \qquad
# \hat W = \mathrm{dequantize}(\text{codes}, s)
# $$
#
# The codes are whole numbers and have no gradient; they need none. The backward
# pass needs $\hat W$ for $\partial L / \partial x = G \hat W^\top$, so it is
# decoded again (keeping all decoded kernels would undo the saving). The
# arithmetic is in 16 or 32 bits: *storage* is in four bits, *computation* is
# not.
#
# The experiment: a network with two hidden layers learns the digits of
# scikit-learn (8 x 8 pixels, one block of 64 inputs). Then its kernels are
# frozen in several formats, and a LoRA of rank 4 learns to read the digits
# turned by 90 degrees. `ternary` has the three levels $-1, 0, 1$: so coarse
# that the damage shows.
# %% [markdown] lang="zh"
# ## 量化基座上的 LoRA
#
# $$
# y = x\,\hat W + \tfrac{\alpha}{r} (x A) B, \qquad
# \hat W = \mathrm{dequantize}(\text{codes}, s)
# $$
#
# 编码是整数，没有梯度，也不需要。反向计算要用 $\hat W$ 求
# $\partial L / \partial x = G \hat W^\top$，
# 所以要再解码一次（把所有解码后的 kernel 留着就白省了）。算术用 16 或 32 位：
# 四比特的是*存储*，不是*计算*。
#
# 实验：一个有两个隐藏层的网络学习 scikit-learn 的手写数字（8 x 8 像素，
# 正好是一个 64 输入的块）。然后用几种格式冻结它的 kernel，
# 让秩为 4 的 LoRA 学习读旋转 90 度的数字。`ternary` 只有 $-1, 0, 1$ 三个值：
# 粗到能看出损伤。
# %%
digits = load_digits()
images = digits.images.astype(np.float32) / 8 - 1
turned = np.rot90(images, axes=(1, 2))
order = np.random.default_rng(0).permutation(len(images))
train_rows, test_rows = order[:1300], order[1300:]
WIDTHS = (64, 128, 128, 10)


def forward(kernels, lora, x):
  """x [b, 64] -> logits [b, 10]."""
  for i, w in enumerate(kernels):
    y = x @ w
    if lora:
      a, b = lora[i]
      y = y + 2 * (x @ a) @ b  # alpha = 2 r
    x = jax.nn.relu(y) if i < len(kernels) - 1 else y
  return x


def fit(loss, trained, inputs, labels, rate, steps=300):
  optimizer = optax.adam(rate)

  def step(carry, rows):
    trained, state = carry
    value, grads = jax.value_and_grad(loss)(trained, inputs[rows], labels[rows])
    updates, state = optimizer.update(grads, state)
    return (optax.apply_updates(trained, updates), state), value

  rows = np.random.default_rng(1).integers(0, len(inputs), (steps, 128))
  return jax.lax.scan(step, (trained, optimizer.init(trained)), rows)[0][0]


def cross_entropy(logits, labels):
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(kernels, lora, images):
  x = jnp.asarray(images[test_rows].reshape(-1, 64))
  guess = jnp.argmax(forward(kernels, lora, x), -1)
  return float(jnp.mean(guess == digits.target[test_rows]))


# %%
def data(images):
  return (
    jnp.asarray(images[train_rows].reshape(-1, 64)),
    jnp.asarray(digits.target[train_rows]),
  )


keys = jax.random.split(jax.random.key(0), 3)
start = [
  jax.random.normal(k, (i, o)) * (2 / i) ** 0.5
  for k, i, o in zip(keys, WIDTHS, WIDTHS[1:], strict=False)
]
base = jax.jit(
  lambda kernels: fit(
    lambda k, x, y: cross_entropy(forward(k, None, x), y),
    kernels,
    *data(images),
    3e-3,
  )
)(start)
print(
  f'upright {accuracy(base, None, images):.3f}, '
  f'turned {accuracy(base, None, turned):.3f}'
)
assert accuracy(base, None, images) > 0.9 > 0.5 > accuracy(base, None, turned)
# %%
TERNARY = np.array([-1.0, 0.0, 1.0])
FORMATS = {
  'int8': by_int8,
  'NF4': by_levels(LEVELS),
  'int4': by_levels(INT4),
  'ternary': by_levels(TERNARY),
}
bases = {'float32': base}
bases |= {
  name: [jnp.asarray(decode(np.asarray(w))) for w in base]
  for name, decode in FORMATS.items()
}


def init_lora(key, rank=4):
  return [
    (0.1 * jax.random.normal(k, (i, rank)), jnp.zeros((rank, o)))
    for k, i, o in zip(
      jax.random.split(key, 3), WIDTHS, WIDTHS[1:], strict=False
    )
  ]


@jax.jit
def fit_lora(kernels, lora):
  loss = lambda lora, x, y: cross_entropy(forward(kernels, lora, x), y)  # noqa: E731
  return fit(loss, lora, *data(turned), 1e-2)


SEEDS, results = (0, 1, 2), {}
for name, kernels in bases.items():
  before = accuracy(kernels, None, images)
  loras = [fit_lora(kernels, init_lora(jax.random.key(s))) for s in SEEDS]
  after = [accuracy(kernels, lora, turned) for lora in loras]
  results[name] = before, after, loras[0]
  print(
    f'{name:8} upright, no LoRA {before:.3f}; turned, LoRA '
    f'{np.mean(after):.3f} ({min(after):.3f} to {max(after):.3f})'
  )
# %%
names = list(results)
fig, axis = plt.subplots(figsize=(6, 2.5), dpi=72)
axis.bar(
  names,
  [results[n][0] for n in names],
  color='lightsteelblue',
  label='upright, frozen base alone',
)
for i, name in enumerate(names):
  axis.plot(
    [i] * 3,
    results[name][1],
    'ko',
    ms=4,
    label='turned, with LoRA (3 seeds)' if not i else None,
  )
axis.set(ylim=(0, 1.3), ylabel='accuracy')
axis.legend(fontsize=8, loc='upper left', ncols=2)
fig.tight_layout()
exact = np.mean(results['float32'][1])
assert results['NF4'][0] > results['float32'][0] - 0.03, 'NF4 costs little'
assert np.mean(results['NF4'][1]) > exact - 0.03, 'LoRA on NF4 is as good'
assert results['ternary'][0] < results['float32'][0] - 0.02, 'ternary does not'
# %% [markdown] lang="en"
# Here NF4 and int4 cost nearly nothing, before and after: a network that is
# large for its task has room to spare. Do not conclude that the formats are
# equal; the errors above are the more sensitive measure, and large language
# models with outliers in their weights or activations are less forgiving. The
# ternary base shows what LoRA does besides learning the task: it also learns
# around the damage, as it is trained on the base that it will be used with. An
# adapter that was trained beside the exact weights and then moved to the
# quantized ones has not. To see it, evaluate
# `accuracy(bases['ternary'], results['float32'][2], turned)`.
#
# ## Equal to moepeft's layer
#
# In the package a quantized kernel is a pair of arrays in `'params'`, and every
# projection that finds such a pair decodes it. The layer and its gradient for
# $x$ must be those of the decoded kernel.
# %% [markdown] lang="zh"
# 这里 NF4 和 int4 在微调前后都几乎没有损失：网络相对于任务来说很大，有富余。
# 不要由此断定各格式一样好；上面的误差是更灵敏的度量，
# 而权重或激活中有离群值的大语言模型没有这么宽容。
# ternary 的基座显示了 LoRA 在学习任务之外还做了什么：它同时学会绕过损伤，
# 因为它就是在将来要用的基座上训练的。在精确权重旁训练、
# 再搬到量化权重上的 adapter 没有学过这些。可以计算
# `accuracy(bases['ternary'], results['float32'][2], turned)` 来验证。
#
# ## 与 moepeft 的层相等
#
# 在包里，量化的 kernel 是 `'params'` 中的一对数组，
# 每个 projection 发现这样一对就解码。这一层以及它对 $x$ 的梯度，
# 必须与解码后的 kernel 的相同。
# %%
codes, scale = quantization.to_nf4(kernel, 1)
stored = quantization.QuantizedKernel(
  'nf4', jnp.asarray(codes), jnp.asarray(scale), kernel.shape
)
layer = base_projection('btf,fd->btd', stored, jnp.float32)
decoded = jnp.asarray(by_levels(LEVELS)(kernel))
x = jax.random.normal(jax.random.key(1), (2, 3, kernel.shape[0]))
np.testing.assert_allclose(layer(x), x @ decoded, atol=1e-4)
grad = jax.grad(lambda x: jnp.sum(layer(x) ** 2))(x)
expected = jax.grad(lambda x: jnp.sum((x @ decoded) ** 2))(x)
np.testing.assert_allclose(grad, expected, rtol=1e-3, atol=1e-3)
assert stored.codes.nbytes * 2 == kernel.size, 'two weights in a byte'
assert quantization.FORMATS['nf4'].dtype == jnp.uint8
print(
  f'{kernel.nbytes:,} bytes in float32, '
  f'{codes.nbytes + scale.nbytes:,} as codes and scales'
)
# %% [markdown] lang="en"
# ## Merging is not exact
#
# The numbers of $\hat W + \tfrac{\alpha}{r} AB$ are no longer products of a
# scale and one of 16 levels. To keep four bits they have to be quantized again,
# with new scales and a new error, of the size of the first one. If the change
# is smaller than a step, most of it is lost.
# %% [markdown] lang="zh"
# ## 合并并不精确
#
# $\hat W + \tfrac{\alpha}{r} AB$ 的元素不再是 scale 乘以 16 个值之一。
# 要保持四比特，就必须重新量化，得到新的 scale 和新的误差，
# 误差大小与第一次相当。如果改变量小于一个步长，大部分就丢失了。
# %%
a, b = results['NF4'][2][1]
change = np.asarray(2 * a @ b)
frozen = np.asarray(bases['NF4'][1])
lost = {}
for factor in (1, 0.1, 0.01):
  whole = frozen + factor * change
  stored_change = by_levels(LEVELS)(whole) - frozen
  lost[factor] = float(
    np.linalg.norm(stored_change - factor * change)
    / np.linalg.norm(factor * change)
  )
  print(
    f'change times {factor}: error of the merged change '
    f'{100 * lost[factor]:.0f} % of it'
  )
assert lost[1] < min(lost[0.1], lost[0.01]), 'small changes suffer more'
assert lost[0.01] > 0.5


# %% [markdown] lang="en"
# ## Exercises
#
# 1. Larger blocks need fewer scales. For blocks of 16, 64, 256 and 1024 of a
#    matrix of normal numbers (1024 x 64), measure NF4's error and the bits per
#    weight. Then multiply one weight in a thousand by 20. Which block size
#    would you take now?
# 2. Lloyd's algorithm finds levels of least mean square error for given
#    numbers: assign each number to the nearest level, move each level to the
#    mean of its numbers, repeat. Start from NF4 and run it on `normed`, with
#    $-1$, $0$ and $1$ kept fixed. How much smaller is the error of the normed
#    weights, and which way do the levels move?
# 3. LoRA starts at $\hat W$, not at $W$. Choose $A$ and $B$ instead so that
#    $\hat W + AB$ is as near to $W$ as rank $r$ allows (LoftQ,
#    arXiv:2310.08659, first step). Measure the error for $r = 4, 16, 64$ with
#    the ternary base of the middle kernel. Why is the gain small at small
#    ranks?
#
# ## Interview questions
#
# **QLoRA stores weights in four bits. Is training four times faster than with
# 16 bits?**
#
# <details><summary>Answer</summary>
#
# No, it is usually somewhat slower. Each use of a kernel has to decode it
# (look-up and multiplication) before a product in 16 bits, in the forward and
# again in the backward pass. What is saved is memory: a model of 65 B
# parameters fits on one device of 48 GB. In decoding with small batches, which
# is bound by reading weights, four bits can be faster with kernels that decode
# while they multiply.
# </details>
#
# **Why blocks of 64, and why a scale for a block and not for the matrix?**
#
# <details><summary>Answer</summary>
#
# With absmax the step is proportional to the largest value of the group. The
# larger the group, the larger its expected maximum (for $n$ normal numbers with
# standard deviation $\sigma$ about $\sigma \sqrt{2 \ln n}$), and a single
# outlier spoils all others of its group.
# Small groups bound the damage, but each costs a scale: $32/n$ bits a weight,
# and $8/n$ after double quantization, which is why 64 became affordable. It is
# a trade of scale bits against error; exercise 1 measures it.
# </details>
#
# ## In the package
#
# - {{moepeft.nn.quantization.to_nf4}}, {{moepeft.nn.quantization.to_int8}} and
#   {{moepeft.nn.quantization.LEVELS}};
#   {{moepeft.nn.quantization.quantized_kernel}} is how a layer finds that it is
#   quantized: by the names in the tree, without an option of the model.
# - {{moepeft.nn.linear.base_projection}} decodes again in the backward pass, so
#   that decoded kernels are not kept.
# - {{moepeft.checkpoints.quantize.pack}} quantizes the projections of a base
#   one layer at a time, {{moepeft.checkpoints.quantize.unpack}} decodes.
#   Embeddings, norms, biases and the head stay as they are.
#   {{moepeft.peft.merge.merge}} refuses a quantized base.
# - moepeft has no double quantization: its scales are float32, so NF4 takes 4.5
#   bits. `docs/results.md` has what the formats cost on a language model.
# - Papers: QLoRA arXiv:2305.14314, LLM.int8() arXiv:2208.07339, LoftQ
#   arXiv:2310.08659, on NF4's optimality arXiv:2306.06965.
# %% [markdown] lang="zh"
# ## 练习
#
# 1. 块越大，scale 越少。对一个正态随机数矩阵（1024 x 64），取块大小 16、64、
#    256、1024，测量 NF4 的误差和每个权重的比特数。然后把千分之一的权重乘以 20。
#    现在你会选哪个块大小？
# 2. Lloyd 算法对给定的数求均方误差最小的值：把每个数分给最近的值，
#    把每个值移到所分到的数的平均，重复。从 NF4 开始，在 `normed` 上运行，$-1$、
#    $0$、$1$ 保持不动。归一化权重的误差小了多少？各个值往哪边移动？
# 3. LoRA 从 $\hat W$ 出发，而不是从 $W$ 出发。改选 $A$ 和 $B$，
#    使 $\hat W + AB$ 在秩 $r$ 允许的范围内尽量接近 $W$（LoftQ，
#    arXiv:2310.08659，第一步）。用中间那个 kernel 的 ternary 基座，
#    对 $r = 4, 16, 64$ 测量误差。为什么秩小时收益很小？
#
# ## 面试题
#
# **QLoRA 用四比特存权重。训练比 16 比特快四倍吗？**
#
# <details><summary>答案</summary>
#
# 不，通常还稍慢一些。每次使用 kernel 都要先解码（查表和乘法），
# 再做 16 比特的乘积，前向一次，反向又一次。省的是内存：
# 650 亿参数的模型放得进一块 48 GB 的设备。小 batch 的解码受限于读取权重，
# 如果有边解码边相乘的 kernel，四比特可以更快。
# </details>
#
# **为什么块是 64？为什么每块一个 scale，而不是整个矩阵一个？**
#
# <details><summary>答案</summary>
#
# absmax 的步长与组内最大值成正比。组越大，最大值的期望越大（$n$ 个标准差为
# $\sigma$ 的正态随机数约为 $\sigma \sqrt{2 \ln n}$），
# 而且一个离群值会毁掉同组的所有其他值。
# 小组限制了损害的范围，但每组要一个 scale：每个权重 $32/n$ 比特，
# 双重量化后是 $8/n$，64 因此才负担得起。这是 scale 的比特与误差之间的权衡；
# 练习 1 测量它。
# </details>
#
# ## 在 moepeft 中
#
# - {{moepeft.nn.quantization.to_nf4}}、{{moepeft.nn.quantization.to_int8}} 和
#   {{moepeft.nn.quantization.LEVELS}}；
#   {{moepeft.nn.quantization.quantized_kernel}} 说明一层怎样知道自己是量化的：
#   看树里的名字，模型没有这个选项。
# - {{moepeft.nn.linear.base_projection}} 在反向计算时再解码一次，
#   所以不保留解码后的 kernel。
# - {{moepeft.checkpoints.quantize.pack}} 逐层量化基座的 projection，
#   {{moepeft.checkpoints.quantize.unpack}} 解码。embedding、norm、
#   偏置和 head 保持原样。{{moepeft.peft.merge.merge}} 拒绝量化的基座。
# - moepeft 没有双重量化：scale 是 float32，所以 NF4 占 4.5 比特。
#   各格式在语言模型上的代价见 `docs/results.md`。
# - 论文：QLoRA arXiv:2305.14314，LLM.int8() arXiv:2208.07339，
#   LoftQ arXiv:2310.08659，关于 NF4 的最优性 arXiv:2306.06965。
# %% [markdown] lang="en" tags=["solution"]
# # Solutions: QLoRA
#
# ## Exercise 1
# %% [markdown] lang="zh" tags=["solution"]
# # 解答：QLoRA
#
# ## 练习 1
# %% tags=["solution"]
def block_error(kernel, block):
  """NF4's relative error with other blocks."""
  blocks = kernel.reshape(-1, block, kernel.shape[1])
  scale = np.abs(blocks).max(axis=1, keepdims=True)
  middles = (LEVELS[1:] + LEVELS[:-1]) / 2
  decoded = LEVELS[np.searchsorted(middles, blocks / scale)] * scale
  return float(np.linalg.norm(decoded - blocks) / np.linalg.norm(blocks))


rng = np.random.default_rng(0)
normal = rng.normal(size=(1024, 64)).astype(np.float32)
outliers = np.where(rng.random(normal.shape) < 1e-3, 20 * normal, normal)
ordinary = {}
for block in (16, 64, 256, 1024):
  ordinary[block] = block_error(normal, block), block_error(outliers, block)
  print(
    f'blocks of {block:4}: {4 + 32 / block:.3f} bits, error '
    f'{100 * ordinary[block][0]:.1f} %, with outliers '
    f'{100 * ordinary[block][1]:.1f} %'
  )
assert ordinary[16][0] < ordinary[64][0] < ordinary[1024][0]
assert ordinary[1024][1] > 2 * ordinary[16][1], 'outliers spoil large blocks'


# %% [markdown] lang="en" tags=["solution"]
# With outliers the error of large blocks grows much more, since one large value
# makes the steps of its whole block coarse; a smaller block is then worth its
# bits.
# %% [markdown] lang="zh" tags=["solution"]
# 有离群值时，大块的误差增加得多得多，因为一个大值会让整块的步长变粗；
# 这时小块值得多花的比特。
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 2
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 2
# %% tags=["solution"]
def lloyd(numbers, levels, rounds=40):
  levels = levels.astype(np.float64).copy()
  fixed = np.isin(levels, (-1, 0, 1))
  for _ in range(rounds):
    codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, numbers)
    counts = np.bincount(codes, minlength=16)
    means = np.bincount(codes, numbers, 16) / np.maximum(counts, 1)
    levels = np.where(fixed | (counts == 0), levels, means)
  return levels


def mean_square(numbers, levels):
  codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, numbers)
  return float(np.mean((levels[codes] - numbers) ** 2))


better = lloyd(normed, LEVELS)
gain = 1 - mean_square(normed, better) / mean_square(normed, LEVELS)
print(f'mean square error {100 * gain:.1f} % smaller')
print('NF4  ', np.round(LEVELS[8:], 3))
print('Lloyd', np.round(better[8:], 3))
assert 0 < gain < 0.6
# %% [markdown] lang="en" tags=["solution"]
# The levels move away from zero, except for the fixed ones: NF4 is dense where
# the weights are, and the square error gives more weight to the wide gaps
# further out. The error that counts in a kernel is weighted by the squared
# scale of each block, so the gain on the kernel is another number; and levels
# that are fitted to one model's weights are no longer a format.
# %% [markdown] lang="zh" tags=["solution"]
# 除了固定的几个，各个值都远离零点移动：NF4 在权重多的地方很密，
# 而平方误差更看重外侧的宽间隔。在 kernel 上真正算数的误差要按每块 scale
# 的平方加权，
# 所以 kernel 上的收益是另一个数字；而且拟合到某个模型权重的值，
# 也就不再是一种通用格式了。
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 3
#
# The best approximation of rank $r$ of $W - \hat W$ is its truncated SVD.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 3
#
# $W - \hat W$ 的秩 $r$ 最佳近似就是截断的 SVD。
# %% tags=["solution"]
whole = np.asarray(base[1])
coarse = np.asarray(bases['ternary'][1])
u, s, vt = np.linalg.svd(whole - coarse)
last = start_error = np.linalg.norm(whole - coarse)
for rank in (4, 16, 64):
  a, b = u[:, :rank] * s[:rank], vt[:rank]
  error = np.linalg.norm(whole - coarse - a @ b)
  print(
    f'rank {rank:2}: {100 * error / start_error:.0f} % of the error is left'
  )
  assert error < last
  np.testing.assert_allclose(error, np.sqrt(np.sum(s[rank:] ** 2)), rtol=1e-3)
  last = error
# %% [markdown] lang="en" tags=["solution"]
# A rounding error is nearly noise: its singular values fall slowly, so a few
# directions hold a small share of it.
# %% [markdown] lang="zh" tags=["solution"]
# 舍入误差接近噪声：奇异值下降缓慢，所以少数几个方向只占一小部分。

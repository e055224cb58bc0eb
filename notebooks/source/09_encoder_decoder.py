# SPDX-License-Identifier: Apache-2.0
# %% [markdown] lang="en"
# # Encoder and decoder: T5 by hand
#
# The original Transformer has two stacks: an encoder reads the input, a decoder
# writes the output and looks at the encoder's states through cross-attention.
# T5 is that architecture. You write its forward pass in JAX, load the weights
# of the T5 that ships with the package and get its logits, then train the same
# functions from random weights to sort digits.
# %% [markdown] lang="zh"
# # Encoder 与 decoder：手写 T5
#
# 最初的 Transformer 有两个部分：encoder 读输入，decoder 写输出，并通过
# cross-attention 查看 encoder 的状态。T5 就是这种结构。本篇用 JAX
# 写出它的前向计算，装入 moepeft 自带的 T5 权重，得到同样的 logits；
# 再用同样的函数从随机权重开始，训练它给数字排序。
# %% [markdown] lang="en"
# ## What you will understand
#
# - what each of the three attentions of an encoder-decoder reads, and with
#   which mask;
# - T5's particulars: relative position bias, unscaled logits, RMSNorm, gated
#   GELU;
# - teacher forcing: why training needs one forward pass for all target
#   positions, and generation one for each;
# - padding and the loss mask, and how to test that padding changes nothing;
# - exact match and token accuracy, and why the first is lower.
#
# Time: 60 minutes to read, about one minute to run. Before this: notebooks 06,
# 07 and 08.
# %% [markdown] lang="zh"
# ## 你将理解什么
#
# - encoder-decoder 的三种 attention 各读什么，用什么 mask；
# - T5 的特点：相对位置 bias、不缩放的 logits、RMSNorm、带门控的 GELU；
# - teacher forcing：为什么训练时一次前向就算出所有目标位置，
#   而生成时每个位置要一次；
# - padding 与 loss mask，以及怎样检验 padding 没有影响；
# - exact match 与 token 准确率，以及前者为什么更低。
#
# 用时：阅读约 60 分钟，运行约一分钟。前置：06、07、08。
# %%
import dataclasses
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.open_adapter import resolve
from moepeft.models.t5.model import T5
from moepeft.nn import initializers, positions


# %% [markdown] lang="en"
# ## 1. Three attentions, one function
#
# An attention reads queries from one sequence and keys and values from another:
#
# | attention | queries from | keys, values from | mask |
# | --- | --- | --- | --- |
# | encoder self | encoder, $s$ | encoder, $s$ | padding |
# | decoder self | decoder, $t$ | decoder, $t$ | causal |
# | cross | decoder, $t$ | encoder output, $s$ | padding of the input |
#
# With logits of shape $[t, s]$ the function is the same for all three.
# Cross-attention has no causal mask: the input is known completely before the
# first output token.
#
# T5's logits are $q \cdot k + \text{bias}$ without $1/\sqrt h$: the factor is
# part of the initialization of $q$. The bias, one number for each head and
# bucket of distance, is the only position information; all layers of a stack
# share it, and cross-attention has none.
# %% [markdown] lang="zh"
# ## 1. 三种 attention，一个函数
#
# Attention 从一个序列读 query，从另一个序列读 key 和 value：
#
# | attention | query 来自 | key、value 来自 | mask |
# | --- | --- | --- | --- |
# | encoder self | encoder，$s$ | encoder，$s$ | padding |
# | decoder self | decoder，$t$ | decoder，$t$ | causal |
# | cross | decoder，$t$ | encoder 的输出，$s$ | 输入的 padding |
#
# logits 的形状为 $[t, s]$，三者可用同一个函数。Cross-attention 没有 causal
# mask：在第一个输出 token 之前，输入已全部已知。
#
# T5 的 logits 是 $q \cdot k + \text{bias}$，没有 $1/\sqrt h$：这个因子包含在
# $q$ 的初始化里。bias 对每个 head、每个距离桶是一个数，它是唯一的位置信息；
# encoder 的各层共用一组，decoder 的各层共用另一组，cross-attention 没有。
# %%
def rms_norm(x, p, eps):
  x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps)
  return x * p['scale']


def attend(x, source, p, mask, bias=0.0):
  """x [b, t, d], source [b, s, d] -> ([b, t, d], weights [b, n, t, s])."""
  q = jnp.einsum('btd,dnh->btnh', x, p['q']['kernel'])
  k = jnp.einsum('bsd,dnh->bsnh', source, p['k']['kernel'])
  v = jnp.einsum('bsd,dnh->bsnh', source, p['v']['kernel'])
  logits = jnp.einsum('btnh,bsnh->bnts', q, k) + bias
  weights = jax.nn.softmax(jnp.where(mask, logits, -1e9))
  y = jnp.einsum('bnts,bsnh->btnh', weights, v)
  return jnp.einsum('btnh,nhd->btd', y, p['o']['kernel']), weights


def feed_forward(x, p):
  gate = jax.nn.gelu(x @ p['wi_0']['kernel'])
  return (gate * (x @ p['wi_1']['kernel'])) @ p['wo']['kernel']


# %% [markdown] lang="en"
# The bucket of a distance (notebook 07): half of the buckets hold one distance
# each, the other half grow logarithmically up to `max_distance`. In the
# encoder, keys after the query have buckets of their own; in the decoder there
# are none.
# %% [markdown] lang="zh"
# 距离所属的桶（07）：一半的桶各对应一个距离，另一半按对数增长到
# `max_distance`。encoder 中，位于 query 之后的 key 有自己的桶；decoder
# 中没有这样的 key。
# %%
def bucket(distance, bidirectional, buckets, largest):
  """distance int [t, s], query minus key -> int [t, s]."""
  if bidirectional:
    half = buckets // 2
    ahead = bucket(-distance, False, half, largest) + half
    return np.where(distance < 0, ahead, bucket(distance, False, half, largest))
  distance = np.maximum(distance, 0)
  exact = buckets // 2
  ratio = np.log(np.maximum(distance, 1) / exact) / np.log(largest / exact)
  far = np.minimum(exact + (ratio * (buckets - exact)).astype(int), buckets - 1)
  return np.where(distance < exact, distance, far)


def position_bias(table, t, bidirectional, config):
  """table [buckets, n] -> [1, n, t, t]."""
  distance = np.arange(t)[:, None] - np.arange(t)
  index = bucket(distance, bidirectional, config.buckets, config.max_distance)
  return table['embedding'][index].transpose(2, 0, 1)[None]


distance = np.arange(40)[:, None] - np.arange(40)
for side in (True, False):
  expected = positions.relative_bucket(-distance, 32, 128, side)
  assert np.array_equal(bucket(distance, side, 32, 128), expected), side


# %% [markdown] lang="en"
# ## 2. The two stacks
#
# Blocks are pre-norm (notebook 08). A layer of the encoder has two sublayers,
# one of the decoder has three: self-attention, cross-attention, feed-forward.
# Parameters of all layers are stacked on the first axis, as in the package.
# `real` is True on tokens of the input and False on padding.
# %% [markdown] lang="zh"
# ## 2. Encoder 与 decoder 的各层
#
# block 是 pre-norm（08）。encoder 的一层有两个子层，decoder 的一层有三个：
# self-attention、cross-attention、feed-forward。所有层的参数堆叠在第一个轴上，
# 与 moepeft 相同。`real` 在输入的 token 处为 True，在 padding 处为 False。
# %%
def layers(stack):
  count = len(jax.tree.leaves(stack['layers'])[0])
  return [
    jax.tree.map(lambda a, i=i: a[i], stack['layers']) for i in range(count)
  ]


def encode(params, ids, real, config):
  """ids int, real bool [b, s] -> states [b, s, d]."""
  norm = functools.partial(rms_norm, eps=config.eps)
  x, stack = params['embed']['embedding'][ids], params['encoder']
  bias = position_bias(stack['relpos'], ids.shape[1], True, config)
  mask = real[:, None, None, :]
  for p in layers(stack):
    y = norm(x, p['self']['norm'])
    x = x + attend(y, y, p['self'], mask, bias)[0]
    x = x + feed_forward(norm(x, p['mlp']['norm']), p['mlp'])
  return norm(x, stack['norm'])


def decode(params, ids, encoded, real, config):
  """ids int [b, t] -> (logits [b, t, v], cross-attention weights by layer)."""
  norm = functools.partial(rms_norm, eps=config.eps)
  x, stack = params['embed']['embedding'][ids], params['decoder']
  t = ids.shape[1]
  bias = position_bias(stack['relpos'], t, False, config)
  causal = jnp.tril(jnp.ones((t, t), bool))[None, None]
  cross_weights = []
  for p in layers(stack):
    y = norm(x, p['self']['norm'])
    x = x + attend(y, y, p['self'], causal, bias)[0]
    y = norm(x, p['cross']['norm'])
    y, weights = attend(y, encoded, p['cross'], real[:, None, None, :])
    x = x + y
    x = x + feed_forward(norm(x, p['mlp']['norm']), p['mlp'])
    cross_weights.append(weights)
  return norm(x, stack['norm']) @ params['head']['kernel'], cross_weights


# %% [markdown] lang="en"
# ## 3. The package's T5
#
# `package:t5_tiny` is a T5 1.1 of three encoder and two decoder layers,
# pretrained on the package's own tasks. Its weights go into the functions
# above, with inputs of different lengths in one batch. Logits are of size 10 to
# 20, so float32 leaves about $10^{-5}$; without the mask of padding they change
# by more than $0.1$.
# %% [markdown] lang="zh"
# ## 3. moepeft 的 T5
#
# `package:t5_tiny` 是三层 encoder、两层 decoder 的 T5 1.1，在 moepeft
# 自己的任务上预训练。把它的权重放进上面的函数，一个 batch 里有不同长度的输入。
# logits 大小在 10 到 20 之间，float32 的误差约 $10^{-5}$；去掉 padding 的
# mask，差异会超过 $0.1$。
# %%
tiny = hf.load(resolve('package:t5_tiny'), 'float32')
print(tiny.config)
rng = np.random.default_rng(0)
lengths = np.array([23, 9, 15])
real = np.arange(23) < lengths[:, None]
inputs = np.where(real, rng.integers(3, 250, real.shape), 0)
decoder_inputs = rng.integers(3, 250, (3, 12))
decoder_inputs[:, 0] = 0

encoded = encode(tiny.params, inputs, real, tiny.config)
logits, _ = decode(tiny.params, decoder_inputs, encoded, real, tiny.config)
batch = {
  'inputs': jnp.array(inputs),
  'inputs_mask': jnp.array(real),
  'decoder_inputs': jnp.array(decoder_inputs),
}
expected = jax.jit(T5(tiny.config).apply)({'params': tiny.params}, batch)
difference = np.abs(logits - expected).max()
print('logits up to', np.abs(expected).max(), 'largest difference', difference)
assert difference < 1e-3, 'compare the encoder first, then one decoder layer'
unmasked = encode(tiny.params, inputs, np.ones_like(real), tiny.config)
wrong, _ = decode(tiny.params, decoder_inputs, unmasked, real, tiny.config)
print('without the mask of padding:', np.abs(wrong - expected).max())
assert np.abs(wrong - expected).max() > 0.1
# %% [markdown] lang="en"
# ## 4. A task: sorting digits
#
# Inputs are 3 to 7 random digits, targets the same digits sorted, with
# repetitions: `5 2 2 9` gives `2 2 5 9`. Every output depends on the whole
# input and on how many digits are already written. Ids: 0 is padding and also
# the decoder's start token (as in T5), 1 ends a sequence, and the id of a digit
# is the digit plus 2.
# %% [markdown] lang="zh"
# ## 4. 任务：数字排序
#
# 输入是 3 到 7 个随机数字，目标是排好序的同样的数字，可以重复：`5 2 2 9` 得
# `2 2 5 9`。每个输出都依赖全部输入，也依赖已写出多少个数字。id：0 是 padding，
# 也是 decoder 的起始 token（与 T5 相同），1 表示结束，数字的 id 是数字加 2。
# %%
START = PAD = 0
END, FIRST, LONGEST = 1, 2, 7


def make_batch(rng, rows):
  """(inputs, targets), int [rows, LONGEST + 1], padded."""
  lengths = rng.integers(3, LONGEST + 1, (rows, 1))
  place = np.arange(LONGEST + 1)
  digits = rng.integers(0, 10, (rows, LONGEST + 1))
  # Places after the end sort behind all digits.
  ordered = np.sort(np.where(place < lengths, digits, 99), axis=1)

  def finish(digits):
    tail = np.where(place == lengths, END, PAD)
    return np.where(place < lengths, digits + FIRST, tail)

  return finish(digits), finish(ordered)


examples = make_batch(rng, 3)
for source, target in zip(*examples, strict=True):
  print(source, '->', target)
# %% [markdown] lang="en"
# ## 5. Teacher forcing and the loss mask
#
# The decoder at position $i$ predicts target $i$ and reads targets
# $0 \ldots i - 1$: its inputs are the targets shifted right by one, with the
# start token in front. In training these are the *true* earlier tokens,
# whatever the model would have written: *teacher forcing*. With the causal
# mask, one forward pass gives all predictions. In generation the inputs are the
# model's own tokens, one after the other.
#
# Rows have different lengths, so the loss is a sum over real target tokens
# divided by their number: $\sum_{b,i} w_{bi} (-\ln p_{bi}) / \sum_{b,i} w_{bi}$
# where $p_{bi}$ is the model's probability of target $i$ of row $b$, $w = 1$ on
# real tokens, the end token included, and $w = 0$ on padding. Without the end
# token the model could never learn to stop. Before training the loss should be
# near $\ln V$, that of a uniform guess among $V$ tokens.
# %% [markdown] lang="zh"
# ## 5. Teacher forcing 与 loss mask
#
# decoder 在位置 $i$ 预测第 $i$ 个目标，读到的是目标 $0 \ldots i - 1$：
# 输入是目标右移一位，前面加上起始 token。训练时这些是*真实的*前面的 token，
# 不管模型自己会写什么，这叫 *teacher forcing*。有 causal mask，
# 一次前向就得到全部预测。生成时，输入是模型自己写的 token，一个接一个。
#
# 各行长度不同，所以 loss 是对真实目标 token 求和，再除以它们的个数：
# $\sum_{b,i} w_{bi} (-\ln p_{bi}) / \sum_{b,i} w_{bi}$，其中 $p_{bi}$
# 是模型给第 $b$ 行第 $i$ 个目标的概率，真实 token（包括结束 token）处 $w = 1$，
# padding 处 $w = 0$。不包括结束 token，模型就学不会停下来。训练前的 loss 应接近
# $\ln V$，即在 $V$ 个 token 中均匀猜测的 loss。
# %%
config = dataclasses.replace(
  tiny.config,
  vocab=FIRST + 10,
  d_model=48,
  heads=4,
  head_dim=12,
  ffn=96,
  encoder_layers=1,
  decoder_layers=2,
)


def shift_right(targets):
  return np.pad(targets, ((0, 0), (1, 0)), constant_values=START)[:, :-1]


def loss_and_hits(params, inputs, decoder_inputs, targets):
  """(mean loss of real tokens, hits bool [b, t] with True on padding)."""
  real = inputs != PAD
  encoded = encode(params, inputs, real, config)
  logits, _ = decode(params, decoder_inputs, encoded, real, config)
  logp = jax.nn.log_softmax(logits)
  picked = jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
  weights = targets != PAD
  hits = (logits.argmax(-1) == targets) | ~weights
  return -(picked * weights).sum() / weights.sum(), hits


model = T5(config)
example = {
  key: jnp.zeros((1, 2), jnp.int32) for key in ('inputs', 'decoder_inputs')
}
params = initializers.init_params(model, example, 0)['params']
params = jax.tree.map(jnp.asarray, params)
loss, _ = loss_and_hits(
  params, examples[0], shift_right(examples[1]), examples[1]
)
print('loss before training', float(loss), 'ln V', np.log(config.vocab))
# %% [markdown] lang="en"
# A test of masks that does not depend on the task: more padding, and *other
# numbers* on the decoder's padding, must not change the loss.
# %% [markdown] lang="zh"
# 检验 mask，与任务无关：再加一些 padding，并在 decoder 的 padding
# 处放*别的数*，loss 都不应改变。
# %%
wider = [np.pad(a, ((0, 0), (0, 5))) for a in examples]
noisy = shift_right(wider[1])
after_end = np.cumsum(wider[1] == END, 1) - (wider[1] == END) > 0
noisy[after_end] = rng.integers(FIRST, config.vocab, after_end.sum())
padded_loss, _ = loss_and_hits(params, wider[0], noisy, wider[1])
assert abs(padded_loss - loss) < 1e-5, 'padding reaches the loss'
unmasked = np.where(wider[1] == PAD, FIRST, wider[1])
wrong, _ = loss_and_hits(params, wider[0], noisy, unmasked)
print('loss', float(padded_loss), 'with padding as targets', float(wrong))
# %% [markdown] lang="en"
# ## 6. Training
#
# 700 steps of Adam, each with 64 new random rows: there is no fixed training
# set. The plots are means over 20 steps; a row is without an error if all its
# tokens are right under teacher forcing.
# %% [markdown] lang="zh"
# ## 6. 训练
#
# 用 Adam 训练 700 步，每步 64 行新的随机数据，没有固定的训练集。图中是每 20
# 步的平均；在 teacher forcing 下所有 token 都对，这一行才算没有错误。
# %%
STEPS, ROWS = 700, 64
optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, STEPS))


@jax.jit
def step(params, state, *batch):
  (loss, hits), gradient = jax.value_and_grad(loss_and_hits, has_aux=True)(
    params, *batch
  )
  updates, state = optimizer.update(gradient, state, params)
  return optax.apply_updates(params, updates), state, loss, hits.all(1).mean()


state, history = optimizer.init(params), []
for _ in range(STEPS):
  inputs, targets = make_batch(rng, ROWS)
  params, state, loss, exact = step(
    params, state, inputs, shift_right(targets), targets
  )
  history.append((float(loss), float(exact)))
curves = np.array(history)
smooth = curves.reshape(-1, 20, 2).mean(1)
figure, axes = plt.subplots(1, 2, figsize=(7, 2.5))
for axis, values, title in zip(
  axes, smooth.T, ('loss, nats a token', 'rows without an error'), strict=True
):
  axis.plot(np.arange(len(values)) * 20, values)
  axis.set(title=title, xlabel='step')
figure.tight_layout()
plt.show()


# %% [markdown] lang="en"
# ## 7. Generation, and exact match
#
# Greedy decoding: start with the start token, append the most probable token,
# stop at the end token. The encoder runs once. (The decoder is computed again
# from the beginning at each step; exercise 3 gives it a cache.)
#
# A row counts only if all of it is right. If each of $n$ tokens were right with
# probability $a$ independently, exact match would be $a^n$: with $a = 0.99$ and
# $n = 8$, 92 %. Teacher forcing hides this, since it corrects the model after
# every token.
# %% [markdown] lang="zh"
# ## 7. 生成与 exact match
#
# 贪心解码：从起始 token 开始，接上概率最大的 token，遇到结束 token 停止。
# encoder 只运行一次。（这里 decoder 每一步都从头计算；练习 3 给它加上 cache。）
#
# 一行要全对才算对。如果 $n$ 个 token 各自以概率 $a$ 独立地正确，exact match
# 就是 $a^n$：$a = 0.99$、$n = 8$ 时为 92 %。Teacher forcing 会掩盖这一点，
# 因为它在每个 token 之后都替模型改正。
# %%
@jax.jit
def next_token(params, ids, encoded, real, i):
  logits, _ = decode(params, ids, encoded, real, config)
  return logits[:, i].argmax(-1)


def generate(params, inputs):
  """int [b, s] -> int [b, s], padded after the end token."""
  real = inputs != PAD
  encoded = encode(params, inputs, real, config)
  ids = np.full((len(inputs), inputs.shape[1] + 1), START)
  done = np.zeros(len(inputs), bool)
  for i in range(inputs.shape[1]):
    token = np.asarray(next_token(params, ids, encoded, real, i))
    ids[:, i + 1] = np.where(done, PAD, token)
    done |= token == END
  return ids[:, 1:]


test_inputs, test_targets = make_batch(np.random.default_rng(12345), 500)
answers = generate(params, test_inputs)
exact = (answers == test_targets).all(1).mean()
_, hits = loss_and_hits(
  params, test_inputs, shift_right(test_targets), test_targets
)
tokens = np.asarray(hits)[test_targets != PAD].mean()
print(
  f'token accuracy with teacher forcing {tokens:.4f}, exact match {exact:.4f}'
)
for i in range(3):
  print(test_inputs[i], '->', answers[i])
assert exact > 0.97, 'train longer; below 0.5 look at the masks'
# %% [markdown] lang="en"
# Are these inputs new? There are $10^3 + \ldots + 10^7$ inputs; training saw
# fewer than 45,000, so most test rows of 5 digits and more were never seen. And
# the package's T5 with the trained weights gives the same logits as our
# functions:
# %% [markdown] lang="zh"
# 这些输入是新的吗？共有 $10^3 + \ldots + 10^7$ 种输入，训练只见过不到 45,000
# 个，因此 5 位及以上的测试输入大多没见过。另外，moepeft 的 T5
# 装入训练好的权重，与我们的函数给出同样的 logits：
# %%
real = test_inputs != PAD
encoded = encode(params, test_inputs, real, config)
logits, weights = decode(
  params, shift_right(test_targets), encoded, real, config
)
batch = {
  'inputs': jnp.array(test_inputs),
  'inputs_mask': jnp.array(real),
  'decoder_inputs': jnp.array(shift_right(test_targets)),
}
expected = jax.jit(model.apply)({'params': params}, batch)
difference = np.abs(logits - expected).max()
print('logits up to', np.abs(expected).max(), 'largest difference', difference)
assert difference < 1e-3


# %% [markdown] lang="en"
# What does cross-attention read when a digit is written? The picture has the
# weights of one test row, the mean of the heads of the last layer: rows are
# what is written, columns the input; the darker, the larger the weight. For
# most digits the darkest columns are those of the same digit. This is one row
# of one trained model, an illustration and not a proof.
# %% [markdown] lang="zh"
# 写出一个数字时，cross-attention 在读什么？图中是一个测试样本的权重，
# 取最后一层各 head 的平均：行是写出的 token，列是输入，颜色越深权重越大。
# 对多数数字，颜色最深的列正是相同的数字。这只是一个模型的一个样本，用作示意，
# 不是证明。
# %%
def tick_labels(ids):
  return ['end' if i == END else str(i - FIRST) for i in ids]


row = int(np.argmax((test_targets != PAD).sum(1)))
size = int(real[row].sum())
plt.figure(figsize=(3.6, 3))
plt.imshow(np.asarray(weights[-1][row]).mean(0)[:size, :size], cmap='Blues')
plt.xticks(range(size), tick_labels(test_inputs[row][:size]))
plt.yticks(range(size), tick_labels(test_targets[row][:size]))
plt.xlabel('input')
plt.ylabel('written')
plt.tight_layout()
plt.show()
# %% [markdown] lang="en"
# ## Exercises
#
# 1. (Easy) Count the parameters of this T5 with a formula ($V, d, n, h, f$,
#    layers, 32 buckets), and compare with the arrays. What share is
#    cross-attention?
# 2. (Medium) *Label smoothing* replaces the target distribution by
#    $(1 - \epsilon)$ on the target and $\epsilon / V$ everywhere. Write the
#    loss of one batch with it, masked, and compare with `optax.smooth_labels`.
# 3. (Hard) Write `step_with_cache`: one decoder token $[b, 1]$, the keys and
#    values of earlier tokens from a cache, those of the encoder's states
#    computed once. Show that the logits are those of `decode`.
# %% [markdown] lang="zh"
# ## 练习
#
# 1. （易）用公式（$V, d, n, h, f$、层数、32 个桶）计算这个 T5 的参数量，
#    与数组比较。cross-attention 占多大比例？
# 2. （中）*Label smoothing* 把目标分布换成：目标上 $(1 - \epsilon)$，所有 token
#    上再加 $\epsilon / V$。写出一个 batch 的带 mask 的 loss，与
#    `optax.smooth_labels` 比较。
# 3. （难）写出 `step_with_cache`：一个 decoder token $[b, 1]$，之前 token 的
#    key 和 value 来自 cache，encoder 状态的 key 和 value 只算一次。验证 logits
#    与 `decode` 相同。
# %% [markdown] lang="en"
# ## Interview questions
#
# **What is exposure bias?**
#
# <details><summary>Answer</summary>
#
# Teacher forcing trains the model on true prefixes only; in generation it reads
# its own, with its own errors, and such prefixes were never in training. Errors
# can then pile up. Remedies: scheduled sampling, training on the model's own
# samples (reinforcement learning, on-policy distillation), or a model so good
# that errors are rare. Its effect is visible as the gap between token accuracy
# with teacher forcing and exact match of generated rows.
#
# </details>
#
# **When would you take an encoder-decoder instead of a decoder-only model?**
#
# <details><summary>Answer</summary>
#
# The input is read with bidirectional attention, once, and the decoder may be
# small: good for translation, summarization and classification with long fixed
# inputs and short outputs. Decoder-only models use one stack for all text,
# every token trains the model, chats append to one sequence whose KV cache is
# reused, and pretraining is simpler. For the same parameters an encoder-decoder
# does about half of the arithmetic a token, because a token passes one of the
# two stacks.
#
# </details>
# %% [markdown] lang="zh"
# ## 面试题
#
# **什么是 exposure bias？**
#
# <details><summary>答案</summary>
#
# Teacher forcing 只用真实前缀训练；生成时模型读到的是自己写的、
# 带有自己错误的前缀，训练中从未见过，错误会累积。对策：scheduled sampling，
# 用模型自己的样本训练（强化学习、on-policy 蒸馏），或者模型足够好，错误很少。
# teacher forcing 的 token 准确率与生成的 exact match
# 之间的差距就反映了它的影响。
#
# </details>
#
# **什么时候用 encoder-decoder，而不用 decoder-only？**
#
# <details><summary>答案</summary>
#
# 输入用双向 attention 一次读完，decoder 可以很小：适合输入长而固定、
# 输出短的翻译、摘要、分类。decoder-only 用同一组层处理所有文本，每个 token
# 都参与训练，对话只需在一个序列后追加并复用 KV cache，预训练也更简单。
# 参数量相同时，encoder-decoder 每个 token 的计算量约为一半，因为一个 token
# 只经过 encoder 和 decoder 之一。
#
# </details>
# %% [markdown] lang="en"
# ## In the package
#
# - {{moepeft.models.t5.model.T5}} with {{moepeft.models.t5.model.T5Block}}: the
#   same computation with sites for adapters, scanned layers, dropout and packed
#   rows (several examples in a row, kept apart by segment ids in
#   {{moepeft.nn.attention.attention_mask}}).
# - {{moepeft.nn.attention.Attention}} has both caches: one that grows for
#   self-attention, and one written once for cross-attention.
# - {{moepeft.data.batching.seq2seq}} makes targets, shifted inputs and masks;
#   {{moepeft.objectives.seq2seq}} is the loss, as sums over tokens.
# - {{moepeft.models.t5.weights.hf_rules}} maps every array to its name in
#   Hugging Face's files.
#
# Papers: Transformer arXiv:1706.03762, T5 1910.10683, label smoothing
# 1512.00567.
# %% [markdown] lang="zh"
# ## 在 moepeft 中
#
# - {{moepeft.models.t5.model.T5}} 与 {{moepeft.models.t5.model.T5Block}}：
#   同样的计算，另有 adapter 的 site、scan 的层、dropout 和 packed
#   行（一行放多个样本，用 {{moepeft.nn.attention.attention_mask}} 的 segment id
#   隔开）。
# - {{moepeft.nn.attention.Attention}} 有两种 cache：self-attention 的逐步增长，
#   cross-attention 的只写一次。
# - {{moepeft.data.batching.seq2seq}} 生成目标、右移的输入和 mask；
#   {{moepeft.objectives.seq2seq}} 是 loss，返回对 token 的和。
# - {{moepeft.models.t5.weights.hf_rules}} 把每个数组对应到 Hugging Face
#   文件中的名字。
#
# 论文：Transformer arXiv:1706.03762，T5 1910.10683，label smoothing
# 1512.00567。
# %% [markdown] lang="en" tags=["solution"]
# # Solutions: encoder and decoder
# %% [markdown] lang="zh" tags=["solution"]
# # 解答：encoder 与 decoder
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 1
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 1
# %% tags=["solution"]
d, width, f = config.d_model, config.heads * config.head_dim, config.ffn
one_attention, mlp = 4 * d * width + d, 3 * d * f + d
encoder_size = config.encoder_layers * (one_attention + mlp)
decoder_size = config.decoder_layers * (2 * one_attention + mlp)
# For each stack: the position bias and the last norm.
total = 2 * config.vocab * d + encoder_size + decoder_size
total += 2 * (config.buckets * config.heads + d)
assert total == sum(a.size for a in jax.tree.leaves(params))
print(total, 'cross-attention', config.decoder_layers * one_attention / total)


# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 2
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 2
# %% tags=["solution"]
def smoothed_loss(logits, targets, epsilon):
  logp = jax.nn.log_softmax(logits)
  picked = jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
  each = -(1 - epsilon) * picked - epsilon * logp.mean(-1)
  weights = targets != PAD
  return (each * weights).sum() / weights.sum()


labels = optax.smooth_labels(jax.nn.one_hot(test_targets, config.vocab), 0.1)
each = optax.softmax_cross_entropy(logits, labels)
weights_of_tokens = test_targets != PAD
expected = (each * weights_of_tokens).sum() / weights_of_tokens.sum()
mine = smoothed_loss(logits, test_targets, 0.1)
assert abs(mine - expected) < 1e-4, (mine, expected)
assert mine > smoothed_loss(logits, test_targets, 0.0) + 0.1


# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 3
#
# The cache of a layer is (k, v) of self-attention, which grows, and (k, v) of
# the encoder, which does not. The row of the position bias for the new token is
# the last row of the square one.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 3
#
# 一层的 cache 是 self-attention 的 (k, v)（会增长）和 encoder 的 (k,
# v)（不变）。新 token 的位置 bias 是方阵 bias 的最后一行。
# %% tags=["solution"]
def project(x, p, names):
  return [jnp.einsum('btd,dnh->btnh', x, p[a]['kernel']) for a in names]


def read(q, k, v, p, mask, bias=0.0):
  logits = jnp.einsum('btnh,bsnh->bnts', q, k) + bias
  weights = jax.nn.softmax(jnp.where(mask, logits, -1e9))
  y = jnp.einsum('bnts,bsnh->btnh', weights, v)
  return jnp.einsum('btnh,nhd->btd', y, p['o']['kernel'])


def first_cache(params, encoded):
  empty = jnp.zeros((len(encoded), 0, config.heads, config.head_dim))
  return [
    ([empty, empty], project(encoded, p['cross'], 'kv'))
    for p in layers(params['decoder'])
  ]


def step_with_cache(params, ids, cache, real):
  """ids [b, 1] -> (logits [b, 1, v], the longer cache)."""
  norm = functools.partial(rms_norm, eps=config.eps)
  x, stack, new_cache = params['embed']['embedding'][ids], params['decoder'], []
  t = cache[0][0][0].shape[1] + 1
  bias = position_bias(stack['relpos'], t, False, config)[:, :, -1:]
  for p, (old, cross) in zip(layers(stack), cache, strict=True):
    q, *new = project(norm(x, p['self']['norm']), p['self'], 'qkv')
    pairs = zip(old, new, strict=True)
    kv = [jnp.concatenate(pair, axis=1) for pair in pairs]
    x = x + read(q, *kv, p['self'], True, bias)
    (q,) = project(norm(x, p['cross']['norm']), p['cross'], 'q')
    x = x + read(q, *cross, p['cross'], real[:, None, None, :])
    x = x + feed_forward(norm(x, p['mlp']['norm']), p['mlp'])
    new_cache.append((kv, cross))
  return norm(x, stack['norm']) @ params['head']['kernel'], new_cache


cache, steps = first_cache(params, encoded[:8]), []
shifted = shift_right(test_targets[:8])
for i in range(shifted.shape[1]):
  one, cache = step_with_cache(params, shifted[:, i : i + 1], cache, real[:8])
  steps.append(one)
difference = np.abs(np.concatenate(steps, axis=1) - logits[:8]).max()
print('largest difference', difference)
assert difference < 1e-3

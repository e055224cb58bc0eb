# SPDX-License-Identifier: Apache-2.0
# %% [markdown] lang="en"
# # A small GPT, trained on Shakespeare
#
# A GPT is a stack of causal transformer blocks that predicts the next token at
# every position. You write GPT-2's architecture in fifty lines of JAX, train it
# on thirty of Shakespeare's sonnets, compare its loss with n-gram models
# counted on the same text, and let it write. The result is modest, and you will
# see why.
# %% [markdown] lang="zh"
# # 在莎士比亚十四行诗上训练一个小 GPT
#
# GPT 由若干带 causal mask 的 transformer block 堆叠而成，在每个位置预测下一个
# token。本篇用五十行 JAX 写出 GPT-2 的结构，在三十首莎士比亚十四行诗上训练，
# 与在同一文本上统计的 n-gram 模型比较 loss，然后让它写诗。写得不算好，
# 你会看到原因。
# %% [markdown] lang="en"
# ## What you will understand
#
# - next-token prediction: why one row of $t$ tokens gives $t$ training
#   examples;
# - GPT-2's architecture: learned positions, LayerNorm, GELU, a tied head, and
#   its initialization;
# - the loss in nats, bits and perplexity, and what it is at the start;
# - what n-gram models achieve, and why a loss means nothing without such a
#   baseline;
# - training, validation and test loss, and which checkpoint to keep.
#
# Time: 60 minutes to read, under one minute to run. Before this: notebooks 05
# (tokenizers) and 08 (the block).
# %% [markdown] lang="zh"
# ## 你将理解什么
#
# - next-token prediction：为什么一行 $t$ 个 token 就是 $t$ 个训练样本；
# - GPT-2 的结构：可学习的位置向量、LayerNorm、GELU、tied head，以及它的初始化；
# - 以 nat、bit 和 perplexity 表示的 loss，以及它的初始值；
# - n-gram 模型能做到什么程度，为什么没有 baseline 的 loss 没有意义；
# - 训练、验证和测试 loss，以及应保留哪个 checkpoint。
#
# 用时：阅读约 60 分钟，运行不到一分钟。前置：05（tokenizer）与 08（transformer
# block）。
# %%
import dataclasses
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import moepeft
from moepeft.models import FAMILIES
from moepeft.models.decoder.model import Decoder

# %% [markdown] lang="en"
# ## 1. The text
#
# The file `notebooks/data/sonnets.txt` lies in the repository, beside the
# package; `moepeft.__file__` tells where that is, whatever folder the notebook
# runs in. Sonnets are separated by an empty line. A token is a character: with
# 16 thousand characters of text, a vocabulary of words would see most of its
# words once.
#
# Three sonnets are for validation (when to stop), three for the test (the
# result), the rest for training. Whole sonnets are held out, not random
# windows: neighbouring windows share characters, and the score would be too
# good.
# %% [markdown] lang="zh"
# ## 1. 文本
#
# 文件 `notebooks/data/sonnets.txt` 在代码仓库中，与 package 相邻；无论 notebook
# 在哪个目录运行，都可以由 `moepeft.__file__` 找到。各首诗之间用空行分隔。一个
# token 就是一个字符：文本只有约一万六千个字符，如果以单词为词表，
# 多数单词只会出现一次。
#
# 三首用于验证（决定何时停止），三首用于测试（最终结果），其余用于训练。
# 留出的是整首诗，而不是随机窗口：相邻窗口有共同的字符，会使分数偏高。
# %%
repository = Path(moepeft.__file__).parents[1]
text = (repository / 'notebooks/data/sonnets.txt').read_text('utf-8')
sonnets = text.strip().split('\n\n')
alphabet = sorted(set(text))
vocab = len(alphabet)
index = {c: i for i, c in enumerate(alphabet)}


def encode(text):
  return np.array([index[c] for c in text])


def decode(ids):
  return ''.join(alphabet[i] for i in ids)


def join(numbers):
  return encode('\n\n'.join(sonnets[i] for i in numbers) + '\n\n')


VALID, TEST = (6, 16, 26), (3, 13, 23)
train = join([i for i in range(len(sonnets)) if i not in VALID + TEST])
valid, test = join(VALID), join(TEST)
assert decode(encode(text)) == text
print(len(sonnets), 'sonnets,', vocab, 'characters in the alphabet')
print('characters for train, valid, test:', len(train), len(valid), len(test))
# %% [markdown] lang="en"
# ## 2. The baselines: n-grams
#
# A language model gives a probability to every next character. Its loss on a
# text is the mean of $-\ln p(c_i \mid c_{<i})$, in nats; divided by $\ln 2$ it
# is in bits. $e^{\text{loss}}$ is the *perplexity*: a uniform choice among that
# many characters has the same loss. With an alphabet of $V$ characters, a model
# that knows nothing has the loss $\ln V$ and the perplexity $V$.
#
# An n-gram model counts: $p(c \mid h) = N(hc) / N(h)$, where $h$ is the last
# $n - 1$ characters and $N$ says how often a string occurs in the training
# text. Counts of zero would give an infinite loss, so each order is
# interpolated with the one below it,
#
# $$p_n(c \mid h) = \frac{N(hc) + \alpha\, p_{n-1}(c \mid h')}{N(h) + \alpha},$$
#
# where $h'$ is $h$ without its first character and $p_0 = 1/V$. The number
# $\alpha$, here 3, is the weight of the lower order: $p_n$ is close to
# $p_{n-1}$ where $h$ is rare, and to the ratio of the counts where it is
# frequent. All are counted on the training text and measured on the same test
# characters as the GPT.
# %% [markdown] lang="zh"
# ## 2. Baseline：n-gram
#
# 语言模型给每个可能的下一个字符一个概率。它在一段文本上的 loss 是
# $-\ln p(c_i \mid c_{<i})$ 的平均值，单位是 nat；除以 $\ln 2$ 就以 bit 为单位。
# $e^{\text{loss}}$ 是 *perplexity*（困惑度）：在这么多个字符中均匀地选一个，
# loss 与它相同。字母表有 $V$ 个字符时，一无所知的模型的 loss 是 $\ln V$，
# perplexity 是 $V$。
#
# n-gram 模型靠计数：$p(c \mid h) = N(hc) / N(h)$，$h$ 是前 $n - 1$ 个字符，$N$
# 是字符串在训练文本中出现的次数。计数为零会使 loss 无穷大，
# 因此每一阶与低一阶插值：
#
# $$p_n(c \mid h) = \frac{N(hc) + \alpha\, p_{n-1}(c \mid h')}{N(h) + \alpha},$$
#
# 其中 $h'$ 是去掉第一个字符的 $h$，$p_0 = 1/V$。$\alpha$（这里取 3）
# 是低一阶的权重：$h$ 很少出现时 $p_n$ 接近 $p_{n-1}$，经常出现时接近计数之比。
# 全部在训练文本上计数，在与 GPT 相同的测试字符上测量。
# %%
CONTEXT = 48


def targets(ids):
  """The scored positions: each has at least CONTEXT / 2 characters before."""
  half = CONTEXT // 2
  count = (len(ids) - 1 - half) // half
  return np.arange(half + 1, half + 1 + count * half)


def count(n):
  """How often each n-gram occurs in the training text: [v] * n."""
  counts = np.zeros((vocab,) * n)
  size = len(train) - n + 1
  np.add.at(counts, tuple(train[i : i + size] for i in range(n)), 1)
  return counts


def interpolate(counts, lower, alpha=3.0):
  return (counts + alpha * lower) / (counts.sum(-1, keepdims=True) + alpha)


def ngram_loss(p, ids):
  """The mean loss in nats of p [v] * n on the scored characters."""
  n, at = p.ndim, targets(ids)
  return -np.log(p[tuple(ids[at - n + 1 + i] for i in range(n))]).mean()


unigram = interpolate(count(1), np.full(vocab, 1 / vocab))
bigram = interpolate(count(2), unigram)
assert np.allclose(unigram.sum(), 1) and np.allclose(bigram.sum(-1), 1)
baselines = {
  'uniform': np.log(vocab),
  'unigram': ngram_loss(unigram, test),
  'bigram': ngram_loss(bigram, test),
}
for name, loss in baselines.items():
  print(f'{name}: {loss:.3f} nats = {loss / np.log(2):.3f} bits a character')
assert baselines['bigram'] < baselines['unigram'] < baselines['uniform']
# %% [markdown] lang="en"
# ## 3. The model
#
# GPT-2 is notebook 08's pre-norm block with other parts:
#
# - *learned positions*: a table $[T, d]$ with a vector for each of $T$
#   positions (here 48) is added to the token embeddings, so no input can be
#   longer than $T$;
# - LayerNorm with scale and bias, an ungated feed-forward with GELU of width
#   $4d$, biases everywhere;
# - a *tied head*: logits are $x E^\top$ with the embedding table $E: [v, d]$
#   itself;
# - *dropout* in training: a tenth of the numbers is set to 0 after the
#   embedding and after each sublayer.
#
# Initialization: weights from $\mathcal N(0, 0.02^2)$; the two projections of
# each layer that write to the residual stream (notebook 08) are smaller by
# $1/\sqrt{2L}$, because with $L$ layers the stream is a sum of $2L$ of them.
# Logits are then close to 0, the prediction close to uniform, and the first
# loss has to be close to $\ln V$. That is a cheap and sensitive test of a new
# model: a first loss far above it means a wrong initialization, one below it
# means that the model sees the answer.
# %% [markdown] lang="zh"
# ## 3. 模型
#
# GPT-2 就是 08 的 pre-norm block，换了一些部件：
#
# - *可学习的位置向量*：一张 $[T, d]$ 的表，$T$ 个位置（这里是 48）
#   各有一个向量，加到 token embedding 上，因此输入不能超过 $T$ 个 token；
# - 带缩放和偏置的 LayerNorm，不带门控、宽度 $4d$ 的 GELU feed-forward，
#   每个线性层都有偏置；
# - *tied head*：logits 是 $x E^\top$，直接用 embedding 表 $E: [v, d]$；
# - 训练时的 *dropout*：embedding 之后和每个子层之后，把十分之一的数置零。
#
# 初始化：权重取自 $\mathcal N(0, 0.02^2)$；每层有两个投影向残差流写入（见
# 08），它们的权重再乘以 $1/\sqrt{2L}$，因为 $L$ 层的残差流是 $2L$
# 个写入量的和。这样 logits 接近 0，预测接近均匀分布，最初的 loss 应接近
# $\ln V$。这样检验新模型，成本低而且灵敏：最初的 loss 远高于它说明初始化有误，
# 低于它说明模型看到了答案。
# %%
D, HEADS, LAYERS, FFN = 64, 4, 2, 256


def init(key):
  keys = iter(jax.random.split(key, 100))

  def linear(shape, bias, std=0.02):
    kernel = jax.random.normal(next(keys), shape) * std
    return {'kernel': kernel, 'bias': jnp.zeros(bias)}

  def norm():
    return {'scale': jnp.ones(D), 'bias': jnp.zeros(D)}

  def table(rows):
    return {'embedding': jax.random.normal(next(keys), (rows, D)) * 0.02}

  split, small = (HEADS, D // HEADS), 0.02 / (2 * LAYERS) ** 0.5

  def layer():
    attention = {a: linear((D, *split), split) for a in 'qkv'}
    attention |= {'o': linear((*split, D), D, small), 'norm': norm()}
    mlp = {'wi': linear((D, FFN), FFN), 'wo': linear((FFN, D), D, small)}
    return {'self': attention, 'mlp': mlp | {'norm': norm()}}

  return {
    'embed': table(vocab),
    'positions': table(CONTEXT),
    'layers': [layer() for _ in range(LAYERS)],
    'norm': norm(),
  }


# %%
def layer_norm(x, p):
  x = x - x.mean(-1, keepdims=True)
  x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5)
  return x * p['scale'] + p['bias']


def attention(x, p):
  """Causal attention, x [b, t, d]."""
  q, k, v = (
    jnp.einsum('btd,dnh->btnh', x, p[a]['kernel']) + p[a]['bias'] for a in 'qkv'
  )
  logits = jnp.einsum('btnh,bsnh->bnts', q, k) * q.shape[-1] ** -0.5
  causal = jnp.tril(jnp.ones(logits.shape[-2:], bool))
  weights = jax.nn.softmax(jnp.where(causal, logits, -jnp.inf))
  y = jnp.einsum('bnts,bsnh->btnh', weights, v)
  return jnp.einsum('btnh,nhd->btd', y, p['o']['kernel']) + p['o']['bias']


def feed_forward(x, p):
  hidden = jax.nn.gelu(x @ p['wi']['kernel'] + p['wi']['bias'])
  return hidden @ p['wo']['kernel'] + p['wo']['bias']


def gpt(params, ids, key=None, rate=0.1):
  """ids [b, t] -> logits [b, t, v]; dropout with a key."""

  def dropout(x, i):
    if key is None:
      return x
    keep = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)

  table = params['embed']['embedding']
  x = table[ids] + params['positions']['embedding'][: ids.shape[1]]
  x = dropout(x, 0)
  for i, p in enumerate(params['layers']):
    y = attention(layer_norm(x, p['self']['norm']), p['self'])
    x = x + dropout(y, 2 * i + 1)
    y = feed_forward(layer_norm(x, p['mlp']['norm']), p['mlp'])
    x = x + dropout(y, 2 * i + 2)
  return layer_norm(x, params['norm']) @ table.T


# %% [markdown] lang="en"
# Number of parameters: $(V + T) d$ in the two tables, $4(d^2 + d)$ in
# attention, $8d^2 + 5d$ in the feed-forward, $4d$ in the two norms of a layer,
# $2d$ in the last norm.
# %% [markdown] lang="zh"
# 参数量：两张表 $(V + T) d$，attention $4(d^2 + d)$，feed-forward $8d^2 + 5d$，
# 每层两个 norm 共 $4d$，最后的 norm $2d$。
# %%
params = init(jax.random.key(0))
size = sum(a.size for a in jax.tree.leaves(params))
layer_size = 4 * (D * D + D) + 8 * D * D + 5 * D + 4 * D
assert size == (vocab + CONTEXT) * D + LAYERS * layer_size + 2 * D
print(size, 'parameters for', len(train), 'characters of training text')


# %% [markdown] lang="en"
# ## 4. The loss
#
# At position $i$ the model sees tokens $0 \ldots i$ and predicts token $i + 1$:
# inputs are a window without its last token, targets the window without its
# first. Because of the causal mask, the $t$ predictions of a row are $t$
# training examples, all computed by one forward pass. If the mask were wrong,
# the model would read the answer, and the training loss would be far too low;
# hence a check that changes the *last* character of the input: no earlier
# prediction may change.
# %% [markdown] lang="zh"
# ## 4. Loss
#
# 在位置 $i$，模型看到 token $0 \ldots i$，预测 token $i + 1$：
# 输入是去掉最后一个 token 的窗口，目标是去掉第一个 token 的窗口。有了 causal
# mask，一行的 $t$ 个预测就是 $t$ 个样本，一次前向计算全部得到。如果 mask 写错，
# 模型会直接读到答案，训练 loss 会低得不合理；所以这里做一个检验：
# 只改输入的*最后*一个字符，前面的预测都不应改变。
# %%
def token_losses(params, window, key=None):
  """window int [b, t + 1] -> -ln p of each target [b, t]."""
  logits = gpt(params, window[:, :-1], key)
  logp = jax.nn.log_softmax(logits)
  return -jnp.take_along_axis(logp, window[:, 1:, None], axis=-1)[..., 0]


window = jnp.array(train[: CONTEXT + 1])[None]
first_loss = float(token_losses(params, window).mean())
print('loss before training:', first_loss, 'ln V:', np.log(vocab))
assert abs(first_loss - np.log(vocab)) < 0.1, 'look at the initialization'
changed = window.at[0, CONTEXT - 1].set((window[0, CONTEXT - 1] + 1) % vocab)
before, after = (gpt(params, w[:, :CONTEXT]) for w in (window, changed))
assert jnp.array_equal(before[:, :-1], after[:, :-1]), 'the mask leaks'
assert not jnp.allclose(before[:, -1], after[:, -1])
# %% [markdown] lang="en"
# The hand-written model is the package's GPT-2: same weights, same logits. The
# package stacks the arrays of all layers on a first axis. Logits are small at
# the start (0.3 or so), and float32 agrees to about $10^{-6}$.
# %% [markdown] lang="zh"
# 手写的模型就是 moepeft 的 GPT-2：权重相同，logits 相同。moepeft
# 把所有层的数组堆叠在第一个轴上。初始时 logits 很小（约 0.3），float32
# 的结果一致到约 $10^{-6}$。
# %%
config = dataclasses.replace(
  FAMILIES['gpt2'].sizes['tiny'],
  vocab=vocab,
  d_model=D,
  heads=HEADS,
  kv_heads=HEADS,
  head_dim=D // HEADS,
  ffn=FFN,
  layers=LAYERS,
  length=CONTEXT,
)


def to_package(params):
  """The tree of the package's `Decoder`."""
  stacked = jax.tree.map(lambda *a: jnp.stack(a), *params['layers'])
  decoder = {'layers': stacked, 'norm': params['norm']}
  tables = {name: params[name] for name in ('embed', 'positions')}
  return {'params': {**tables, 'decoder': decoder}}


package_gpt = jax.jit(Decoder(config).apply)


def difference(params):
  expected = package_gpt(to_package(params), {'inputs': window})
  return float(jnp.abs(gpt(params, window) - expected).max())


window = window[:, :CONTEXT]
print('largest difference from the package:', difference(params))
assert difference(params) < 1e-5, 'compare one layer with notebook 08'
# %% [markdown] lang="en"
# ## 5. Training
#
# AdamW with a warm-up of 50 steps, then a cosine to a tenth of the rate;
# gradients are clipped to norm 1. Each batch has 16 random windows. Every 50
# steps the loss is measured on all of the validation sonnets, each scored
# character with at least 24 characters of context. In the figure, the training
# loss is the mean over the 50 steps before, with dropout; the validation loss
# is that of the step itself, without dropout. So the training loss is the
# higher one while both fall fast.
# %% [markdown] lang="zh"
# ## 5. 训练
#
# AdamW，前 50 步 warm-up，之后按余弦降到十分之一；梯度裁剪到范数 1。每个 batch
# 有 16 个随机窗口。每 50 步在全部验证诗上测量 loss，每个计分字符前面至少有 24
# 个字符的 context。图中的训练 loss 是此前 50 步的平均值，带 dropout；验证 loss
# 是当前这一步的，不带 dropout。所以两者快速下降时，训练 loss 反而更高。
# %%
STEPS, BATCH, RATE = 500, 16, 5e-3
schedule = optax.warmup_cosine_decay_schedule(0, RATE, 50, STEPS, RATE / 10)
optimizer = optax.chain(
  optax.clip_by_global_norm(1.0),
  optax.adamw(schedule, b2=0.99, weight_decay=0.1),
)


@jax.jit
def step(params, state, window, key):
  loss = lambda params: token_losses(params, window, key).mean()  # noqa: E731
  value, gradient = jax.value_and_grad(loss)(params)
  updates, state = optimizer.update(gradient, state, params)
  return optax.apply_updates(params, updates), state, value


jit_losses = jax.jit(token_losses)


def held_out_losses(params, ids):
  """The loss of each scored character of a text."""
  half = CONTEXT // 2
  at = targets(ids).reshape(-1, half)
  windows = np.stack([ids[i[0] - half - 1 : i[-1] + 1] for i in at])
  losses = np.asarray(jit_losses(params, windows))[:, half:]
  return losses.reshape(-1)


# %%
rng = np.random.default_rng(0)
state = optimizer.init(params)
history, best, recent = [], (np.inf, None, 0), [first_loss]
start = time.perf_counter()
for i in range(STEPS + 1):
  if i % 50 == 0:
    valid_loss = held_out_losses(params, valid).mean()
    history.append((i, np.mean(recent), valid_loss))
    if valid_loss < best[0]:
      best = valid_loss, params, i
    recent = []
  at = rng.integers(0, len(train) - CONTEXT, BATCH)
  windows = train[at[:, None] + np.arange(CONTEXT + 1)]
  params, state, loss = step(params, state, windows, jax.random.key(i))
  recent.append(loss)
print('seconds:', round(time.perf_counter() - start))
# %%
steps, train_curve, valid_curve = np.array(history).T
plt.figure(figsize=(6, 3))
plt.plot(steps, train_curve, label='training windows')
plt.plot(steps, valid_curve, label='validation sonnets')
for name, color in (('unigram', 'gray'), ('bigram', 'black')):
  plt.axhline(baselines[name], color=color, linestyle='--', label=name)
plt.xlabel('step')
plt.ylabel('nats a character')
plt.legend(fontsize=8)
plt.tight_layout()
plt.show()
# %% [markdown] lang="en"
# ## 6. The result
#
# The checkpoint with the lowest validation loss is measured once on the test
# sonnets. The validation loss of a checkpoint that was chosen by it is slightly
# too low, so the test text is a third part that no choice has seen.
# Neighbouring characters are not independent, so the standard error (the number
# after `+-`) is taken over pieces of 24 characters and not over characters.
# %% [markdown] lang="zh"
# ## 6. 结果
#
# 取验证 loss 最低的 checkpoint，在测试诗上测量一次。按验证集挑选会使验证 loss
# 略微偏低，因此测试文本是没有参与任何选择的第三部分。相邻的字符并不独立，
# 所以标准误（`+-` 之后的数）以 24 个字符为一段来计算，而不按单个字符计算。
# %%
valid_loss, params, best_step = best
losses = held_out_losses(params, test)
test_loss = losses.mean()
chunks = losses.reshape(-1, CONTEXT // 2).mean(1)
error = chunks.std(ddof=1) / len(chunks) ** 0.5
print(f'best validation loss {valid_loss:.3f} at step {best_step}')
print(f'test: GPT {test_loss:.3f} +- {error:.3f} nats a character')
print(f'perplexity {np.exp(test_loss):.2f}, bits {test_loss / np.log(2):.3f}')
for name, loss in baselines.items():
  print(f'      {name} {loss:.3f}')
assert test_loss < baselines['bigram'], 'train longer, or look at the mask'
print('largest difference from the package:', difference(params))
# Logits are of size 10 now, hence ten times the tolerance.
assert difference(params) < 1e-4
# %% [markdown] lang="en"
# The GPT beats the bigram model clearly, although it has seven times as many
# parameters as the training text has characters. It has not learned the text by
# heart: 500 steps are 26 passes over the text, training and validation loss are
# still close, and the lowest validation loss is that of the last step. Dropout
# and weight decay help. With `STEPS = 3000` the training loss falls to 1.4
# while the validation loss rises after about 1250 steps, and then it matters
# which checkpoint is kept. Real models have fewer parameters than tokens:
# Chinchilla's rule (arXiv:2203.15556) is about 20 tokens for each parameter.
# With so little text it is not certain that a GPT beats longer n-grams, too:
# exercise 3 measures it.
#
# ## 7. A sample
#
# The model continues a prompt one character at a time: append a character drawn
# from the last position's distribution, cut to the last 48 characters, repeat.
# Notebook 11 is about better ways to choose and about not computing everything
# again at each step.
# %% [markdown] lang="zh"
# GPT 明显优于 bigram，尽管参数量是训练字符数的七倍。它没有把文本背下来：500
# 步相当于把文本读 26 遍，训练 loss 与验证 loss 仍然接近，验证 loss
# 最低的就是最后一步。dropout 和 weight decay 有帮助。取 `STEPS = 3000` 时，训练
# loss 降到 1.4，而验证 loss 在约 1250 步之后上升，这时保留哪个 checkpoint
# 才重要。真实的大模型参数比训练 token 少：Chinchilla 法则（arXiv:2203.15556）
# 是每个参数约 20 个 token。文本这么少，GPT 能否超过更长的 n-gram 并不确定：练习
# 3 来测量。
#
# ## 7. 采样
#
# 模型每次续写一个字符：从最后一个位置的分布中抽一个字符，接在后面，只保留最后
# 48 个字符，重复。11 讨论更好的选择方式，以及如何避免每一步都从头计算。
# %%
jit_gpt = jax.jit(gpt)


def sample(params, prompt, length, seed=0):
  rng = np.random.default_rng(seed)
  ids = list(encode(prompt))
  for _ in range(length):
    # A row of constant length, so that one program serves all steps; what
    # stands after the text has no effect on it.
    row = ids[-CONTEXT:]
    padded = np.array(row + [0] * (CONTEXT - len(row)))[None]
    logits = np.asarray(jit_gpt(params, padded))[0, len(row) - 1]
    p = np.exp(logits - logits.max(), dtype=np.float64)
    ids.append(rng.choice(vocab, p=p / p.sum()))
  return decode(ids)


print(sample(init(jax.random.key(0)), 'Shall I ', 60), '\n---')
verse = sample(params, 'Shall I ', 300)
print(verse)
# %%
words = set(text.split())


def share_of_words(verse):
  """The share of its words that stand in the sonnets."""
  return np.mean([word in words for word in verse.split()[2:-1]])


random_verse = sample(init(jax.random.key(0)), 'Shall I ', 300)
print('words that stand in the sonnets:', share_of_words(verse))
print('before training:', share_of_words(random_verse))
assert share_of_words(verse) > share_of_words(random_verse) + 0.15
# %% [markdown] lang="en"
# ## Exercises
#
# 1. (Easy) How many parameters would an *untied* head add, and which share of
#    this model would that be? What is the share for GPT-2 small ($V = 50257$,
#    $d = 768$, 124,439,808 parameters)?
# 2. (Medium) Measure the test loss by length of context: predict test
#    characters (every fourth is enough) from exactly 1, 2, 4, 8, 16 and 32
#    characters before them. From which length on does more context hardly help?
# 3. (Hard) Extend the n-grams to order 3 and 4 with `interpolate`. Which is
#    best on the test sonnets, and does the GPT beat it? Then mix the GPT with
#    the best n-gram, $\lambda p_{\text{GPT}} + (1 - \lambda) p_n$, with
#    $\lambda$ chosen on the validation sonnets.
# %% [markdown] lang="zh"
# ## 练习
#
# 1. （易）如果 head 不与 embedding 共享（untied），会增加多少参数，
#    占这个模型的多大比例？GPT-2 small（$V = 50257$，$d = 768$，124,439,808
#    个参数）呢？
# 2. （中）按 context 长度测量测试 loss：用恰好 1、2、4、8、16、32 个字符的
#    context 预测测试字符（每四个取一个即可）。超过多长之后，更长的 context
#    几乎不再有帮助？
# 3. （难）用 `interpolate` 把 n-gram 扩展到 3 阶和 4 阶。哪一个在测试诗上最好？
#    GPT 能超过它吗？再把 GPT 与最好的 n-gram 混合：
#    $\lambda p_{\text{GPT}} + (1 - \lambda) p_n$，$\lambda$ 在验证诗上选择。
# %% [markdown] lang="en"
# ## Interview questions
#
# **A colleague reports a loss of 1.2 on held-out text. What do you ask?**
#
# <details><summary>Answer</summary>
#
# Per what, and against what: nats or bits; a token of which tokenizer (per byte
# or character is comparable across tokenizers, per token is not); which text,
# and could it be in the training data; how much context each scored token had
# (a window scored from its first token is worse than one with a long prefix);
# and what an n-gram model or an earlier model has on the same text. Then
# whether the checkpoint was chosen on that text.
#
# </details>
#
# **Why is the first loss of a language model close to $\ln V$, and what does it
# mean if it is not?**
#
# <details><summary>Answer</summary>
#
# At initialization logits are near 0, the softmax is near uniform, and
# $-\ln(1/V) = \ln V$ whatever the target is. Much higher: the logits are too
# large, for instance a tied head with embeddings of unit variance and no
# scaling. Lower: the target is visible, by a wrong mask or a shift that is
# missing.
#
# </details>
# %% [markdown] lang="zh"
# ## 面试题
#
# **同事说留出文本上的 loss 是 1.2。你会问什么？**
#
# <details><summary>答案</summary>
#
# 单位和对比对象：nat 还是 bit；每个 token 用的是哪个 tokenizer（每 byte
# 或每字符的 loss 可以跨 tokenizer 比较，每 token 的不行）；什么文本，
# 是否可能出现在训练数据中；每个计分 token 有多长的 context（从窗口第一个 token
# 开始计分，会比有长前缀时差）；n-gram 或以前的模型在同一文本上是多少。还有
# checkpoint 是不是在这段文本上挑选的。
#
# </details>
#
# **语言模型最初的 loss 为什么接近 $\ln V$？如果不接近说明什么？**
#
# <details><summary>答案</summary>
#
# 初始化时 logits 接近 0，softmax 接近均匀分布，不论目标是什么都有
# $-\ln(1/V) = \ln V$。高得多：logits 太大，例如 tied head 的 embedding 方差为 1
# 又没有缩放。更低：模型看到了目标，mask 错了或者忘了错开一位。
#
# </details>
# %% [markdown] lang="en"
# ## In the package
#
# - {{moepeft.models.decoder.gpt2.SIZES}} has GPT-2's released sizes;
#   {{moepeft.models.decoder.model.Decoder}} is the module of all decoder-only
#   families.
# - {{moepeft.objectives.causal}} is the loss: it returns sums over tokens and
#   not means, so that parts of a batch add up;
#   {{moepeft.objectives.cross_entropy}} has z-loss and label smoothing.
# - `python -m moepeft.train --config=configs/pretrain_gpt_tiny.py:text=PATH`
#   pretrains a GPT on text of your own, with packing, checkpoints from which a
#   run resumes exactly, and {{moepeft.ngrams}} as the baseline.
# - {{moepeft.training.step}} is the training step; compare it with `step`
#   above.
#
# Papers: GPT-2 (Radford et al., 2019, "Language Models are Unsupervised
# Multitask Learners"), AdamW arXiv:1711.05101, tied heads 1608.05859, scaling
# 2203.15556.
# %% [markdown] lang="zh"
# ## 在 moepeft 中
#
# - {{moepeft.models.decoder.gpt2.SIZES}} 列出 GPT-2 发布的各种尺寸；
#   {{moepeft.models.decoder.model.Decoder}} 是所有 decoder-only 系列的模块。
# - {{moepeft.objectives.causal}} 是 loss：返回对 token 的和而不是平均值，这样
#   batch 的各部分可以相加；{{moepeft.objectives.cross_entropy}} 有 z-loss 和
#   label smoothing。
# - `python -m moepeft.train --config=configs/pretrain_gpt_tiny.py:text=PATH`
#   在你自己的文本上预训练 GPT，带 packing、可精确恢复训练的 checkpoint，并以
#   {{moepeft.ngrams}} 为 baseline。
# - {{moepeft.training.step}} 是训练的一步，可与上面的 `step` 比较。
#
# 论文：GPT-2（Radford 等，2019，"Language Models are Unsupervised Multitask
# Learners"），AdamW arXiv:1711.05101，tied head 1608.05859，scaling
# 2203.15556。
# %% [markdown] lang="en" tags=["solution"]
# # Solutions: a small GPT
# %% [markdown] lang="zh" tags=["solution"]
# # 解答：小 GPT
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 1
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 1
# %% tags=["solution"]
extra = vocab * D
print('here:', extra, 'parameters,', f'{extra / size:.1%} more')
gpt2_extra, gpt2_size = 50257 * 768, 124_439_808
print('GPT-2 small:', gpt2_extra, f'{gpt2_extra / gpt2_size:.1%} more')
untied = dataclasses.replace(config, tied=False)
shapes = jax.eval_shape(
  Decoder(untied).init, jax.random.key(0), {'inputs': window}
)
total = sum(np.prod(a.shape) for a in jax.tree.leaves(shapes['params']))
assert total == size + extra
assert 0.3 < gpt2_extra / gpt2_size < 0.32
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 2
#
# Windows of exactly $c$ characters end before each target. From 4 characters on
# the loss hardly falls: with so little text the model has learned short
# sequences of letters and not much more.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 2
#
# 每个目标之前取恰好 $c$ 个字符的窗口。从 4 个字符起 loss 几乎不再下降：
# 文本这么少，模型学到的主要是很短的字母序列。
# %% tags=["solution"]
by_context = {}
at = np.arange(33, len(test), 4)
for c in (1, 2, 4, 8, 16, 32):
  windows = np.stack([test[i - c : i + 1] for i in at])
  by_context[c] = float(jit_losses(params, windows)[:, -1].mean())
  print(c, round(by_context[c], 3))
assert by_context[4] < by_context[1], 'four characters help against one'
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 3
#
# With so little text, a four-gram that is counted in milliseconds is better
# than the GPT, and the mixture is better than each part. The n-gram remembers
# letter sequences that it has seen, the GPT has a longer context; their errors
# differ.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 3
#
# 文本这么少，几毫秒就能数完的 four-gram 比 GPT 好，而混合模型比两者都好。n-gram
# 记住见过的字母序列，GPT 有更长的 context，两者的错误不同。
# %% tags=["solution"]
trigram = interpolate(count(3), bigram)
fourgram = interpolate(count(4), trigram)
for name, p in (('trigram', trigram), ('fourgram', fourgram)):
  print(name, round(ngram_loss(p, test), 3), 'GPT', round(float(test_loss), 3))


def mixed_losses(ids, weight):
  at = targets(ids)
  p_ngram = fourgram[tuple(ids[at - 3 + i] for i in range(4))]
  p_gpt = np.exp(-held_out_losses(params, ids))
  return -np.log(weight * p_gpt + (1 - weight) * p_ngram)


weights = np.linspace(0, 1, 11)
weight = min(weights, key=lambda w: mixed_losses(valid, w).mean())
mixed = mixed_losses(test, weight).mean()
print('weight of the GPT', weight, 'loss of the mixture', round(mixed, 3))
assert mixed < min(test_loss, ngram_loss(fourgram, test))

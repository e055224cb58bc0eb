# SPDX-License-Identifier: Apache-2.0
# %% [markdown] lang="en"
# # LoRA by hand
#
# Fine-tuning a weight matrix changes it by some $\Delta W$. LoRA trains
# $\Delta W$ as a product of two thin matrices and leaves $W$ alone. This
# notebook writes LoRA for a small Transformer, measures whether the change that
# full fine-tuning makes is of low rank at all, merges the product into the
# weights, and ends with the same logits, gradients, merged weights and
# parameter count as moepeft.
#
# ## What you will understand
#
# - what $r$, $\alpha$ and the initialization of $A$ and $B$ do, and why exactly
#   one of the two starts at zero;
# - what "the change has low rank" means, measured on singular values and on
#   accuracy;
# - why a merged LoRA costs nothing at inference, and when merging loses
#   precision;
# - how many parameters and bytes of optimizer state LoRA saves, by formula and
#   by count;
# - why $\alpha / r$ and $\alpha / \sqrt r$ are both in use.
#
# About 60 minutes. Before it: backpropagation, optimizers and the Transformer
# block (notebooks 01 and 08).
# %% [markdown] lang="zh"
# # 手写 LoRA
#
# 微调一个权重矩阵，就是给它加上某个 $\Delta W$。
# LoRA 把 $\Delta W$ 写成两个瘦矩阵的乘积来训练，而 $W$ 本身不动。
# 本 notebook 在一个小 Transformer 上手写 LoRA，
# 测量全量微调得到的改变量究竟是不是低秩的，把乘积合并进权重，
# 最后得到与 moepeft 相同的 logits、梯度、合并后权重和参数量。
#
# ## 你将理解什么
#
# - $r$、$\alpha$ 以及 $A$、$B$ 的初始化各起什么作用，为什么恰好有一个从零开始；
# - “改变量是低秩的”是什么意思，用奇异值和准确率来测量；
# - 为什么合并后的 LoRA 在推理时没有额外开销，什么时候合并会损失精度；
# - LoRA 省下多少参数和多少字节的优化器状态，用公式算，也用程序数；
# - 为什么 $\alpha / r$ 和 $\alpha / \sqrt r$ 两种缩放都有人用。
#
# 大约 60 分钟。先修：反向传播、优化器、Transformer 块（notebook 01、08）。
# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from moepeft.checkpoints.count_parameters import count_trained
from moepeft.models.decoder.config import DecoderConfig
from moepeft.models.decoder.model import Decoder, sites
from moepeft.nn.initializers import init_params
from moepeft.peft import build
from moepeft.peft.merge import merge

CONFIG = DecoderConfig(
  vocab=14,
  d_model=48,
  heads=4,
  kv_heads=4,
  head_dim=12,
  ffn=96,
  layers=2,
  gated=False,
  activation='relu',
  positions='learned',
  length=16,
)
base = init_params(Decoder(CONFIG), {'inputs': jnp.zeros((1, 13), int)}, 0)
print(jax.tree.map(lambda a: a.shape, base['params']))
# %% [markdown] lang="en"
# ## A base model with hooks for a change
#
# The model is a decoder of two layers with the package's shapes: learned
# positions, RMSNorm, four heads, a feed-forward with ReLU. All kernels are
# brought to the form $W \in \mathbb R^{\text{in} \times \text{out}}$, one per
# layer, by joining the axes of heads. There are six of them in a layer: `q`,
# `k`, `v`, `o`, `wi`, `wo`. Everything else (embeddings, norms, head) is in
# `rest`.
#
# The forward pass calls `linear(name, layer, x)` for each kernel. This is the
# one place where fine-tuning methods act.
# %% [markdown] lang="zh"
# ## 一个留有接口的基座模型
#
# 模型是两层的 decoder，形状与包里的一致：可学习的位置、RMSNorm、四个头、
# 带 ReLU 的前馈层。把各头的轴合起来，所有 kernel 都写成
# $W \in \mathbb R^{\text{in} \times \text{out}}$，每层一个。每层共六个：`q`、
# `k`、`v`、`o`、`wi`、`wo`。其余的（embedding、norm、head）放在 `rest` 里。
#
# 前向计算对每个 kernel 调用 `linear(name, layer, x)`。
# 各种微调方法都只在这一处起作用。
# %%
KERNELS = ('q', 'k', 'v', 'o', 'wi', 'wo')
WIDTH = CONFIG.heads * CONFIG.head_dim
SIZES = {name: (CONFIG.d_model, WIDTH) for name in 'qkv'}
SIZES |= {'o': (WIDTH, CONFIG.d_model)}
SIZES |= {
  'wi': (CONFIG.d_model, CONFIG.ffn),
  'wo': (CONFIG.ffn, CONFIG.d_model),
}


def split(params):
  """The package's tree -> (rest, kernels [layers, in, out])."""
  layers = params['decoder']['layers']
  parts = layers['self'] | layers['mlp']
  kernels = {
    name: parts[name]['kernel'].reshape(CONFIG.layers, *SIZES[name])
    for name in KERNELS
  }
  rest = {
    'embed': params['embed']['embedding'],
    'positions': params['positions']['embedding'],
    'norms': {n: layers[n]['norm']['scale'] for n in ('self', 'mlp')},
    'norm': params['decoder']['norm']['scale'],
    'head': params['head']['kernel'],
  }
  return rest, kernels


def rms_norm(x, scale):
  return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


# %%
def forward(rest, linear, ids):
  """ids [b, t] -> logits [b, t, v]; `linear` applies the kernels."""
  b, t = ids.shape
  heads = (b, t, CONFIG.heads, CONFIG.head_dim)
  causal = jnp.tril(jnp.ones((t, t), bool))
  x = rest['embed'][ids] + rest['positions'][:t]
  for layer in range(CONFIG.layers):
    y = rms_norm(x, rest['norms']['self'][layer])
    q, k, v = (linear(name, layer, y).reshape(heads) for name in 'qkv')
    logits = jnp.einsum('btnh,bsnh->bnts', q, k) * CONFIG.head_dim**-0.5
    weights = jax.nn.softmax(jnp.where(causal, logits, -1e9))
    y = jnp.einsum('bnts,bsnh->btnh', weights, v).reshape(b, t, WIDTH)
    x = x + linear('o', layer, y)
    y = rms_norm(x, rest['norms']['mlp'][layer])
    x = x + linear('wo', layer, jax.nn.relu(linear('wi', layer, y)))
  return rms_norm(x, rest['norm']) @ rest['head']


def plain(kernels):
  return lambda name, layer, x: x @ kernels[name][layer]


ids = jax.random.randint(jax.random.key(1), (3, 13), 0, CONFIG.vocab)
rest, kernels = split(base['params'])
by_hand = forward(rest, plain(kernels), ids)
by_package = Decoder(CONFIG).apply(base, {'inputs': ids})
# Two orders of float32 sums of about 100 terms of size one.
np.testing.assert_allclose(
  by_hand, by_package, atol=1e-4, err_msg='compare the masks and the norms'
)
# %% [markdown] lang="en"
# ## Pretraining, and a new task
#
# A row is a task token, six digits, a separator, and six digits to predict. The
# base learns two tasks together: copy and reverse. The task to fine-tune on
# comes later: reverse, and add 3 to each digit modulo 10. Its task token has
# never been trained, and the base has never mapped a digit to another.
# %% [markdown] lang="zh"
# ## 预训练，以及一个新任务
#
# 一行由一个任务 token、六个数字、一个分隔符和六个待预测的数字组成。
# 基座同时学两个任务：复制和反转。微调的任务是后来的：反转，
# 并给每个数字加 3 再对 10 取模。它的任务 token 从未训练过，
# 而且基座也从未把一个数字映射成另一个数字。
# %%
SEPARATOR, COPY, REVERSE, SHIFTED = 10, 11, 12, 13


def rows(key, task, count=64):
  """(inputs [b, 13], targets [b, 6])."""
  digits = jax.random.randint(key, (count, 6), 0, 10)
  flipped = digits[:, ::-1]
  targets = {
    COPY: digits,
    REVERSE: flipped,
    SHIFTED: (flipped + 3) % 10,
  }[task]
  first, middle = (jnp.full((count, 1), i) for i in (task, SEPARATOR))
  whole = jnp.concatenate([first, digits, middle, targets], axis=1)
  return whole[:, :-1], targets


def loss_of(logits, targets):
  """The mean cross-entropy of the last six positions."""
  return optax.softmax_cross_entropy_with_integer_labels(
    logits[:, -6:], targets
  ).mean()


def accuracy_of(logits, targets):
  return float(jnp.mean(jnp.argmax(logits[:, -6:], -1) == targets))


print(rows(jax.random.key(0), SHIFTED, 1))


# %%
def train(loss, trained, steps, rate, seed=0):
  """Adam on loss(trained, key) -> (trained, losses)."""
  optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

  def step(carry, key):
    trained, state = carry
    value, grads = jax.value_and_grad(loss)(trained, key)
    updates, state = optimizer.update(grads, state)
    return (optax.apply_updates(trained, updates), state), value

  keys = jax.random.split(jax.random.key(seed), steps)
  run = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))
  (trained, _), losses = run((trained, optimizer.init(trained)))
  return trained, np.asarray(losses)


def pretraining_loss(trained, key):
  rest, kernels = trained
  total = 0.0
  for task in (COPY, REVERSE):
    inputs, targets = rows(key, task, 32)
    total += loss_of(forward(rest, plain(kernels), inputs), targets)
  return total / 2


(rest, kernels), losses = train(pretraining_loss, (rest, kernels), 700, 3e-3)
test_inputs, test_targets = rows(jax.random.key(99), SHIFTED, 512)
for task in (COPY, REVERSE, SHIFTED):
  inputs, targets = rows(jax.random.key(99), task, 512)
  accuracy = accuracy_of(forward(rest, plain(kernels), inputs), targets)
  print(task, f'accuracy {accuracy:.3f}')
assert accuracy < 0.3, 'the base must not know the new task yet'
# %% [markdown] lang="en"
# ## LoRA
#
# For a kernel $W \in \mathbb R^{i \times o}$ that stays as it is, LoRA
# (arXiv:2106.09685) trains $A \in \mathbb R^{i \times r}$ and
# $B \in \mathbb R^{r \times o}$:
#
# $$
# y = x W + \frac{\alpha}{r} (x A) B
# $$
#
# The rank $r$ is much smaller than $i$ and $o$, and $\alpha$ is a constant. The
# rows of $x$ and $y$ are the tokens. The paper writes vectors as columns,
# $h = W x + B A x$, so its $A$ is $r \times i$; the first factor is $A$ in
# both.
#
# The brackets matter. $(xA)B$ takes $r(i + o)$ multiplications for a token;
# forming $AB$ first takes $r\,i\,o$, once per step, and then $i\,o$ for a
# token.
#
# $A$ starts as small random numbers and $B$ as zeros, so the function is the
# base's at first. What the gradients are then follows from the chain rule. With
# $G = \partial L / \partial y$, which has the shape of $y$, and
# $s = \alpha / r$:
#
# $$
# \frac{\partial L}{\partial B} = s\, A^\top x^\top G, \qquad
# \frac{\partial L}{\partial A} = s\, x^\top G\, B^\top
# $$
#
# With $B = 0$ the gradient of $A$ is zero and that of $B$ is not: $B$ moves
# first, and then $A$ does. With both zero both gradients are zero and nothing
# ever moves. With both random training works, but the first function is not the
# base's.
# %% [markdown] lang="zh"
# ## LoRA
#
# 对一个保持不变的 kernel $W \in \mathbb R^{i \times o}$，
# LoRA（arXiv:2106.09685）训练 $A \in \mathbb R^{i \times r}$ 和
# $B \in \mathbb R^{r \times o}$：
#
# $$
# y = x W + \frac{\alpha}{r} (x A) B
# $$
#
# 秩 $r$ 远小于 $i$ 和 $o$，$\alpha$ 是常数。$x$ 和 $y$ 的每一行是一个 token。
# 论文把向量写成列，$h = W x + B A x$，所以论文里的 $A$ 是 $r \times i$；
# 两种写法中先乘的都是 $A$。
#
# 括号很重要。$(xA)B$ 每个 token 要 $r(i + o)$ 次乘法；如果先算 $AB$，
# 每步要 $r\,i\,o$ 次，之后每个 token 还要 $i\,o$ 次。
#
# $A$ 从小随机数开始，$B$ 从零开始，所以一开始函数就是基座的函数。
# 此时的梯度由链式法则得出。记 $G = \partial L / \partial y$（形状与 $y$
# 相同），$s = \alpha / r$：
#
# $$
# \frac{\partial L}{\partial B} = s\, A^\top x^\top G, \qquad
# \frac{\partial L}{\partial A} = s\, x^\top G\, B^\top
# $$
#
# $B = 0$ 时，$A$ 的梯度是零，$B$ 的不是：先动的是 $B$，然后才是 $A$。
# 两个都是零，则两个梯度都是零，永远不动。两个都随机也能训练，
# 但一开始的函数就不再是基座的函数。
# %%
ALPHA = 8.0


def init_lora(key, rank, stddev=0.02):
  """{kernel: (A [layers, in, r], B [layers, r, out])}."""
  keys = jax.random.split(key, len(KERNELS))
  return {
    name: (
      stddev * jax.random.normal(k, (CONFIG.layers, SIZES[name][0], rank)),
      jnp.zeros((CONFIG.layers, rank, SIZES[name][1])),
    )
    for name, k in zip(KERNELS, keys, strict=True)
  }


def with_lora(kernels, lora, alpha=ALPHA):
  def linear(name, layer, x):
    a, b = lora[name][0][layer], lora[name][1][layer]
    scale = alpha / a.shape[-1]
    return x @ kernels[name][layer] + scale * (x @ a) @ b

  return linear


lora = init_lora(jax.random.key(0), rank=4)
first_logits = forward(rest, with_lora(kernels, lora), test_inputs)
assert jnp.array_equal(
  first_logits, forward(rest, plain(kernels), test_inputs)
), 'B is not zero, so the first function is not the base'


# %%
def lora_loss(lora, key):
  inputs, targets = rows(key, SHIFTED)
  return loss_of(forward(rest, with_lora(kernels, lora), inputs), targets)


gradient = jax.jit(jax.grad(lora_loss))


def norms(lora):
  grads = gradient(lora, jax.random.key(5))
  return [
    float(jnp.sqrt(sum(jnp.sum(g[i] ** 2) for g in grads.values())))
    for i in (0, 1)
  ]


zeros = jax.tree.map(jnp.zeros_like, lora)
nonzero = jax.tree.map(lambda a: a + 0.01, lora)
for label, start in (
  ('B = 0', lora),
  ('A = B = 0', zeros),
  ('B != 0', nonzero),
):
  print(
    f'{label:10} norm of the gradient: A %.4f, B %.4f' % tuple(norms(start))
  )
assert norms(lora)[0] == 0 < norms(lora)[1], 'with B = 0 only B has a gradient'
assert norms(zeros) == [0, 0], 'with both at zero nothing can move'
assert min(norms(nonzero)) > 0
# %% [markdown] lang="en"
# ## Training beside the dense change
#
# `jax.grad` differentiates with respect to its first argument. Freezing is
# nothing more than leaving `rest` and `kernels` out of it: no gradient and no
# optimizer state exists for them. For comparison the same six kernels are also
# trained themselves ("dense"). Each has one rate that was not tuned, so the
# order of the curves below means little; that all of them fall is the point.
# %% [markdown] lang="zh"
# ## 与稠密改变量并排训练
#
# `jax.grad` 对第一个参数求导。所谓冻结，不过是不把 `rest` 和 `kernels` 放进这个
# 参数：它们没有梯度，也没有优化器状态。作为对照，
# 我们也直接训练同样的六种 kernel（记作“dense”）。学习率各取一个，没有调过，
# 所以下面曲线的高低次序意义不大；要看的是它们都在下降。
# %%
STEPS, RANKS = 250, (1, 2, 4, 8)


def dense_loss(kernels, key):
  inputs, targets = rows(key, SHIFTED)
  return loss_of(forward(rest, plain(kernels), inputs), targets)


def test_accuracy(linear):
  return accuracy_of(forward(rest, linear, test_inputs), test_targets)


dense, dense_losses = train(dense_loss, kernels, STEPS, 1e-3)
adapters, curves = {}, {}
for rank in RANKS:
  adapters[rank], curves[rank] = train(
    lora_loss, init_lora(jax.random.key(0), rank), STEPS, 1e-2
  )
lora_accuracy = {
  r: test_accuracy(with_lora(kernels, adapters[r])) for r in RANKS
}
print('dense', round(test_accuracy(plain(dense)), 3), lora_accuracy)
# %%
fig, axis = plt.subplots(figsize=(6, 2.6), dpi=72)
axis.plot(dense_losses, label='dense', color='black')
for rank in RANKS:
  axis.plot(curves[rank], label=f'LoRA, r = {rank}', lw=1)
axis.set(xlabel='step', ylabel='loss', yscale='log')
axis.legend(fontsize=8)
fig.tight_layout()
for rank in (4, 8):
  assert curves[rank][-50:].mean() < 0.5 * curves[rank][:5].mean(), (
    'the loss did not fall: check the sign of the term and what is trained'
  )
# %% [markdown] lang="en"
# ## Why low rank? Measure the dense change
#
# The LoRA paper's hypothesis is that the change
# $\Delta W = W_{\text{tuned}} - W$ which a task needs has a low *intrinsic*
# rank. Two measurements say how far this holds here.
#
# 1. **Singular values.** $\Delta W = U \Sigma V^\top$ with
#    $\sigma_1 \ge \sigma_2 \ge \dots$; the best approximation of rank $r$ keeps
#    the first $r$ and has the share
#    $\sum_{j \le r} \sigma_j^2 / \sum_j \sigma_j^2$ of the squared norm (Eckart
#    and Young). The comparison is a matrix of independent normal numbers, which
#    has no structure.
# 2. **Accuracy.** A tail of small singular values may still matter, and a large
#    one may not. So replace each $\Delta W$ by its best approximation of rank
#    $r$ and measure the task.
# %% [markdown] lang="zh"
# ## 为什么低秩？测量稠密的改变量
#
# LoRA 论文的假设是：一个任务所需的改变量 $\Delta W = W_{\text{tuned}} - W$
# 的*内在*秩很低。这里用两个测量看它成立到什么程度。
#
# 1. **奇异值。** $\Delta W = U \Sigma V^\top$，
#    $\sigma_1 \ge \sigma_2 \ge \dots$；秩为 $r$ 的最佳近似保留前 $r$ 个，
#    占平方范数的 $\sum_{j \le r} \sigma_j^2 / \sum_j \sigma_j^2$（Eckart–Young
#    定理）。对照物是独立正态随机数组成的矩阵，它没有任何结构。
# 2. **准确率。** 一串小奇异值也可能有用，一个大的也可能没用。
#    所以把每个 $\Delta W$ 换成秩为 $r$ 的最佳近似，再测任务的准确率。
# %%
change = {name: np.asarray(dense[name] - kernels[name]) for name in KERNELS}
factors = {
  name: np.linalg.svd(c, full_matrices=False) for name, c in change.items()
}


def cut_to(rank):
  """The kernels with the best change of this rank."""
  return {
    name: kernels[name] + (u[..., :rank] * s[:, None, :rank]) @ vt[:, :rank]
    for name, (u, s, vt) in factors.items()
  }


def shares(values):
  """The share of the squared norm in the first r singular values."""
  energy = values**2
  return np.cumsum(energy, -1) / energy.sum(-1, keepdims=True)


noise = np.random.default_rng(0).normal(size=(20, *SIZES['q']))
noise_share = shares(np.linalg.svd(noise, compute_uv=False)).mean(0)
change_share = np.concatenate([shares(f[1]) for f in factors.values()])
steps = (1, 2, 4, 8, 16, 48)
cut_accuracy = [test_accuracy(plain(cut_to(r))) for r in steps]
for r, accuracy in zip(steps, cut_accuracy, strict=True):
  print(
    f'r = {r:2}: share of the change {change_share[:, r - 1].mean():.2f}, of '
    f'noise {noise_share[r - 1]:.2f}; accuracy of the truncated {accuracy:.3f}'
  )
assert (change_share[:, 3] > 1.5 * noise_share[3]).all(), (
  'every dense change should be more concentrated than noise'
)
# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.6), dpi=72)
for share in change_share:
  left.plot(range(1, 49), share, color='tab:blue', lw=0.6)
left.plot(range(1, 49), noise_share, 'k--', label='random matrix')
left.plot([], [], color='tab:blue', label='12 dense changes')
left.set(xlabel='r', ylabel='share of squared norm', ylim=(0, 1.02))
left.legend(fontsize=8)
right.plot(steps, cut_accuracy, 'o-', label='dense, cut to rank r')
right.plot(RANKS, lora_accuracy.values(), 's-', label='LoRA of rank r')
right.set(xscale='log', xlabel='r', ylabel='accuracy', ylim=(0, 1.02))
right.set_xticks(steps, steps)
right.legend(fontsize=8)
fig.tight_layout()


# %% [markdown] lang="en"
# The dense change is far more concentrated than noise, but it has not a rank of
# 4: its tail of small singular values is not zero. What the right plot adds is
# the distinction that counts in practice. *Cutting* a dense change to rank $r$
# asks whether this particular change is of low rank. *Training* at rank $r$
# asks whether any change of that rank does the task. The second asks for less,
# since training puts the $r$ directions where they help. At $r = 1$ the cut
# change has an accuracy of about 0.1, which is guessing, and the trained LoRA
# about 1. So "fine-tuning is low-rank" holds here in the second sense only.
# %% [markdown] lang="zh"
# 稠密改变量比随机噪声集中得多，但它的秩并不是 4：那一串小奇异值不为零。
# 右图补充了实践中真正重要的区别。把稠密改变量*截断*到秩 $r$，
# 问的是这一个特定的改变量是不是低秩的；在秩 $r$ 下*训练*，
# 问的是有没有某个这样秩的改变量能完成任务。后者的要求更低，
# 因为训练会把 $r$ 个方向放到有用的地方。$r = 1$ 时，
# 截断后的准确率约为 0.1，即随机猜测的水平，训练出的 LoRA 约为 1。所以“微调是低
# 秩的”在这里只在第二种意义上成立。
# %% [markdown] lang="en"
# ## Merge: the same function, nothing left to compute
#
# $xW + s(xA)B = x(W + sAB)$. The change does not depend on $x$, so it can be
# added to $W$ once. The merged model is a plain model of the old shape: no
# further latency, no further memory. Subtracting $sAB$ takes it out again.
# %% [markdown] lang="zh"
# ## 合并：同一个函数，不再有额外计算
#
# $xW + s(xA)B = x(W + sAB)$。改变量不依赖于 $x$，所以可以一次性加到 $W$ 上。
# 合并后的模型就是原来形状的普通模型：没有额外延迟，没有额外内存；
# 再减去 $sAB$ 就恢复成 $W$。
# %%
def merge_by_hand(kernels, lora, alpha=ALPHA):
  return {
    name: kernels[name] + alpha / a.shape[-1] * a @ b
    for name, (a, b) in lora.items()
  }


lora = adapters[4]
merged_kernels = merge_by_hand(kernels, lora)
beside = forward(rest, with_lora(kernels, lora), test_inputs)
inside = forward(rest, plain(merged_kernels), test_inputs)
gap = float(jnp.max(jnp.abs(beside - inside)))
print(f'largest difference {gap:.1e}, logits up to {jnp.abs(beside).max():.0f}')
# float32 has 7 digits; sums of 96 terms in another order lose two of them.
assert gap < 1e-4 * float(jnp.abs(beside).max()), 'merged is not unmerged'
base_logits = forward(rest, plain(kernels), test_inputs)
assert float(jnp.abs(beside - base_logits).max()) > 1, 'LoRA changes nothing'


# %% [markdown] lang="en"
# ## Counts: parameters and optimizer state
#
# A kernel $i \times o$ has $i\,o$ parameters, its LoRA $r(i + o)$. Adam keeps
# two float32 numbers for each trained parameter, and there is one gradient. So
# a trained parameter takes $4 + 4 + 8 = 16$ bytes in float32 (parameter,
# gradient, Adam), a frozen one 4 (2 in bfloat16).
# %% [markdown] lang="zh"
# ## 计数：参数与优化器状态
#
# 一个 $i \times o$ 的 kernel 有 $i\,o$ 个参数，它的 LoRA 有 $r(i + o)$ 个。
# Adam 为每个被训练的参数保存两个 float32 数，另有一个梯度。所以在 float32 下，
# 一个被训练的参数占 $4 + 4 + 8 = 16$ 字节（参数、梯度、Adam），
# 一个冻结的占 4 字节（bfloat16 为 2 字节）。
# %%
def lora_parameters(rank, sizes, layers):
  return layers * sum(rank * (i + o) for i, o in sizes)


count = lora_parameters(4, SIZES.values(), CONFIG.layers)
dense_count = sum(w.size for w in kernels.values())
assert count == sum(a.size for a in jax.tree.leaves(lora))
print(f'here: {count:,} of {dense_count:,}, {100 * count / dense_count:.1f} %')
# A model of 7 B parameters: 32 layers, d = 4096; r = 8 at q and v.
large = lora_parameters(8, [(4096, 4096)] * 2, 32)
print(f'7 B: {large:,} trained, {large * 16 / 2**20:.0f} MiB with Adam')
print(
  f'all 7 B trained: {7e9 * 16 / 2**30:.0f} GiB; frozen in bf16: '
  f'{7e9 * 2 / 2**30:.0f} GiB'
)
assert large == 4_194_304
# %% [markdown] lang="en"
# ## Equal to moepeft
#
# The package builds the method `lora(rank=4, alpha=8)` from its text, finds the
# sites, and keeps the parameters in a collection of its own, `'peft'`. The same
# numbers are put into its tree: `a [layers, *in, r]` and `b [layers, r, *out]`,
# where `in` and `out` have separate axes for heads.
# %% [markdown] lang="zh"
# ## 与 moepeft 相等
#
# 包从文本 `lora(rank=4, alpha=8)` 构建这个方法，找到各个 site，
# 并把参数放在独立的 collection `'peft'` 里。我们把同样的数放进它的树：
# `a [layers, *in, r]` 和 `b [layers, r, *out]`，
# 其中 `in` 和 `out` 里头是单独的轴。
# %%
built = build(f'lora(rank=4, alpha={ALPHA})', sites(CONFIG))
model = Decoder(CONFIG, built.adapter_map)
shapes = init_params(model, {'inputs': ids}, 0)['peft']['decoder']['layers']
parts = shapes['self'] | shapes['mlp']


def package_tree(lora):
  """{kernel: (A, B)} as the package's collection 'peft'."""
  layers = {'self': {}, 'mlp': {}}
  for name, (a, b) in lora.items():
    like = parts[name]['lora']
    layers['mlp' if name in ('wi', 'wo') else 'self'][name] = {
      'lora': {'a': a.reshape(like['a'].shape), 'b': b.reshape(like['b'].shape)}
    }
  return {'decoder': {'layers': layers}}


def package_params(kernels):
  """(rest, kernels) as the package's 'params': `split` backwards."""
  template = base['params']['decoder']['layers']
  layers = {
    group: {
      name: {'kernel': kernels[name].reshape(part['kernel'].shape)}
      if name in kernels
      else {'scale': rest['norms'][group]}
      for name, part in parts.items()
    }
    for group, parts in template.items()
  }
  return {
    'embed': {'embedding': rest['embed']},
    'positions': {'embedding': rest['positions']},
    'head': {'kernel': rest['head']},
    'decoder': {'layers': layers, 'norm': {'scale': rest['norm']}},
  }


variables = {'params': package_params(kernels), 'peft': package_tree(lora)}
by_package = model.apply(variables, {'inputs': test_inputs})
scale = float(jnp.abs(by_package).max())
np.testing.assert_allclose(beside / scale, by_package / scale, atol=1e-4)


# %%
def package_loss(lora, key):
  inputs, targets = rows(key, SHIFTED)
  variables = {'params': package_params(kernels), 'peft': package_tree(lora)}
  return loss_of(model.apply(variables, {'inputs': inputs}), targets)


half_lora = jax.tree.map(lambda a: a / 2, lora)
key = jax.random.key(3)
for ours, theirs in zip(
  jax.tree.leaves(gradient(half_lora, key)),
  jax.tree.leaves(jax.jit(jax.grad(package_loss))(half_lora, key)),
  strict=True,
):
  size = float(jnp.abs(theirs).max())
  assert size > 0
  np.testing.assert_allclose(ours / size, theirs / size, atol=1e-3)

_, package_merged = split(merge(built, variables))
for name in KERNELS:
  np.testing.assert_allclose(
    merged_kernels[name], package_merged[name], atol=1e-5
  )
assert count_trained(variables['peft'], built, {})[0] == count
print('logits, gradients, merged kernels and the count are equal')


# %% [markdown] lang="en"
# ## Which scale: alpha / r or alpha / sqrt(r)?
#
# How far does the *first* step move the output, as a function of $r$? Only $B$
# moves. Write $M = x^\top G$ for the gradient of the dense $W$, $\eta$ for the
# rate and $\sigma$ for the standard deviation of the entries of $A$.
#
# With SGD, $B_1 = -\eta\, s A^\top M$, and the change of the kernel is
#
# $$
# s A B_1 = -\eta\, s^2 A A^\top M, \qquad \mathbb E[A A^\top] = r \sigma^2 I
# $$
#
# so it is, on average, the dense step $-\eta M$ times $s^2 r \sigma^2$:
# proportional to $1/r$ with $s = \alpha / r$, and independent of $r$ with
# $s = \alpha / \sqrt r$ (rsLoRA, arXiv:2312.03732). With Adam, the first step
# is $B_1 = -\eta\, \mathrm{sign}(A^\top M)$, whatever the scale: the output
# moves by $s\, (xA) B_1$, a sum of $r$ terms. Their signs agree on average, as
# $M$ contains the product of $x$ and $G$ of the same token. So the sum is
# proportional to $s\,r$: independent of $r$ with $\alpha / r$, and $\sqrt r$
# with the other. The next cell measures all four.
# %% [markdown] lang="zh"
# ## 用哪种缩放：alpha / r 还是 alpha / sqrt(r)？
#
# *第一步*让输出移动多远？它怎样依赖于 $r$？此时只有 $B$ 在动。
# 记 $M = x^\top G$，即稠密 $W$ 的梯度；$\eta$ 是学习率，
# $\sigma$ 是 $A$ 的元素的标准差。
#
# 用 SGD 时 $B_1 = -\eta\, s A^\top M$，kernel 的改变量是
#
# $$
# s A B_1 = -\eta\, s^2 A A^\top M, \qquad \mathbb E[A A^\top] = r \sigma^2 I
# $$
#
# 所以平均来说，它是稠密的一步 $-\eta M$ 乘以 $s^2 r \sigma^2$：
# $s = \alpha / r$ 时与 $1/r$ 成正比，$s = \alpha / \sqrt r$ 时与 $r$ 无关
# （rsLoRA，arXiv:2312.03732）。用 Adam 时，第一步是
# $B_1 = -\eta\, \mathrm{sign}(A^\top M)$，与缩放无关：输出移动 $s\, (xA) B_1$，
# 它是 $r$ 项之和。$M$ 里含有同一个 token 的 $x$ 与 $G$ 的乘积，
# 所以各项的符号平均来说一致，和与 $s\,r$ 成正比：
# 用 $\alpha / r$ 时与 $r$ 无关，用另一种时与 $\sqrt r$ 成正比。
# 下一个单元测量全部四种情况。
# %%
def first_step(rank, scale, adam, rng, d=256, tokens=4):
  """The size of the first change of the output, per token and feature."""
  x, g = rng.normal(size=(2, tokens, d))
  a = 0.02 * rng.normal(size=(d, rank))
  grad = scale * a.T @ (x.T @ g)
  b = -np.sign(grad) if adam else -grad
  return np.linalg.norm(scale * (x @ a) @ b)


ranks = np.array([8, 16, 32, 64, 128, 256])
rng = np.random.default_rng(0)
slopes = {}
for adam in (False, True):
  for name, power in (('alpha / r', 1), ('alpha / sqrt(r)', 0.5)):
    sizes = [
      np.mean([first_step(r, 16 / r**power, adam, rng) for _ in range(20)])
      for r in ranks
    ]
    slope = np.polyfit(np.log(ranks), np.log(sizes), 1)[0]
    slopes[adam, name] = slope
    print(
      f'{"Adam" if adam else "SGD":5}{name:16} first change ~ r^{slope:+.2f}'
    )
for key, expected in zip(slopes, (-1, 0, 0, 0.5), strict=True):
  assert abs(slopes[key] - expected) < 0.15, (key, slopes[key])


# %% [markdown] lang="en"
# Each convention makes the first step independent of $r$ for one optimizer:
# $\alpha / \sqrt r$ for SGD, $\alpha / r$ for Adam. The measurement says
# nothing about later steps; the rsLoRA paper argues with the whole training,
# and prefers $\alpha / \sqrt r$ at large ranks. In practice the learning rate
# is chosen again when the rank changes, and $\alpha$ is nothing but a factor of
# the learning rate as long as only $B$ moves. This is also the answer to "which
# alpha": take the value of the source whose learning rate you copy.
#
# ## Exercises
#
# 1. From which rank on does LoRA have as many parameters as the kernel itself?
#    Write `break_even(i, o)`, and check it for `q` and for `wi` with
#    `lora_parameters`.
# 2. Merged weights are often stored in bfloat16, which keeps 8 significant
#    bits. Round `merged_kernels` to bfloat16 and compare with rounding
#    `kernels` to bfloat16 and adding LoRA beside it in float32. Which part of
#    the change is lost? Measure the error of the logits of both, relative to
#    float32, and the same for a change that is 100 times smaller.
# 3. LoRA-FA (arXiv:2308.03303) trains $B$ only and leaves $A$ as it was drawn.
#    Train it at rank 4 and at rank 8 for the same number of steps, and compare
#    with LoRA of rank 4. How many parameters are trained? Check the count with
#    the package's `lora(rank=4, train_a=False)`.
#
# ## Interview questions
#
# **You have fifty customers, each with a LoRA of one base. Merge or not?**
#
# <details><summary>Answer</summary>
#
# Do not merge: fifty merged models are fifty copies of the base. Keep one base
# in memory and apply $x W$ once for the whole batch, and $(xA_i)B_i$ for each
# row's own adapter. A term costs $r(i + o)$ beside $i\,o$ multiplications, so
# the throughput stays near that of the base. Merge where one adapter serves all
# requests for a long time, or where the runtime cannot do adapters. Also note
# that a merge into quantized weights is not exact: it has to be decoded,
# changed and quantized again.
# </details>
#
# **Why does LoRA save most of the optimizer's memory in training, but at most a
# third of the time?**
#
# <details><summary>Answer</summary>
#
# It saves the optimizer's state and the gradients of the frozen kernels: 12 of
# 16 bytes for a parameter in float32. The forward pass still computes $xW$. The
# backward pass still computes $G W^\top$ through every layer, as adapters in
# lower layers need it; only $x^\top G$ of the frozen kernels, a third of a
# dense training step, is left out. Activations stay in memory too, except for
# the inputs of frozen kernels that no adapter reads.
# </details>
#
# ## In the package
#
# - {{moepeft.peft.methods.lora.Lora}} is the module;
#   {{moepeft.peft.methods.lora.merge}} folds it in, and
#   {{moepeft.peft.merge.merge}} does so for every site. Unlike the notebook's
#   version it has dropout, rsLoRA, initial factors from a decomposition of the
#   base's kernel (PiSSA: singular values, arXiv:2404.02948; OLoRA: QR,
#   arXiv:2406.01775), and the mixtures of MoLoRA (arXiv:2309.05444) in the same
#   file.
# - {{moepeft.nn.low_rank_matmul.low_rank_matmul}} computes the two products
#   with a gradient that is fast on CPU.
# - {{moepeft.nn.adapter_hook.apply_adapters}} is what `linear` is here: the
#   place where a frozen layer calls its adapters.
# - {{moepeft.peft.build.build}} turns the text of a method into modules and
#   sites, and {{moepeft.checkpoints.count_parameters.count}} counts without
#   allocating anything.
# - Papers: LoRA arXiv:2106.09685, rsLoRA arXiv:2312.03732, LoRA-FA
#   arXiv:2308.03303.
# %% [markdown] lang="zh"
# 两种约定各让一种优化器的第一步与 $r$ 无关：SGD 是 $\alpha / \sqrt r$，
# Adam 是 $\alpha / r$。这个测量没有涉及后面的步；rsLoRA 论文分析的是整个训练，
# 在秩大时主张 $\alpha / \sqrt r$。实践中，秩一变就要重新选学习率；
# 只要还只有 $B$ 在动，$\alpha$ 就只是学习率的一个因子。
# “alpha 取多少”的答案也在这里：学习率抄自哪里，alpha 就取那里的值。
#
# ## 练习
#
# 1. 秩到多少时，LoRA 的参数就和 kernel 本身一样多？写出 `break_even(i, o)`，
#    并用 `lora_parameters` 对 `q` 和 `wi` 验证。
# 2. 合并后的权重常以 bfloat16 存储，它只有 8 位有效位。
#    把 `merged_kernels` 舍入到 bfloat16，并与另一种做法比较：
#    把 `kernels` 舍入到 bfloat16，旁边用 float32 加上 LoRA。
#    丢失的是改变量的哪一部分？以 float32 为基准测量两者 logits 的误差；
#    再对小 100 倍的改变量做同样的测量。
# 3. LoRA-FA（arXiv:2308.03303）只训练 $B$，$A$ 保持随机初始化时的值。
#    用同样的步数训练秩 4 和秩 8 的 LoRA-FA，与秩 4 的 LoRA 比较。
#    训练了多少参数？用包的 `lora(rank=4, train_a=False)` 核对。
#
# ## 面试题
#
# **你有五十个客户，每个客户在同一个基座上有一个 LoRA。合并还是不合并？**
#
# <details><summary>答案</summary>
#
# 不合并：五十个合并后的模型就是五十份基座。内存里只放一个基座，
# 整个 batch 只算一次 $x W$，每行再加上自己的 $(xA_i)B_i$。
# 一项只需要 $r(i + o)$ 次乘法，而 $xW$ 要 $i\,o$ 次，所以吞吐接近基座。
# 如果长时间只有一个 adapter 服务所有请求，或者运行时不支持 adapter，才合并。
# 另外要注意，合并到量化权重并不精确：必须先解码、修改、再量化。
# </details>
#
# **为什么 LoRA 训练能省下大部分优化器内存，时间却最多只省三分之一？**
#
# <details><summary>答案</summary>
#
# 省下的是冻结 kernel 的优化器状态和梯度：float32 下每个参数 16 字节中的 12 字
# 节。前向仍然要算 $xW$。反向仍然要让 $G W^\top$ 穿过每一层，
# 因为下层的 adapter 需要它；省掉的只有冻结 kernel 的 $x^\top G$，
# 即稠密训练一步的三分之一。激活也还留在内存里，
# 只有那些没有 adapter 读取的冻结 kernel 的输入除外。
# </details>
#
# ## 在 moepeft 中
#
# - {{moepeft.peft.methods.lora.Lora}} 是模块；
#   {{moepeft.peft.methods.lora.merge}} 把它合并进去，
#   {{moepeft.peft.merge.merge}} 对每个 site 这样做。与本 notebook 的版本相比，
#   它还有 dropout、rsLoRA、由基座 kernel 的分解得到的初始因子（PiSSA：奇异值分
#   解，arXiv:2404.02948；OLoRA：QR 分解，arXiv:2406.01775），
#   以及在同一个文件里的 MoLoRA 混合
#   （arXiv:2309.05444）。
# - {{moepeft.nn.low_rank_matmul.low_rank_matmul}} 计算这两个乘积，
#   其梯度在 CPU 上很快。
# - {{moepeft.nn.adapter_hook.apply_adapters}} 就是这里的 `linear`：
#   冻结层在这里调用它的 adapter。
# - {{moepeft.peft.build.build}} 把方法的文本变成模块和 site；
#   {{moepeft.checkpoints.count_parameters.count}} 不分配任何内存就能计数。
# - 论文：LoRA arXiv:2106.09685，rsLoRA arXiv:2312.03732，
#   LoRA-FA arXiv:2308.03303。
# %% [markdown] lang="en" tags=["solution"]
# # Solutions: LoRA by hand
#
# ## Exercise 1
#
# $r(i + o) = i\,o$, so $r = i\,o / (i + o)$: half of $d$ for a square kernel.
# %% [markdown] lang="zh" tags=["solution"]
# # 解答：手写 LoRA
#
# ## 练习 1
#
# $r(i + o) = i\,o$，所以 $r = i\,o / (i + o)$：对方阵就是 $d$ 的一半。
# %% tags=["solution"]
def break_even(i, o):
  return i * o / (i + o)


assert break_even(*SIZES['q']) == 24 and break_even(*SIZES['wi']) == 32
for name in ('q', 'wi'):
  size = SIZES[name]
  rank = int(break_even(*size))
  assert lora_parameters(rank, [size], 1) == size[0] * size[1]
  assert lora_parameters(rank - 1, [size], 1) < size[0] * size[1]


# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 2
#
# bfloat16 rounds each number by up to $2^{-8}$ of itself. The sum is about as
# large as $W$, so its rounding error is as large as that of $W$ alone, and what
# it destroys is a change that is smaller than it: components of $sAB$ below
# $2^{-8} |W|$ are rounded away, or up to a whole step of bfloat16. Beside the
# base the change stays exact.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 2
#
# bfloat16 对每个数的舍入误差最多是它自身的 $2^{-8}$。
# $W + sAB$ 与 $W$ 差不多大，所以它的舍入误差也和 $W$ 自身的一样大；
# 被毁掉的是比这个误差更小的改变量：$sAB$ 中小于 $2^{-8} |W|$ 的分量要么被舍掉，
# 要么被舍入成 bfloat16 的一整步。放在基座旁边时，改变量保持精确。
# %% tags=["solution"]
def to_bf16(tree):
  return jax.tree.map(
    lambda a: a.astype(jnp.bfloat16).astype(jnp.float32), tree
  )


def change_errors(lora):
  """The relative error of the change of W: merged and rounded, beside."""
  whole = merge_by_hand(kernels, lora)['q'] - kernels['q']
  stored = to_bf16(merge_by_hand(kernels, lora))['q'] - to_bf16(kernels)['q']
  return float(jnp.linalg.norm(stored - whole) / jnp.linalg.norm(whole))


def logit_error(linear, lora):
  exact = forward(rest, with_lora(kernels, lora), test_inputs)
  logits = forward(rest, linear, test_inputs)
  return float(jnp.abs(logits - exact).mean() / jnp.abs(exact).mean())


small = {n: (a, b / 100) for n, (a, b) in adapters[4].items()}
for label, each in (('trained', adapters[4]), ('1 / 100', small)):
  inside = plain(to_bf16(merge_by_hand(kernels, each)))
  beside = with_lora(to_bf16(kernels), each)
  print(
    f'{label}: of the change of q {change_errors(each):.3f} is lost; logits: '
    f'merged {logit_error(inside, each):.4f}, '
    f'beside {logit_error(beside, each):.4f}'
  )
assert change_errors(small) > 10 * change_errors(adapters[4])


# %% [markdown] lang="en" tags=["solution"]
# The logits of both have errors of one size, those of the rounded $W$. The
# relative error of the *change* is what grows as the change shrinks.
# %% [markdown] lang="zh" tags=["solution"]
# 两种做法的 logits 误差大小相当，都来自被舍入的 $W$。随着改变量变小而增大的，
# 是*改变量*自身的相对误差。
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 3
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 3
# %% tags=["solution"]
def fixed_a_loss(a_parts):
  def loss(b_parts, key):
    lora = {n: (a_parts[n], b_parts[n]) for n in KERNELS}
    return lora_loss(lora, key)

  return loss


fa_accuracy = {}
for rank in (4, 8):
  start = init_lora(jax.random.key(0), rank)
  a_parts = {n: start[n][0] for n in KERNELS}
  b_parts, fa_losses = train(
    fixed_a_loss(a_parts), {n: start[n][1] for n in KERNELS}, STEPS, 1e-2
  )
  fa_accuracy[rank] = test_accuracy(
    with_lora(kernels, {n: (a_parts[n], b_parts[n]) for n in KERNELS})
  )
  assert fa_losses[-50:].mean() < 0.8 * fa_losses[:5].mean()
print('LoRA', lora_accuracy[4], 'LoRA-FA', fa_accuracy)
fa_built = build('lora(rank=4, train_a=False)', sites(CONFIG))
fa_count = sum(CONFIG.layers * 4 * o for _, o in SIZES.values())
assert count_trained(variables['peft'], fa_built, {})[0] == fa_count
print(f'{fa_count:,} of {count:,} parameters of LoRA are trained')

# SPDX-License-Identifier: Apache-2.0

# %% [markdown] lang="en"
# # Backpropagation by hand
#
# Every model in this course is trained by the same three steps: compute a loss,
# compute its gradient by the chain rule, move the parameters. This notebook
# writes them in NumPy for a multi-layer perceptron: the gradients equal those
# of `jax.grad`, and the optimizers SGD, momentum, Adam and AdamW equal those of
# `optax` and of moepeft. Then a network that is too large for its data
# overfits, and you measure what weight decay and early stopping do about it.
#
# ## What you will understand
#
# - why the gradient of a matrix product is two matrix products, and how shapes
#   tell which
# - why softmax and cross-entropy together have the gradient $p-y$
# - how to test a gradient without a second implementation
# - what momentum and Adam keep in memory, and why Adam corrects a bias
# - what overfitting looks like in the curves, and what weight decay and early
#   stopping change
#
# Time: about 90 minutes. Before it: nothing but NumPy and derivatives.
# %% [markdown] lang="zh"
# # 手写反向传播
#
# 本课程的所有模型都按同样的三步训练：计算损失，用链式法则求梯度，更新参数。
# 本笔记用 NumPy 为一个多层感知机（MLP）实现这三步：梯度与 `jax.grad` 相等，
# SGD、momentum、Adam 和 AdamW 与 `optax` 以及 moepeft 的相等。
# 然后让一个对数据来说过大的网络过拟合，并测量权重衰减（weight decay）
# 和早停（early stopping）的作用。
#
# ## 你将理解什么
#
# - 为什么矩阵乘法的梯度是两个矩阵乘法，怎样由形状看出是哪两个
# - 为什么 softmax 与交叉熵合起来的梯度是 $p-y$
# - 没有第二份实现时怎样检验梯度
# - momentum 和 Adam 在内存里保存什么，Adam 为什么要做偏差修正
# - 过拟合在曲线上是什么样，权重衰减和早停改变了什么
#
# 时间：约 90 分钟。先修：NumPy 和求导。
# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import make_moons

from moepeft.nn.norms import rms_norm
from moepeft.training.optimizers.adamw import adamw

plt.rcParams['figure.dpi'] = 72
rng = np.random.default_rng(0)


# %% [markdown] lang="en"
# ## 1. The network
#
# Letters: $b$ examples of a batch, $i$ inputs and $o$ outputs of a layer, $v$
# classes. A layer with weights $W$ `[i, o]` and bias $\beta$ computes
# $z=xW+\beta$ and then $\max(z,0)$ (ReLU). Without the ReLU, any number of
# layers would be one matrix: $xW_1W_2=x(W_1W_2)$. The last layer gives logits
# $z\in\mathbb{R}^{b\times v}$; $y_b$ is the class of example $b$, and the loss
# is the mean cross-entropy
#
# $$L=-\frac1b\sum_{b}\log p_{b,y_b},\qquad p=\mathrm{softmax}(z).$$
#
# The forward pass keeps the input of each layer, because the backward pass
# needs it.
# %% [markdown] lang="zh"
# ## 1. 网络
#
# 字母：$b$ 为 batch 中的样本数，$i$、$o$ 为一层的输入和输出维度，$v$ 为类别数。
# 权重为 $W$ `[i, o]`、偏置为 $\beta$ 的一层先算 $z=xW+\beta$，再算 $\max(z,0)$
# （ReLU）。没有 ReLU，多少层都等于一个矩阵：$xW_1W_2=x(W_1W_2)$。
# 最后一层给出 logits $z\in\mathbb{R}^{b\times v}$；$y_b$ 是样本 $b$ 的类别，
# 损失是平均交叉熵
#
# $$L=-\frac1b\sum_{b}\log p_{b,y_b},\qquad p=\mathrm{softmax}(z).$$
#
# 前向计算保存每一层的输入，因为反向计算要用。
# %%
def make_params(sizes, rng):
  """Weights of variance 2 / inputs (He), biases 0; section 4 says why."""
  return [
    {'w': rng.standard_normal((i, o)) * np.sqrt(2 / i), 'b': np.zeros(o)}
    for i, o in zip(sizes, sizes[1:], strict=False)
  ]


def forward(params, x):
  """Logits [b, v] and the input of each layer."""
  inputs = []
  for n, layer in enumerate(params):
    inputs.append(x)
    x = x @ layer['w'] + layer['b']
    if n < len(params) - 1:
      x = np.maximum(x, 0)
  return x, inputs


def log_softmax(z):
  z = z - z.max(-1, keepdims=True)
  return z - np.log(np.exp(z).sum(-1, keepdims=True))


def loss(params, x, y):
  z, _ = forward(params, x)
  return -log_softmax(z)[np.arange(len(y)), y].mean()


x, y = rng.standard_normal((8, 5)), rng.integers(0, 3, 8)
params = make_params((5, 16, 16, 3), rng)
print(f'loss {loss(params, x, y):.3f}; guessing: {np.log(3):.3f}')


# %% [markdown] lang="en"
# ## 2. The backward pass
#
# Write $\bar a=\partial L/\partial a$, of the same shape as $a$. The chain rule
# goes from the loss to the inputs.
#
# *Softmax and cross-entropy.* For one example $L=-z_y+\log\sum_je^{z_j}$, so
#
# $$\bar z_j=\frac{e^{z_j}}{\sum_ke^{z_k}}-[j=y]=p_j-[j=y]$$
#
# (divided by $b$ for the mean), where $[j=y]$ is 1 if $j=y$ and else 0: the
# predicted probabilities minus the one-hot label.
#
# *Linear layer.* From $z_{bo}=\sum_ix_{bi}W_{io}+\beta_o$,
#
# $$\bar W_{io}=\sum_bx_{bi}\bar z_{bo},\quad
# \bar\beta_o=\sum_b\bar z_{bo},\quad
# \bar x_{bi}=\sum_o\bar z_{bo}W_{io},$$
#
# that is $\bar W=x^\top\bar z$ and $\bar x=\bar zW^\top$. Shapes remove all
# doubt: $\bar W$ is $[i,o]$, and $[i,b][b,o]$ is the only product of $x$ and
# $\bar z$ of that shape.
#
# *ReLU.* Its derivative is 1 where its output is positive and else 0.
#
# One backward pass gives the gradient with respect to *all* parameters, and
# costs two products per layer where the forward pass has one.
# %% [markdown] lang="zh"
# ## 2. 反向计算
#
# 记 $\bar a=\partial L/\partial a$，形状与 $a$ 相同。链式法则从损失走向输入。
#
# *Softmax 与交叉熵。* 对一个样本，$L=-z_y+\log\sum_je^{z_j}$，所以
#
# $$\bar z_j=\frac{e^{z_j}}{\sum_ke^{z_k}}-[j=y]=p_j-[j=y]$$
#
# （取平均时再除以 $b$），其中 $[j=y]$ 在 $j=y$ 时为 1，否则为 0：
# 即预测概率减去 one-hot 标签。
#
# *线性层。* 由 $z_{bo}=\sum_ix_{bi}W_{io}+\beta_o$ 得
#
# $$\bar W_{io}=\sum_bx_{bi}\bar z_{bo},\quad
# \bar\beta_o=\sum_b\bar z_{bo},\quad
# \bar x_{bi}=\sum_o\bar z_{bo}W_{io},$$
#
# 即 $\bar W=x^\top\bar z$，$\bar x=\bar zW^\top$。形状可以消除一切疑问：
# $\bar W$ 是 $[i,o]$，而 $x$ 与 $\bar z$ 的乘积中只有 $[i,b][b,o]$ 是这个形状。
#
# *ReLU。* 输出为正处导数为 1，其余为 0。
#
# 一次反向计算就得到对*所有*参数的梯度；前向每层一个矩阵乘法，反向每层两个。
# %%
def backward(params, x, y):
  """The loss and its gradient, a list of {'w', 'b'} like params."""
  z, inputs = forward(params, x)
  log_p = log_softmax(z)
  rows = np.arange(len(y))
  grad = np.exp(log_p)
  grad[rows, y] -= 1
  grad /= len(y)  # [b, v], the gradient of the logits
  result = []
  for layer, a in zip(params[::-1], inputs[::-1], strict=True):
    result.append({'w': a.T @ grad, 'b': grad.sum(0)})
    # The layer's input is the ReLU's output below it (x at the bottom).
    grad = (grad @ layer['w'].T) * (a > 0)
  return -log_p[rows, y].mean(), result[::-1]


value, grads = backward(params, x, y)
assert np.isclose(value, loss(params, x, y))


# %% [markdown] lang="en"
# ## 3. Two independent checks
#
# *Finite differences.*
# $\partial L/\partial w\approx(L(w+\epsilon)-L(w-\epsilon))/2\epsilon$. The
# error of the formula is of order $\epsilon^2$, that of rounding of order
# $10^{-16}/\epsilon$; with $\epsilon=10^{-5}$ they are about $10^{-10}$ and
# $10^{-11}$. This needs two forward passes for *each* parameter, so it is a
# test and no way to train.
#
# *`jax.grad`.* JAX differentiates the forward pass as written in its own NumPy.
# It computes in float32, so about six digits agree.
# %% [markdown] lang="zh"
# ## 3. 两种独立的检验
#
# *有限差分。*
# $\partial L/\partial w\approx(L(w+\epsilon)-L(w-\epsilon))/2\epsilon$。
# 公式误差是 $\epsilon^2$ 量级，舍入误差是 $10^{-16}/\epsilon$ 量级；取
# $\epsilon=10^{-5}$ 时分别约为 $10^{-10}$ 和 $10^{-11}$。
# *每个*参数要做两次前向计算，所以它只能用来测试，不能用来训练。
#
# *`jax.grad`。* JAX 对用它自己的 NumPy 写出的前向计算求导。它用 float32 计算，
# 所以约有六位数字一致。
# %%
def finite_difference(params, n, name, index, epsilon=1e-5):
  array, values = params[n][name], []
  start = array[index]
  for sign in (1, -1):
    array[index] = start + sign * epsilon
    values.append(loss(params, x, y))
  array[index] = start
  return (values[0] - values[1]) / (2 * epsilon)


for n in range(3):
  for name in 'wb':
    for index in (0, params[n][name].size // 2):
      index = np.unravel_index(index, params[n][name].shape)
      expected = finite_difference(params, n, name, index)
      got = grads[n][name][index]
      assert abs(got - expected) < 1e-8, f'layer {n}, {name}{index}'


def jax_loss(params, x, y):
  for layer in params[:-1]:
    x = jax.nn.relu(x @ layer['w'] + layer['b'])
  z = x @ params[-1]['w'] + params[-1]['b']
  return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()


def largest_difference(a, b):
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return max(float(np.abs(p - q).max()) for p, q in pairs)


difference = largest_difference(grads, jax.grad(jax_loss)(params, x, y))
print(f'largest difference from jax.grad: {difference:.0e}')
assert difference < 1e-6, 'which layer differs first, seen from the loss?'
# %% [markdown] lang="en"
# What does training cost? The forward product of $[b,i]$ and $[i,o]$ has
# $2\,b\,i\,o$ FLOPs, i.e. 2 per weight and example; the backward pass has two
# such products (the lowest layer only one: nobody needs the gradient of the
# data). So training costs about 6 FLOPs per parameter and example, the "6ND" of
# scaling laws (N parameters, D examples; for a language model, D counts
# tokens). XLA's count of the compiled program agrees:
# %% [markdown] lang="zh"
# 训练的代价是多少？$[b,i]$ 与 $[i,o]$ 的前向乘积是 $2\,b\,i\,o$ FLOPs，
# 即每个权重、每个样本 2 次；反向有两个这样的乘积（最底层只有一个：
# 没人需要数据的梯度）。所以训练约为每个参数、每个样本 6 FLOPs，即 scaling law
# 里的“6ND”（N 是参数量，D 是样本数；对语言模型，D 是 token 数）。
# XLA 对编译后程序的计数与此一致：
# %%
sizes, batch = (256, 256, 256, 256), 128
shapes = jax.eval_shape(
  lambda: jax.tree.map(jnp.asarray, make_params(sizes, rng))
)
inputs = jax.ShapeDtypeStruct((batch, 256), jnp.float32)
labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
compiled = jax.jit(jax.grad(jax_loss)).lower(shapes, inputs, labels).compile()
layer_flops = 2 * batch * 256 * 256
expected = 3 * 3 * layer_flops - layer_flops
ratio = compiled.cost_analysis()['flops'] / expected
print(f'XLA / formula: {ratio:.3f}')
assert 1 <= ratio < 1.05, 'three products a layer, less one at the bottom'
# %% [markdown] lang="en"
# ## 4. Initial weights
#
# If the $W_{io}$ are independent, with mean 0 and variance $\sigma^2$, a layer
# multiplies the mean square of its inputs by $i\,\sigma^2$, and the ReLU halves
# it. Over 20 layers the factor is $(i\sigma^2/2)^{20}$. Only $\sigma^2=2/i$ (He
# et al., arXiv:1502.01852) keeps it near 1:
# %% [markdown] lang="zh"
# ## 4. 初始权重
#
# 若 $W_{io}$ 相互独立、均值为 0、方差为 $\sigma^2$，一层会把输入的均方乘以
# $i\,\sigma^2$，ReLU 再减半。20 层后的因子是 $(i\sigma^2/2)^{20}$。只有
# $\sigma^2=2/i$（He 等，arXiv:1502.01852）使它保持在 1 附近：
# %%
wide = rng.standard_normal((256, 256))  # 256 examples with 256 inputs
for factor in (1.0, 2.0, 4.0):
  a = wide
  for _ in range(20):
    w = rng.standard_normal((256, 256)) * np.sqrt(factor / 256)
    a = np.maximum(a @ w, 0)
  size = (a**2).mean()
  print(
    f'variance {factor:.0f} / i: mean square after 20 layers {size:.1e}, '
    f'expected {(factor / 2) ** 20:.1e}'
  )
  # The product of 20 random factors varies, so compare orders of magnitude.
  assert abs(np.log10(size / (factor / 2) ** 20)) < 1


# %% [markdown] lang="en"
# ## 5. Optimizers
#
# All of them take the gradient $g$ of a parameter $w$ and give a step, with the
# learning rate $\eta$. $\mu$, $\beta_1$ and $\beta_2$ are constants below 1
# (usually 0.9, 0.9 and 0.999), $\lambda$ is the weight decay, $\hat m$ and
# $\hat v$ are defined below, and a small $\epsilon$ is added to
# $\sqrt{\hat v}$:
#
# | name | state | step |
# | --- | --- | --- |
# | SGD | none | $-\eta g$ |
# | momentum | $m\leftarrow\mu m+g$ | $-\eta m$ |
# | Adam | $m\leftarrow\beta_1m+(1-\beta_1)g$ | $-\eta\,\hat m/\sqrt{\hat v}$ |
# | | $v\leftarrow\beta_2v+(1-\beta_2)g^2$ | |
# | AdamW | as Adam | Adam's, and $-\eta\lambda w$ |
#
# *Momentum* sums past gradients: for a constant $g$, $m$ tends to $g/(1-\mu)$,
# so $\mu=0.9$ means ten times the rate in directions that persist, while
# alternating ones cancel. *Adam* divides by the root mean square of each
# parameter's gradients, so that steps have about the size $\eta$ whatever the
# scale of the loss. Both means start at 0, hence too small: after $n$ steps of
# a constant $g$, $m=(1-\beta_1^n)\,g$. Dividing by that factor,
# $\hat m=m/(1-\beta_1^n)$ and $\hat v=v/(1-\beta_2^n)$, removes the bias.
# %% [markdown] lang="zh"
# ## 5. 优化器
#
# 它们都接收参数 $w$ 的梯度 $g$，给出一步，学习率为 $\eta$。
# $\mu$、$\beta_1$、$\beta_2$ 是小于 1 的常数（通常为 0.9、0.9、0.999），
# $\lambda$ 是权重衰减，$\hat m$ 和 $\hat v$ 在下面定义，另给 $\sqrt{\hat v}$
# 加上一个很小的 $\epsilon$：
#
# | 名称 | 状态 | 步 |
# | --- | --- | --- |
# | SGD | 无 | $-\eta g$ |
# | momentum | $m\leftarrow\mu m+g$ | $-\eta m$ |
# | Adam | $m\leftarrow\beta_1m+(1-\beta_1)g$ | $-\eta\,\hat m/\sqrt{\hat v}$ |
# | | $v\leftarrow\beta_2v+(1-\beta_2)g^2$ | |
# | AdamW | 同 Adam | Adam 的步，再加 $-\eta\lambda w$ |
#
# *Momentum* 累加过去的梯度：$g$ 恒定时，$m$ 趋于 $g/(1-\mu)$，所以 $\mu=0.9$
# 在方向一致处相当于十倍学习率，而来回振荡的分量互相抵消。*Adam*
# 除以每个参数梯度的均方根，所以不论损失的尺度如何，每步大小约为 $\eta$。
# 两个平均值都从 0 开始，因而偏小：$g$ 恒定时走 $n$ 步后 $m=(1-\beta_1^n)\,g$。
# 除以这个因子，$\hat m=m/(1-\beta_1^n)$，$\hat v=v/(1-\beta_2^n)$，
# 就消除了偏差。
# %%
def sgd(lr):
  return lambda w, g, state: (w - lr * g, state)


def momentum(lr, mu=0.9):
  def step(w, g, state):
    m = mu * state.get('m', 0) + g
    return w - lr * m, {'m': m}

  return step


def adam(lr, b1=0.9, b2=0.999, epsilon=1e-8, decay=0.0):
  def step(w, g, state):
    n = state.get('n', 0) + 1
    m = b1 * state.get('m', 0) + (1 - b1) * g
    v = b2 * state.get('v', 0) + (1 - b2) * g * g
    scaled = m / (1 - b1**n) / (np.sqrt(v / (1 - b2**n)) + epsilon)
    return w - lr * (scaled + decay * w), {'n': n, 'm': m, 'v': v}

  return step


def update(params, grads, states, step):
  """One step for all arrays; states is a list of {'w': {...}, 'b': {...}}."""
  new_params, new_states = [], []
  for layer, grad, state in zip(params, grads, states, strict=True):
    both = {k: step(layer[k], grad[k], state[k]) for k in layer}
    new_params.append({k: w for k, (w, _) in both.items()})
    new_states.append({k: s for k, (_, s) in both.items()})
  return new_params, new_states


def empty_states(params):
  return [{k: {} for k in layer} for layer in params]


# %% [markdown] lang="en"
# Each is compared with `optax` on 50 steps of the network above, AdamW also
# with the function that moepeft trains with. Both start from the same
# parameters and compute gradients with `backward`, each at its own parameters,
# so any error of the state would add up over the steps.
# %% [markdown] lang="zh"
# 每个优化器都在上面的网络上与 `optax` 比较 50 步，AdamW 还与 moepeft
# 训练时用的函数比较。两边从同样的参数出发，各在自己的参数处用 `backward`
# 求梯度，所以状态中的任何错误都会在这些步中累积起来。
# %%
PAIRS = {
  'SGD': (sgd(0.1), optax.sgd(0.1)),
  'momentum': (momentum(0.02), optax.sgd(0.02, momentum=0.9)),
  'Adam': (adam(0.01), optax.adam(0.01)),
  'AdamW': (adam(0.01, decay=0.1), optax.adamw(0.01, weight_decay=0.1)),
  'AdamW of moepeft': (
    adam(0.01, b2=0.95, decay=0.1),
    adamw(lambda step: 0.01, 0.1, 0.9, 0.95),
  ),
}
for name, (step, optimizer) in PAIRS.items():
  hand, states = params, empty_states(params)
  reference = jax.tree.map(lambda a: np.asarray(a, np.float32), params)
  state = optimizer.init(reference)
  for _ in range(50):
    _, grads = backward(hand, x, y)
    hand, states = update(hand, grads, states, step)
    _, grads = backward(reference, x, y)
    updates, state = optimizer.update(grads, state, reference)
    reference = jax.tree.map(
      np.asarray, optax.apply_updates(reference, updates)
    )
  difference = largest_difference(hand, reference)
  print(
    f'{name:17} loss {loss(params, x, y):.3f} -> {loss(hand, x, y):.3f}, '
    f'difference {difference:.0e}'
  )
  # Float32 against float64 over 50 steps; a wrong formula differs by > 1e-2.
  assert difference < 1e-3, name
# %% [markdown] lang="en"
# A valley that is 30 times steeper across than along shows why momentum and
# Adam help: $L=\frac12(w_1^2+30\,w_2^2)$. SGD diverges across the valley if
# $\eta>2/30$, and with a smaller $\eta$ it is slow along $w_1$. In the figure
# $w_2$ is the vertical axis, each dot is a step, and the number beside the name
# is $\eta$.
# %% [markdown] lang="zh"
# 一个横向比纵向陡 30 倍的山谷可以说明 momentum 和 Adam 为什么有用：
# $L=\frac12(w_1^2+30\,w_2^2)$。$\eta>2/30$ 时 SGD（在横向）发散，而小于它时沿
# $w_1$ 只能慢慢挪动。图中纵轴是 $w_2$，每个点是一步，名称旁的数字是 $\eta$。
# %%
curvature = np.array([1.0, 30.0])
fig, axes = plt.subplots(1, 3, figsize=(7, 2.2), sharey=True)
grid = np.meshgrid(np.linspace(-2.2, 1, 60), np.linspace(-0.8, 0.8, 40))
height = (curvature[0] * grid[0] ** 2 + curvature[1] * grid[1] ** 2) / 2
ends = {}
for axis, (name, step) in zip(
  axes,
  {
    'SGD, 0.03': sgd(0.03),
    'momentum, 0.03': momentum(0.03, 0.7),
    'Adam, 0.2': adam(0.2),
  }.items(),
  strict=True,
):
  w, state, track = np.array([-2.0, 0.6]), {}, []
  for _ in range(40):
    track.append(w)
    w, state = step(w, curvature * w, state)
  ends[name] = curvature @ w**2 / 2
  axis.contour(*grid, height, levels=[0.1, 0.5, 1.5, 4, 8], linewidths=0.5)
  axis.plot(*np.array(track).T, '.-', ms=4, lw=1, color='C3')
  axis.set(title=name, xlabel='$w_1$')
fig.tight_layout()
print({name: f'{value:.1e}' for name, value in ends.items()})
assert ends['momentum, 0.03'] < ends['SGD, 0.03'] / 10
w = np.array([-2.0, 0.6])
for _ in range(40):
  w, _ = sgd(0.07)(w, curvature * w, {})
assert abs(w[1]) > 0.6, 'above 2 / 30 SGD diverges across the valley'


# %% [markdown] lang="en"
# ## 6. Overfitting
#
# Two classes, "moons" in the plane, with so much noise that no rule is right
# everywhere. There are 40 training points and a network with thousands of
# parameters. Three sets: *training* points are fitted, *validation* points
# choose (when to stop, how much decay), *test* points are looked at once, at
# the end, for an honest number.
# %% [markdown] lang="zh"
# ## 6. 过拟合
#
# 平面上的两类“月牙”，噪声大到没有任何规则处处正确。训练点 40 个，
# 网络有几千个参数。三个集合：*训练*点用来拟合；*验证*点用来选择（何时停、
# 衰减多大）；*测试*点只在最后看一次，得到诚实的数字。
# %%
def moons(count, seed):
  return make_moons(count, noise=0.35, random_state=seed)


training, validation, test = moons(40, 1), moons(500, 2), moons(2000, 3)
SIZES, STEPS = (2, 48, 48, 2), 1200


def fit(decay, steps=STEPS):
  """Losses [steps, 2] and the parameters of each 20th step."""
  params = make_params(SIZES, np.random.default_rng(5))
  states, step = empty_states(params), adam(0.005, decay=decay)
  losses, saved = [], []
  for n in range(steps):
    value, grads = backward(params, *training)
    if n % 20 == 0:
      losses.append((value, loss(params, *validation)))
      saved.append(params)
    params, states = update(params, grads, states, step)
  return np.array(losses), saved


DECAYS = (0.0, 0.3, 1.0, 3.0)
runs = {decay: fit(decay) for decay in DECAYS}
losses, saved = runs[0.0]
best = losses[:, 1].argmin()
count = sum(a.size for a in jax.tree.leaves(saved[0]))
print(
  f'{count} parameters, {len(training[1])} points; lowest validation loss '
  f'{losses[best, 1]:.3f} at step {best * 20}, at the end '
  f'{losses[-1, 1]:.3f}'
)
assert losses[-1, 0] < 0.1, 'the network should fit the training points'
assert losses[-1, 1] > 1.5 * losses[best, 1], 'it should overfit'
# %%
fig, axes = plt.subplots(1, 2, figsize=(7, 2.6))
for decay, color in ((0.0, 'C3'), (1.0, 'C0')):
  curve = runs[decay][0]
  steps = np.arange(len(curve)) * 20
  axes[0].plot(steps, curve[:, 0], '--', color=color, lw=1)
  axes[0].plot(steps, curve[:, 1], color=color, label=f'decay {decay}')
axes[0].axvline(best * 20, color='gray', lw=1, ls=':')
axes[0].set(
  title='validation (line), training (dashed)', xlabel='step', ylim=(0, 1.5)
)
axes[0].legend(fontsize=8)
grid = np.meshgrid(np.linspace(-2, 3, 80), np.linspace(-1.6, 2, 60))
points = np.stack(grid, -1).reshape(-1, 2)
for params, color in ((saved[-1], 'C3'), (saved[best], 'C0')):
  z, _ = forward(params, points)
  side = (z[:, 1] - z[:, 0]).reshape(grid[0].shape)
  axes[1].contour(*grid, side, levels=[0], colors=color)
axes[1].scatter(
  *training[0].T, c=training[1], cmap='gray', edgecolors='k', s=15
)
axes[1].set(title='boundary: last step red, early stop blue')
fig.tight_layout()


# %% [markdown] lang="en"
# The training loss goes to zero while the validation loss falls and then rises:
# the network becomes certain of points that are noise. *Early stopping* takes
# the parameters of the lowest validation loss. *Weight decay* pulls weights to
# zero all the time, so that logits cannot grow without limit. Both are chosen
# by validation points; the test points judge.
# %% [markdown] lang="zh"
# 训练损失趋于零，而验证损失先降后升：网络对噪声点也变得确信。
# *早停*取验证损失最低时的参数。*权重衰减*始终把权重拉向零，使 logits
# 不能无限增长。两者都由验证点选择，由测试点评判。
# %%
def report(name, params):
  z, _ = forward(params, test[0])
  accuracy = (z.argmax(-1) == test[1]).mean()
  value = loss(params, *test)
  print(f'{name:22} test loss {value:.3f}, accuracy {accuracy:.3f}')
  return value


last_of = {decay: run[0][-1, 1] for decay, run in runs.items()}
chosen = min(last_of, key=last_of.get)
test_loss = {
  'last step': report('last step, no decay', saved[-1]),
  'early': report(f'early stop at {best * 20}', saved[best]),
  'decay': report(f'last step, decay {chosen}', runs[chosen][1][-1]),
}
assert test_loss['early'] < test_loss['last step']
assert test_loss['decay'] < test_loss['last step']
assert chosen == max(DECAYS), 'the choice is at the end of the list'


# %% [markdown] lang="en"
# Read the last column too. The loss improves much more than the accuracy:
# overfitting here means false confidence first of all. If you only look at
# accuracy, you may see nothing. And where the largest decay of the list is
# chosen, as here, the list should be longer.
#
# ## Exercises
#
# 1. *Another activation.* Replace the ReLU by $\tanh$ in a copy of `forward`
#    and `backward`, and check the gradient with `jax.grad`. The derivative of
#    $a=\tanh z$ is $1-a^2$, so the kept outputs are enough.
# 2. *Gradient accumulation.* A batch of 8 does not fit into memory, so it is
#    computed in parts of 5 and 3. Combine the two gradients so that the result
#    equals that of the whole batch. What goes wrong if you take their mean?
# 3. *Backward of RMSNorm.* For $y=x\cdot g/\sqrt{\mathrm{mean}(x^2)+\epsilon}$
#    derive $\bar x$ and $\bar g$ for $x$ `[b, d]`, $g$ `[d]`, and compare with
#    `jax.vjp` of `moepeft.nn.norms.rms_norm`.
#
# ## Interview questions
#
# **What is the difference between L2 regularization and decoupled weight decay
# in Adam?**
#
# <details><summary>Answer</summary>
#
# L2 adds $\lambda w$ to the gradient, so Adam divides it by $\sqrt{\hat v}$
# like the rest: parameters with large gradients are hardly decayed. AdamW
# (arXiv:1711.05101) subtracts $\eta\lambda w$ beside the adaptive step, so all
# weights shrink at the same relative speed and $\lambda$ can be tuned nearly
# independently of the gradients' scale. For plain SGD both are the same up to a
# factor $\eta$. Norm scales and biases are usually excluded.
#
# </details>
#
# **How much memory does training with Adam need per parameter, and what does
# LoRA change?**
#
# <details><summary>Answer</summary>
#
# In float32: weight 4, gradient 4, $m$ 4, $v$ 4: 16 bytes, plus activations.
# Mixed precision with a float32 master copy is also about 16 (2 + 2 + 4 + 4 +
# 4). A 7B model needs 112 GB before activations. With frozen weights there is
# no gradient, $m$ or $v$ for them: 2 bytes per base parameter (less if
# quantized) and 16 per adapter parameter. Activations stay: the chain rule
# still passes through every frozen layer, although $\bar W$ is not computed (a
# third of the FLOPs saved).
#
# </details>
#
# ## In the package
#
# - {{moepeft.training.step.make_train_step}}: loss, gradient with respect to
#   the trained collection only, update; jitted as one program.
# - {{moepeft.training.optimizers.adamw.adamw}} and
#   {{moepeft.training.optimizers.adafactor}}: the optimizers, with rates and
#   decay by parameter pattern in {{moepeft.training.optimizers.groups}}.
# - {{moepeft.training.grad_accumulation}}: exercise 2 with parts that are
#   weighted by their tokens, and with the routers' statistics.
# - {{moepeft.training.callbacks.early_stopping}}: early stopping on validation
#   sets.
# - {{moepeft.nn.mlp.Mlp}}: the feed-forward layer of transformers, mostly
#   gated.
#
# Papers: Adam 1412.6980, AdamW 1711.05101, He initialization 1502.01852,
# Adafactor 1804.04235.
# %% [markdown] lang="zh"
# 也要看最后一列。损失的改善远大于准确率：这里的过拟合首先是错误的自信。
# 只看准确率，可能什么也看不出来。另外，若选中的衰减是列表中最大的（如这里），
# 就应该把列表加长。
#
# ## 练习
#
# 1. *换激活函数。* 复制 `forward` 和 `backward`，把 ReLU 换成 $\tanh$，用
#    `jax.grad` 检验梯度。$a=\tanh z$ 的导数是 $1-a^2$，所以保存输出就够了。
# 2. *梯度累积。* 8 个样本的 batch 内存放不下，分成 5 个和 3 个计算。
#    把两个梯度组合起来，使结果等于整个 batch 的梯度。直接取平均会怎样？
# 3. *RMSNorm 的反向。* 对 $y=x\cdot g/\sqrt{\mathrm{mean}(x^2)+\epsilon}$，$x$
#    为 `[b, d]`，$g$ 为 `[d]`，推导 $\bar x$ 和 $\bar g$，并与
#    `moepeft.nn.norms.rms_norm` 的 `jax.vjp` 比较。
#
# ## 面试题
#
# **Adam 中 L2 正则与解耦的权重衰减有何不同？**
#
# <details><summary>答案</summary>
#
# L2 把 $\lambda w$ 加进梯度，于是 Adam 也把它除以 $\sqrt{\hat v}$：
# 梯度大的参数几乎不衰减。AdamW（arXiv:1711.05101）在自适应步之外减去
# $\eta\lambda w$，所有权重以相同的相对速度收缩，$\lambda$
# 几乎可以独立于梯度尺度来调。对普通 SGD，两者只差一个因子 $\eta$。norm 的 scale
# 和偏置通常不衰减。
#
# </details>
#
# **用 Adam 训练时每个参数需要多少内存？LoRA 改变了什么？**
#
# <details><summary>答案</summary>
#
# float32：权重 4、梯度 4、$m$ 4、$v$ 4，共 16 字节，另加激活。混合精度带
# float32 主副本也约 16 字节（2 + 2 + 4 + 4 + 4）。7B 模型在激活之外就需要 112
# GB。冻结的权重没有梯度、$m$ 和 $v$：基座每个参数 2 字节（量化后更少），
# 适配器每个参数 16 字节。激活仍在：链式法则仍要穿过每个冻结层，只是不计算
# $\bar W$（省下三分之一的 FLOPs）。
#
# </details>
#
# ## 在 moepeft 中
#
# - {{moepeft.training.step.make_train_step}}：损失、只对可训练集合的梯度、
#   更新，编译成一个程序。
# - {{moepeft.training.optimizers.adamw.adamw}} 与
#   {{moepeft.training.optimizers.adafactor}}：优化器；
#   {{moepeft.training.optimizers.groups}} 按参数名模式设置学习率和衰减。
# - {{moepeft.training.grad_accumulation}}：练习 2 的完整版，按各部分的 token
#   数加权，并含路由器统计。
# - {{moepeft.training.callbacks.early_stopping}}：按验证集早停。
# - {{moepeft.nn.mlp.Mlp}}：transformer 的前馈层，多为门控形式。
#
# 论文：Adam 1412.6980，AdamW 1711.05101，He 初始化 1502.01852，Adafactor
# 1804.04235。
# %% [markdown] lang="en" tags=["solution"]
# # Backpropagation by hand: solutions
#
# ## Exercise 1
# %% [markdown] lang="zh" tags=["solution"]
# # 手写反向传播：答案
#
# ## 练习 1
# %% tags=["solution"]
def tanh_backward(params, x, y):
  inputs = [x]
  for layer in params[:-1]:
    inputs.append(np.tanh(inputs[-1] @ layer['w'] + layer['b']))
  z = inputs[-1] @ params[-1]['w'] + params[-1]['b']
  grad = (np.exp(log_softmax(z)) - np.eye(z.shape[-1])[y]) / len(y)
  result = []
  for layer, a in zip(params[::-1], inputs[::-1], strict=True):
    result.append({'w': a.T @ grad, 'b': grad.sum(0)})
    grad = (grad @ layer['w'].T) * (1 - a**2)
  return result[::-1]


def tanh_loss(params, x, y):
  for layer in params[:-1]:
    x = jnp.tanh(x @ layer['w'] + layer['b'])
  z = x @ params[-1]['w'] + params[-1]['b']
  return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()


params = make_params((5, 16, 16, 3), rng)
expected = jax.grad(tanh_loss)(params, x, y)
assert largest_difference(tanh_backward(params, x, y), expected) < 1e-6
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 2
#
# The gradient of a mean over 8 examples is the sum over examples divided by 8,
# so parts are weighted by their sizes. The mean of the two means gives each
# example of the small part the weight $1/6$ instead of $1/8$.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 2
#
# 8 个样本平均的梯度等于各样本之和除以 8，所以各部分按大小加权。
# 直接对两个平均再取平均，小的那部分每个样本的权重成了 $1/6$，而不是 $1/8$。
# %% tags=["solution"]
_, whole = backward(params, x, y)
_, one = backward(params, x[:5], y[:5])
_, two = backward(params, x[5:], y[5:])
weighted = jax.tree.map(lambda a, b: (5 * a + 3 * b) / 8, one, two)
assert largest_difference(weighted, whole) < 1e-12
plain_mean = jax.tree.map(lambda a, b: (a + b) / 2, one, two)
assert largest_difference(plain_mean, whole) > 1e-3
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 3
#
# With $s=(\mathrm{mean}(x^2)+\epsilon)^{-1/2}$ and $n=xs$, $y=ng$:
# $\bar g=\sum_b\bar y\,n$ and $\bar n=\bar y\,g$. Since
# $\partial s/\partial x_j=-s^3x_j/d$,
#
# $$\bar x_j=s\,\bar n_j-\frac{s^3x_j}{d}\sum_i\bar n_ix_i
# =s\,\big(\bar n_j-n_j\,\mathrm{mean}_i(\bar n_in_i)\big).$$
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 3
#
# 设 $s=(\mathrm{mean}(x^2)+\epsilon)^{-1/2}$，$n=xs$，$y=ng$：
# $\bar g=\sum_b\bar y\,n$，$\bar n=\bar y\,g$。由于
# $\partial s/\partial x_j=-s^3x_j/d$，
#
# $$\bar x_j=s\,\bar n_j-\frac{s^3x_j}{d}\sum_i\bar n_ix_i
# =s\,\big(\bar n_j-n_j\,\mathrm{mean}_i(\bar n_in_i)\big).$$
# %% tags=["solution"]
a, scale, grad = (rng.standard_normal(shape) for shape in ((4, 7), 7, (4, 7)))
s = 1 / np.sqrt((a**2).mean(-1, keepdims=True) + 1e-6)
normed, grad_normed = a * s, grad * scale
grad_scale = (grad * normed).sum(0)
mean = (grad_normed * normed).mean(-1, keepdims=True)
grad_a = s * (grad_normed - normed * mean)
_, pull = jax.vjp(
  lambda a, scale: rms_norm(a, scale, 1e-6),
  jnp.asarray(a, jnp.float32),
  jnp.asarray(scale, jnp.float32),
)
expected = pull(jnp.asarray(grad, jnp.float32))
assert largest_difference((grad_a, grad_scale), expected) < 1e-5

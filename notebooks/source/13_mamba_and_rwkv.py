# SPDX-License-Identifier: Apache-2.0
# %% [markdown] lang="en"
# # Beyond attention: Mamba and RWKV
#
# Attention keeps every token; a recurrent model keeps a state of constant size.
# Mamba and RWKV are recurrent models that can be trained in parallel like a
# transformer. You write both from their equations, show that the parallel and
# the sequential form agree, count their cost, and train them beside attention
# on a task that asks for exactly what a constant state is bad at.
# %% [markdown] lang="zh"
# # attention 之外：Mamba 与 RWKV
#
# Attention 保留每一个 token；循环模型只保留大小固定的状态。Mamba 和 RWKV
# 是可以像 transformer 一样并行训练的循环模型。本篇由公式写出两者，
# 验证并行形式与逐步形式的结果一致，计算开销，再与 attention
# 一起在一个任务上训练，这个任务恰好是固定大小的状态不擅长的。
# %% [markdown] lang="en"
# ## What you will understand
#
# - why a linear recurrence can be computed in parallel, and what an associative
#   scan is;
# - state-space models: from a differential equation to a recurrence and to a
#   convolution;
# - Mamba's selection (S6): what depends on the input, and why that rules out
#   the convolution;
# - RWKV's time mixing as a weighted average with decay, in a stable form;
# - cost by length, and recall from a fixed state: where attention wins and what
#   it pays.
#
# Time: 75 minutes to read, one to two minutes to run. Before this: notebooks
# 06, 08, 11 and 12.
# %% [markdown] lang="zh"
# ## 你将理解什么
#
# - 为什么线性递推可以并行计算，什么是 associative scan；
# - 状态空间模型（SSM）：从微分方程到递推，再到卷积；
# - Mamba 的选择机制（S6）：哪些量依赖输入，为什么因此不能用卷积；
# - RWKV 的 time mixing：带衰减的加权平均，以及数值稳定的形式；
# - 开销随长度的变化，以及从固定状态中回忆：attention 好在哪里，代价是什么。
#
# 用时：阅读约 75 分钟，运行一到两分钟。前置：06、08、11、12。
# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import scipy.signal

from moepeft.nn.attention import Heads, attend

rng = np.random.default_rng(0)


# %% [markdown] lang="en"
# ## 1. A linear recurrence in parallel
#
# The core of every model here is
#
# $$h_t = a_t\, h_{t-1} + b_t, \qquad h_0 = 0,$$
#
# for each channel separately. It looks sequential. But two steps are again one
# step of the same form:
# $h_2 = a_2 (a_1 h_0 + b_1) + b_2 = (a_2 a_1) h_0 + (a_2 b_1 + b_2)$. So define
# for pairs
#
# $$(a_1, b_1) \circ (a_2, b_2) = (a_1 a_2,\; a_2 b_1 + b_2).$$
#
# The operator is associative, hence the products of all prefixes can be
# computed as a tree. The second number of the product up to $t$ is $h_t$,
# because $h_0 = 0$. `jax.lax.associative_scan` needs about $2\log_2 t$ parallel
# steps instead of $t$. (A recurrence with a nonlinearity,
# $h_t = \tanh(\ldots h_{t-1} \ldots)$, as in an LSTM, has no such form.)
# %% [markdown] lang="zh"
# ## 1. 并行计算线性递推
#
# 这里所有模型的核心都是
#
# $$h_t = a_t\, h_{t-1} + b_t, \qquad h_0 = 0,$$
#
# 每个通道各自独立。看起来只能逐步计算，但两步合起来仍是同样形式的一步：
# $h_2 = a_2 (a_1 h_0 + b_1) + b_2 = (a_2 a_1) h_0 + (a_2 b_1 + b_2)$。
# 因此对一对数定义
#
# $$(a_1, b_1) \circ (a_2, b_2) = (a_1 a_2,\; a_2 b_1 + b_2).$$
#
# 这个运算满足结合律，所以所有前缀的乘积可以按树形计算。由于 $h_0 = 0$，到 $t$
# 为止的乘积的第二个数就是 $h_t$。`jax.lax.associative_scan` 只需约 $2\log_2 t$
# 个并行步，而不是 $t$ 步。（带非线性的递推，如 LSTM 的
# $h_t = \tanh(\ldots h_{t-1} \ldots)$，没有这种形式。）
# %%
def combine(first, second):
  (a1, b1), (a2, b2) = first, second
  return a1 * a2, a2 * b1 + b2


def scan_parallel(a, b):
  """a, b [t, ...] -> all states h [t, ...]."""
  return jax.lax.associative_scan(combine, (a, b))[1]


def scan_loop(a, b):
  h, states = np.zeros_like(b[0]), []
  for a_t, b_t in zip(a, b, strict=True):
    h = a_t * h + b_t
    states.append(h)
  return np.stack(states)


a = rng.uniform(0.5, 1, (37, 6)).astype(np.float32)
b = rng.standard_normal((37, 6)).astype(np.float32)
difference = np.abs(scan_parallel(a, b) - scan_loop(a, b)).max()
print('parallel and loop differ by', difference)
# float32; the order of products differs.
assert difference < 1e-5, 'is the second pair the later one?'
triple = [(a[i], b[i]) for i in range(3)]
left = combine(combine(triple[0], triple[1]), triple[2])
right = combine(triple[0], combine(triple[1], triple[2]))
assert np.allclose(left, right, atol=1e-6), 'the operator has to associate'
# %% [markdown] lang="en"
# ## 2. State-space models
#
# A linear system with an input $x(\tau)$, a state $h(\tau) \in \mathbb{R}^N$
# and an output $y(\tau)$, for one channel:
#
# $$h' = A h + B x, \qquad y = C h.$$
#
# With an input that is constant over steps of size $\Delta$ and a diagonal $A$
# with entries $A_n < 0$ it becomes, exactly (*zero-order hold*),
#
# $$h_t = \bar A h_{t-1} + \bar B x_t, \qquad \bar A = e^{\Delta A}, \qquad \bar
# B = \frac{e^{\Delta A} - 1}{A} B \approx \Delta B.$$
#
# $\Delta$ decides how long the state remembers: where it is small, the state
# hardly changes; where it is large, $\bar A \to 0$ and the present input
# replaces the state. If $\Delta, A, B, C$ are constant (S4, arXiv:2111.00396),
# the output is a convolution $y = K * x$ with
# $K_j = \sum_n C_n \bar A_n^j \bar B_n$, by unrolling. We check it three ways;
# the third is SciPy's filter for such recurrences.
# %% [markdown] lang="zh"
# ## 2. 状态空间模型
#
# 一个线性系统，输入 $x(\tau)$，状态 $h(\tau) \in \mathbb{R}^N$，输出
# $y(\tau)$，对一个通道：
#
# $$h' = A h + B x, \qquad y = C h.$$
#
# 设输入在每个长为 $\Delta$ 的步内不变，$A$ 为对角阵，元素 $A_n < 0$，
# 则精确地有（*zero-order hold*）
#
# $$h_t = \bar A h_{t-1} + \bar B x_t, \qquad \bar A = e^{\Delta A}, \qquad \bar
# B = \frac{e^{\Delta A} - 1}{A} B \approx \Delta B.$$
#
# $\Delta$ 决定状态能记多久：$\Delta$ 小，状态几乎不变；$\Delta$ 大，
# $\bar A \to 0$，状态被当前输入取代。如果 $\Delta, A, B, C$ 都是常数（S4，
# arXiv:2111.00396），展开后输出是卷积 $y = K * x$，
# $K_j = \sum_n C_n \bar A_n^j \bar B_n$。用三种方式检验；第三种是 SciPy
# 中计算这类递推的滤波器。
# %%
N, t, delta = 4, 50, 0.3
A = -np.arange(1, N + 1.0)
B, C = rng.standard_normal((2, N))
x = rng.standard_normal(t)
A_bar = np.exp(delta * A)
B_bar = (A_bar - 1) / A * B

states = scan_loop(np.tile(A_bar, (t, 1)), x[:, None] * B_bar)
y_recurrent = states @ C
kernel = np.array([(C * A_bar**j * B_bar).sum() for j in range(t)])
y_convolution = np.convolve(x, kernel)[:t]
y_scipy = sum(
  scipy.signal.lfilter([c * b], [1, -a], x)
  for a, b, c in zip(A_bar, B_bar, C, strict=True)
)
# All in float64.
assert np.allclose(y_recurrent, y_convolution, atol=1e-12)
assert np.allclose(y_recurrent, y_scipy, atol=1e-12)
print('the kernel begins with', kernel[:4])


# %% [markdown] lang="en"
# ## 3. Mamba: the selective scan (S6)
#
# A constant system treats all inputs alike: it cannot decide to store this
# token and to ignore that one. Mamba (Gu and Dao, arXiv:2312.00752) makes
# $\Delta$, $B$ and $C$ functions of the input. For $x_t \in \mathbb{R}^{d}$
# with $d$ channels, each with a state of $N$ numbers:
#
# $$\Delta_t = \operatorname{softplus}(x_t W_\Delta + b_\Delta) \;[d], \qquad
# B_t = x_t W_B \;[N], \qquad C_t = x_t W_C \;[N],$$
# $$h_t[c, n] = e^{\Delta_t[c] A[c, n]}\, h_{t-1}[c, n] + \Delta_t[c]\, B_t[n]\,
# x_t[c], \qquad y_t[c] = \sum_n C_t[n]\, h_t[c, n] + D[c]\, x_t[c].$$
#
# $A < 0$ and $D$ are learned and do not depend on the input; $D$ lets the input
# pass the state by. $\operatorname{softplus}(z) = \ln(1 + e^z)$ keeps $\Delta$
# positive, and $\bar B \approx \Delta B$ is the approximation of section 2.
#
# Compare with attention: $B_t$ acts as a key, $x_t$ as a value, $C_t$ as a
# query; the state is a $d \times N$ table of values by key, with forgetting. As
# $\bar A$ now depends on $t$ there is no convolution, and the parallel scan of
# section 1 takes its place.
#
# A Mamba layer first projects its input to $x$ and to $z$, each twice as wide
# as the input. A short causal convolution lets each channel of $x$ see the last
# 4 tokens; then comes the scan. Its output is multiplied by the gate
# $\operatorname{silu}(z_t)$ and projected back.
# %% [markdown] lang="zh"
# ## 3. Mamba：selective scan（S6）
#
# 常系数系统对所有输入一视同仁：不能决定存下这个 token、忽略那个 token。
# Mamba（Gu 与 Dao，arXiv:2312.00752）让 $\Delta$、$B$、$C$ 成为输入的函数。
# $x_t \in \mathbb{R}^{d}$ 有 $d$ 个通道，每个通道的状态有 $N$ 个数：
#
# $$\Delta_t = \operatorname{softplus}(x_t W_\Delta + b_\Delta) \;[d], \qquad
# B_t = x_t W_B \;[N], \qquad C_t = x_t W_C \;[N],$$
# $$h_t[c, n] = e^{\Delta_t[c] A[c, n]}\, h_{t-1}[c, n] + \Delta_t[c]\, B_t[n]\,
# x_t[c], \qquad y_t[c] = \sum_n C_t[n]\, h_t[c, n] + D[c]\, x_t[c].$$
#
# $A < 0$ 和 $D$ 是学到的参数，不依赖输入；$D$ 让输入绕过状态直接到输出。
# $\operatorname{softplus}(z) = \ln(1 + e^z)$ 使 $\Delta$ 为正，
# $\bar B \approx \Delta B$ 是第 2 节的近似。
#
# 与 attention 比较：$B_t$ 相当于 key，$x_t$ 相当于 value，$C_t$ 相当于 query；
# 状态是一张按 key 存 value 的 $d \times N$ 的表，会遗忘。由于 $\bar A$ 依赖
# $t$，不能再用卷积，改用第 1 节的并行 scan。
#
# Mamba 层先把输入投影为 $x$ 和 $z$，宽度都是输入的两倍。一个短的 causal 卷积让
# $x$ 的每个通道看到最近 4 个 token，然后是 scan；scan 的输出乘以门控
# $\operatorname{silu}(z_t)$，再投影回原来的宽度。
# %%
def normal(key, *shape):
  return jax.random.normal(key, shape) * shape[0] ** -0.5


def init_mamba(key, d, inner, state):
  keys = jax.random.split(key, 6)
  # Steps between 0.001 and 0.1 at the start, as in the paper.
  step = jnp.exp(
    jax.random.uniform(keys[0], (inner,)) * np.log(100) + np.log(0.001)
  )
  return {
    'inputs': normal(keys[1], d, 2 * inner),
    # At the start the convolution passes the present input on.
    'conv': jnp.zeros((4, inner)).at[-1].set(1.0),
    'delta': normal(keys[2], inner, inner) * 0.1,
    # softplus(delta_bias) is the step.
    'delta_bias': step + jnp.log(-jnp.expm1(-step)),
    'b': normal(keys[3], inner, state),
    'c': normal(keys[4], inner, state),
    'log_a': jnp.log(jnp.tile(jnp.arange(1.0, state + 1), (inner, 1))),
    'd': jnp.ones(inner),
    'out': normal(keys[5], inner, d),
  }


def selective_terms(x, p):
  """x [t, c] -> (decay [t, c, n], write [t, c, n], read [t, n])."""
  delta = jax.nn.softplus(x @ p['delta'] + p['delta_bias'])
  decay = jnp.exp(-delta[..., None] * jnp.exp(p['log_a']))
  write = (delta * x)[..., None] * (x @ p['b'])[:, None, :]
  return decay, write, x @ p['c']


def causal_conv(x, kernel):
  """x [t, c], kernel [4, c]: each output sees 4 inputs up to its own."""
  padded = jnp.pad(x, ((len(kernel) - 1, 0), (0, 0)))
  return sum(padded[i : i + len(x)] * kernel[i] for i in range(len(kernel)))


def mamba(x, p, scan=scan_parallel):
  """x [t, d] -> [t, d]."""
  x, z = jnp.split(x @ p['inputs'], 2, axis=-1)
  x = jax.nn.silu(causal_conv(x, p['conv']))
  decay, write, read = selective_terms(x, p)
  h = scan(decay, write)
  y = jnp.einsum('tcn,tn->tc', h, read) + p['d'] * x
  return (y * jax.nn.silu(z)) @ p['out']


# %%
d = 24
p = init_mamba(jax.random.key(0), d, 2 * d, 8)
# A random kernel, so that an error of the convolution shows.
p['conv'] = jax.random.normal(jax.random.key(2), p['conv'].shape) / 2
x = jax.random.normal(jax.random.key(1), (40, d))
parallel = jax.jit(mamba)(x, p)
loop = mamba(x, p, scan=lambda a, b: scan_loop(np.asarray(a), np.asarray(b)))
difference = np.abs(parallel - loop).max()
print('parallel scan and loop differ by', difference)
assert difference < 1e-4, 'float32 agrees to about 1e-6 here'
# Causal: the last token does not reach earlier outputs.
changed = jax.jit(mamba)(x.at[-1].add(1.0), p)
assert np.array_equal(parallel[:-1], changed[:-1])


# %% [markdown] lang="en"
# In generation nothing of length $t$ is needed: a step takes the state $[c, n]$
# and the last three inputs of the convolution. The result is the same:
# %% [markdown] lang="zh"
# 生成时不需要任何长度为 $t$ 的东西：一步只用状态 $[c, n]$
# 和卷积的最近三个输入。结果相同：
# %%
@jax.jit
def mamba_step(x, p, state, recent):
  """x [d] -> (y [d], the new state, the new recent inputs)."""
  x, z = jnp.split(x @ p['inputs'], 2)
  recent = jnp.concatenate([recent, x[None]])
  x = jax.nn.silu((recent * p['conv']).sum(0))
  decay, write, read = selective_terms(x[None], p)
  state = decay[0] * state + write[0]
  y = state @ read[0] + p['d'] * x
  return (y * jax.nn.silu(z)) @ p['out'], state, recent[1:]


state, recent, outputs = jnp.zeros((2 * d, 8)), jnp.zeros((3, 2 * d)), []
for token in x:
  y, state, recent = mamba_step(token, p, state, recent)
  outputs.append(y)
difference = np.abs(np.stack(outputs) - parallel).max()
assert difference < 1e-4, difference
print('stepwise and parallel differ by', difference)


# %% [markdown] lang="en"
# ## 4. RWKV: time mixing
#
# RWKV-4 (Peng et al., arXiv:2305.13048) has for each channel a key $k_t$, a
# value $v_t$ and a receptance $r_t$, all linear in a mixture of the present and
# the previous token, $\mu \odot x_t + (1 - \mu) \odot x_{t-1}$ with a learned
# $\mu$ (*token shift*). The output is a weighted average of all values so far,
#
# $$\text{wkv}_t = \frac{\sum_{i<t} e^{-(t-1-i) w + k_i} v_i + e^{u + k_t}
# v_t}{\sum_{i<t} e^{-(t-1-i) w + k_i} + e^{u + k_t}}, \qquad y_t = (\sigma(r_t)
# \odot \text{wkv}_t)\, W_o,$$
#
# with a learned decay $w > 0$ for each channel and a bonus $u$ for the present
# token. It is attention whose weights depend on the key and on the distance,
# and not on a query; the query's part is the gate $\sigma(r_t)$. Because of
# that, the sums in numerator and denominator are linear recurrences as in
# section 1, with $a_t = e^{-w}$.
#
# The exponentials overflow if $k$ is large, so the recurrence carries a running
# maximum, as the online softmax of notebook 12 does. We write the direct sum
# and the stable recurrence and compare them.
# %% [markdown] lang="zh"
# ## 4. RWKV：time mixing
#
# RWKV-4（Peng 等，arXiv:2305.13048）的每个通道有 key $k_t$、value $v_t$ 和
# receptance $r_t$，都是当前 token 与前一个 token 的混合
# $\mu \odot x_t + (1 - \mu) \odot x_{t-1}$ 的线性函数，$\mu$
# 是学到的参数（*token shift*）。输出是到目前为止所有 value 的加权平均：
#
# $$\text{wkv}_t = \frac{\sum_{i<t} e^{-(t-1-i) w + k_i} v_i + e^{u + k_t}
# v_t}{\sum_{i<t} e^{-(t-1-i) w + k_i} + e^{u + k_t}}, \qquad y_t = (\sigma(r_t)
# \odot \text{wkv}_t)\, W_o,$$
#
# 每个通道有可学习的衰减 $w > 0$，以及对当前 token 的加成 $u$。
# 它是一种权重只依赖 key 和距离、不依赖 query 的 attention；query 的作用由门控
# $\sigma(r_t)$ 承担。正因如此，分子和分母中的和都是第 1 节那样的线性递推，
# $a_t = e^{-w}$。
#
# $k$ 很大时指数会溢出，所以递推像 12 的 online softmax 那样携带一个累计最大值。
# 下面写出直接求和与稳定的递推，并比较。
# %%
def wkv_direct(w, u, k, v):
  """w, u [c]; k, v [t, c] -> [t, c], by the formula; needs [t, t, c]."""
  t = len(k)
  distance = np.arange(t)[:, None] - 1 - np.arange(t)
  exponents = np.where(
    (distance >= 0)[..., None], -distance[..., None] * w + k, -np.inf
  )
  exponents[np.arange(t), np.arange(t)] = u + k
  e = np.exp(exponents)
  return (e * v).sum(1) / e.sum(1)


def wkv(w, u, k, v):
  """The same by a recurrence whose exponents are at most 0."""

  def step(carry, inputs):
    numerator, denominator, m = carry
    k, v = inputs
    new_m = jnp.maximum(m, u + k)
    old, new = jnp.exp(m - new_m), jnp.exp(u + k - new_m)
    y = (old * numerator + new * v) / (old * denominator + new)
    # Decay by w, then add the present token without the bonus.
    next_m = jnp.maximum(m - w, k)
    old, new = jnp.exp(m - w - next_m), jnp.exp(k - next_m)
    carry = old * numerator + new * v, old * denominator + new, next_m
    return carry, y

  zeros = jnp.zeros(k.shape[1])
  return jax.lax.scan(step, (zeros, zeros, zeros - 1e30), (k, v))[1]


w, u = rng.uniform(0.01, 2, 6), rng.standard_normal(6)
k, v = rng.standard_normal((2, 30, 6))
difference = np.abs(wkv(w, u, k, v) - wkv_direct(w, u, k, v)).max()
print('recurrence and direct sum differ by', difference)
assert difference < 1e-5, 'look at the order: read, then decay, then add'
# The exponential of such keys is infinite in float32. The direct sum is in
# float64; float32 has steps of 1e-5 at keys of 200.
k_large = 100 + 50 * k
with np.errstate(over='ignore'):
  assert np.isinf(np.exp(k_large.astype(np.float32).max()))
difference = np.abs(wkv(w, u, k_large, v) - wkv_direct(w, u, k_large, v)).max()
assert difference < 1e-3, 'is the maximum subtracted from every exponent?'
# %% [markdown] lang="en"
# As a bridge to attention: with $w = 0$ and $u = 0$ there is neither decay nor
# bonus, and wkv is softmax attention in which every query gives the logit
# $k_i$. The package's `attend` with head size 1 and queries of 1 says the same:
# %% [markdown] lang="zh"
# 与 attention 的联系：$w = 0$、$u = 0$ 时没有衰减也没有加成，wkv 就是每个 query
# 都给出 logit $k_i$ 的 softmax attention。用 moepeft 的 `attend`，head size 为
# 1，query 为 1，结果相同：
# %%
t, c = k.shape
mask = jnp.tril(jnp.ones((t, t), bool))[None, None]
as_heads = [jnp.array(a, jnp.float32)[None, :, :, None] for a in (k, v)]
heads = Heads(jnp.ones((1, t, c, 1)), *as_heads, mask=mask)
expected = attend(heads)[0, :, :, 0]
difference = np.abs(wkv(0 * w, 0 * u, k, v) - expected).max()
print('largest difference from attention', difference)
assert difference < 1e-5


# %%
def init_rwkv(key, d, inner):
  keys = jax.random.split(key, 4)
  names = ('r', 'k', 'v')
  p = {name: normal(keys[i], d, inner) for i, name in enumerate(names)}
  mix = {f'mix_{name}': jnp.full(d, 0.5) for name in names}
  # Decays from slow to fast over the channels.
  decay = jnp.linspace(-6, 1, inner)
  return (
    p
    | mix
    | {
      'log_w': decay,
      'u': jnp.zeros(inner),
      'out': normal(keys[3], inner, d),
    }
  )


def rwkv(x, p):
  """x [t, d] -> [t, d]."""
  previous = jnp.pad(x, ((1, 0), (0, 0)))[:-1]

  def project(name):
    mix = p[f'mix_{name}']
    return (mix * x + (1 - mix) * previous) @ p[name]

  y = wkv(jnp.exp(p['log_w']), p['u'], project('k'), project('v'))
  return (jax.nn.sigmoid(project('r')) * y) @ p['out']


# %% [markdown] lang="en"
# ## 5. Cost by length
#
# For one layer with $d$ channels ($2d$ inside Mamba, each with a state of
# $N = 16$ numbers), counting the products of matrices, three multiply-adds for
# each number of Mamba's state (decay, write, read) and four for each channel of
# its convolution:
#
# | | multiply-adds for $t$ tokens | state in generation |
# | --- | --- | --- |
# | attention | $4d^2 t + d t^2$ (causal) | $2 d t$ |
# | Mamba | $6d^2 t + 4d^2 t + (10N + 8)\, d t$ | $2d(N + 3)$ |
# | RWKV-4 | $4d^2 t + O(dt)$ | $4d$ |
#
# Of Mamba's terms, $6d^2$ are the projections at its two ends and $4d^2$ is
# that of $\Delta$, which has a low rank in the released models and is full
# here; $10N$ are $W_B$, $W_C$ and the state. RWKV-4 keeps a numerator, a
# denominator, a maximum and the previous token.
#
# The quadratic term of attention equals its projections at $t = 4d$. Up to that
# length, attention takes at most twice the multiply-adds of RWKV-4 and fewer
# than this Mamba, which is cheaper for $t > 6d + 10N + 8$ only: 6312 tokens in
# the figure, whose lengths are powers of 2. The numbers kept in generation are
# fewer than those of attention from 20 tokens on.
# %% [markdown] lang="zh"
# ## 5. 开销随长度的变化
#
# 一层，$d$ 个通道（Mamba 内部为 $2d$，每个通道的状态有 $N = 16$ 个数），
# 计入矩阵乘积；Mamba 状态的每个数计三次乘加（衰减、写入、读出），
# 卷积的每个通道计四次：
#
# | | $t$ 个 token 的乘加次数 | 生成时的状态 |
# | --- | --- | --- |
# | attention | $4d^2 t + d t^2$（causal） | $2 d t$ |
# | Mamba | $6d^2 t + 4d^2 t + (10N + 8)\, d t$ | $2d(N + 3)$ |
# | RWKV-4 | $4d^2 t + O(dt)$ | $4d$ |
#
# Mamba 的各项中，$6d^2$ 是首尾的投影，$4d^2$ 是 $\Delta$
# 的投影（发布的模型用低秩，这里用满秩），$10N$ 来自 $W_B$、$W_C$ 和状态。RWKV-4
# 保存分子、分母、最大值和前一个 token。
#
# attention 的平方项在 $t = 4d$ 时等于投影的开销。在此长度以内，attention
# 的乘加次数至多是 RWKV-4 的两倍，并少于这里的 Mamba；Mamba 要到
# $t > 6d + 10N + 8$ 才更便宜：图中是 6312 个 token（图中的长度取 2 的幂）。
# 生成时保存的数，从 20 个 token 起就比 attention 少。
# %%
def attention_cost(t, d):
  return 4 * d * d * t + d * t * t, 2 * d * t


def mamba_cost(t, d, n=16):
  inner = 2 * d
  products = 2 * d * inner + inner * inner + 2 * inner * n + inner * d
  # Decay and write of the state, the sum over n, the convolution.
  return t * (products + 3 * inner * n + 4 * inner), inner * (n + 3)


def rwkv_cost(t, d):
  return t * (4 * d * d + 6 * d), 4 * d


lengths, width = 2 ** np.arange(6, 18), 1024
figure, axes = plt.subplots(1, 2, figsize=(7, 2.6))
for cost in (attention_cost, mamba_cost, rwkv_cost):
  costs = np.array([cost(int(t), width) for t in lengths], float)
  name = cost.__name__.split('_')[0]
  axes[0].loglog(lengths, costs[:, 0], label=name)
  axes[1].loglog(lengths, costs[:, 1], label=name)
axes[0].set(title='multiply-adds', xlabel='tokens')
axes[1].set(title='numbers kept in generation', xlabel='tokens')
axes[0].legend(fontsize=8)
figure.tight_layout()
plt.show()
crossing = next(
  int(t)
  for t in lengths
  if attention_cost(t, width)[0] > mamba_cost(t, width)[0]
)
print('attention costs more than this Mamba from', crossing, 'tokens on')
assert attention_cost(4 * width, width)[0] == 2 * 4 * width**2 * 4 * width
# %% [markdown] lang="en"
# ## 6. Recall
#
# Now the price of a constant state. The task is *associative recall* (Arora et
# al., arXiv:2312.04927): a row shows $P$ pairs of a key and a value, then asks
# for the value of each key in random order. A pair is one token (the sum of two
# embeddings), a question is the key's embedding and a marker. The $P$ keys are
# different ones of 32, and each value is one of 8, so guessing is right with
# probability $1/8$.
#
# Attention can look the key up. A recurrent model has to have stored the pair
# before it knows whether it will be asked for. Each model is one layer: norm,
# mixer, residual, head; same $d = 32$ (inside Mamba and RWKV 64), and the same
# training. Attention has no positions; it needs none here.
# %% [markdown] lang="zh"
# ## 6. 回忆
#
# 现在来看固定状态的代价。任务是*联想回忆*（associative recall，Arora 等，
# arXiv:2312.04927）：一行先给出 $P$ 个 key-value 对，然后按随机顺序询问每个 key
# 的 value。一对是一个 token（两个 embedding 之和），一个问题是 key 的 embedding
# 加一个标记。key 是 32 个中不同的 $P$ 个，value 是 8 个之一。随机猜对的概率是
# $1/8$。
#
# Attention 可以直接查找 key。循环模型在不知道会不会被问到时就必须存下这一对。
# 每个模型只有一层：norm、mixer、残差、head；$d = 32$ 相同（Mamba 和 RWKV 内部为
# 64），训练也相同。这里的 attention 没有位置编码，也不需要。
# %%
KEYS, VALUES, D = 32, 8, 32


def make_batch(rng, rows, pairs):
  """(keys, values or VALUES for a question, answers), int [rows, 2 pairs]."""
  keys = np.argsort(rng.random((rows, KEYS)), axis=1)[:, :pairs]
  values = rng.integers(0, VALUES, (rows, pairs))
  order = np.argsort(rng.random((rows, pairs)), axis=1)
  asked = np.take_along_axis(keys, order, 1)
  answers = np.take_along_axis(values, order, 1)
  marker = np.full_like(values, VALUES)
  return (
    np.concatenate([keys, asked], 1),
    np.concatenate([values, marker], 1),
    answers,
  )


def attention_mixer(x, p):
  """Causal attention with 2 heads, x [t, d]."""
  q, k, v = (jnp.reshape(x @ p[a], (len(x), 2, -1)) for a in 'qkv')
  logits = jnp.einsum('tnh,snh->nts', q, k) * q.shape[-1] ** -0.5
  causal = jnp.tril(jnp.ones((len(x), len(x)), bool))
  weights = jax.nn.softmax(jnp.where(causal, logits, -jnp.inf))
  return jnp.einsum('nts,snh->tnh', weights, v).reshape(len(x), -1) @ p['out']


def init_attention(key, d):
  names = ('q', 'k', 'v', 'out')
  keys = jax.random.split(key, 4)
  return {n: normal(k, d, d) for n, k in zip(names, keys, strict=True)}


MIXERS = {
  'attention': (attention_mixer, lambda key: init_attention(key, D)),
  'mamba, N = 8': (mamba, lambda key: init_mamba(key, D, 2 * D, 8)),
  'mamba, N = 1': (mamba, lambda key: init_mamba(key, D, 2 * D, 1)),
  'rwkv': (rwkv, lambda key: init_rwkv(key, D, 2 * D)),
}


# %%
def init_model(name, key):
  keys = jax.random.split(key, 4)
  return {
    'keys': jax.random.normal(keys[0], (KEYS, D)),
    'values': jax.random.normal(keys[1], (VALUES + 1, D)),
    'mixer': MIXERS[name][1](keys[2]),
    'head': normal(keys[3], D, VALUES),
  }


def model_logits(params, mixer, keys, values):
  """int [b, 2 pairs] -> logits of the answers [b, pairs, VALUES]."""

  def norm(x):
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)

  x = params['keys'][keys] + params['values'][values]
  x = x + jax.vmap(lambda x: mixer(x, params['mixer']))(norm(x))
  return (norm(x) @ params['head'])[:, keys.shape[1] // 2 :]


def train(name, pairs, steps=300, rows=32, seed=0):
  """Returns the trained parameters and the accuracy on 512 new rows."""
  mixer = MIXERS[name][0]
  optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

  @jax.jit
  def step(params, state, keys, values, answers):
    def loss(params):
      logits = model_logits(params, mixer, keys, values)
      return optax.softmax_cross_entropy_with_integer_labels(
        logits, answers
      ).mean()

    gradient = jax.grad(loss)(params)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  params = init_model(name, jax.random.key(seed))
  state, rng = optimizer.init(params), np.random.default_rng(seed)
  for _ in range(steps):
    params, state = step(params, state, *make_batch(rng, rows, pairs))
  keys, values, answers = make_batch(np.random.default_rng(999), 512, pairs)
  logits = jax.jit(model_logits, static_argnums=1)(params, mixer, keys, values)
  return params, float((logits.argmax(-1) == answers).mean())


PAIRS = (2, 6, 12)
accuracy = {name: [train(name, pairs)[1] for pairs in PAIRS] for name in MIXERS}
print('pairs        ', PAIRS, ' chance', 1 / VALUES)
for name, values in accuracy.items():
  print(f'{name:13}', [round(value, 3) for value in values])
# %%
plt.figure(figsize=(5, 2.6))
for name, values in accuracy.items():
  plt.plot(PAIRS, values, 'o-', label=name)
plt.axhline(1 / VALUES, color='gray', linestyle='--', label='chance')
plt.xlabel('pairs to remember')
plt.ylabel('accuracy')
plt.legend(fontsize=8)
plt.tight_layout()
plt.show()
assert accuracy['attention'][-1] > 0.95, 'attention can look a key up'
assert accuracy['mamba, N = 8'][-1] > 0.85, 'the state is large enough'
assert accuracy['mamba, N = 1'][-1] < accuracy['mamba, N = 8'][-1] - 0.1
assert accuracy['rwkv'][-1] < accuracy['attention'][-1] - 0.2


# %% [markdown] lang="en"
# Attention answers everything: it looks the key up, and pays with a cache that
# grows with the text. Mamba with $N = 8$ stores nearly all of 12 pairs in its
# $64 \cdot 8$ numbers, the same model with $N = 1$ does not; nor does RWKV-4,
# whose state is a vector and whose average has no query. So it is the size of
# the state and the way it is addressed that decide, and not recurrence as such.
# But every fixed state has such a limit, and a cache has none.
#
# Two cautions. This is one seed and 300 steps; RWKV-4 gets better with more of
# them, so read the order and not the digits. With 2 pairs a row has 2 answers
# only and so teaches less in 300 steps: that RWKV-4 is not better there than
# with 6 does not come from the size of its state. And details decide: with a
# random kernel of the convolution (`normal(key, 4, inner)`) instead of one that
# begins as the identity, the same 300 steps are not enough for Mamba. Try it.
#
# What this does not show: language modelling quality. Published Mamba models
# match transformers of their size in perplexity up to a few billion parameters,
# and fall behind in copying and recall from long contexts (Jelassi et al.,
# arXiv:2402.01032). Hybrids, with a few attention layers among many recurrent
# ones, get most of both (Jamba, arXiv:2403.19887). Later RWKV versions have a
# matrix as state for each head (exercise 3).
# %% [markdown] lang="zh"
# Attention 全部答对：它直接查找 key，代价是随文本增长的 cache。$N = 8$ 的 Mamba
# 几乎把 12 对都存进 $64 \cdot 8$ 个数里，$N = 1$ 的同一模型做不到；RWKV-4
# 也做不到，它的状态是向量，加权平均里没有 query。
# 所以起决定作用的是状态的大小和寻址方式，而不是循环本身。
# 但任何固定大小的状态都有这样的上限，cache 没有。
#
# 两点提醒。这里只有一个随机种子、300 步；RWKV-4 再多训练会更好，所以只看排序，
# 不看具体数字。只有 2 对时，一行只有 2 个答案，300 步里能学到的更少：RWKV-4
# 此时不比 6 对时好，原因不在状态的大小。另外细节很关键：
# 如果卷积核随机初始化（`normal(key, 4, inner)`），而不是从恒等开始，同样的 300
# 步对 Mamba 就不够。可以试一试。
#
# 这里没有说明语言建模的质量。公开的 Mamba 模型在几十亿参数以内与同样大小的
# transformer 困惑度相当，但在长 context 的复制和回忆上落后（Jelassi 等，
# arXiv:2402.01032）。混合模型在许多循环层中插入少数 attention 层，
# 基本兼得两者的优点（Jamba，arXiv:2403.19887）。后来的 RWKV 版本每个 head
# 的状态是一个矩阵（练习 3）。
# %% [markdown] lang="en"
# ## Exercises
#
# 1. (Easy) The *minimal GRU* (arXiv:2410.01201) is
#    $h_t = (1 - z_t) h_{t-1} + z_t \tilde h_t$ with $z_t = \sigma(x_t W_z)$ and
#    $\tilde h_t = x_t W_h$. Write it with `scan_parallel`, and check it against
#    a loop.
# 2. (Medium) Write the associative scan yourself: combine neighbours, scan the
#    list of half the length, fill in the rest. Count combinations and levels
#    for 64 steps. How does that compare with a loop?
# 3. (Hard) *Linear attention with decay* has a matrix as state:
#    $S_t = \gamma S_{t-1} + k_t^\top v_t$, $y_t = q_t S_t$. Write it
#    recurrently and as $y = (q k^\top \odot M)\, v$ with
#    $M_{ij} = \gamma^{i-j}$ for $j \le i$, and show that they agree. Then train
#    it as a mixer ($\gamma = 1$, two heads, a new entry of `MIXERS` with the
#    parameters of `init_attention`) on 12 pairs. Is it better than RWKV-4 with
#    its vector state?
# %% [markdown] lang="zh"
# ## 练习
#
# 1. （易）*minimal GRU*（arXiv:2410.01201）是
#    $h_t = (1 - z_t) h_{t-1} + z_t \tilde h_t$，$z_t = \sigma(x_t W_z)$，
#    $\tilde h_t = x_t W_h$。用 `scan_parallel` 写出，并与循环比较。
# 2. （中）自己写 associative scan：合并相邻元素，对一半长的序列递归，
#    再补上其余部分。对 64 步统计合并次数和层数，与循环相比如何？
# 3. （难）*带衰减的线性 attention* 的状态是矩阵：
#    $S_t = \gamma S_{t-1} + k_t^\top v_t$，$y_t = q_t S_t$。写出递推形式，以及
#    $y = (q k^\top \odot M)\, v$，其中 $j \le i$ 时 $M_{ij} = \gamma^{i-j}$，
#    验证两者一致。再把它作为 mixer（$\gamma = 1$，两个 head，在 `MIXERS`
#    中新增一项，参数用 `init_attention`）在 12 对上训练。它比状态为向量的
#    RWKV-4 好吗？
# %% [markdown] lang="en"
# ## Interview questions
#
# **Why can Mamba be trained in parallel and an LSTM cannot?**
#
# <details><summary>Answer</summary>
#
# Mamba's state update is linear in the state, with coefficients that depend on
# the input only. Two such updates compose to one of the same form, composition
# is associative, and a scan computes all states in a logarithmic number of
# steps. An LSTM applies a nonlinear function to the state; compositions of it
# have no short form, so the steps have to be done in order.
#
# </details>
#
# **What is lost with a constant state, and what do hybrids do about it?**
#
# <details><summary>Answer</summary>
#
# A state of $S$ numbers cannot hold unboundedly many exact facts: copying a
# long text, or recalling an arbitrary earlier token, fails when the text
# outgrows the state. The model has to decide at writing time what it will need.
# Hybrids keep a few attention layers, with their KV cache, for exact recall,
# and use recurrent layers for the rest, so the cache shrinks by the share of
# attention layers.
#
# </details>
# %% [markdown] lang="zh"
# ## 面试题
#
# **为什么 Mamba 可以并行训练，而 LSTM 不行？**
#
# <details><summary>答案</summary>
#
# Mamba 的状态更新对状态是线性的，系数只依赖输入。两次更新复合后形式不变，
# 复合满足结合律，用 scan 只需对数级的步数就能算出所有状态。LSTM
# 对状态施加非线性函数，复合后没有简短的形式，只能按顺序计算。
#
# </details>
#
# **固定大小的状态失去了什么？混合模型怎样弥补？**
#
# <details><summary>答案</summary>
#
# $S$ 个数的状态装不下无限多的精确信息：当文本超出状态的容量，复制长文本、
# 回忆任意一个先前的 token 都会失败。模型必须在写入时决定将来需要什么。
# 混合模型保留少数 attention 层及其 KV cache 用于精确回忆，其余用循环层，cache
# 按 attention 层所占的比例缩小。
#
# </details>
# %% [markdown] lang="en"
# ## In the package
#
# moepeft has no recurrent models: its decoders are transformers,
# {{moepeft.models.decoder.model.Decoder}}. What corresponds to the pieces here:
#
# - {{moepeft.nn.attention.attend}} is the attention compared with;
#   {{moepeft.inference.engine.kv_cache.shapes}} is the state that grows with
#   the length.
# - {{moepeft.nn.chunked_attention.attend}} uses the same running maximum as
#   `wkv`.
# - Sliding windows bound the KV cache in another way:
#   {{moepeft.models.decoder.config.DecoderConfig}} has `window` and `windowed`.
#
# Papers: S4 arXiv:2111.00396, Mamba 2312.00752, Mamba-2 2405.21060, RWKV-4
# 2305.13048, RWKV-5 and 6 2404.05892, recall 2312.04927 and 2402.01032, Jamba
# 2403.19887, minimal GRU 2410.01201.
# %% [markdown] lang="zh"
# ## 在 moepeft 中
#
# moepeft 没有循环模型，它的 decoder 都是 transformer：
# {{moepeft.models.decoder.model.Decoder}}。与本篇各部分对应的有：
#
# - {{moepeft.nn.attention.attend}} 是用来比较的 attention；
#   {{moepeft.inference.engine.kv_cache.shapes}} 是随长度增长的状态。
# - {{moepeft.nn.chunked_attention.attend}} 使用与 `wkv` 相同的累计最大值。
# - 滑动窗口以另一种方式限制 KV cache：
#   {{moepeft.models.decoder.config.DecoderConfig}} 有 `window` 和 `windowed`。
#
# 论文：S4 arXiv:2111.00396，Mamba 2312.00752，Mamba-2 2405.21060，RWKV-4
# 2305.13048，RWKV-5 与 6 2404.05892，回忆 2312.04927 与 2402.01032，Jamba
# 2403.19887，minimal GRU 2410.01201。
# %% [markdown] lang="en" tags=["solution"]
# # Solutions: Mamba and RWKV
# %% [markdown] lang="zh" tags=["solution"]
# # 解答：Mamba 与 RWKV
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 1
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 1
# %% tags=["solution"]
def min_gru(x, w_z, w_h, scan):
  z = jax.nn.sigmoid(x @ w_z)
  return scan(1 - z, z * (x @ w_h))


x = jax.random.normal(jax.random.key(5), (50, 8))
w_z, w_h = jax.random.normal(jax.random.key(6), (2, 8, 8))
loop = min_gru(
  x, w_z, w_h, lambda a, b: scan_loop(np.asarray(a), np.asarray(b))
)
assert np.abs(min_gru(x, w_z, w_h, scan_parallel) - loop).max() < 1e-4


# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 2
#
# For $t$ a power of two the tree needs fewer than $2t$ combinations on
# $2 \log_2 t - 1$ levels: twice the work of a loop, in far fewer dependent
# steps.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 2
#
# $t$ 为 2 的幂时，树形计算的合并次数少于 $2t$，层数为 $2 \log_2 t - 1$：
# 工作量是循环的两倍，但相互依赖的步数少得多。
# %% tags=["solution"]
def scan_by_hand(items, combine):
  """(all prefixes, combinations, levels) of a list of pairs."""
  if len(items) == 1:
    return items, 0, 0
  pairs = [combine(a, b) for a, b in zip(items[::2], items[1::2], strict=True)]
  odd, count, levels = scan_by_hand(pairs, combine)
  # odd[i] is the prefix up to item 2 i + 1.
  even = [items[0]] + [
    combine(odd[i - 1], items[2 * i]) for i in range(1, len(odd))
  ]
  merged = [item for pair in zip(even, odd, strict=True) for item in pair]
  count += len(pairs) + len(even) - 1
  return merged, count, levels + 1 + (len(even) > 1)


a = rng.uniform(0.5, 1, (64, 3))
b = rng.standard_normal((64, 3))
prefixes, combinations, levels = scan_by_hand(
  list(zip(a, b, strict=True)), combine
)
assert np.allclose(np.stack([h for _, h in prefixes]), scan_loop(a, b))
print(combinations, 'combinations on', levels, 'levels; a loop: 63 on 63')
assert 63 < combinations < 2 * 64 and levels == 2 * 6 - 1


# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 3
#
# The state is a $16 \times 16$ matrix for each of two heads: a table from keys
# to values, with as many numbers as the state of Mamba with $N = 8$.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 3
#
# 两个 head，每个 head 的状态是 $16 \times 16$ 的矩阵：一张由 key 到 value
# 的表，数的个数与 $N = 8$ 的 Mamba 状态相同。
# %% tags=["solution"]
def linear_recurrent(q, k, v, gamma):
  state, outputs = np.zeros((k.shape[1], v.shape[1])), []
  for q_t, k_t, v_t in zip(q, k, v, strict=True):
    state = gamma * state + np.outer(k_t, v_t)
    outputs.append(q_t @ state)
  return np.stack(outputs)


def linear_parallel(q, k, v, gamma):
  distance = np.arange(len(q))[:, None] - np.arange(len(q))
  decay = np.where(distance >= 0, gamma ** np.maximum(distance, 0), 0)
  return (q @ k.T * decay) @ v


q, k, v = rng.standard_normal((3, 40, 8))
for gamma in (0.9, 1.0):
  assert np.allclose(
    linear_recurrent(q, k, v, gamma), linear_parallel(q, k, v, gamma)
  )


def linear_mixer(x, p):
  q, k, v = (jnp.reshape(x @ p[a], (len(x), 2, -1)) for a in 'qkv')
  causal = jnp.tril(jnp.ones((len(x), len(x))))
  weights = jnp.einsum('tnh,snh->nts', q, k) * causal
  y = jnp.einsum('nts,snh->tnh', weights, v).reshape(len(x), -1)
  return y @ p['out']


MIXERS['linear'] = (linear_mixer, lambda key: init_attention(key, D))
linear_accuracy = train('linear', 12)[1]
print('linear', linear_accuracy, 'rwkv', accuracy['rwkv'][-1])
assert linear_accuracy > accuracy['rwkv'][-1]

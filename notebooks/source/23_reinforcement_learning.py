# SPDX-License-Identifier: Apache-2.0
# %% [markdown] lang="en"
# # Reinforcement learning: REINFORCE, PPO, GRPO
#
# SFT imitates given answers, and DPO compares given answers. Reinforcement
# learning lets the model write its own answers and scores them: by a program
# that checks them (a *verifiable* reward) or by a reward model. This notebook
# builds the three algorithms of the field by hand on a task so small that every
# possible answer can be enumerated. The true objective and the true gradient
# are therefore known exactly, and each estimator is compared with them. At the
# end a reward is optimized that is only almost right.
# %% [markdown] lang="zh"
# # 强化学习：REINFORCE、PPO、GRPO
#
# SFT 模仿给定的回答，DPO 比较给定的回答。强化学习让模型自己写回答，
# 再对它们打分：用检查程序（**可验证**的奖励）或奖励模型。本 notebook
# 在一个极小的任务上手写这个领域的三种算法，任务小到所有可能的回答都能枚举。
# 因此真实目标和真实梯度都精确已知，每个估计量都与之比较。
# 最后优化一个“几乎正确”的奖励，看看会发生什么。
# %% [markdown] lang="en"
# ## What you will understand
#
# - The policy gradient, why it needs no gradient of the reward, and why it is
#   noisy.
# - Baselines: the same mean, less variance, measured against the exact
#   gradient.
# - PPO: the importance ratio, clipping, a critic with GAE, and the KL penalty
#   with its estimators.
# - GRPO: a group of answers in place of a critic, and which groups teach
#   nothing.
# - Reward hacking: a proxy that rises while the true reward falls, and what the
#   KL penalty does.
#
# About 80 minutes. Before it: notebooks 21 (SFT) and 22 (preferences).
# %% [markdown] lang="zh"
# ## 你将理解什么
#
# - 策略梯度，它为什么不需要奖励的梯度，又为什么噪声大。
# - 基线（baseline）：均值不变，方差改变，并与精确梯度对比测量。
# - PPO：重要性比率、裁剪、带 GAE 的 critic，以及 KL 惩罚和它的估计量。
# - GRPO：用一组回答代替 critic，以及哪些组不提供任何学习信号。
# - Reward hacking：代理奖励上升而真实奖励下降，以及 KL 惩罚的作用。
#
# 大约 80 分钟。之前请先学习 notebook 21（SFT）和 22（偏好）。
# %%
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import pyplot as plt

from moepeft.models.decoder.config import DecoderConfig
from moepeft.models.decoder.model import Decoder
from moepeft.objectives.cross_entropy import mean_loss, token_losses
from moepeft.objectives.objective import ObjectiveSpec
from moepeft.objectives.paired_batch import token_logps

# %% [markdown] lang="en"
# ## 1. The task and the policy
#
# The prompt is a number $s$ from 5 to 22, one token. The answer is three
# digits, and it is right if they add up to $s$. There are 1000 answers per
# prompt, 21 to 75 of them right, and no example of a right answer is ever
# shown. The policy is a decoder of the package with one layer and random
# weights:
#
# $$ \pi_\theta(y \mid s) = \prod_{t=1}^{3} \pi_\theta(y_t \mid s, y_{<t}) . $$
#
# The table `ANSWERS` has all 1000 answers, so the expected reward
# $J(\theta) = \frac{1}{18} \sum_s \sum_y \pi_\theta(y \mid s)\, R(s, y)$ is a
# finite sum.
# %% [markdown] lang="zh"
# ## 1. 任务与策略
#
# prompt 是一个 5 到 22 的数 $s$，占一个 token。回答是三个数字，和等于 $s$
# 即为正确。每个 prompt 有 1000 个回答，其中 21 到 75 个是正确的，
# 训练中从不展示任何正确答案。策略是包里的一个 decoder，一层，随机权重：
#
# $$ \pi_\theta(y \mid s) = \prod_{t=1}^{3} \pi_\theta(y_t \mid s, y_{<t}) . $$
#
# 表 `ANSWERS` 列出全部 1000 个回答，所以期望奖励
# $J(\theta) = \frac{1}{18} \sum_s \sum_y \pi_\theta(y \mid s)\, R(s, y)$
# 是有限和。
# %%
TARGETS = jnp.arange(5, 23)
ANSWERS = jnp.stack(jnp.meshgrid(*[jnp.arange(10)] * 3, indexing='ij'), -1)
ANSWERS = ANSWERS.reshape(1000, 3)
config = DecoderConfig(
  vocab=40, d_model=32, heads=2, kv_heads=2, head_dim=16, ffn=64, layers=1
)
model = Decoder(config)
init = jax.jit(model.init)(
  jax.random.key(0), {'inputs': jnp.zeros((1, 3), int)}
)['params']


def right(targets, answers):
  """The reward: 1.0 if the digits add up to the target. [b], [b, 3] -> [b]."""
  return (answers.sum(axis=-1) == targets).astype(jnp.float32)


def digit_logps(params, targets, answers):
  """log pi of each digit of answers: [b], [b, 3] -> [b, 3]."""
  # Tokens 0 to 9 are digits, 10 + s is the prompt s.
  inputs = jnp.concatenate([10 + targets[:, None], answers[:, :2]], axis=1)
  logits = model.apply({'params': params}, {'inputs': inputs})[..., :10]
  logps = jax.nn.log_softmax(logits)
  return jnp.take_along_axis(logps, answers[..., None], axis=-1)[..., 0]


def sample(params, targets, key):
  """Draws an answer to each prompt: [b, 3]."""
  answers = jnp.zeros((len(targets), 3), int)
  for t, k in enumerate(jax.random.split(key, 3)):
    inputs = jnp.concatenate([10 + targets[:, None], answers[:, :2]], axis=1)
    logits = model.apply({'params': params}, {'inputs': inputs})[:, t, :10]
    answers = answers.at[:, t].set(jax.random.categorical(k, logits))
  return answers


# %% [markdown] lang="en"
# Two checks before anything is trained: the probabilities of the 1000 answers
# add up to 1 for each prompt, and the log-probabilities are those that the
# package's objectives compute. The latter is the input of every algorithm
# below.
# %% [markdown] lang="zh"
# 训练之前做两个检查：每个 prompt 的 1000 个回答的概率之和为 1；
# 对数概率与包的目标函数计算的一致。后者是下面所有算法的输入。
# %%
PAIRS = jnp.repeat(TARGETS, 1000), jnp.tile(ANSWERS, (len(TARGETS), 1))


@jax.jit
def exact_policy(params):
  """pi(y | s) of all answers: [targets, 1000]."""
  logps = digit_logps(params, *PAIRS).sum(axis=-1)
  return jnp.exp(logps).reshape(len(TARGETS), 1000)


def exact_objective(params, reward=right):
  rewards = reward(*PAIRS).reshape(len(TARGETS), 1000)
  return jnp.mean(jnp.sum(exact_policy(params) * rewards, axis=-1))


np.testing.assert_allclose(exact_policy(init).sum(axis=-1), 1, rtol=1e-4)
print(f'right answers of the untrained policy: {exact_objective(init):.1%}')

some_targets, some_answers = TARGETS[:4], ANSWERS[jnp.array([7, 99, 500, 42])]
some_inputs = jnp.concatenate(
  [10 + some_targets[:, None], some_answers[:, :2]], axis=1
)
rows = {
  'inputs': some_inputs,
  'targets': some_answers,
  'targets_mask': jnp.ones((4, 3), bool),
}  # fmt: skip
logits = model.apply({'params': init}, rows)[..., :10]
np.testing.assert_allclose(
  digit_logps(init, some_targets, some_answers),
  token_logps(logits, rows),
  atol=1e-5,
)

# %% [markdown] lang="en"
# ## 2. The policy gradient
#
# The reward is the output of a program, so it has no derivative, and the answer
# is sampled, which has none either. But the *expectation* is a smooth function
# of $\theta$. With $\nabla \pi = \pi\, \nabla \log \pi$,
#
# $$ \nabla J = \sum_y R(y)\, \nabla \pi(y) = \sum_y \pi(y)\, R(y)\, \nabla \log
# \pi(y) = E_{y \sim \pi} \big[ R(y)\, \nabla \log \pi(y) \big] . $$
#
# So: draw answers, weight the gradient of their log-likelihood by their reward.
# It is SFT on the model's own answers, with weights. This is REINFORCE.
#
# For any number $b$ that does not depend on $y$,
# $E[b\, \nabla \log \pi] = b\, \nabla \sum_y \pi(y) = b\, \nabla 1 = 0$. A
# *baseline* may therefore be subtracted, $(R - b)\, \nabla \log \pi$, without
# changing the mean. It changes the variance: without it every right answer is
# pushed up and wrong ones are left alone; with it wrong ones are pushed down as
# well.
#
# As a loss for automatic differentiation:
# $-\frac{1}{n} \sum_i A_i \log \pi_\theta(y_i)$ with the *advantage* $A_i$ as a
# constant. The value of this loss means nothing; only its gradient does.
# %% [markdown] lang="zh"
# ## 2. 策略梯度
#
# 奖励是一段程序的输出，没有导数；回答是采样得到的，也没有导数。但**期望**是
# $\theta$ 的光滑函数。由 $\nabla \pi = \pi\, \nabla \log \pi$ 得
#
# $$ \nabla J = \sum_y R(y)\, \nabla \pi(y) = \sum_y \pi(y)\, R(y)\, \nabla \log
# \pi(y) = E_{y \sim \pi} \big[ R(y)\, \nabla \log \pi(y) \big] . $$
#
# 也就是：采样回答，用奖励给它们对数似然的梯度加权。
# 这就是在模型自己的回答上做带权重的 SFT，称为 REINFORCE。
#
# 对任何不依赖 $y$ 的数 $b$，有
# $E[b\, \nabla \log \pi] = b\, \nabla \sum_y \pi(y) = b\, \nabla 1 = 0$。
# 因此可以减去**基线**，用 $(R - b)\, \nabla \log \pi$，均值不变，方差改变：
# 没有基线时，正确的回答都被推高，错误的回答不受影响；有了基线，
# 错误的回答还会被压低。
#
# 写成可自动求导的损失：$-\frac{1}{n} \sum_i A_i \log \pi_\theta(y_i)$，
# 其中**优势**（advantage）$A_i$ 当作常数。这个损失的数值没有意义，
# 有意义的只有它的梯度。
# %%
GROUP = 16  # answers per prompt and step
PROMPTS = jnp.repeat(TARGETS, GROUP)


def policy_gradient_loss(params, targets, answers, advantages):
  logps = digit_logps(params, targets, answers).sum(axis=-1)
  return -jnp.mean(jax.lax.stop_gradient(advantages) * logps)


def no_baseline(rewards):
  return rewards


def leave_one_out(rewards):
  """R minus the mean of the other answers to the same prompt."""
  groups = rewards.reshape(-1, GROUP)
  others = (groups.sum(axis=1, keepdims=True) - groups) / (GROUP - 1)
  return (groups - others).ravel()


def flat(tree):
  return jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])


@functools.partial(jax.jit, static_argnums=(2, 3))
def gradient_samples(params, key, advantage_fn, count):
  """Estimates of the gradient of J from `count` batches: [count, weights]."""

  def estimate(key):
    answers = sample(params, PROMPTS, key)
    advantages = advantage_fn(right(PROMPTS, answers))
    gradient = jax.grad(policy_gradient_loss)(
      params, PROMPTS, answers, advantages
    )
    return -flat(gradient)

  return jax.lax.map(estimate, jax.random.split(key, count))


# %% [markdown] lang="en"
# The loop is the same for all algorithms: sample, score, make advantages,
# update. It runs as one compiled program of 70 steps. REINFORCE takes one
# gradient step for each batch of 18 x 16 answers.
# %% [markdown] lang="zh"
# 所有算法的循环都相同：采样、打分、计算优势、更新。它被编译成一个 70 步的程序。
# REINFORCE 对每批 18 x 16 个回答做一步梯度更新。
# %%
STEPS = 70
optimizer = optax.adam(1.5e-3)


def reinforce_step(advantage_fn, state, key):
  params, opt = state
  answers = sample(params, PROMPTS, key)
  rewards = right(PROMPTS, answers)
  gradient = jax.grad(policy_gradient_loss)(
    params, PROMPTS, answers, advantage_fn(rewards)
  )
  updates, opt = optimizer.update(gradient, opt)
  return (optax.apply_updates(params, updates), opt), rewards.mean()


def train(step, state, steps=STEPS, seed=0):
  """Runs `steps` steps; returns (state, mean reward of each batch)."""
  keys = jax.random.split(jax.random.key(seed), steps)
  return jax.jit(lambda s: jax.lax.scan(step, s, keys))(state)


def start():
  return init, optimizer.init(init)


curves, trained = {}, {}
for name, advantage_fn in (
  ('REINFORCE', no_baseline),
  ('REINFORCE, baseline', leave_one_out),
):
  step = functools.partial(reinforce_step, advantage_fn)
  (trained[name], _), curves[name] = train(step, start())
  print(f'{name:20} {exact_objective(trained[name]):.1%} right')

# %% [markdown] lang="en"
# Now the estimators against the truth. The exact gradient is the derivative of
# the finite sum. We take the policy half-way through the training with a
# baseline, draw 60 batches, and look at two things: whether the mean of the
# estimates agrees with the exact gradient, and how much they scatter.
# %% [markdown] lang="zh"
# 现在把估计量与真值比较。精确梯度就是有限和的导数。取带基线训练到一半时的策略，
# 抽 60 个 batch，看两件事：估计的均值是否与精确梯度一致，以及它们有多分散。
# %%
half_step = functools.partial(reinforce_step, leave_one_out)
HALF = 35
(half, _), _ = train(half_step, start(), steps=HALF)
exact = flat(jax.jit(jax.grad(exact_objective))(half))
print(f'the policy is right in {exact_objective(half):.1%}')
scatter = {}
for advantage_fn in (no_baseline, leave_one_out):
  estimates = gradient_samples(half, jax.random.key(1), advantage_fn, 60)
  # The part of each estimate along the exact gradient; 1 if it is exact.
  along = estimates @ exact / (exact @ exact)
  error = along.std() / np.sqrt(len(along))
  scatter[advantage_fn] = float(jnp.mean(jnp.sum((estimates - exact) ** 2, 1)))
  print(
    f'{advantage_fn.__name__:14} along the exact gradient '
    f'{along.mean():.3f} +- {error:.3f}, '
    f'squared error of a batch {scatter[advantage_fn]:.2e}'
  )
  assert abs(along.mean() - 1) < 4 * error, 'the estimator is biased'
  assert error < 0.2, 'too noisy to tell'
print(f'squared length of the exact gradient: {exact @ exact:.2e}')


# %% [markdown] lang="en"
# Both are unbiased. But look at the squared errors: they are larger than the
# gradient itself, which is what "noisy" means, and the baseline may not have
# helped. Textbooks say that it reduces the variance; let us compute when. For a
# constant baseline $b$ and one answer with $g = \nabla \log \pi(y)$,
#
# $$ \mathrm{Var}(b) = E\big[ (R - b)^2\, \|g\|^2 \big] - \|\nabla J\|^2 , $$
#
# a parabola in $b$ with its minimum at $b^* = E[R\, \|g\|^2] / E[\|g\|^2]$.
# This is the mean reward only if the length of $g$ has nothing to do with the
# reward. An answer that the policy thinks improbable has a long gradient, and
# when most answers are right, the improbable ones are the wrong ones: $b^*$ is
# then below the mean reward. The next cell prints the first term,
# $E[(R - b)^2\, \|g\|^2]$, for three values of $b$ (the same for all prompts),
# and the mean of $\|g\|^2$ of wrong and of right answers.
# %% [markdown] lang="zh"
# 两者都是无偏的。但请看平方误差：它比梯度本身还大，“噪声大”就是这个意思，
# 而基线不一定有帮助。教科书说基线会减小方差；我们来算一算什么时候成立。
# 设基线为常数 $b$，单个回答的 $g = \nabla \log \pi(y)$，则
#
# $$ \mathrm{Var}(b) = E\big[ (R - b)^2\, \|g\|^2 \big] - \|\nabla J\|^2 , $$
#
# 它是 $b$ 的抛物线，最小值在 $b^* = E[R\, \|g\|^2] / E[\|g\|^2]$。只有当 $g$
# 的长度与奖励无关时，它才等于平均奖励。策略认为不太可能的回答，梯度很长；
# 当多数回答已经正确时，不太可能的正是错误的回答，于是 $b^*$ 低于平均奖励。
# 下面的代码对三个 $b$（所有 prompt 相同）打印第一项
# $E[(R - b)^2\, \|g\|^2]$，以及错误回答和正确回答的 $\|g\|^2$ 的均值。
# %%
@jax.jit
def squared_norms(params, targets, answers):
  """||grad log pi(y)||^2 of each answer: [b]."""

  def one(target, answer):
    gradient = jax.grad(
      lambda p: digit_logps(p, target[None], answer[None]).sum()
    )(params)
    return jnp.sum(flat(gradient) ** 2)

  return jax.vmap(one)(targets, answers)


second_moments = {}
for stage, params in (
  ('at the start', init),
  ('half-way', half),
  ('at the end', trained['REINFORCE, baseline']),
):
  targets = jnp.repeat(TARGETS, 60)
  drawn = jax.jit(sample)(params, targets, jax.random.key(7))
  norms, rewards = squared_norms(params, targets, drawn), right(targets, drawn)
  baselines = {
    'none': 0.0,
    'mean reward': float(rewards.mean()),
    'best': float((rewards * norms).sum() / norms.sum()),
  }
  for name, b in baselines.items():
    second_moments[stage, name] = float(jnp.mean((rewards - b) ** 2 * norms))
    print(
      f'{stage:12} baseline {name:11} {b:.2f}: '
      f'{second_moments[stage, name]:.1f}'
    )
  wrong = norms[rewards == 0].mean()
  print(f'{stage:12} wrong {wrong:.0f}, right {norms[rewards > 0].mean():.1f}')
  assert wrong > norms[rewards > 0].mean()
  assert second_moments[stage, 'best'] <= second_moments[stage, 'mean reward']
  assert second_moments[stage, 'best'] < second_moments[stage, 'none']
assert (
  second_moments['half-way', 'mean reward'] > second_moments['half-way', 'none']
), 'read the text below again: here the mean reward would help'
# Independent answers: the error of a batch is that of one answer / 288.
predicted = (second_moments['half-way', 'none'] - exact @ exact) / len(PROMPTS)
assert 0.7 < predicted / scatter[no_baseline] < 1.4, (predicted, scatter)

# %% [markdown] lang="en"
# The last check ties the formula to the measured scatter of batches. The best
# constant baseline always helps. The mean reward, which most programs use,
# changes little at the start, when nearly all answers are wrong, and half-way
# it makes the estimate *noisier* than no baseline in this task. Its merits are
# practical: it needs no knowledge of gradients, it adapts to prompts of
# different difficulty, and it gives wrong answers a negative advantage, so that
# they are pushed down.
#
# ## 3. PPO
#
# Sampling is expensive, so one would like to take several gradient steps with
# the same answers. After the first step they are no longer samples of the
# current policy. *Importance sampling* corrects this with the ratio
# $\rho = \pi_\theta / \pi_{old}$:
#
# $$ E_{y \sim \pi_{old}} \left[ \rho_\theta(y)\, A(y) \right], \qquad
# \nabla_\theta \big[ \rho_\theta A \big] \Big|_{\theta = \theta_{old}} = A\,
# \nabla \log \pi_\theta . $$
#
# At $\theta_{old}$ it is the policy gradient; farther away the ratio may become
# huge. PPO (Schulman et al., arXiv:1707.06347) removes the incentive to go
# farther: per token it maximizes
#
# $$ \min\big( \rho A,\; \mathrm{clip}(\rho, 1 - \epsilon, 1 + \epsilon)\, A
# \big) . $$
#
# If the advantage is positive, there is no gain beyond $1 + \epsilon$; if it is
# negative, none below $1 - \epsilon$. The `min` leaves the other side alone: a
# good token that has become *less* likely keeps its full gradient, so that
# mistakes are repaired. The pictures below have this function on the vertical
# axis, for $\epsilon = 0.2$.
# %% [markdown] lang="zh"
# 最后一个检查把公式与实测的 batch 误差联系起来。最优的常数基线总有帮助。
# 多数程序使用的平均奖励，在开始时（几乎所有回答都错）影响很小，
# 而训练到一半时，在这个任务上它让估计比没有基线**噪声更大**。它的优点是实用：
# 不需要知道梯度，能适应不同难度的 prompt，而且给错误的回答负的优势，
# 把它们压低。
#
# ## 3. PPO
#
# 采样很贵，所以希望用同一批回答做多步梯度更新。第一步之后，
# 这些回答就不再是当前策略的样本。**重要性采样**用比率
# $\rho = \pi_\theta / \pi_{old}$ 来修正：
#
# $$ E_{y \sim \pi_{old}} \left[ \rho_\theta(y)\, A(y) \right], \qquad
# \nabla_\theta \big[ \rho_\theta A \big] \Big|_{\theta = \theta_{old}} = A\,
# \nabla \log \pi_\theta . $$
#
# 在 $\theta_{old}$ 处它就是策略梯度；走远以后比率可能变得很大。PPO（Schulman et
# al.，arXiv:1707.06347）去掉了走远的动机：对每个 token 最大化
#
# $$ \min\big( \rho A,\; \mathrm{clip}(\rho, 1 - \epsilon, 1 + \epsilon)\, A
# \big) . $$
#
# 优势为正时，超过 $1 + \epsilon$ 不再有收益；为负时，低于 $1 - \epsilon$
# 不再有收益。`min` 不影响另一侧：一个好 token 如果反而变得**更不可能**，
# 它仍有完整的梯度，错误因此能被纠正。下图的纵轴就是这个函数，
# $\epsilon = 0.2$。
# %%
CLIP = 0.2


def surrogate(ratio, advantage):
  clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
  return jnp.minimum(ratio * advantage, clipped * advantage)


slope = jax.vmap(jax.grad(surrogate), in_axes=(0, None))
ratios = jnp.array([0.5, 1.0, 1.5])
for advantage, expected in ((1.0, [1, 1, 0]), (-1.0, [0, -1, -1])):
  np.testing.assert_array_equal(slope(ratios, advantage), expected)

figure, axes = plt.subplots(1, 2, figsize=(5, 1.6))
grid = jnp.linspace(0.4, 1.8, 200)
for advantage, ax in zip((1.0, -1.0), axes, strict=True):
  ax.plot(grid, grid * advantage, '--', lw=1, label='without clipping')
  ax.plot(grid, surrogate(grid, advantage), label='PPO')
  ax.set(xlabel='ratio', title=f'A = {advantage:+.0f}')
axes[0].legend(fontsize=6, loc='lower right')
plt.tight_layout()
plt.show()

# %% [markdown] lang="en"
# ### The critic and GAE
#
# PPO gives each *token* an advantage. A critic $V_t$ estimates the expected
# reward from the prompt and the tokens before token $t$. Writing a digit is
# good if it raises that expectation: $\delta_t = r_t + V_{t+1} - V_t$, with
# $r_t = 0$ except at the end and $V = 0$ after it (rewards are not discounted
# here). The single $\delta_t$ has little variance but the critic's bias; the
# sum of all $\delta$ to the end, $R - V_t$, does not depend on later values of
# the critic, but has much variance. *Generalized advantage estimation* (GAE,
# arXiv:1506.02438) mixes them by $\lambda$ between 0 and 1:
#
# $$ A_t = \sum_{k \ge 0} \lambda^k \delta_{t+k} \qquad \Longleftrightarrow
# \qquad A_t = \delta_t + \lambda A_{t+1} . $$
#
# In this task the expectation depends on the target, the number of digits and
# their sum so far only, so the critic is a table `[targets, 3, 19]`.
# %% [markdown] lang="zh"
# ### Critic 与 GAE
#
# PPO 给每个 **token** 一个优势。critic $V_t$ 根据 prompt 和第 $t$ 个 token
# 之前的 token 估计期望奖励。写下一个数字如果提高了这个期望，就是好的：
# $\delta_t = r_t + V_{t+1} - V_t$，其中 $r_t$ 只在最后非零，结束之后
# $V = 0$（这里奖励不打折扣）。单独一个 $\delta_t$ 方差小，但带有 critic
# 的偏差；所有 $\delta$ 一直累加到末尾得 $R - V_t$，它不依赖 critic
# 后面的估计，但方差大。**广义优势估计**（GAE，arXiv:1506.02438）用 0 到 1
# 之间的 $\lambda$ 把两者混合：
#
# $$ A_t = \sum_{k \ge 0} \lambda^k \delta_{t+k} \qquad \Longleftrightarrow
# \qquad A_t = \delta_t + \lambda A_{t+1} . $$
#
# 在这个任务中，期望只依赖目标、已写数字的个数及其和，所以 critic 是一张表
# `[targets, 3, 19]`。
# %%
LAMBDA = 0.95


def gae(rewards, values):
  """Advantages [b, t] of rewards at the end [b] and values [b, t]."""
  after = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
  delta = after - values
  delta = delta.at[:, -1].add(rewards)
  advantages = [delta[:, -1]]
  for t in reversed(range(delta.shape[1] - 1)):
    advantages.append(delta[:, t] + LAMBDA * advantages[-1])
  return jnp.stack(advantages[::-1], axis=1)


rng = np.random.default_rng(0)
R, V = rng.normal(size=5), rng.normal(size=(5, 3))
full = np.concatenate([V, np.zeros((5, 1))], axis=1)
deltas = np.stack([
  full[:, t + 1] - full[:, t] + (R if t == 2 else 0) for t in range(3)
], axis=1)  # fmt: skip
for t in range(3):
  by_definition = sum(LAMBDA**k * deltas[:, t + k] for k in range(3 - t))
  np.testing.assert_allclose(gae(R, V)[:, t], by_definition, rtol=1e-5)


def state_values(critic, targets, answers):
  """V before each digit: [b, 3]."""
  sums = jnp.cumsum(answers, axis=1)[:, :2]
  sums = jnp.pad(sums, ((0, 0), (1, 0)))
  return critic[targets[:, None] - 5, jnp.arange(3), sums]


# %% [markdown] lang="en"
# ### The KL penalty
#
# RLHF also penalizes the KL divergence from the model at the start, $\pi_{ref}$
# (section 2 of notebook 22). It has to be estimated from sampled answers. With
# $q = \pi_{ref}(y) / \pi(y)$ and $y \sim \pi$, two estimators are common:
# $k_1 = -\log q$ and $k_3 = q - 1 - \log q$. As
# $E[q - 1] = \sum \pi_{ref} - \sum \pi = 0$, both have the mean
# $KL(\pi \| \pi_{ref})$. $k_3$ is never negative, and where the policies are
# close its variance is smaller, because $q - 1 \approx \log q$ cancels the
# first order.
# %% [markdown] lang="zh"
# ### KL 惩罚
#
# RLHF 还惩罚与初始模型 $\pi_{ref}$ 的 KL 散度（见 notebook 22 第 2 节）。
# 它要用采样的回答来估计。令 $q = \pi_{ref}(y) / \pi(y)$，$y \sim \pi$，
# 常用两个估计量：$k_1 = -\log q$ 和 $k_3 = q - 1 - \log q$。由于
# $E[q - 1] = \sum \pi_{ref} - \sum \pi = 0$，两者的均值都是
# $KL(\pi \| \pi_{ref})$。$k_3$ 从不为负；两个策略接近时它的方差更小，因为
# $q - 1 \approx \log q$ 抵消了一阶项。
# %%
def exact_kl(params, reference):
  p, q = exact_policy(params), exact_policy(reference)
  return jnp.mean(jnp.sum(p * (jnp.log(p) - jnp.log(q)), axis=-1))


(early, _), _ = train(half_step, start(), steps=3)
many = jnp.repeat(TARGETS, 2000)
deviations = {}
for distance, params in (('close', early), ('far', half)):
  drawn = jax.jit(sample)(params, many, jax.random.key(2))
  log_q = (
    digit_logps(init, many, drawn) - digit_logps(params, many, drawn)
  ).sum(axis=-1)
  truth = exact_kl(params, init)
  for name, values in (('k1', -log_q), ('k3', jnp.exp(log_q) - 1 - log_q)):
    error = values.std() / np.sqrt(len(values))
    deviations[distance, name] = float(values.std())
    print(
      f'{distance:5} {name}: {values.mean():.4f} +- {error:.4f}, '
      f'exact {truth:.4f}, deviation of one answer {values.std():.3f}'
    )
    if distance == 'close':
      assert abs(values.mean() - truth) < 4 * error, f'{name} is biased'
assert deviations['close', 'k3'] < deviations['close', 'k1']
assert deviations['far', 'k3'] > deviations['far', 'k1']

# %% [markdown] lang="en"
# Close to the reference $k_3$ is much better. Far from it $q$ has a heavy tail:
# rare answers that the reference likes much more than the policy dominate the
# sum, and $k_1$ is the better estimator. The policy of this notebook moves far;
# in RLHF with small steps and a penalty it is usually close.
#
# Now all parts together: sample, advantages from the critic, then four gradient
# steps with the same answers.
# %% [markdown] lang="zh"
# 在参考模型附近，$k_3$ 好得多。离得远时 $q$ 有重尾：
# 参考模型比策略更偏爱的罕见回答主导了求和，$k_1$ 反而是更好的估计量。本
# notebook 的策略走得很远；RLHF 步子小并有惩罚，通常离得近。
#
# 现在把各部分合在一起：采样，由 critic 计算优势，
# 然后用同一批回答做四步梯度更新。
# %%
EPOCHS = 4


def ppo_loss(params, targets, answers, advantages, old_logps):
  ratio = jnp.exp(digit_logps(params, targets, answers) - old_logps)
  return -jnp.mean(surrogate(ratio, advantages))


def several_epochs(loss, params, opt):
  """EPOCHS gradient steps on the same answers."""

  def epoch(state, _):
    params, opt = state
    updates, opt = optimizer.update(jax.grad(loss)(params), opt)
    return (optax.apply_updates(params, updates), opt), None

  return jax.lax.scan(epoch, (params, opt), length=EPOCHS)[0]


def ppo_step(state, key):
  params, opt, critic = state
  answers = sample(params, PROMPTS, key)
  rewards = right(PROMPTS, answers)
  old_logps = digit_logps(params, PROMPTS, answers)
  advantages = gae(rewards, state_values(critic, PROMPTS, answers))
  params, opt = several_epochs(
    lambda p: ppo_loss(p, PROMPTS, answers, advantages, old_logps), params, opt
  )

  def critic_loss(critic):
    errors = state_values(critic, PROMPTS, answers) - rewards[:, None]
    return jnp.sum(errors**2) / 2

  # A step towards the mean reward of each visited state.
  critic = critic - 0.05 * jax.grad(critic_loss)(critic)
  return (params, opt, critic), rewards.mean()


critic = jnp.zeros((len(TARGETS), 3, 19))
(trained['PPO'], _, critic), curves['PPO'] = train(ppo_step, (*start(), critic))
print(f'PPO {exact_objective(trained["PPO"]):.1%} right')

# %%
# With ratio 1 the gradient is that of REINFORCE with the same advantages.
answers = sample(half, PROMPTS, jax.random.key(3))
A = leave_one_out(right(PROMPTS, answers))
old = digit_logps(half, PROMPTS, answers)
np.testing.assert_allclose(
  3 * flat(jax.grad(ppo_loss)(half, PROMPTS, answers, A[:, None], old)),
  flat(jax.grad(policy_gradient_loss)(half, PROMPTS, answers, A)),
  rtol=1e-4,
  atol=1e-5,
  err_msg='the mean over three digits is a third of the sum',
)


# %% [markdown] lang="en"
# ## 4. GRPO
#
# A critic of a language model is a second model of the same size. GRPO (Shao et
# al., arXiv:2402.03300) replaces it by the answers that are sampled anyway: $G$
# answers to a prompt, and
#
# $$ A_i = \frac{R_i - \mathrm{mean}(R_1 \dots R_G)}{\mathrm{std}(R_1 \dots
# R_G)} $$
#
# for all tokens of answer $i$, with PPO's clipped loss. The KL penalty is a
# term of the loss, $k_3$ of each token times a weight; it is 0 in this section
# and is used in the next. Two consequences are visible in the formula. A group
# whose answers are all right or all wrong has $R_i = \mathrm{mean}$, so its
# advantages are zero: prompts that are too easy or too hard teach nothing and
# cost as much as others. And the division by the standard deviation gives
# prompts with rare success *or* rare failure more weight than the policy
# gradient would.
# %% [markdown] lang="zh"
# ## 4. GRPO
#
# 语言模型的 critic 是另一个同样大小的模型。GRPO（Shao et al.，
# arXiv:2402.03300）用本来就要采样的回答代替它：对一个 prompt 采样 $G$ 个回答，
#
# $$ A_i = \frac{R_i - \mathrm{mean}(R_1 \dots R_G)}{\mathrm{std}(R_1 \dots
# R_G)} $$
#
# 用于回答 $i$ 的所有 token，损失是 PPO 的裁剪损失。KL
# 惩罚是损失中的一项，即每个 token 的 $k_3$ 乘以一个权重；本节中权重为
# 0，下一节才用到。从公式可以看出两个后果。全对或全错的组有
# $R_i = \mathrm{mean}$，优势为零：太容易或太难的 prompt
# 不提供任何学习信号，成本却与其他 prompt 相同。除以标准差，
# 会让成功罕见**或**失败罕见的 prompt 得到比策略梯度更大的权重。
# %%
def group_advantages(rewards):
  groups = rewards.reshape(-1, GROUP)
  centred = groups - groups.mean(axis=1, keepdims=True)
  return (centred / (groups.std(axis=1, keepdims=True) + 1e-4)).ravel()


def grpo_step(reward, kl_weight, prompts, state, key):
  params, opt, reference = state
  answers = sample(params, prompts, key)
  rewards = reward(prompts, answers)
  old_logps = digit_logps(params, prompts, answers)
  ref_logps = digit_logps(reference, prompts, answers)
  advantages = group_advantages(rewards)[:, None]

  def loss(params):
    logps = digit_logps(params, prompts, answers)
    log_q = ref_logps - logps
    k3 = jnp.exp(log_q) - 1 - log_q
    gain = surrogate(jnp.exp(logps - old_logps), advantages)
    return -jnp.mean(gain - kl_weight * k3)

  params, opt = several_epochs(loss, params, opt)
  groups = rewards.reshape(-1, GROUP)
  silent = jnp.mean(groups.std(axis=1) == 0)
  return (params, opt, reference), (rewards.mean(), silent)


step = functools.partial(grpo_step, right, 0.0, PROMPTS)
(trained['GRPO'], *_), (curves['GRPO'], silent) = train(step, (*start(), init))
for name, params in trained.items():
  print(f'{name:20} {exact_objective(params):.1%} right')
print(f'groups without any gradient at the end: {silent[-20:].mean():.0%}')
assert float(jnp.abs(group_advantages(jnp.ones(2 * GROUP))).max()) == 0

# %%
figure, axes = plt.subplots(1, 2, figsize=(5.5, 2))
for name, curve in curves.items():
  smooth = np.convolve(curve, np.ones(9) / 9, mode='valid')
  axes[0].plot(smooth, lw=1, label=name)
axes[0].set(xlabel='batch of 288 answers', ylabel='right answers')
axes[0].legend(fontsize=6)
axes[1].plot(np.convolve(silent, np.ones(9) / 9, mode='valid'), lw=1)
axes[1].set(xlabel='batch', ylabel='silent groups', ylim=(0, 1))
plt.tight_layout()
plt.show()
chance = float(exact_objective(init))
for name, params in trained.items():
  assert exact_objective(params) > 5 * chance, f'{name} has not learned'
for name in ('PPO', 'GRPO'):
  early_mean = np.mean(curves[name][:40])
  assert early_mean > np.mean(curves['REINFORCE, baseline'][:40]), name

# %% [markdown] lang="en"
# All have found right answers from a reward of one bit. PPO and GRPO take four
# steps per batch and therefore learn faster *per answer*; per gradient step the
# comparison would be another one. (The curves are means over 9 batches.) On the
# right: as the policy improves, more and more groups are all right (silent in
# the picture: all advantages are 0) and the batch gets effectively smaller.
# Programs sample further prompts until enough groups have both outcomes (DAPO,
# arXiv:2503.14476).
#
# One run of each with one rate is no ranking of algorithms.
#
# ## 5. Reward hacking
#
# Now the reward is a *model*. People want three digits whose sum is close to
# $s$: the true reward is $-|{\textstyle\sum} y - s|$. They compare answers of
# the untrained policy, whose digits are nearly uniform, so their sums are
# mostly *below* the targets 15 to 21. A reward model with one feature, the sum,
# is fitted to the comparisons by Bradley-Terry. On its data it is good: a
# larger sum is mostly closer to the target. Then it is optimized.
# %% [markdown] lang="zh"
# 只凭一个比特的奖励，所有算法都找到了正确答案。PPO 和 GRPO 每批做四步更新，
# 所以**按回答数**算学得更快；按梯度步数比较则是另一回事。（曲线是 9 个 batch
# 的滑动平均。）右图：随着策略变好，越来越多的组全对（图中的 silent
# groups，优势全为 0），batch 实际上变小了。
# 实际系统会继续采样其他 prompt，直到有足够多的组同时包含两种结果（DAPO，
# arXiv:2503.14476）。
#
# 每种算法只用一个学习率跑一次，不能据此给算法排名。
#
# ## 5. Reward hacking
#
# 现在奖励是一个**模型**。人们希望三个数字之和接近 $s$：真实奖励是
# $-|{\textstyle\sum} y - s|$。他们比较未训练策略的回答，数字近似均匀分布，
# 所以对目标 15 到 21 来说，和大多**偏小**。用 Bradley-Terry
# 在这些比较上拟合一个只有一个特征（和）的奖励模型。在它的数据上它是好的：
# 多数情况下，和越大越接近目标。然后去优化它。
# %%
HIGH = jnp.repeat(jnp.arange(15, 22), 2 * GROUP)


def closeness(targets, answers):
  return -jnp.abs(answers.sum(axis=-1) - targets).astype(jnp.float32)


keys = jax.random.split(jax.random.key(4), 3)
one, two = (jax.jit(sample)(init, HIGH, k) for k in keys[:2])
p_first = jax.nn.sigmoid(closeness(HIGH, one) - closeness(HIGH, two))
first = jax.random.bernoulli(keys[2], p_first)
difference = np.where(first, 1, -1) * (one - two).sum(axis=-1)
weight = 0.0
for _ in range(200):
  weight += 0.01 * np.mean(difference / (1 + np.exp(weight * difference)))
agreement = np.mean((weight * difference > 0) + 0.5 * (difference == 0))
print(f'{len(HIGH)} comparisons, weight of the sum {weight:.3f}')
print(f'the reward model agrees with {agreement:.0%} of its labels')
assert weight > 0 and agreement > 0.6


def proxy(targets, answers):
  return weight * answers.sum(axis=-1).astype(jnp.float32)


# %%
# Means over the targets of this part, not over all 18.
is_high = ((TARGETS >= 15) & (TARGETS <= 21))[:, None]
SUMS = ANSWERS.sum(axis=-1)


@jax.jit
def true_and_proxy(params):
  policy = exact_policy(params) * is_high / is_high.sum()
  distance = jnp.abs(SUMS - TARGETS[:, None])
  return jnp.sum(-policy * distance), jnp.sum(policy * SUMS) * weight


@jax.jit
def run(kl_weight, state, keys):
  step = functools.partial(grpo_step, proxy, kl_weight, HIGH)
  return jax.lax.scan(step, state, keys)[0]


BLOCKS, EACH = 16, 2
histories = {}
for kl_weight in (0.0, 0.5, 2.0):
  state, points = (*start(), init), [true_and_proxy(init)]
  for block in range(BLOCKS):
    keys = jax.random.split(jax.random.key(block), EACH)
    state = run(kl_weight, state, keys)
    points.append(true_and_proxy(state[0]))
  histories[kl_weight] = np.array(points)

figure, axes = plt.subplots(1, 2, figsize=(5.5, 2))
for kl_weight, points in histories.items():
  for i, ax in enumerate(axes):
    ax.plot(
      EACH * np.arange(BLOCKS + 1), points[:, i], lw=1, label=f'KL {kl_weight}'
    )
axes[0].set(xlabel='step', ylabel='true reward')
axes[1].set(xlabel='step', ylabel='reward model')
axes[0].legend(fontsize=7)
plt.tight_layout()
plt.show()

# %%
for kl_weight, points in histories.items():
  true, model_reward = points.T
  print(
    f'KL {kl_weight}: true reward {true[0]:.2f}, at best {true.max():.2f}, '
    f'at the end {true[-1]:.2f}; reward model {model_reward[0]:.2f} -> '
    f'{model_reward[-1]:.2f}'
  )
hacked, held = histories[0.0][:, 0], histories[2.0][:, 0]
assert hacked.max() > hacked[0] + 0.5, 'the proxy is good at first'
assert hacked[-1] < hacked[0], 'at the end it is worse than no training'
assert histories[0.0][-1, 1] > histories[0.0][0, 1]
assert held[-1] > hacked[-1] + 1, 'the KL penalty has no effect'

# %% [markdown] lang="en"
# The reward model rises throughout. The true reward first rises, then falls
# below its value before training: the policy has left the answers on which the
# reward model was fitted and writes mostly nines (three nines add up to 27,
# which is 9 from the targets on average). Nobody who looks at the training
# reward alone can see when that happens. The KL penalty keeps the policy where
# the reward model has data; the price is a policy that also moves less when the
# reward is right. Other measures: collect new comparisons from the current
# policy, stop by a second reward, or use rewards that a program verifies. The
# last are only as good as the program.
# %% [markdown] lang="zh"
# 奖励模型的分数一直上升。真实奖励先升后降，最后比训练之前还低：
# 策略离开了奖励模型拟合过的那些回答，几乎只写 9（三个 9 的和是
# 27，平均与目标相差 9）。
# 只看训练奖励的人看不出这是何时发生的。KL 惩罚把策略留在奖励模型有数据的地方；
# 代价是奖励正确时策略也走得更少。其他办法：用当前策略收集新的比较、
# 用第二个奖励决定何时停止，或者使用可由程序验证的奖励，
# 而后者也只和那个程序一样好。
# %% [markdown] lang="en"
# ## Exercises
#
# 1. *Easy.* Show by algebra and numerically that the leave-one-out advantage is
#    $\frac{G}{G - 1} (R_i - \mathrm{mean})$. What is then the difference
#    between it and GRPO's without the division?
# 2. *Medium.* Rejection sampling: keep the right answers of a batch and take an
#    SFT step on them. Show that its gradient is that of REINFORCE without a
#    baseline, up to a factor, and name the factor.
# 3. *Hard.* Write GRPO as an objective of the package: an `ObjectiveSpec` with
#    `prepare_batch` for the advantages and a `loss_fn` that returns sums,
#    without the KL penalty. Show that its loss and its gradient equal those of
#    this notebook. Read {{moepeft.objectives.objective.ObjectiveSpec}} for the
#    arguments of the two functions.
# %% [markdown] lang="zh"
# ## 练习
#
# 1. *容易。* 用代数和数值证明留一法优势等于
#    $\frac{G}{G - 1} (R_i - \mathrm{mean})$。那么它与不除以标准差的 GRPO
#    有什么区别？
# 2. *中等。* 拒绝采样：保留一个 batch 中正确的回答，在它们上面做一步 SFT。
#    证明其梯度等于不带基线的 REINFORCE 梯度乘以一个因子，并指出这个因子。
# 3. *困难。* 把 GRPO（不带 KL 惩罚）写成包的目标函数：一个 `ObjectiveSpec`，用
#    `prepare_batch` 计算优势，`loss_fn` 返回和。证明它的损失和梯度与本 notebook
#    相同。两个函数的参数见 {{moepeft.objectives.objective.ObjectiveSpec}}。
# %% [markdown] lang="en"
# ## Interview questions
#
# **Why does GRPO need no critic, and what does it pay for that?**
#
# <details><summary>Answer</summary>
#
# The critic of PPO serves as a baseline: the expected reward of the prompt and
# prefix. GRPO estimates that of the prompt by the mean of $G$ answers to it. It
# pays with samples ($G$ per prompt, at least some of which have to differ in
# reward), and with credit assignment: all tokens of an answer have the same
# advantage, whereas a critic with GAE can tell which token changed the
# expectation. For one reward at the end of a text and a fast sampler this is a
# good trade; memory for a second model is saved.
#
# </details>
#
# **The training reward rises, the evaluation falls. What do you check?**
#
# <details><summary>Answer</summary>
#
# Read samples first: the exploit is usually visible (longer answers, a format
# that the checker accepts, copying of the prompt). Then: the KL from the
# reference over time; the length; the true metric against KL for several
# checkpoints, to see where it turned; whether the checker accepts wrong answers
# (test it on known wrong ones); whether the reward is computed on what the user
# sees. Remedies: repair the checker, a larger KL weight or an earlier
# checkpoint, new labels from the current policy, a penalty for the shortcut.
#
# </details>
# %% [markdown] lang="zh"
# ## 面试题
#
# **GRPO 为什么不需要 critic？它为此付出了什么？**
#
# <details><summary>答案</summary>
#
# PPO 的 critic 充当基线：给定 prompt 和前缀的期望奖励。GRPO 用同一 prompt 的
# $G$ 个回答的均值来估计 prompt 的期望奖励。代价一是样本（每个 prompt 需要 $G$
# 个，而且其中奖励必须有差异），二是 credit assignment：一个回答的所有 token
# 优势相同，而带 GAE 的 critic 能分辨是哪个 token 改变了期望。
# 当奖励只在文末给出、采样又快时，这是划算的交换，还省下了第二个模型的显存。
#
# </details>
#
# **训练奖励上升，评测却下降。你检查什么？**
#
# <details><summary>答案</summary>
#
# 先读样本：漏洞通常一眼可见（回答变长、检查程序会放行的某种格式、照抄
# prompt）。然后看：与参考模型的 KL 随时间的变化；长度；多个 checkpoint
# 的真实指标与 KL 的关系，找到转折点；
# 检查程序是否会放行错误答案（用已知的错误答案测试它）；
# 奖励是否算在用户看到的内容上。补救：修好检查程序，加大 KL 权重或用更早的
# checkpoint，从当前策略收集新标签，对捷径加惩罚。
#
# </details>
# %% [markdown] lang="en"
# ## In the package
#
# The package has no PPO and no GRPO yet. What it has are the parts:
#
# - {{moepeft.objectives.objective.ObjectiveSpec}}: an objective is a loss
#   function that returns sums, with `prepare_rows` and `prepare_batch` before
#   the gradient, where sampled answers and advantages belong (exercise 3).
# - {{moepeft.objectives.paired_batch.token_logps}} and
#   {{moepeft.objectives.cross_entropy.token_losses}}: log-probabilities whose
#   gradient is written over the logits, so that `[b, t, v]` is held once.
# - {{moepeft.objectives.kto.prepare_batch}}: an objective that already needs a
#   statistic of the whole batch, its KL baseline.
# - {{moepeft.inference.engine.engine.Engine}}: answers of a policy with its
#   adapter, from the same engine that serves.
# - {{moepeft.objectives.reward.bradley_terry_loss}}: the reward model.
#
# Papers: PPO (arXiv:1707.06347), GAE (arXiv:1506.02438), InstructGPT
# (arXiv:2203.02155), leave-one-out REINFORCE for language models
# (arXiv:2402.14740), GRPO (arXiv:2402.03300), the effect of its divisions
# (arXiv:2503.20783), DAPO (arXiv:2503.14476), scaling of over-optimization
# (arXiv:2210.10760).
# %% [markdown] lang="zh"
# ## 在 moepeft 中
#
# 包里还没有 PPO 和 GRPO，但有它们的组成部分：
#
# - {{moepeft.objectives.objective.ObjectiveSpec}}：
#   目标函数是一个返回和的损失函数，求梯度之前有 `prepare_rows` 和
#   `prepare_batch`，采样的回答和优势就属于那里（练习 3）。
# - {{moepeft.objectives.paired_batch.token_logps}} 和
#   {{moepeft.objectives.cross_entropy.token_losses}}：对数概率，其梯度直接写在
#   logit 的内存上，因此 `[b, t, v]` 只存一份。
# - {{moepeft.objectives.kto.prepare_batch}}：一个已经需要整个 batch 统计量（KL
#   基线）的目标函数。
# - {{moepeft.inference.engine.engine.Engine}}：带 adapter 的策略由它生成回答，
#   与上线服务用的是同一个引擎。
# - {{moepeft.objectives.reward.bradley_terry_loss}}：奖励模型。
#
# 论文：PPO（arXiv:1707.06347）、GAE（arXiv:1506.02438）、
# InstructGPT（arXiv:2203.02155）、语言模型的留一法
# REINFORCE（arXiv:2402.14740）、GRPO（arXiv:2402.03300）、
# 它的两个除法的影响（arXiv:2503.20783）、DAPO（arXiv:2503.14476）、
# 过度优化的规律（arXiv:2210.10760）。
# %% [markdown] lang="en" tags=["solution"]
# # Solutions: reinforcement learning
#
# ## Exercise 1
#
# $R_i - \frac{1}{G-1} \sum_{j \ne i} R_j = R_i - \frac{G \bar R - R_i}{G - 1}$
# $= \frac{G}{G-1} (R_i - \bar R)$. Without the division GRPO's advantage is the
# same up to a constant, which the learning rate absorbs.
# %% [markdown] lang="zh" tags=["solution"]
# # 解答：强化学习
#
# ## 练习 1
#
# $R_i - \frac{1}{G-1} \sum_{j \ne i} R_j = R_i - \frac{G \bar R - R_i}{G - 1}$
# $= \frac{G}{G-1} (R_i - \bar R)$。不除以标准差时，GRPO 的优势只差一个常数，
# 可由学习率吸收。
# %% tags=["solution"]
rewards = jax.random.uniform(jax.random.key(5), (3 * GROUP,))
groups = rewards.reshape(3, GROUP)
centred = (groups - groups.mean(axis=1, keepdims=True)).ravel()
np.testing.assert_allclose(
  leave_one_out(rewards), GROUP / (GROUP - 1) * centred, atol=1e-6
)
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 2
#
# With rewards 0 and 1, REINFORCE sums the gradients of the log-likelihoods of
# the right answers and divides by all $n$; SFT divides by the number of right
# ones. The factor is the share of right answers. So rejection sampling takes
# steps of the same size however rare success is, and, like REINFORCE without a
# baseline, learns nothing from wrong answers.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 2
#
# 奖励为 0 和 1 时，REINFORCE 把正确回答的对数似然梯度相加再除以总数 $n$；SFT
# 除以正确回答的个数。因子就是正确率。所以无论成功多罕见，
# 拒绝采样每步的步长都一样；并且和不带基线的 REINFORCE 一样，
# 从错误回答中学不到东西。
# %% tags=["solution"]
prompts = jnp.repeat(TARGETS, GROUP)
answers = sample(half, prompts, jax.random.key(6))
is_right = right(prompts, answers) > 0


def sft_loss(params):
  chosen = np.nonzero(np.asarray(is_right))[0]
  logps = digit_logps(params, prompts[chosen], answers[chosen])
  return -jnp.mean(logps.sum(axis=-1))


by_rewards = jax.grad(policy_gradient_loss)(
  half, prompts, answers, right(prompts, answers)
)
np.testing.assert_allclose(
  flat(by_rewards),
  is_right.mean() * flat(jax.grad(sft_loss)(half)),
  rtol=1e-4,
  atol=1e-5,
)


# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 3
#
# The loss of a row is a sum over tokens, and the weight is the number of
# tokens, so that microbatches add up. The advantages need whole groups and
# therefore belong in `prepare_batch`, which sees the whole batch.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 3
#
# 一行的损失是对 token 求和，权重是 token 数，因此各个 microbatch 可以相加。
# 优势需要完整的组，所以放在能看到整个 batch 的 `prepare_batch` 里。
# %% tags=["solution"]
def grpo_sums(apply, variables, batch, rngs, settings):
  logits, _ = apply(variables, batch, mutable=['routing'])
  logps = -token_losses(logits, batch['targets'])
  ratio = jnp.exp(logps - batch['old_logps'])
  gains = surrogate(ratio, batch['advantages'][:, None])
  mask = batch['targets_mask']
  return -jnp.sum(jnp.where(mask, gains, 0)), {'weight': jnp.sum(mask)}


GRPO = ObjectiveSpec(
  loss_fn=grpo_sums,
  prepare_rows=lambda apply, variables, rows, rng: {},
  prepare_batch=lambda batch: (
    batch | {'advantages': group_advantages(batch['rewards'])}
  ),
).build()


def apply_digits(variables, rows, mutable=()):
  return model.apply(variables, rows)[..., :10], {}


batch = {
  'inputs': jnp.concatenate([10 + prompts[:, None], answers[:, :2]], axis=1),
  'targets': answers,
  'targets_mask': jnp.ones(answers.shape, bool),
  'old_logps': digit_logps(early, prompts, answers),
  'rewards': right(prompts, answers),
}
batch = GRPO.prepare(apply_digits, {'params': half}, batch)
theirs, their_gradient = jax.value_and_grad(
  lambda p: mean_loss(*GRPO(apply_digits, {'params': p}, batch, None))
)(half)
mine, my_gradient = jax.value_and_grad(ppo_loss)(
  half,
  prompts,
  answers,
  group_advantages(right(prompts, answers))[:, None],
  batch['old_logps'],
)
np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)
size = float(jnp.abs(flat(their_gradient)).max())
np.testing.assert_allclose(
  flat(my_gradient), flat(their_gradient), rtol=1e-3, atol=1e-5 * size
)

# SPDX-License-Identifier: Apache-2.0
# %% [markdown] lang="en"
# # Preferences: reward models and DPO
#
# For many tasks nobody can write the right answer down, but people can say
# which of two answers is better. This notebook turns such comparisons into
# training. It fits a reward model by hand, derives direct preference
# optimization (DPO) step by step from the problem that RLHF solves, implements
# the loss and its gradient, and trains it where the optimum is known in closed
# form, so that "it works" can be checked and not only believed. The last part
# measures three ways in which it goes wrong.
# %% [markdown] lang="zh"
# # 偏好：奖励模型与 DPO
#
# 许多任务没有人能写出标准答案，但人可以说出两个回答中哪个更好。本 notebook
# 把这样的比较变成训练：先手写一个奖励模型，再从 RLHF
# 要解的问题一步一步推导出直接偏好优化（direct preference optimization, DPO），
# 实现损失和梯度，并在最优解有闭式解的问题上训练，这样“有效”就可以被检验，
# 而不只是被相信。最后一部分测量它出错的三种方式。
# %% [markdown] lang="en"
# ## What you will understand
#
# - The Bradley-Terry model, and that a reward model is logistic regression on
#   differences.
# - The KL-constrained objective of RLHF and its exact solution.
# - Each step from that solution to the DPO loss, and what its gradient does.
# - What beta means, and how the loss, the reward and the KL divergence depend
#   on it.
# - Three pitfalls with numbers: no finite optimum, falling probability of
#   chosen answers, length.
#
# About 70 minutes. Before it: notebook 21 (supervised fine-tuning).
# %% [markdown] lang="zh"
# ## 你将理解什么
#
# - Bradley-Terry 模型，以及为什么奖励模型就是差值上的逻辑回归。
# - RLHF 的带 KL 约束的目标及其精确解。
# - 从这个解到 DPO 损失的每一步，以及它的梯度在做什么。
# - beta 的含义，损失、奖励和 KL 散度怎样随它变化。
# - 三个用数字测量的陷阱：没有有限的最优解、chosen 概率下降、长度。
#
# 大约 70 分钟。之前请先学习 notebook 21（监督微调）。
# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import pyplot as plt
from sklearn.linear_model import LogisticRegression

from moepeft.objectives import dpo
from moepeft.objectives.cross_entropy import mean_loss
from moepeft.objectives.paired_batch import token_logps
from moepeft.objectives.reward import bradley_terry_loss

rng = np.random.default_rng(0)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


# %% [markdown] lang="en"
# ## 1. A reward model by hand
#
# A person sees a prompt $x$ and two answers $y_1, y_2$ and picks one. The
# Bradley-Terry model assumes that each answer has a score $r(x, y)$ and that
#
# $$ p(y_1 \succ y_2 \mid x) = \sigma\big(r(x, y_1) - r(x, y_2)\big), \qquad
# \sigma(z) = \frac{1}{1 + e^{-z}} . $$
#
# Only *differences* matter: adding any $a(x)$ to all scores of a prompt changes
# nothing. A reward therefore has no zero, and rewards of different prompts
# cannot be compared. The negative log-likelihood of a labelled pair, with the
# chosen answer $y_c$ and the rejected answer $y_r$, is
#
# $$ \ell = -\log \sigma(\Delta), \quad \Delta = r(x, y_c) - r(x, y_r), \qquad
# \frac{\partial \ell}{\partial \Delta}
# = -(1 - \sigma(\Delta)) = -\sigma(-\Delta)
# . $$
#
# The derivative is near 0 for pairs that are rightly ordered with certainty,
# and near $-1$ for pairs that are wrongly ordered with certainty.
#
# Let the score be linear in features, $r = w \cdot \phi(x, y)$; in a language
# model $\phi$ is the last hidden state and $w$ a new output. Then the loss
# reads $w$ through $w \cdot (\phi_c - \phi_r)$ only: it is logistic regression
# on differences without an intercept.
# %% [markdown] lang="zh"
# ## 1. 手写奖励模型
#
# 一个人看到 prompt $x$ 和两个回答 $y_1, y_2$，选出一个。Bradley-Terry
# 模型假设每个回答有一个分数 $r(x, y)$，并且
#
# $$ p(y_1 \succ y_2 \mid x) = \sigma\big(r(x, y_1) - r(x, y_2)\big), \qquad
# \sigma(z) = \frac{1}{1 + e^{-z}} . $$
#
# 起作用的只有**差值**：给同一个 prompt 的所有分数加上任意 $a(x)$，什么都不变。
# 所以奖励没有零点，不同 prompt 的奖励也不能相互比较。设 $y_c$
# 为选中的（chosen）回答，$y_r$
# 为被拒的（rejected）回答，一个带标签的样本对的负对数似然是
#
# $$ \ell = -\log \sigma(\Delta), \quad \Delta = r(x, y_c) - r(x, y_r), \qquad
# \frac{\partial \ell}{\partial \Delta}
# = -(1 - \sigma(\Delta)) = -\sigma(-\Delta)
# . $$
#
# 很有把握地排对的样本对，梯度接近 0；很有把握地排错的样本对，梯度接近 $-1$。
#
# 设分数是特征的线性函数 $r = w \cdot \phi(x, y)$；在语言模型里 $\phi$
# 是最后的隐藏状态，$w$ 是一个新的输出。于是损失只通过
# $w \cdot (\phi_c - \phi_r)$ 依赖 $w$：这就是差值上的、没有截距的逻辑回归。
# %%
n, d = 2000, 5
w_true = np.array([1.5, -1.0, 0.5, 0.0, 2.0])
# The last feature is equal in both answers of a pair: it is of the prompt.
phi = rng.normal(size=(n, 2, d))
phi[:, 1, 4] = phi[:, 0, 4]
scores = phi @ w_true
first_wins = rng.random(n) < sigmoid(scores[:, 0] - scores[:, 1])
phi_chosen = np.where(first_wins[:, None], phi[:, 0], phi[:, 1])
phi_rejected = np.where(first_wins[:, None], phi[:, 1], phi[:, 0])
difference = phi_chosen - phi_rejected

w = np.zeros(d)
for _ in range(500):
  delta = difference @ w
  gradient = -(sigmoid(-delta)[:, None] * difference).mean(axis=0)
  w -= 2.0 * gradient
print('true ', w_true)
print('by hand', w.round(2))

# %% [markdown] lang="en"
# The fifth weight is 2 in truth and 0 in the fit: its feature is the same in
# both answers of a pair, so no comparison says anything about it. Three checks:
# the loss equals the package's, the weights equal those of scikit-learn on the
# differences, and the accuracy is below 1 for a reason: labels are drawn, so
# even the true reward is contradicted by some of them.
# %% [markdown] lang="zh"
# 第五个权重的真值是 2，拟合结果却是 0：这个特征在一对回答中相同，
# 任何比较都不包含它的信息。三个检查：损失与包里的相等；权重与 scikit-learn
# 在差值上得到的相等；准确率小于 1 是有原因的：标签是抽样得到的，
# 就连真实奖励也会与其中一部分矛盾。
# %%
losses = -np.log(sigmoid(difference @ w))
theirs = bradley_terry_loss(phi_chosen @ w, phi_rejected @ w)
np.testing.assert_allclose(losses, theirs, rtol=1e-5, atol=1e-6)

# scikit-learn needs both labels: every second pair is turned around.
sign = np.where(np.arange(n) % 2, 1, -1)
regression = LogisticRegression(C=1e6, fit_intercept=False, max_iter=1000)
regression.fit(difference * sign[:, None], sign > 0)
np.testing.assert_allclose(w, regression.coef_[0], atol=1e-3)
assert w[4] == 0, 'a feature of the prompt alone has no gradient'

accuracy = np.mean(difference @ w > 0)
best = np.mean(difference @ w_true > 0)
print(f'accuracy {accuracy:.1%}; of the true reward {best:.1%}')
assert abs(accuracy - best) < 0.02 and best < 1

# %% [markdown] lang="en"
# ## 2. The objective of RLHF and its exact solution
#
# Given a reward, RLHF (reinforcement learning from human feedback) looks for a
# policy $\pi$ (a language model) with high reward that stays close to a
# reference $\pi_{ref}$, the SFT model. For one prompt, with $x$ left out,
#
# $$ \max_\pi \; J(\pi) = \sum_y \pi(y)\, r(y) - \beta \sum_y \pi(y) \log
# \frac{\pi(y)}{\pi_{ref}(y)} . $$
#
# The second term is $\beta\, KL(\pi \,\|\, \pi_{ref})$. It is there because the
# reward is only known near the answers that were compared. The problem has an
# exact solution. Pull $-\beta$ out:
#
# $$ J(\pi) = -\beta \sum_y \pi(y) \left[ \log \frac{\pi(y)}{\pi_{ref}(y)} -
# \frac{r(y)}{\beta} \right] = -\beta \sum_y \pi(y) \log
# \frac{\pi(y)}{\pi_{ref}(y)\, e^{r(y) / \beta}} . $$
#
# The denominator is no distribution. With
# $Z = \sum_y \pi_{ref}(y)\, e^{r(y)/\beta}$ it becomes one, and the constant
# comes out:
#
# $$ \pi^*(y) = \frac{1}{Z}\, \pi_{ref}(y)\, e^{r(y)/\beta}, \qquad J(\pi) =
# \beta \log Z - \beta\, KL(\pi \,\|\, \pi^*) . $$
#
# $KL \ge 0$, with equality only for $\pi = \pi^*$. So $\pi^*$ is the only
# maximum, and its value is $\beta \log Z$. The identity holds for *every*
# $\pi$, so it can be checked with random ones.
# %% [markdown] lang="zh"
# ## 2. RLHF 的目标及其精确解
#
# 给定奖励，RLHF（基于人类反馈的强化学习）寻找一个奖励高、同时不远离参考模型
# $\pi_{ref}$（SFT 模型）的策略 $\pi$（语言模型）。对一个 prompt（省略 $x$）：
#
# $$ \max_\pi \; J(\pi) = \sum_y \pi(y)\, r(y) - \beta \sum_y \pi(y) \log
# \frac{\pi(y)}{\pi_{ref}(y)} . $$
#
# 第二项是 $\beta\, KL(\pi \,\|\, \pi_{ref})$。
# 需要它是因为奖励只在被比较过的回答附近才可信。这个问题有精确解。提出
# $-\beta$：
#
# $$ J(\pi) = -\beta \sum_y \pi(y) \left[ \log \frac{\pi(y)}{\pi_{ref}(y)} -
# \frac{r(y)}{\beta} \right] = -\beta \sum_y \pi(y) \log
# \frac{\pi(y)}{\pi_{ref}(y)\, e^{r(y) / \beta}} . $$
#
# 分母不是一个分布。用 $Z = \sum_y \pi_{ref}(y)\, e^{r(y)/\beta}$ 归一化，
# 常数移到外面：
#
# $$ \pi^*(y) = \frac{1}{Z}\, \pi_{ref}(y)\, e^{r(y)/\beta}, \qquad J(\pi) =
# \beta \log Z - \beta\, KL(\pi \,\|\, \pi^*) . $$
#
# $KL \ge 0$，仅当 $\pi = \pi^*$ 时取等号。所以 $\pi^*$ 是唯一的最大值点，
# 最大值为 $\beta \log Z$。这个恒等式对**任意** $\pi$ 成立，因此可以用随机的
# $\pi$ 检验。
# %%
reference = np.array([0.35, 0.25, 0.2, 0.1, 0.07, 0.03])
reward = np.array([0.0, 0.5, -1.0, 1.0, 0.2, 2.0])


def kl(p, q):
  return float(np.sum(p * np.log(p / q)))


def optimum(beta):
  """(the best policy [k], log Z)."""
  unnormalized = reference * np.exp(reward / beta)
  return unnormalized / unnormalized.sum(), np.log(unnormalized.sum())


def objective(policy, beta):
  return policy @ reward - beta * kl(policy, reference)


for beta in (0.1, 0.5, 2.0):
  best_policy, log_z = optimum(beta)
  for policy in rng.dirichlet(np.ones(6), size=20):
    identity = beta * log_z - beta * kl(policy, best_policy)
    np.testing.assert_allclose(objective(policy, beta), identity, atol=1e-9)
    assert objective(policy, beta) < beta * log_z
  np.testing.assert_allclose(objective(best_policy, beta), beta * log_z)
  print(f'beta {beta}: optimum {best_policy.round(3)}')

# %% [markdown] lang="en"
# A large beta leaves the reference as it is, a small one puts everything on the
# best answer. Beta is a temperature of the reward, in the unit of the reward.
#
# ## 3. From the solution to the DPO loss
#
# RLHF would now sample from $\pi$ and follow the reward by reinforcement
# learning, as $Z$ is a sum over all texts and nobody can compute it. DPO
# (Rafailov et al., arXiv:2305.18290) reads the solution from right to left.
# Take logarithms and solve for the reward:
#
# $$ r(y) = \beta \log \frac{\pi^*(y)}{\pi_{ref}(y)} + \beta \log Z . $$
#
# Every reward belongs to one optimal policy, and conversely a policy *is* a
# reward, up to a constant of the prompt. The Bradley-Terry model needs
# differences only, and in them $Z$ cancels:
#
# $$ r(y_c) - r(y_r) = \beta \left[ \log \frac{\pi^*(y_c)}{\pi_{ref}(y_c)} -
# \log \frac{\pi^*(y_r)}{\pi_{ref}(y_r)} \right] = \beta\, h . $$
#
# Insert this into the likelihood of the labels and fit the policy by maximum
# likelihood, exactly as the reward model was:
#
# $$ \ell_{DPO} = - \log \sigma(\beta h), \qquad h = \log
# \frac{\pi_\theta(y_c)}{\pi_{ref}(y_c)} - \log
# \frac{\pi_\theta(y_r)}{\pi_{ref}(y_r)} . $$
#
# There is no reward model, no sampling and no reinforcement learning: two
# log-likelihoods under the policy, and two under the reference. Its gradient is
#
# $$ \nabla_\theta \ell_{DPO} = - \beta\, \sigma(-\beta h) \left[ \nabla_\theta
# \log \pi_\theta(y_c) - \nabla_\theta \log \pi_\theta(y_r) \right] : $$
#
# raise the chosen answer, lower the rejected one. The weight $\sigma(-\beta h)$
# is large if the *implicit reward* $\beta \log(\pi_\theta / \pi_{ref})$ orders
# the pair wrongly.
#
# We implement it for a small language model, a *bigram* model: the logits of
# the next token are a row of a table `[v, v]`. An answer's log-likelihood is a
# sum over its tokens, prompts excluded.
# %% [markdown] lang="zh"
# beta 大，策略就停在参考模型附近；beta 小，概率全部集中到最好的回答上。beta
# 是奖励的温度，单位与奖励相同。
#
# ## 3. 从精确解到 DPO 损失
#
# RLHF 接下来会从 $\pi$ 采样并用强化学习追求奖励，因为 $Z$ 是对所有文本求和，
# 没有人算得出来。DPO（Rafailov et al.，arXiv:2305.18290）反过来读这个解。
# 取对数，解出奖励：
#
# $$ r(y) = \beta \log \frac{\pi^*(y)}{\pi_{ref}(y)} + \beta \log Z . $$
#
# 每个奖励对应一个最优策略；反过来，一个策略**就是**一个奖励，只差一个与 prompt
# 有关的常数。Bradley-Terry 模型只需要差值，而在差值里 $Z$ 被消去：
#
# $$ r(y_c) - r(y_r) = \beta \left[ \log \frac{\pi^*(y_c)}{\pi_{ref}(y_c)} -
# \log \frac{\pi^*(y_r)}{\pi_{ref}(y_r)} \right] = \beta\, h . $$
#
# 把它代入标签的似然，像拟合奖励模型那样用最大似然拟合策略：
#
# $$ \ell_{DPO} = - \log \sigma(\beta h), \qquad h = \log
# \frac{\pi_\theta(y_c)}{\pi_{ref}(y_c)} - \log
# \frac{\pi_\theta(y_r)}{\pi_{ref}(y_r)} . $$
#
# 没有奖励模型，没有采样，也没有强化学习：
# 只需策略下的两个对数似然和参考模型下的两个。它的梯度是
#
# $$ \nabla_\theta \ell_{DPO} = - \beta\, \sigma(-\beta h) \left[ \nabla_\theta
# \log \pi_\theta(y_c) - \nabla_\theta \log \pi_\theta(y_r) \right] : $$
#
# 提高 chosen，降低 rejected。如果**隐式奖励**
# $\beta \log(\pi_\theta / \pi_{ref})$ 把这一对排错，权重 $\sigma(-\beta h)$
# 就大。
#
# 我们在一个小语言模型上实现它：bigram 模型，下一个 token 的 logit 是表 `[v, v]`
# 的一行。一个回答的对数似然是它各 token 之和，不包括 prompt。
# %%
VOCAB, LENGTH = 7, 6
table_ref = rng.normal(size=(VOCAB, VOCAB))
table = table_ref + 0.3 * rng.normal(size=(VOCAB, VOCAB))


def draw_side(rng, pairs):
  """Inputs, targets and the mask of answers [b, t], of random lengths."""
  ids = rng.integers(1, VOCAB, size=(pairs, LENGTH + 1))
  first, count = rng.integers(1, 3, pairs), rng.integers(1, 4, pairs)
  t = np.arange(LENGTH)
  mask = (t >= first[:, None]) & (t < (first + count)[:, None])
  return {'inputs': ids[:, :-1], 'targets': ids[:, 1:], 'targets_mask': mask}


def log_likelihood(table, side):
  """log p of each answer, the sum over its tokens: [b]."""
  logits = table[side['inputs']]
  logps = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  picked = np.take_along_axis(logps, side['targets'][..., None], -1)[..., 0]
  return (picked * side['targets_mask']).sum(axis=-1)


def hand_dpo(table, chosen, rejected, beta):
  """(mean loss, gradient of the table) by the formulas above."""
  ratios = [
    log_likelihood(table, side) - log_likelihood(table_ref, side)
    for side in (chosen, rejected)
  ]
  h = ratios[0] - ratios[1]
  weight = beta * sigmoid(-beta * h)
  gradient = np.zeros_like(table)
  softmax = np.exp(table) / np.exp(table).sum(axis=-1, keepdims=True)
  for side, sign in ((chosen, -1), (rejected, 1)):
    # d log p(target) / d logits = one-hot of the target - softmax.
    for b, t in zip(*np.nonzero(side['targets_mask']), strict=True):
      x, y = side['inputs'][b, t], side['targets'][b, t]
      gradient[x] += sign * weight[b] * (np.eye(VOCAB)[y] - softmax[x])
  return -np.log(sigmoid(beta * h)).mean(), gradient / len(h)


chosen, rejected = draw_side(rng, 8), draw_side(rng, 8)
loss, gradient = hand_dpo(table, chosen, rejected, beta=0.5)
print(f'loss {loss:.4f}')


# %% [markdown] lang="en"
# The package's objective takes a function `apply` and batches with the prefixes
# `chosen_` and `rejected_`. A table is a model as well, so the real objective
# runs on our numbers, with its own code for masks and sums, and `jax.grad`
# gives the gradient.
# %% [markdown] lang="zh"
# 包里的目标函数接收一个函数 `apply`，以及带前缀 `chosen_` 和 `rejected_` 的
# batch。一张表也是一个模型，所以真正的目标函数可以在我们的数字上运行，
# 使用它自己的掩码与求和逻辑，梯度由 `jax.grad` 给出。
# %%
def apply(variables, rows, train=False, rngs=None, mutable=()):
  return variables['params'][rows['inputs']], {}


def reference_logps(variables, rows):
  return token_logps(jnp.asarray(table_ref)[rows['inputs']], rows)


def package_dpo(table, batch, settings):
  objective = dpo.DPO.build(settings, reference_logps)
  total, aux = objective(apply, {'params': table}, batch, None)
  return mean_loss(total, aux), aux['metrics']


def join(chosen, rejected):
  return {
    prefix + key: jnp.asarray(value)
    for prefix, side in (('chosen_', chosen), ('rejected_', rejected))
    for key, value in side.items()
  }


settings = dpo.DPOSettings(beta=0.5)
(value, metrics), their_gradient = jax.value_and_grad(
  package_dpo, has_aux=True
)(jnp.asarray(table), join(chosen, rejected), settings)
np.testing.assert_allclose(loss, value, rtol=1e-5)
np.testing.assert_allclose(gradient, their_gradient, atol=1e-6)
# At the start the policy is the reference: h = 0 and every loss is log 2.
start, _ = package_dpo(jnp.asarray(table_ref), join(chosen, rejected), settings)
np.testing.assert_allclose(start, np.log(2), rtol=1e-5)
print({k: float(v[0] / v[1]) for k, v in metrics.items()})

# %% [markdown] lang="en"
# ## 4. Training where the optimum is known
#
# One prompt, six answers, the reward and reference of section 2. A pair is two
# different answers, drawn uniformly, and its label is drawn by Bradley-Terry
# with the true reward. The policy is a softmax of six free logits $\theta$.
# With infinitely many labels the loss is an expectation, which we can write
# down:
#
# $$ L(\theta) = - \frac{1}{15} \sum_{i \ne j} \sigma(r_i - r_j) \log
# \sigma(\beta h_{ij}) . $$
#
# There are 15 pairs, each with two terms: $i$ is preferred, with probability
# $\sigma(r_i - r_j)$, or $j$. $h_{ij}$ is $h$ with answer $i$ as the chosen
# one. This is a cross-entropy between the true and the implied probability of a
# label, so its minimum is $\beta h_{ij} = r_i - r_j$ for all pairs, and then
# $\pi_\theta = \pi^*$. If the derivation is right, training has to reach the
# closed form, for any beta, without ever seeing a reward.
#
# For free logits
# $h_{ij} = (\theta_i - \theta_j) - (\theta^{ref}_i - \theta^{ref}_j)$: the
# normalization of the softmax cancels too. $h$ is linear in $\theta$ and
# $-\log \sigma$ is convex, so the problem is convex.
# %% [markdown] lang="zh"
# ## 4. 在已知最优解的问题上训练
#
# 一个 prompt，六个回答，奖励和参考分布同第 2 节。一对是均匀抽取的两个不同回答，
# 标签按真实奖励的 Bradley-Terry 抽取。策略是六个自由 logit $\theta$ 的
# softmax。标签无穷多时，损失是一个可以写出来的期望：
#
# $$ L(\theta) = - \frac{1}{15} \sum_{i \ne j} \sigma(r_i - r_j) \log
# \sigma(\beta h_{ij}) . $$
#
# 共有 15 对，每对两项：以概率 $\sigma(r_i - r_j)$ 选中 $i$，否则选中 $j$；
# $h_{ij}$ 是以 $i$ 为 chosen 时的 $h$。
# 它是标签的真实概率与策略所隐含概率之间的交叉熵，最小值在所有样本对都满足
# $\beta h_{ij} = r_i - r_j$ 处，此时 $\pi_\theta = \pi^*$。如果推导正确，
# 那么对任意 beta，训练都必须到达闭式解，尽管它从未见过奖励。
#
# 对自由 logit 有
# $h_{ij} = (\theta_i - \theta_j) - (\theta^{ref}_i - \theta^{ref}_j)$：softmax
# 的归一化项也被消去。$h$ 是 $\theta$ 的线性函数，$-\log \sigma$
# 是凸函数，所以问题是凸的。
# %%
theta_ref = jnp.log(reference)
labels = sigmoid(reward[:, None] - reward[None, :])
off_diagonal = 1 - np.eye(6)


def pair_loss(theta, weights, beta, loss_fn=dpo.sigmoid_loss):
  """Mean loss; weights [k, k] of 'row answer was preferred to column'."""
  ratio = jax.nn.log_softmax(theta) - theta_ref
  h = ratio[:, None] - ratio[None, :]
  return jnp.sum(weights * loss_fn(h, beta)) / jnp.sum(weights)


def minimize(loss_fn, theta, steps=2000, rate=0.05):
  """Adam; returns the last logits and all of them [steps, k]."""
  optimizer = optax.adam(rate)

  def step(carry, _):
    theta, state = carry
    gradient = jax.grad(loss_fn)(theta)
    updates, state = optimizer.update(gradient, state)
    theta = optax.apply_updates(theta, updates)
    return (theta, state), theta

  run = jax.jit(
    lambda t: jax.lax.scan(step, (t, optimizer.init(t)), length=steps)
  )
  (theta, _), path = run(theta)
  return theta, path


BETAS = (0.3, 0.5, 1.0, 3.0)
population = labels * off_diagonal
policies = {}
for beta in BETAS:
  theta, _ = minimize(lambda t, b=beta: pair_loss(t, population, b), theta_ref)
  policies[beta] = np.asarray(jax.nn.softmax(theta), float)
  gap = np.abs(policies[beta] - optimum(beta)[0]).max()
  print(f'beta {beta}: largest difference from the closed form {gap:.1e}')
  assert gap < 2e-3, 'DPO has not reached the optimum of RLHF'


# %% [markdown] lang="en"
# The trained policies are the optima. Now with a finite number $n$ of labels:
# the policy is a maximum likelihood estimate, so its error shrinks like
# $1 / \sqrt{n}$. The error is measured as *total variation*,
# $\frac{1}{2} \sum_y |\pi(y) - \pi^*(y)|$.
# %% [markdown] lang="zh"
# 训练得到的策略就是最优解。再看只有 $n$
# 个标签的情形：策略是最大似然估计，误差按 $1 / \sqrt{n}$ 缩小。误差用**总变差**
# $\frac{1}{2} \sum_y |\pi(y) - \pi^*(y)|$ 衡量。
# %%
def draw_labels(rng, count):
  """Counts [k, k] of 'row preferred to column' in drawn pairs."""
  i = rng.integers(0, 6, count)
  j = (i + rng.integers(1, 6, count)) % 6
  first = rng.random(count) < labels[i, j]
  counts = np.zeros((6, 6))
  np.add.at(counts, (np.where(first, i, j), np.where(first, j, i)), 1)
  return counts


fit = jax.jit(
  jax.vmap(
    lambda weights: minimize(
      lambda t: pair_loss(t, weights, 1.0), theta_ref, steps=1000
    )[0]
  )
)
COUNTS = (100, 400, 1600, 6400)
errors = {}
for count in COUNTS:
  drawn = np.stack([draw_labels(rng, count) for _ in range(20)])
  fitted = np.asarray(jax.nn.softmax(fit(drawn)))
  errors[count] = 0.5 * np.abs(fitted - optimum(1.0)[0]).sum(-1).mean()
  print(f'{count:5} labels: total variation {errors[count]:.4f}')
# Sixteen times the labels: a quarter of the error.
assert 2 < errors[400] / errors[6400] < 8

# %%
grid = np.geomspace(0.12, 20, 60)
frontier = np.array(
  [(kl(optimum(b)[0], reference), optimum(b)[0] @ reward) for b in grid]
)
figure, axes = plt.subplots(1, 2, figsize=(7, 2.6))
axes[0].plot(*frontier.T, lw=1, label='closed form')
for beta, policy in policies.items():
  axes[0].plot(kl(policy, reference), policy @ reward, 'o', ms=4)
  axes[0].annotate(
    f' beta {beta}', (kl(policy, reference), policy @ reward - 0.08),
    fontsize=7,
  )  # fmt: skip
axes[0].set(xlabel='KL from the reference, nats', ylabel='mean reward')
axes[0].legend(fontsize=7)
axes[1].loglog(list(errors), list(errors.values()), 'o-', ms=4)
axes[1].set(xlabel='labels', ylabel='total variation')
plt.tight_layout()
plt.show()

# %% [markdown] lang="en"
# The curve on the left, the *frontier*, is the best mean reward for each KL
# from the reference; beta chooses the point. Note that the vertical axis is the
# *true* reward. With a reward that was fitted to few labels, the right part of
# the curve is where the fit is extrapolated.
#
# ## 5. Three pitfalls, measured
#
# ### No finite optimum
#
# Assume that every pair of a data set has been labelled once, or that people
# always agree, and that no labels contradict each other. Then the probability
# of a label is 0 or 1, and $-\log \sigma(\beta h)$ is smallest at $h = \infty$.
# Beta does not help: it rescales $h$, but $\infty$ stays where it is, so the KL
# constraint that beta stands for is lost. IPO (Azar et al., arXiv:2310.12036)
# has the loss $(h - \frac{1}{2 \beta})^2$ with a finite target, 1 for
# $\beta = 0.5$. With the labels below, $h_{12}$, $h_{23}$ and
# $h_{13} = h_{12} + h_{23}$ cannot all be 1; the least squares solution has
# $h = 1/3$ between neighbours.
# %% [markdown] lang="zh"
# 左图的曲线是**前沿**（frontier）：与参考模型的 KL
# 给定时能达到的最高平均奖励；beta 选择其中一点。注意纵轴是**真实**奖励。
# 如果奖励是用很少的标签拟合出来的，曲线右段正是拟合外推的地方。
#
# ## 5. 三个陷阱，用数字测量
#
# ### 没有有限的最优解
#
# 假设数据集里每对只标注一次，或者所有人意见总是一致，而且标签互不矛盾。
# 那么标签的概率只有 0 或 1，$-\log \sigma(\beta h)$ 在 $h = \infty$ 处最小。
# beta 无济于事：它缩放 $h$，但 $\infty$ 仍是 $\infty$，beta 所代表的 KL
# 约束就丢失了。IPO（Azar et al.，arXiv:2310.12036）的损失是
# $(h - \frac{1}{2 \beta})^2$，目标是有限的，$\beta = 0.5$ 时为 1。
# 对下面的标签，$h_{12}$、$h_{23}$ 和 $h_{13} = h_{12} + h_{23}$ 不可能都等于
# 1；最小二乘解在相邻回答之间是 $h = 1/3$。
# %%
certain = np.triu(np.ones((6, 6)), 1)  # a smaller index always wins
margins = {}
for name, loss_fn in (('DPO', dpo.sigmoid_loss), ('IPO', dpo.ipo_loss)):
  _, path = minimize(
    lambda t, f=loss_fn: pair_loss(t, certain, 0.5, f), theta_ref, 4000
  )
  ratios = np.asarray(path - theta_ref)
  margins[name] = ratios[:, 0] - ratios[:, 1]
  policy = np.asarray(jax.nn.softmax(path[-1]))
  print(
    f'{name}: h of answers 1 and 2 after 1000 steps {margins[name][999]:.2f}, '
    f'after 4000 {margins[name][-1]:.2f}; KL {kl(policy, reference):.2f}'
  )
assert margins['DPO'][-1] > margins['DPO'][999] + 1, 'h did not go on growing'
assert abs(margins['IPO'][-1] - margins['IPO'][999]) < 0.01

# %% [markdown] lang="en"
# In the end DPO's policy is on answer 1 almost alone, whose KL is
# $\log(1 / 0.35) = 1.05$. In practice the number of steps and the learning rate
# stop DPO, not beta. A run over one more epoch has another KL divergence with
# the same beta, so it has to be logged (the package logs `kl`, an estimate per
# token on the texts of the pairs).
#
# ### The probability of the chosen answer falls
#
# The loss reads $h$ only, a difference. It also falls if both answers lose
# probability and the rejected one loses more. With free logits this does not
# happen, but the answers of a language model share parameters: their logits are
# $E\, z$ with an output embedding $E$ `[k, d]` and a hidden state $z$. A
# gradient step moves $z$ along $E_c - E_r$. If chosen and rejected are
# *similar*, that direction has little to do with either, and a third answer
# whose embedding lies in it takes the probability (Razin et al.,
# arXiv:2410.08847). Their example: chosen "No", rejected "Never", and "Yes"
# gains.
# %% [markdown] lang="zh"
# 最后 DPO 的策略几乎只剩回答 1，它的 KL 是 $\log(1 / 0.35) = 1.05$。实践中让
# DPO 停下来的是步数和学习率，而不是 beta。同样的 beta，多跑一个 epoch，KL
# 散度就不同，所以必须记录它（包会记录 `kl`，即在样本对的文本上逐 token
# 的估计）。
#
# ### chosen 的概率下降
#
# 损失只看差值 $h$。即使两个回答的概率都下降，只要 rejected
# 降得更多，损失也会变小。自由 logit
# 不会发生这种事，但语言模型的各个回答共享参数：logit 是 $E\, z$，其中 $E$
# `[k, d]` 是输出 embedding，$z$ 是隐藏状态。一步梯度让 $z$ 沿 $E_c - E_r$
# 移动。如果 chosen 与 rejected **相似**，这个方向与两者关系都不大，而某个
# embedding 恰在该方向上的第三个回答会拿走概率（Razin et al.，
# arXiv:2410.08847）。他们的例子：chosen 是 “No”，rejected 是 “Never”，
# 上升的却是 “Yes”。
# %%
ANSWERS = ('No', 'Never', 'Yes', 'Maybe')
SIMILAR = jnp.array([[2.0, 0.2], [2.0, -0.2], [0.0, 2.0], [0.5, 0.0]])
DISTINCT = jnp.array([[2.0, 0.2], [-2.0, -0.2], [0.0, 2.0], [0.5, 0.0]])
z_start = jnp.array([1.0, 0.0])


def displacement(embeddings, sft_weight, steps=1500):
  """log p of all answers in each step [steps, k]."""
  start = jax.nn.log_softmax(embeddings @ z_start)

  def loss(z):
    logps = jax.nn.log_softmax(embeddings @ z)
    h = (logps - start)[0] - (logps - start)[1]
    return dpo.sigmoid_loss(h, 0.5) - sft_weight * logps[0]

  _, path = minimize(loss, z_start, steps=steps, rate=0.01)
  logps = jax.nn.log_softmax(path @ embeddings.T)
  return np.concatenate([np.asarray(start)[None], np.asarray(logps)])


figure, axes = plt.subplots(1, 3, figsize=(7, 2.4), sharey=True)
paths = {}
for (name, embeddings, weight), ax in zip(
  (('similar', SIMILAR, 0.0), ('distinct', DISTINCT, 0.0),
   ('similar, SFT 0.5', SIMILAR, 0.5)),
  axes, strict=True,
):  # fmt: skip
  paths[name] = displacement(embeddings, weight)
  for answer, values in zip(ANSWERS, paths[name].T, strict=True):
    ax.plot(values, lw=1, label=answer)
  ax.set_title(name, fontsize=8)
  ax.set(xlabel='step', ylim=(-8, 0.3))
axes[0].set_ylabel('log p')
axes[0].legend(fontsize=6)
plt.tight_layout()
plt.show()
for name, path in paths.items():
  change = path[-1] - path[0]
  print(name, dict(zip(ANSWERS, change.round(2).tolist(), strict=True)))


# %%
def chosen_change(name):
  return paths[name][-1, 0] - paths[name][0, 0]


for name, path in paths.items():
  h = (path[:, 0] - path[:, 1]) - (path[0, 0] - path[0, 1])
  assert h[-1] > 0.5, f'{name}: the margin has to grow'
  assert np.all(h[1:] > 0), f'{name}: the pair is ranked wrongly'
assert chosen_change('similar') < -0.5, 'the chosen answer should have lost'
assert paths['similar'][-1, 2] > paths['similar'][0, 2] + 1, '"Yes" gains'
assert chosen_change('distinct') > 0
assert chosen_change('similar, SFT 0.5') > chosen_change('similar')

# %% [markdown] lang="en"
# The margin grows in all three, and the pair is ranked rightly after every
# step. Only the log-probability of the chosen answer tells the first run from
# the others, so log it beside the margin. The remedy in the third picture adds
# $-\lambda \log \pi(y_c)$ (`sft_weight`, for which the package averages over
# tokens; Pang et al., arXiv:2404.19733). Pairs that differ clearly, as in the
# second, need no remedy.
#
# ### Length
#
# Judges, people and models alike, prefer longer answers. DPO learns whatever
# distinguishes chosen from rejected. Here is a measurement in which quality and
# bias are known. A bigram model writes tokens `g` (good) and `b` (bad) until it
# writes the stop token. A fair judge prefers the larger *share* of good tokens.
# A biased one adds a bonus for each token. A third data set has the biased
# judge, but both answers of a pair are of equal length, so that the bonus
# cancels.
# %% [markdown] lang="zh"
# 三种情况下 margin 都在增大，每一步之后这一对都排得正确。只有 chosen
# 的对数概率能把第一种与其他两种区分开，所以要和 margin 一起记录。
# 第三幅图的补救办法是加上 $-\lambda \log \pi(y_c)$（`sft_weight`，包里对 token
# 取平均；Pang et al.，arXiv:2404.19733）。
# 像第二幅图那样差别明显的样本对不需要补救。
#
# ### 长度
#
# 评判者（人和模型都是）偏爱更长的回答。凡是能区分 chosen 和 rejected 的东西，
# DPO 都会学。下面的测量中，质量与偏差都是已知的。bigram 模型写 token `g`（好）
# 和 `b`（坏），直到写出停止 token。公正的评判者偏好 `g` **占比**高的回答；
# 有偏的评判者对每个 token 额外加分；第三个数据集用有偏的评判者，
# 但一对回答长度相同，加分被抵消。
# %%
START, GOOD, BAD, STOP = range(4)
policy_table = jnp.log(
  jnp.array(
    [
      [1e-9, 0.5, 0.5, 1e-9],
      [1e-9, 0.4, 0.35, 0.25],
      [1e-9, 0.4, 0.35, 0.25],
      [1e-9, 1e-9, 1e-9, 1.0],
    ]
  )
)
MAX_LENGTH = 16


def sample_answers(rng, count):
  """Ids [count, MAX_LENGTH + 2]: START, tokens, STOP, STOP, ..."""
  p = np.exp(np.asarray(policy_table, float))
  p /= p.sum(axis=1, keepdims=True)
  ids = np.full((count, MAX_LENGTH + 2), STOP)
  ids[:, 0] = START
  for t in range(1, MAX_LENGTH + 1):
    u = rng.random(count)[:, None]
    ids[:, t] = (u > np.cumsum(p[ids[:, t - 1]], axis=1)).sum(axis=1)
  return ids


def lengths_of(ids):
  return np.isin(ids, (GOOD, BAD)).sum(axis=1)


def pairs_of(rng, bonus, same_length, count=3000):
  one, two = sample_answers(rng, 6 * count), sample_answers(rng, 6 * count)
  if same_length:
    equal = lengths_of(one) == lengths_of(two)
    one, two = one[equal], two[equal]
  one, two = one[:count], two[:count]
  a, b = (
    4 * (ids == GOOD).sum(1) / lengths_of(ids) + bonus * lengths_of(ids)
    for ids in (one, two)
  )
  first = (rng.random(len(a)) < sigmoid(a - b))[:, None]
  return np.where(first, one, two), np.where(first, two, one)


def as_side(ids):
  # The loss is on the answer and its first STOP.
  mask = np.arange(MAX_LENGTH + 1) <= lengths_of(ids)[:, None]
  return {'inputs': ids[:, :-1], 'targets': ids[:, 1:], 'targets_mask': mask}


def expected(table):
  """(mean length, share of good tokens) of a bigram model, exactly."""
  p = np.asarray(jax.nn.softmax(table, axis=-1), float)
  inner = p[1:3, 1:3]
  visits = p[START, 1:3] @ np.linalg.inv(np.eye(2) - inner)
  return visits.sum(), visits[0] / visits.sum()


# %%
length_settings = dpo.DPOSettings(beta=0.5)


def reference_of_lengths(variables, rows):
  return token_logps(policy_table[rows['inputs']], rows)


def train_lengths(bonus, same_length):
  batch = join(*map(as_side, pairs_of(rng, bonus, same_length)))
  objective = dpo.DPO.build(length_settings, reference_of_lengths)

  def loss(table, batch):
    total, aux = objective(apply, {'params': table}, batch, None)
    return mean_loss(total, aux)

  optimizer = optax.adam(0.02)
  state, table = optimizer.init(policy_table), policy_table

  @jax.jit
  def step(table, state, batch):
    updates, state = optimizer.update(jax.grad(loss)(table, batch), state)
    return optax.apply_updates(table, updates), state

  for _ in range(60):
    table, state = step(table, state, batch)
  return expected(table)


outcomes = {
  'reference': expected(policy_table),
  'fair judge': train_lengths(0.0, False),
  'biased judge': train_lengths(0.3, False),
  'biased, equal lengths': train_lengths(0.3, True),
}
for name, (length, share) in outcomes.items():
  print(f'{name:22} length {length:5.2f}  share of good {share:.2f}')
for name in list(outcomes)[1:]:
  assert outcomes[name][1] > outcomes['reference'][1], f'{name}: no quality'
assert outcomes['biased judge'][0] > 1.3 * outcomes['fair judge'][0]
assert outcomes['biased, equal lengths'][0] < 0.8 * outcomes['biased judge'][0]

# %% [markdown] lang="en"
# All three learn quality. Only the biased data lengthen the answers much, and
# pairs of equal length remove the effect at the source. Length-normalized
# losses such as SimPO (arXiv:2405.14734) use the mean over tokens in place of
# the sum; this removes the incentive to gain by many small differences, but not
# a bias of the labels.
# %% [markdown] lang="zh"
# 三种数据都学到了质量。只有带偏差的数据让回答明显变长，
# 而等长的样本对从源头上消除了这一影响。SimPO（arXiv:2405.14734）
# 等按长度归一化的损失用 token 平均代替求和；
# 它消除了靠许多微小差异累积得分的动机，但消除不了标签本身的偏差。
# %% [markdown] lang="en"
# ## Exercises
#
# 1. *Easy.* With the probability $s$ that a label is flipped, the loss becomes
#    $-(1-s) \log \sigma(\beta h) - s \log \sigma(-\beta h)$. Derive its minimum
#    over $h$, check it numerically, and compare with the package's
#    `label_smoothing`.
# 2. *Medium.* Best-of-n: draw $n$ answers from the reference and take the one
#    with the highest reward. Compute its distribution exactly for the six
#    answers, its KL divergence and mean reward for $n = 1, 2, 4, 8$. Is it
#    above or below the frontier of section 4? Check the bound
#    $KL \le \log n - (n - 1) / n$.
# 3. *Hard.* Rankings of three answers: under Plackett-Luce, the first is drawn
#    with probability proportional to $e^{r}$, then the second among the rest.
#    Write the DPO loss of a ranking, show that for two answers it is the loss
#    above, and that the expected loss over all rankings of three of the six
#    answers has the same optimum $\pi^*$ (with $\beta = 1$).
# %% [markdown] lang="zh"
# ## 练习
#
# 1. *容易。* 若标签以概率 $s$ 被翻转，损失变为
#    $-(1-s) \log \sigma(\beta h) - s \log \sigma(-\beta h)$。推导它关于 $h$
#    的最小值点，用数值检验，并与包的 `label_smoothing` 对比。
# 2. *中等。* Best-of-n：从参考模型抽 $n$ 个回答，取奖励最高的一个。
#    对六个回答精确计算 $n = 1, 2, 4, 8$ 时的分布、KL 散度和平均奖励。
#    它在第 4 节的前沿曲线之上还是之下？检验上界
#    $KL \le \log n - (n - 1) / n$。
# 3. *困难。* 三个回答的排序：在 Plackett-Luce 模型下，第一名按正比于 $e^{r}$
#    的概率抽取，第二名从其余回答中抽取。写出一个排序的 DPO 损失，
#    证明两个回答时就是上面的损失，并证明对六选三的所有排序取期望，最优解仍是
#    $\pi^*$（取 $\beta = 1$）。
# %% [markdown] lang="en"
# ## Interview questions
#
# **DPO has no reward model. Where has the reward gone, and where has $Z$
# gone?**
#
# <details><summary>Answer</summary>
#
# The optimal policy of the KL-constrained problem and the reward determine each
# other up to a constant of the prompt:
# $r = \beta \log(\pi / \pi_{ref}) + \beta \log Z$. DPO parametrizes the reward
# by the policy. The Bradley-Terry likelihood needs the difference of two
# rewards of the same prompt, in which $\beta \log Z(x)$ cancels. It follows
# that DPO cannot use absolute scores or compare prompts, and that the
# equivalence holds at the optimum over all policies; with few data or a
# restricted model the two methods differ.
#
# </details>
#
# **Your DPO run has an accuracy of 95 % on held-out pairs, but the answers got
# worse. Name three causes and how you would see them.**
#
# <details><summary>Answer</summary>
#
# (1) Likelihood displacement: log p of chosen answers falls together with that
# of rejected ones; log both, not only margins. (2) Drift: the KL from the
# reference is large as labels are (nearly) deterministic or training was long;
# log it, use fewer steps, a lower rate, a larger beta, or IPO. (3) A shortcut
# such as length or style: compare lengths of chosen and rejected and of the
# policy's samples before and after, and measure accuracy on pairs of equal
# length. Accuracy on pairs concerns given texts, none of which the policy has
# to sample.
#
# </details>
# %% [markdown] lang="zh"
# ## 面试题
#
# **DPO 没有奖励模型。奖励去哪了？$Z$ 又去哪了？**
#
# <details><summary>答案</summary>
#
# 带 KL 约束问题的最优策略与奖励互相决定，只差一个与 prompt 有关的常数：
# $r = \beta \log(\pi / \pi_{ref}) + \beta \log Z$。DPO 用策略来参数化奖励。
# Bradley-Terry 似然只需要同一 prompt 的两个奖励之差，$\beta \log Z(x)$
# 在其中被消去。由此可知 DPO 不能使用绝对分数，也不能跨 prompt 比较；
# 而且这种等价性是在所有策略上取最优时成立的，
# 数据少或模型受限时两种方法并不相同。
#
# </details>
#
# **你的 DPO 训练在留出样本对上的准确率是 95%，但回答变差了。
# 说出三种原因以及如何发现。**
#
# <details><summary>答案</summary>
#
# （1）似然位移（likelihood displacement）：chosen 的 log p 与 rejected
# 一起下降；两者都要记录，不能只看 margin。（2）漂移：标签（几乎）
# 是确定性的或训练太久，离参考模型的 KL 很大；记录 KL，减少步数、降低学习率、
# 加大 beta 或改用 IPO。（3）捷径，例如长度或文风：比较 chosen 与 rejected
# 的长度、训练前后策略采样的长度，并在等长样本对上测准确率。
# 样本对上的准确率只关乎给定的文本，而策略并不一定会采样出这些文本。
#
# </details>
# %% [markdown] lang="en"
# ## In the package
#
# - {{moepeft.objectives.dpo.loss_sums}} with
#   {{moepeft.objectives.dpo.sigmoid_loss}},
#   {{moepeft.objectives.dpo.ipo_loss}} (of log-ratios averaged over tokens),
#   {{moepeft.objectives.dpo.hinge_loss}} and
#   {{moepeft.objectives.dpo.robust_loss}} (arXiv:2403.00409).
# - {{moepeft.objectives.paired_batch.answer_logps}} runs both answers in one
#   pass, also packed, and takes the difference from the reference per token
#   before it sums, as a difference of two large sums has a rounding error of
#   the size of the first update.
# - {{moepeft.objectives.reference_model.make_reference}}: the reference is the
#   frozen base without the adapter, so it needs no second copy of the weights;
#   or log-probabilities computed once,
#   {{moepeft.objectives.reference_model.precompute_logps}}.
# - {{moepeft.objectives.reward.bradley_terry_loss}}: the reward is the logit of
#   the padding token, so a reward model is an adapter.
# - {{moepeft.objectives.kto.loss_sums}} (arXiv:2402.01306) for single judged
#   answers, {{moepeft.objectives.orpo.loss_sums}} and
#   {{moepeft.objectives.simpo.simpo_loss}} without a reference.
#
# Papers: InstructGPT (arXiv:2203.02155), DPO (arXiv:2305.18290), IPO
# (arXiv:2310.12036), likelihood displacement (arXiv:2410.08847), SimPO
# (arXiv:2405.14734), length in RLHF (arXiv:2310.03716).
# %% [markdown] lang="zh"
# ## 在 moepeft 中
#
# - {{moepeft.objectives.dpo.loss_sums}}，以及
#   {{moepeft.objectives.dpo.sigmoid_loss}}、
#   {{moepeft.objectives.dpo.ipo_loss}}（对数比率按 token 取平均）、
#   {{moepeft.objectives.dpo.hinge_loss}} 和
#   {{moepeft.objectives.dpo.robust_loss}}（arXiv:2403.00409）。
# - {{moepeft.objectives.paired_batch.answer_logps}} 用一次前向计算两个回答，
#   也支持打包；它先逐 token 减去参考模型再求和，
#   因为两个大和之差的舍入误差与第一次更新一样大。
# - {{moepeft.objectives.reference_model.make_reference}}：参考模型是不带
#   adapter 的冻结基座，所以不需要第二份权重；也可以预先计算一次对数概率，
#   {{moepeft.objectives.reference_model.precompute_logps}}。
# - {{moepeft.objectives.reward.bradley_terry_loss}}：奖励是 padding token 的
#   logit，所以奖励模型就是一个 adapter。
# - {{moepeft.objectives.kto.loss_sums}}（arXiv:2402.01306）
#   用于单个带评判的回答，{{moepeft.objectives.orpo.loss_sums}} 和
#   {{moepeft.objectives.simpo.simpo_loss}} 不需要参考模型。
#
# 论文：InstructGPT（arXiv:2203.02155）、DPO（arXiv:2305.18290）、IPO
# （arXiv:2310.12036）、likelihood displacement（arXiv:2410.08847）、SimPO
# （arXiv:2405.14734）、RLHF 中的长度（arXiv:2310.03716）。
# %% [markdown] lang="en" tags=["solution"]
# # Solutions: preferences
#
# ## Exercise 1
#
# With $u = \beta h$ the loss is a cross-entropy between $(1 - s, s)$ and
# $(\sigma(u), \sigma(-u))$. Its minimum is at $\sigma(u) = 1 - s$, so
# $h = \frac{1}{\beta} \log \frac{1 - s}{s}$: smoothing gives DPO a finite
# optimum.
# %% [markdown] lang="zh" tags=["solution"]
# # 解答：偏好
#
# ## 练习 1
#
# 令 $u = \beta h$，损失是 $(1 - s, s)$ 与 $(\sigma(u), \sigma(-u))$ 的交叉熵，
# 最小值在 $\sigma(u) = 1 - s$ 处，即
# $h = \frac{1}{\beta} \log \frac{1 - s}{s}$：label smoothing 让 DPO
# 有了有限的最优解。
# %% tags=["solution"]
s, beta = 0.1, 0.5
h = np.linspace(-2, 12, 14001)
smooth = -(1 - s) * np.log(sigmoid(beta * h)) - s * np.log(sigmoid(-beta * h))
np.testing.assert_allclose(
  smooth, dpo.sigmoid_loss(h, beta, label_smoothing=s), rtol=1e-5
)
best_h = np.log((1 - s) / s) / beta
assert abs(h[smooth.argmin()] - best_h) < 1e-3
print(f'h = {best_h:.3f}')
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 2
#
# Sort by reward. The best of $n$ is answer $i$ if all $n$ are at most $i$ and
# not all are below: $P_i = F_i^n - F_{i-1}^n$ with the cumulative probability
# $F$. No policy is above the frontier, because it is the maximum of the reward
# at each KL.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 2
#
# 按奖励排序。$n$ 个中最好的是回答 $i$，当且仅当 $n$ 个都不超过 $i$ 且不全低于
# $i$：$P_i = F_i^n - F_{i-1}^n$，$F$ 为累积概率。没有任何策略在前沿之上，
# 因为前沿就是每个 KL 下奖励的最大值。
# %% tags=["solution"]
order = np.argsort(reward)
cumulative = np.concatenate([[0], np.cumsum(reference[order])])
for count in (1, 2, 4, 8):
  policy = np.empty(6)
  policy[order] = np.diff(cumulative**count)
  distance, mean = kl(policy, reference), policy @ reward
  assert distance <= np.log(count) - (count - 1) / count + 1e-9
  # The frontier is increasing in KL, so interpolation is enough.
  limit = np.interp(distance, *frontier[::-1].T)
  print(f'n {count}: KL {distance:.3f}, reward {mean:.3f} <= {limit:.3f}')
  assert mean <= limit + 0.01


# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 3
#
# With $u = \beta \log(\pi / \pi_{ref})$, the log-likelihood of the ranking
# $(i, j, k)$ is
# $u_i - \log(e^{u_i} + e^{u_j} + e^{u_k}) + u_j - \log(e^{u_j} + e^{u_k})$. A
# constant added to all $u$ cancels, so $\log Z$ cancels. The expected loss is
# again a cross-entropy between true and implied probabilities.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 3
#
# 令 $u = \beta \log(\pi / \pi_{ref})$，排序 $(i, j, k)$ 的对数似然是
# $u_i - \log(e^{u_i} + e^{u_j} + e^{u_k}) + u_j - \log(e^{u_j} + e^{u_k})$。
# 所有 $u$ 加同一常数会被消去，所以 $\log Z$ 被消去。
# 期望损失仍是真实概率与隐含概率之间的交叉熵。
# %% tags=["solution"]
def ranking_loss(scores, ranking):
  """-log p of rankings, int [..., k], under Plackett-Luce."""
  u = scores[ranking]
  k = ranking.shape[-1]
  return -sum(
    u[..., i] - jax.nn.logsumexp(u[..., i:], axis=-1) for i in range(k - 1)
  )


u = jnp.array([0.3, -0.4])
np.testing.assert_allclose(
  ranking_loss(u, jnp.array([0, 1])), bradley_terry_loss(u[0], u[1]), rtol=1e-5
)
rankings = np.array(
  [(i, j, k) for i in range(6) for j in range(6) for k in range(6)
   if len({i, j, k}) == 3]
)  # fmt: skip
truth = np.exp(-ranking_loss(jnp.asarray(reward), rankings))
theta, _ = minimize(
  lambda t: jnp.sum(
    truth * ranking_loss(jax.nn.log_softmax(t) - theta_ref, rankings)
  ),
  theta_ref,
)
np.testing.assert_allclose(jax.nn.softmax(theta), optimum(1.0)[0], atol=2e-3)

# SPDX-License-Identifier: Apache-2.0

# %% [markdown] lang="en"
# # Residual networks
#
# A transformer is a stack of blocks $x\leftarrow x+F(x)$. The "$x+$" comes from
# image recognition (He et al., arXiv:1512.03385), where it made networks of
# more than a hundred layers trainable. This notebook trains plain and residual
# networks of equal size and different depth on small images of digits, looks at
# what happens to signals and gradients layer by layer, and compares the
# accuracy with scikit-learn's classifiers.
#
# ## What you will understand
#
# - the degradation problem: a deeper plain network has a higher *training* loss
# - why in a deep plain network all inputs look alike, and what that does to
#   gradients
# - what the identity adds to the chain rule
# - why a residual network can start as a shallow one, and what removing blocks
#   does
# - how to compare with a simple baseline honestly
#
# Time: about 60 minutes. Before it: notebook 01.
# %% [markdown] lang="zh"
# # 残差网络
#
# transformer 是一叠 $x\leftarrow x+F(x)$ 的块。这个 “$x+$”来自图像识别（He 等，
# arXiv:1512.03385），它让一百多层的网络变得可训练。
# 本笔记在小型手写数字图像上训练大小相同、深度不同的普通网络和残差网络，
# 逐层观察信号与梯度，并与 scikit-learn 的分类器比较准确率。
#
# ## 你将理解什么
#
# - 退化问题：更深的普通网络，*训练*损失反而更高
# - 为什么在很深的普通网络里所有输入都变得相似，这对梯度有何影响
# - 恒等映射给链式法则增加了什么
# - 为什么残差网络可以从一个浅网络开始，去掉若干块会怎样
# - 怎样诚实地与简单基线比较
#
# 时间：约 60 分钟。先修：笔记 01。
# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

from moepeft.nn.norms import rms_norm

plt.rcParams['figure.dpi'] = 72
images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32)  # [1797, 64], 8 x 8 pixels
x_train, x_test, y_train, y_test = train_test_split(
  images, labels, test_size=500, stratify=labels, random_state=0
)
print(x_train.shape, x_test.shape, 'pixels from', images.min(), images.max())
# %% [markdown] lang="en"
# ## 1. Two networks that differ by one "+"
#
# A block has two layers of width $d=32$ with a norm before them:
#
# $$F(x)=\mathrm{relu}\big(\mathrm{norm}(x)\,W^{\uparrow}+\beta\big)\,
# W^{\downarrow},\qquad
# \text{plain: }x\leftarrow F(x),\qquad\text{residual: }x\leftarrow x+F(x).$$
#
# $W^{\uparrow}$ and $W^{\downarrow}$ are `up` and `down` in the code, $\beta$
# is `bias`, and $\mathrm{norm}(x)=x/\sqrt{\mathrm{mean}(x^2)}$ over the $d$
# numbers of an example (RMSNorm).
#
# Both have the same parameters and the same initial values. The norm gives each
# block an input of mean square 1 in both, so whatever goes wrong in the plain
# network is not the growth or decay of notebook 01, section 4. This is the
# order of today's transformers (pre-norm). The weights of all blocks are
# stacked, and `jax.lax.scan` runs one block after the other: the program does
# not grow with the depth.
# %% [markdown] lang="zh"
# ## 1. 只差一个“+”的两个网络
#
# 一个块有两层，宽度 $d=32$，之前有一个 norm：
#
# $$F(x)=\mathrm{relu}\big(\mathrm{norm}(x)\,W^{\uparrow}+\beta\big)\,
# W^{\downarrow},\qquad
# \text{plain: }x\leftarrow F(x),\qquad\text{residual: }x\leftarrow x+F(x).$$
#
# $W^{\uparrow}$、$W^{\downarrow}$ 即代码中的 `up`、`down`，$\beta$ 即 `bias`；
# $\mathrm{norm}(x)=x/\sqrt{\mathrm{mean}(x^2)}$，对每个样本的 $d$ 个数取平均
# （RMSNorm）。
#
# 两者参数相同，初始值也相同。norm 使两者每个块的输入均方都是 1，
# 所以普通网络若出问题，不会是笔记 01 第 4 节那样的增大或缩小造成的。这也是当今
# transformer 的顺序（pre-norm）。所有块的权重叠放在一起，
# `jax.lax.scan` 依次运行各块：程序大小不随深度增长。
# %%
D = 32


def make_params(depth, seed=0):
  rng = np.random.default_rng(seed)

  def normal(*shape, variance):
    a = rng.standard_normal(shape) * np.sqrt(variance)
    return jnp.asarray(a, jnp.float32)

  return {
    'first': normal(64, D, variance=1 / 64),
    'blocks': {
      'up': normal(depth, D, D, variance=2 / D),  # before a ReLU
      'down': normal(depth, D, D, variance=1 / D),
      'bias': jnp.zeros((depth, D)),
    },
    'head': normal(D, 10, variance=1 / D),
  }


def norm(x):
  return rms_norm(x, jnp.ones(D), 1e-6)


def block(x, weights, residual):
  hidden = jax.nn.relu(norm(x) @ weights['up'] + weights['bias'])
  y = hidden @ weights['down']
  return x + y if residual else y


def forward(params, x, residual):
  """x [b, 64] -> logits [b, 10] and the states [depth, b, d]."""

  def step(x, weights):
    x = block(x, weights, residual)
    return x, x

  x, states = jax.lax.scan(step, x @ params['first'], params['blocks'])
  return norm(x) @ params['head'], states


def loss(params, x, y, residual):
  logits, _ = forward(params, x, residual)
  return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


params = make_params(3)
by_loop = x_train[:5] @ params['first']
for i in range(3):
  weights = jax.tree.map(lambda a, i=i: a[i], params['blocks'])
  by_loop = block(by_loop, weights, True)
_, states = forward(params, x_train[:5], True)
assert np.allclose(by_loop, states[-1], atol=1e-5), 'scan is a loop'
# %% [markdown] lang="en"
# ## 2. Before training: do inputs stay different?
#
# Take two images and follow their hidden states. In a plain network each ReLU
# layer with random weights brings any two directions closer together: both get
# the same positive mean from the ReLU. After many layers the states of *all*
# images point the same way, and the head cannot tell digits apart. In the
# residual network the state is a sum that still contains the first layer.
#
# For random layers this can be computed: if the cosine of two inputs is $\rho$,
# the cosine after one wide ReLU layer is
# $\frac{1}{\pi}\big(\sqrt{1-\rho^2}+\rho\,(\pi-\arccos\rho)\big)$ (Cho and
# Saul, 2009). It is larger than $\rho$ for every $\rho<1$.
# %% [markdown] lang="zh"
# ## 2. 训练之前：不同的输入还保持不同吗？
#
# 取两张图像，跟踪它们的隐藏状态。在普通网络中，每个随机权重的 ReLU
# 层都会让任意两个方向靠近：ReLU 给两者加上了同样的正均值。许多层之后，
# *所有*图像的状态都指向同一方向，输出层无法区分数字。在残差网络中，
# 状态是一个和，其中仍含有第一层的输出。
#
# 对随机层可以算出来：若两个输入的余弦是 $\rho$，经过一个很宽的 ReLU 层后，
# 余弦为 $\frac{1}{\pi}\big(\sqrt{1-\rho^2}+\rho\,(\pi-\arccos\rho)\big)$（Cho
# 和 Saul，2009）。对任何 $\rho<1$，它都大于 $\rho$。
# %%
DEPTHS = (1, 4, 16)
KINDS = {'plain': False, 'residual': True}


def mean_cosine(states):
  """[depth, b, d] -> the mean cosine of different examples, [depth]."""
  unit = states / np.linalg.norm(states, axis=-1, keepdims=True)
  b = states.shape[1]
  products = np.einsum('lbd,lcd->lbc', unit, unit)
  return (products.sum((1, 2)) - b) / (b * (b - 1))


def theory(rho):
  return (np.sqrt(1 - rho**2) + rho * (np.pi - np.arccos(rho))) / np.pi


deep = make_params(32)
cosine = {
  kind: mean_cosine(np.asarray(forward(deep, x_train[:100], residual)[1]))
  for kind, residual in KINDS.items()
}
predicted = [cosine['plain'][0]]
for _ in range(31):
  predicted.append(theory(min(predicted[-1], 1.0)))
print(
  f'cosine after 32 blocks: plain {cosine["plain"][-1]:.4f} '
  f'(wide layers: {predicted[-1]:.4f}), '
  f'residual {cosine["residual"][-1]:.4f}'
)
assert cosine['plain'][-1] > 0.97, 'all states should be nearly parallel'
assert cosine['residual'][-1] < cosine['plain'][-1] - 0.02
# %% [markdown] lang="en"
# ## 3. Before training: gradients by layer
#
# The chain rule through $L$ plain blocks is a product of Jacobians
# $J_l=\partial F_l/\partial x$, and through residual ones
#
# $$\frac{\partial\mathcal{L}}{\partial x_0}=
# \frac{\partial\mathcal{L}}{\partial x_L}\;
# (I+J_L)(I+J_{L-1})\cdots(I+J_1)=
# \frac{\partial\mathcal{L}}{\partial x_L}\Big(I+\sum_lJ_l+\dots\Big).$$
#
# A product of many random matrices has singular values that spread
# exponentially: a few directions survive, the others vanish. The term $I$
# passes the gradient of the loss to every block unchanged. Measured as the norm
# of the gradient of each block's `up` matrix:
# %% [markdown] lang="zh"
# ## 3. 训练之前：逐层的梯度
#
# 穿过 $L$ 个普通块的链式法则是 Jacobian $J_l=\partial F_l/\partial x$ 的乘积，
# 穿过残差块则是
#
# $$\frac{\partial\mathcal{L}}{\partial x_0}=
# \frac{\partial\mathcal{L}}{\partial x_L}\;
# (I+J_L)(I+J_{L-1})\cdots(I+J_1)=
# \frac{\partial\mathcal{L}}{\partial x_L}\Big(I+\sum_lJ_l+\dots\Big).$$
#
# 许多随机矩阵的乘积，其奇异值会指数式分散：少数方向留存，其余消失。$I$
# 这一项把损失的梯度原样传给每个块。用每个块的 `up` 矩阵梯度的范数来测量：
# %%
grad = jax.jit(jax.grad(loss), static_argnames='residual')
gradient_norm = {}
for kind, residual in KINDS.items():
  g = grad(deep, x_train[:256], y_train[:256], residual)['blocks']['up']
  gradient_norm[kind] = np.sqrt((np.asarray(g) ** 2).sum((1, 2)))


def singular_values(residual):
  """Of the Jacobian of the last state by the first layer's output, [d]."""

  def run(x):
    step = lambda x, w: (block(x, w, residual), None)  # noqa: E731
    return jax.lax.scan(step, x, deep['blocks'])[0]

  jacobian = jax.jacobian(run)(x_train[0] @ deep['first'])
  return np.linalg.svd(np.asarray(jacobian), compute_uv=False)


singular = {kind: singular_values(r) for kind, r in KINDS.items()}
fig, axes = plt.subplots(1, 3, figsize=(7, 2.4))
for kind in KINDS:
  axes[0].plot(cosine[kind], label=kind)
  axes[1].plot(gradient_norm[kind])
  axes[2].plot(singular[kind] / singular[kind][0])
axes[0].plot(predicted, 'k:', lw=1, label='wide ReLU layers')
axes[0].set(title='cosine of two images', xlabel='block')
axes[0].legend(fontsize=7)
axes[1].set(title='gradient norm', xlabel='block', yscale='log')
axes[2].set(
  title='singular values / largest', xlabel='rank', yscale='log', ylim=(1e-8, 2)
)
fig.tight_layout()
ratio = {kind: s[-5] / s[0] for kind, s in singular.items()}
print({kind: f'{value:.0e}' for kind, value in ratio.items()})
assert ratio['plain'] < ratio['residual'] / 100
# %% [markdown] lang="en"
# The middle plot is a warning: the gradient of the plain network does *not*
# vanish here, because the norms keep sizes up. What is lost is direction. The
# right plot shows it: after the few largest singular values of the plain
# Jacobian the others are smaller by many powers of ten. So differences between
# inputs hardly reach the loss, and the gradient that comes down lies in the
# same few directions for all of them.
# %% [markdown] lang="zh"
# 中间的图是个提醒：普通网络的梯度在这里*没有*消失，因为 norm 保持了大小。
# 失去的是方向。右图显示了这一点：普通网络的 Jacobian 除最大的几个奇异值外，
# 其余都小许多个数量级，所以输入之间的差别几乎到不了损失，
# 传下来的梯度对所有输入都落在同样的少数几个方向上。
# %% [markdown] lang="en"
# ## 4. Training
#
# The same steps, batches and optimizer for all. A single rate for both kinds
# would be unfair if it suited only one, so that each network is trained with
# two rates and the better *training* loss is kept.
# %% [markdown] lang="zh"
# ## 4. 训练
#
# 步数、batch 和优化器全部相同。若只用一个学习率，可能只适合其中一种，
# 因此每个网络用两个学习率各训练一次，取*训练*损失较好的那个。
# %%
STEPS, RATES = 160, (3e-3, 1e-3)
picks = np.random.default_rng(1).integers(0, len(y_train), (STEPS, 64))


@functools.partial(jax.jit, static_argnames='residual')
def train(params, rate, residual):
  """Adam with a cosine schedule; all steps are one program."""
  optimizer = optax.scale_by_adam()

  def step(carry, pick_and_n):
    pick, n = pick_and_n
    params, state = carry
    x, y = jnp.asarray(x_train)[pick], jnp.asarray(y_train)[pick]
    value, g = jax.value_and_grad(loss)(params, x, y, residual)
    updates, state = optimizer.update(g, state)
    now = rate * (1 + jnp.cos(jnp.pi * n / STEPS)) / 2
    params = jax.tree.map(lambda p, u: p - now * u, params, updates)
    return (params, state), value

  carry = params, optimizer.init(params)
  (params, _), losses = jax.lax.scan(step, carry, (picks, jnp.arange(STEPS)))
  return params, losses


trained, curves = {}, {}
for depth in DEPTHS:
  for kind, residual in KINDS.items():
    runs = [train(make_params(depth), rate, residual) for rate in RATES]
    params, losses = min(runs, key=lambda run: float(run[1][-20:].mean()))
    trained[kind, depth], curves[kind, depth] = params, np.asarray(losses)


# %%
def accuracy(params, residual):
  logits, _ = forward(params, x_test, residual)
  return float((np.asarray(logits).argmax(-1) == y_test).mean())


final, test_accuracy = {}, {}
print('blocks  layers   training loss, last 20 steps    test accuracy')
print('                      plain  residual         plain  residual')
for depth in DEPTHS:
  for kind, residual in KINDS.items():
    final[kind, depth] = curves[kind, depth][-20:].mean()
    test_accuracy[kind, depth] = accuracy(trained[kind, depth], residual)
  print(
    f'{depth:6}{2 * depth:8}',
    *(f'{final[kind, depth]:12.3f}' for kind in KINDS),
    '   ',
    *(f'{test_accuracy[kind, depth]:9.3f}' for kind in KINDS),
  )
fig, axes = plt.subplots(1, 2, figsize=(7, 2.6), sharey=True)
for axis, kind in zip(axes, KINDS, strict=True):
  for depth in DEPTHS:
    smooth = np.convolve(curves[kind, depth], np.ones(10) / 10, 'valid')
    axis.plot(smooth, label=f'{depth} blocks')
  axis.set(title=f'{kind}: training loss', xlabel='step', ylim=(0, 2.5))
axes[1].legend(fontsize=8)
fig.tight_layout()
# %%
assert final['plain', 16] > final['plain', 1] + 0.5, 'the plain one degrades'
assert final['residual', 16] < final['residual', 1] + 0.1
# %% [markdown] lang="en"
# This is the degradation of the paper's figure 1: the deep plain network is
# worse *on the training data*. It is not overfitting. It could represent what
# the shallow one does (let the other blocks be the identity), but gradient
# descent does not get there in this many steps. A residual block is the
# identity when $F=0$, so depth costs nothing to begin with.
#
# The depth also brings nothing here: digits of 8 x 8 pixels do not need 32
# layers. Residual connections make depth *possible*; whether it helps is up to
# the task.
#
# ## 5. How good is it? A baseline
#
# %% [markdown] lang="zh"
# 这就是论文图 1 的退化现象：很深的普通网络*在训练数据上*就更差。这不是过拟合。
# 它本可以表示浅网络的函数（让其余块成为恒等映射），
# 但梯度下降在这么多步内到不了那里。残差块在 $F=0$ 时就是恒等映射，
# 所以深度一开始不带来任何代价。
#
# 深度在这里也没有带来好处：8 x 8 像素的数字不需要 32 层。
# 残差连接使深度成为*可能*；深度是否有用取决于任务。
#
# ## 5. 效果如何？与基线比较
# %%
baselines = {
  'logistic regression': LogisticRegression(max_iter=500),
  'support vectors (RBF)': SVC(gamma='scale', C=10.0),
}
for name, model in baselines.items():
  score = model.fit(x_train, y_train).score(x_test, y_test)
  test_accuracy[name] = score
best = max(test_accuracy['residual', depth] for depth in DEPTHS)
for name in baselines:
  print(f'{name:22} {test_accuracy[name]:.3f}')
print(f'best residual network  {best:.3f}')
# The standard error of an accuracy of 0.97 on 500 images:
error = np.sqrt(0.97 * 0.03 / 500)
print(f'two standard errors: {2 * error:.3f}')
assert test_accuracy['support vectors (RBF)'] > 0.96
assert best > 0.9, 'the network should at least come near'
assert best < test_accuracy['support vectors (RBF)'] + 2 * error
assert best < test_accuracy['logistic regression'] + 2 * error


# %% [markdown] lang="en"
# Read the numbers before you praise the network: it is not better than a
# support vector machine, which needs no design of layers and no choice of
# steps, and logistic regression is within the error. And "best residual
# network" is the best of three on the *test* images, which is a little too
# optimistic; a validation set would be needed to choose the depth. Differences
# below two standard errors mean nothing.
#
# ## 6. Blocks as small corrections
#
# If a residual network adds small corrections, leaving one block out may do
# little harm. In a plain network each block has nothing but the output of the
# block before it. Leave out each block of the trained networks of 4 and 16
# blocks in turn, without retraining:
# %% [markdown] lang="zh"
# 夸奖网络之前先看数字：它并不比支持向量机好，而后者不需要设计层数，
# 也不需要选择步数；逻辑回归与它的差别也在误差之内。而且“best residual network”
# 是在*测试*图像上从三个中挑出的最好者，略偏乐观；选择深度本应使用验证集。
# 小于两倍标准误差的差别没有意义。
#
# ## 6. 块是小的修正
#
# 如果残差网络是在叠加小的修正，那么去掉一个块可能影响不大。
# 而普通网络的每个块只能得到前一块的输出。对训练好的 4 块和 16 块网络，
# 依次去掉每一个块，不再训练：
# %%
def without_block(params, i):
  blocks = jax.tree.map(lambda a: np.delete(a, i, axis=0), params['blocks'])
  return params | {'blocks': blocks}


after_removal = {}
for depth in (4, 16):
  for kind, residual in KINDS.items():
    params = trained[kind, depth]
    rest = [accuracy(without_block(params, i), residual) for i in range(depth)]
    after_removal[kind, depth] = np.median(rest)
    print(
      f'{kind:9} {depth:2} blocks: accuracy '
      f'{test_accuracy[kind, depth]:.3f}, with one block less: median '
      f'{np.median(rest):.3f}, lowest {np.min(rest):.3f} without block '
      f'{np.argmin(rest)}'
    )
assert after_removal['residual', 16] > test_accuracy['residual', 16] - 0.2
assert after_removal['plain', 4] < 0.5
# %% [markdown] lang="en"
# The plain network is destroyed by every removal. The residual one of 16 blocks
# loses little with most blocks, but not with all of them: the printed block
# changes the state so much that the later ones depend on it. "Small
# corrections" is a tendency that grows with depth, as the 4 blocks show, and no
# law.
# %% [markdown] lang="zh"
# 普通网络去掉任何一块都会被毁掉。16 块的残差网络去掉大多数块损失很小，
# 但并非每一块都如此：打印出的那一块对状态改变很大，后面的块依赖它。“小的修正”
# 是一种随深度增强的趋势（对比 4 块的结果），而不是定律。
# %% [markdown] lang="en"
# ## Exercises
#
# 1. *Gradient of the identity.* Set the `down` matrices of a residual network
#    of 32 blocks to zero. What are its logits, and which of its parameters have
#    a gradient of exactly zero at that point? Why can it train all the same?
# 2. *Post-norm.* The first transformer computed
#    $x\leftarrow\mathrm{norm}(x+F'(x))$, with no norm inside of $F'$. Write it,
#    and measure the cosine of two images after 32 blocks with random weights,
#    beside plain and pre-norm. Suppose that state and branch are orthogonal and
#    that a branch has mean square 1. Which share of the norm of the final state
#    is the first layer's output in post-norm, and which in pre-norm?
# 3. *Scaled branches.* GPT-2 initializes the last matrix of each branch with a
#    factor of $1/\sqrt{L}$ for $L$ branches. Measure the mean square of the
#    last state at the start with and without it, for 1, 4 and 16 blocks, and
#    explain the growth.
#
# ## Interview questions
#
# **Batch norm already prevents vanishing gradients. What do residual
# connections add?**
#
# <details><summary>Answer</summary>
#
# The norm controls the size of activations and gradients, not their direction.
# In a plain network the Jacobian of many layers still has singular values that
# spread exponentially, states of different inputs become parallel, and
# gradients of nearby inputs become unrelated ("shattered"). He et al. observed
# degradation in plain networks *with* batch norm. The identity path keeps the
# Jacobian near $I$ plus small terms, so directions survive.
#
# </details>
#
# **What do residual connections have in common with LoRA and adapters?**
#
# <details><summary>Answer</summary>
#
# All of them add a branch to something that already works, and the branch can
# start at zero. LoRA adds $xAB$ with $B=0$, a bottleneck adapter is
# $x+\mathrm{relu}(xP)\,U$ with $U=0$, so that the first step of training
# computes exactly the base model, and the gradient with respect to $B$ (or $U$)
# is not zero although the branch's output is.
#
# </details>
#
# ## In the package
#
# - {{moepeft.models.decoder.model.DecoderBlock}}: $x+$ attention, then $x+$
#   feed-forward, pre-norm. {{moepeft.models.bert.model}} is post-norm, as BERT
#   is.
# - {{moepeft.nn.norms.rms_norm}}: the norm used above.
# - {{moepeft.nn.scan_layers.scan_layers}}: layers under `jax.lax.scan`, with
#   adapters and rematerialization.
# - {{moepeft.peft.methods.bottleneck}}: the residual adapter.
#
# Papers: residual networks 1512.03385, pre-activation 1603.05027, shattered
# gradients 1702.08591, blocks left out 1605.06431.
# %% [markdown] lang="zh"
# ## 练习
#
# 1. *恒等映射的梯度。* 把 32 块残差网络的 `down` 矩阵全部置零。它的 logits
#    是什么？此时哪些参数的梯度恰好为零？为什么它仍然可以训练？
# 2. *Post-norm。* 最早的 transformer 计算 $x\leftarrow\mathrm{norm}(x+F'(x))$，
#    $F'$ 内部没有 norm。实现它，测量随机权重下 32 块之后两张图像的余弦，与
#    plain 和 pre-norm 比较。假设状态与分支正交，且分支的均方为 1，
#    那么在 post-norm 和 pre-norm 中，第一层的输出各占最终状态范数的多大比例？
# 3. *缩放分支。* GPT-2 初始化时给每个分支的最后一个矩阵乘以 $1/\sqrt{L}$（共
#    $L$ 个分支）。对 1、4、16 块，测量有无该因子时最后状态的均方，并解释增长。
#
# ## 面试题
#
# **batch norm 已经防止了梯度消失，残差连接还增加了什么？**
#
# <details><summary>答案</summary>
#
# norm 控制的是激活和梯度的大小，不是方向。在普通网络中，多层的 Jacobian
# 的奇异值仍会指数式分散，不同输入的状态趋于平行，
# 邻近输入的梯度变得互不相关（“shattered”）。He 等正是在*带* batch norm
# 的普通网络上观察到退化的。恒等通路使 Jacobian 保持为 $I$ 加小项，
# 方向得以保留。
#
# </details>
#
# **残差流与 LoRA、适配器有什么共同点？**
#
# <details><summary>答案</summary>
#
# 它们都在已经可用的函数上加一个分支，而分支可以从零开始。LoRA 加上 $xAB$，
# 其中 $B=0$；bottleneck 适配器是 $x+\mathrm{relu}(xP)\,U$，其中 $U=0$。
# 因此训练的第一步计算的正是基座模型；虽然分支的输出为零，对 $B$（或 $U$）
# 的梯度却不为零。
#
# </details>
#
# ## 在 moepeft 中
#
# - {{moepeft.models.decoder.model.DecoderBlock}}：$x+$ 注意力，再 $x+$ 前馈，
#   pre-norm。{{moepeft.models.bert.model}} 与 BERT 一样是 post-norm。
# - {{moepeft.nn.norms.rms_norm}}：上面用的 norm。
# - {{moepeft.nn.scan_layers.scan_layers}}：用 `jax.lax.scan` 运行各层，
#   支持适配器和重计算。
# - {{moepeft.peft.methods.bottleneck}}：残差适配器。
#
# 论文：残差网络 1512.03385，pre-activation 1603.05027，shattered gradients
# 1702.08591，去掉块 1605.06431。
# %% [markdown] lang="en" tags=["solution"]
# # Residual networks: solutions
#
# ## Exercise 1
#
# The logits are those of a network without blocks. With `down` = 0 no gradient
# reaches `up` and the biases, but that of `down` is not zero: it is the hidden
# activation times the gradient of the state. After one step `down` is not zero
# any more, and everything trains.
# %% [markdown] lang="zh" tags=["solution"]
# # 残差网络：答案
#
# ## 练习 1
#
# logits 就是没有任何块的网络的 logits。`down` = 0 时，`up` 和偏置得不到梯度，但
# `down` 的梯度不为零：它等于隐藏激活乘以状态的梯度。走一步之后 `down`
# 不再为零，一切都能训练。
# %% tags=["solution"]
zero = make_params(32)
zero['blocks']['down'] = jnp.zeros_like(zero['blocks']['down'])
logits, _ = forward(zero, x_train[:9], True)
shallow = norm(x_train[:9] @ zero['first']) @ zero['head']
assert np.allclose(logits, shallow, atol=1e-5)
g = grad(zero, x_train[:64], y_train[:64], True)['blocks']
assert not np.any(g['up']) and not np.any(g['bias'])
assert (np.abs(g['down']).max((1, 2)) > 1e-4).all(), 'every block learns'


# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 2
#
# Branch and state have about the same size, so a post-norm divides the sum by
# about $\sqrt2$: after $L$ blocks the first layer's output has the share
# $2^{-L/2}$ of the final state, in pre-norm $1/\sqrt{1+L}$. Post-norm lies
# between plain and pre-norm.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 2
#
# 分支与状态大小相近，所以 post-norm 把和除以约 $\sqrt2$：$L$ 块之后，
# 第一层的输出在最终状态中的比例是 $2^{-L/2}$，而 pre-norm 是 $1/\sqrt{1+L}$。
# post-norm 介于 plain 与 pre-norm 之间。
# %% tags=["solution"]
def post_norm_states(params, x):
  def step(x, w):
    x = norm(x + jax.nn.relu(x @ w['up'] + w['bias']) @ w['down'])
    return x, x

  return jax.lax.scan(step, norm(x @ params['first']), params['blocks'])[1]


post = mean_cosine(np.asarray(post_norm_states(deep, x_train[:100])))[-1]
print(
  f'plain {cosine["plain"][-1]:.3f}, post-norm {post:.3f}, '
  f'pre-norm {cosine["residual"][-1]:.3f}'
)
assert cosine['residual'][-1] < post < cosine['plain'][-1]
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 3
#
# Each branch reads a normed input, so it adds a vector of mean square about 1,
# nearly orthogonal to the state: the mean square grows linearly, to about
# $1+L$. With $1/\sqrt L$ the branches add 1 in all.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 3
#
# 每个分支读取归一化后的输入，因此加上一个均方约为 1、与状态近似正交的向量：
# 均方线性增长，约为 $1+L$。乘以 $1/\sqrt L$ 后，所有分支合计只加 1。
# %% tags=["solution"]
for depth in DEPTHS:
  sizes = []
  for factor in (1.0, depth**-0.5):
    params = make_params(depth)
    params['blocks']['down'] = params['blocks']['down'] * factor
    _, states = forward(params, x_train[:100], True)
    sizes.append(float((states[-1] ** 2).mean()))
  print(
    f'{depth:2} blocks: mean square {sizes[0]:6.2f}, '
    f'with the factor {sizes[1]:.2f}'
  )
assert sizes[0] > 8 and sizes[1] < 4

# SPDX-License-Identifier: Apache-2.0
# %% [markdown] lang="en"
# # Adapters, prefixes and prompts by hand
#
# A frozen model can be steered at many places: by scaling its activations, by
# small networks after its sublayers, by keys and values that belong to no
# token, by vectors before its text. This notebook writes (IA)³, bottleneck
# adapters, prefix tuning, prompt tuning and P-tuning into one forward pass,
# shows each equal to moepeft's, and trains all of them on one task with several
# seeds, beside LoRA and full fine-tuning.
#
# ## What you will understand
#
# - what each method computes, with its parameters counted by formula;
# - which methods can be merged into the weights, and why the others cannot;
# - why attention with a prefix is an interpolation between two attentions;
# - why P-tuning is prompt tuning with another parametrization;
# - how to compare methods fairly: rates chosen on other data, several seeds,
#   spread beside the mean.
#
# About 70 minutes. Before it: 15 (LoRA by hand).
# %% [markdown] lang="zh"
# # 手写 adapter、prefix 与 prompt
#
# 冻结的模型可以在许多地方被引导：缩放它的激活，在子层之后接小网络，
# 加上不属于任何 token 的 key 和 value，在文本之前放向量。本 notebook 把 (IA)³、
# bottleneck adapter、prefix tuning、prompt tuning 和 P-tuning 写进同一个前向计
# 算，逐一证明与 moepeft 相等，然后在同一个任务上用多个随机种子训练它们，
# 并与 LoRA 和全量微调并列。
#
# ## 你将理解什么
#
# - 每种方法算的是什么，参数量的公式是什么；
# - 哪些方法能合并进权重，其他的为什么不能；
# - 为什么带 prefix 的 attention 是两个 attention 之间的插值；
# - 为什么 P-tuning 就是换了参数化的 prompt tuning；
# - 怎样公平地比较方法：在别的数据上选学习率、多个种子、均值旁边给出离散程度。
#
# 大约 70 分钟。先修：15（手写 LoRA）。
# %%
import flax
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
from moepeft.peft.merge import is_mergeable, merge

D, HEADS, SIZE, FFN, LAYERS, VOCAB = 32, 4, 8, 64, 2, 14
CONFIG = DecoderConfig(
  vocab=VOCAB,
  d_model=D,
  heads=HEADS,
  kv_heads=HEADS,
  head_dim=SIZE,
  ffn=FFN,
  layers=LAYERS,
  gated=False,
  activation='relu',
  positions='learned',
  length=24,
)
SHAPES = {name: (D, HEADS * SIZE) for name in 'qkv'}
SHAPES |= {'o': (HEADS * SIZE, D), 'wi': (D, FFN), 'wo': (FFN, D)}


def init_base(key):
  """A flat dict of arrays; kernels are [layers, in, out]."""
  keys = iter(jax.random.split(key, 9))
  draw = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
  base = {n: draw(LAYERS, *s) * s[0] ** -0.5 for n, s in SHAPES.items()}
  base |= {'embed': 0.1 * draw(VOCAB, D), 'positions': 0.1 * draw(24, D)}
  base |= {
    'norm_self': jnp.ones((LAYERS, D)),
    'norm_mlp': jnp.ones((LAYERS, D)),
  }
  return base | {'norm': jnp.ones(D), 'head': draw(D, VOCAB) * D**-0.5}


# %% [markdown] lang="en"
# ## One forward pass with five places
#
# `peft` is a flat dict of arrays. Each method is a few lines that run if its
# arrays are there; without them the pass is the base's.
#
# | method | what it does | arrays of a layer |
# | --- | --- | --- |
# | (IA)³ | $k \odot l_k$, $v \odot l_v$, $a \odot l_f$ | $2 n h + f$ |
# | bottleneck | $y + \rho(y P + c) U + b$, twice | $2 (2 d m + m + d)$ |
# | prefix | $m$ more keys and values for every query | $2 m n h$ |
# | prompt | $m$ vectors before the embedded text | $m d$, once |
# | P-tuning | the same vectors, computed by an MLP | see below |
#
# Sizes: $d$ of the model, $n$ heads of $h$, $f$ of the feed-forward, $m$ of the
# method. $k$ and $v$ are keys and values, $a$ is the activation in the
# feed-forward, and the vectors $l_k$, $l_v$, $l_f$ are trained. $y$ is the
# output of a sublayer; the bottleneck stands after both sublayers, and its
# trained arrays are $P$ ($d \times m$), $U$ ($m \times d$) and the biases $c$
# and $b$. $\rho$ is ReLU.
# %% [markdown] lang="zh"
# ## 一个前向计算，五个位置
#
# `peft` 是一个扁平的数组字典。每种方法只有几行，字典里有它的数组就执行；
# 没有时就是基座的计算。
#
# | 方法 | 做什么 | 每层的数组 |
# | --- | --- | --- |
# | (IA)³ | $k \odot l_k$，$v \odot l_v$，$a \odot l_f$ | $2 n h + f$ |
# | bottleneck | $y + \rho(y P + c) U + b$，两处 | $2 (2 d m + m + d)$ |
# | prefix | 每个 query 多看 $m$ 对 key 和 value | $2 m n h$ |
# | prompt | 文本的 embedding 之前加 $m$ 个向量 | $m d$，只有一份 |
# | P-tuning | 同样的向量，由一个 MLP 算出 | 见下文 |
#
# 记号：模型宽度 $d$，$n$ 个大小为 $h$ 的头，前馈层宽度 $f$，方法的大小 $m$。
# $k$、$v$ 是 key 和 value，$a$ 是前馈层里的激活，
# 向量 $l_k$、$l_v$、$l_f$ 是被训练的。$y$ 是子层的输出；
# 两个子层之后各放一个 bottleneck，它训练的数组是 $P$（$d \times m$）、
# $U$（$m \times d$）以及偏置 $c$ 和 $b$。$\rho$ 是 ReLU。
# %%
def rms_norm(x, scale):
  return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def linear(base, peft, name, layer, x):
  y = x @ base[name][layer]
  if f'lora_{name}_a' in peft:  # LoRA, alpha = 2 r
    a, b = peft[f'lora_{name}_a'][layer], peft[f'lora_{name}_b'][layer]
    y = y + 2 * (x @ a) @ b
  return y


def bottleneck(peft, sublayer, layer, y):
  if f'{sublayer}_down' not in peft:
    return y
  down, c, up, b = (
    peft[f'{sublayer}_{part}'][layer]
    for part in ('down', 'down_bias', 'up', 'up_bias')
  )
  return y + jax.nn.relu(y @ down + c) @ up + b


def prompt_vectors(peft):
  """[m, d], or None: stored, or computed by P-tuning's MLP."""
  if 'p_embedding' not in peft:
    return peft.get('prompt')
  z = peft['p_embedding']
  for i in range(3):
    z = z @ peft[f'p_kernel_{i}'] + peft[f'p_bias_{i}']
    z = jax.nn.relu(z) if i < 2 else z
  return z


# %%
def attention(base, peft, layer, x):
  b, t = x.shape[:2]
  heads = (b, t, HEADS, SIZE)
  q, k, v = (
    linear(base, peft, name, layer, x).reshape(heads) for name in 'qkv'
  )
  if 'ia3_k' in peft:
    k, v = k * peft['ia3_k'][layer], v * peft['ia3_v'][layer]
  mask = jnp.tril(jnp.ones((t, t), bool))
  if 'prefix_k' in peft:
    more = lambda a: jnp.broadcast_to(a[layer], (b, *a.shape[1:]))  # noqa: E731
    k = jnp.concatenate([more(peft['prefix_k']), k], axis=1)
    v = jnp.concatenate([more(peft['prefix_v']), v], axis=1)
    seen = jnp.ones((t, k.shape[1] - t), bool)
    mask = jnp.concatenate([seen, mask], axis=1)
  logits = jnp.einsum('btnh,bsnh->bnts', q, k) * SIZE**-0.5
  weights = jax.nn.softmax(jnp.where(mask, logits, -1e9))
  y = jnp.einsum('bnts,bsnh->btnh', weights, v).reshape(b, t, HEADS * SIZE)
  return linear(base, peft, 'o', layer, y)


def feed_forward(base, peft, layer, x):
  hidden = jax.nn.relu(linear(base, peft, 'wi', layer, x))
  if 'ia3_act' in peft:
    hidden = hidden * peft['ia3_act'][layer]
  return linear(base, peft, 'wo', layer, hidden)


def forward(base, peft, ids):
  """ids [b, t] -> logits [b, t, v], or [b, m + t, v] with a prompt."""
  x = base['embed'][ids]
  if (prompt := prompt_vectors(peft)) is not None:
    prompt = jnp.broadcast_to(prompt, (len(x), *prompt.shape))
    x = jnp.concatenate([prompt, x], axis=1)
  x = x + base['positions'][: x.shape[1]]
  for i in range(LAYERS):
    y = attention(base, peft, i, rms_norm(x, base['norm_self'][i]))
    x = x + bottleneck(peft, 'self', i, y)
    y = feed_forward(base, peft, i, rms_norm(x, base['norm_mlp'][i]))
    x = x + bottleneck(peft, 'mlp', i, y)
  return rms_norm(x, base['norm']) @ base['head']


# %% [markdown] lang="en"
# ## How each method starts
#
# Three of the methods start as the base's function: (IA)³ with ones,
# bottlenecks and LoRA with a zero matrix at their end. A prompt or a prefix
# cannot: a vector that takes part in the attention takes weight from the
# tokens, whatever it is. So a prompt starts as the embeddings of real tokens
# (arXiv:2104.08691 found that better than random numbers), a prefix from a
# normal distribution, and P-tuning's MLP from the usual initializers of linear
# layers.
# %% [markdown] lang="zh"
# ## 各方法的起点
#
# 其中三种方法的起点就是基座的函数：(IA)³ 的向量全部初始化为 1，
# bottleneck 和 LoRA 末端的矩阵初始化为 0。prompt 和 prefix 做不到：
# 参与 attention 的向量，不管取什么值，都会从 token 那里分走权重。
# 所以 prompt 从真实 token 的 embedding 开始（arXiv:2104.08691 发现这比随机数
# 好），prefix 从正态分布开始，P-tuning 的 MLP 用线性层常用的初始化。
# %%
RANK, BOTTLE, PREFIX, PROMPT, HIDDEN = 4, 8, 8, 8, 32


def init_peft(method, base, key):
  keys = iter(jax.random.split(key, 16))
  draw = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
  around = lambda i, *shape: jax.random.uniform(  # noqa: E731
    next(keys), shape, minval=-(i**-0.5), maxval=i**-0.5
  )
  if method == 'lora':
    a = {
      f'lora_{n}_a': 0.02 * draw(LAYERS, i, RANK)
      for n, (i, _) in SHAPES.items()
    }
    return a | {
      f'lora_{n}_b': jnp.zeros((LAYERS, RANK, o))
      for n, (_, o) in SHAPES.items()
    }
  if method == 'ia3':
    ones = {f'ia3_{n}': jnp.ones((LAYERS, HEADS, SIZE)) for n in 'kv'}
    return ones | {'ia3_act': jnp.ones((LAYERS, FFN))}
  if method == 'bottleneck':
    return {
      f'{sublayer}_{part}': 0.01 * draw(*shape)
      if part == 'down'
      else jnp.zeros(shape)
      for sublayer in ('self', 'mlp')
      for part, shape in (
        ('down', (LAYERS, D, BOTTLE)),
        ('down_bias', (LAYERS, BOTTLE)),
        ('up', (LAYERS, BOTTLE, D)),
        ('up_bias', (LAYERS, D)),
      )
    }
  if method == 'prefix':
    return {f'prefix_{n}': draw(LAYERS, PREFIX, HEADS, SIZE) for n in 'kv'}
  if method == 'prompt':
    rows = jax.random.choice(next(keys), VOCAB, (PROMPT,), replace=False)
    return {'prompt': base['embed'][rows]}
  mlp = {'p_embedding': draw(PROMPT, D)}
  for i, (inputs, outputs) in enumerate(
    ((D, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, D))
  ):
    mlp |= {
      f'p_kernel_{i}': around(inputs, inputs, outputs),
      f'p_bias_{i}': around(inputs, outputs),
    }
  return mlp


TEXTS = {  # method: the package's text
  'lora': f'lora(rank={RANK}, alpha={2 * RANK})',
  'ia3': 'ia3',
  'bottleneck': f'bottleneck(size={BOTTLE})',
  'prefix': f'prefix(length={PREFIX})',
  'prompt': f'prompt(length={PROMPT})',
  'p_tuning': f'p_tuning(length={PROMPT}, hidden={HIDDEN})',
}


# %% [markdown] lang="en"
# ## Counts by formula
#
# The table above, as code, against the arrays. P-tuning's three layers have
# $d m' + m'$, $m'^2 + m'$ and $m' d + d$ parameters with a hidden size $m'$,
# besides its $m$ vectors. This MLP is the one of Hugging Face's peft; the paper
# has a bidirectional LSTM before an MLP of two layers.
# %% [markdown] lang="zh"
# ## 用公式计数
#
# 把上面的表写成代码，与数组核对。P-tuning 隐藏层宽度记为 $m'$，
# 三层分别有 $d m' + m'$、$m'^2 + m'$ 和 $m' d + d$ 个参数，
# 另加它的 $m$ 个向量。这个 MLP 与 Hugging Face 的 peft 相同；
# 论文里是双向 LSTM 后接两层 MLP。
# %%
def formula(method, d, width, f, layers, m):
  """Trained parameters; `width` is heads times their size, m the size."""
  return {
    'lora': layers * m * (4 * (d + width) + 2 * (d + f)),
    'ia3': layers * (2 * width + f),
    'bottleneck': layers * 2 * (2 * d * m + m + d),
    'prefix': layers * 2 * m * width,
    'prompt': m * d,
    'p_tuning': m * d + HIDDEN * (2 * d + HIDDEN + 2) + d,
  }[method]


base = init_base(jax.random.key(0))
METHOD_SIZE = {
  'lora': RANK,
  'ia3': 0,
  'bottleneck': BOTTLE,
  'prefix': PREFIX,
  'prompt': PROMPT,
  'p_tuning': PROMPT,
}
counts = {}
for method, m in METHOD_SIZE.items():
  arrays = init_peft(method, base, jax.random.key(0))
  counts[method] = sum(a.size for a in arrays.values())
  expected = formula(method, D, HEADS * SIZE, FFN, LAYERS, m)
  assert counts[method] == expected, f'{method}: formula {expected}'
print(counts)
# %% [markdown] lang="en"
# ## Equal to moepeft, method by method
#
# The package keeps the arrays of a method in a tree, by the path of the site.
# `PATHS` says which of ours is which of its. The arrays are moved off their
# start by noise, so that nothing is zero or one, and both models see the same
# ids. A soft prompt of the package is made of *placeholders*: ids beyond the
# vocabulary, in front of the text.
# %% [markdown] lang="zh"
# ## 逐个方法与 moepeft 相等
#
# 包把一种方法的数组按 site 的路径放在一棵树里。
# `PATHS` 说明我们的哪个数组对应它的哪个。先给数组加上噪声，
# 使其中不再有 0 和 1，再让两个模型处理同样的 id。
# 包里的 soft prompt 由*占位符*组成：超出词表的 id，放在文本之前。
# %%
GROUP = {name: 'mlp' if name in ('wi', 'wo') else 'self' for name in SHAPES}
STACK = 'decoder/layers'
PATHS = {
  'ia3_k': f'{STACK}/self/k/ia3/scale',
  'ia3_v': f'{STACK}/self/v/ia3/scale',
  'ia3_act': f'{STACK}/mlp/act/ia3/scale',
  'prefix_k': f'{STACK}/self/core/prefix/k',
  'prefix_v': f'{STACK}/self/core/prefix/v',
  'prompt': 'embed/prompt/vectors',
  'p_embedding': 'embed/p_tuning/embedding',
}
for i in range(3):
  PATHS |= {
    f'p_{part}_{i}': f'embed/p_tuning/{part}_{i}' for part in ('kernel', 'bias')
  }
for sublayer in ('self', 'mlp'):
  for part in ('down', 'down_bias', 'up', 'up_bias'):
    path = f'{STACK}/around_{sublayer}/bottleneck/{part}'
    PATHS[f'{sublayer}_{part}'] = path
for name, group in GROUP.items():
  PATHS |= {
    f'lora_{name}_{x}': f'{STACK}/{group}/{name}/lora/{x}' for x in 'ab'
  }
PARAMS = {
  name: f'{STACK}/{group}/{name}/kernel' for name, group in GROUP.items()
}
PARAMS |= {
  'embed': 'embed/embedding',
  'positions': 'positions/embedding',
  'norm_self': f'{STACK}/self/norm/scale',
  'norm_mlp': f'{STACK}/mlp/norm/scale',
  'norm': 'decoder/norm/scale',
  'head': 'head/kernel',
}


def to_package(arrays, paths, template):
  """Our flat arrays as the package's tree, in its shapes."""
  flat = flax.traverse_util.flatten_dict(template, sep='/')
  tree = {paths[n]: a.reshape(flat[paths[n]].shape) for n, a in arrays.items()}
  assert tree.keys() == flat.keys(), tree.keys() ^ flat.keys()
  return flax.traverse_util.unflatten_dict(tree, sep='/')


# %%
ids = jax.random.randint(jax.random.key(1), (3, 13), 0, VOCAB)
templates, models, methods = {}, {}, {}
for method, text in TEXTS.items():
  methods[method] = build(text, sites(CONFIG))
  models[method] = Decoder(CONFIG, methods[method].adapter_map)
  templates[method] = init_params(models[method], {'inputs': ids}, 0)


def noisy(arrays, size=0.2):
  keys = jax.random.split(jax.random.key(9), len(arrays))
  return {
    name: a + size * jax.random.normal(k, a.shape)
    for (name, a), k in zip(arrays.items(), keys, strict=True)
  }


plain_logits = forward(base, {}, ids)
for method, model in models.items():
  peft = noisy(init_peft(method, base, jax.random.key(2)))
  template = templates[method]
  variables = {
    'params': to_package(base, PARAMS, template['params']),
    'peft': to_package(peft, PATHS, template['peft']),
  }
  before = jnp.arange(PROMPT) + VOCAB  # placeholders
  before = jnp.broadcast_to(before, (3, PROMPT))
  is_prompt = method in ('prompt', 'p_tuning')
  inputs = jnp.concatenate([before, ids], 1) if is_prompt else ids
  expected = jax.jit(model.apply)(variables, {'inputs': inputs})
  actual = jax.jit(forward)(base, peft, ids)
  np.testing.assert_allclose(actual, expected, atol=1e-4, err_msg=method)
  assert float(jnp.abs(actual[:, -13:] - plain_logits).max()) > 0.01, (
    f'{method} changes nothing'
  )
  assert (
    count_trained(variables['peft'], methods[method], {})[0] == (counts[method])
  )
print('logits and counts of six methods are equal')
# %% [markdown] lang="en"
# ## The task and the base
#
# As in notebook 15: the base learns to copy and to reverse six digits, named by
# a task token. The new task has a token that was never trained, reverses, and
# adds 3 to each digit modulo 10.
# %% [markdown] lang="zh"
# ## 任务与基座
#
# 与 notebook 15 相同：基座学会复制和反转六个数字，由任务 token 指明。
# 新任务的 token 从未训练过，它要反转，并给每个数字加 3 再对 10 取模。
# %%
SEPARATOR, COPY, REVERSE, NEW = 10, 11, 12, 13


def rows(key, kind, count=32, token=None):
  """(inputs [b, 13], targets [b, 6]); `token` names another task."""
  digits = jax.random.randint(key, (count, 6), 0, 10)
  flipped = digits[:, ::-1]
  targets = {COPY: digits, REVERSE: flipped, NEW: (flipped + 3) % 10}[kind]
  first = jnp.full((count, 1), kind if token is None else token)
  middle = jnp.full((count, 1), SEPARATOR)
  whole = jnp.concatenate([first, digits, middle, targets], axis=1)
  return whole[:, :-1], targets


def loss_of(logits, targets):
  return optax.softmax_cross_entropy_with_integer_labels(
    logits[:, -6:], targets
  ).mean()


def accuracy_of(logits, targets):
  return jnp.mean(jnp.argmax(logits[:, -6:], -1) == targets)


def adam(loss, start, steps, rate, key):
  """Adam with a cosine decay from `rate`, which may be traced."""
  optimizer = optax.scale_by_adam()

  def step(carry, item):
    trained, state = carry
    key, fraction = item
    grads = jax.grad(loss)(trained, key)
    updates, state = optimizer.update(grads, state)
    now = rate * 0.5 * (1 + jnp.cos(jnp.pi * fraction))
    trained = jax.tree.map(lambda a, u: a - now * u, trained, updates)
    return (trained, state), None

  items = jax.random.split(key, steps), jnp.arange(steps) / steps
  (trained, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), items)
  return trained


# %%
def pretraining_loss(base, key):
  return sum(
    loss_of(forward(base, {}, inputs), targets)
    for inputs, targets in (rows(key, kind) for kind in (COPY, REVERSE))
  )


base = jax.jit(
  lambda base: adam(pretraining_loss, base, 600, 4e-3, jax.random.key(1))
)(base)
test = rows(jax.random.key(98), NEW, 256)
for kind in (COPY, REVERSE, NEW):
  inputs, targets = rows(jax.random.key(98), kind, 256)
  accuracy = float(accuracy_of(forward(base, {}, inputs), targets))
  print(kind, f'accuracy {accuracy:.3f}')
  assert kind == NEW or accuracy > 0.9, 'the base has not learned its tasks'
# %% [markdown] lang="en"
# ## Training with a fair protocol
#
# The methods need very different rates: a change of 0.01 is much for a kernel
# and nothing for a soft prompt. One rate for all would decide the comparison.
# So for each method three rates (a guess, a third of it, three times it) are
# tried with seed 0, the best by the loss on *validation* rows is taken, and
# seeds 1 to 3 are trained with it and measured on *test* rows. `vmap` trains
# three at once in one compiled program: the arrays of rates and seeds differ,
# the program does not.
# %% [markdown] lang="zh"
# ## 用公平的流程训练
#
# 各方法需要的学习率差别很大：0.01 的改变对 kernel 来说很大，
# 对 soft prompt 来说等于没有。用同一个学习率，胜负就由学习率决定了。
# 所以每种方法用种子 0 试三个学习率（一个估计值，它的三分之一，它的三倍），
# 按*验证*数据的 loss 取最好的，再用它训练种子 1 到 3，在*测试*数据上测量。
# `vmap` 在一个编译好的程序里同时训练三个：学习率和种子的数组不同，
# 程序是同一个。
# %%
STEPS = 200
GUESS = {
  'full': 3e-3,
  'lora': 1e-2,
  'ia3': 3e-2,
  'bottleneck': 1e-2,
  'prefix': 3e-2,
  'prompt': 3e-2,
  'p_tuning': 3e-3,
}
validation = rows(jax.random.key(97), NEW, 256)


def make_trainer(method, kind=NEW, steps=STEPS):
  """(rates [3], seeds [3]) -> (arrays, validation loss, test accuracy)."""
  check, final = (
    rows(jax.random.key(i), kind, 256, token=NEW) for i in (97, 98)
  )

  def logits(trained, inputs):
    if method == 'full':
      return forward(trained, {}, inputs)
    return forward(base, trained, inputs)

  def loss(trained, key):
    inputs, targets = rows(key, kind, token=NEW)
    return loss_of(logits(trained, inputs), targets)

  def one(rate, seed):
    start_key, data_key = jax.random.split(jax.random.key(seed))
    full = method == 'full'
    start = base if full else init_peft(method, base, start_key)
    trained = adam(loss, start, steps, rate, data_key)
    return (
      trained,
      loss_of(logits(trained, check[0]), check[1]),
      accuracy_of(logits(trained, final[0]), final[1]),
    )

  return jax.jit(jax.vmap(one))


def compare(method, **options):
  """(arrays of seeds 1 to 3, their test accuracies, the rate)."""
  train = make_trainer(method, **options)
  rates = GUESS[method] * jnp.array([1 / 3, 1, 3])
  _, losses, _ = train(rates, jnp.zeros(3, int))
  rate = rates[jnp.argmin(losses)]
  arrays, _, accuracies = train(jnp.full(3, rate), jnp.array([1, 2, 3]))
  return arrays, np.asarray(accuracies), float(rate)


# %%
results = {method: compare(method) for method in GUESS}
counts['full'] = sum(a.size for a in base.values())
total = counts['full']
print('method        trained      %   accuracy (3 seeds)      rate  mergeable')
for method, (_, accuracies, rate) in results.items():
  merges = (
    'it is the base'
    if method == 'full'
    else ('yes' if is_mergeable(methods[method]) else 'no')
  )
  print(
    f'{method:11}{counts[method]:9,}{100 * counts[method] / total:7.1f}   '
    f'{accuracies.mean():.3f} ({accuracies.min():.3f} to '
    f'{accuracies.max():.3f}) {rate:8.4f}  {merges}'
  )
# %%
fig, axis = plt.subplots(figsize=(6.5, 3), dpi=72)
for method, (_, accuracies, _) in results.items():
  axis.plot([counts[method]] * 3, accuracies, 'o', ms=5, alpha=0.6)
  axis.annotate(
    method,
    (counts[method], accuracies.max()),
    (0, 5),
    textcoords='offset points',
    ha='center',
    fontsize=8,
  )
axis.axhline(0.1, color='gray', lw=0.8, ls=':')
axis.text(counts['full'], 0.11, 'guessing', fontsize=7, ha='right')
axis.set(
  xscale='log',
  ylim=(0, 1.12),
  xlabel='trained parameters',
  ylabel='accuracy of three seeds',
)
fig.tight_layout()
best = results['full'][1].mean()
assert best > 0.9, 'full fine-tuning does not learn the task: more steps'
assert results['lora'][1].mean() > 0.8, 'LoRA should come near to it'
# %% [markdown] lang="en"
# Read the table with its limits: a model of about 18,000 parameters, one task
# that the base cannot do, 200 steps, and in the run shown every method took the
# largest of its three rates, so the grid should go on upwards. It shows an
# order of capacity, not a ranking for large models. Two observations. First,
# the number of parameters does not decide alone: (IA)³ and the prompt have the
# same, LoRA and P-tuning nearly the same, and their accuracies are far apart.
# Second, the prompts and the prefix only add *inputs* to frozen
# computations. They are better at choosing among abilities that a base has than
# at adding one that it lacks (exercise 2, where the prefix does well and the
# prompt still badly); with large bases, which have many abilities, the gap
# becomes small (arXiv:2104.08691, figure 1).
#
# ## Which of them merge
#
# A change can be folded into a kernel if it is a linear function of the
# kernel's input or of its output, with coefficients that do not depend on the
# input.
#
# - LoRA: $x(W + sAB)$. Yes.
# - (IA)³: $(xW) \odot l = x\,(W \mathrm{diag}(l))$, and
#   $(\mathrm{act} \odot l)\,W_o = \mathrm{act}\,(\mathrm{diag}(l) W_o)$. Yes.
# - Bottleneck: ReLU between $P$ and $U$. No: two more products for every token.
# - Prefix and prompt: they are not weights. They cost $m$ more keys in every
#   attention, and places in the cache.
# - P-tuning: the MLP can be thrown away after training, and a prompt of $m$
#   vectors remains.
# %% [markdown] lang="zh"
# 看这张表要记住它的局限：约一万八千参数的模型，一个基座不会的任务，200 步；
# 而且在所示的运行中，每种方法都选了三个学习率中最大的，说明网格还应向上延伸。
# 它显示的是容量的次序，不是大模型上的排名。有两条规律值得思考。第一，
# 参数量不是唯一的决定因素：(IA)³ 与 prompt 的参数量相同，
# LoRA 与 P-tuning 相近，准确率却相差很大。第二，
# prompt 和 prefix 只是给冻结的计算增加*输入*。与添加基座没有的能力相比，
# 它们更善于从基座已有的能力中选择（练习 2：prefix 做得好，prompt 仍然很差）；
# 大的基座能力很多，差距就变小（arXiv:2104.08691，图 1）。
#
# ## 哪些能合并
#
# 如果改变量是 kernel 的输入或输出的线性函数，而且系数不依赖于输入，
# 就能折进这个 kernel。
#
# - LoRA：$x(W + sAB)$。能。
# - (IA)³：$(xW) \odot l = x\,(W \mathrm{diag}(l))$，
#   $(\mathrm{act} \odot l)\,W_o = \mathrm{act}\,(\mathrm{diag}(l) W_o)$。能。
# - Bottleneck：$P$ 和 $U$ 之间有 ReLU。不能：每个 token 多两次矩阵乘法。
# - Prefix 和 prompt：它们不是权重。每个 attention 多 $m$ 个 key，
#   并占用 cache 的位置。
# - P-tuning：训练后 MLP 可以扔掉，剩下 $m$ 个向量的 prompt。
# %%
p_arrays = jax.tree.map(lambda a: a[0], results['p_tuning'][0])
folded = {'prompt': prompt_vectors(p_arrays)}
np.testing.assert_array_equal(
  forward(base, folded, test[0]), forward(base, p_arrays, test[0])
)
print(
  f'P-tuning: {counts["p_tuning"]:,} parameters in training, '
  f'{folded["prompt"].size} in use'
)
expected = {m: m in ('lora', 'ia3') for m in TEXTS}
assert {m: is_mergeable(b) for m, b in methods.items()} == expected


# %% [markdown] lang="en"
# ## Attention with a prefix is an interpolation
#
# One head has keys and values of the prefix,
# $P_k, P_v \in \mathbb R^{m \times h}$, and those of $s$ tokens,
# $K, V \in \mathbb R^{s \times h}$. Let one query $q$
# have the attention logits $u \in \mathbb R^m$ for the prefix and
# $w \in \mathbb R^s$ for the tokens. The softmax over both divides by
# $Z_u + Z_w$ with $Z_u = \sum e^{u_i}$, $Z_w = \sum e^{w_j}$, so
#
# $$
# \mathrm{Attn}(q; [P_k, K], [P_v, V]) =
# \lambda\, \mathrm{softmax}(u) P_v + (1 - \lambda)\, \mathrm{softmax}(w) V,
# \qquad \lambda = \frac{Z_u}{Z_u + Z_w}
# $$
#
# (He et al., arXiv:2110.04366). So a prefix adds, to what the base computes,
# another function of the query, and scales the base's part down. Unlike LoRA it
# cannot change, in the same layer, the ratios of a query's weights for tokens.
# Exercise 3 checks the equation on the trained prefix.
#
# ## Exercises
#
# 1. (IA)³ by merging: write `merge_ia3(base, peft)`, which scales columns of
#    `k` and `v` and rows of `wo`. Show that the base with these kernels alone
#    gives the same logits, and that the package's `merge` gives the same
#    kernels.
# 2. Train `prompt`, `prefix` and `ia3` on a task that the base *has*: the
#    targets of REVERSE after the new task's token (`compare(method,
#    kind=REVERSE)`). Compare with the table above. Which of them can choose an
#    ability?
# 3. Take layer 0 of a trained prefix and one row of test inputs. Compute both
#    sides of the interpolation for head 0 and the last query, and show them
#    equal. How large is $\lambda$? (`results['prefix'][0]` has the arrays of
#    three seeds, stacked on the first axis.)
#
# ## Interview questions
#
# **Prefix tuning and prompt tuning both put vectors before the text. What is
# the difference, in parameters and in power?**
#
# <details><summary>Answer</summary>
#
# A prompt has $m d$ parameters, once, at the input. The keys and values of
# later layers at its places are computed by the frozen model, so they are
# confined to what that model can produce from some input. A prefix has
# $2 m n h$ parameters *in every layer*: it sets these keys and values freely
# and has no queries, no outputs and no feed-forward at its places. It is
# therefore more expressive, costs $2 L$ times as much storage in $L$ layers
# with $n h = d$, and needs no computation for the places themselves. P-tuning
# v2 is prefix tuning of all layers, in which reparametrization is optional.
# </details>
#
# **You add a bottleneck adapter of size 64 to each layer of a model that serves
# single requests. Latency rises by more than the share of multiplications.
# Why?**
#
# <details><summary>Answer</summary>
#
# With one token at a time, decoding is bound by reading weights and by the
# number of kernels that are launched, not by multiplications. An adapter adds
# two small products, a bias and an activation *in sequence* after each
# sublayer, which the device cannot overlap with anything. Merged LoRA and (IA)³
# add nothing. A parallel adapter can be computed beside the sublayer.
# </details>
#
# ## In the package
#
# - {{moepeft.peft.methods.ia3.Ia3}},
#   {{moepeft.peft.methods.bottleneck.Bottleneck}},
#   {{moepeft.peft.methods.prefix_tuning.Prefix}},
#   {{moepeft.peft.methods.prompt_tuning.Prompt}},
#   {{moepeft.peft.methods.p_tuning.PTuning}}: one file each. Beyond the
#   notebook: (IA)³ on inputs, parallel and scaled bottlenecks, the prefix's MLP
#   of the paper, and each of them as an expert of a mixture.
# - {{moepeft.peft.methods.p_tuning.fold}} is the step from P-tuning to a
#   prompt.
# - {{moepeft.peft.prefix.placeholder_ids}} says which ids stand before each
#   text; masks, positions and caches treat them as tokens.
# - {{moepeft.peft.merge.is_mergeable}} asks a method's entry; the reasons of
#   those that cannot are texts in the entries.
# - Papers: (IA)³ arXiv:2205.05638, bottleneck adapters arXiv:1902.00751, prefix
#   tuning arXiv:2101.00190, prompt tuning arXiv:2104.08691, P-tuning
#   arXiv:2103.10385, P-tuning v2 arXiv:2110.07602, a unified view
#   arXiv:2110.04366.
# %% [markdown] lang="zh"
# ## 带 prefix 的 attention 是插值
#
# 在一个头里，prefix 的 key 和 value 是 $P_k, P_v \in \mathbb R^{m \times h}$，
# $s$ 个 token 的是 $K, V \in \mathbb R^{s \times h}$。
# 设某个 query $q$ 对 prefix 的 attention logits 是 $u \in \mathbb R^m$，
# 对 token 的是 $w \in \mathbb R^s$。对两者一起做 softmax 时，
# 分母是 $Z_u + Z_w$，其中 $Z_u = \sum e^{u_i}$，$Z_w = \sum e^{w_j}$，所以
#
# $$
# \mathrm{Attn}(q; [P_k, K], [P_v, V]) =
# \lambda\, \mathrm{softmax}(u) P_v + (1 - \lambda)\, \mathrm{softmax}(w) V,
# \qquad \lambda = \frac{Z_u}{Z_u + Z_w}
# $$
#
# （He 等，arXiv:2110.04366）。也就是说，prefix 在基座的结果上加了 query 的另一
# 个函数，并把基座的部分缩小。与 LoRA 不同，它不能改变同一层中一个 query
# 对各个 token 的注意力权重之比。练习 3 在训练好的 prefix 上验证这个等式。
#
# ## 练习
#
# 1. 合并 (IA)³：写出 `merge_ia3(base, peft)`，缩放 `k`、`v` 的列和 `wo` 的行。
#    证明只用这些 kernel 的基座给出同样的 logits，
#    并且与包的 `merge` 得到的 kernel 相同。
# 2. 在基座*已有*的能力上训练 `prompt`、`prefix` 和 `ia3`：
#    新任务的 token 之后用 REVERSE 的目标（`compare(method, kind=REVERSE)`）。
#    与上面的表比较。哪些方法能选出已有的能力？
# 3. 取训练好的 prefix 的第 0 层和一行测试输入。
#    对第 0 个头和最后一个 query 计算插值公式的两边，证明相等。
#    $\lambda$ 有多大？（`results['prefix'][0]` 是三个种子的数组，
#    叠在第一个轴上。）
#
# ## 面试题
#
# **Prefix tuning 和 prompt tuning 都在文本前放向量。
# 在参数量和表达能力上有什么区别？**
#
# <details><summary>答案</summary>
#
# prompt 有 $m d$ 个参数，只在输入处一份。它所占位置在后面各层的 key 和 value 由
# 冻结的模型计算，所以只限于模型能从某个输入产生的那些。
# prefix 在*每一层*有 $2 m n h$ 个参数：它自由地设定这些 key 和 value，
# 而它的位置没有 query、没有输出、没有前馈。因此表达能力更强；$n h = d$ 时，
# $L$ 层的存储是 prompt 的 $2 L$ 倍，而这些位置本身不需要计算。
# P-tuning v2 就是每一层都有的 prefix tuning，重参数化是可选的。
# </details>
#
# **给一个逐个处理请求的模型每层加一个大小为 64 的 bottleneck adapter，
# 延迟的增幅超过乘法次数的占比。为什么？**
#
# <details><summary>答案</summary>
#
# 一次一个 token 时，解码受限于读取权重和启动 kernel 的次数，而不是乘法次数。
# adapter 在每个子层之后*依次*加上两个小乘积、一个偏置和一个激活，
# 设备没有别的工作可以与之重叠。合并后的 LoRA 和 (IA)³ 什么也不增加。
# 并行的 adapter 可以和子层同时计算。
# </details>
#
# ## 在 moepeft 中
#
# - {{moepeft.peft.methods.ia3.Ia3}}、
#   {{moepeft.peft.methods.bottleneck.Bottleneck}}、
#   {{moepeft.peft.methods.prefix_tuning.Prefix}}、
#   {{moepeft.peft.methods.prompt_tuning.Prompt}}、
#   {{moepeft.peft.methods.p_tuning.PTuning}}：各一个文件。
#   比本 notebook 多的有：作用在输入上的 (IA)³，并行和带缩放的 bottleneck，
#   论文里 prefix 的 MLP，以及把它们当作混合的专家。
# - {{moepeft.peft.methods.p_tuning.fold}} 就是从 P-tuning 到 prompt 的那一步。
# - {{moepeft.peft.prefix.placeholder_ids}} 给出放在每个文本之前的 id；mask、
#   位置和 cache 都把它们当作 token。
# - {{moepeft.peft.merge.is_mergeable}} 查询方法的条目；不能合并的，
#   原因写在条目里。
# - 论文：(IA)³ arXiv:2205.05638，bottleneck adapter arXiv:1902.00751，
#   prefix tuning arXiv:2101.00190，prompt tuning arXiv:2104.08691，
#   P-tuning arXiv:2103.10385，P-tuning v2 arXiv:2110.07602，
#   统一视角 arXiv:2110.04366。
# %% [markdown] lang="en" tags=["solution"]
# # Solutions: adapters, prefixes and prompts
#
# ## Exercise 1
# %% [markdown] lang="zh" tags=["solution"]
# # 解答：adapter、prefix 与 prompt
#
# ## 练习 1
# %% tags=["solution"]
def merge_ia3(base, peft):
  columns = {n: peft[f'ia3_{n}'].reshape(LAYERS, 1, -1) for n in 'kv'}
  return base | {
    'k': base['k'] * columns['k'],
    'v': base['v'] * columns['v'],
    'wo': base['wo'] * peft['ia3_act'][:, :, None],
  }


ia3_arrays = jax.tree.map(lambda a: a[0], results['ia3'][0])
merged_base = merge_ia3(base, ia3_arrays)
inside = forward(merged_base, {}, test[0])
beside = forward(base, ia3_arrays, test[0])
np.testing.assert_allclose(inside, beside, atol=1e-3)
assert float(jnp.abs(beside - forward(base, {}, test[0])).max()) > 0.1
ia3_variables = {
  'params': to_package(base, PARAMS, templates['ia3']['params']),
  'peft': to_package(ia3_arrays, PATHS, templates['ia3']['peft']),
}
package_merged = merge(methods['ia3'], ia3_variables)
ours = to_package(merged_base, PARAMS, templates['ia3']['params'])
jax.tree.map(
  lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, package_merged
)
print('merged, beside and the package agree')
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 2
#
# The base can reverse; it only does not know that token 13 asks for it.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 2
#
# 基座会反转，只是不知道 token 13 要求它这样做。
# %% tags=["solution"]
for method in ('prompt', 'prefix', 'ia3'):
  _, accuracies, _ = compare(method, kind=REVERSE)
  new = results[method][1].mean()
  print(f'{method:8} has it: {accuracies.mean():.3f}, lacks it: {new:.3f}')
  assert accuracies.mean() > new, 'choosing an ability should be easier'
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 3
#
# $\lambda$ belongs to one query and one head. In the run shown it is small:
# this query hardly reads the prefix.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 3
#
# $\lambda$ 属于某一个 query 和某一个头。在所示的运行中它很小：
# 这个 query 几乎不读取 prefix。
# %% tags=["solution"]
prefix = jax.tree.map(lambda a: a[0], results['prefix'][0])
x = base['embed'][test[0][:1]] + base['positions'][:13]
y = rms_norm(x, base['norm_self'][0])[0]
q, k, v = ((y @ base[n][0]).reshape(13, HEADS, SIZE)[:, 0] for n in 'qkv')
u = prefix['prefix_k'][0, :, 0] @ q[-1] * SIZE**-0.5
w = k @ q[-1] * SIZE**-0.5
whole = jax.nn.softmax(jnp.concatenate([u, w])) @ jnp.concatenate(
  [prefix['prefix_v'][0, :, 0], v]
)
share = jnp.exp(u).sum() / (jnp.exp(u).sum() + jnp.exp(w).sum())
mixed = share * jax.nn.softmax(u) @ prefix['prefix_v'][0, :, 0]
mixed += (1 - share) * jax.nn.softmax(w) @ v
np.testing.assert_allclose(whole, mixed, atol=1e-5)
assert 0 < share < 1
print(f'lambda = {share:.3f}')

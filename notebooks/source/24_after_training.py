# SPDX-License-Identifier: Apache-2.0
# %% [markdown] lang="en"
# # After training: forgetting, quantization, export, serving
#
# A fine-tuned model is not finished when the loss is low. What has it lost? How
# small can it be made? Does the file that is handed on compute the same
# function? How fast is the first token, and how many follow per second? This
# notebook answers the four questions with measurements on the tiny T5 that
# ships with moepeft: it is fine-tuned once fully and once with LoRA, quantized
# by hand, exported in three formats that are loaded again and compared, and
# served.
# %% [markdown] lang="zh"
# # 训练之后：遗忘、量化、导出、部署
#
# 损失降下来，微调并没有结束。模型丢掉了什么？能压到多小？
# 交付出去的文件计算的是同一个函数吗？第一个 token 多快，之后每秒多少个？本
# notebook 用随 moepeft 发布的小 T5 做实测来回答这四个问题：一次全量微调，一次
# LoRA，手写量化，导出成三种格式并重新加载比较，最后部署。
# %% [markdown] lang="en"
# ## What you will understand
#
# - Catastrophic forgetting, measured: full fine-tuning and LoRA on a new task,
#   and what is left of the old ones.
# - int8 by hand: scales, rounding, the bound of the error, and what NF4 does
#   with half the bits.
# - What an adapter file contains, how it is merged, and why "reload equals
#   trained" is a test.
# - Time to first token and tokens per second: what they depend on, and how to
#   measure them.
#
# About 60 minutes. Before it: notebooks 11 (generation), 15 (LoRA) and 21
# (SFT).
# %% [markdown] lang="zh"
# ## 你将理解什么
#
# - 灾难性遗忘的实测：在新任务上做全量微调和 LoRA，旧任务还剩多少。
# - 手写 int8：缩放因子、舍入、误差上界，以及 NF4 用一半的比特做到什么。
# - adapter 文件里有什么，怎样合并，为什么“重新加载等于训练结果”是一个测试。
# - 首 token 时间（TTFT）和每秒 token 数：取决于什么，怎样测量。
#
# 大约 60 分钟。之前请先学习 notebook 11（生成）、15（LoRA）和 21（SFT）。
# %%
import contextlib
import io
import json
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import pyplot as plt
from safetensors.numpy import load_file

import moepeft
from moepeft import config as config_lib
from moepeft import convert, tasks
from moepeft.checkpoints import adapter as adapter_file
from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints import quantize
from moepeft.data.batching import seq2seq
from moepeft.data.tokenizers.tokenizer import ByteTokenizer
from moepeft.inference.adapters.fixed import FixedAdapter
from moepeft.inference.api import Finished, Request, Token
from moepeft.inference.engine.engine import Engine
from moepeft.inference.engine.limits import EngineConfig
from moepeft.models import weight_mapping
from moepeft.nn import quantization
from moepeft.objectives.cross_entropy import (
  mean_loss,
  sequence_log_likelihood,
)
from moepeft.objectives.seq2seq import SEQ2SEQ

# %% [markdown] lang="en"
# ## 1. Two tasks, two methods
#
# The base `package:t5_tiny` reads bytes and was pretrained on generated tasks,
# among them `opinion` (is a word good or bad?) and `kind` (what is a guitar?).
# The new task `stars` asks for the same judgement under new labels: `five` or
# `one`. Answers are ranked: the choice with the highest log-likelihood counts,
# so guessing is right in 50 % of `stars` and `opinion` and in 25 % of `kind`.
# %% [markdown] lang="zh"
# ## 1. 两类任务，两种方法
#
# 基座 `package:t5_tiny` 以字节为输入，在生成的任务上预训练过，其中有
# `opinion`（这个词是褒是贬？）和 `kind`（guitar 是哪一类东西？）。新任务
# `stars` 要求同样的判断，但用新的标签：`five` 或 `one`。评测方式是排序：
# 对数似然最高的选项为答案，所以随机猜测在 `stars` 和 `opinion` 上的正确率是
# 50%，在 `kind` 上是 25%。
# %%
tokenizer = ByteTokenizer()
config = config_lib.default()
config.model.path = 'package:t5_tiny'
config.model.dropout = 0.0
base = base_lib.load(config.model)
INPUTS, TARGETS = 52, 14


def make_batch(pairs):
  """The arrays of (inputs, targets) texts."""
  x, y = zip(*pairs, strict=True)
  encode = seq2seq.encode_truncated
  return seq2seq.pad_pairs(
    [encode(tokenizer, text, INPUTS)[0] for text in x],
    [encode(tokenizer, text, TARGETS)[0] for text in y],
    INPUTS,
    TARGETS,
  )


TEST = {
  name: tasks.examples((name,), 40, seed=1, split='held_out')
  for name in ('stars', 'opinion', 'kind')
}
for name, examples in TEST.items():
  print(f'{name:8} {examples[0].inputs!r} {examples[0].choices}')


# %%
def build(method):
  """(module, collection to train, variables) of the base with a method."""
  chosen = config.copy_and_resolve_references()
  chosen.method = method
  model, built = base_lib.module(base, chosen)
  variables = base_lib.initialise(base, model, seed=0)
  return model, built, jax.tree.map(jnp.asarray, variables)


def make_scorer(model):
  """A function (variables, pairs) -> log p of the targets [b]."""

  @jax.jit
  def score(variables, batch):
    logits = model.apply(variables, batch)
    return sequence_log_likelihood(
      logits, batch['targets'], batch['targets_mask']
    )

  return lambda variables, pairs: np.asarray(
    score(variables, make_batch(pairs))
  )


# All choices of all tasks in one batch, so that one program is compiled.
CHOICES = [
  (example, choice)
  for examples in TEST.values()
  for example in examples
  for choice in example.choices
]
PAIRS = [(example.inputs, choice) for example, choice in CHOICES]
IS_RIGHT = np.array([choice == example.targets for example, choice in CHOICES])


def accuracies(values):
  """The accuracy on each task, from log p of all choices."""
  shares, start = [], 0
  for examples in TEST.values():
    k = len(examples[0].choices)
    stop = start + k * len(examples)
    best = values[start:stop].reshape(-1, k).argmax(axis=1)
    right = IS_RIGHT[start:stop].reshape(-1, k).argmax(axis=1)
    shares.append(float(np.mean(best == right)))
    start = stop
  return shares


METHODS = {'full': ('full', 1e-3), 'LoRA': ('lora(rank=4)', 5e-3)}
STEPS, EVERY = 45, 15
histories, models, trained = {}, {}, {}


def train(name):
  method, rate = METHODS[name]
  model, built, variables = build(method)
  score, objective = make_scorer(model), SEQ2SEQ.build()
  optimizer = optax.adamw(rate)
  part = variables[built.trainable]
  opt, history = optimizer.init(part), []

  @jax.jit
  def step(part, opt, batch):
    def loss(part):
      changed = variables | {built.trainable: part}
      return mean_loss(*objective(model.apply, changed, batch, None))

    updates, opt = optimizer.update(jax.grad(loss)(part), opt, part)
    return optax.apply_updates(part, updates), opt

  for i in range(STEPS + 1):
    if i % EVERY == 0:
      now = variables | {built.trainable: part}
      history.append(accuracies(score(now, PAIRS)))
    examples = tasks.examples(('stars',), 16, seed=0, start=16 * i)
    batch = make_batch([(e.inputs, e.targets) for e in examples])
    if i < STEPS:
      part, opt = step(part, opt, batch)
  histories[name] = np.array(history)
  models[name] = model, built, score
  trained[name] = variables | {built.trainable: part}
  size = sum(leaf.size for leaf in jax.tree.leaves(part))
  print(f'{name}: {size:,} trained parameters')


for name in METHODS:
  train(name)
  first_and_last = histories[name][[0, -1]]
  for row, values in zip(('before', 'after'), first_and_last, strict=True):
    text = '  '.join(
      f'{task} {value:4.0%}' for task, value in zip(TEST, values, strict=True)
    )
    print(f'{name:5} {row:7} {text}')

# %%
figure, axes = plt.subplots(1, 2, figsize=(7, 2.3), sharey=True)
for (name, history), ax in zip(histories.items(), axes, strict=True):
  for task, values in zip(TEST, history.T, strict=True):
    ax.plot(EVERY * np.arange(len(values)), values, 'o-', ms=3, label=task)
  ax.set_title(f'{name}, trained on stars', fontsize=8)
  ax.set(xlabel='step', ylim=(0, 1.05))
axes[0].set_ylabel('accuracy')
axes[0].legend(fontsize=7)
plt.tight_layout()
plt.show()
for name, history in histories.items():
  assert history[-1, 0] > history[0, 0] + 0.2, f'{name} has not learned stars'
  lost = history[0, 1:] - history[-1, 1:]
  assert lost.max() > 0.2, f'{name} has forgotten nothing'


# %% [markdown] lang="en"
# Both methods have learned the new labels, and both have lost much of what they
# could do before. Nothing in the loss asks to keep the old tasks. `opinion` is
# the same skill with other words; `kind` is another skill altogether and
# suffers too, because the decoder has learned to write one of two words
# whatever it is asked (section 4 shows answers). All other words have become
# very improbable, `good` and `bad` as well, and nothing preserves their order:
# `opinion` can fall below the 50 % of guessing.
#
# It is often said that LoRA forgets less (Biderman et al., arXiv:2405.09673,
# find so at equal settings of a large model). Compare the two pictures: here,
# with the rates above, LoRA forgets more. Few trained parameters do not
# protect; a low-rank change at every layer can redirect all outputs, and LoRA
# is usually trained with a higher rate. What decides is how far the *function*
# has moved. One difference is not a matter of degree, though: LoRA's base is
# *unchanged*. Without the adapter it is the old model, bit by bit; after full
# fine-tuning the old model exists only if somebody kept the file.
# %% [markdown] lang="zh"
# 两种方法都学会了新标签，也都丢掉了许多原有的能力。
# 损失里没有任何东西要求保住旧任务。`opinion` 是同一种能力、不同的词；`kind`
# 是完全不同的能力，却也受损，因为 decoder 学会了无论问什么都写那两个词之一（第
# 4 节有例子）。其他词的概率都变得很小，包括 `good` 和 `bad`，
# 而没有什么保证它们之间的次序，所以 `opinion` 可能低于随机猜测的 50%。
#
# 常有人说 LoRA 遗忘更少（Biderman et al.，arXiv:2405.09673，
# 在大模型的相同设置下如此）。请比较两幅图：在这里，用上面的学习率，LoRA
# 反而忘得更多。可训练参数少并不等于受保护；每一层的低秩改动足以改变所有输出，
# 而且 LoRA 通常用更高的学习率。起决定作用的是**函数**改变了多少。
# 但有一点不是程度问题：LoRA 的基座**没有改变**。拿掉 adapter，
# 得到的就是逐比特相同的旧模型；全量微调之后，只有保存过旧文件的人才有旧模型。
# %%
def largest_change(tree, reference):
  pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(reference), strict=True)
  return max(float(np.abs(np.asarray(a) - b).max()) for a, b in pairs)


changes = {
  name: largest_change(variables['params'], base.params)
  for name, variables in trained.items()
}
print('largest change of a base weight:', changes)
assert changes['LoRA'] == 0 and changes['full'] > 0

# %% [markdown] lang="en"
# ### Replay
#
# The usual remedy is to mix in old data. It costs steps on the new task, and
# one needs old data, or texts that the old model writes itself. Exercise 2
# measures it.
#
# ## 2. Quantization
#
# Weights are stored as float32 here. *Symmetric int8* stores a kernel $W$
# `[in, out]` as integers and one scale per output:
#
# $$ s_o = \frac{\max_i |W_{io}|}{127}, \qquad Q_{io} = \mathrm{round}(W_{io} /
# s_o), \qquad \hat W_{io} = s_o Q_{io}, \qquad |\hat W_{io} - W_{io}| \le
# \frac{s_o}{2} . $$
#
# One scale per output, because outputs differ in size: with one scale for the
# whole matrix, its largest entry would determine the error of all.
# %% [markdown] lang="zh"
# ### Replay（回放）
#
# 常用的补救是混入旧数据。代价是新任务的步数减少，而且需要有旧数据，
# 或者让旧模型自己写出来的文本。练习 2 会测量它。
#
# ## 2. 量化
#
# 这里的权重以 float32 存储。**对称 int8** 把一个 kernel $W$ `[in, out]`
# 存成整数，每个输出一个缩放因子：
#
# $$ s_o = \frac{\max_i |W_{io}|}{127}, \qquad Q_{io} = \mathrm{round}(W_{io} /
# s_o), \qquad \hat W_{io} = s_o Q_{io}, \qquad |\hat W_{io} - W_{io}| \le
# \frac{s_o}{2} . $$
#
# 每个输出一个缩放因子，是因为各输出的大小不同：如果整个矩阵只用一个，
# 最大的那个元素会决定所有元素的误差。
# %%
flat = weight_mapping.flatten(base.params)
path = next(p for p in flat if p.endswith('encoder/layers/mlp/wo/kernel'))
kernel = np.asarray(flat[path], np.float32)[0]


def to_int8(kernel):
  scale = np.abs(kernel).max(axis=0) / np.float32(127)
  return np.rint(kernel / scale).astype(np.int8), scale


codes, scale = to_int8(kernel)
their_codes, their_scale = quantization.to_int8(kernel, inputs=1)
np.testing.assert_array_equal(codes, their_codes)
np.testing.assert_array_equal(scale, their_scale)
error = np.abs(codes * scale - kernel)
assert np.all(error <= scale / 2 * 1.001), 'rounding is off by more than half'
one_scale = np.abs(kernel).max() / 127
rough = np.abs(np.rint(kernel / one_scale) * one_scale - kernel)
nf4 = quantization.from_nf4(*quantization.to_nf4(kernel, 1), kernel.shape)
nf4_error = np.abs(np.asarray(nf4) - kernel)
for name, values in (
  ('int8, a scale per output', error),
  ('int8, one scale', rough),
  ('nf4', nf4_error),
):
  print(f'{name:24} mean error {values.mean() / kernel.std():.2%} of std')
assert error.mean() < rough.mean() < nf4_error.mean()

# %% [markdown] lang="en"
# NF4 (QLoRA, arXiv:2305.14314) has 4 bits: 16 levels at quantiles of a normal
# distribution, scaled by the absolute maximum of 64 consecutive inputs. Its
# error per weight is much larger than that of int8. What matters is the model's
# output, so the whole base is quantized, the LoRA adapter stays float32, and
# the outputs are compared. In moepeft a quantized kernel is two arrays in place
# of one; the module reads the names and dequantizes. Embeddings and head stay
# as they are, which in a tiny model is a large part of the bytes. (The column
# `nll` is the mean over the right answers of all three tasks. It is large
# because the answers of the forgotten tasks are among them.)
# %% [markdown] lang="zh"
# NF4（QLoRA，arXiv:2305.14314）用 4 比特：16 个取值位于正态分布的分位点，按 64
# 个连续输入的最大绝对值缩放。它对单个权重的误差比 int8 大得多。
# 但重要的是模型的输出，所以我们量化整个基座，LoRA adapter 保持
# float32，再比较输出。在 moepeft 里，量化的 kernel
# 是两个数组而不是一个；模块根据名字识别并反量化。embedding 和 head 保持原样，
# 在小模型里它们占字节数的很大一部分。（`nll`
# 一列是三个任务全部正确答案的平均值；它很大，
# 因为其中有被遗忘的任务的答案。）
# %%
model, built, score = models['LoRA']
rows = {}
for kind in ('float32', 'int8', 'nf4'):
  params = base.params
  if kind != 'float32':
    params = quantize.pack(base.params, base.config, kind)
  quantized = trained['LoRA'] | {'params': jax.tree.map(jnp.asarray, params)}
  log_likelihoods = score(quantized, PAIRS)
  rows[kind] = (
    quantize.size(params),
    -log_likelihoods[IS_RIGHT].mean(),
    accuracies(log_likelihoods)[0],
    log_likelihoods,
  )
  size, nll, share, _ = rows[kind]
  print(f'{kind:8} {size / 1e6:.2f} MB, nll {nll:.3f}, stars {share:.0%}')
shifts = {k: np.abs(rows[k][3] - rows['float32'][3]).mean() for k in rows}
print('mean change of log p, nats:', {k: f'{v:.4f}' for k, v in shifts.items()})
assert 0 < shifts['int8'] < shifts['nf4'], 'more bits, less change'
assert rows['nf4'][0] < rows['int8'][0] < rows['float32'][0]

# %% [markdown] lang="en"
# ## 3. Export, and reload = trained
#
# Three files can be handed on:
#
# 1. **The adapter** in moepeft's format: the `'peft'` tree, the method string,
#    the base's hash, checksums. It needs the base and moepeft.
# 2. **The adapter in `peft`'s format**: `adapter_config.json` and the matrices
#    `lora_A` `[r, in]`, `lora_B` `[out, r]` by module name. Programs of the
#    Hugging Face ecosystem read it.
# 3. **A merged model** in Hugging Face's form: $W + \frac{\alpha}{r} A B$ is
#    computed once, and the result is an ordinary model without an adapter. A
#    GGUF file for llama.cpp is made from such a directory by llama.cpp's
#    `convert_hf_to_gguf`; moepeft reads GGUF and does not write it.
#
# A mixture with a router cannot be merged, as its weights differ for each
# token. LoRA can.
# %% [markdown] lang="zh"
# ## 3. 导出，以及“重新加载 = 训练结果”
#
# 可以交付三种文件：
#
# 1. moepeft 格式的 **adapter**：`'peft'` 树、方法字符串、基座的哈希、校验和。
#    使用它需要基座和 moepeft。
# 2. **`peft` 格式的 adapter**：`adapter_config.json`，以及按模块名存放的矩阵
#    `lora_A` `[r, in]`、`lora_B` `[out, r]`。Hugging Face 生态的程序可以读取。
# 3. Hugging Face 形式的**合并模型**：$W + \frac{\alpha}{r} A B$ 只算一次，
#    结果是不带 adapter 的普通模型。llama.cpp 用的 GGUF 文件由 llama.cpp 的
#    `convert_hf_to_gguf` 从这样的目录生成；moepeft 读取 GGUF，但不写。
#
# 带路由的专家混合无法合并，因为每个 token 的权重不同。LoRA 可以。
# %%
folder = pathlib.Path(tempfile.mkdtemp())
metadata = adapter_file.describe(
  built.method,
  built.semantics,
  'package:t5_tiny',
  base.sha256,
  't5',
  base.config,
)
adapter_file.save(str(folder / 'moepeft'), trained['LoRA']['peft'], metadata)


def run_convert(target):
  arguments = [f'--input={folder}/moepeft', f'--output={folder / target}']
  log = io.StringIO()
  with contextlib.redirect_stdout(log):
    status = convert.main(
      ['convert', *arguments, f'--to={target}', '--dtype=float32']
      if target == 'hf'
      else ['convert', *arguments, f'--to={target}']
    )
  assert status == 0, log.getvalue()


for target in ('peft', 'hf'):
  run_convert(target)
for file in sorted(folder.rglob('*')):
  if file.is_file():
    print(f'{file.relative_to(folder)}: {file.stat().st_size:,} bytes')

# %% [markdown] lang="en"
# First the arithmetic of the merge by hand, from the files alone: take a module
# of the `peft` file, add $\frac{\alpha}{r} B A$ to the base's weight, and
# compare with the merged file. (`peft` stores matrices transposed,
# `[out, in]`.)
# %% [markdown] lang="zh"
# 先只用文件手算合并：取 `peft` 文件里的一个模块，把 $\frac{\alpha}{r} B A$
# 加到基座的权重上，再与合并后的文件比较。（`peft` 以转置形式存储矩阵，
# `[out, in]`。）
# %%
peft_arrays = load_file(next((folder / 'peft').glob('*.safetensors')))
merged_arrays = load_file(next((folder / 'hf').glob('*.safetensors')))
base_arrays = load_file(next(pathlib.Path(base.folder).glob('*.safetensors')))
peft_config = json.loads((folder / 'peft/adapter_config.json').read_text())
factor = peft_config['lora_alpha'] / peft_config['r']
names = [n for n in peft_arrays if n.endswith('lora_A.weight')]
print(f'{len(names)} modules, alpha / r = {factor}, such as {names[0]}')
largest = 0.0
for name in names:
  a = peft_arrays[name]
  b = peft_arrays[name.replace('lora_A', 'lora_B')]
  module = name.removeprefix('base_model.model.').replace('lora_A.', '')
  by_hand = base_arrays[module].astype(np.float32) + factor * b @ a
  np.testing.assert_allclose(by_hand, merged_arrays[module], atol=1e-5)
  largest = max(largest, float(np.abs(factor * b @ a).max()))
print(f'largest change of a weight: {largest:.3f}')
assert largest > 1e-2, 'an adapter that changes nothing tests nothing'

# %% [markdown] lang="en"
# Now the function: the log-probabilities of the trained model in memory against
# those of each file, loaded from the file alone, as its receiver would. Equal
# files are not the claim, equal *outputs* are.
# %% [markdown] lang="zh"
# 再看函数：每个文件都只凭文件本身重新加载，
# 再把对数概率与内存中训练好的模型比较。要求的不是文件相等，而是**输出**相等。
# %%
in_memory = score(trained['LoRA'], PAIRS)
without_adapter = make_scorer(build('full')[0])
of_base = without_adapter({'params': base.params}, PAIRS)


def reload(target):
  if target == 'hf':
    again = config.copy_and_resolve_references()
    again.model.path = str(folder / 'hf')
    params = base_lib.load(again.model).params
    return without_adapter({'params': params}, PAIRS)
  loaded = moepeft.load('package:t5_tiny', str(folder / target)).loaded
  return make_scorer(loaded.model)(loaded.variables, PAIRS)


for target in ('moepeft', 'peft', 'hf'):
  difference = np.abs(reload(target) - in_memory).max()
  print(f'{target:8} largest difference of log p {difference:.1e}')
  # float32 sums in another order, over some ten tokens.
  assert difference < 1e-2, f'{target} computes another function'
print(f'without adapter: {np.abs(of_base - in_memory).max():.1f}')
assert np.abs(of_base - in_memory).max() > 1, 'the test could not fail'

# %% [markdown] lang="en"
# ## 4. Serving: time to first token and tokens per second
#
# A server does two different things. *Prefill* reads the prompt at once, one
# large matrix product, and ends with the first token. *Decode* adds one token
# at a time and reads all weights for each. The **time to first token** (TTFT)
# is waiting plus prefill and grows with the prompt; the **tokens per second**
# of a request are 1 over the time of a decode step. A step for 8 requests takes
# less than 8 steps for one, as the weights are read once, so the throughput of
# all requests rises with the batch while each single one gets slower.
#
# The engine is the one behind `python -m moepeft.serve`. We time its events by
# hand. Two rules: run everything once before the clock starts, as the first
# call compiles; and report the median of several runs.
# %% [markdown] lang="zh"
# ## 4. 部署：首 token 时间与每秒 token 数
#
# 服务器做两件不同的事。**Prefill** 一次读完 prompt，是大矩阵乘法，
# 最后给出第一个 token。**Decode** 每次加一个 token，每次都要读取全部权重。**首
# token 时间**（TTFT）等于排队加 prefill，随 prompt 变长；单个请求的**每秒 token
# 数**是一个 decode 步时间的倒数。8 个请求一起走一步，比单独走 8 步省时，
# 因为权重只读一次；所以 batch 越大总吞吐越高，而单个请求变慢。
#
# 这里的引擎就是 `python -m moepeft.serve` 背后的那个。我们手工给它的事件计时。
# 两条规则：开始计时之前先全部跑一遍，因为第一次调用要编译；
# 报告多次运行的中位数。
# %%
lora_model, _, _ = models['LoRA']
engine = Engine(
  lora_model,
  trained['LoRA']['params'],
  FixedAdapter(lora_model, trained['LoRA']['peft']),
  EngineConfig(
    slots=8, max_model_len=64, batch_sizes=(1, 8), compile_ahead=False
  ),
)
PROMPTS = [e.inputs for e in TEST['kind'][:8]]
NEW_TOKENS = 12


def serve(prompts):
  """Seconds of (first token, last token) per request, and the answers."""
  requests = [
    # Without end tokens, so that every answer has the same length.
    Request(str(i), tuple([*tokenizer.encode(p), 1]), NEW_TOKENS)
    for i, p in enumerate(prompts)
  ]
  start, first, last = time.perf_counter(), {}, {}
  answers = {request.id: [] for request in requests}
  for request, event in engine.stream(requests):
    seconds = time.perf_counter() - start
    if isinstance(event, Token):
      first.setdefault(request.id, seconds)
      answers[request.id].append(event.token.id)
    elif isinstance(event, Finished):
      last[request.id] = seconds
  times = np.array([[first[r.id], last[r.id]] for r in requests])
  return times, [answers[r.id] for r in requests]


speeds = {}
for count in (1, 8):
  serve(PROMPTS[:count])
  runs = [serve(PROMPTS[:count])[0] for _ in range(5)]
  ttft = np.median([run[:, 0] for run in runs])
  each = np.median([(NEW_TOKENS - 1) / (r[:, 1] - r[:, 0]) for r in runs])
  total = np.median([count * NEW_TOKENS / run[:, 1].max() for run in runs])
  speeds[count] = ttft, each, total
  print(
    f'{count} at once: first token {1e3 * ttft:.1f} ms, '
    f'{each:.0f} tokens/s each, {total:.0f} tokens/s in all'
  )


# %% [markdown] lang="en"
# The numbers depend on your machine and on what else it does, so nothing is
# asserted about them. The model is so small that a step spends most of its time
# on other things than reading weights, so a request among 8 is hardly slower
# than a single one here. The first token of 8 requests includes waiting for the
# prefill of the others. What can be asserted is that the engine, with its
# cache, batches and padding, gives the tokens of the model: greedy decoding by
# hand, where the whole answer is computed anew for every token, is slow and has
# to agree.
# %% [markdown] lang="zh"
# 这些数字取决于你的机器和它正在做的其他事，所以不对它们做断言。模型太小，
# 一步的时间大多不花在读取权重上，所以在这里，
# 8 个请求中的单个请求几乎不比单独一个请求慢。8 个请求的首 token
# 时间包含等待其他请求的 prefill。可以断言的是：
# 带缓存、batch 和 padding 的引擎给出的正是模型的 token。手写的贪心解码对每个
# token 都重新计算整个回答，很慢，但结果必须一致。
# %%
@jax.jit
def all_logits(variables, batch):
  return lora_model.apply(variables, batch)


def greedy_by_hand(prompts):
  batch = make_batch([(p, '') for p in prompts])
  ids = np.zeros((len(prompts), TARGETS), np.int32)
  for t in range(NEW_TOKENS):
    # The decoder reads the padding id, then its own tokens.
    shifted = np.pad(ids[:, :-1], ((0, 0), (1, 0)))
    changed = batch | {'decoder_inputs': shifted, 'targets_mask': ids >= 0}
    logits = all_logits(trained['LoRA'], changed)
    ids[:, t] = np.argmax(logits[:, t], axis=-1)
  return ids[:, :NEW_TOKENS].tolist()


_, answers = serve(PROMPTS)
by_hand = greedy_by_hand(PROMPTS)
ends = [row.index(1) + 1 if 1 in row else NEW_TOKENS for row in by_hand]
for prompt, mine, theirs, end in zip(
  PROMPTS, by_hand, answers, ends, strict=True
):
  assert mine[:end] == theirs[:end], f'{prompt}: {mine} and {theirs}'
for prompt, answer, end in zip(PROMPTS, answers, ends, strict=True):
  print(f'{prompt!r} -> {tokenizer.decode(answer[:end])!r}')
texts = [tokenizer.decode(a[:e]) for a, e in zip(answers, ends, strict=True)]
assert sum(text in ('five', 'one') for text in texts) > len(texts) / 2

# %%
figure, axes = plt.subplots(1, 2, figsize=(6, 2))
axes[0].bar([str(c) for c in speeds], [1e3 * s[0] for s in speeds.values()])
axes[0].set(xlabel='requests at once', ylabel='first token, ms')
axes[1].bar([str(c) for c in speeds], [s[2] for s in speeds.values()])
axes[1].set(xlabel='requests at once', ylabel='tokens/s in all')
plt.tight_layout()
plt.show()


# %% [markdown] lang="en"
# ## Exercises
#
# 1. *Easy.* A model has 7 billion parameters in bfloat16. A decode step reads
#    every weight once. What is the largest number of tokens per second of a
#    single request on a machine that reads 50 GB/s, and on one that reads 1
#    TB/s? And with int8? Why does a batch not change the bound per step?
# 2. *Medium.* Replay: train LoRA with half of each batch from `opinion`
#    (`tasks.examples` alternates between the tasks that it is given). Show what
#    it does to both tasks.
# 3. *Hard.* int4 by hand: symmetric, 15 levels from -7 to 7, one scale for each
#    output and each block of 64 inputs. Compare its error with NF4's on
#    `kernel`, where both have 4 bits and the same blocks, and explain the
#    difference.
# %% [markdown] lang="zh"
# ## 练习
#
# 1. *容易。* 一个 70 亿参数的 bfloat16 模型，每个 decode 步读取所有权重一次。
#    在读取速度为 50 GB/s 和 1 TB/s 的机器上，单个请求每秒最多多少 token？用
#    int8 呢？为什么 batch 不改变每步的这个上界？
# 2. *中等。* 回放：训练 LoRA 时每个 batch 有一半来自
#    `opinion`（`tasks.examples` 会交替给出多个任务的样本）。
#    展示它对两个任务的影响。
# 3. *困难。* 手写 int4：对称，-7 到 7 共 15 个取值，每个输出每 64
#    个输入为一块，各用一个缩放因子。在 `kernel` 上与 NF4 比较误差（两者都是 4
#    比特、分块相同），并解释差异。
# %% [markdown] lang="en"
# ## Interview questions
#
# **You fine-tuned on customer data, and the model no longer follows
# instructions that it followed before. What are your options?**
#
# <details><summary>Answer</summary>
#
# First measure: a fixed set of old tasks, evaluated at every checkpoint beside
# the new one. Options, from cheap to expensive: fewer steps or a lower rate,
# and the checkpoint at which both are acceptable; an adapter in place of full
# fine-tuning, which can be switched off per request; replay of old data or of
# answers that the old model generates; a KL penalty towards the old model;
# averaging old and new weights. For forgetting that comes from the format (the
# model answers every question in the new style), data that keep both formats
# apart help more than any method.
#
# </details>
#
# **Someone reports "our server does 2,000 tokens per second". What do you
# ask?**
#
# <details><summary>Answer</summary>
#
# Per request or in all, at which batch or number of clients, with which prompt
# and answer lengths; prompt tokens counted or not; median or mean, and the 95th
# percentile; TTFT at the same load, as throughput can be raised at its expense;
# with or without prefix cache, speculative decoding and quantization, and at
# which quality; warm or cold. A throughput without the latency at a stated load
# says little.
#
# </details>
# %% [markdown] lang="zh"
# ## 面试题
#
# **你在客户数据上微调，模型不再听从以前会听从的指令。有哪些办法？**
#
# <details><summary>答案</summary>
#
# 先测量：固定一组旧任务，在每个 checkpoint 与新任务一起评测。办法从便宜到昂贵：
# 减少步数或降低学习率，选两者都可接受的 checkpoint；用 adapter 代替全量微调，
# 可以按请求关闭；回放旧数据，或旧模型生成的回答；对旧模型加 KL 惩罚；
# 新旧权重取平均。如果遗忘来自格式（模型用新风格回答所有问题），
# 那么能区分两种格式的数据比任何方法都有用。
#
# </details>
#
# **有人说“我们的服务器每秒 2000 个 token”。你会问什么？**
#
# <details><summary>答案</summary>
#
# 是单个请求还是总和，batch 或并发数多少，prompt 和回答多长；算不算 prompt 的
# token；中位数还是均值，95 分位是多少；同样负载下的 TTFT，
# 因为牺牲它可以换吞吐；有没有 prefix cache、speculative decoding 和量化，
# 质量如何；热启动还是冷启动。不说明负载下的延迟，吞吐就不是一个有意义的数字。
#
# </details>
# %% [markdown] lang="en"
# ## In the package
#
# - Quantization: {{moepeft.checkpoints.quantize.pack}},
#   {{moepeft.nn.quantization.to_nf4}}; `--config.model.quantize=nf4` trains
#   adapters over a quantized base.
# - Merging: {{moepeft.peft.merge.merge}}; {{moepeft.library.Model.merge}} in
#   memory.
# - Formats: {{moepeft.convert.convert}}, {{moepeft.checkpoints.adapter.save}}
#   with checksums and the base's hash, {{moepeft.checkpoints.hf.peft.save}},
#   {{moepeft.checkpoints.hf.model.save}}; GGUF is read by
#   {{moepeft.checkpoints.gguf.model}}.
# - Serving: {{moepeft.inference.engine.engine.Engine.stream}}; the HTTP server
#   {{moepeft.serve.http.app}} adds OpenAI's API, keys and metrics. It batches
#   requests for different adapters of one base,
#   {{moepeft.inference.adapters.pool}}.
#
# Papers: forgetting with LoRA (arXiv:2405.09673), LoRA (arXiv:2106.09685),
# QLoRA and NF4 (arXiv:2305.14314), LLM.int8 (arXiv:2208.07339), continuous
# batching with paged caches (arXiv:2309.06180).
# %% [markdown] lang="zh"
# ## 在 moepeft 中
#
# - 量化：{{moepeft.checkpoints.quantize.pack}}、
#   {{moepeft.nn.quantization.to_nf4}}；`--config.model.quantize=nf4`
#   在量化的基座上训练 adapter。
# - 合并：{{moepeft.peft.merge.merge}}；内存中的
#   {{moepeft.library.Model.merge}}。
# - 格式：{{moepeft.convert.convert}}，带校验和与基座哈希的
#   {{moepeft.checkpoints.adapter.save}}，{{moepeft.checkpoints.hf.peft.save}}，
#   {{moepeft.checkpoints.hf.model.save}}；GGUF 由
#   {{moepeft.checkpoints.gguf.model}} 读取。
# - 部署：{{moepeft.inference.engine.engine.Engine.stream}}；HTTP 服务
#   {{moepeft.serve.http.app}} 加上 OpenAI 的 API、密钥和指标。同一基座的不同
#   adapter 的请求可以放进一个 batch，{{moepeft.inference.adapters.pool}}。
#
# 论文：LoRA 与遗忘（arXiv:2405.09673）、LoRA（arXiv:2106.09685）、QLoRA 与
# NF4（arXiv:2305.14314）、LLM.int8（arXiv:2208.07339）、
# 带分页缓存的连续批处理（arXiv:2309.06180）。
# %% [markdown] lang="en" tags=["solution"]
# # Solutions: after training
#
# ## Exercise 1
#
# bfloat16 is 14 GB: at most $50 / 14 = 3.6$ and $1000 / 14 = 71$ tokens per
# second, and twice that with int8. A batch reads the weights once for all its
# rows, so the bound on *steps* is the same and each step has more tokens.
# %% [markdown] lang="zh" tags=["solution"]
# # 解答：训练之后
#
# ## 练习 1
#
# bfloat16 占 14 GB：每秒最多 $50 / 14 = 3.6$ 和 $1000 / 14 = 71$ 个 token，int8
# 是两倍。一个 batch 的所有行共用一次权重读取，所以**步数**的上界不变，
# 而每步有更多 token。
# %% tags=["solution"]
def most_tokens(parameters, bytes_each, bandwidth):
  return bandwidth / (parameters * bytes_each)


bounds = [most_tokens(7e9, size, b) for size in (2, 1) for b in (50e9, 1e12)]
print([f'{b:.1f}' for b in bounds])
np.testing.assert_allclose(bounds[2:], 2 * np.array(bounds[:2]))
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 2
#
# The stream of two tasks alternates them, so half of each batch is old.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 2
#
# 两个任务的数据流交替给出样本，因此每个 batch 有一半是旧任务。
# %% tags=["solution"]
replay_model, replay_built, replay_variables = build('lora(rank=4)')
optimizer, objective = optax.adamw(METHODS['LoRA'][1]), SEQ2SEQ.build()


@jax.jit
def replay_step(part, opt, batch):
  def loss(part):
    changed = replay_variables | {'peft': part}
    return mean_loss(*objective(replay_model.apply, changed, batch, None))

  updates, opt = optimizer.update(jax.grad(loss)(part), opt, part)
  return optax.apply_updates(part, updates), opt


part = replay_variables['peft']
opt = optimizer.init(part)
for i in range(STEPS):
  mixed = tasks.examples(('stars', 'opinion'), 16, seed=0, start=16 * i)
  batch = make_batch([(e.inputs, e.targets) for e in mixed])
  part, opt = replay_step(part, opt, batch)
after = accuracies(score(replay_variables | {'peft': part}, PAIRS))
for name, with_replay, alone in zip(
  TEST, after, histories['LoRA'][-1], strict=True
):
  print(f'{name:8} with replay {with_replay:4.0%}, without {alone:4.0%}')
assert after[1] > 0.9, 'replay should keep the old task'
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 3
#
# Weights are roughly normal: most are small. NF4 has more levels near zero and
# fewer in the tails, so its mean error is smaller at the same number of bits.
# (It also has 16 levels, and symmetric int4 has 15.)
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 3
#
# 权重近似正态分布，大多数很小。NF4 在零附近取值更密、尾部更疏，
# 因此同样的比特数下平均误差更小。（它还有 16 个取值，而对称 int4 只有 15 个。）
# %% tags=["solution"]
blocks = kernel.reshape(-1, quantization.BLOCK, kernel.shape[1])
block_scale = np.abs(blocks).max(axis=1, keepdims=True) / 7
int4 = (np.rint(blocks / block_scale) * block_scale).reshape(kernel.shape)
int4_error = np.abs(int4 - kernel)
print(f'int4 {int4_error.mean():.4f}, NF4 {nf4_error.mean():.4f}')
assert nf4_error.mean() < int4_error.mean()

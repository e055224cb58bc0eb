# SPDX-License-Identifier: Apache-2.0
# %% [markdown] lang="en"
# # Supervised fine-tuning
#
# A pretrained model continues texts. Supervised fine-tuning (SFT) shows it
# texts in which somebody asks and an assistant answers, and trains it with the
# same loss: the cross-entropy of the next token. What is new is not the loss
# but the data: how a conversation becomes one sequence of tokens, on which
# tokens the loss is taken, and how sequences of unequal length share a batch.
# Most mistakes in fine-tuning are made here, and none of them raises an error.
# This notebook does each step by hand and compares it with moepeft.
# %% [markdown] lang="zh"
# # 监督微调（SFT）
#
# 预训练模型只会续写文本。监督微调（supervised fine-tuning, SFT）
# 给它看“有人提问、助手回答”的文本，用的还是同一个损失：下一个 token 的交叉熵。
# 新的不是损失，而是数据：一段对话怎样变成一个 token 序列，损失算在哪些 token
# 上，长短不一的序列怎样放进同一个 batch。微调中的大多数错误都出在这里，
# 而且没有一个会报错。本 notebook 把每一步都手写一遍，并与 moepeft 对比。
# %% [markdown] lang="en"
# ## What you will understand
#
# - The row formats of instruction data, and the one list of messages behind
#   them.
# - What a chat template is, why it is a program, and what a generation prompt
#   is.
# - The loss mask: which tokens are trained, to the exact token.
# - Packing with segment ids and positions: why packed losses equal unpacked
#   ones, and how a wrong mask leaks one example into the next without any
#   error.
# - What SFT changes in a small model: format and behaviour, from few examples.
#
# About 60 minutes. Before it: notebooks 05 (tokenizers), 06 (attention), 07
# (positions) and 10 (training a GPT).
# %% [markdown] lang="zh"
# ## 你将理解什么
#
# - 指令数据的几种行格式，以及它们背后统一的消息列表。
# - 什么是 chat template，为什么它是一段程序，什么是 generation prompt。
# - 损失掩码（loss mask）：精确到 token，哪些 token 参与训练。
# - 用 segment id 和 position 做 packing：为什么打包后的损失等于不打包的损失，
#   以及错误的掩码怎样让一个样本悄悄泄漏到下一个样本。
# - SFT 在一个小模型里改变了什么：用很少的样本学到格式与行为。
#
# 大约 60 分钟。之前请先学习 notebook 05（分词器）、06（注意力）、07（位置编码）
# 和 10（训练 GPT）。
# %%
import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import jinja2
import numpy as np
import optax
from matplotlib import pyplot as plt

from moepeft.data.batching import decoder_only, packing
from moepeft.data.chat.dataset import ChatTemplate
from moepeft.data.chat.formats import parse_conversation
from moepeft.data.tokenizers.tokenizer import load_tokenizer
from moepeft.models.decoder.config import DecoderConfig
from moepeft.models.decoder.model import Decoder
from moepeft.nn.attention import attention_mask
from moepeft.objectives.cross_entropy import loss_divisors, token_losses

# %% [markdown] lang="en"
# ## 1. Row formats
#
# Public data sets write the same thing in different ways. Alpaca has one
# instruction and its input in separate fields, ShareGPT has `from` and `value`,
# OpenAI's form has `role` and `content`. All of them are a list of messages, so
# the first step is a function from a row to that list. Everything after it
# knows one form only.
# %% [markdown] lang="zh"
# ## 1. 行格式
#
# 公开数据集用不同的写法表达同一件事：Alpaca 把指令和输入放在不同字段，ShareGPT
# 用 `from` 和 `value`，OpenAI 格式用 `role` 和 `content`。
# 它们本质上都是一个消息列表，所以第一步是写一个从“行”到“消息列表”的函数，
# 之后的所有步骤只需认识一种形式。
# %%
ROWS = [
  {'instruction': 'Sort the digits.', 'input': '3 1 2', 'output': '1 2 3'},
  {
    'conversations': [
      {'from': 'system', 'value': 'Answer in one word.'},
      {'from': 'human', 'value': 'Capital of France?'},
      {'from': 'gpt', 'value': 'Paris'},
    ]
  },
  {
    'messages': [
      {'role': 'user', 'content': 'Add 2 and 3.'},
      {'role': 'assistant', 'content': '5'},
      {'role': 'user', 'content': 'And 4?'},
      {'role': 'assistant', 'content': '9'},
    ]
  },
]
SPEAKERS = {'system': 'system', 'human': 'user', 'gpt': 'assistant'}


def to_messages(row):
  """A row of one of the three formats as [{'role', 'content'}]."""
  if 'messages' in row:
    return row['messages']
  if 'conversations' in row:
    return [
      {'role': SPEAKERS[turn['from']], 'content': turn['value']}
      for turn in row['conversations']
    ]
  question = row['instruction']
  if row.get('input'):
    question += '\n' + row['input']
  return [
    {'role': 'user', 'content': question},
    {'role': 'assistant', 'content': row['output']},
  ]


conversations = [to_messages(row) for row in ROWS]
for row, messages in zip(ROWS, conversations, strict=True):
  turns = parse_conversation(row).turns
  theirs = [{'role': t.role, 'content': t.content} for t in turns]
  assert messages == theirs, f'compare the fields of {row}'
  print([f'{m["role"]}: {m["content"]!r}' for m in messages])

# %% [markdown] lang="en"
# ## 2. Chat templates
#
# A model reads one sequence, so the messages are written into one text, with
# marks for who speaks. The marks are *special tokens*: entries of the
# vocabulary that no user text can produce if the tokenizer is used properly.
# ChatML, the most common form, writes for each message
#
# `<|im_start|>` role, newline, content, `<|im_end|>` newline.
#
# The text is produced by a *Jinja template* that is shipped with the tokenizer.
# A template is a program: it may add a default system prompt, drop earlier
# thoughts or write today's date. Training and serving have to run the *same*
# program: other marks are other tokens, which the model was not trained on.
#
# Here is ChatML as a template, with the system prompt that SmolLM2 adds if the
# conversation has none. The flag `add_generation_prompt` is for serving: it
# appends the start of an answer, after which the model continues.
# %% [markdown] lang="zh"
# ## 2. Chat template（对话模板）
#
# 模型只读一个序列，所以要把消息写成一段文本，并标出谁在说话。这些标记是特殊
# token，即词表中的条目；只要正确使用分词器，用户的文本不可能产生它们。
# 最常见的形式是 ChatML，每条消息写成
#
# `<|im_start|>` 角色、换行、内容、`<|im_end|>` 换行。
#
# 文本由随分词器发布的 Jinja 模板生成。模板是一段程序：它可能加上默认的 system
# prompt、丢弃之前的思考过程，或者写入当天的日期。训练和推理必须运行同一段程序：
# 换一种标记就是换一些 token，而模型没有在它们上训练过。
#
# 下面是 ChatML 模板，并加上 SmolLM2 在没有 system 消息时使用的默认 system
# prompt。 `add_generation_prompt` 用于推理：它在末尾写出“助手开始回答”的标记，
# 模型从那里续写。
# %%
CHATML = (
  "{% if messages[0]['role'] != 'system' %}"
  '<|im_start|>system\n{{ system }}<|im_end|>\n'
  '{% endif %}'
  '{% for m in messages %}'
  "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
  '{% endfor %}'
  '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
SYSTEM = 'You are a helpful AI assistant named SmolLM, trained by Hugging Face'
# Without keep_trailing_newline Jinja drops the last newline of the template.
compiled_template = jinja2.Environment(keep_trailing_newline=True).from_string(
  CHATML
)


def render(messages, add_generation_prompt=False):
  return compiled_template.render(
    messages=messages,
    system=SYSTEM,
    add_generation_prompt=add_generation_prompt,
  )


# transformers imports tqdm, which asks for ipywidgets in a notebook.
warnings.filterwarnings('ignore', message='IProgress not found')
smollm2 = load_tokenizer('', 'smollm2').tokenizer
for messages in conversations:
  for is_prompt in (False, True):
    theirs = smollm2.apply_chat_template(
      messages, tokenize=False, add_generation_prompt=is_prompt
    )
    assert render(messages, is_prompt) == theirs, 'compare repr() of the two'
print(render(conversations[2]))

# %% [markdown] lang="en"
# The template was written by us and the text is character by character that of
# the tokenizer's own template. Two properties deserve a check, because both are
# assumed silently everywhere:
#
# 1. A mark is **one** token. If it were split into pieces, user text could
#    imitate it.
# 2. The prompt that serving sends is a **prefix** of the training text. If the
#    template wrote answers differently at the end than in the middle, the model
#    would be asked something that it was never trained on.
# %% [markdown] lang="zh"
# 模板是我们自己写的，得到的文本与分词器自带模板的输出逐字符相同。
# 有两个性质值得检查，因为大家总是默认它们成立：
#
# 1. 一个标记就是**一个** token。如果被切成几段，用户文本就可以伪造它。
# 2. 推理时发送的 prompt 是训练文本的**前缀**。
#    如果模板在结尾处与在中间处对回答的写法不同，
#    模型就会被问到它从未训练过的形式。
# %%
for mark in ('<|im_start|>', '<|im_end|>'):
  assert len(smollm2.encode(mark, add_special_tokens=False)) == 1, mark
for messages in conversations:
  text = render(messages)
  for i, message in enumerate(messages):
    if message['role'] == 'assistant':
      assert text.startswith(render(messages[:i], True)), (messages, i)

# A user who types the mark gets the special token, unless it is refused.
typed = smollm2.encode('hi <|im_end|>', add_special_tokens=False)
split = smollm2.encode(
  'hi <|im_end|>', add_special_tokens=False, split_special_tokens=True
)
print('with special tokens:   ', smollm2.convert_ids_to_tokens(typed))
print('without special tokens:', smollm2.convert_ids_to_tokens(split))
assert len(split) > len(typed)

# %% [markdown] lang="en"
# The last lines show prompt injection at the level of tokens: text of a user
# that contains a mark *becomes* the mark. A server has to escape or reject such
# text before it renders the template.
#
# ## 3. The loss mask
#
# Let $x_1 \dots x_n$ be the tokens and $m_i \in \{0, 1\}$ whether token $i$ is
# trained. The loss of SFT is
#
# $$ L = - \frac{\sum_{i=2}^{n} m_i \log p(x_i \mid x_1 \dots x_{i-1})}
#              {\sum_{i=2}^{n} m_i} . $$
#
# Everything is *read*; only tokens with $m_i = 1$ are *learned*. The usual
# choice is the assistant's turns: the tokens that the model has to produce
# itself. Their first token is the one after the generation prompt, and their
# last one is the **end-of-turn token**. Leave that out and the model never
# learns to stop; put the newline after it in and the model learns a token that
# serving never asks for.
#
# By hand: the template is rendered up to each answer with the generation
# prompt, which gives the character at which the answer starts. The tokenizer's
# offsets tell which token that is.
# %% [markdown] lang="zh"
# 最后几行展示的是 token 层面的 prompt injection：用户文本里如果包含标记，
# 它就**变成**了标记。服务端必须在渲染模板之前转义或拒绝这样的文本。
#
# ## 3. 损失掩码
#
# 设 token 为 $x_1 \dots x_n$，$m_i \in \{0, 1\}$ 表示第 $i$ 个 token
# 是否参与训练。 SFT 的损失是
#
# $$ L = - \frac{\sum_{i=2}^{n} m_i \log p(x_i \mid x_1 \dots x_{i-1})}
#              {\sum_{i=2}^{n} m_i} . $$
#
# 所有 token 都被**读取**，只有 $m_i = 1$ 的 token 被**学习**。
# 通常选助手的回合，即模型需要自己生成的 token：第一个是 generation prompt
# 之后的 token，最后一个是 **回合结束 token**。漏掉它，模型学不会停止；
# 把它后面的换行也算进去，模型就学了一个推理时从不需要的 token。
#
# 手写方法：对每个回答，渲染到它之前为止并加上 generation prompt，
# 由此得到回答开始的字符位置；再用分词器的 offset 找到对应的 token。
# %%
END_OF_TURN = '<|im_end|>'


def encode_with_mask(messages):
  """(ids [n], loss mask [n]) of a conversation, the loss on answers."""
  text, spans = render(messages), []
  for i, message in enumerate(messages):
    if message['role'] == 'assistant':
      start = len(render(messages[:i], True))
      end = start + len(message['content']) + len(END_OF_TURN)
      spans.append((start, end))
  encoding = smollm2(
    text, add_special_tokens=False, return_offsets_mapping=True
  )
  mask = [
    any(start <= first and last <= end for start, end in spans)
    for first, last in encoding['offset_mapping']
  ]
  return np.array(encoding['input_ids']), np.array(mask)


chat_template = ChatTemplate(smollm2)
for row, messages in zip(ROWS, conversations, strict=True):
  ids, mask = encode_with_mask(messages)
  sample = chat_template.encode(parse_conversation(row))
  np.testing.assert_array_equal(ids, sample.ids, 'the text differs')
  np.testing.assert_array_equal(mask, sample.loss_mask, 'print the tokens')
  trained = smollm2.convert_ids_to_tokens(ids[mask].tolist())
  assert trained.count(END_OF_TURN) == sum(
    m['role'] == 'assistant' for m in messages
  ), 'every answer has to end with a trained end-of-turn token'
  print(trained)


# %% [markdown] lang="en"
# A picture of the mask is the best check of a data pipeline, and it takes a few
# lines. Look at one such picture before every training run on new data.
# %% [markdown] lang="zh"
# 把掩码画出来是检查数据管线的最好办法，而且只需几行代码。
# 每次在新数据上训练之前，都应该看一张这样的图。
# %%
def draw_tokens(axes, tokens, trained, columns=72):
  """Writes tokens as boxes; those with a loss are orange."""
  x = y = 0
  for token, is_trained in zip(tokens, trained, strict=True):
    label = token.replace('Ċ', '\\n').replace('Ġ', ' ')
    width = len(label) + 0.6
    if x + width > columns:
      x, y = 0, y - 1
    color = '#ffb35c' if is_trained else '#e4e8ee'
    axes.add_patch(plt.Rectangle((x, y), width - 0.2, 0.8, color=color))
    axes.text(
      x + width / 2 - 0.1,
      y + 0.4,
      label.replace('$', r'\$'),
      ha='center',
      va='center',
      fontsize=7,
      family='monospace',
    )
    x += width
  axes.set(xlim=(0, columns), ylim=(y - 0.2, 1))
  axes.axis('off')


ids, mask = encode_with_mask(conversations[2])
figure, axes = plt.subplots(figsize=(7, 1.5))
draw_tokens(axes, smollm2.convert_ids_to_tokens(ids.tolist()), mask)
axes.set_title('orange: trained', fontsize=8)
plt.show()
print(f'{mask.sum()} of {len(ids)} tokens are trained')


# %% [markdown] lang="en"
# ## 4. Packing
#
# Conversations have unequal lengths. A batch `[b, t]` of one conversation per
# row is filled up with padding, which costs as much as tokens. *Packing* puts
# several samples into a row. A sample of $n + 1$ tokens gives $n$ inputs and
# $n$ targets, shifted by one, so it takes $n$ places of a row. Which samples
# share a row is a bin packing problem; *best fit decreasing* goes from the
# longest sample to the shortest and puts each into the fullest row that still
# has room.
# %% [markdown] lang="zh"
# ## 4. Packing（打包）
#
# 对话长短不一。每行一段对话的 batch `[b, t]` 要用 padding 补齐，而 padding
# 与真正的 token 一样耗算力。packing 把多个样本放进一行。$n + 1$ 个 token
# 的样本给出 $n$ 个输入和 $n$ 个目标，两者错开一位，因此占一行中的 $n$ 个位置。
# 哪些样本放在同一行是装箱问题；best fit decreasing 从最长的样本到最短的样本，
# 每次放进还放得下的、最满的那一行。
# %%
def best_fit(lengths, capacity):
  """Indices of the samples in each row, by best fit decreasing."""
  rows, free = [], []
  for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
    fitting = [r for r in range(len(rows)) if free[r] >= lengths[item]]
    if fitting:
      row = min(fitting, key=lambda r: free[r])
    else:
      row = len(rows)
      rows.append([])
      free.append(capacity)
    rows[row].append(item)
    free[row] -= lengths[item]
  return rows


rng = np.random.default_rng(0)
lengths = np.minimum(64, rng.geometric(0.06, size=200))
rows = best_fit(lengths, 64)
assert rows == packing.best_fit_bins(lengths[:, None], (64,))
for name, count in (('padded', len(lengths)), ('packed', len(rows))):
  print(f'{name}: {count} rows, {lengths.sum() / (64 * count):.0%} tokens')
assert len(rows) >= lengths.sum() / 64, 'fewer rows than tokens allow'


# %% [markdown] lang="en"
# A packed row needs two more arrays. `segments` `[b, t]` numbers the samples of
# a row (0 is padding), and `positions` `[b, t]` counts from 0 in each segment.
# The attention mask is then
#
# $$ M_{ts} = [\,s \le t\,]\,[\,\text{segment}_s = \text{segment}_t\,] , $$
#
# where $[\cdot]$ is 1 if the condition holds and 0 if not: a causal mask with
# one triangle per sample. In the pictures below, rows are queries $t$ and
# columns are keys $s$ of the first packed row; blue pairs are visible.
# %% [markdown] lang="zh"
# 打包后的行还需要两个数组：`segments` `[b, t]` 给一行中的样本编号（0 表示
# padding）， `positions` `[b, t]` 在每个 segment 内从 0 开始计数。
# 于是注意力掩码为
#
# $$ M_{ts} = [\,s \le t\,]\,[\,\text{segment}_s = \text{segment}_t\,] , $$
#
# 其中 $[\cdot]$ 在条件成立时为 1，否则为 0：每个样本各有一个三角形的因果掩码。
# 下面的图取第一个打包行，纵轴是 query $t$，横轴是 key $s$，蓝色表示可见。
# %%
def pack(samples, capacity, rows):
  """Arrays [b, t] of samples (ids, loss mask), several in a row."""
  shape = (len(rows), capacity)
  names = ('inputs', 'targets', 'segments', 'positions', 'trained')
  batch = {name: np.zeros(shape, np.int32) for name in names}
  for r, items in enumerate(rows):
    start = 0
    for segment, item in enumerate(items, 1):
      ids, mask = samples[item]
      end = start + len(ids) - 1
      batch['inputs'][r, start:end] = ids[:-1]
      batch['targets'][r, start:end] = ids[1:]
      batch['trained'][r, start:end] = mask[1:]
      batch['segments'][r, start:end] = segment
      batch['positions'][r, start:end] = np.arange(end - start)
      start = end
  return {
    'inputs': batch['inputs'],
    'targets': batch['targets'],
    'inputs_mask': batch['segments'] > 0,
    'targets_mask': batch['trained'].astype(bool),
    'inputs_segments': batch['segments'],
    'targets_segments': batch['segments'],
    'inputs_positions': batch['positions'],
  }


def random_sample(rng, vocab=50):
  n = int(rng.integers(5, 15))
  prompt = int(rng.integers(2, n - 1))
  return rng.integers(1, vocab, n), np.arange(n) >= prompt


samples = [random_sample(rng) for _ in range(9)]
bins = best_fit([len(ids) - 1 for ids, _ in samples], 24)
packed = pack(samples, 24, bins)
theirs = decoder_only.pack_samples(
  [decoder_only.Sample(ids, mask) for ids, mask in samples], 24, bins
)
assert packed.keys() == theirs.keys()
for key, array in packed.items():
  np.testing.assert_array_equal(array, theirs[key], key)

# %%
segments = packed['inputs_segments']
t = np.arange(24)
visible = (t[:, None] >= t) & (segments[:, :, None] == segments[:, None, :])
real = packed['inputs_mask']
theirs = attention_mask(real, real, segments, segments, causal=True)[:, 0]
# The rows of padding see padding in one version and nothing in the other.
np.testing.assert_array_equal(
  np.where(real[:, :, None], visible, False),
  np.where(real[:, :, None], theirs, False),
)
figure, axes = plt.subplots(1, 3, figsize=(7, 2.2))
for title, picture, ax in zip(
  ('mask by segments', 'causal mask alone', 'the difference leaks'),
  (visible[0], t[:, None] >= t, (t[:, None] >= t) & ~visible[0]),
  axes,
  strict=True,
):
  ax.imshow(picture, cmap='Blues', vmin=0, vmax=1)
  ax.set_title(title, fontsize=8)
  ax.tick_params(labelsize=6)
plt.tight_layout()
plt.show()

# %% [markdown] lang="en"
# ### Packed equals unpacked
#
# The claim: with the right mask and positions, every logit of a packed row
# equals the logit of the same sample alone. We check it on a small decoder of
# moepeft with random weights, for two kinds of positions: rotary (RoPE) and
# learned. Rows of one sample each are the reference.
# %% [markdown] lang="zh"
# ### 打包等于不打包
#
# 结论：只要掩码和位置正确，打包行里的每个 logit 都等于该样本单独计算时的
# logit。我们用 moepeft 的一个随机初始化的小 decoder 检查，位置编码分两种：
# 旋转位置编码（RoPE）和可学习的位置编码。以每行一个样本的结果为基准。
# %%
padded = pack(samples, 24, [[item] for item in range(len(samples))])
tiny = DecoderConfig(
  vocab=50, d_model=32, heads=2, kv_heads=1, head_dim=16, ffn=64, layers=2
)


@functools.cache
def apply_of(positions):
  model = Decoder(dataclasses.replace(tiny, positions=positions))
  inputs = {'inputs': padded['inputs']}
  variables = jax.jit(model.init)(jax.random.key(0), inputs)
  # Larger weights than at initialization, so that attention is not uniform.
  variables = jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, variables)
  return jax.jit(lambda batch: model.apply(variables, batch))


def largest_difference(apply, batch):
  """Between logits of packed samples and of the same samples alone.

  In units of the largest logit.
  """
  alone, together = np.asarray(apply(padded)), np.asarray(apply(batch))
  largest = 0.0
  for r, items in enumerate(bins):
    start = 0
    for item in items:
      n = len(samples[item][0]) - 1
      difference = alone[item, :n] - together[r, start : start + n]
      largest = max(largest, np.abs(difference).max())
      start += n
  return largest / np.abs(alone).max()


one_segment = packed['inputs_mask'].astype(np.int32)
VARIANTS = {
  'segments and positions': packed,
  'no position reset': packed
  | {
    'inputs_positions': np.broadcast_to(
      np.arange(24, dtype=np.int32), real.shape
    )
  },
  'no segments (leak)': packed | {'inputs_segments': one_segment},
}
differences = {
  (positions, variant): largest_difference(apply_of(positions), batch)
  for positions in ('rope', 'learned')
  for variant, batch in VARIANTS.items()
}
for (positions, variant), value in differences.items():
  print(f'{positions:8} {variant:24} {value:.1e}')

# %% [markdown] lang="en"
# Three observations.
#
# - With segments and positions the difference is rounding: sums of float32 in
#   another order.
# - Without segments the logits are wrong for both. There is no error message
#   and the loss still falls; the model reads the previous sample as if it
#   belonged to the question.
# - Without a position reset, learned positions are wrong, but RoPE is right.
#   RoPE turns query $t$ and key $s$ so that their product depends on $t - s$
#   only. Adding the same offset to all positions of a segment changes nothing.
#   The reset is still done: it costs nothing, and some forms of RoPE use other
#   angles beyond the trained length.
# %% [markdown] lang="zh"
# 三点观察。
#
# - segment 和 position 都正确时，差异只是舍入误差：float32 求和顺序不同。
# - 没有 segment 时，两种位置编码的 logit 都是错的。没有任何报错，损失照样下降；
#   模型把前一个样本当成了当前问题的一部分。
# - 不重置 position 时，可学习的位置编码出错，而 RoPE 没有错。RoPE 旋转 query
#   $t$ 与 key $s$，使两者的内积只依赖 $t - s$；给一个 segment
#   的所有位置加同一个偏移不改变任何东西。实践中仍然重置：它没有代价，
#   而某些 RoPE 变体在超出训练长度时会改用别的角度。
# %%
# float32 has 7 digits, of which sums of hundreds of terms lose some.
ROUNDING = 1e-4
for positions in ('rope', 'learned'):
  assert differences[positions, 'segments and positions'] < ROUNDING
  assert differences[positions, 'no segments (leak)'] > 0.1, 'no leak shown'
assert differences['rope', 'no position reset'] < ROUNDING
assert differences['learned', 'no position reset'] > 0.1


# %% [markdown] lang="en"
# ### The mean of means
#
# Equal logits are not yet an equal loss. With one sample per row, some programs
# average over the tokens of a row and then over rows. Every *sample* then has
# the same weight, and a token of a short answer more than one of a long answer.
# The mean over all tokens gives every *token* the same weight. Packing and
# gradient accumulation change what a row is, so a mean over rows changes its
# meaning: the divisor has to be computed from the whole batch, by tokens or by
# segments.
# %% [markdown] lang="zh"
# ### 均值的均值
#
# logit 相等还不代表损失相等。每行一个样本时，有的程序先对一行的 token 取平均，
# 再对行取平均。这样每个**样本**权重相同，短回答的 token 权重大于长回答的
# token。对所有 token 取平均则让每个 **token** 权重相同。packing
# 和梯度累积都会改变“行”的含义，所以按行取平均的意义也随之改变：除数必须由整个
# batch 计算，或者按 token，或者按 segment。
# %%
def losses_of(batch):
  """Mean over tokens, over rows, and over samples, by hand."""
  losses = np.asarray(token_losses(apply_rope(batch), batch['targets']))
  mask = batch['targets_mask']
  segments = batch['targets_segments']
  means = [
    losses[r][mask[r] & (segments[r] == segment)].mean()
    for r in range(len(mask))
    for segment in np.unique(segments[r][mask[r]])
  ]
  row_means = [losses[r][mask[r]].mean() for r in range(len(mask))]
  return losses[mask].mean(), np.mean(row_means), np.mean(means)


apply_rope = apply_of('rope')
tokens, by_rows, by_samples = np.transpose(
  [losses_of(padded), losses_of(packed)]
)
for name, pair in (
  ('tokens', tokens),
  ('rows', by_rows),
  ('samples', by_samples),
):
  print(f'mean over {name:8} padded {pair[0]:.5f}  packed {pair[1]:.5f}')
np.testing.assert_allclose(tokens[0], tokens[1], rtol=1e-5)
np.testing.assert_allclose(by_samples[0], by_samples[1], rtol=1e-5)
assert abs(by_rows[0] - by_rows[1]) > 1e-3, 'rows happen to agree'

# moepeft: a divisor for each token and one for the sum.
for average_over, pair in (('tokens', tokens), ('sequences', by_samples)):
  for batch, expected in zip((padded, packed), pair, strict=True):
    divisors, total = loss_divisors(
      jax.tree.map(jnp.asarray, batch), average_over
    )
    losses = token_losses(apply_rope(batch), batch['targets'])
    mean = jnp.sum(losses / divisors * batch['targets_mask']) / total
    np.testing.assert_allclose(mean, expected, rtol=1e-5)

# %% [markdown] lang="en"
# ## 5. A short run
#
# What does SFT do to a model? We need a base model, so we pretrain one: two
# layers on documents of a made-up language over the letters a to h. A document
# names an operation and shows it, such as `R abcd = dcba;` for reverse, `U` for
# the letters shifted by one, `F` for the first letter repeated. Then we
# fine-tune on a few conversations with marks that the base has never seen, and
# ask about words that are in none of the conversations.
# %% [markdown] lang="zh"
# ## 5. 一次短训练
#
# SFT 对模型做了什么？我们需要一个基座模型，于是先预训练一个：两层，语料是由字母
# a 到 h 组成的人造语言。一个文档写出一个操作并演示它，例如 `R abcd = dcba;`
# 表示反转，`U` 表示每个字母后移一位，`F` 表示重复首字母。然后用少量对话做微调，
# 对话用的标记是基座从未见过的，并用所有对话里都没有出现过的单词（字母串）
# 来提问。
# %%
LETTERS, USER, ASSISTANT, END = 'abcdefgh', '<', '>', '.'
VOCAB = ['PAD', *LETTERS, *'RUF =;', USER, ASSISTANT, END, 'W']
INDEX = {token: i for i, token in enumerate(VOCAB)}
OPERATIONS = {
  'R': lambda w: w[::-1],
  'U': lambda w: ''.join(LETTERS[(LETTERS.index(c) + 1) % 8] for c in w),
  'F': lambda w: w[0] * 4,
}


def encode(text):
  return np.array([INDEX[c] for c in text])


def draw(rng, words):
  name = str(rng.choice(list(OPERATIONS)))
  return name, words[rng.integers(len(words))]


def document(rng, words):
  name, word = draw(rng, words)
  return f'{name} {word} = {OPERATIONS[name](word)};'


def conversation(name, word):
  """Ids and loss mask: the answer and its end are trained."""
  prompt = f'{USER}{name} {word} {ASSISTANT} '
  ids = encode(prompt + OPERATIONS[name](word) + END)
  return ids, np.arange(len(ids)) >= len(prompt)


WORDS = [''.join(w) for w in rng.choice(list(LETTERS), (3000, 4))]
print(document(rng, WORDS), [VOCAB[i] for i in conversation('R', 'abcd')[0]])

# %%
config = DecoderConfig(
  vocab=len(VOCAB), d_model=48, heads=4, kv_heads=4, head_dim=12, ffn=96,
  layers=2,
)  # fmt: skip
model = Decoder(config)
LENGTH = 48
optimizer = optax.scale_by_adam()


def loss_fn(params, batch):
  logits = model.apply({'params': params}, batch)
  mask = batch['targets_mask']
  return jnp.sum(token_losses(logits, batch['targets']) * mask) / mask.sum()


@jax.jit
def update(params, opt, batch, rate):
  loss, gradient = jax.value_and_grad(loss_fn)(params, batch)
  updates, opt = optimizer.update(gradient, opt)
  updates = jax.tree.map(lambda u: -rate * u, updates)
  return optax.apply_updates(params, updates), opt, loss


def make_batch(samples):
  """16 packed rows; samples that do not fit are left out."""
  rows = best_fit([len(ids) - 1 for ids, _ in samples], LENGTH)[:16]
  return pack(samples, LENGTH, rows)


def train(params, steps, draw_samples, rate):
  generator, opt = np.random.default_rng(0), optimizer.init(params)
  losses = []
  for _ in range(steps):
    batch = make_batch(draw_samples(generator))
    params, opt, loss = update(params, opt, batch, rate)
    losses.append(float(loss))
  return params, losses


def draw_documents(generator):
  texts = [encode(document(generator, WORDS)) for _ in range(60)]
  return [(ids, np.ones(len(ids), bool)) for ids in texts]


scratch = jax.jit(model.init)(
  jax.random.key(0), {'inputs': jnp.ones((1, LENGTH), int)}
)['params']
base, pretraining = train(scratch, 600, draw_documents, rate=2e-3)
print(f'pretraining: {pretraining[0]:.2f} -> {pretraining[-1]:.2f} nats')
floor = 4 * np.log(8) / 13
print(f'4 random letters in 13 targets: {floor:.2f} nats')
assert pretraining[-1] < floor + 0.1, 'the base has not learned the operations'

# %% [markdown] lang="en"
# The floor of the pretraining loss is not 0: the 4 letters before `=` are
# random, each costs $\log 8$, and they are 4 of the 13 targets of a document
# (the operation is the first token and no target). Now 96 conversations, 32 for
# each operation, on words that neither the documents nor the test contain. Four
# cases:
#
# - from the base, the loss on the answers,
# - from the base, the loss on all tokens,
# - from random weights, the loss on the answers (what the 96 conversations
#   teach),
# - none: the base itself, asked in the new form.
# %% [markdown] lang="zh"
# 预训练损失的下限不是 0：`=` 之前的 4 个字母是随机的，每个的损失至少是
# $\log 8$，而一个文档的 13 个目标中有 4 个是它们（操作是第一个
# token，不是目标）。现在用 96 段对话，每种操作 32
# 段，单词既不在文档中，也不在测试集中。四种情况：
#
# - 从基座开始，损失只算在回答上；
# - 从基座开始，损失算在所有 token 上；
# - 从随机权重开始，损失算在回答上（即 96 段对话本身能教会多少）；
# - 不训练：直接用新格式问基座。
# %%
NEW_WORDS = sorted(set(map(''.join, rng.choice(list(LETTERS), (400, 4)))))
NEW_WORDS = rng.permutation([w for w in NEW_WORDS if w not in set(WORDS)])
TRAIN_WORDS, TEST_WORDS = NEW_WORDS[:32], NEW_WORDS[32:96]
CHATS = [conversation(name, w) for w in TRAIN_WORDS for name in OPERATIONS]


def draw_chats(train_on):
  def draw_samples(generator):
    order = generator.permutation(len(CHATS))
    return [
      (ids, mask if train_on == 'answers' else np.ones(len(ids), bool))
      for ids, mask in (CHATS[i] for i in order)
    ]

  return draw_samples


predict = jax.jit(
  lambda params, inputs: jnp.argmax(
    model.apply({'params': params}, {'inputs': inputs}), -1
  )
)


def accuracies(params, template='<{} {} > '):
  """Share of exactly right answers, of those that stop in time."""
  prompts = [template.format(n, w) for w in TEST_WORDS for n in OPERATIONS]
  answers = [OPERATIONS[n](w) + END for w in TEST_WORDS for n in OPERATIONS]
  start = len(prompts[0])
  ids = np.zeros((len(prompts), start + 5), int)
  ids[:, :start] = [encode(p) for p in prompts]
  for i in range(start, start + 5):
    ids[:, i] = np.asarray(predict(params, ids))[:, i - 1]
  texts = [''.join(VOCAB[i] for i in row[start:]) for row in ids]
  right = np.mean([x == y for x, y in zip(texts, answers, strict=True)])
  stopped = np.mean([x.index(END) == 4 if END in x else False for x in texts])
  return float(right), float(stopped)


STEPS = 150
runs = {'base, no SFT': (base, [])}
for name, start, train_on in (
  ('base, loss on answers', base, 'answers'),
  ('base, loss on all', base, 'all'),
  ('random weights', scratch, 'answers'),
):
  runs[name] = train(start, STEPS, draw_chats(train_on), rate=1e-3)
results = {name: accuracies(params) for name, (params, _) in runs.items()}
for name, (right, stopped) in results.items():
  print(f'{name:24} right {right:5.1%}  stops after 4 letters {stopped:5.1%}')

# %%
figure, axes = plt.subplots(1, 2, figsize=(7, 2.3))
for name, (_, losses) in runs.items():
  if losses:
    axes[0].plot(losses, label=name, lw=1)
axes[0].set(xlabel='step', ylabel='training loss, nats', yscale='log')
axes[0].legend(fontsize=6)
axes[1].barh(list(results), [right for right, _ in results.values()])
axes[1].set(xlabel='right answers on new words', xlim=(0, 1))
axes[1].tick_params(labelsize=7)
plt.tight_layout()
plt.show()

sft = results['base, loss on answers'][0]
assert sft > results['base, no SFT'][0] + 0.3, 'SFT taught nothing'
assert sft > results['random weights'][0] + 0.3, 'the base had no share in it'
assert sft > results['base, loss on all'][0], 'read the text below again'
# The model of random weights fits its 96 conversations nevertheless.
assert runs['random weights'][1][-1] < 0.2

# %% [markdown] lang="en"
# The same 96 conversations, the same steps, and a small training loss in both
# runs with the loss on the answers: from random weights the model knows its
# training answers by heart and hardly generalizes (a fifth of the answers is
# right), from the base it answers on new words. The ability came from
# pretraining; SFT attached a format to it. This is why a small and clean set of
# conversations can be enough, and why SFT is a poor way to add knowledge.
#
# The stop is part of the format: the base has no reason to write the end mark.
#
# Loss on answers or on all tokens: here the mask helps. With it, all of the
# gradient is about answers; without it, most of the loss is about the letters
# of questions, which can only be learned by heart. On real data, where
# questions are text like any other, the difference is often smaller and can
# have the other sign: the mask guarantees what is optimized, not a better
# result.
#
# ### A different template at inference
#
# Now the most common silent mistake: the model was trained with one template
# and is served with another. Two cases: the generation prompt is left out, so
# that the prompt ends after the question, and the mark before the answer is
# that of the pretraining documents. As before, the 5 tokens after the prompt
# have to be the 4 letters and the end mark.
# %% [markdown] lang="zh"
# 同样的 96 段对话，同样的步数，损失都只算在回答上，训练损失都很小：
# 从随机权重开始，模型背下了训练集的回答，却几乎不能泛化（只有五分之一答对）；
# 从基座开始，模型能回答新单词。
# 能力来自预训练，SFT 只是给它套上了格式。所以少量而干净的对话就可能足够，也所以
# SFT 不是注入知识的好办法。
#
# 停止也是格式的一部分：基座没有理由写出结束标记。
#
# 损失算在回答上还是所有 token 上：在这里掩码有帮助。有掩码时，
# 全部梯度都关于回答；没有掩码时，大部分损失关于问题中的字母，
# 而这些字母只能死记。在真实数据上，问题也是普通文本，差别往往更小，
# 甚至可能相反：掩码保证的是优化什么，而不是结果一定更好。
#
# ### 推理时换了模板
#
# 再看最常见的不报错的错误：训练用一种模板，上线用另一种。两种情况：漏掉
# generation prompt，prompt 在问题之后就结束；
# 或者回答之前的标记用了预训练文档里的那个。与前面一样，prompt 之后的 5 个 token
# 必须正好是 4 个字母和结束标记。
# %%
for name, template in (
  ('as trained', '<{} {} > '),
  ('no generation prompt', '<{} {}'),
  ('mark of the documents', '<{} {} = '),
):
  right, stopped = accuracies(runs['base, loss on answers'][0], template)
  print(f'{name:22} right {right:5.1%}  stops {stopped:5.1%}')
  if name == 'no generation prompt':
    assert right < sft - 0.2, 'the template made no difference'


# %% [markdown] lang="en"
# The weights have not changed, only a few tokens of the prompt. Without the
# generation prompt no answer is right: the loss mask never trained the model to
# write ` > ` itself. The mark of the documents does no harm here, as the base
# knows what follows it; that is luck, and one cannot tell in advance. Nothing
# reports an error; only an evaluation with the template of the server shows it.
# %% [markdown] lang="zh"
# 权重没有变，变的只是 prompt 中的几个 token。没有 generation prompt，
# 没有一个回答是对的：有损失掩码时，模型从未学过自己写出 ` > `。
# 换成文档里的标记在这里无害，因为基座知道它后面跟什么；这是运气，
# 事先无法判断。没有任何报错，只有用服务端模板做的评测才能发现。
# %% [markdown] lang="en"
# ## Exercises
#
# 1. *Easy.* A row may have turns that are read but not trained, with
#    `'weight': 0`. Extend `encode_with_mask` to such turns and compare with
#    moepeft.
# 2. *Medium.* Count what packing saves: for the 200 lengths above, compute the
#    number of attention scores (query-key pairs that are computed, with a dense
#    mask) for padded and for packed rows of 64. Which share of the packed ones
#    is masked away? What would a kernel that skips other segments compute?
# 3. *Hard.* Show by gradients that nothing leaks: the gradient of the loss of
#    segment 2 with respect to the *input embeddings* of segment 1 is exactly
#    zero with segments, and not zero without. Let the two segments use
#    different token ids; the head of this model does not share the embedding.
# %% [markdown] lang="zh"
# ## 练习
#
# 1. *容易。* 行里可以有只读不训练的回合，写作 `'weight': 0`。请扩展
#    `encode_with_mask`，并与 moepeft 对比。
# 2. *中等。* 计算 packing 省了多少：对上面的 200 个长度，分别计算 padding
#    与打包（行长 64）时注意力分数的个数（用稠密掩码时实际计算的 query-key
#    对）。打包后有多大比例被掩码丢弃？能跳过其他 segment 的 kernel 需要算多少？
# 3. *困难。* 用梯度证明没有泄漏：segment 2 的损失对 segment 1 的**输入
#    embedding** 的梯度，有 segment 时严格为零，没有 segment 时不为零。
#    让两个 segment 使用不同的 token id；本模型的输出层不与 embedding 共享权重。
# %% [markdown] lang="en"
# ## Interview questions
#
# **Your fine-tuned model answers well and then goes on with a new question of
# its own. What do you look at?**
#
# <details><summary>Answer</summary>
#
# The end-of-turn token. Either it is not trained (the loss mask ends before it,
# or it equals the padding token and is masked as padding), or the server does
# not treat it as a stop token (it stops at `eos_token` only, and the template
# ends turns with another token). Print the trained tokens of a few samples and
# the server's list of stop ids. A third cause is truncation: if long answers
# are cut at the right, their end is never seen.
#
# </details>
#
# **Packing speeds up training. Does it change the result?**
#
# <details><summary>Answer</summary>
#
# The function computed for each sample does not change if attention is limited
# to the segment and positions restart (for relative positions the restart does
# not matter). What changes is the batch: a step has more samples, so the number
# of steps per epoch and the noise of the gradient change, and the learning rate
# may have to follow. Averages over rows change their meaning; averages over
# tokens or samples of the whole batch do not. If the mask is only causal,
# samples leak into each other, which some accept in pretraining, but in SFT an
# answer would be conditioned on unrelated conversations.
#
# </details>
# %% [markdown] lang="zh"
# ## 面试题
#
# **微调后的模型回答得不错，但接着又自己提出一个新问题继续写。你检查什么？**
#
# <details><summary>答案</summary>
#
# 回合结束 token。要么它没有被训练（损失掩码在它之前结束，或者它与 padding token
# 相同而被当作 padding 掩掉），要么服务端没有把它当作停止 token（只在
# `eos_token` 处停止，而模板用另一个 token 结束回合）。打印几个样本中被训练的
# token，以及服务端的停止 id 列表。第三种原因是截断：如果长回答从右边被截掉，
# 模型就从未见过结尾。
#
# </details>
#
# **packing 能加速训练。它会改变结果吗？**
#
# <details><summary>答案</summary>
#
# 只要注意力限制在 segment
# 之内并且位置重新开始（对相对位置编码来说是否重置无所谓），
# 对每个样本计算的函数不变。改变的是 batch：一步包含更多样本，因此每个 epoch
# 的步数和梯度噪声都变了，学习率可能需要相应调整。按行的平均改变了含义；对整个
# batch 的 token 或样本的平均则不变。如果只用因果掩码，样本会互相泄漏：
# 预训练中有人接受这一点，但在 SFT 里回答会以无关的对话为条件。
#
# </details>
# %% [markdown] lang="en"
# ## In the package
#
# - Formats: {{moepeft.data.chat.formats.parse_conversation}}. It also reads
#   tool calls, thoughts and weights, and refuses fields whose meaning it does
#   not know.
# - Templates: {{moepeft.data.chat.dataset.ChatTemplate}}. It refuses templates
#   with random output, fixes the date of templates that write today's, and
#   warns of templates that drop content.
# - Spans of answers: {{moepeft.data.chat.answer_spans.find_answers}} by
#   rendering, as here, and {{moepeft.data.chat.answer_spans.marked_spans}} for
#   templates with `{% generation %}`. Tokens:
#   {{moepeft.data.chat.tokenize.encode_chats}}, which splits a token that would
#   span the start of an answer.
# - Packing: {{moepeft.data.batching.packing.best_fit_bins}} (Krell et al.,
#   arXiv:2107.02027) and {{moepeft.data.batching.decoder_only.pack_samples}}.
# - Loss: {{moepeft.objectives.cross_entropy.loss_divisors}} and
#   {{moepeft.objectives.seq2seq.loss_sums}}, which returns sums so that
#   microbatches add up.
#
# Papers: FLAN (arXiv:2109.01652), InstructGPT (arXiv:2203.02155), LIMA
# (arXiv:2305.11206, which argues that little data suffices for the format),
# RoPE (arXiv:2104.09864), SmolLM2 (arXiv:2502.02737).
# %% [markdown] lang="zh"
# ## 在 moepeft 中
#
# - 格式：{{moepeft.data.chat.formats.parse_conversation}}。它还读取工具调用、
#   思考过程和权重，并拒绝含义不明的字段。
# - 模板：{{moepeft.data.chat.dataset.ChatTemplate}}。它拒绝输出带随机性的模板，
#   固定会写入当天日期的模板的日期，并对丢弃内容的模板给出警告。
# - 回答的区间：{{moepeft.data.chat.answer_spans.find_answers}}
#   像本文一样靠渲染来定位； {{moepeft.data.chat.answer_spans.marked_spans}}
#   用于带 `{% generation %}` 的模板。 token：
#   {{moepeft.data.chat.tokenize.encode_chats}}，它会拆开跨越回答起点的 token。
# - packing：{{moepeft.data.batching.packing.best_fit_bins}}（Krell et al.，
#   arXiv:2107.02027）与 {{moepeft.data.batching.decoder_only.pack_samples}}。
# - 损失：{{moepeft.objectives.cross_entropy.loss_divisors}} 与
#   {{moepeft.objectives.seq2seq.loss_sums}}，返回的是和，因此各个 microbatch
#   可以相加。
#
# 论文：FLAN（arXiv:2109.01652）、InstructGPT（arXiv:2203.02155）、LIMA
# （arXiv:2305.11206，认为学会格式只需少量数据）、RoPE（arXiv:2104.09864）、
# SmolLM2（arXiv:2502.02737）。
# %% [markdown] lang="en" tags=["solution"]
# # Solutions: supervised fine-tuning
#
# ## Exercise 1
#
# A turn of weight 0 is left out of the spans. It is still rendered and read.
# %% [markdown] lang="zh" tags=["solution"]
# # 解答：监督微调
#
# ## 练习 1
#
# 权重为 0 的回合不放进区间列表；它仍然被渲染、被读取。
# %% tags=["solution"]
def encode_with_weights(messages):
  ids, mask = encode_with_mask(messages)
  offsets = smollm2(
    render(messages), add_special_tokens=False, return_offsets_mapping=True
  )['offset_mapping']
  for i, message in enumerate(messages):
    if message.get('weight', 1) == 0:
      start, end = (
        len(render(messages[:i], True)),
        len(render(messages[: i + 1])),
      )
      mask &= [not (start <= first < end) for first, _ in offsets]
  return ids, mask


weighted = [dict(m) for m in conversations[2]]
weighted[1]['weight'] = 0
ids, mask = encode_with_weights(weighted)
sample = chat_template.encode(parse_conversation({'messages': weighted}))
np.testing.assert_array_equal(mask, sample.loss_mask)
assert 0 < mask.sum() < encode_with_mask(conversations[2])[1].sum()
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 2
#
# A dense mask computes $64^2$ scores per row. A kernel that skips other
# segments and the future computes $n (n + 1) / 2$ per sample, however samples
# are packed.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 2
#
# 稠密掩码每行计算 $64^2$ 个分数。能跳过其他 segment 和未来位置的 kernel，
# 无论怎样打包，每个样本只需 $n (n + 1) / 2$ 个。
# %% tags=["solution"]
padded_scores = len(lengths) * 64**2
packed_scores = len(best_fit(lengths, 64)) * 64**2
needed = int((lengths * (lengths + 1) // 2).sum())
print(f'padded {padded_scores:,}, packed {packed_scores:,}, needed {needed:,}')
print(f'masked away in packed rows: {1 - needed / packed_scores:.0%}')
assert needed < packed_scores < padded_scores
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 3
#
# A row of the embedding belongs to a token id, not to a position. If segments 1
# and 2 use different ids, the rows that only segment 1 reads show the gradient
# of its inputs. (With a tied head every row would have a gradient, through the
# softmax.)
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 3
#
# embedding 的行属于某个 token id，而不属于某个位置。让 segment 1 和 2
# 使用不同的 id，只被 segment 1 读取的那些行就反映了它的输入的梯度。
# （如果输出层与 embedding 共享权重，每一行都会通过 softmax 得到梯度。）
# %% tags=["solution"]
two = [
  (np.arange(1, 8), np.ones(7, bool)),
  (np.arange(8, 15), np.ones(7, bool)),
]
row = pack(two, 12, [[0, 1]])
row['targets_mask'] = row['targets_segments'] == 2
weight_gradient = jax.jit(jax.grad(loss_fn))


def embedding_gradient(batch):
  return np.asarray(weight_gradient(base, batch)['embed']['embedding'])


# Segment 1 reads the ids 1 to 6, segment 2 the ids 8 to 13.
inside = embedding_gradient(row)
one_long_text = np.ones_like(row['inputs_segments'])
leaking = embedding_gradient(row | {'inputs_segments': one_long_text})
assert np.all(inside[1:7] == 0) and np.any(inside[8:14] != 0)
assert np.any(leaking[1:7] != 0)

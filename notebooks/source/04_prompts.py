# SPDX-License-Identifier: Apache-2.0

# %% [markdown] lang="en"
# # Prompts
#
# A prompt turns a task into text that a language model continues. This notebook
# measures what depends on it, with two models that need no download beyond pip:
# a T5 of about 0.9 million parameters that was pretrained on generated tasks
# with known wordings, and SmolLM2 with 135 million, a chat model. With the
# first you know what the model has seen, so that "sensitivity to wording" can
# be measured.
#
# ## What you will understand
#
# - how a template, a verbalizer and a log-likelihood make a classifier of a
#   language model
# - why sums and means of token log-probabilities can choose different answers
# - how much accuracy changes with words that mean the same
# - what contextual calibration corrects
# - when few-shot examples help and when they only make the prompt longer
#
# Time: about 60 minutes. Before it: notebook 01 (softmax). A *token* is a piece
# of text with a number; how texts are cut into tokens is notebook 05, and how
# the two models work inside are notebooks 09 and 10. Neither is needed here.
# %% [markdown] lang="zh"
# # 提示词（prompt）
#
# 提示词把任务变成一段文本，由语言模型续写。本笔记测量哪些结果取决于提示词，
# 用两个除 pip 外无需下载的模型：一个约 90 万参数的 T5，
# 在已知措辞的生成任务上预训练；以及 1.35 亿参数的对话模型 SmolLM2。对前者，
# 你清楚模型见过什么，因此“对措辞的敏感性”可以测量。
#
# ## 你将理解什么
#
# - 模板、verbalizer 和对数似然怎样把语言模型变成分类器
# - 为什么 token 对数概率的和与平均可能选出不同的答案
# - 意思相同的措辞会使准确率变化多少
# - contextual calibration 修正了什么
# - few-shot 示例何时有用，何时只是让提示词变长
#
# 时间：约 60 分钟。先修：笔记 01（softmax）。*token* 是一段带编号的文本；
# 文本怎样切成 token 见笔记 05，两个模型的内部结构见笔记 09 和 10，
# 这里都不需要。
# %%
import itertools
import warnings

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import moepeft
from moepeft.models.sites import context
from moepeft.tasks import TASKS, Template
from moepeft.tasks.stable_random import StableRandom

plt.rcParams['figure.dpi'] = 72
# A progress bar asks for ipywidgets, which are not needed here.
warnings.filterwarnings('ignore', 'IProgress not found')
t5 = moepeft.load('package:t5_tiny')
print(t5, f'{t5.loaded.base_parameters:,} parameters')
# %% [markdown] lang="en"
# ## 1. Templates and answers
#
# A *template* is a text with gaps; a *verbalizer* says which text stands for
# which class. The task `membership` of the package asks whether a list of words
# has one of a category. It has six templates: five were used in pretraining,
# the sixth never. Instances are split too: a tenth of them was held out. So we
# can ask about known or new lists in known or new words.
# %% [markdown] lang="zh"
# ## 1. 模板与答案
#
# *模板*是带空位的文本；*verbalizer* 规定哪个文本代表哪个类别。代码库的任务
# `membership` 问：一列词中有没有属于某一类别的。它有六个模板：五个用于预训练，
# 第六个从未用过。实例也分开了：十分之一留出不训练。
# 因此我们可以用见过或没见过的措辞，问见过或没见过的列表。
# %%
task = TASKS['membership']
for template in task.templates:
  print(f'{template.name:8} {template.text:50} {dict(template.verbalizer)}')


def draw_instances(task, count):
  """New instances, which were not in the training data."""
  result, i = [], 0
  while len(result) < count:
    instance = task.draw(StableRandom(11, 0, i))
    if task.split_of(instance) == 'held_out':
      result.append(instance)
    i += 1
  return result


instances = draw_instances(task, 48)
print(instances[0])
CLASSES = ('Yes', 'No')
truth = np.array([CLASSES.index(instance.answer) for instance in instances])
print('share of Yes:', (truth == 0).mean())
# %% [markdown] lang="en"
# ## 2. An answer's log-likelihood
#
# The model gives a probability for each next token. So after the prompt $x$ an
# answer with the tokens $y_1\dots y_m$ (the end token included) has
#
# $$\log P(y\mid x)=\sum_{i=1}^m\log P(y_i\mid x,y_{<i}).$$
#
# The class whose text is more likely wins (rank classification). This needs no
# generation, and the result is always one of the classes. T5 is an
# encoder-decoder: its encoder reads the prompt, and its decoder reads the
# answer shifted by one (*teacher forcing*) and predicts each token from those
# before it, so one forward pass scores all its tokens. Prompts and answers are
# padded, and the masks keep padding out.
# %% [markdown] lang="zh"
# ## 2. 答案的对数似然
#
# 模型给出每个下一个 token 的概率。所以在提示词 $x$ 之后，由 token
# $y_1\dots y_m$（含结束 token）组成的答案有
#
# $$\log P(y\mid x)=\sum_{i=1}^m\log P(y_i\mid x,y_{<i}).$$
#
# 文本更可能的类别胜出（rank classification）。这不需要生成，结果总是类别之一。
# T5 是 encoder-decoder：encoder 读提示词，decoder
# 读入右移一位的答案（*teacher forcing*），由前面的 token 预测每个 token，
# 因此一次前向就给所有 token 打分。
# 提示词和答案都要填充，由掩码把填充排除在外。
# %%
encode_prompt = t5.loaded.prompt_encoder()
tokenizer = t5.loaded.tokenizer  # bytes
ANSWER_LENGTH = 16


def pad(rows, length):
  ids = np.zeros((len(rows), length), np.int32)
  mask = np.zeros((len(rows), length), bool)
  for i, row in enumerate(rows):
    ids[i, : len(row)], mask[i, : len(row)] = row, True
  return ids, mask


@jax.jit
def token_log_probs(variables, batch):
  z = t5.loaded.model.apply(variables, batch)
  log_p = jnp.take_along_axis(
    jax.nn.log_softmax(z), batch['targets'][..., None], axis=-1
  )[..., 0]
  return jnp.where(batch['targets_mask'], log_p, 0)


def score(prompts, answers):
  """log P of each token of each answer, 0 on padding: [b, t]."""
  prompt_ids = [encode_prompt([prompt]) for prompt in prompts]
  length = -(-max(map(len, prompt_ids)) // 128) * 128  # few compilations
  inputs, inputs_mask = pad(prompt_ids, length)
  targets, targets_mask = pad(
    [[*tokenizer.encode(answer), tokenizer.eos] for answer in answers],
    ANSWER_LENGTH,
  )
  start = np.zeros((len(targets), 1), np.int32)  # T5 starts with the padding id
  batch = {
    'inputs': inputs,
    'inputs_mask': inputs_mask,
    'decoder_inputs': np.concatenate([start, targets[:, :-1]], axis=1),
    'targets': targets,
    'targets_mask': targets_mask,
  }
  return np.asarray(token_log_probs(t5.loaded.variables, batch))


def class_scores(prompts, answers=CLASSES):
  """log P of each answer to each prompt: [prompts, classes]."""
  return np.stack(
    [score(prompts, [answer] * len(prompts)).sum(-1) for answer in answers], -1
  )


two_prompts = [task.templates[0].text.format(**r.fields) for r in instances[:2]]
by_hand = class_scores(two_prompts)
for i, prompt in enumerate(two_prompts):
  package = t5.log_probs([prompt] * 2, list(CLASSES))
  # The weights are bfloat16, the sums float32 in another order of operations.
  assert np.allclose([p.sum() for p in package], by_hand[i], atol=0.05), (
    'is the end token scored, and the answer shifted by one?'
  )
print(two_prompts[0], by_hand[0].round(2))
# %% [markdown] lang="en"
# ## 3. Words the model knows, and words that mean the same
#
# Now the measurement: 48 new lists, the six templates of the task, and eight
# further wordings that a person would answer in the same way. The dotted line
# of the figure is a coin's accuracy; always saying No would be right in 0.58 of
# these lists.
# %% [markdown] lang="zh"
# ## 3. 模型认识的措辞，与意思相同的措辞
#
# 现在测量：48 个新列表，任务的六个模板，再加八种人会给出同样回答的措辞。
# 图中虚线是抛硬币的准确率；若总答 No，在这些列表上的准确率是 0.58。
# %%
REWORDED = (
  Template('no "?"', 'List: {items}. Is there {a_kind} in the list'),
  Template('lower', 'list: {items}. is there {a_kind} in the list?'),
  Template('it', 'List: {items}. Is there {a_kind} in it?'),
  Template('first', 'Is there {a_kind} in this list? {items}'),
  Template('contain', 'List: {items}. Does it contain {a_kind}?'),
  Template('among', 'Is there {a_kind} among these? {items}'),
  Template('please', 'Please say if there is {a_kind} in the list: {items}.'),
  Template('Chinese', '{items}。里面有 {kind} 吗？'),
)


def predict(template, instances=instances):
  """Scores [instances, classes] with the template's own words for classes."""
  words = dict(template.verbalizer)
  options = ', '.join(words.get(c, c) for c in CLASSES)
  prompts = [
    template.text.format(**r.fields, options=options) for r in instances
  ]
  return class_scores(prompts, [words.get(c, c) for c in CLASSES])


scores = {t.name: predict(t) for t in (*task.templates, *REWORDED)}
accuracy = {name: (s.argmax(-1) == truth).mean() for name, s in scores.items()}
for name, value in accuracy.items():
  # A rough interval of 95 %: two standard errors.
  error = 2 * np.sqrt(value * (1 - value) / len(truth))
  print(
    f'{name:8} {value:.2f} +- {error:.2f}, says Yes in '
    f'{(scores[name].argmax(-1) == 0).mean():.2f}'
  )
# %%
PRETRAINING = [t.name for t in task.templates_of('train')]
names = sorted(accuracy, key=accuracy.get)
fig, axis = plt.subplots(figsize=(6.5, 3))
axis.barh(
  names,
  [accuracy[name] for name in names],
  color=['C0' if name in PRETRAINING else 'C1' for name in names],
)
axis.axvline(0.5, color='k', lw=1, ls=':')
axis.set(xlim=(0, 1), xlabel='accuracy (blue: wording of the pretraining)')
fig.tight_layout()
known = np.mean([accuracy[name] for name in PRETRAINING])
new = [accuracy[t.name] for t in REWORDED]
print(
  f'seen wordings {known:.2f}; reworded: mean {np.mean(new):.2f}, '
  f'from {min(new):.2f} to {max(new):.2f}'
)
assert known > 0.7, 'the model should know the task in known words'
assert known > np.mean(new) + 0.05, 'and less in other words'
assert max(new) - min(new) > 0.1, 'equal meanings, unequal accuracy'
# %% [markdown] lang="en"
# A tiny model of bytes is an extreme case, but the effect is known for large
# models as well; it is why T0 and FLAN were trained on many wordings, and why
# the paper behind this package reports the *median over prompts*. A result with
# one prompt is a sample of size one.
#
# ## 4. Sum or mean?
#
# Longer answers have more factors below 1, so a sum punishes them. Dividing by
# the number of tokens (length normalization) punishes short ones that contain a
# hard token. Neither is right in general: if the answers are given as options,
# their probabilities given the prompt are what we want, and the sum is that.
# See how often the choice differs when the verbalizers have unequal lengths:
# %% [markdown] lang="zh"
# 字节级的微型模型是极端情形，但大模型也有这种现象；这正是 T0 和 FLAN
# 用许多措辞训练的原因，也是本代码库所依据的论文报告*多个提示词的中位数*的原因。
# 只用一个提示词的结果，是大小为一的样本。
#
# ## 4. 求和还是平均？
#
# 答案越长，小于 1 的因子越多，求和对它不利。除以 token 数（长度归一化）
# 则对含有难 token 的短答案不利。哪一种都不普遍正确：如果答案是给定的选项，
# 我们要的就是它们在给定提示词下的概率，也就是求和。看看 verbalizer 长度不等时，
# 选择有多少次不同：
# %%
prompts = [task.templates[0].text.format(**r.fields) for r in instances]
for answers in (('Yes', 'No'), ('True', 'False'), ('Yes', 'Not')):
  log_p = [score(prompts, [answer] * len(prompts)) for answer in answers]
  total = np.stack([a.sum(-1) for a in log_p], -1)
  mean = total / [len(tokenizer.encode(answer)) + 1 for answer in answers]
  print(
    f'{str(answers):26} accuracy by sum '
    f'{(total.argmax(-1) == truth).mean():.2f}, by mean '
    f'{(mean.argmax(-1) == truth).mean():.2f}, choices that differ '
    f'{(total.argmax(-1) != mean.argmax(-1)).mean():.2f}'
  )
  if len(set(map(len, answers))) == 1:
    assert (total.argmax(-1) == mean.argmax(-1)).all(), 'equal lengths'
# %% [markdown] lang="en"
# ## 5. Contextual calibration
#
# A model may prefer one answer whatever the question is. Zhao et al.
# (arXiv:2102.09690) measure this preference with a *content-free* prompt (here
# the list is "N/A") and subtract it:
#
# $$\hat y=\arg\max_y\ \log P(y\mid x)-\log P(y\mid x_{\text{N/A}}).$$
#
# For two classes this moves a threshold by a constant. It can only help where
# the answers are unbalanced and the scores still order the lists. The best
# possible threshold (chosen with the labels, so not an allowed method) shows
# how much there is to gain.
# %% [markdown] lang="zh"
# ## 5. Contextual calibration
#
# 不论问什么，模型可能都偏爱某个答案。Zhao 等（arXiv:2102.09690）
# 用*无内容*的提示词（这里列表为 “N/A”）测出这种偏好并减去：
#
# $$\hat y=\arg\max_y\ \log P(y\mid x)-\log P(y\mid x_{\text{N/A}}).$$
#
# 对两类来说，就是把阈值移动一个常数。只有当回答失衡、
# 而分数仍能区分列表的次序时，它才可能有用。最佳阈值（用标签选出，
# 因此不是可用的方法）表明最多能提高多少。
# %%
nothing = {'items': 'N/A', 'kind': 'thing', 'a_kind': 'a thing'}
empty = instances[0]._replace(fields=nothing)
rows = {}
print('          accuracy  calibrated  best threshold')
for template in (*task.templates[-1:], *REWORDED):
  s = scores[template.name]
  margin = s[:, 0] - s[:, 1]  # above 0: Yes
  prior = predict(template, [empty])[0]
  shift = prior[0] - prior[1]
  calibrated = ((margin > shift) == (truth == 0)).mean()
  best = max(
    ((margin > x) == (truth == 0)).mean() for x in [-np.inf, *np.unique(margin)]
  )
  rows[template.name] = accuracy[template.name], calibrated, best
  print(
    f'{template.name:10}{rows[template.name][0]:8.2f}{calibrated:12.2f}'
    f'{best:16.2f}'
  )
  assert best >= max(rows[template.name][:2]) - 1e-9
table = np.array(list(rows.values()))
better, worse = (
  (table[:, 1] > table[:, 0]).sum(),
  (table[:, 1] < table[:, 0]).sum(),
)
print(f'calibration helps {better} wordings and harms {worse}')
assert worse > better, 'here it does not help'


# %% [markdown] lang="en"
# Read the table and not the name of the method: here calibration harms more
# wordings than it helps, since "N/A" is no neutral list for this model. The
# last column is above the first by 0.03 to 0.15: the scores order the lists
# better than the threshold 0 separates them. With a few labelled examples a
# better threshold could be chosen, for a part of this gain.
#
# ## 6. Few-shot prompts
#
# Put $k$ solved examples before the question. GPT-3 (arXiv:2005.14165) showed
# that large language models then do better, without any change of weights. Our
# T5 was never trained on several examples in a row:
# %% [markdown] lang="zh"
# 要看表格，而不是看方法的名字：在这里，校准使更多措辞变差，因为对这个模型来说
# “N/A”不是中性的列表。最后一列比第一列高 0.03 到 0.15：
# 分数排出的次序比用阈值 0 分出的结果更好。
# 用少量有标签的样本可以选择更好的阈值，取得其中一部分提高。
#
# ## 6. Few-shot 提示
#
# 在问题之前放 $k$ 个带答案的例子。GPT-3（arXiv:2005.14165）表明，
# 大语言模型由此变好，而不改变任何权重。我们的 T5 从未用一连串例子训练过：
# %%
def few_shot_prompts(count):
  # Answered by Yes and No in turns.
  examples = draw_instances(task, 80)[48:]
  pool = [[r for r in examples if r.answer == c] for c in CLASSES]
  shots = [pool[i % 2][i // 2] for i in range(count)]
  text = task.templates[0].text
  head = ''.join(f'{text.format(**r.fields)} {r.answer}\n' for r in shots)
  return [head + text.format(**r.fields) for r in instances]


few_shot = {}
for count in (0, 2, 4):
  s = class_scores(few_shot_prompts(count))
  few_shot[count] = (s.argmax(-1) == truth).mean()
  print(f'{count} examples: accuracy {few_shot[count]:.2f}')
assert few_shot[0] >= max(few_shot[2], few_shot[4]), 'examples do not help here'
# %% [markdown] lang="en"
# In-context learning is not a property of the architecture. It comes from
# training data in which earlier parts of a text help to predict later ones.
# SmolLM2 has read such data. It is a decoder: prompt and answer are one text,
# and if the classes differ in their first token it is enough to compare two
# logits after the prompt.
# %% [markdown] lang="zh"
# 上下文学习不是结构的属性。它来自训练数据：文本前面的部分有助于预测后面的部分。
# SmolLM2 读过这样的数据。它是 decoder：提示词和答案是同一段文本；
# 如果各类别的第一个 token 就不同，只要比较提示词之后的两个 logits 即可。
# %%
POSITIVE = (
  'I would go there again tomorrow.',
  'What a wonderful evening, thank you all.',
  'The staff helped us at once and the food was great.',
  'Best book that I have read this year.',
  'It works perfectly and was easy to install.',
  'My children laughed from the beginning to the end.',
)
NEGATIVE = (
  'I want my money back.',
  'We waited for an hour and the soup was cold.',
  'It broke after two days.',
  'A boring film that never ends.',
  'The room was dirty and so loud that nobody slept.',
  'Do not waste your time with this book.',
)
SHOTS = (
  ('The music was lovely and the seats were comfortable.', 'positive'),
  ('The battery is dead after ten minutes.', 'negative'),
  ('They lost our luggage and did not even answer.', 'negative'),
  ('Friendly people, fair prices, I recommend it.', 'positive'),
)
texts = POSITIVE + NEGATIVE
is_positive = np.arange(len(texts)) < len(POSITIVE)
WORDINGS = {
  'plain': 'Review: {}\nSentiment:',
  'question': '{}\nQuestion: Is this review positive or negative?\nAnswer:',
}


def prompts_of(wording, count):
  form = WORDINGS[wording]
  head = ''.join(f'{form.format(a)} {b}\n\n' for a, b in SHOTS[:count])
  return [head + form.format(text) for text in texts]


print(prompts_of('plain', 1)[0])
# %%
smollm2 = moepeft.load('smollm2').loaded
model = smollm2.model
SENTIMENTS = ('positive', 'negative')
classes = [smollm2.tokenizer.encode(' ' + c)[0] for c in SENTIMENTS]
assert classes[0] != classes[1], 'compare more than the first token'


@jax.jit
def next_logits(variables, ids, mask):
  """Logits of the two classes after each row's last token: [b, 2]."""
  ctx = context({'inputs': ids, 'inputs_mask': mask}, 'inputs', ids, False)
  states = model.apply(variables, ids, ctx, method='states')
  last = mask.sum(-1) - 1
  states = jnp.take_along_axis(states, last[:, None, None], axis=1)
  z = model.apply(variables, states, ctx, method='logits')[:, 0]
  return z[:, jnp.array(classes)]


encode = smollm2.prompt_encoder()
smol = {}
for wording, count in itertools.product(WORDINGS, (0, 4)):
  ids = [encode([prompt]) for prompt in prompts_of(wording, count)]
  length = 48 if count == 0 else 160
  z = np.asarray(next_logits(smollm2.variables, *pad(ids, length)))
  right = ((z[:, 0] > z[:, 1]) == is_positive).mean()
  smol[wording, count] = right
  print(
    f'{wording:9} {count} examples: accuracy {right:.2f}, says positive '
    f'in {(z[:, 0] > z[:, 1]).mean():.2f}, {max(map(len, ids))} tokens'
  )
# %% [markdown] lang="en"
# Twelve reviews give an accuracy with an error of about 0.25, so only large
# differences count. Two are checked below. Without examples the worded question
# does worse than the plain form, which means the same. With four examples it
# catches up: they show what form an answer has. The plain form has nothing left
# to gain on such easy reviews, and four examples may even cost it one.
# %% [markdown] lang="zh"
# 十二条评论的准确率误差约为 0.25，所以只有大的差别才算数。下面检查其中两个。
# 没有示例时，带问句的措辞不如意思相同的简单形式。有四个示例时它赶了上来：
# 示例表明了答案的形式。简单形式在这么容易的评论上没有提升空间，
# 四个示例甚至可能让它错一条。
# %%
assert smol['plain', 0] > smol['question', 0] + 0.1, 'the wording matters'
assert smol['question', 4] > smol['question', 0] + 0.1, 'examples help here'
# %% [markdown] lang="en"
# ## 7. What prompts cannot do
#
# The task `stars` gives two adjectives from a guest's review and asks for the
# number of stars, "one" or "five". T5 knows the adjectives from its
# pretraining, but never saw the mapping to stars. No wording of the task brings
# it to the accuracy of always giving the same answer. Here training begins: a
# few thousand adapter parameters learn the mapping (notebooks on LoRA and
# mixtures).
# %% [markdown] lang="zh"
# ## 7. 提示词做不到的事
#
# 任务 `stars` 给出客人评价中的两个形容词，问打几颗星：“one”或“five”。T5
# 在预训练中认识这些形容词，但从未见过到星级的映射。
# 任务的任何措辞都不能使它达到“总给同一答案”的准确率。训练从这里开始：
# 几千个适配器参数就能学会这个映射（见关于 LoRA 和混合专家的笔记）。
# %%
stars = TASKS['stars']
guests = draw_instances(stars, 48)
star_classes = sorted({g.answer for g in guests})
star_truth = np.array([star_classes.index(g.answer) for g in guests])
chance = np.bincount(star_truth).max() / len(guests)
for template in stars.templates:
  s = class_scores(
    [template.text.format(**g.fields) for g in guests], star_classes
  )
  right = (s.argmax(-1) == star_truth).mean()
  print(f'{template.text:55} {right:.2f} (always the same: {chance:.2f})')
  assert right < chance + 0.05, template.name
# %% [markdown] lang="en"
# ## Exercises
#
# 1. *Ensemble of prompts.* Add the margins (section 5, from `scores`) of the
#    five pretraining templates and measure the accuracy. Do the same with the
#    reworded ones. When does averaging help?
# 2. *Order of examples.* Measure SmolLM2 with the wording 'plain' and all
#    orders of the first three examples (six prompts for a review; two reviews
#    are enough). How far do the margins move?
# 3. *Interval.* Write a bootstrap of the accuracy of one template: draw the 48
#    lists 2000 times with replacement, and take the percentiles 2.5 and 97.5 of
#    the accuracies. Then do a *paired* bootstrap of the difference between two
#    templates, with the same lists for both in each draw. Why is the paired
#    interval of the difference narrower than what the two single intervals
#    suggest?
#
# ## Interview questions
#
# **How would you compare two models fairly if results depend on prompts?**
#
# <details><summary>Answer</summary>
#
# Fix a set of prompts before looking, the same for both, and report the
# distribution (median and spread over prompts), not the best; choosing the best
# prompt is tuning and needs validation data. Use each model's own chat template
# if it was trained with one. Give intervals from a paired bootstrap over
# examples, since both models see the same ones. Say how answers were scored
# (sum, mean, generated text and how it was parsed).
#
# </details>
#
# **Few-shot prompting or fine-tuning?**
#
# <details><summary>Answer</summary>
#
# Few-shot: no training, good for few examples and changing tasks; but each
# request pays for the examples in tokens (less with prefix caching), the
# context limits their number, and results depend on their choice and order.
# Fine-tuning (LoRA): needs some hundred examples and a training run, then
# requests are short and results are usually better and steadier. A few labelled
# examples for *measuring* are needed in both cases.
#
# </details>
#
# ## In the package
#
# - {{moepeft.tasks.task.Template}}: templates with verbalizers, seen and held
#   out.
# - {{moepeft.evaluation.rank_classification}}: scores all choices of an example
#   in one pass, by sum, as T0 and the paper do;
#   {{moepeft.evaluation.bootstrap}}: the intervals.
# - {{moepeft.library.Model.log_probs}}: the scores for any model, by
#   {{moepeft.inference.engine.scoring}}.
# - {{moepeft.inference.engine.prefix_cache}}: the common head of few-shot
#   prompts is computed once.
# - {{moepeft.peft.methods.prompt_tuning}}: prompts as trained vectors instead
#   of words.
#
# Papers: GPT-3 2005.14165, T0 2110.08207, calibration 2102.09690, order of
# examples 2104.08786, MoV and MoLoRA 2309.05444.
# %% [markdown] lang="zh"
# ## 练习
#
# 1. *提示词集成。* 把五个预训练模板的 margin（见第 5 节，由 `scores`
#    得到）相加，测量准确率。
#    对改写的措辞也这样做。平均何时有帮助？
# 2. *示例的顺序。* 用措辞 'plain' 和前三个示例的所有排列测量
#    SmolLM2（每条评论六个提示词，两条评论即可）。margin 变化多大？
# 3. *区间。* 对一个模板的准确率做 bootstrap：从 48 个列表有放回地抽样 2000 次，
#    取各次准确率的 2.5% 和 97.5% 分位数。
#    再对两个模板之差做*配对* bootstrap，每次抽样两者用同样的列表。
#    为什么差的配对区间比由两个单独区间推想的要窄？
#
# ## 面试题
#
# **如果结果取决于提示词，怎样公平地比较两个模型？**
#
# <details><summary>答案</summary>
#
# 在看结果之前固定一组提示词，两个模型相同，
# 并报告分布（各提示词的中位数和离散程度），而不是最好的一个；
# 挑选最好的提示词就是调参，需要验证数据。若模型是用对话模板训练的，
# 就用它自己的模板。两个模型看到的是同样的样本，所以用配对 bootstrap 给出区间。
# 说明答案怎样打分（求和、平均，还是生成文本及其解析方法）。
#
# </details>
#
# **用 few-shot 提示还是微调？**
#
# <details><summary>答案</summary>
#
# Few-shot：不需要训练，适合样本少、任务多变的情形；但每个请求都要为示例付 token
# 费用（有前缀缓存时较少），示例数受上下文长度限制，结果依赖示例的选择和顺序。
# 微调（LoRA）：需要几百个样本和一次训练，此后请求很短，结果通常更好、更稳定。
# 两种情况都需要少量有标签的样本用于*测量*。
#
# </details>
#
# ## 在 moepeft 中
#
# - {{moepeft.tasks.task.Template}}：带 verbalizer 的模板，分见过的和留出的。
# - {{moepeft.evaluation.rank_classification}}：
#   一次前向给一个样本的所有选项打分，按求和，与 T0 和论文一致；
#   {{moepeft.evaluation.bootstrap}}：区间。
# - {{moepeft.library.Model.log_probs}}：任意模型的打分，由
#   {{moepeft.inference.engine.scoring}} 实现。
# - {{moepeft.inference.engine.prefix_cache}}：few-shot
#   提示词的公共开头只计算一次。
# - {{moepeft.peft.methods.prompt_tuning}}：用训练得到的向量代替文字作提示。
#
# 论文：GPT-3 2005.14165，T0 2110.08207，校准 2102.09690，示例顺序 2104.08786，
# MoV 与 MoLoRA 2309.05444。
# %% [markdown] lang="en" tags=["solution"]
# # Prompts: solutions
#
# ## Exercise 1
#
# Averaging helps if single errors are independent, and harms if most members
# are near chance with a common bias: their sum has the same bias.
# %% [markdown] lang="zh" tags=["solution"]
# # 提示词：答案
#
# ## 练习 1
#
# 各成员的错误相互独立时，平均有帮助；如果多数成员接近随机、且有共同的偏向，
# 平均则有害：它们的和有同样的偏向。
# %% tags=["solution"]
for name, group in (
  ('pretraining', PRETRAINING),
  ('reworded', [t.name for t in REWORDED]),
):
  margin = sum(scores[g][:, 0] - scores[g][:, 1] for g in group)
  together = ((margin > 0) == (truth == 0)).mean()
  single = [accuracy[g] for g in group]
  print(
    f'{name:12} together {together:.2f}, single {np.mean(single):.2f} '
    f'(from {min(single):.2f} to {max(single):.2f})'
  )
  assert together >= min(single), name
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 2
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 2
# %% tags=["solution"]
form = WORDINGS['plain']
picks = (POSITIVE[0], NEGATIVE[0])
prompts = [
  ''.join(f'{form.format(a)} {b}\n\n' for a, b in order) + form.format(text)
  for order in itertools.permutations(SHOTS[:3])
  for text in picks
]
ids = [encode([prompt]) for prompt in prompts]
z = np.asarray(next_logits(smollm2.variables, *pad(ids, 160)))
margins = (z[:, 0] - z[:, 1]).reshape(6, 2)  # [orders, reviews]
for text, column in zip(picks, margins.T, strict=True):
  print(f'{column.min():6.2f} to {column.max():6.2f}  {text}')
assert margins[:, 0].min() < 0 < margins[:, 0].max(), 'the order decides'
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 3
#
# Both templates answer the same lists, and easy lists are easy for both: the
# errors are correlated, and the common part cancels in the difference.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 3
#
# 两个模板回答同样的列表，容易的列表对两者都容易：错误是相关的，
# 公共部分在差中抵消。
# %% tags=["solution"]
rng = np.random.default_rng(0)
first, second = (
  (scores[name].argmax(-1) == truth).astype(float)
  for name in (PRETRAINING[0], REWORDED[0].name)
)
rows = rng.integers(0, len(truth), (2000, len(truth)))


def interval(values):
  return np.percentile(values, [2.5, 97.5])


single = [interval(a[rows].mean(1)) for a in (first, second)]
paired = interval((first - second)[rows].mean(1))
unpaired = np.sqrt(sum(np.ptp(i) ** 2 for i in single))
print('single', np.round(single, 3).tolist(), 'difference', paired.round(3))
print(f'width: paired {np.ptp(paired):.3f}, if independent {unpaired:.3f}')
covariance = np.cov(first, second)[0, 1]
# Var(a - b) = Var(a) + Var(b) - 2 Cov(a, b); 0.02 for the resampling.
assert (np.ptp(paired) < unpaired + 0.02) or covariance < 0

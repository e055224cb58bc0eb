# SPDX-License-Identifier: Apache-2.0

# %% [markdown] lang="en"
# # Word vectors
#
# The first layer of every language model is a table of vectors, one for each
# token. This notebook shows where useful vectors come from: skip-gram with
# negative sampling (word2vec), FastText's character n-grams and GloVe, each
# with gradients by hand on a small generated corpus. Similarities and analogies
# are measured, also without the convention that makes published analogy scores
# look better than they are.
#
# ## What you will understand
#
# - why one-hot vectors know nothing about similarity, and why an embedding is a
#   matrix product with them
# - what skip-gram with negative sampling maximizes, and why its optimum is a
#   matrix of pointwise mutual information (PMI)
# - how GloVe reaches a similar matrix by weighted least squares
# - how n-grams give a vector to a word that never occurred
# - how far to trust "king - man + woman = queen"
#
# Time: about 75 minutes. Before it: notebook 01 (gradients, Adam).
# %% [markdown] lang="zh"
# # 词向量
#
# 每个语言模型的第一层都是一张向量表，每个 token 一行。
# 本笔记说明有用的向量从何而来：带负采样的 skip-gram（word2vec）、FastText
# 的字符 n-gram 和 GloVe，都在一个小型生成语料上手写梯度。
# 相似度和类比都实际测量，并指出让已发表的类比分数显得偏高的那个惯例。
#
# ## 你将理解什么
#
# - 为什么 one-hot 向量不含任何相似性，为什么 embedding 就是与它的矩阵乘法
# - 带负采样的 skip-gram 最大化什么，为什么其最优解是点互信息（PMI）矩阵
# - GloVe 怎样用加权最小二乘得到类似的矩阵
# - n-gram 怎样给从未出现过的词一个向量
# - “king - man + woman = queen”可以相信到什么程度
#
# 时间：约 75 分钟。先修：笔记 01（梯度、Adam）。
# %%
import itertools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.decomposition import TruncatedSVD

from moepeft.core.types import Context
from moepeft.nn.adapter_hook import AdapterMap
from moepeft.nn.linear import Embedding

plt.rcParams['figure.dpi'] = 72
rng = np.random.default_rng(0)
# %% [markdown] lang="en"
# ## 1. A corpus that we know
#
# The distributional hypothesis: words that occur in the same contexts have
# similar meanings. To see whether vectors find what is there, we generate
# sentences from templates and therefore know what is there: pairs that differ
# by gender, countries with capitals and languages, and verbs with four endings.
# Three verb forms are left out on purpose; FastText will have to guess them.
# %% [markdown] lang="zh"
# ## 1. 一份我们了解的语料
#
# 分布假说：出现在相同上下文中的词，意义相近。
# 为了检验向量是否找到了语料中确有的东西，我们用模板生成句子，
# 因而知道里面有什么：只差性别的词对，国家及其首都和语言，以及带四种词尾的动词。
# 有三个动词形式故意不出现，留给 FastText 去猜。
# %%
PEOPLE = {  # man's word, woman's word: what they do
  ('man', 'woman'): 'works in the office',
  ('king', 'queen'): 'sits on the throne with a crown',
  ('prince', 'princess'): 'waits for the throne in the castle',
  ('boy', 'girl'): 'learns at school with toys',
  ('father', 'mother'): 'comes home to the children',
  ('uncle', 'aunt'): 'brings gifts for the nephew',
  ('actor', 'actress'): 'stands on the stage in a film',
}
COUNTRIES = (
  ('france', 'paris', 'french'),
  ('italy', 'rome', 'italian'),
  ('spain', 'madrid', 'spanish'),
  ('japan', 'tokyo', 'japanese'),
  ('china', 'beijing', 'chinese'),
  ('egypt', 'cairo', 'arabic'),
)
VERBS = {
  'walk': 'park',
  'talk': 'phone',
  'jump': 'fence',
  'cook': 'kitchen',
  'paint': 'wall',
  'clean': 'floor',
  'play': 'garden',
  'help': 'shop',
}
LEFT_OUT = ('jumping', 'cooked', 'plays')


def person():
  pair = list(PEOPLE)[rng.integers(len(PEOPLE))]
  i = rng.integers(2)
  he, his = (('he', 'his'), ('she', 'her'))[i]
  name, action = pair[i], PEOPLE[pair]
  return rng.choice(
    [
      f'the {name} {action}',
      f'{he} is the {name} and {he} {action}',
      f'the {name} lost {his} hat and {he} took {his} coat',
      f'{he} says that the {name} loves {his} friends',
    ]
  )


def country():
  place, capital, language = COUNTRIES[rng.integers(len(COUNTRIES))]
  return rng.choice(
    [
      f'{capital} is the capital city of {place}',
      f'people in {place} speak {language}',
      f'we flew to {capital} the largest city of {place}',
      f'the country {place} has {language} newspapers',
      f'the streets of the city {capital} are full of {language} signs',
    ]
  )


def verb():
  stem = list(VERBS)[rng.integers(len(VERBS))]
  forms = {
    stem: 'they often {}',
    stem + 's': 'every day somebody {}',
    stem + 'ed': 'yesterday we {}',
    stem + 'ing': 'now you are {}',
  }
  form = rng.choice([form for form in forms if form not in LEFT_OUT])
  return f'{forms[form].format(form)} at the {VERBS[stem]}'


sentences = [(person, country, verb)[i % 3]().split() for i in range(9000)]
words = sorted({word for sentence in sentences for word in sentence})
index = {word: i for i, word in enumerate(words)}
print(
  ' '.join(sentences[0]),
  '|',
  ' '.join(sentences[1]),
  '|',
  ' '.join(sentences[2]),
)
print(sum(map(len, sentences)), 'words,', len(words), 'different')
# %% [markdown] lang="en"
# ## 2. One-hot vectors and embeddings
#
# A word as a vector $o_w$ with a single 1, at the place of $w$ in the
# vocabulary of $v$ words, has the same distance from every other word. An
# embedding is a linear map of it, $E\in\mathbb{R}^{v\times d}$; since $o_wE$ is
# row $w$ of $E$, no library computes the product: it reads the row. Let the
# rows of $O$ be the one-hot vectors of a text, $y=OE$, and $\bar y$ the
# gradient of $y$ (notebook 01). Then $\bar E=O^\top\bar y$: the gradient adds
# $\bar y$ to the rows that were read. The package's layer does the same:
# %% [markdown] lang="zh"
# ## 2. One-hot 向量与 embedding
#
# 词表有 $v$ 个词。把词 $w$ 表示成只在自己的位置为 1 的向量 $o_w$，
# 它到任何别的词的距离都一样。embedding 是它的线性映射
# $E\in\mathbb{R}^{v\times d}$；由于 $o_wE$ 就是 $E$ 的第 $w$ 行，
# 没有库会真的做乘法，而是直接读那一行。设 $O$ 的各行是一段文本的 one-hot 向量，
# $y=OE$，$\bar y$ 是 $y$ 的梯度（笔记 01），则 $\bar E=O^\top\bar y$：
# 梯度把 $\bar y$ 加到被读取的行上。代码库的层也是如此：
# %%
ids = np.array([[index[word] for word in ('king', 'queen', 'king')]])
one_hot = np.eye(len(words), dtype=np.float32)[ids]  # [b, t, v]
assert one_hot[0, 0] @ one_hot[0, 1] == 0, 'different words are orthogonal'
table = rng.standard_normal((len(words), 8)).astype(np.float32)
layer = Embedding(len(words), 8, AdapterMap())


def embed(table):
  return layer.apply({'params': {'embedding': table}}, ids, Context())


assert np.allclose(one_hot @ table, embed(table), atol=1e-6)
grad = rng.standard_normal((1, 3, 8)).astype(np.float32)
_, pull = jax.vjp(embed, jnp.asarray(table))
by_hand = np.einsum('btv,btd->vd', one_hot, grad)
assert np.allclose(by_hand, pull(jnp.asarray(grad))[0], atol=1e-6)
# %% [markdown] lang="en"
# ## 3. Skip-gram with negative sampling
#
# Take each word $w$ and each word $c$ within a window around it: a *positive*
# pair. For each, draw $k$ *negative* words from a noise distribution
# $P_c\propto\mathrm{count}(c)^{3/4}$. Every word has two vectors, also written
# $w$ as a center and $c$ as a context, and a logistic regression on $w\cdot c$,
# with $\sigma(s)=1/(1+e^{-s})$, should tell positive from negative pairs
# (Mikolov et al., arXiv:1310.4546):
#
# $$J=\sum_{(w,c)}\Big[\log\sigma(w\cdot c)
# +k\,\mathbb{E}_{c'\sim P}\log\sigma(-w\cdot c')\Big].$$
#
# word2vec takes one pair at a time. Our vocabulary is so small that we can sum
# all pairs first. Let $X_{wc}$ be the number of positive pairs of $w$ and $c$,
# and $X_w=\sum_cX_{wc}$; then $k\,X_wP_c$ negative ones are expected. With all
# center vectors as the rows of $W$ `[v, d]`, all context vectors as those of
# $C$, $S=WC^\top\in\mathbb{R}^{v\times v}$ and a bar for the gradient of $J$,
#
# $$J=\sum_{w,c}X_{wc}\log\sigma(S_{wc})+k\,X_wP_c\log\sigma(-S_{wc}),$$
# $$\frac{\partial J}{\partial S_{wc}}=
# X_{wc}\,\big(1-\sigma(S_{wc})\big)-k\,X_wP_c\,\sigma(S_{wc}),
# \qquad\bar W=\bar S\,C,\quad\bar C=\bar S^\top W .$$
# %% [markdown] lang="zh"
# ## 3. 带负采样的 skip-gram
#
# 取每个词 $w$ 和它窗口内的每个词 $c$：这是一个*正*例对。对每个正例，
# 再从噪声分布 $P_c\propto\mathrm{count}(c)^{3/4}$ 抽 $k$ 个*负*例词。
# 每个词有两个向量：作为中心词的向量（也记作 $w$）和作为上下文的向量（也记作
# $c$），用 $w\cdot c$ 的 logistic 回归来区分正例和负例，其中
# $\sigma(s)=1/(1+e^{-s})$（Mikolov 等，arXiv:1310.4546）：
#
# $$J=\sum_{(w,c)}\Big[\log\sigma(w\cdot c)
# +k\,\mathbb{E}_{c'\sim P}\log\sigma(-w\cdot c')\Big].$$
#
# word2vec 一次取一对。我们的词表很小，可以先把所有词对加起来：
# 设 $X_{wc}$ 是 $w$ 与 $c$ 的正例个数，$X_w=\sum_cX_{wc}$，
# 则负例个数的期望是 $k\,X_wP_c$。$W$ `[v, d]` 的各行是所有中心词向量，
# $C$ 的各行是所有上下文向量，$S=WC^\top\in\mathbb{R}^{v\times v}$，
# 上划线表示 $J$ 的梯度，则
#
# $$J=\sum_{w,c}X_{wc}\log\sigma(S_{wc})+k\,X_wP_c\log\sigma(-S_{wc}),$$
# $$\frac{\partial J}{\partial S_{wc}}=
# X_{wc}\,\big(1-\sigma(S_{wc})\big)-k\,X_wP_c\,\sigma(S_{wc}),
# \qquad\bar W=\bar S\,C,\quad\bar C=\bar S^\top W .$$
# %%
WINDOW, K, D = 4, 5, 16
V = len(words)
X = np.zeros((V, V))
for sentence in sentences:
  row = [index[word] for word in sentence]
  for i, j in itertools.combinations(range(len(row)), 2):
    if j - i <= WINDOW:
      X[row[i], row[j]] += 1
      X[row[j], row[i]] += 1
noise = X.sum(0) ** 0.75
noise /= noise.sum()
negatives = K * X.sum(1)[:, None] * noise  # expected number of each pair


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def sgns(w, c):
  """The negative objective per pair and its gradients."""
  s = w @ c.T
  value = X * np.logaddexp(0, -s) + negatives * np.logaddexp(0, s)
  grad = negatives * sigmoid(s) - X * sigmoid(-s)
  scale = 1 / X.sum()
  return value.sum() * scale, grad @ c * scale, grad.T @ w * scale


def jax_sgns(w, c):
  s = w @ c.T
  value = X * jnp.logaddexp(0, -s) + negatives * jnp.logaddexp(0, s)
  return value.sum() / X.sum()


w, c = rng.standard_normal((2, V, D)) * 0.3
expected = jax.grad(jax_sgns, argnums=(0, 1))(jnp.asarray(w), jnp.asarray(c))
for hand, reference in zip(sgns(w, c)[1:], expected, strict=True):
  assert np.abs(hand - reference).max() < 1e-6, 'sign of the two terms?'
# %% [markdown] lang="en"
# Does the sum really replace sampling? Draw pairs and negatives as word2vec
# does, and compare the average gradient of $S$ with the formula.
# %% [markdown] lang="zh"
# 求和真的可以代替采样吗？像 word2vec 那样抽取正例和负例，把 $S$
# 的平均梯度与公式比较。
# %%
DRAWS = 100_000
s = w @ c.T
pairs = rng.choice(V * V, DRAWS, p=(X / X.sum()).ravel())
centers, contexts = np.unravel_index(pairs, (V, V))
sample_mean = np.zeros((V, V))
np.add.at(sample_mean, (centers, contexts), -sigmoid(-s[centers, contexts]))
for _ in range(K):
  draws = rng.choice(V, DRAWS, p=noise)
  np.add.at(sample_mean, (centers, draws), sigmoid(s[centers, draws]))
exact = (negatives * sigmoid(s) - X * sigmoid(-s)) / X.sum()
correlation = np.corrcoef(sample_mean.ravel(), exact.ravel())[0, 1]
print(f'correlation of sampled and exact gradient: {correlation:.3f}')
assert correlation > 0.97, 'the mean of the samples is the exact gradient'


# %%
def minimize(f, arrays, steps=600, lr=0.05):
  """Adam; f(*arrays) -> (value, *gradients)."""
  arrays = [a.copy() for a in arrays]
  m, v = ([np.zeros_like(a) for a in arrays] for _ in range(2))
  for n in range(1, steps + 1):
    value, *grads = f(*arrays)
    rate = lr * (1 - n / (steps + 1))
    for i, g in enumerate(grads):
      m[i] = 0.9 * m[i] + 0.1 * g
      v[i] = 0.999 * v[i] + 0.001 * g * g
      scaled = m[i] / (1 - 0.9**n) / (np.sqrt(v[i] / (1 - 0.999**n)) + 1e-8)
      arrays[i] = arrays[i] - rate * scaled
  return value, arrays


start = rng.standard_normal((2, V, D)) * 0.3
before = sgns(*start)[0]
after, (w, c) = minimize(sgns, start)
print(f'objective {before:.3f} -> {after:.3f}')
assert after < before - 0.5


def nearest(vectors, query, count=4, without=()):
  """The words with the largest cosine similarity to a vector."""
  unit = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
  order = np.argsort(-(unit @ query))
  return [words[i] for i in order if words[i] not in without][:count]


for word in ('king', 'paris', 'italian', 'walked'):
  print(f'{word:8}', nearest(w, w[index[word]], without=(word,)))
# %% [markdown] lang="en"
# ## 4. What it has learned: PMI
#
# Set $\partial J/\partial S_{wc}=0$. With $\sigma(s)/(1-\sigma(s))=e^s$ this
# gives
#
# $$S_{wc}=\log\frac{X_{wc}}{X_w\,P_c}-\log k .$$
#
# The first term is the pointwise mutual information of $w$ and $c$ (with the
# smoothed noise): how much more often they occur together than by chance.
# Skip-gram is thus a factorization of the PMI matrix with rank $d$ (Levy and
# Goldberg, 2014). Check that the gradient vanishes there, and how near the
# trained $WC^\top$ of rank 16 comes to it on the pairs that occur.
# %% [markdown] lang="zh"
# ## 4. 它学到了什么：PMI
#
# 令 $\partial J/\partial S_{wc}=0$。由 $\sigma(s)/(1-\sigma(s))=e^s$ 得
#
# $$S_{wc}=\log\frac{X_{wc}}{X_w\,P_c}-\log k .$$
#
# 第一项是 $w$ 与 $c$ 的点互信息（使用平滑后的噪声分布）：
# 它们共同出现的频率比随机高多少。所以 skip-gram 是 PMI 矩阵的秩 $d$ 分解（Levy
# 和 Goldberg，2014）。检验梯度在那里为零，以及训练得到的秩 16 的 $WC^\top$
# 在出现过的词对上与它有多接近。
# %%
is_pair = X > 0
pmi = np.log(X[is_pair] / (X.sum(1)[:, None] * noise)[is_pair])
optimum = pmi - np.log(K)
gradient = negatives[is_pair] * sigmoid(optimum) - X[is_pair] * sigmoid(
  -optimum
)
assert np.abs(gradient).max() < 1e-8 * X.max(), 'PMI - log k is the optimum'
weight = X[is_pair] / X.sum()  # frequent pairs matter more in the objective
s = (w @ c.T)[is_pair]
centered = [a - (weight * a).sum() for a in (s, optimum)]
correlation = (weight * centered[0] * centered[1]).sum() / np.sqrt(
  np.prod([(weight * a * a).sum() for a in centered])
)
print(f'correlation of W C^T with PMI - log k: {correlation:.3f}')
assert correlation > 0.85
# %% [markdown] lang="en"
# ## 5. GloVe
#
# GloVe (Pennington et al., 2014) starts from the counts and fits their
# logarithms by least squares, with a bias for each word, because
# $\log X_{wc}=\mathrm{PMI}+\log X_w+\log X_c+$ const:
#
# $$J=\sum_{X_{wc}>0}f(X_{wc})\,\big(w\cdot c+a_w+b_c-\log X_{wc}\big)^2,\qquad
# f(x)=\min\big((x/x_{\max})^{3/4},\,1\big).$$
#
# $a_w$ and $b_c$ are the biases, and $x_{\max}=100$. The weight $f$ keeps rare
# pairs from dominating with their noise, and frequent ones from dominating by
# number. Pairs that never occur are left out; in skip-gram they are the
# negatives. The gradient is that of a linear regression.
# %% [markdown] lang="zh"
# ## 5. GloVe
#
# GloVe（Pennington 等，2014）从计数出发，用最小二乘拟合其对数，
# 每个词带一个偏置，因为 $\log X_{wc}=\mathrm{PMI}+\log X_w+\log X_c+$ 常数：
#
# $$J=\sum_{X_{wc}>0}f(X_{wc})\,\big(w\cdot c+a_w+b_c-\log X_{wc}\big)^2,\qquad
# f(x)=\min\big((x/x_{\max})^{3/4},\,1\big).$$
#
# $a_w$、$b_c$ 是偏置，$x_{\max}=100$。权重 $f$ 使罕见的对不会因噪声而主导，
# 高频的对不会因数量而主导。从不出现的对被略去；在 skip-gram 中它们就是负例。
# 梯度就是线性回归的梯度。
# %%
f = np.minimum((X / 100) ** 0.75, 1)
log_x = np.log(np.maximum(X, 1))


def glove(w, c, a, b):
  error = w @ c.T + a[:, None] + b - log_x
  grad = 2 * f * error / is_pair.sum()
  value = (f * error**2).sum() / is_pair.sum()
  return value, grad @ c, grad.T @ w, grad.sum(1), grad.sum(0)


start = [*(rng.standard_normal((2, V, D)) * 0.3), np.zeros(V), np.zeros(V)]
before, *gradients = glove(*start)
expected = jax.grad(
  lambda w, c, a, b: (
    jnp.sum(f * (w @ c.T + a[:, None] + b - log_x) ** 2) / is_pair.sum()
  ),
  argnums=(0, 1, 2, 3),
)(*map(jnp.asarray, start))
for hand, reference in zip(gradients, expected, strict=True):
  assert np.abs(hand - reference).max() < 1e-5
after, glove_arrays = minimize(glove, start)
glove_vectors = glove_arrays[0] + glove_arrays[1]  # the paper adds both
print(f'objective {before:.3f} -> {after:.4f}')
assert after < before / 20
# A baseline without training: the SVD of the positive PMI matrix.
ppmi = np.zeros((V, V))
ppmi[is_pair] = np.maximum(pmi, 0)
svd_vectors = TruncatedSVD(D, random_state=0).fit_transform(ppmi)
# %% [markdown] lang="en"
# ## 6. Analogies, measured honestly
#
# "$a$ is to $b$ as $a'$ is to ?" is answered by the word nearest to $b-a+a'$.
# The usual test removes $a$, $b$ and $a'$ from the candidates. That matters:
# often the nearest word is $a'$ itself, since $b-a$ is short compared with it.
# We measure both: the columns of the three kinds follow the usual test, and the
# last one is their mean if the inputs may be answers.
# %% [markdown] lang="zh"
# ## 6. 类比：诚实地测量
#
# “$a$ 之于 $b$，如同 $a'$ 之于 ?”，答案取离 $b-a+a'$ 最近的词。惯常的测试会把
# $a$、$b$、$a'$ 从候选中去掉。这很关键：最近的词往往就是 $a'$ 自己，因为 $b-a$
# 相比之下很短。两种都测：三类各自的列按惯常的测试，
# 最后一列是允许输入词作为答案时三类的平均。
# %%
PAIRS = {
  'gender': [pair for pair in PEOPLE],
  'capital': [(a, b) for a, b, _ in COUNTRIES],
  'language': [(a, b) for a, _, b in COUNTRIES],
}


def analogy_accuracy(vectors, pairs, exclude=True):
  unit = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
  hits = []
  for (a, b), (a2, b2) in itertools.permutations(pairs, 2):
    query = unit[index[b]] - unit[index[a]] + unit[index[a2]]
    without = (a, b, a2) if exclude else ()
    hits.append(nearest(vectors, query, 1, without) == [b2])
  return np.mean(hits)


models = {'skip-gram': w, 'GloVe': glove_vectors, 'SVD of PPMI': svd_vectors}
accuracy = {}
print(f'{"":12}', *(f'{name:>9}' for name in PAIRS), '  inputs allowed')
for name, vectors in models.items():
  row = [analogy_accuracy(vectors, pairs) for pairs in PAIRS.values()]
  lenient = np.mean(
    [
      analogy_accuracy(vectors, pairs, exclude=False)
      for pairs in PAIRS.values()
    ]
  )
  accuracy[name] = np.mean(row), lenient
  print(f'{name:12}', *(f'{value:9.2f}' for value in row), f'{lenient:9.2f}')
# By chance: one of more than 100 words.
assert accuracy['skip-gram'][0] > 0.4, 'skip-gram should be far above chance'
assert all(lenient < strict for strict, lenient in accuracy.values())
assert accuracy['GloVe'][0] < accuracy['skip-gram'][0]
# %% [markdown] lang="en"
# Skip-gram solves the analogies of gender and capitals, not those of languages
# (exercise 2 changes the window). GloVe has brought its objective almost to
# zero and has the lowest mean: a good fit of the counts is not yet a good
# geometry. It leaves out the pairs that never occur, and in a corpus of
# templates these say most. With large natural corpora the methods come closer
# together. The last column is below the mean of the others for every model: a
# good part of a published analogy score is the rule that the inputs may not be
# answers.
#
# The figure shows skip-gram vectors in the plane of their two principal axes.
# Each line joins the words of a pair; an analogy works where the lines are
# nearly parallel and of one length.
# %% [markdown] lang="zh"
# skip-gram 能解决性别和首都的类比，但解决不了语言的（练习 2 改变窗口）。GloVe
# 的目标函数几乎降到了零，平均分却最低：很好地拟合计数，还不等于好的几何结构。
# 它略去从不出现的词对，而在模板语料中，这些词对恰恰信息最多。在大型自然语料上，
# 各种方法更接近。每种模型的最后一列都低于前几列的平均：已发表的类比分数，
# 有相当一部分来自“输入词不得作为答案”这条规则。
#
# 图中是 skip-gram 向量在两个主轴所张平面上的位置。每条线连接一对词；
# 各条线近似平行且等长时，类比成立。
# %%
fig, axes = plt.subplots(1, 2, figsize=(7, 3))
for axis, kind in zip(axes, ('gender', 'capital'), strict=True):
  pairs = PAIRS[kind]
  points = w[[index[word] for pair in pairs for word in pair]]
  points = points - points.mean(0)
  plane = points @ np.linalg.svd(points)[2][:2].T  # two principal axes
  for i, pair in enumerate(pairs):
    axis.plot(*plane[2 * i : 2 * i + 2].T, 'o-', ms=3, lw=0.8)
    for word, point in zip(pair, plane[2 * i : 2 * i + 2], strict=True):
      axis.annotate(word, point, fontsize=7)
  axis.set(title=kind, xticks=[], yticks=[])
fig.tight_layout()


# %% [markdown] lang="en"
# ## 7. FastText: words are made of n-grams
#
# A table has no row for "jumping" if it never occurred. FastText (Bojanowski et
# al., arXiv:1607.04606) gives a vector $z_g$ to every character n-gram of 3 to
# 6 letters and sums them: $w=\sum_{g\in w}z_g$, with `<` and `>` as marks of
# the ends, and the whole word as one more n-gram. Let $Z$ have the vectors of
# all n-grams as rows, and let $M$ `[words, n-grams]` have a 1 where the word
# contains the n-gram. Then $W=MZ$ and $\bar Z=M^\top\bar W$: one line more than
# skip-gram. The code divides each row of $M$ by the root of its number of ones,
# so that long words do not get longer vectors.
# %% [markdown] lang="zh"
# ## 7. FastText：词由 n-gram 组成
#
# 如果 “jumping”从未出现，表里就没有它的行。FastText（Bojanowski 等，
# arXiv:1607.04606）给每个 3 到 6 个字母的字符 n-gram 一个向量 $z_g$，再求和：
# $w=\sum_{g\in w}z_g$，用 `<` 和 `>` 标记词的首尾，整个词也算一个 n-gram。
# 设 $Z$ 的各行是所有 n-gram 的向量，矩阵 $M$ `[词, n-gram]` 在词含有该 n-gram
# 处为 1，则 $W=MZ$，$\bar Z=M^\top\bar W$：只比 skip-gram 多一行。
# 代码把 $M$ 的每一行除以其中 1 的个数的平方根，使长的词不会得到更长的向量。
# %%
def ngrams(word):
  marked = f'<{word}>'
  grams = {
    marked[i : i + n] for n in range(3, 7) for i in range(len(marked) - n + 1)
  }
  return grams | {marked}


grams = sorted(set().union(*map(ngrams, words)))
gram_index = {gram: i for i, gram in enumerate(grams)}


def gram_row(word):
  """0 or 1 for each known n-gram, scaled to keep the sum's length."""
  row = np.zeros(len(grams))
  row[[gram_index[gram] for gram in ngrams(word) if gram in gram_index]] = 1
  return row / np.sqrt(row.sum())


M = np.stack([gram_row(word) for word in words])


def fasttext(z, c):
  value, grad_w, grad_c = sgns(M @ z, c)
  return value, M.T @ grad_w, grad_c


start = [
  rng.standard_normal((len(grams), D)) * 0.3,
  rng.standard_normal((V, D)) * 0.3,
]
after, (z, _) = minimize(fasttext, start)
fasttext_vectors = M @ z
print(f'{len(grams)} n-grams, objective {after:.3f}')
stems = list(VERBS)
for word in LEFT_OUT:
  assert word not in index
  neighbours = nearest(fasttext_vectors, gram_row(word) @ z, 4)
  stem = next(stem for stem in stems if word.startswith(stem))
  print(f'{word:8} (never seen): {neighbours}')
  assert any(neighbour.startswith(stem) for neighbour in neighbours), word


# %% [markdown] lang="en"
# The letters give a vector, and another form of the verb is among its nearest
# words. They also mislead: words that look alike but mean different things
# start with similar vectors, and only the whole-word n-gram can separate them.
# Language models solve the problem of unseen words in another way, by subword
# tokens (notebook 05), and that of several meanings by attention: in this
# notebook "play" has one vector in a theater and in a garden.
#
# ## Exercises
#
# 1. *A common direction.* Compute the mean cosine similarity of all pairs of
#    different words for skip-gram, subtract the mean vector from all, and
#    compute it again. How do the analogies change?
# 2. *Window size.* Count with windows of 1 and of 8 and train skip-gram again
#    (`sgns` reads the globals `X` and `negatives`). Compare the accuracy of the
#    three kinds of analogies.
# 3. *Subsampling.* Frequent words ("the") fill the windows. Multiply $X_{wc}$
#    by $\rho_w\rho_c$, $\rho_w=\min(1,\sqrt{\tau/p_w})$ with $p_w$ the share of
#    $w$ in the corpus and $\tau=0.005$, which is word2vec's subsampling in
#    expectation. Which share of the pairs remains, and what do analogies say?
#
# ## Interview questions
#
# **Why does word2vec use negative sampling instead of a softmax?**
#
# <details><summary>Answer</summary>
#
# A softmax over the vocabulary needs $v$ dot products for each pair, for its
# denominator. Negative sampling replaces the question "which of $v$ words?" by
# $k+1$ binary ones, so a step costs $O(kd)$ instead of $O(vd)$. The price is
# that it does not estimate $P(c\mid w)$: its optimum is PMI shifted by
# $\log k$. (Noise-contrastive estimation does estimate probabilities.) Language
# models need probabilities and pay for the softmax.
#
# </details>
#
# **Static word vectors or the hidden states of a transformer: when are the
# former enough?**
#
# <details><summary>Answer</summary>
#
# Static vectors have one vector per word: no word senses, no word order, no
# negation. They are enough for keyword expansion, as features with little data,
# or where a model must run in microseconds. Sentences are better represented by
# a trained encoder; averages of word vectors are a strong but order-blind
# baseline. Both carry the associations of their corpus, biases included.
#
# </details>
#
# ## In the package
#
# - {{moepeft.nn.linear.Embedding}}: the table, a site for adapters.
#   {{moepeft.nn.linear.Head}}: the way back from vectors to words, often with
#   the same table (tied), as $w\cdot c$ here.
# - {{moepeft.peft.methods.tokens}} and {{moepeft.peft.methods.prompt_tuning}}:
#   new rows, or free vectors before the text, trained while the table is
#   frozen.
# - {{moepeft.serve.embeddings.encoder}}: vectors of whole texts by a
#   transformer, served under `/v1/embeddings`.
#
# Papers: word2vec 1301.3781 and 1310.4546, FastText 1607.04606. Not on arXiv:
# GloVe (EMNLP 2014), Levy and Goldberg (NeurIPS 2014).
# %% [markdown] lang="zh"
# 字母给出了向量，它最近的词里有该动词的其他形式。字母也会误导：形似而义异的词，
# 起点就相近，只能靠整词 n-gram 分开。语言模型用另一种办法解决未见词的问题：子词
# token（笔记 05）；多义问题则靠注意力解决：在本笔记中，“play”
# 无论在剧院还是花园里都只有一个向量。
#
# ## 练习
#
# 1. *共有的方向。* 计算 skip-gram 所有不同词对的平均余弦相似度；
#    再把所有向量减去平均向量后重算。类比结果怎样变化？
# 2. *窗口大小。* 分别用窗口 1 和 8 计数，
#    重新训练 skip-gram（`sgns` 读取全局变量 `X` 和 `negatives`），
#    比较三类类比的准确率。
# 3. *下采样。* 高频词（“the”）占满窗口。把 $X_{wc}$ 乘以 $\rho_w\rho_c$，其中
#    $\rho_w=\min(1,\sqrt{\tau/p_w})$，$p_w$ 是 $w$ 在语料中的占比，
#    $\tau=0.005$；这就是 word2vec 下采样的期望形式。还剩多少比例的词对？
#    类比结果如何？
#
# ## 面试题
#
# **word2vec 为什么用负采样而不用 softmax？**
#
# <details><summary>答案</summary>
#
# 对词表做 softmax，每个词对都要为分母计算 $v$ 个内积。负采样把“$v$
# 个词中的哪一个”换成 $k+1$ 个二分类问题，一步的代价从 $O(vd)$ 降到 $O(kd)$。
# 代价是它不再估计 $P(c\mid w)$：其最优解是平移了 $\log k$ 的 PMI。
# （噪声对比估计 NCE 可以估计概率。）语言模型需要概率，所以付出 softmax 的代价。
#
# </details>
#
# **静态词向量与 transformer 的隐藏状态：什么时候前者就够了？**
#
# <details><summary>答案</summary>
#
# 静态向量一词一向量：没有词义区分、没有词序、没有否定。用于关键词扩展、
# 数据很少时的特征、或必须在微秒内完成的场合，它就够了。句子更适合用训练过的
# encoder 表示；词向量平均是很强但不分词序的基线。两者都带有语料中的联想，
# 包括偏见。
#
# </details>
#
# ## 在 moepeft 中
#
# - {{moepeft.nn.linear.Embedding}}：向量表，也是适配器的挂载点。
#   {{moepeft.nn.linear.Head}}：从向量回到词，常与 embedding 共享同一张表，
#   如同这里的 $w\cdot c$。
# - {{moepeft.peft.methods.tokens}} 与 {{moepeft.peft.methods.prompt_tuning}}：
#   冻结整张表，只训练新的行，或训练放在文本之前的自由向量。
# - {{moepeft.serve.embeddings.encoder}}：用 transformer 得到整段文本的向量，经
#   `/v1/embeddings` 提供服务。
#
# 论文：word2vec 1301.3781 与 1310.4546，FastText 1607.04606；GloVe（EMNLP
# 2014）以及 Levy 和 Goldberg（NeurIPS 2014）不在 arXiv 上。
# %% [markdown] lang="en" tags=["solution"]
# # Word vectors: solutions
#
# ## Exercise 1
#
# A common direction of all vectors raises every cosine and says nothing.
# Analogies use differences, from which it cancels, up to the length to which
# vectors are scaled.
# %% [markdown] lang="zh" tags=["solution"]
# # 词向量：答案
#
# ## 练习 1
#
# 所有向量共有的方向会抬高每个余弦，却不含信息。类比用的是差，它在差中消去，
# 只剩归一化长度带来的影响。
# %% tags=["solution"]
def mean_cosine(vectors):
  unit = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
  return ((unit @ unit.T).sum() - V) / (V * (V - 1))


without_mean = w - w.mean(0)
for name, vectors in (('as trained', w), ('without mean', without_mean)):
  row = [analogy_accuracy(vectors, pairs) for pairs in PAIRS.values()]
  print(
    f'{name:13} mean cosine {mean_cosine(vectors):.2f}, analogies',
    np.round(row, 2),
  )
assert abs(mean_cosine(without_mean)) < abs(mean_cosine(w))
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 2
#
# The functions above read the global arrays `X` and `negatives`, so they are
# replaced. A window of 1 sees mostly function words and syntax. A window of 8
# covers whole sentences of this corpus, and the printed accuracy of languages
# rises with it.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 2
#
# 上面的函数读取全局数组 `X` 和 `negatives`，所以替换它们即可。窗口为 1
# 时看到的多是虚词和句法。窗口为 8 时能覆盖本语料的整个句子，
# 打印出的语言类比准确率随之上升。
# %% tags=["solution"]
original = X.copy(), negatives.copy()


def use_counts(counts):
  global X, negatives
  noise = counts.sum(0) ** 0.75
  X = counts
  negatives = K * X.sum(1)[:, None] * noise / noise.sum()


def train_and_report(name):
  start = np.random.default_rng(1).standard_normal((2, V, D)) * 0.3
  _, (vectors, _) = minimize(sgns, start)
  row = [analogy_accuracy(vectors, pairs) for pairs in PAIRS.values()]
  print(
    f'{name:12}', *(f'{k} {x:.2f}' for k, x in zip(PAIRS, row, strict=True))
  )
  return vectors


for window in (1, 8):
  counts = np.zeros((V, V))
  for sentence in sentences:
    row = [index[word] for word in sentence]
    for i, j in itertools.combinations(range(len(row)), 2):
      if j - i <= window:
        counts[row[i], row[j]] += 1
        counts[row[j], row[i]] += 1
  assert (counts.sum() > original[0].sum()) == (window > WINDOW)
  use_counts(counts)
  train_and_report(f'window {window}')
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 3
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 3
# %% tags=["solution"]
share = np.zeros(V)
for sentence in sentences:
  for word in sentence:
    share[index[word]] += 1
share /= share.sum()
rate = np.minimum(1, np.sqrt(0.005 / share))
remaining = original[0] * rate[:, None] * rate
print(
  f'{remaining.sum() / original[0].sum():.2f} of the pairs remain;',
  'lowest rate:',
  words[rate.argmin()],
  round(rate.min(), 2),
)
assert words[rate.argmin()] == 'the' and remaining.sum() < original[0].sum()
use_counts(remaining)
train_and_report('subsampled')
X, negatives = original

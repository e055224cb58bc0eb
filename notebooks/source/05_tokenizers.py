# SPDX-License-Identifier: Apache-2.0

# %% [markdown] lang="en"
# # Tokenizers
#
# A language model reads integers. This notebook writes the three algorithms
# that turn text into them: byte-level BPE (GPT, Llama 3, Qwen), WordPiece
# (BERT) and Unigram (T5, XLM-R). BPE is trained from nothing and gives the same
# merges and the same ids as the library `tokenizers`; the other two are
# compared with it as well. Then you measure what tokenization does to numbers
# and to Chinese.
#
# ## What you will understand
#
# - why text is first turned into UTF-8 bytes, and why byte-level tokenizers
#   need no unknown token
# - how BPE training picks its merges, including ties, and how encoding replays
#   them
# - how WordPiece encodes, and how its training criterion differs from BPE's
# - how Unigram finds the most probable segmentation (Viterbi) and learns its
#   probabilities (EM)
# - why numbers and Chinese cost more tokens, and what is done about it
#
# Time: about 75 minutes. Before it: Python and, for section 8, probabilities
# and their logarithms.
# %% [markdown] lang="zh"
# # 分词器
#
# 语言模型读的是整数。本笔记实现把文本变成整数的三种算法：字节级 BPE（GPT、Llama
# 3、Qwen）、WordPiece（BERT）和 Unigram（T5、XLM-R）。BPE 从零训练，得到与
# `tokenizers` 库相同的 merges 和相同的 id；另外两种也与该库比较。
# 最后测量分词对数字和中文的影响。
#
# ## 你将理解什么
#
# - 为什么先把文本变成 UTF-8 字节，为什么字节级分词器不需要 unknown token
# - BPE 训练怎样选择合并（包括频次相同时的规则），编码时怎样重放这些合并
# - WordPiece 怎样编码，它的训练准则与 BPE 有何不同
# - Unigram 怎样找出概率最大的切分（Viterbi），又怎样学到概率（EM）
# - 为什么数字和中文要花更多 token，有哪些应对办法
#
# 时间：约 75 分钟。先修：会 Python；第 8 节要用到概率及其对数。
# %%
import json
import math
import re
import warnings
from collections import Counter

import matplotlib.pyplot as plt
import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from moepeft.core import files
from moepeft.data import load_tokenizer
from moepeft.data.tokenizers.tokenizer import ByteTokenizer

plt.rcParams['figure.dpi'] = 72
# A progress bar asks for ipywidgets, which are not needed here.
warnings.filterwarnings('ignore', 'IProgress not found')
path = files.local_path('package:text') + '/text.txt'
with open(path, encoding='utf-8') as file:
  text = file.read()[:60_000]
is_chinese = re.compile('[\u4e00-\u9fff]').search
print(text[:160], '...')
print(next(line for line in text.split('\n') if is_chinese(line))[:50], '...')
# %% [markdown] lang="en"
# ## 1. Bytes
#
# Unicode has about 150,000 characters. A vocabulary with one entry for each
# would be large, mostly untrained, and out of date with the next version of
# Unicode. UTF-8 writes any character as 1 to 4 bytes, so 256 symbols are enough
# for every text, and no text is "unknown". The price is length: an English
# letter is one byte, a common Chinese character three, most emoji four. ByT5's
# tokenizer is just that: a token is a byte, and its id is the byte plus 3,
# because ids 0 to 2 are padding, end and unknown.
# %% [markdown] lang="zh"
# ## 1. 字节
#
# Unicode 约有 15 万个字符。给每个字符一个词表项，词表会很大、多数项得不到训练，
# 而且 Unicode 一更新就过时。UTF-8 把任何字符写成 1 到 4 个字节，所以 256
# 个符号足以表示任何文本，不存在“未知”文本。代价是长度：英文字母一个字节，
# 常用汉字三个字节，多数 emoji 四个字节。ByT5 的分词器就是这样：一个 token
# 就是一个字节，id 是字节值加 3，因为 id 0 到 2 用作 padding、结束符和 unknown。
# %%
for letter in 'aé汉🙂':
  data = letter.encode()
  print(letter, f'U+{ord(letter):04X}', list(data), f'{len(data)} bytes')
byte_tokenizer = ByteTokenizer()  # ByT5's: the byte plus 3
assert byte_tokenizer.encode('汉a') == [b + 3 for b in '汉a'.encode()]
# A part of a character is no valid text: U+FFFD stands for what is missing.
assert byte_tokenizer.decode(byte_tokenizer.encode('汉')[:2]) == '\ufffd'
# %% [markdown] lang="en"
# GPT-2's tokenizer writes each byte as one printable character (a "letter" in
# the code below), so that merges can be stored as text: the 188 bytes that are
# printable characters in Latin-1 stand for themselves, the other 68 become the
# characters from U+0100 on. A space becomes `Ġ`. This is a notation, not an
# encoding of its own.
#
# ## 2. Pre-tokenization
#
# Merges across words would give tokens like "of the" or "dog." and "dog,"
# beside "dog". So a regular expression first cuts the text into pieces (a word
# with the space before it, a run of digits, a run of punctuation) and merges
# stay inside a piece. Note that the space belongs to the *following* word:
# `" town"` and `"town"` are different tokens. Chinese has no spaces, so a whole
# run of characters is one piece: in the output below, `Ġèĭ¹æŀľ` is " 苹果", a
# space and six bytes.
# %% [markdown] lang="zh"
# GPT-2 的分词器把每个字节写成一个可打印字符（下面代码中叫 letter），使 merges
# 能以文本形式保存：在 Latin-1 中可打印的 188 个字节就写成该字符，其余 68
# 个字节用 U+0100 起的字符表示。空格变成 `Ġ`。这只是一种记法，不是新的编码。
#
# ## 2. 预分词（pre-tokenization）
#
# 如果合并可以跨词，就会出现 “of the” 这样的 token，或者在 “dog” 之外还有 “dog.”
# 和 “dog,”。所以先用正则表达式把文本切成片段（带前导空格的词、一串数字、
# 一串标点），合并只在片段内部进行。注意空格属于*后面*的词：`" town"` 与
# `"town"` 是不同的 token。中文没有空格，一整串汉字就是一个片段：下面输出中的
# `Ġèĭ¹æŀľ` 就是“ 苹果”，一个空格加六个字节。
# %%
printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
hidden = [byte for byte in range(256) if byte not in printable]
LETTER_OF_BYTE = {byte: chr(byte) for byte in printable}
LETTER_OF_BYTE |= {byte: chr(256 + i) for i, byte in enumerate(hidden)}
BYTE_OF_LETTER = {letter: byte for byte, letter in LETTER_OF_BYTE.items()}
PIECE = re.compile(
  r"'(?:s|t|re|ve|m|ll|d)"  # contractions
  r'| ?[^\W\d_]+'  # a word with the space before it
  r'| ?\d+'  # a number
  r'| ?(?:[^\s\w]|_)+'  # punctuation
  r'|\s+(?!\S)|\s+'  # white space; the last space belongs to the next word
)


def pieces(text):
  """The pieces of a text, their bytes written as letters."""
  return [
    ''.join(LETTER_OF_BYTE[byte] for byte in piece.encode())
    for piece in PIECE.findall(text)
  ]


print(pieces("Anna's 12 apples, 3 苹果"))
byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
expected = [piece for piece, _ in byte_level.pre_tokenize_str(text)]
assert pieces(text) == expected, 'compare the first difference of the lists'


# %% [markdown] lang="en"
# ## 3. Training BPE
#
# Byte-pair encoding (Sennrich et al., arXiv:1508.07909) starts from single
# bytes and repeats: count all adjacent pairs, weighted by how often their piece
# occurs; merge the most frequent pair into a new token, everywhere. The
# sequence of merges *is* the tokenizer. To be reproducible, ties need a rule;
# `tokenizers` takes the pair whose first id is smallest, then the one whose
# second id is. Ids are given in order: the 256 letters sorted, then one id for
# each merge.
# %% [markdown] lang="zh"
# ## 3. 训练 BPE
#
# Byte-pair encoding（Sennrich 等，arXiv:1508.07909）从单个字节开始，不断重复：
# 统计所有相邻符号对，按片段出现次数加权；把最频繁的一对在所有地方合并成一个新
# token。合并的序列*就是*分词器。为了可复现，频次相同时需要规则：`tokenizers`
# 取第一个 id 最小的一对，再相同则取第二个 id 最小的。id 按顺序分配：
# 先是排好序的 256 个字符，然后每次合并得到一个新 id。
# %%
def merge_pair(symbols, pair):
  """Replaces each occurrence of the pair, from the left."""
  result = []
  for symbol in symbols:
    if result and not result[-1][1] and (result[-1][0], symbol) == pair:
      result[-1] = (result[-1][0] + symbol, True)  # not merged twice
    else:
      result.append((symbol, False))
  return [symbol for symbol, _ in result]


def train_bpe(words, size, report=lambda splits: None):
  """words {piece: count} -> (vocabulary {token: id}, merges)."""
  vocabulary = {letter: i for i, letter in enumerate(sorted(BYTE_OF_LETTER))}
  splits = {word: list(word) for word in words}
  merges = []
  while len(vocabulary) < size:
    counts = Counter()
    for word, count in words.items():
      for pair in zip(splits[word], splits[word][1:], strict=False):
        counts[pair] += count
    pair = min(counts, key=lambda p: (-counts[p], *map(vocabulary.get, p)))
    merges.append(pair)
    vocabulary.setdefault(''.join(pair), len(vocabulary))
    for word, symbols in splits.items():
      if pair[0] in symbols:
        splits[word] = merge_pair(symbols, pair)
    report(splits)
  return vocabulary, merges


assert merge_pair(list('aaaab'), ('a', 'a')) == ['aa', 'aa', 'b']
# %%
words = Counter(pieces(text))
chinese = {
  word
  for word in words
  if is_chinese(bytes(map(BYTE_OF_LETTER.get, word)).decode())
}
history = []


def count_tokens(splits):
  """Appends the bytes per token so far, of English and of Chinese pieces."""
  row = []
  for group in (words.keys() - chinese, chinese):
    tokens = sum(words[word] * len(splits[word]) for word in group)
    row.append(sum(words[word] * len(word) for word in group) / tokens)
  history.append(row)


SIZE = 600
vocabulary, merges = train_bpe(words, SIZE, count_tokens)
print('first merges:', merges[:8])
print('last tokens: ', list(vocabulary)[-8:])
# %%
library = tokenizers.Tokenizer(models.BPE())
library.pre_tokenizer = byte_level
library.train_from_iterator(
  [text],
  trainers.BpeTrainer(
    vocab_size=SIZE,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  ),
)
model = json.loads(library.to_str())['model']
library_merges = [
  tuple(m.split(' ')) if isinstance(m, str) else tuple(m)
  for m in model['merges']
]
first = next(
  (
    i
    for i, pair in enumerate(zip(merges, library_merges, strict=False))
    if pair[0] != pair[1]
  ),
  None,
)
assert merges == library_merges, f'merge {first} differs: counts or ties'
assert vocabulary == model['vocab'], 'ids: sorted letters, then the merges'
print(len(merges), 'merges and', len(vocabulary), 'ids are equal')
# %% [markdown] lang="en"
# Bytes per token measure compression. The text of this notebook is small and
# repetitive, so the numbers are better than those of real tokenizers on real
# text. The shape of the English curve is typical: early merges gain most. The
# Chinese pieces are only about 6 % of the bytes, so few of their pairs are
# among the most frequent ones, and their curve rises late and in steps.
# %% [markdown] lang="zh"
# 每个 token 的字节数衡量压缩率。本笔记的文本很小且重复，
# 所以数值比真实分词器在真实文本上的更好看。英文曲线的形状是典型的：
# 早期的合并收益最大。中文片段只占约 6 % 的字节，
# 它们的符号对很少成为最频繁的一对，所以中文曲线上升得晚，而且呈阶梯状。
# %%
history = np.array(history)
fig, axis = plt.subplots(figsize=(6, 2.6))
axis.plot(256 + np.arange(1, len(history) + 1), history)
axis.set(xlabel='size of the vocabulary', ylabel='bytes per token')
axis.legend(['English pieces', 'Chinese pieces'])
fig.tight_layout()
assert (np.diff(history, axis=0) >= 0).all(), 'a merge cannot add tokens'
gain = history[np.array([99, 199, -1]), 0]
assert gain[1] - gain[0] < gain[0] - 1, 'the first 100 merges gain most'
# %% [markdown] lang="en"
# ## 4. Encoding with BPE
#
# A new piece starts as bytes. Of all adjacent pairs that have a merge, the one
# that was learned *first* is applied, until none is left. It is not a search
# for the longest token, and not for the fewest tokens.
# %% [markdown] lang="zh"
# ## 4. 用 BPE 编码
#
# 新片段从字节开始。在所有能合并的相邻对中，应用*最早*学到的那个合并，
# 直到没有可合并的为止。它不是找最长的 token，也不是找 token 数最少的切分。
# %%
rank = {pair: i for i, pair in enumerate(merges)}


def encode_piece(piece, rank=rank):
  symbols = list(piece)
  while len(symbols) > 1:
    pairs = set(zip(symbols, symbols[1:], strict=False))
    best = min(pairs, key=lambda pair: rank.get(pair, math.inf))
    if best not in rank:
      break
    symbols = merge_pair(symbols, best)
  return symbols


def encode(text):
  return [
    vocabulary[symbol]
    for piece in pieces(text)
    for symbol in encode_piece(piece)
  ]


def decode(ids):
  token_of_id = list(vocabulary)
  letters = ''.join(token_of_id[i] for i in ids)
  return bytes(BYTE_OF_LETTER[c] for c in letters).decode(errors='replace')


samples = [
  text[:3000],
  'Unseen words: transformer, Zürich, naïve!  Two  spaces.\n\n',
  '从未见过的汉字：龘、魑魅魍魉 🙂',
  'x = 3.14159 + 1000000',
]
for sample in samples:
  ids = encode(sample)
  assert ids == library.encode(sample).ids, sample
  assert decode(ids) == sample, 'bytes lose nothing'
print(library.encode('the gardener 龘').tokens)


# %% [markdown] lang="en"
# The first word became `t` and `he`: `Ġthe` was learned with its space, and
# there is none at the start of a text. The rare character 龘 has become three
# tokens of one byte each: no unknown token, but the model sees three symbols
# that mean nothing alone. A server that streams tokens must wait for the third
# before it can show the character.
#
# ## 5. Numbers
#
# BPE merges digits by frequency, so a number is cut where the *training text*
# happened to have frequent pairs. Two numbers of the same length can be cut
# differently, and the tens digit is sometimes the first and sometimes the
# second digit of its token. That makes column-wise addition hard to learn.
# Llama 2 and SmolLM2 cut all numbers into single digits; GPT-4 and Llama 3 into
# groups of at most three, from the left: "1234567" is "123", "456", "7". The
# stories have few numbers, so a second BPE is trained here on 3000 prices. The
# last line of the output shows the library's pre-tokenizer for single digits.
# %% [markdown] lang="zh"
# 第一个词变成了 `t` 和 `he`：学到的是带空格的 `Ġthe`，而文本开头没有空格。
# 生僻字“龘”变成了三个单字节 token：没有 unknown token，
# 但模型看到的是三个单独无意义的符号。流式输出的服务器必须等到第三个 token
# 才能显示这个字。
#
# ## 5. 数字
#
# BPE 按频率合并数字，所以数在哪里被切开，取决于*训练文本*中碰巧常见的数字对。
# 位数相同的两个数可能切法不同，十位上的数字有时是 token 的第一位，
# 有时是第二位。这让模型难以学会竖式加法。Llama 2 和 SmolLM2
# 把数全部切成单个数字；GPT-4 和 Llama 3 从左起切成最多三位一组：
# “1234567”切成“123”“456”“7”。故事里的数字很少，所以这里另用 3000
# 个价格训练第二个 BPE。输出的最后一行是该库按单个数字切分的预分词器的结果。
# %%
rng = np.random.default_rng(0)
prices = Counter(str(int(10**x)) for x in rng.uniform(0, 5, 3000))
_, number_merges = train_bpe(prices, 256 + 80)
number_rank = {pair: i for i, pair in enumerate(number_merges)}


def cuts(number):
  return tuple(encode_piece(str(number), number_rank))


shapes = Counter(tuple(map(len, cuts(number))) for number in range(1000, 10000))
print('ways to cut the numbers of four digits:', shapes.most_common())
for shape in shapes:
  number = next(
    n for n in range(1000, 10000) if tuple(map(len, cuts(n))) == shape
  )
  print(number, cuts(number))
assert len(shapes) > 2, 'all numbers are cut alike; look at the merges'
digits = pre_tokenizers.Sequence(
  [pre_tokenizers.Digits(individual_digits=True), byte_level]
)
print([piece for piece, _ in digits.pre_tokenize_str('1249 + 1250')])
# %% [markdown] lang="en"
# ## 6. Chinese
#
# How many tokens does the same content need? Below, the same sentences in two
# languages, with the tokenizer of a real model: SmolLM2's has 49,152 tokens and
# was trained mostly on English. The number that matters to a user is that of
# tokens for the same *content*: it determines the cost, the speed and how much
# fits into the context.
# %% [markdown] lang="zh"
# ## 6. 中文
#
# 同样的内容需要多少 token？下面用一个真实模型的分词器处理两种语言的同一组句子：
# SmolLM2 的词表有 49,152 个 token，训练语料以英文为主。
# 对用户重要的是表达同样*内容*所需的 token 数：它决定费用、速度，
# 以及上下文里能放下多少内容。
# %%
smollm2 = load_tokenizer('', 'smollm2')
pairs = (
  ('The weather is very good today.', '今天天气很好。'),
  ('Artificial intelligence is changing the world.', '人工智能正在改变世界。'),
  ('Please translate this sentence into English.', '请把这句话翻译成英文。'),
)
print('         characters  bytes  tokens of SmolLM2  of our BPE (600)')
for pair in pairs:
  for language, sentence in zip(('English', 'Chinese'), pair, strict=True):
    print(
      f'{language}{len(sentence):12}{len(sentence.encode()):7}'
      f'{len(smollm2.encode(sentence)):19}{len(encode(sentence)):18}'
    )
tokens = np.array([[len(smollm2.encode(s)) for s in pair] for pair in pairs])
letters = np.array([[len(s) for s in pair] for pair in pairs])
ratio = tokens.sum(0)[1] / tokens.sum(0)[0]
print(f'the Chinese sentences need {ratio:.1f} times as many tokens')
assert (letters[:, 1] < letters[:, 0] / 2).all() and ratio > 1.3
assert smollm2.decode(smollm2.encode(pairs[0][1])) == pairs[0][1]
assert len(smollm2.encode('1249')) == 4, 'SmolLM2 cuts numbers into digits'
# %% [markdown] lang="en"
# The Chinese sentences have less than half as many characters, yet need more
# tokens. A vocabulary that was trained on Chinese text reverses this; it is one
# reason why Qwen and DeepSeek have more than 100,000 tokens. To extend the
# vocabulary of a trained model, you add rows to its embedding, and these must
# be trained.
#
# ## 7. WordPiece
#
# BERT's tokenizer marks every token of a word but the first by `##`. Encoding
# is greedy: take the longest token that matches at the current position; if
# none does, the whole word is `[UNK]`.
# %% [markdown] lang="zh"
# 中文句子的字符数不到英文的一半，token 却更多。
# 用中文语料训练的词表会扭转这一点；这是 Qwen 和 DeepSeek 的词表超过 10
# 万的原因之一。给训练好的模型扩充词表，需要在 embedding
# 中新增若干行并训练它们。
#
# ## 7. WordPiece
#
# BERT 的分词器用 `##` 标记一个词中除第一个以外的 token。编码是贪心的：
# 在当前位置取能匹配的最长 token；如果一个都不匹配，整个词就是 `[UNK]`。
# %%
wordpiece = tokenizers.Tokenizer(models.WordPiece(unk_token='[UNK]'))
wordpiece.pre_tokenizer = pre_tokenizers.Whitespace()
wordpiece.train_from_iterator(
  [text],
  trainers.WordPieceTrainer(
    vocab_size=400, special_tokens=['[UNK]'], show_progress=False
  ),
)
wordpiece_vocabulary = wordpiece.get_vocab()


def encode_wordpiece(word):
  tokens, start = [], 0
  while start < len(word):
    for end in range(len(word), start, -1):  # the longest first
      token = '##' * (start > 0) + word[start:end]
      if token in wordpiece_vocabulary:
        break
    else:
      return ['[UNK]']
    tokens.append(token)
    start = end
  return tokens


plain_words = sorted(set(re.findall(r'\w+', text)))
for word in [*plain_words, 'gardening', 'unmarketable', '龘']:
  assert encode_wordpiece(word) == wordpiece.encode(word).tokens, word
print(encode_wordpiece('unmarketable'), encode_wordpiece('龘'))
# %% [markdown] lang="en"
# In training, WordPiece as published (Schuster and Nakajima, 2012) merges the
# pair that raises the likelihood of the text under a language model most. The
# usual simplified form of this criterion is a score of the pair alone:
#
# $$\text{score}(a,b)=
# \frac{\mathrm{count}(ab)}{\mathrm{count}(a)\,\mathrm{count}(b)},$$
#
# the pair's frequency relative to chance (its logarithm is the pointwise mutual
# information up to a constant). BPE takes $\mathrm{count}(ab)$ alone. The first
# choices differ completely: the score prefers rare letters that occur almost
# only together, as in a name.
# %% [markdown] lang="zh"
# 训练时，论文中的 WordPiece（Schuster 与 Nakajima，2012）
# 合并使文本在语言模型下的似然提高最多的一对。
# 这个准则常用的简化形式是给每一对打分：
#
# $$\text{score}(a,b)=
# \frac{\mathrm{count}(ab)}{\mathrm{count}(a)\,\mathrm{count}(b)},$$
#
# 即这一对的频次与两个符号独立出现时的期望频次之比，
# 其对数与点互信息只差一个常数。BPE 只看 $\mathrm{count}(ab)$。
# 两者最先选择的完全不同：这个分数偏爱几乎只一起出现的罕见字母，
# 例如人名中的字母。
# %%
pair_counts, letter_counts = Counter(), Counter()
for word, count in Counter(re.findall('[a-zA-Z]+', text)).items():
  letter_counts.update({c: word.count(c) * count for c in set(word)})
  for pair in zip(word, word[1:], strict=False):
    pair_counts[pair] += count
by_count = sorted(pair_counts, key=pair_counts.get)[::-1][:6]
score = {
  (a, b): count / letter_counts[a] / letter_counts[b]
  for (a, b), count in pair_counts.items()
}
by_score = sorted(score, key=score.get)[::-1][:6]
print('BPE:      ', [''.join(pair) for pair in by_count])
print('WordPiece:', [''.join(pair) for pair in by_score])
assert by_count[0] != by_score[0]
# %% [markdown] lang="en"
# (The library's trainer for WordPiece counts as BPE does; the original trainer
# was never released.)
#
# ## 8. Unigram
#
# Unigram (Kudo, arXiv:1804.10959) goes the other way round: start from many
# candidate pieces with probabilities $p(u)$ and remove those that matter least.
# The probability of a segmentation is the product of its pieces'; the
# probability of a word $w$ is the sum over all segmentations, that is, over all
# ways to write it as pieces $u_1,\dots,u_m$ one after the other:
#
# $$P(w)=\sum_{u_1\cdots u_m=w}\ \prod_{i} p(u_i).$$
#
# Encoding takes the most probable segmentation. There are $2^{n-1}$
# segmentations of $n$ letters (between any two letters there is a cut or none),
# but the best one up to position $j$ ends with some piece that starts at $i$,
# and the part before $i$ must be the best one up to $i$. So dynamic programming
# (Viterbi) needs $O(n^2)$ steps. With $w_{i:j}$ for the letters from $i$ to
# $j-1$, as in Python, and $\mathrm{best}(0)=0$:
#
# $$\mathrm{best}(j)=\max_{i<j}\ \big[\mathrm{best}(i)+\log p(w_{i:j})\big].$$
# %% [markdown] lang="zh"
# （`tokenizers` 的 WordPiece 训练器也像 BPE 那样只看频次；
# 原始的训练器从未公开。）
#
# ## 8. Unigram
#
# Unigram（Kudo，arXiv:1804.10959）反其道而行：从大量带概率 $p(u)$
# 的候选片段出发，删去最不重要的。一种切分的概率是各片段概率之积；词 $w$
# 的概率是对所有切分求和，即对所有把 $w$ 写成片段 $u_1,\dots,u_m$
# 依次相连的方式求和：
#
# $$P(w)=\sum_{u_1\cdots u_m=w}\ \prod_{i} p(u_i).$$
#
# 编码取概率最大的切分。$n$ 个字母有 $2^{n-1}$
# 种切分（每两个字母之间可切可不切），但到位置 $j$ 为止的最优切分必以某个从 $i$
# 开始的片段结尾，而 $i$ 之前的部分必是到 $i$ 为止的最优切分。
# 因此动态规划（Viterbi）只需 $O(n^2)$ 步。记 $w_{i:j}$ 为第 $i$ 到 $j-1$
# 个字母（与 Python 的切片相同），$\mathrm{best}(0)=0$：
#
# $$\mathrm{best}(j)=\max_{i<j}\ \big[\mathrm{best}(i)+\log p(w_{i:j})\big].$$
# %%
unigram = tokenizers.Tokenizer(models.Unigram())
unigram.pre_tokenizer = pre_tokenizers.Whitespace()
unigram.train_from_iterator(
  re.findall('[a-zA-Z]+', text),
  trainers.UnigramTrainer(
    vocab_size=150,
    unk_token='<unk>',
    special_tokens=['<unk>'],
    show_progress=False,
  ),
)
log_p = {
  piece: score
  for piece, score in json.loads(unigram.to_str())['model']['vocab']
  if piece != '<unk>'
}
LONGEST = max(map(len, log_p))


def viterbi(word, log_p):
  """The most probable segmentation and its log-probability."""
  best, start_of = [0.0] + [-math.inf] * len(word), [0] * (len(word) + 1)
  for j in range(1, len(word) + 1):
    for i in range(max(0, j - LONGEST), j):
      score = best[i] + log_p.get(word[i:j], -math.inf)
      if score > best[j]:
        best[j], start_of[j] = score, i
  result, j = [], len(word)
  while j:
    result.append(word[start_of[j] : j])
    j = start_of[j]
  return result[::-1], best[-1]


english_words = Counter(re.findall('[a-zA-Z]+', text))
for word in english_words:
  assert viterbi(word, log_p)[0] == unigram.encode(word).tokens, word
print(viterbi('gardener', log_p), viterbi('marketed', log_p))


# %% [markdown] lang="en"
# Where do the probabilities come from? The segmentation is hidden, so
# expectation maximization (EM) is used. *E step*: the expected count of a piece
# over all segmentations of all words, weighted by their probability. Let the
# forward sum $\alpha_j=\sum_{i<j}\alpha_i\,p(w_{i:j})$ be the probability of
# the first $j$ letters, summed over their segmentations, and the backward sum
# $\beta_i=\sum_{j>i}p(w_{i:j})\,\beta_j$ that of the letters from $i$ on (with
# $\alpha_0=\beta_n=1$ and $P(w)=\alpha_n$). Then the segmentation has the piece
# $w_{i:j}$ at this place with the posterior probability
# $\alpha_i\,p(w_{i:j})\,\beta_j/\alpha_n$. *M step*: $p(u)$ is the expected
# count of $u$ over the sum of all. EM guarantees that the likelihood of the
# text does not fall.
# %% [markdown] lang="zh"
# 概率从哪里来？切分是隐变量，所以用 EM 算法。*E 步*：对所有词的所有切分，
# 按其概率加权，求每个片段的期望次数。设前向和
# $\alpha_j=\sum_{i<j}\alpha_i\,p(w_{i:j})$ 为前 $j$
# 个字母在所有切分下的总概率，后向和 $\beta_i=\sum_{j>i}p(w_{i:j})\,\beta_j$
# 为从 $i$ 起其余字母的总概率（$\alpha_0=\beta_n=1$，$P(w)=\alpha_n$），
# 则切分在此处恰有片段 $w_{i:j}$ 的后验概率是
# $\alpha_i\,p(w_{i:j})\,\beta_j/\alpha_n$。*M 步*：$p(u)$ 等于 $u$
# 的期望次数除以总和。EM 保证文本的似然不会下降。
# %%
def forward_backward(word, p):
  """P(word) and the expected count of each piece."""
  n = len(word)
  spans = [
    (i, j, p[word[i:j]])
    for i in range(n)
    for j in range(i + 1, min(n, i + LONGEST) + 1)
    if word[i:j] in p
  ]
  alpha, beta = [1.0] + [0.0] * n, [0.0] * n + [1.0]
  for i, j, q in sorted(spans, key=lambda span: span[1]):
    alpha[j] += alpha[i] * q
  for i, j, q in sorted(spans, key=lambda span: -span[0]):
    beta[i] += q * beta[j]
  counts = Counter()
  for i, j, q in spans:
    counts[word[i:j]] += alpha[i] * q * beta[j] / alpha[n]
  return alpha[n], counts


def em_step(words, p):
  """(log-likelihood under p, the next p)."""
  likelihood, counts = 0.0, Counter()
  for word, count in words.items():
    probability, expected = forward_backward(word, p)
    likelihood += count * math.log(probability)
    for piece, value in expected.items():
      counts[piece] += count * value
  total = sum(counts.values())
  return likelihood, {piece: value / total for piece, value in counts.items()}


# %% [markdown] lang="en"
# Check the E step against brute force: enumerate all $2^{n-1}$ segmentations of
# a word.
# %% [markdown] lang="zh"
# 用暴力枚举检验 E 步：列出一个词的全部 $2^{n-1}$ 种切分。
# %%
def all_segmentations(word):
  if not word:
    yield ()
  for i in range(1, len(word) + 1):
    for rest in all_segmentations(word[i:]):
      yield (word[:i], *rest)


total = sum(math.exp(score) for score in log_p.values())
p = {piece: math.exp(score) / total for piece, score in log_p.items()}
word, by_force = 'gardener', Counter()
for segmentation in all_segmentations(word):
  probability = math.prod(p.get(piece, 0.0) for piece in segmentation)
  for piece in segmentation:
    by_force[piece] += probability
  by_force['P'] += probability
probability, expected = forward_backward(word, p)
assert math.isclose(probability, by_force['P'])
for piece, value in expected.items():
  assert math.isclose(value, by_force[piece] / by_force['P']), piece

likelihoods = []
for _ in range(4):
  likelihood, p = em_step(english_words, p)
  likelihoods.append(likelihood / sum(english_words.values()))
print('log-likelihood a word:', np.round(likelihoods, 4))
assert (np.diff(likelihoods) >= 0).all(), 'EM never lowers the likelihood'
assert math.isclose(sum(p.values()), 1)


# %% [markdown] lang="en"
# Training alternates EM with pruning: compute how much the likelihood would
# fall without each piece, and drop the worst fifth or so, until the vocabulary
# has the wanted size. (The library also replaces the M step's division by a
# digamma formula that favours frequent pieces.)
#
# ## Exercises
#
# 1. *UTF-8 by hand.* Write `utf8(code_point)` with shifts and masks: up to 7
#    bits one byte `0xxxxxxx`, up to 11 bits `110xxxxx 10xxxxxx`, up to 16 bits
#    `1110xxxx` and two more bytes, up to 21 bits `11110xxx` and three. Compare
#    with `str.encode` for all code points (U+D800 to U+DFFF are not
#    characters).
# 2. *Groups of three.* Cut digits into groups of three from the *right*, so
#    that '1234567' is '1', '234', '567'. Count in how many ways numbers of four
#    digits are cut now.
# 3. *Subword regularization.* Draw a segmentation at random with its posterior
#    probability: go backwards from the end, and of the first $j$ letters choose
#    the last piece $w_{i:j}$ with probability $\alpha_i\,p(w_{i:j})/\alpha_j$.
#    Check with 4000 samples that the mean count of a piece is near the expected
#    count of `forward_backward`.
#
# ## Interview questions
#
# **Why can a language model fail to count the letters "r" in "strawberry"?**
#
# <details><summary>Answer</summary>
#
# It never sees letters. The word is one to three tokens, that is one to three
# vectors, and the spelling is known only as far as texts that spell words out
# taught it. Splitting the word (s-t-r-a-...) makes each letter a token and
# mostly repairs it. For the same reason rhymes, anagrams and digit-wise
# arithmetic are hard. Byte-level models such as ByT5 see letters and pay with
# sequences about four times as long.
#
# </details>
#
# **What are the gains and the costs of a larger vocabulary?**
#
# <details><summary>Answer</summary>
#
# Gains: shorter sequences, so less attention, a smaller KV cache and fewer
# decoding steps per text. Costs: the embedding and the head grow by $v\,d$
# parameters each (untied), the head's product and the softmax over $v$ take
# time and memory at each position (logits $b\,t\,v$ are often the largest array
# of training), and rare tokens are seen too seldom to be trained. In small
# models the table is a large share: at $d=576$, 49,152 tokens are 28M of
# SmolLM2's 135M parameters (embedding and head are one table).
#
# </details>
#
# ## In the package
#
# - {{moepeft.data.tokenizers.train_tokenizer}} trains all four kinds (bytes,
#   BPE, WordPiece, Unigram), `python -m moepeft.tokenizer` is its command. It
#   adds the special tokens, sentinels and chat template of a model.
# - {{moepeft.data.tokenizers.tokenizer.ByteTokenizer}} is ByT5's, and also that
#   of the small T5 that ships with the package;
#   {{moepeft.data.tokenizers.tokenizer.HuggingFaceTokenizer}} wraps the
#   library's.
# - {{moepeft.checkpoints.gguf.tokenizer}} rebuilds a tokenizer from the arrays
#   of a GGUF file, as used for SmolLM2 above.
# - {{moepeft.inference.detokenizer}} holds back bytes of unfinished characters
#   in a stream; {{moepeft.inference.token_bytes.TokenBytes}} gives the exact
#   bytes of each token, which grammars need.
# - `tokens(new='...')` of {{moepeft.peft.methods.tokens}} trains the embedding
#   rows of new tokens only.
#
# Papers: BPE 1508.07909, SentencePiece 1808.06226, Unigram 1804.10959, ByT5
# 2105.13626; WordPiece: Schuster and Nakajima, *Japanese and Korean voice
# search*, ICASSP 2012.
# %% [markdown] lang="zh"
# 训练时 EM 与剪枝交替进行：计算去掉每个片段会使似然下降多少，
# 删去最不重要的五分之一左右，直到词表达到目标大小。（该库还用 digamma 公式代替
# M 步中的除法，使高频片段更占优势。）
#
# ## 练习
#
# 1. *手写 UTF-8。* 用移位和掩码写 `utf8(code_point)`：7 位以内一个字节
#    `0xxxxxxx`，11 位以内 `110xxxxx 10xxxxxx`，16 位以内 `1110xxxx`
#    再加两个字节，21 位以内 `11110xxx` 再加三个字节。对所有码位与 `str.encode`
#    比较（U+D800 到 U+DFFF 不是字符）。
# 2. *三位一组。* 从*右边*起把数字三位一组切开，使 '1234567' 成为 '1'、'234'、
#    '567'。数一数四位数现在有几种切法。
# 3. *子词正则化。* 按后验概率随机抽取一种切分：从末尾往前，对前 $j$
#    个字母以概率 $\alpha_i\,p(w_{i:j})/\alpha_j$ 选择最后一个片段 $w_{i:j}$。用
#    4000 个样本检验：片段的平均次数接近 `forward_backward` 的期望次数。
#
# ## 面试题
#
# **为什么语言模型可能数不对 “strawberry” 里有几个 r？**
#
# <details><summary>答案</summary>
#
# 它从未看到字母。这个词是一到三个 token，也就是一到三个向量；
# 拼写只能从那些把词逐字母拼出来的文本中学到。把词拆开（s-t-r-a-...），
# 每个字母成为一个 token，问题大多就解决了。押韵、变位词、
# 逐位算术难做也是同样的原因。ByT5 这样的字节级模型能看到字母，
# 代价是序列长约四倍。
#
# </details>
#
# **更大的词表有哪些好处和代价？**
#
# <details><summary>答案</summary>
#
# 好处：序列更短，因此注意力计算更少、KV cache 更小、每段文本的解码步数更少。
# 代价：embedding 和输出头各增加 $v\,d$ 个参数（不共享时）；
# 每个位置都要计算输出头的乘积和 $v$ 上的 softmax，既花时间又占内存（logits
# $b\,t\,v$ 常是训练中最大的数组）；罕见 token 出现太少，训练不足。
# 小模型中这张表占比很大：$d=576$ 时，49,152 个 token 就占 SmolLM2 的 1.35
# 亿参数中的 2800 万（embedding 与输出头共用一张表）。
#
# </details>
#
# ## 在 moepeft 中
#
# - {{moepeft.data.tokenizers.train_tokenizer}} 训练全部四种（bytes、BPE、
#   WordPiece、Unigram），命令是 `python -m moepeft.tokenizer`。
#   它会加上模型所需的特殊 token、sentinel 和对话模板。
# - {{moepeft.data.tokenizers.tokenizer.ByteTokenizer}} 是 ByT5 的分词器，也是
#   moepeft 自带的小 T5 所用的；
#   {{moepeft.data.tokenizers.tokenizer.HuggingFaceTokenizer}}
#   封装了该库的分词器。
# - {{moepeft.checkpoints.gguf.tokenizer}} 从 GGUF 文件的数组重建分词器，上面的
#   SmolLM2 就是这样读取的。
# - {{moepeft.inference.detokenizer}} 在流式输出中暂存未完成字符的字节；
#   {{moepeft.inference.token_bytes.TokenBytes}} 给出每个 token 的确切字节，
#   语法约束需要它。
# - {{moepeft.peft.methods.tokens}} 的 `tokens(new='...')` 只训练新 token 的
#   embedding 行。
#
# 论文：BPE 1508.07909，SentencePiece 1808.06226，Unigram 1804.10959，ByT5
# 2105.13626；WordPiece：Schuster 与 Nakajima，*Japanese and Korean voice
# search*，ICASSP 2012。
# %% [markdown] lang="en" tags=["solution"]
# # Tokenizers: solutions
#
# ## Exercise 1
#
# The first byte has as many leading ones as there are bytes; the others start
# with `10`, so that a decoder can start anywhere and find the next character.
# %% [markdown] lang="zh" tags=["solution"]
# # 分词器：答案
#
# ## 练习 1
#
# 首字节开头有几个 1 就有几个字节；其余字节以 `10` 开头，
# 因此解码器可以从任意位置开始并找到下一个字符。
# %% tags=["solution"]
def utf8(code):
  if code < 0x80:
    return bytes([code])
  count = 2 if code < 0x800 else 3 if code < 0x10000 else 4
  tail = [0x80 | (code >> 6 * i) & 0x3F for i in range(count - 1)][::-1]
  mark = (0xFF << (8 - count)) & 0xFF
  return bytes([mark | code >> 6 * (count - 1), *tail])


for code in range(0x110000):
  if not 0xD800 <= code < 0xE000:
    assert utf8(code) == chr(code).encode(), hex(code)


# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 2
#
# The lookahead demands that the number of digits that follow the group is a
# multiple of three. All numbers of four digits are now cut as one and three.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 2
#
# 前瞻断言要求这一组之后的数字个数是三的倍数。所有四位数现在都切成一位加三位。
# %% tags=["solution"]
def groups_of_three(number):
  return re.findall(r'\d{1,3}(?=(?:\d{3})*$)', number)


assert groups_of_three('1234567') == ['1', '234', '567']
shapes = {tuple(map(len, groups_of_three(str(n)))) for n in range(1000, 10000)}
assert shapes == {(1, 3)}


# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 3
#
# A count over 4000 samples has a standard error of at most about
# $0.5/\sqrt{4000}\approx 0.008$ for a piece that occurs at most once; five of
# them are allowed.
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 3
#
# 最多出现一次的片段，4000 个样本的平均次数的标准误差至多约
# $0.5/\sqrt{4000}\approx 0.008$；允许五倍误差。
# %% tags=["solution"]
def sample(word, p, rng):
  alpha = [1.0]
  for j in range(1, len(word) + 1):
    alpha.append(sum(alpha[i] * p.get(word[i:j], 0.0) for i in range(j)))
  result, j = [], len(word)
  while j:
    weights = [alpha[i] * p.get(word[i:j], 0.0) / alpha[j] for i in range(j)]
    i = rng.choice(j, p=weights)
    result.append(word[i:j])
    j = i
  return result[::-1]


rng = np.random.default_rng(0)
p = {piece: math.exp(score) / total for piece, score in log_p.items()}
counts = Counter()
for _ in range(4000):
  counts.update(set(sample('market', p, rng)))
_, expected = forward_backward('market', p)
for piece, value in expected.items():
  assert abs(counts[piece] / 4000 - value) < 0.04, piece
print(
  {k: (round(v, 3), counts[k] / 4000) for k, v in expected.items() if v > 0.01}
)

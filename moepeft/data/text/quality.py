# SPDX-License-Identifier: Apache-2.0
"""Quality rules for passages of text, by name.

The thresholds are those of Gopher's filter (arXiv:2112.11446, table A1 and
section A.1.1), which was made for whole documents of English web text.
"""

import collections
from collections.abc import Callable

from moepeft.core.ranges import suggestion

_STOPWORDS = frozenset('the be to of and that have with'.split())
_BULLETS = ('•', '-', '*')
# (n, the largest fraction of a text's letters in its most frequent n-gram).
_MAX_NGRAM_FRACTIONS = ((2, 0.20), (3, 0.18), (4, 0.16))


def length(text: str) -> bool:
  """50 to 100,000 words."""
  return 50 <= len(text.split()) <= 100_000


def words(text: str) -> bool:
  """A mean word length of 3 to 10 letters."""
  split_text = text.split()
  return (
    bool(split_text) and 3 <= sum(map(len, split_text)) / len(split_text) <= 10
  )


def symbols(text: str) -> bool:
  """At most one '#' or ellipsis per ten words."""
  count = text.count('#') + text.count('...') + text.count('…')
  return count <= 0.1 * len(text.split())


def letters(text: str) -> bool:
  """A letter in 80 % of the words."""
  split_text = text.split()
  count = sum(any(c.isalpha() for c in word) for word in split_text)
  return bool(split_text) and count >= 0.8 * len(split_text)


def stopwords(text: str) -> bool:
  """At least two different stopwords of English."""
  return len(_STOPWORDS & {word.lower() for word in text.split()}) >= 2


def lines(text: str) -> bool:
  """At most 90 % bullets, and 30 % of the lines end with an ellipsis."""
  text_lines = [line.strip() for line in text.splitlines() if line.strip()]
  bullets = sum(line.startswith(_BULLETS) for line in text_lines)
  ellipses = sum(line.endswith(('...', '…')) for line in text_lines)
  return bullets <= 0.9 * len(text_lines) and ellipses <= 0.3 * len(text_lines)


def repetition(text: str) -> bool:
  """At most 30 % repeated lines; no phrase is a large part of the text."""
  text_lines = [line.strip() for line in text.splitlines() if line.strip()]
  if len(text_lines) - len(set(text_lines)) > 0.3 * len(text_lines):
    return False
  split_text = text.split()
  total = sum(map(len, split_text))
  for n, max_fraction in _MAX_NGRAM_FRACTIONS:
    ngrams = collections.Counter(
      zip(*(split_text[i:] for i in range(n)), strict=False)
    )
    if not ngrams:
      continue
    ngram, count = ngrams.most_common(1)[0]
    if count > 1 and count * sum(map(len, ngram)) > max_fraction * total:
      return False
  return True


RULES: dict[str, Callable[[str], bool]] = {
  'length': length,
  'words': words,
  'symbols': symbols,
  'letters': letters,
  'stopwords': stopwords,
  'lines': lines,
  'repetition': repetition,
}


def rules(text: str) -> dict[str, Callable[[str], bool]]:
  """'length,repetition' -> the rules with these names, in this order.

  Raises:
    ValueError: there is no such rule.
  """
  names = [name.strip() for name in text.split(',') if name.strip()]
  for name in names:
    if name not in RULES:
      raise ValueError(
        f'config.data.quality_filters takes names among {", ".join(RULES)}; '
        f'got {name!r}{suggestion(name, RULES)}'
      )
  return {name: RULES[name] for name in names}

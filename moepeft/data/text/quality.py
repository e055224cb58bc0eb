# SPDX-License-Identifier: Apache-2.0
"""Rules that a passage of text has to keep, by name.

Their figures are those of Gopher's filter (arXiv:2112.11446, table A1 and
section A.1.1), which are of English web text in whole documents.
"""

import collections
from collections.abc import Callable

from moepeft.core.ranges import suggestion

_STOP = frozenset('the be to of and that have with'.split())
_BULLETS = ('•', '-', '*')
# The most of a text's letters that its commonest n words in a row may have.
_COMMONEST = ((2, 0.20), (3, 0.18), (4, 0.16))


def length(text: str) -> bool:
  """50 to 100,000 words."""
  return 50 <= len(text.split()) <= 100_000


def words(text: str) -> bool:
  """Words of 3 to 10 letters in the mean."""
  split_text = text.split()
  return (
    bool(split_text) and 3 <= sum(map(len, split_text)) / len(split_text) <= 10
  )


def symbols(text: str) -> bool:
  """At most one '#' or ellipsis for ten words."""
  count = text.count('#') + text.count('...') + text.count('…')
  return count <= 0.1 * len(text.split())


def letters(text: str) -> bool:
  """A letter in 80 % of the words."""
  split_text = text.split()
  spelled = sum(any(c.isalpha() for c in word) for word in split_text)
  return bool(split_text) and spelled >= 0.8 * len(split_text)


def stopwords(text: str) -> bool:
  """Two of the commonest words of English."""
  return len(_STOP & {word.lower() for word in text.split()}) >= 2


def lines(text: str) -> bool:
  """At most 90 % of the lines are bullets, 30 % end with an ellipsis."""
  text_lines = [line.strip() for line in text.splitlines() if line.strip()]
  bullets = sum(line.startswith(_BULLETS) for line in text_lines)
  cut = sum(line.endswith(('...', '…')) for line in text_lines)
  return bullets <= 0.9 * len(text_lines) and cut <= 0.3 * len(text_lines)


def repetition(text: str) -> bool:
  """At most 30 % of the lines occur before; no phrase is much of the text."""
  text_lines = [line.strip() for line in text.splitlines() if line.strip()]
  if len(text_lines) - len(set(text_lines)) > 0.3 * len(text_lines):
    return False
  split_text = text.split()
  total = sum(map(len, split_text))
  for n, most in _COMMONEST:
    grams = collections.Counter(
      zip(*(split_text[i:] for i in range(n)), strict=False)
    )
    if not grams:
      continue
    gram, count = grams.most_common(1)[0]
    if count > 1 and count * sum(map(len, gram)) > most * total:
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
  """'length,repetition' -> the rules of these names, in this order.

  Raises:
    ValueError: there is no such rule.
  """
  names = [name.strip() for name in text.split(',') if name.strip()]
  for name in names:
    if name not in RULES:
      raise ValueError(
        f'config.data.quality_filters names some of {", ".join(RULES)}; got '
        f'{name!r}'
        f'{suggestion(name, RULES)}'
      )
  return {name: RULES[name] for name in names}

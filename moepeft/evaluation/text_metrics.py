# SPDX-License-Identifier: Apache-2.0
"""How good generated texts are: exact match, ROUGE-L and BLEU.

ROUGE-L (Lin, 2004) is Google's `rouge-score`; BLEU (Papineni et al., 2002) is
`sacrebleu`. Their figures are given as they are, but for ROUGE-L of Chinese,
Japanese and Korean, of which rouge-score sees nothing.
"""

import re
from collections.abc import Sequence
from typing import Any

TOKENIZE = '13a'
# Han, kana and Hangul: a character is a word of ROUGE-L.
_CJK = (
  '\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff'
  '\U00020000-\U0003ffff'
)
_CHARACTER = re.compile(f'([{_CJK}])')
_COUNTED = re.compile(f'[a-z0-9{_CJK}]')


def exact_match(
  predictions: Sequence[str], targets: Sequence[str]
) -> list[float]:
  """1.0 for each prediction that is its target, else 0.0.

  White space at the ends does not count, as a tokenizer may add it; case,
  punctuation and articles do. SQuAD's measure drops those, so figures under
  its name differ.

  Raises:
    ValueError: there are no pairs, or not as many of one as of the other.
  """
  pairs = _pairs(predictions, targets)
  return [float(said.strip() == target.strip()) for said, target in pairs]


def rouge_l(predictions: Sequence[str], targets: Sequence[str]) -> list[float]:
  """The F-measure of ROUGE-L of each prediction, in [0, 1].

  It is `rougeL` of rouge-score with Porter's stemmer: the longest common
  subsequence of the whole texts, line breaks being white space. T5's own
  measure is another: `rougeLsum`, sentence by sentence, without a stemmer.
  Words are runs of a-z and 0-9; rouge-score knows no others. A Chinese
  character, kana or Korean syllable is here a word of its own, which changes
  no figure of texts without them.

  Raises:
    ValueError: as `exact_match` or `check_words`, or rouge-score is not
      installed.
  """
  pairs = _pairs(predictions, targets)
  check_words(targets)
  try:
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer
  except ImportError as e:
    raise _missing('rouge_l', e) from None
  words = _Words(DefaultTokenizer(use_stemmer=True))
  scorer = RougeScorer(['rougeL'], tokenizer=words)
  return [
    scorer.score(target, said)['rougeL'].fmeasure for said, target in pairs
  ]


def check_words(targets: Sequence[str]) -> None:
  """Looks whether `rouge_l` sees something of each target.

  Raises:
    ValueError: a target has letters, and none of them counts.
  """
  for target in targets:
    if any(map(str.isalpha, target)) and not _COUNTED.search(target.lower()):
      raise ValueError(
        'rouge_l counts words of a-z and 0-9 and characters of Chinese, '
        f'Japanese and Korean; the target {target!r} has none of them, so take '
        'exact_match, bleu or loss of these rows'
      )


class _Words:
  """A tokenizer of rouge-score that splits Chinese by character."""

  def __init__(self, plain: Any):
    self._plain = plain

  def tokenize(self, text: str) -> list[str]:
    found = []
    for piece in _CHARACTER.split(text):
      one = _CHARACTER.fullmatch(piece)
      found += [piece] if one else self._plain.tokenize(piece)
    return found


def bleu(
  predictions: Sequence[str], targets: Sequence[str], tokenize: str = TOKENIZE
) -> float:
  """BLEU of all predictions together, 0 to 100: a mean of rows is not it.

  Args:
    tokenize: one of sacrebleu's: its default '13a', 'intl' (which T5 takes),
      'zh', 'char', ...

  Raises:
    ValueError: as `exact_match`, or sacrebleu is not installed.
  """
  said, meant = map(list, zip(*_pairs(predictions, targets), strict=True))
  return _bleu(tokenize).corpus_score(said, [meant]).score


def bleu_signature(tokenize: str = TOKENIZE) -> str:
  """How `bleu` counts, and with which version: what a figure is told with.

  Raises:
    ValueError: sacrebleu is not installed.
  """
  counted = _bleu(tokenize)
  # How many targets a prediction has is known once something was scored.
  counted.corpus_score(['a'], [['a']])
  return str(counted.get_signature())


def _bleu(tokenize: str):
  try:
    from sacrebleu.metrics import BLEU
  except ImportError as e:
    raise _missing('bleu', e) from None
  return BLEU(tokenize=tokenize)


def _missing(measure: str, error: ImportError) -> ValueError:
  return ValueError(
    f'{measure} needs a library that is not there ({error}); pip install '
    "'moepeft[eval]'"
  )


def _pairs(
  predictions: Sequence[str], targets: Sequence[str]
) -> list[tuple[str, str]]:
  if len(predictions) != len(targets) or not targets:
    raise ValueError(
      'each prediction is measured by its target, and there is at least one; '
      f'got {len(predictions)} predictions and {len(targets)} targets'
    )
  return list(zip(predictions, targets, strict=True))

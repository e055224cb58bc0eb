# SPDX-License-Identifier: Apache-2.0
"""ROUGE-L: the longest common subsequence of words of two texts.

Source: Lin, ROUGE: A package for automatic evaluation of summaries, 2004, with
Google's `rouge-score`, extended to Chinese, Japanese and Korean, which
rouge-score ignores.
"""

import re
from collections.abc import Sequence
from typing import Any

from moepeft.metrics.text_metric import TextMetric

# Han, kana and Hangul: each character is a word.
_CJK = (
  '\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff'
  '\U00020000-\U0003ffff'
)
_CHARACTER = re.compile(f'([{_CJK}])')
_WORD_CHARACTER = re.compile(f'[a-z0-9{_CJK}]')


def rouge_l(predictions: Sequence[str], targets: Sequence[str]) -> list[float]:
  """The F-measure of ROUGE-L of each prediction, in [0, 1].

  This is `rougeL` of rouge-score with Porter's stemmer: the longest common
  subsequence of the whole texts, with line breaks as white space. T5 reports
  `rougeLsum` instead, by sentence and without a stemmer. In rouge-score, words
  are runs of a-z and 0-9. Here, a Chinese character, kana or Korean syllable is
  a word too; the scores of texts without them are those of rouge-score.

  Raises:
    ImportError: rouge-score is not installed.
  """
  from rouge_score.rouge_scorer import RougeScorer
  from rouge_score.tokenizers import DefaultTokenizer

  tokenizer = _CjkTokenizer(DefaultTokenizer(use_stemmer=True))
  scorer = RougeScorer(['rougeL'], tokenizer=tokenizer)
  return [
    scorer.score(target, prediction)['rougeL'].fmeasure
    for prediction, target in zip(predictions, targets, strict=True)
  ]


def check_targets(targets: Sequence[str]) -> None:
  """
  Raises:
    ValueError: a target has letters, but no word that ROUGE-L counts.
  """
  for target in targets:
    if any(map(str.isalpha, target)) and not _WORD_CHARACTER.search(
      target.lower()
    ):
      raise ValueError(
        'ROUGE-L counts words of a-z and 0-9 and characters of Chinese, '
        f'Japanese and Korean; the target {target!r} has none of them, so '
        'choose other --metrics for these rows'
      )


class _CjkTokenizer:
  """A tokenizer of rouge-score that splits Chinese by character."""

  def __init__(self, latin: Any):
    self._latin = latin

  def tokenize(self, text: str) -> list[str]:
    tokens = []
    for piece in _CHARACTER.split(text):
      is_cjk = _CHARACTER.fullmatch(piece)
      tokens += [piece] if is_cjk else self._latin.tokenize(piece)
    return tokens


METRIC = TextMetric(
  label='ROUGE-L', scores=rouge_l, extra='eval', check_targets=check_targets
)

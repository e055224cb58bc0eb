# SPDX-License-Identifier: Apache-2.0
"""BLEU of a corpus: n-grams of the predictions that are in the targets.

Source: Papineni et al., BLEU: a method for automatic evaluation of machine
translation, 2002, as `sacrebleu` has it.
"""

from collections.abc import Sequence

from moepeft.metrics.text_metric import TextMetric

TOKENIZE = '13a'


def bleu(
  predictions: Sequence[str], targets: Sequence[str], tokenize: str = TOKENIZE
) -> float:
  """BLEU of all predictions together, 0 to 100; it is no mean over examples.

  Args:
    tokenize: one of sacrebleu's: its default '13a', 'intl' (T5's), 'zh',
      'char', ...

  Raises:
    ImportError: sacrebleu is not installed.
  """
  from sacrebleu.metrics import BLEU

  score = BLEU(tokenize=tokenize).corpus_score(list(predictions), [targets])
  return score.score


def signature(tokenize: str = TOKENIZE) -> str:
  """Settings and version of `bleu`, as sacrebleu writes them."""
  from sacrebleu.metrics import BLEU

  metric = BLEU(tokenize=tokenize)
  # The number of targets a prediction has is known once a text was scored.
  metric.corpus_score(['a'], [['a']])
  return str(metric.get_signature())


METRIC = TextMetric(
  label='BLEU',
  unit='0 to 100',
  factor=1.0,
  corpus_score=bleu,
  extra='eval',
  signature=signature,
)

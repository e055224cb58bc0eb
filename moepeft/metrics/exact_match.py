# SPDX-License-Identifier: Apache-2.0
"""Exact match: the share of predictions that are their target."""

from collections.abc import Sequence

from moepeft.metrics.text_metric import TextMetric


def exact_match(
  predictions: Sequence[str], targets: Sequence[str]
) -> list[float]:
  """1.0 for each prediction that is its target, else 0.0.

  White space at the ends does not count, as a tokenizer may add it; case,
  punctuation and articles do. SQuAD's exact match drops those, so scores under
  its name differ.
  """
  pairs = zip(predictions, targets, strict=True)
  return [
    float(prediction.strip() == target.strip()) for prediction, target in pairs
  ]


METRIC = TextMetric(label='exact match', scores=exact_match)

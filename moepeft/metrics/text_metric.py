# SPDX-License-Identifier: Apache-2.0
"""The entry of a metric of generated texts, and the facts of any metric."""

import dataclasses
from collections.abc import Callable, Sequence

Texts = Sequence[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricInfo:
  """Facts that tables and plots need of a metric.

  Attributes:
    label: the metric's name in a sentence.
    unit: of the numbers that are shown: '%', 'nats a token', '0 to 100'.
    factor: from a score to the number that is shown; 100 for fractions in %.
    bounds: the least and the largest number that can be shown.
    decimals: of a number in a terminal.
    larger_is_better: whether a larger score is a better one.
  """

  label: str
  unit: str = '%'
  factor: float = 100.0
  bounds: tuple[float, float] = (0.0, 100.0)
  decimals: int = 1
  larger_is_better: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextMetric(MetricInfo):
  """A metric of predicted texts beside their targets.

  Either `scores` or `corpus_score` is given. Both are called with equally
  many predictions and targets, at least one.

  Attributes:
    scores: (predictions, targets) -> a score of each prediction. Its mean is
      the metric, and it gets a bootstrap interval.
    corpus_score: (predictions, targets) -> a score of all of them together,
      for a metric that is no mean over examples; it has no interval.
    extra: the extra of moepeft that brings the metric's library, '' for none.
    check_targets: raises a ValueError where the metric sees nothing of a
      target. Called before predictions are generated, which takes minutes.
    signature: the library's version and settings, to be published with scores.
  """

  scores: Callable[[Texts, Texts], list[float]] | None = None
  corpus_score: Callable[[Texts, Texts], float] | None = None
  extra: str = ''
  check_targets: Callable[[Texts], None] = lambda targets: None
  signature: Callable[[], str] | None = None

  def __post_init__(self):
    if (self.scores is None) == (self.corpus_score is None):
      raise ValueError(
        f'the metric {self.label!r} needs one of scores and corpus_score'
      )

  def evaluate(
    self, predictions: Texts, targets: Texts
  ) -> tuple[list[float] | None, float | None]:
    """(a score of each example or None, the score of the corpus or None).

    Raises:
      ValueError: there are no texts, not as many predictions as targets, the
        metric sees nothing of a target, or its library is not installed.
    """
    if len(predictions) != len(targets) or not targets:
      raise ValueError(
        f'{self.label} needs as many predictions as targets, and at least one; '
        f'got {len(predictions)} predictions and {len(targets)} targets'
      )
    self.check_targets(targets)
    try:
      if self.scores is not None:
        return self.scores(predictions, targets), None
      return None, self.corpus_score(predictions, targets)
    except ImportError as error:
      raise ValueError(
        f'{self.label} needs a library that is not there ({error}); pip '
        f"install 'moepeft[{self.extra}]'"
      ) from None

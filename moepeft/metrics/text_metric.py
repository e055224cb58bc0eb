# SPDX-License-Identifier: Apache-2.0
"""The registry entry of a text metric, and the display facts of any metric."""

import dataclasses
from collections.abc import Callable, Sequence

Texts = Sequence[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricInfo:
  """Facts about a metric for tables and plots.

  Attributes:
    label: the metric's name in a sentence.
    unit: the unit of displayed numbers: '%', 'nats a token', '0 to 100'.
    factor: displayed number / score; 100 for fractions in %.
    bounds: the smallest and the largest possible displayed number.
    decimals: the number of decimals in a terminal.
    larger_is_better: whether larger scores are better.
  """

  label: str
  unit: str = '%'
  factor: float = 100.0
  bounds: tuple[float, float] = (0.0, 100.0)
  decimals: int = 1
  larger_is_better: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextMetric(MetricInfo):
  """A metric of predicted texts and their targets.

  A metric has either `scores` or `corpus_score`. The numbers of predictions and
  targets are equal, and at least one.

  Attributes:
    scores: (predictions, targets) -> a score for each prediction. The metric is
      their mean, with a bootstrap interval.
    corpus_score: (predictions, targets) -> one score for all, for a metric that
      is no mean over examples; it has no interval.
    extra: the extra of moepeft with the metric's library, '' for none.
    check_targets: raises a ValueError if the metric ignores a whole target.
      Called before predictions are generated, which takes minutes.
    signature: returns the library's version and settings, for publication.
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
    """(the score of each example or None, the score of the corpus or None).

    Raises:
      ValueError: there are no texts, the numbers of predictions and targets
        differ, the metric ignores a target, or its library is not installed.
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

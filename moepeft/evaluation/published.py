# SPDX-License-Identifier: Apache-2.0
"""The paper's tables and ablation results, read from published.toml.

Zadouri et al., Pushing mixture of experts to the limit, 2023
(arXiv:2309.05444).
"""

import dataclasses
import pathlib
import tomllib

from moepeft.core.ranges import suggestion
from moepeft.evaluation.paper_metric import EIGHT

_FILE = pathlib.Path(__file__).with_name('published.toml')


@dataclasses.dataclass(frozen=True)
class Published:
  """One row of a table of the paper.

  Attributes:
    name: the method, or the paper's name of a T0 model.
    method: a method string; 'full' for the authors' T0, '' for the T0 of Sanh
      et al., which has no counterpart here.
    percent: trained parameters in per cent, as the paper counts them; None if
      unknown.
    scores: accuracies in per cent in the order of `paper_metric.EIGHT`; None
      if unknown.
    average: the printed average.
    note: a known error of the row.
  """

  name: str
  method: str
  percent: float | None = None
  scores: tuple[float, ...] | None = None
  average: float | None = None
  note: str = ''

  def cells(self) -> dict[str, float]:
    """{dataset: per cent}, and the printed 'average', as far as known."""
    cells = dict(zip(EIGHT, self.scores or (), strict=False))
    return cells | ({} if self.average is None else {'average': self.average})

  def recomputed(self) -> float | None:
    """The mean of the scores if it differs from the printed average.

    Scores and average are rounded to 0.01, with an error of at most 0.005
    each, so the two may be 0.01 apart.
    """
    if self.scores is None or self.average is None:
      return None
    mean = sum(self.scores) / len(self.scores)
    # The last term is for floating point.
    return mean if abs(mean - self.average) > 0.01 + 1e-9 else None


@dataclasses.dataclass(frozen=True)
class Ablation:
  """A result of the paper that is not in its tables.

  Attributes:
    setting: the model and data.
    finding: a sentence.
    figures: name -> average accuracy in per cent, or in the unit of the name.
  """

  setting: str
  finding: str
  figures: dict[str, float]


def _row(fields: dict) -> Published:
  scores = fields.get('scores')
  return Published(**fields | {'scores': scores and tuple(scores)})


_DATA = tomllib.loads(_FILE.read_text(encoding='utf-8'))
TABLES = {
  size: tuple(map(_row, rows)) for size, rows in _DATA['tables'].items()
}
ABLATIONS = {
  name: Ablation(**fields) for name, fields in _DATA['ablations'].items()
}


def table(size: str) -> tuple[Published, ...]:
  """The rows of one table, in the paper's order.

  Raises:
    ValueError: the paper has no such table.
  """
  if size not in TABLES:
    raise ValueError(
      f'the paper has the tables {", ".join(TABLES)}; got {size!r}'
      f'{suggestion(size, TABLES)}'
    )
  return TABLES[size]

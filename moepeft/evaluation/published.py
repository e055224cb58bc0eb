# SPDX-License-Identifier: Apache-2.0
"""The paper's tables and ablations, read from published.toml.

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
    name: the method, or the paper's name for its T0.
    method: a method string; 'full' for the authors' T0, '' for Sanh et al.'s,
      which none of our runs repeats.
    percent: trained parameters as the paper counts them; None where
      unknown.
    scores: accuracies in per cent in the order of `paper_metric.EIGHT`; None
      where they were not recovered.
    average: as printed.
    note: a known fault of the row.
  """

  name: str
  method: str
  percent: float | None = None
  scores: tuple[float, ...] | None = None
  average: float | None = None
  note: str = ''

  def cells(self) -> dict[str, float]:
    """{dataset: per cent} and 'average' as printed, without missing ones."""
    cells = dict(zip(EIGHT, self.scores or (), strict=False))
    return cells | ({} if self.average is None else {'average': self.average})

  def recomputed(self) -> float | None:
    """The mean of the cells, where that is not the printed average.

    Cells and average are rounded to 0.01, each by 0.005 at most, so the two
    may be 0.01 apart.
    """
    if self.scores is None or self.average is None:
      return None
    mean = sum(self.scores) / len(self.scores)
    # The last term is for floating point.
    return mean if abs(mean - self.average) > 0.01 + 1e-9 else None


@dataclasses.dataclass(frozen=True)
class Ablation:
  """A finding of the paper beside its tables.

  Attributes:
    setting: where it was made.
    finding: in words.
    figures: {name: average accuracy in per cent, or the unit in its name}.
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

# SPDX-License-Identifier: Apache-2.0
"""The paper's tables and ablations as data (arXiv:2309.05444).

Zadouri et al., Pushing mixture of experts to the limit, 2023. The figures are
from secondary sources, each checked against its row's average: look a figure
up in the paper before you publish it.
"""

import dataclasses

from moepeft.config.method_string import Spec
from moepeft.core.ranges import suggestion
from moepeft.evaluation.paper_measure import EIGHT


@dataclasses.dataclass(frozen=True)
class Published:
  """One row of a table of the paper.

  Attributes:
    method: as we write it; 'full' for the authors' own T0, '' for Sanh et
      al.'s, which none of our runs repeats.
    percent: trained parameters as the paper counts them; None where unknown.
    scores: accuracies in per cent in the order of `grid.EIGHT`; None where
      they were not recovered.
    average: as printed.
    name: the method, or what the paper calls its T0.
    note: what is known to be wrong with the row.
  """

  method: str
  percent: float | None
  scores: tuple[float, ...] | None
  average: float | None
  name: str
  note: str = ''

  def cells(self) -> dict[str, float]:
    """{dataset: per cent} and 'average' as printed; what there is."""
    found = dict(zip(EIGHT, self.scores or (), strict=False))
    return found | ({} if self.average is None else {'average': self.average})

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


# Whose row it is, its per cent of the base, the eight accuracies in order and
# their average; '-' where a figure was not recovered.
_PRINTED = {
  't5_large': """
    full           100  35.6 71.43 75.63 57.21 51.41    77 53.04 26.78 56.01
    ia3          0.036     -     -     -     -     -     -     -     -     -
    lora 4       0.497    35 55.36  57.4 63.46 50.24    77 53.28 26.67  52.3
    mov 5         0.27  33.6 41.07 71.48 61.54 50.86  76.5 51.46 26.02 51.57
    mov 10        0.55  33.9 42.86 74.19  62.5 50.31    77 52.64 26.34 52.47
    mov 20         1.1  33.7 41.07 73.83 63.46 50.94 75.46 51.14 25.48 51.89
    mov 30        1.66 33.75 41.07 72.92 55.77 51.25    77 51.46 26.55 51.22
    mov 60        3.32    34 53.57 75.81 57.69 50.55 77.96 53.12 26.33 53.63
    molora 10 4      -  33.2 67.86 68.41  64.9 50.39    80 52.64 26.76 55.52
  """,
  't5_xl': """
    sanh           100 33.46    50 64.08 64.42 50.39 74.92 50.51 27.51 51.91
    full           100 41.08 80.36 76.17 53.37 53.92 88.94 57.46 29.19 60.06
    ia3          0.018 34.08    50 66.43 56.25 55.41 79.08 52.09 29.91  52.9
    lora 4         0.3  37.5 75.57 73.53 61.02 51.25  83.6 54.33 25.32 57.51
    lora 8         0.6  37.5    75 77.98  62.5 51.49 83.67 55.72  27.3 58.89
    lora 16        1.2  38.5 80.36 76.71 63.46 51.02  84.5  54.7 27.11 59.54
    mov 10        0.32 38.92    75 78.88  62.5 52.19 85.77 55.96 30.24 59.93
    mov 30        0.68  38.7 78.57 80.87 63.46  51.1 87.25 56.27 28.63 60.61
    mov 60        1.22 38.83 76.79 74.55  60.1 52.66 89.79 55.49 30.47 59.83
    molora 2 4    0.75  39.2 82.14 80.32  62.5 50.39 80.58 57.38 28.47 60.12
    molora 10 4   3.18  38.5 78.57 78.16 63.46 50.86  86.5 55.41 26.72 59.77
    molora 15 4   4.69    40 80.36 80.51 62.98 50.86    89 55.33  27.3 60.79
  """,
  't5_xxl': """
    sanh           100 42.17 78.57 81.23 64.42 57.21 90.79 60.46 33.65 63.56
    full           100  47.1 80.36 81.41  60.1 56.27 96.08 67.32 31.61 65.03
    ia3         0.0098  42.3 73.21 75.99 58.65 52.04 86.27  54.3 30.27 59.12
    mov 10       0.143 45.83 76.79 78.52 53.85 51.88 94.23 63.77  33.5  62.3
    mov 20       0.287 44.58 76.79 73.83 55.77 52.98    95 62.27 32.92 61.77
    mov 30       0.431  43.6 76.79 77.62 56.73 53.84 93.62 64.25 31.34 62.22
    mov 60       0.862 45.17    75 83.03  60.1 53.68 95.42 65.82 34.38 64.08
  """,
}
_OPTIONS = {
  'lora': ('rank',),
  'mov': ('experts',),
  'molora': ('experts', 'rank'),
}
# What the paper calls the T0 of Sanh et al. and its own, fully fine-tuned.
_T0 = {
  't5_large': {'full': 'T0-770M (authors)'},
  't5_xl': {
    'sanh': 'T0-3B (Sanh et al.)',
    'full': "T0-3B (authors' replication)",
  },
  't5_xxl': {'sanh': 'T0-11B (Sanh et al.)', 'full': 'T0-11B (authors)'},
}
_NOTES = {
  ('t5_large', 'ia3'): 'scores not recovered',
  ('t5_large', 'molora(experts=10, rank=4)'): (
    'hellaswag cell back-solved from the average'
  ),
  ('t5_xl', 'lora(rank=4)'): (
    'the cells do not sum to the average; only the average is corroborated'
  ),
}


def _row(size: str, line: str) -> Published:
  figures = [None if x == '-' else x for x in line.split()[-2 - len(EIGHT) :]]
  percent, *scores, average = (x and float(x) for x in figures)
  kind, *values = line.split()[: -len(figures)]
  options = zip(_OPTIONS.get(kind, ()), map(int, values), strict=True)
  method = str(Spec(kind, tuple(options)))
  return Published(
    '' if kind == 'sanh' else method,
    percent,
    None if None in scores else tuple(scores),
    average,
    _T0[size].get(kind, method),
    _NOTES.get((size, method), ''),
  )


@dataclasses.dataclass(frozen=True)
class Ablation:
  """A finding of the paper beside its tables.

  Attributes:
    setting: where it was made.
    figures: {what: average accuracy in per cent, or the unit in its name}.
    says: the finding in words.
  """

  setting: str
  figures: dict[str, float]
  says: str


ABLATIONS = {
  'merging': Ablation(
    't5_xl, mov(experts=10)',
    {'soft': 59.93, 'top_2': 57.45, 'top_1': 54.92, 'load_balancing': -1.5},
    'soft merging is better than the two or the one likeliest expert; a loss '
    'that balances the load lowers top-2 by that much more',
  ),
  'sentence_router': Ablation(
    'routing on a frozen sentence embedding of the instruction',
    {'least_loss_percent': 0.94, 'most_loss_percent': 8.86},
    'it loses against routing every token',
  ),
  'batch_and_rate': Ablation(
    'batch size and learning rate',
    {
      'stable_batch': 32,
      'stable_rate': 3e-4,
      'collapsing_batch': 2048,
      'collapsed_by_step': 5000,
    },
    'with the large batch, or a larger rate, routing collapses to the level '
    'of one dense adapter',
  ),
}


TABLES = {
  size: tuple(_row(size, line) for line in text.strip().splitlines())
  for size, text in _PRINTED.items()
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

# SPDX-License-Identifier: Apache-2.0
"""Columns of a table of runs: how their routers ended up."""

import os
from collections.abc import Sequence

import numpy as np

from moepeft import rows
from moepeft.scoring import routing
from moepeft.scoring.folders import Entry
from moepeft.scoring.forms import Cell, Column

COLUMNS = (
  Column('entropy', 'router entropy', 'share'),
  Column('top', 'fullest expert', 'share'),
  Column('worst', 'fullest, worst site', 'share'),
)
NOTE = (
  'Routing is that of the last batch that the metrics of a run have, over '
  'sites and layers: the mean entropy of the routers over ln e (1 is even; '
  'before any selection), and the share of the tokens that the fullest of the '
  'e experts gets, on average and at the worst site; means over seeds; missing '
  'where nothing is routed or a seed has no metrics.jsonl.'
)


def cells(entries: Sequence[Entry]) -> dict[str, Cell]:
  """Of a table's row, which is a run for each seed.

  Empty where nothing is routed, or where any of the runs has no metrics.
  """
  found = [of_entry(entry) for entry in entries]
  if None in found:
    return {}
  return {
    key: Cell(float(np.mean([getattr(one, key) for one in found])))
    for key in (column.key for column in COLUMNS)
  }


def of_entry(entry: Entry) -> routing.Routing | None:
  """What metrics.jsonl says last, up to the step that was evaluated."""
  if entry.is_base:
    return None
  told = rows.stream(os.path.join(entry.folder, rows.NAME))
  return routing.latest(row for row in told if row['step'] <= entry.step)

# SPDX-License-Identifier: Apache-2.0
"""Trackers: the places besides metrics.jsonl where a run's metrics go.

A new tracker is a file with a `TrackerSpec` and a line in `TRACKERS`, or a
user's module that calls `TRACKERS.register`. config.log.trackers names those
of a run.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from moepeft.core.registry import Registry
from moepeft.runs import metrics_log
from moepeft.runs.history import PREFERENCE_METRICS, short_names
from moepeft.runs.metrics_log import MetricsLog
from moepeft.runs.run import Run

TRACKERS = Registry(
  'tracker',
  'moepeft.runs.trackers',
  {
    'tensorboard': 'tensorboard:TRACKER',
    'wandb': 'wandb:TRACKER',
  },
)
# Curves stand together by the part before the slash; all others are 'train'.
_PAGES = {
  'steps_per_s': 'speed',
  'inputs_padding': 'data',
  'targets_padding': 'data',
  'examples_per_s': 'speed',
  'tokens_per_s': 'speed',
  'memory_bytes': 'speed',
  'validation_loss': 'validation',
  **dict.fromkeys(PREFERENCE_METRICS, 'preference'),
  **dict.fromkeys(
    (f'validation_{key}' for key in PREFERENCE_METRICS), 'validation'
  ),
}


class Tracker(Protocol):
  """An open tracker of one run."""

  def write(self, row: Mapping[str, Any]) -> None:
    """Takes a row as `moepeft.runs.metrics_log` describes it."""

  def close(self) -> None:
    """Called once, at the end of a run or when a signal ends it."""


@dataclasses.dataclass(frozen=True)
class TrackerSpec:
  """The entry of a tracker.

  Attributes:
    open: (run, step, config) -> the tracker of a run that begins or goes on.
      `step` is the one that it goes on from: rows of later steps are written
      again. `config` is the run's, as a nested dict. Raises a ValueError, a
      sentence with a remedy, where the tracker cannot be opened.
    is_local: whether all that the tracker writes is in the run's directory.
      Others are opened first: they may refuse the run, which then has left
      no file.
    view: a shell command that shows the metrics, with {workdir}; '' for none.
  """

  open: Callable[[Run, int, Mapping[str, Any]], Tracker]
  is_local: bool = True
  view: str = ''


def specs(names: str) -> list[TrackerSpec]:
  """The entries of config.log.trackers, names with commas between them.

  Raises:
    ValueError: there is no tracker of a name.
  """
  parts = (name.strip() for name in names.split(','))
  return [TRACKERS.lookup(name) for name in parts if name]


def view_commands(names: str, workdir: str) -> str:
  """The commands that show a run's metrics, with semicolons between them."""
  commands = (spec.view.format(workdir=workdir) for spec in specs(names))
  return '; '.join(filter(None, commands))


def open_trackers(
  run: Run, step: int, config: Mapping[str, Any]
) -> list[Tracker]:
  """The metrics log of a run, and the trackers that its config names.

  Args:
    step: that the run goes on from; rows of later steps are dropped.
    config: the run's, as a nested dict.

  Raises:
    ValueError: a tracker is unknown or cannot be opened.
  """
  opened = [
    spec.open(run, step, config)
    for spec in sorted(
      specs(config['log']['trackers']), key=lambda spec: spec.is_local
    )
  ]
  # A run that begins measures step 0 once more.
  return [MetricsLog(run.metrics_file, step or -1), *opened]


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
  """{tag: value} of a row's finite numbers, for a page of curves.

  A site's entropy and the share of its fullest expert are means over layers;
  the tag has the kind of the share, a key of `metrics_log.SHARES`.
  """
  tags = {}
  for key, value in row.items():
    if key != 'step' and isinstance(value, (int, float)):
      page = _PAGES.get(key, 'train')
      tags[f'{page}/{key.removeprefix(f"{page}_")}'] = float(value)
  routing = row.get('routing', {})
  for site, name in short_names(routing).items():
    tags[f'entropy/{name}'] = float(np.mean(routing[site]['entropy']))
    kind, shares = metrics_log.shares(routing[site])
    tags[f'max_{kind}/{name}'] = float(
      np.mean([max(layer) for layer in shares])
    )
  return {tag: v for tag, v in tags.items() if math.isfinite(v)}

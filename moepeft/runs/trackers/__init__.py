# SPDX-License-Identifier: Apache-2.0
"""Trackers: backends besides metrics.jsonl that a run's metrics are logged to.

A new tracker is a file with a `TrackerSpec` and a line in `TRACKERS`, or a
user's module that calls `TRACKERS.register`. config.log.trackers names a run's
trackers.
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
# Metric -> the section of its tag, before the slash; 'train' for all others.
_SECTIONS = {
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
    """Logs a row of `moepeft.runs.metrics_log`."""

  def close(self) -> None:
    """Called once, at the end of the run or when a signal ends it."""


@dataclasses.dataclass(frozen=True)
class TrackerSpec:
  """The entry of a tracker.

  Attributes:
    open: (run, step, config) -> the tracker of a new or resumed run. A run
      resumes from `step`, so that rows of later steps are written again.
      `config` is the run's config as a nested dict. Raises a ValueError with
      a remedy if the tracker cannot be opened.
    is_local: whether the tracker writes to the run's directory only. Other
      trackers are opened first, so that no file is left if they refuse the
      run.
    view: a shell command that shows the metrics, with {workdir}, or ''.
  """

  open: Callable[[Run, int, Mapping[str, Any]], Tracker]
  is_local: bool = True
  view: str = ''


def specs(names: str) -> list[TrackerSpec]:
  """The entries of config.log.trackers, which are separated by commas.

  Raises:
    ValueError: a tracker is unknown.
  """
  parts = (name.strip() for name in names.split(','))
  return [TRACKERS.lookup(name) for name in parts if name]


def view_commands(names: str, workdir: str) -> str:
  """The shell commands that show a run's metrics, separated by semicolons."""
  commands = (spec.view.format(workdir=workdir) for spec in specs(names))
  return '; '.join(filter(None, commands))


def open_trackers(
  run: Run, step: int, config: Mapping[str, Any]
) -> list[Tracker]:
  """Opens a run's metrics log and the trackers that its config names.

  Args:
    step: the step that the run resumes from; rows of later steps are removed.
    config: the run's config as a nested dict.

  Raises:
    ValueError: a tracker is unknown or cannot be opened.
  """
  trackers = [
    spec.open(run, step, config)
    for spec in sorted(
      specs(config['log']['trackers']), key=lambda spec: spec.is_local
    )
  ]
  # A new run evaluates step 0 again, so its row is removed, too.
  return [MetricsLog(run.metrics_file, step or -1), *trackers]


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
  """Tag -> value of a row's finite numbers, for dashboards.

  A site's entropy and the largest share of an expert are means over layers.
  The tag of a share has its kind, a key of `metrics_log.SHARES`.
  """
  tags = {}
  for key, value in row.items():
    if key != 'step' and isinstance(value, (int, float)):
      section = _SECTIONS.get(key, 'train')
      tags[f'{section}/{key.removeprefix(f"{section}_")}'] = float(value)
  routing = row.get('routing', {})
  for site, name in short_names(routing).items():
    tags[f'entropy/{name}'] = float(np.mean(routing[site]['entropy']))
    kind, shares = metrics_log.shares(routing[site])
    tags[f'max_{kind}/{name}'] = float(
      np.mean([max(layer) for layer in shares])
    )
  return {tag: v for tag, v in tags.items() if math.isfinite(v)}

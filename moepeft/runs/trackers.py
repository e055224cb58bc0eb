# SPDX-License-Identifier: Apache-2.0
"""Where a run's rows go: metrics.jsonl, TensorBoard, Weights & Biases."""

import math
import os
import time
import uuid
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from moepeft.core import files, secrets
from moepeft.runs import metrics_log
from moepeft.runs.history import FIGURES, short
from moepeft.runs.metrics_log import MetricsLog
from moepeft.runs.run import Run

# Curves stand together by what is before the slash; all else is 'train'.
_PAGES = {
  'steps_per_s': 'speed',
  'inputs_padding': 'data',
  'targets_padding': 'data',
  'examples_per_s': 'speed',
  'tokens_per_s': 'speed',
  'memory_bytes': 'speed',
  'validation_loss': 'validation',
  **dict.fromkeys(FIGURES, 'preference'),
  **dict.fromkeys((f'validation_{key}' for key in FIGURES), 'validation'),
}
_WANDB_ID = 'wandb_id'


class Writer(Protocol):
  """Takes rows as `moepeft.runs.metrics_log` describes them."""

  def write(self, row: Mapping[str, Any]) -> None: ...

  def close(self) -> None: ...


def writers(
  workdir: str,
  step: int,
  tensorboard: bool,
  wandb: str,
  config: Mapping[str, Any],
) -> list[Writer]:
  """All that a run writes its rows to.

  Args:
    step: that the run goes on from; what was written of later ones is dropped.
    tensorboard: config.log.tensorboard.
    wandb: config.log.wandb, the project; '' for none.
    config: shown by Weights & Biases beside the curves.

  Raises:
    ValueError: the package wandb is missing, or does not let the run begin.
  """
  # First what may be refused: the others leave files behind.
  found: list[Writer] = []
  if wandb:
    found.append(WandB(workdir, wandb, config))
  if tensorboard:
    found.append(TensorBoard(os.path.join(workdir, 'tensorboard'), step))
  # A run that begins measures step 0 once more.
  return [MetricsLog(Run(workdir).metrics_file, step or -1), *found]


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
  """{tag: value} of a row's finite numbers, for a page of curves.

  A site's entropy and the share of its fullest expert are means over layers;
  the tag says which share of `rows.SHARES` it is.
  """
  found = {}
  for key, value in row.items():
    if key != 'step' and isinstance(value, (int, float)):
      page = _PAGES.get(key, 'train')
      found[f'{page}/{key.removeprefix(f"{page}_")}'] = float(value)
  routing = row.get('routing', {})
  for site, name in short(routing).items():
    found[f'entropy/{name}'] = float(np.mean(routing[site]['entropy']))
    kind, shares = metrics_log.shares(routing[site])
    found[f'max_{kind}/{name}'] = float(np.mean([max(own) for own in shares]))
  return {tag: v for tag, v in found.items() if math.isfinite(v)}


class TensorBoard:
  """Event files in a folder; on going on, curves are cut at the step.

  The events are written as they come, not by tensorboardX's thread: that
  would die of a full disk, and the loop wait for it without end.
  """

  def __init__(self, folder: str, step: int = 0):
    os.makedirs(folder, exist_ok=True)
    # The step, as files of one second would have one name.
    self._events = EventsWriter(os.path.join(folder, 'events'), f'.{step:09}')
    # What earlier files hold of this step and later is then left out.
    start = SessionLog(status=SessionLog.START)
    self._add(Event(step=step + 1 if step else 0, session_log=start))
    self._events.flush()

  def write(self, row: Mapping[str, Any]) -> None:
    values = [
      value
      for tag, number in scalars(row).items()
      for value in summary.scalar(tag, number).value
    ]
    routing = row.get('routing', {})
    for site, name in short(routing).items():
      kind, shares = metrics_log.shares(routing[site])
      values += _histogram(f'{kind}/{name}', shares).value
    self._add(Event(step=row['step'], summary=Summary(value=values)))
    # With the system, so that a kill leaves no gap before a checkpoint.
    self._events.flush()

  def close(self) -> None:
    self._events.close()

  def _add(self, event: Event) -> None:
    event.wall_time = time.time()
    self._events.write_event(event)


def _histogram(tag: str, shares: list) -> Summary:
  """A histogram with a bar an expert: its share, the mean over layers."""
  shares = np.asarray(shares, np.float64).mean(axis=0)
  experts = np.arange(len(shares))
  return summary.histogram_raw(
    tag,
    min=-0.5,
    max=len(shares) - 0.5,
    num=shares.sum(),
    sum=(experts * shares).sum(),
    sum_squares=(experts**2 * shares).sum(),
    bucket_limits=(experts + 0.5).tolist(),
    bucket_counts=shares.tolist(),
  )


class WandB:
  """A run of Weights & Biases, the same one each time that a run goes on."""

  def __init__(self, workdir: str, project: str, config: Mapping[str, Any]):
    try:
      import wandb
    except ImportError:
      raise ValueError(
        f'config.log.wandb={project!r} needs the package wandb; pip install '
        'wandb, or unset config.log.wandb'
      ) from None
    try:
      self._run = wandb.init(
        project=project,
        id=_wandb_id(workdir),
        resume='allow',
        dir=workdir,
        config=dict(config),
      )
    except wandb.errors.Error as e:
      reason = (str(e).splitlines() or [type(e).__name__])[0]
      # Without its cause, whose trace may hold the key.
      raise ValueError(
        f'Weights & Biases did not begin the run ({secrets.hidden(reason)}); '
        'run `wandb '
        'login`, or unset config.log.wandb'
      ) from None

  def write(self, row: Mapping[str, Any]) -> None:
    # It drops steps that it has; after a resume these are the same numbers.
    self._run.log(scalars(row), step=row['step'])

  def close(self) -> None:
    self._run.finish()


def _wandb_id(workdir: str) -> str:
  """The run's name at Weights & Biases, kept in the work directory."""
  path = os.path.join(workdir, _WANDB_ID)
  if os.path.exists(path):
    return files.read_text(path).strip()
  name = uuid.uuid4().hex[:8]
  files.write_text(path, name)
  return name

# SPDX-License-Identifier: Apache-2.0
"""Event files of TensorBoard in a run's directory."""

import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from moepeft.runs import metrics_log
from moepeft.runs.history import short_names
from moepeft.runs.run import Run
from moepeft.runs.trackers import TrackerSpec, scalars


class TensorBoard:
  """Event files in a folder; a resumed run drops the events after its step.

  Events are written without tensorboardX's thread: it would end on a full disk,
  and the training loop would wait for it forever.
  """

  def __init__(self, folder: str, step: int = 0):
    os.makedirs(folder, exist_ok=True)
    # The suffix is the step, as files of the same second have the same name.
    self._events = EventsWriter(os.path.join(folder, 'events'), f'.{step:09}')
    # TensorBoard then ignores events of earlier files from this step on.
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
    for site, name in short_names(routing).items():
      kind, shares = metrics_log.share_array(routing[site])
      values += _histogram(f'{kind}/{name}', shares).value
    self._add(Event(step=row['step'], summary=Summary(value=values)))
    # Flushed to the system, so that a kill leaves no gap before a checkpoint.
    self._events.flush()

  def close(self) -> None:
    self._events.close()

  def _add(self, event: Event) -> None:
    event.wall_time = time.time()
    self._events.write_event(event)


def _histogram(tag: str, shares: np.ndarray) -> Summary:
  """A histogram with a bar per expert: its mean share over the layers."""
  shares = np.nanmean(shares, axis=0)
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


def _open(run: Run, step: int, config: Mapping[str, Any]) -> TensorBoard:
  del config
  return TensorBoard(os.path.join(run.path, 'tensorboard'), step)


TRACKER = TrackerSpec(_open, view='tensorboard --logdir={workdir}')

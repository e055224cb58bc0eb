# SPDX-License-Identifier: Apache-2.0
"""A tracker that logs to Weights & Biases."""

import os
import uuid
from collections.abc import Mapping
from typing import Any

from moepeft.core import files, secrets
from moepeft.runs.run import Run
from moepeft.runs.trackers import TrackerSpec, scalars

_ID_FILE = 'wandb_id'


class WandB:
  """A Weights & Biases run; a resumed run continues the same one."""

  def __init__(self, workdir: str, project: str, config: Mapping[str, Any]):
    try:
      import wandb
    except ImportError:
      raise ValueError(
        "'wandb' in config.log.trackers needs the package wandb; pip install "
        'wandb, or leave it out'
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
      # `from None`, as the traceback of the cause may contain the API key.
      raise ValueError(
        f'Weights & Biases did not start the run ({secrets.redact(reason)}); '
        "run `wandb login`, or leave 'wandb' out of config.log.trackers"
      ) from None

  def write(self, row: Mapping[str, Any]) -> None:
    # wandb ignores steps that it has; after a resume their values are equal.
    self._run.log(scalars(row), step=row['step'])

  def close(self) -> None:
    self._run.finish()


def _wandb_id(workdir: str) -> str:
  """The run's id at Weights & Biases, saved in the work directory."""
  path = os.path.join(workdir, _ID_FILE)
  if os.path.exists(path):
    return files.read_text(path).strip()
  name = uuid.uuid4().hex[:8]
  files.write_text(path, name)
  return name


def _open(run: Run, step: int, config: Mapping[str, Any]) -> WandB:
  del step
  project = config['log']['wandb_project']
  if not project:
    raise ValueError(
      "'wandb' in config.log.trackers needs config.log.wandb_project; set it "
      'to the name of a project'
    )
  return WandB(run.path, project, config)


TRACKER = TrackerSpec(_open, is_local=False)

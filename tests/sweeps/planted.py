# SPDX-License-Identifier: Apache-2.0
"""Run directories of trials, as moepeft.train leaves them at its end."""

import json
import os

from moepeft import config as config_lib
from moepeft.sweeps import grid
from moepeft.sweeps.directory import SweepDirectory
from moepeft.sweeps.trials import make_trials


def planted(folder, text):
  """(directory, trials) of a grid, without any run."""
  config = config_lib.default()
  directory = SweepDirectory(str(folder))
  directory.prepare(config)
  return directory, make_trials(config, grid.parse(text))


def finish(directory, trial, loss, rows=(), means=None, **summary):
  """Writes the files of a run that ended with a validation loss."""
  run = directory.run(trial)
  os.makedirs(run.path)
  with open(run.metrics_file, 'w') as file:
    file.write(''.join(f'{json.dumps(row)}\n' for row in rows))
  after = {'step': 300, 'means': means or {}}
  if loss is not None:
    after['validation_loss'] = loss
  contents = {
    run.after_file: after,
    run.summary_file: {'method': trial.method, 'seconds': 9.5} | summary,
  }
  for path, content in contents.items():
    with open(path, 'w') as file:
      json.dump(content, file)

# SPDX-License-Identifier: Apache-2.0
"""Plots of a run appear at the steps that the config names."""

import contextlib
from types import SimpleNamespace

import pytest
from matplotlib import image

from moepeft.config import check, default
from moepeft.runs import plots
from moepeft.runs.history import History
from moepeft.training.callbacks.plotting import PLOTTING
from moepeft.training.loop import TrainingLoop

from ...runs.test_plots import row


class Loop:
  """The parts of a training loop that draw: metrics are logged at steps."""

  is_due = TrainingLoop.is_due

  def __init__(self, folder, rows=()):
    self.history = History(rows)
    self.run = SimpleNamespace(plots_dir=str(folder))
    self.progress = SimpleNamespace(
      paused=lambda text: contextlib.nullcontext()
    )
    self.metrics = SimpleNamespace(flushed_step=0)
    self.before = self.after = {}

  def flush_metrics(self):
    self.metrics.flushed_step = self.step
    self.history.write(row(self.step))


def steps_with_plots(callback, loop, folder, steps):
  """The steps after which there are new plots, each checked to be a picture."""
  drawn = []
  callback.on_start(loop)
  for loop.step in steps:
    callback.on_step(loop, {}, {})
    if folder.exists():
      drawn.append(loop.step)
      for path in folder.iterdir():
        assert image.imread(path)[..., :3].std() > 0.02, path
        path.unlink()
      folder.rmdir()
  return drawn


def config(**log):
  value = default()
  value.log.update(log)
  return value


def test_plots_appear_at_the_steps_that_are_named(tmp_path):
  folder = tmp_path / 'plots'
  callback = PLOTTING.build(config(plots_every_steps=3))
  loop = Loop(folder)
  assert steps_with_plots(callback, loop, folder, range(1, 8)) == [3, 6]
  callback.on_end(loop)
  assert (folder / 'router_weight_steps.png').exists()


def test_without_them_there_are_none_before_a_minute(tmp_path):
  folder = tmp_path / 'plots'
  callback = PLOTTING.build(config())
  assert steps_with_plots(callback, Loop(folder), folder, range(1, 8)) == []


def test_drawing_takes_two_percent_of_the_time_at_most(tmp_path, monkeypatch):
  now = [0.0]
  monkeypatch.setattr(plots.time, 'monotonic', lambda: now[0])

  def draw_slowly(*args):
    now[0] += 2.0

  monkeypatch.setattr(plots, 'draw', draw_slowly)
  figures = plots.Figures(History(), str(tmp_path))
  now[0] = 61.0
  assert figures.due
  # From 61 to 63 s; 2 s are 2 % of 100 s.
  figures.draw()
  now[0] = 162.0
  assert not figures.due
  now[0] = 164.0
  assert figures.due


def test_a_resumed_run_draws_all_steps(tmp_path):
  # The history of a run is read from its metrics before it goes on.
  loop = Loop(tmp_path / 'plots', [row(2), row(4)])
  callback = PLOTTING.build(config(plots_every_steps=2))
  steps_with_plots(callback, loop, tmp_path / 'plots', [5, 6])
  assert [state.step for state in loop.history.routing()] == [2, 4, 6]


def test_steps_without_plots_are_refused():
  with pytest.raises(ValueError, match='plots_every_steps=5 does nothing'):
    check.check(config(plots=False, plots_every_steps=5), {})
  with pytest.raises(ValueError, match='log.plots_every_steps'):
    check.check(config(plots_every_steps=-1), {})

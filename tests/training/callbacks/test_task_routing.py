# SPDX-License-Identifier: Apache-2.0
"""The experts by task are measured and drawn at the steps that are named."""

import contextlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from matplotlib import image

from moepeft import train
from moepeft.checkpoints.hf import model as hf
from moepeft.core import sharding
from moepeft.runs import router_task_plot
from moepeft.training import setup
from moepeft.training.callbacks.task_routing import TaskRoutingPlot
from moepeft.training.loop import TrainingLoop
from moepeft.training.task_routing import TaskRouting

from ...evaluation.routing import planted
from ..test_train import card

ROWS = {
  'a': [planted.example('a', 'aaa'), planted.example('a', 'a' * 11)],
  'b': [planted.example('b', 'bb')],
}


@pytest.fixture(scope='module')
def measured():
  """(TaskRouting of the planted rows, its shares, the number of traces)."""
  model, variables = planted.model()
  traces = []

  def apply(*args, **options):
    traces.append(args)
    return model.apply(*args, **options)

  routing = TaskRouting(
    SimpleNamespace(apply=apply), planted.collator(), ROWS, sharding.layout()
  )
  return routing, routing(variables), traces


def test_tasks_have_the_shares_of_their_planted_experts(measured):
  routing, shares, _ = measured
  assert routing.tasks == ('a', 'b')
  # Letters and an EOS for each row; see `planted.model`.
  a = (14 * np.array([0.8, 0.1, 0.1]) + 2 / 3) / 16
  b = (2 * np.array([0.1, 0.1, 0.8]) + 1 / 3) / 3
  # Logged shares have four digits.
  np.testing.assert_allclose(shares[planted.PATH][:, 0], [a, b], atol=1e-4)


def test_nothing_is_compiled_again(measured):
  routing, shares, traces = measured
  _, variables = planted.model()
  # One program for both tasks: the row of one is repeated.
  assert len(traces) == 1
  moved = jax.tree.map(lambda a: a + 0.1, variables['peft'])
  again = routing({**variables, 'peft': moved})
  assert len(traces) == 1
  assert not np.array_equal(again[planted.PATH], shares[planted.PATH])
  # Nor for another run of the same model.
  rows = {'a': [planted.example('a', 'a' * 11)], 'b': ROWS['a']}
  other = TaskRouting(
    SimpleNamespace(apply=None), planted.collator(), rows, sharding.layout()
  )
  other.share_programs(routing)
  b = other(variables)[planted.PATH][1]
  np.testing.assert_array_equal(b, shares[planted.PATH][0])
  assert len(traces) == 1


def test_a_panel_has_all_layers_side_by_side(measured):
  routing, shares, _ = measured
  figure = router_task_plot.by_task(shares, routing.tasks, 7)
  panel, *_ = (axes for axes in figure.axes if axes.images)
  drawn = np.asarray(panel.images[0].get_array())
  # Two layers of three experts.
  np.testing.assert_array_equal(drawn[:, :3], shares[planted.PATH][:, 0])
  np.testing.assert_array_equal(drawn[:, 3:], shares[planted.PATH][:, 1])
  assert [text.get_text() for text in panel.get_yticklabels()] == ['a', 'b']
  assert [text.get_text() for text in panel.get_xticklabels()] == ['0', '1']


def test_layers_with_fewer_experts_and_tasks_without_tokens_are_blank():
  share = np.full((2, 2, 3), np.nan)
  share[0] = [[0.2, 0.3, 0.5], [0.4, 0.6, np.nan]]
  figure = router_task_plot.by_task({planted.PATH: share}, 'ab', 7)
  panel, *_ = (axes for axes in figure.axes if axes.images)
  blank = np.ma.getmaskarray(panel.images[0].get_array())
  assert blank.tolist() == [[False] * 5 + [True], [True] * 6]


def test_the_map_is_drawn_at_the_steps_that_are_named(measured, tmp_path):
  routing, _, _ = measured
  _, variables = planted.model()
  path = tmp_path / 'expert_by_task.png'
  loop = SimpleNamespace(
    task_routing=routing,
    variables=variables,
    run=SimpleNamespace(plots_dir=str(tmp_path)),
    progress=SimpleNamespace(paused=lambda text: contextlib.nullcontext()),
    signal=None,
  )
  loop.is_due = lambda every: TrainingLoop.is_due(loop, every)
  callback, drawn = TaskRoutingPlot(3), []
  for loop.step in range(1, 8):
    callback.on_step(loop, {}, {})
    if path.exists():
      drawn.append(loop.step)
      assert image.imread(path)[..., :3].std() > 0.02
      path.unlink()
  assert drawn == [3, 6]
  callback.on_end(loop)
  assert path.exists()


def test_a_run_of_several_tasks_has_the_map_and_one_of_a_task_none(tmp_path):
  _, variables = planted.model()
  base = str(tmp_path / 'hf')
  hf.save(base, planted.CONFIG, variables['params'])
  config = card(base, steps=1, **{'log.plots': True})
  config.log.plots_every_steps = 1
  config.data.tasks = 'stars,kind'
  train.train(config, str(tmp_path / 'run'))
  assert (tmp_path / 'run/plots/expert_by_task.png').exists()
  config.data.tasks = 'stars'
  config = train.check(config, str(tmp_path / 'other'))
  assert setup.build(config, '', dry_run=True).task_routing is None

# SPDX-License-Identifier: Apache-2.0
"""Figures show what the rows hold, and no more than can be drawn quickly."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure

from moepeft.runs import (
  before_after_plot,
  plots,
  router_load_plot,
  router_plots,
)
from moepeft.runs.history import History, Subsample
from moepeft.runs.plots import smooth

SITES = (
  'decoder/layers/mlp/wo/molora',
  'decoder/layers/self/k/molora',
  'encoder/layers/self/k/molora',
  'encoder/layers/self/q/molora',
)


def row(step, layers=5, experts=3, sites=SITES, kind='weight'):
  """The share of expert 1 in layer 2 grows with the step, up to all."""
  share = min(step / 100, 1.0)
  load = np.full((layers, experts), 1 / experts)
  load[2] = (1 - share) / max(experts - 1, 1)
  load[2, min(1, experts - 1)] = share
  return {
    'step': step,
    'loss': 10 / step,
    'learning_rate': 1e-3,
    'routing': {
      site: {
        kind: load.tolist(),
        # Layer 0 is uniform, the others half as sure.
        'entropy': [np.log(experts)] + [np.log(experts) / 2] * (layers - 1),
      }
      for site in sites
    },
  }


def names(drawn):
  return {path.rpartition('/')[2].removesuffix('.png') for path in drawn}


def test_a_routed_run_has_five_figures_that_are_pictures(tmp_path):
  drawn = plots.draw([row(s) for s in range(1, 8)], str(tmp_path / 'plots'))
  assert names(drawn) == {
    'loss',
    'learning_rate',
    'router_weight',
    'router_weight_steps',
    'router_entropy',
  }
  for path in drawn:
    pixels = image.imread(path)
    # Not blank: curves, words and maps are darker than paper.
    assert pixels[..., :3].std() > 0.02, path
  # No temporary file is left.
  assert len(list((tmp_path / 'plots').iterdir())) == 5


def test_there_is_no_figure_of_what_is_not_there(tmp_path):
  folder = str(tmp_path)
  assert plots.draw([], folder) == []
  assert names(plots.draw([{'step': 1, 'loss': 2.0}], folder)) == {'loss'}
  # Full fine-tuning has no routers, and one expert nothing to choose.
  bare = row(1) | {'routing': {}}
  single = row(1, experts=1)
  for history in (bare, single):
    assert names(plots.draw([history], folder)) == {'loss', 'learning_rate'}
  validation = [{'step': 4, 'validation_loss': 2.0}]
  assert names(plots.draw(validation, folder)) == {'loss'}


def test_what_is_not_finite_is_left_out_not_drawn_as_zero(tmp_path):
  rows = [row(s) for s in range(1, 300)]
  rows[5]['loss'] = None  # as metrics.jsonl has it
  rows[6]['loss'] = np.nan
  rows[7]['routing'][SITES[0]]['entropy'] = [None] * 5
  assert len(plots.draw(rows, str(tmp_path))) == 5


def test_the_old_picture_stays_until_the_new_is_whole(tmp_path, monkeypatch):
  rows = [row(s) for s in range(1, 8)]
  (path, *_) = plots.draw(rows, str(tmp_path))
  with open(path, 'rb') as f:
    before = f.read()

  def fail(self, target, **options):
    with open(target, 'wb') as f:
      f.write(b'half')
    raise OSError('No space left on device')

  monkeypatch.setattr(plots.Figure, 'savefig', fail)
  with pytest.raises(OSError, match='No space'):
    plots.draw(rows, str(tmp_path))
  with open(path, 'rb') as f:
    assert f.read() == before


def panels(figure):
  return {a.get_title(): a for a in figure.axes if a.get_title()}


def test_shares_are_a_map_of_layers_by_experts_at_the_latest_step():
  history = History([row(s) for s in range(1, 8)])
  figure = router_plots.shares(history.routing(), 'weight')
  # Three places; the fullest expert beside each, and the colours.
  assert len(figure.axes) == 4 + 3 + 1
  (heat,) = panels(figure)['wo'].images
  shares = np.asarray(heat.get_array())
  assert shares.shape == (5, 3)
  np.testing.assert_allclose(shares[2], [0.465, 0.07, 0.465])
  assert figure.texts[0].get_text() == 'Mean weight of experts after step 7'


def test_each_kind_of_share_has_a_figure_that_names_it(tmp_path):
  dense, sparse = SITES[:2], SITES[2:]
  rows = []
  for step in (1, 2):
    mixed = row(step, sites=dense)
    mixed['routing'] |= row(step, sites=sparse, kind='tokens')['routing']
    rows.append(mixed)
  drawn = names(plots.draw(rows, str(tmp_path)))
  assert {n for n in drawn if n.startswith('router')} == {
    'router_weight',
    'router_tokens',
    'router_weight_steps',
    'router_tokens_steps',
    'router_entropy',
  }
  states = History(rows).routing()
  assert set(panels(router_plots.shares(states, 'tokens'))) & {'k', 'q'}
  assert 'wo' not in panels(router_plots.shares(states, 'tokens'))
  old = History([row(1, kind='load')]).routing()
  assert router_plots.shares(old, 'weight') is None
  texts = [t.get_text() for t in router_plots.shares(old, 'load').texts]
  assert 'Argmax share' in texts[0] and 'no mean weight' in texts[1]


def test_the_fullest_expert_is_that_of_any_layer():
  history = History([row(s) for s in (10, 50, 90)])
  axes = panels(router_plots.shares(history.routing(), 'weight'))[
    'fullest expert of any layer'
  ]
  line = axes.lines[0]
  np.testing.assert_array_equal(line.get_xdata(), [10, 50, 90])
  # At step 10 layer 2 gives 0.45 to the experts 0 and 2.
  np.testing.assert_allclose(line.get_ydata(), [0.45, 0.5, 0.9])


def test_the_experts_over_training_have_a_column_for_each_step():
  # At step 100 layer 2 gives all to expert 1: experts 0 and 2 are dead.
  states = History([row(s) for s in (10, 40, 100)]).routing()
  figure = router_load_plot.load(states, 'weight')
  axes = panels(figure)['wo']
  (heat,) = axes.images
  shares = np.asarray(heat.get_array())
  # A row for each of five layers' three experts; expert 1 of layer 2 is row 7.
  assert shares.shape[0] == 15 and heat.get_extent()[:2] == [10, 100]
  expert = shares[7]
  # Steps 10 to 39 are the first third of the columns.
  assert set(expert[:49]) == {0.1} and set(expert[51:-1]) == {0.4}
  assert expert[-1] == 1
  dead = panels(figure)['dead experts of all layers'].lines[0]
  np.testing.assert_array_equal(dead.get_xdata(), [10, 40, 100])
  np.testing.assert_array_equal(dead.get_ydata(), [0, 0, 2])
  # Four sites of 15 experts each.
  assert '8 of 60 are dead after step 100' in figure.texts[1].get_text()


def test_a_layers_only_expert_is_not_dead():
  share = np.array([[1.0, np.nan, np.nan], [0.995, 0.002, 0.003]])
  expected = [[False, False, False], [False, True, True]]
  np.testing.assert_array_equal(router_load_plot.dead_experts(share), expected)


def test_entropy_is_a_line_a_layer_over_its_most():
  history = History([row(s) for s in (1, 2, 3)])
  axes = panels(router_plots.entropy(history.routing()))['wo']
  (lines,) = axes.collections
  paths = [path.vertices for path in lines.get_paths()]
  assert len(paths) == 5
  np.testing.assert_allclose(paths[0], [[1, 1], [2, 1], [3, 1]])
  np.testing.assert_allclose(paths[4], [[1, 0.5], [2, 0.5], [3, 0.5]])


def test_places_stand_in_the_order_of_the_model():
  figure = router_plots.entropy(History([row(1)]).routing())
  titles = [a.get_title() for a in figure.axes if a.get_title()]
  assert titles == ['q', 'k', 'k', 'wo']
  places = [t.get_text() for t in figure.texts if '/' in t.get_text()]
  assert places == ['encoder/self', 'decoder/self', 'decoder/mlp']


def test_two_methods_at_one_place_are_told_apart():
  sites = ('encoder/layers/self/k/mov', 'encoder/layers/self/k/molora')
  figure = router_plots.entropy(History([row(1, sites=sites)]).routing())
  titles = {a.get_title() for a in figure.axes if a.get_title()}
  assert titles == {'k (mov)', 'k (molora)'}


@pytest.mark.parametrize('count', [0, 1, 7, 8, 9, 1000, 1024, 1025])
def test_thinning_keeps_few_evenly_and_the_latest(count):
  thin = Subsample(8, lambda item: item)
  for item in range(count):
    thin.add(item)
  items = thin.items()
  assert len(items) <= 9
  assert items[-1:] == list(range(count))[-1:]
  if count > 1:
    # Beside the latest, the distances are one power of two.
    steps = {b - a for a, b in zip(items[:-1], items[1:-1], strict=False)}
    assert items[0] == 0 and len(steps) <= 1
  if count >= 8:
    assert len(items) >= 4


def test_a_long_run_is_drawn_from_few_rows(tmp_path):
  sites = [f'encoder/layers/x{i}/k/mov' for i in range(3)]
  rows = (row(s, layers=24, experts=10, sites=sites) for s in range(1, 10_001))
  history = History(rows)
  assert len(history.curve('loss')[0]) <= 2001
  assert len(history.routing()) <= 151
  assert history.routing()[-1].step == history.curve('loss')[0][-1] == 10_000


def test_a_spike_of_a_long_run_does_not_flatten_the_rest():
  rows = [{'step': s, 'loss': 2 + (s % 2)} for s in range(1, 1000)]
  rows[500]['loss'] = 1e6
  (axes,) = plots._loss(History(rows)).axes
  low, high = axes.get_ylim()
  assert low < 2 and 3 < high < 4


def loss_axes(rows):
  (axes,) = plots._loss(History(rows)).axes
  return axes


def test_losses_of_different_size_have_a_logarithmic_scale():
  # 10, 10/2, ..., 10/50.
  axes = loss_axes([{'step': s, 'loss': 10 / s} for s in range(1, 51)])
  assert axes.get_yscale() == 'log'
  low, high = axes.get_ylim()
  assert low < 0.2 and high > 10
  # A bend from 5.8 to 1.6 leaves nothing of the end to be seen.
  bend = [
    {'step': s, 'loss': 1.6 + 4.2 * np.exp(-s / 40)} for s in range(1, 300)
  ]
  assert loss_axes(bend).get_yscale() == 'log'
  near = loss_axes([{'step': s, 'loss': 2 + 1 / s} for s in range(1, 51)])
  assert near.get_yscale() == 'linear'
  # Rewards and the like may be negative.
  negative = loss_axes([{'step': s, 'loss': 5.0 - s} for s in range(1, 51)])
  assert negative.get_yscale() == 'linear'


def test_the_last_validation_is_the_last_point_of_the_curve():
  rows = [{'step': 0, 'validation_loss': 3.0}]
  rows += [{'step': s, 'loss': 3.0 - s / 10} for s in range(1, 8)]
  rows += [{'step': 7, 'validation_loss': 2.25}]
  (curve,) = [
    line for line in loss_axes(rows).lines if line.get_label() == 'validation'
  ]
  np.testing.assert_array_equal(curve.get_xdata(), [0, 7])
  np.testing.assert_array_equal(curve.get_ydata(), [3.0, 2.25])


def judged(loss, right):
  """As `Evaluator` returns it: two tasks, one with two kinds of templates."""
  row = {'group': 'B', 'examples': 10, 'chance': 0.25}
  return {
    'validation_loss': loss,
    'validation_margins': -loss,
    'rows': [
      row | {'task': 'kind', 'templates': 'seen', 'accuracy': right},
      row | {'task': 'kind', 'templates': 'held_out', 'accuracy': 0.5},
      row | {'task': 'stars', 'templates': 'seen', 'accuracy': 1 - right},
    ],
  }


def test_before_and_after_are_drawn_task_by_task(tmp_path):
  figure = before_after_plot.draw(judged(3.0, 0.125), judged(1.5, 0.875))
  axes = {a.get_title() or a.get_title('left'): a for a in figure.axes}
  assert set(axes) == {
    'validation\nloss',
    'validation\nmargins',
    'accuracy (%), seen templates',
    'accuracy (%), held out templates',
  }
  (line,) = axes['validation\nloss'].lines
  np.testing.assert_array_equal(line.get_ydata(), [3.0, 1.5])
  panel = axes['accuracy (%), seen templates']
  assert panel.get_xlim() == (0, 100)
  ends = [list(line.get_xdata()) for line in panel.lines[::4]]
  assert ends == [[12.5, 87.5], [87.5, 12.5]]
  colors = [line.get_color() for line in panel.lines[::4]]
  assert colors == [
    before_after_plot._ROSE_COLOR,
    before_after_plot._FELL_COLOR,
  ]
  (path,) = plots.draw_before_after(
    judged(3.0, 0), judged(1.5, 1), str(tmp_path)
  )
  assert path.endswith('before_after.png')
  assert image.imread(path)[..., :3].std() > 0.02
  # Nothing before, or nothing in common.
  assert plots.draw_before_after({}, judged(1.5, 1), str(tmp_path)) == []


def test_a_change_within_the_noise_of_its_examples_is_grey():
  # Of ten examples each: 5 and 7 are right, and 5 and 3.
  figure = before_after_plot.draw(judged(3.0, 0.5), judged(1.5, 0.7))
  panel = figure.axes[2]
  assert [line.get_color() for line in panel.lines[::4]] == [
    before_after_plot._GREY_COLOR
  ] * 2


def test_the_axis_of_a_loss_has_no_negative_values():
  figure = before_after_plot.draw(
    {'validation_loss': 10}, {'validation_loss': 0.4}
  )
  (axes,) = figure.axes
  assert axes.get_ylim()[0] == 0.0
  share = 'validation_accuracies'
  figure = before_after_plot.draw({share: 0.1}, {share: 1.0})
  (axes,) = figure.axes
  assert axes.get_ylim() == (0.0, 1.0)


def test_the_numbers_of_a_slope_stand_outside_its_line():
  figure = before_after_plot.draw(
    {'validation_loss': 10}, {'validation_loss': 0.4}
  )
  (axes,) = figure.axes
  figure.draw_without_rendering()
  (line,) = axes.lines
  box = line.get_window_extent()
  for text in axes.texts:
    place = text.get_window_extent()
    assert place.x1 <= box.x0 or place.x0 >= box.x1


def test_smoothing_keeps_a_line_straight_and_does_not_lag():
  np.testing.assert_allclose(smooth(np.full(7, 3.0)), 3.0)
  smoothed = smooth(np.arange(1000.0))
  # Away from the ends, where half of the bell is cut off.
  np.testing.assert_allclose(smoothed[50:-50], np.arange(1000.0)[50:-50])
  holes = np.array([1.0, np.nan, 1.0, 1.0, np.inf, 1.0])
  np.testing.assert_allclose(smooth(holes), 1.0)
  assert np.isnan(smooth(np.full(5, np.nan))).all()


def test_chinese_names_get_an_installed_font_that_has_them(
  tmp_path, monkeypatch
):
  fonts = ['DejaVu Sans', 'SimHei']
  monkeypatch.setattr(plots.font_manager, 'get_font_names', lambda: fonts)
  figure = Figure()
  chinese, english = (figure.text(0, 0, name) for name in ('任务', 'task'))
  monkeypatch.setattr(figure, 'savefig', lambda path, **_: Path(path).touch())
  plots.save(figure, str(tmp_path / 'x.png'))
  assert chinese.get_fontfamily() == ['sans-serif', 'SimHei']
  assert english.get_fontfamily() == ['sans-serif']

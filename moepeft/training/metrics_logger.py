# SPDX-License-Identifier: Apache-2.0
"""Metrics of training steps: fetched from the device, written as rows."""

import collections
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moepeft.core.progress import Progress
from moepeft.core.types import Batch
from moepeft.moe import ROUTERS, router_stats
from moepeft.runs import router_diagnosis
from moepeft.runs.trackers import Tracker

# Alarms that are printed at once, and the logs in a row in which a router has
# to be collapsed before there is one.
_PRINTED_ALARMS, _LOGS_IN_A_ROW = 5, 3


class MetricsLogger:
  """Buffers the metrics of steps until they are flushed.

  Steps are dispatched without waiting for the device; a flush waits.

  Attributes:
    flushed_step: the last step whose metrics are written.
  """

  def __init__(
    self,
    trackers: Sequence[Tracker],
    learning_rate: Callable[[int], Any],
    router_alarm: float,
    processes: int = 1,
  ):
    """
    Args:
      learning_rate: a schedule, updates done -> rate.
      router_alarm: config.router_collapse_threshold.
      processes: that read a batch; this one reads an equal share of it.
    """
    self.flushed_step = 0
    self._trackers, self._learning_rate = trackers, learning_rate
    self._router_alarm, self._processes = router_alarm, processes
    self._collapsed_logs = collections.Counter()
    self._alarmed = set()
    self._pending = []
    self._batch_sizes = []

  def add(self, step: int, batch: Batch, metrics: Mapping[str, Any]) -> None:
    """Takes a step's batch, on the host, and its metrics, on the device."""
    if self._pending:
      # The routing of the last step alone is written.
      self._pending[-1][1].pop('routing')
    self._pending.append((step, dict(metrics)))
    self._batch_sizes.append(_batch_size(batch))

  def flush(self, progress: Progress) -> None:
    """Writes the rows of the buffered steps, and shows the last one's.

    Raises:
      ValueError: a loss or a gradient norm is not finite.
    """
    if not self._pending:
      return
    fetched, self._pending = jax.device_get(self._pending), []
    sizes, self._batch_sizes = np.array(self._batch_sizes), []
    # The steps before a broken one show how it came to that.
    finite = list(itertools.takewhile(lambda row: not _broken(row[1]), fetched))
    if finite:
      self._write_steps(finite, sizes[: len(finite)], progress)
    if len(finite) < len(fetched):
      step, metrics = fetched[len(finite)]
      key = _broken(metrics)
      raise ValueError(
        f'the {key.replace("_", " ")} is {metrics[key]} at step {step}; try a '
        'lower rate (--config.optimizer.learning_rate with '
        '--may_differ=optimizer.learning_rate goes on from the latest '
        'checkpoint), or config.optimizer.max_grad_norm=1.0'
      )

  def write(self, row: Mapping[str, Any]) -> None:
    """Gives a row to every tracker."""
    for tracker in self._trackers:
      tracker.write(row)

  def _write_steps(
    self, steps: list, sizes: np.ndarray, progress: Progress
  ) -> None:
    last_step, last = steps[-1]
    examples, tokens, inputs_padding, targets_padding = sizes.sum(0)
    speed = progress.update(
      last_step,
      float(last['loss']),
      int(self._processes * examples),
      int(self._processes * tokens),
      _ratios(last),
    )
    speed['inputs_padding'] = round(inputs_padding / len(steps), 4)
    speed['targets_padding'] = round(targets_padding / len(steps), 4)
    sites = routing_rows(last.get('routing', {}))
    for step, metrics in steps:
      row = {
        'step': step,
        # The loss that is minimised; then -log p of a target token, whatever
        # the objective is.
        'loss': float(metrics['loss']),
        # NaN of a batch without one, as of judged answers that are all bad.
        'nll': _ratio(metrics['nll'], metrics['tokens']),
        'token_accuracy': _ratio(metrics['correct'], metrics['tokens']),
        'router_loss': float(metrics['router_loss']),
        'gradient_norm': float(metrics['gradient_norm']),
        'learning_rate': float(self._learning_rate(step - 1)),
      } | _ratios(metrics)
      if step == last_step:
        row |= speed | {'routing': sites}
      self.write(row)
    self.flushed_step = last_step
    self._raise_alarms(
      router_diagnosis.collapsed_routers(sites, self._router_alarm), progress
    )

  def _raise_alarms(
    self, collapsed: Mapping[str, str], progress: Progress
  ) -> None:
    """Prints an alarm for a router once, after _LOGS_IN_A_ROW logs in a row.

    Args:
      collapsed: {place: text} of this log, from
        `router_diagnosis.collapsed_routers`.
    """
    self._collapsed_logs = collections.Counter(
      {place: self._collapsed_logs[place] + 1 for place in collapsed}
    )
    new = [
      place
      for place, count in self._collapsed_logs.items()
      if count >= _LOGS_IN_A_ROW and place not in self._alarmed
    ]
    self._alarmed.update(new)
    for place in new[:_PRINTED_ALARMS]:
      progress.print_line(f'router alarm: {place}: {collapsed[place]}')
    if len(new) > _PRINTED_ALARMS:
      progress.print_line(
        f'router alarm: {len(new) - _PRINTED_ALARMS} other layers are '
        'collapsed, too; plots/router_weight.png and router_tokens.png show all'
      )


def routing_rows(collection: Any) -> dict[str, dict[str, Any]]:
  """{site: statistics} of the collection 'routing', as rows of metrics.

  Arrays are lists with an entry a layer. The shares of the experts are under
  'weight' or 'tokens'; see `metrics_log.SHARES`. 'experts' has their counts
  where these differ by layer; shares beyond them are zeros.
  """
  rows = {}
  sites = router_stats.collect(jax.device_get(collection))
  for site, sums in sites.items():
    values = vars(router_stats.statistics(sums))
    share = values.pop('share')
    values = {'tokens' if values.pop('sparse') else 'weight': share} | values
    for entry in ROUTERS.values():
      for name, statistic in entry.statistics.items():
        if sums.aux.keys() >= set(statistic.reads):
          values[name] = statistic.function(sums)
    rows[site] = {
      name: np.round(np.asarray(value, np.float64), 4).tolist()
      for name, value in values.items()
      if value is not None
    }
  return rows


def _ratios(metrics: Mapping[str, Any]) -> dict[str, float]:
  """The metrics of an objective beside its loss; NaN where the count is 0."""
  return {
    key: _ratio(total, count)
    for key, (total, count) in metrics.get('metrics', {}).items()
  }


def _ratio(total: Any, count: Any) -> float:
  return float(total / count) if count else float('nan')


def _broken(metrics: Mapping[str, Any]) -> str:
  """The name of a metric that is not finite; '' where all are.

  The step after a broken gradient would have a broken loss, but this one may
  be saved before.
  """
  names = ('loss', 'gradient_norm')
  return next((name for name in names if not np.isfinite(metrics[name])), '')


def _batch_size(batch: Batch) -> tuple[float, float, float, float]:
  """Examples, tokens read, shares of padding in inputs and in targets."""
  # On all sides, where answers are compared.
  inputs, targets = (
    np.stack([batch[key] for key in batch if key.endswith(ending)])
    for ending in ('inputs_mask', 'targets_mask')
  )
  packed = [batch[key] for key in batch if key.endswith('inputs_segments')]
  rows = inputs.shape[1]
  # A decoder's targets are its inputs, one on: they are counted once.
  has_decoder_inputs = any(key.endswith('decoder_inputs') for key in batch)
  examples = packed[0].max(axis=1).sum() if packed else rows
  return (
    float(examples),
    float(inputs.sum() + (targets.sum() if has_decoder_inputs else 0)),
    1 - float(inputs.mean()),
    1 - float(targets.mean()),
  )

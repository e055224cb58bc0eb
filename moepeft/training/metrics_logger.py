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

# The maximum number of alarms printed at a log step, and the number of
# consecutive logs with a collapsed router before its alarm.
_PRINTED_ALARMS, _ALARM_LOGS = 5, 3


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
      processes: the number of processes that read equal shares of a batch.
    """
    self.flushed_step = 0
    self._trackers, self._learning_rate = trackers, learning_rate
    self._router_alarm, self._processes = router_alarm, processes
    self._collapsed_logs = collections.Counter()
    self._alarmed_routers = set()
    self._pending = []
    self._batch_sizes = []

  def add(self, step: int, batch: Batch, metrics: Mapping[str, Any]) -> None:
    """Takes a step's batch, on the host, and its metrics, on the device."""
    if self._pending:
      # Only the routing of the last step is written.
      self._pending[-1][1].pop('routing')
    self._pending.append((step, dict(metrics)))
    self._batch_sizes.append(_batch_size(batch))

  def flush(self, progress: Progress) -> None:
    """Writes the rows of the buffered steps; the progress bar shows the last.

    Raises:
      ValueError: a loss or a gradient norm is not finite.
    """
    if not self._pending:
      return
    fetched, self._pending = jax.device_get(self._pending), []
    sizes, self._batch_sizes = np.array(self._batch_sizes), []
    # The steps before the non-finite one are written, as they show its cause.
    finite = list(
      itertools.takewhile(lambda row: not _nonfinite_metric(row[1]), fetched)
    )
    if finite:
      self._write_steps(finite, sizes[: len(finite)], progress)
    if len(finite) < len(fetched):
      step, metrics = fetched[len(finite)]
      key = _nonfinite_metric(metrics)
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
        'loss': float(metrics['loss']),
        # -log p of a target token, for every objective; NaN without target
        # tokens, as in a KTO batch of undesirable answers only.
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
    """Prints one alarm per router, after _ALARM_LOGS consecutive logs.

    Args:
      collapsed: {router: text} of this log, from
        `router_diagnosis.collapsed_routers`.
    """
    self._collapsed_logs = collections.Counter(
      {router: self._collapsed_logs[router] + 1 for router in collapsed}
    )
    new = [
      router
      for router, count in self._collapsed_logs.items()
      if count >= _ALARM_LOGS and router not in self._alarmed_routers
    ]
    self._alarmed_routers.update(new)
    for router in new[:_PRINTED_ALARMS]:
      progress.print_line(f'router alarm: {router}: {collapsed[router]}')
    if len(new) > _PRINTED_ALARMS:
      progress.print_line(
        f'router alarm: {len(new) - _PRINTED_ALARMS} other layers are '
        'collapsed, too; plots/router_weight.png and router_tokens.png show all'
      )


def routing_rows(collection: Any) -> dict[str, dict[str, Any]]:
  """{site: statistics} of the collection 'routing', for a row of metrics.

  Arrays are lists with one entry per layer. The experts' shares are under
  'weight' or 'tokens'; see `metrics_log.SHARES`. 'experts' has the number of
  experts by layer if the layers differ; shares of padding are zeros.
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
  """An objective's metrics other than its loss; NaN if the count is 0."""
  return {
    key: _ratio(total, count)
    for key, (total, count) in metrics.get('metrics', {}).items()
  }


def _ratio(total: Any, count: Any) -> float:
  return float(total / count) if count else float('nan')


def _nonfinite_metric(metrics: Mapping[str, Any]) -> str:
  """The name of a metric that is not finite; '' if all are finite.

  A non-finite gradient shows in the next step's loss, too, but this step may be
  saved before that.
  """
  names = ('loss', 'gradient_norm')
  return next((name for name in names if not np.isfinite(metrics[name])), '')


def _batch_size(batch: Batch) -> tuple[float, float, float, float]:
  """(examples, tokens, padding share of inputs, padding share of targets)."""
  # Preference batches have the masks of several answers.
  inputs, targets = (
    np.stack([batch[key] for key in batch if key.endswith(ending)])
    for ending in ('inputs_mask', 'targets_mask')
  )
  packed = [batch[key] for key in batch if key.endswith('inputs_segments')]
  rows = inputs.shape[1]
  # A decoder-only model's targets are its shifted inputs: counted once.
  has_decoder_inputs = any(key.endswith('decoder_inputs') for key in batch)
  examples = packed[0].max(axis=1).sum() if packed else rows
  return (
    float(examples),
    float(inputs.sum() + (targets.sum() if has_decoder_inputs else 0)),
    1 - float(inputs.mean()),
    1 - float(targets.mean()),
  )

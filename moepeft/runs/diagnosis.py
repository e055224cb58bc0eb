# SPDX-License-Identifier: Apache-2.0
"""Describes a run in text: losses, routers, accuracies before and after.

Training prints the findings at its end, and the skill read-training-run prints
the whole summary. This module does not import JAX or NumPy, so that the skill's
script starts fast.
"""

import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from moepeft.core import untrusted
from moepeft.runs import before_after
from moepeft.runs.metrics_log import is_number
from moepeft.runs.router_diagnosis import router_lines
from moepeft.runs.run import Run

# Share of a run's rows whose median is its first or last value.
_EDGE_SHARE = 0.1
# Share of the last rows that a trend is fitted to.
_TREND_SHARE = 0.33
# Ratio of the last loss to the lowest that counts as divergence.
_DIVERGENCE_RATIO = 1.5
# Ratio of a loss to the median of the losses before it that counts as a spike.
_SPIKE_RATIO = 3.0
# Ratio of the last validation loss to the best that is more than noise.
_RISE_RATIO = 1.02


def summary(folder: Path) -> str:
  """Summarizes a run in about twenty lines; findings begin with '!'.

  Raises:
    ValueError: there is no run, or its metrics are damaged.
  """
  run = Run(str(folder))
  rows = _read_rows(Path(run.metrics_file))
  trained = [row for row in rows if 'loss' in row]
  if not trained:
    raise ValueError(
      f'{run.metrics_file} has no rows of training; name the work '
      'directory of a run that has begun'
    )
  config = _read_json(run.config_file)
  lines = [
    *_settings(config, trained, os.path.exists(run.summary_file)),
    *_losses(trained),
    *_validation(rows, trained),
    *_gradients(trained),
    *_throughput(trained),
    *router_lines(trained),
    *_evaluation(run),
  ]
  plain = [line for line in lines if not line.startswith('!')]
  findings = [line for line in lines if line.startswith('!')]
  return '\n'.join([*plain, *(findings or ['no findings'])])


def findings(folder: Path) -> list[str]:
  """The findings of `summary` without '!'; [] if there is no run."""
  try:
    lines = summary(folder).splitlines()
  except ValueError:
    return []
  return [line[2:] for line in lines if line.startswith('! ')]


def _read_rows(path: Path) -> list[dict]:
  if not path.is_file():
    raise ValueError(f'{path} does not exist; name the work directory of a run')
  rows = []
  for line in path.read_text(encoding='utf-8', errors='replace').splitlines():
    try:
      row = untrusted.parse_json(line)
    except ValueError:
      # The last line of a killed run may be incomplete.
      continue
    if isinstance(row, dict) and isinstance(row.get('step'), int):
      rows.append(row)
  return rows


def _read_json(path: str) -> dict:
  try:
    return untrusted.read_json_object(path)
  except (OSError, ValueError):
    return {}


def _settings(config: dict, trained: list[dict], has_ended: bool) -> list[str]:
  steps, last = config.get('steps'), trained[-1]['step']
  optimizer, model = (
    part if isinstance(part := config.get(key), dict) else {}
    for key in ('optimizer', 'model')
  )
  lines = [
    f'method: {config.get("method", "unknown")}; objective: '
    f'{config.get("objective", "unknown")}; base: '
    f'{model.get("path") or model.get("size", "unknown")}',
    f'optimizer: {optimizer.get("name", "unknown")}, rate '
    f'{optimizer.get("learning_rate", "unknown")} '
    f'{optimizer.get("schedule", "")}, warmup '
    f'{optimizer.get("warmup_steps", "unknown")}; batch '
    f'{config.get("batch_size", "unknown")}; seed '
    f'{config.get("seed", "unknown")}',
    f'steps: {last} of {steps or "unknown"}; '
    f'{"ended" if has_ended else "no summary.json: running or interrupted"}',
  ]
  if is_number(steps) and last < steps:
    lines.append(f'! the run stands at step {last} of {steps}')
  return lines


def _losses(trained: list[dict]) -> list[str]:
  values = [(row['step'], row['loss']) for row in trained]
  # Infinities and NaN are null in the file.
  nonfinite = [step for step, loss in values if not is_number(loss)]
  finite = [(step, loss) for step, loss in values if is_number(loss)]
  lines = []
  if nonfinite:
    lines.append(
      f'! the loss is not a number in {len(nonfinite)} steps, first at step '
      f'{nonfinite[0]}'
    )
  if not finite:
    return lines
  losses = [loss for _, loss in finite]
  first, last = _first_median(losses), _last_median(losses)
  lowest_step, lowest = min(finite, key=lambda pair: pair[1])
  slope, is_significant = _trend(finite)
  trend = 'flat'
  if is_significant:
    trend = 'falling' if slope < 0 else 'rising'
  lines.append(
    f'loss: {first:.4g} at first, {last:.4g} at last (medians), least '
    f'{lowest:.4g} at step {lowest_step}; {trend} over the last third '
    f'({slope * 100:+.3g} per 100 steps)'
  )
  # A DPO loss is noisy: a single low batch does not show divergence.
  rises = last > first or trend == 'rising'
  if rises and last > _DIVERGENCE_RATIO * _lowest_median(losses):
    lines.append('! the loss diverges: its end is far above its least')
  elif last > 0.97 * first and len(losses) > 20:
    lines.append('! the loss has hardly fallen')
  elif trend == 'falling':
    lines.append('! the loss still falls at the end: more steps may help')
  spikes = _spike_steps(finite)
  if spikes:
    lines.append(
      f'! {len(spikes)} spikes of the loss, the first at step {spikes[0]}'
    )
  return lines


def _edge_count(values: Sequence[float]) -> int:
  return max(1, round(_EDGE_SHARE * len(values)))


def _first_median(values: Sequence[float]) -> float:
  return statistics.median(values[: _edge_count(values)])


def _last_median(values: Sequence[float]) -> float:
  return statistics.median(values[-_edge_count(values) :])


def _lowest_median(values: Sequence[float]) -> float:
  """The lowest median of a tenth of the rows, robust to single steps."""
  count = _edge_count(values)
  return min(
    statistics.median(values[i : i + count])
    for i in range(0, max(1, len(values) - count + 1), count)
  )


def _trend(pairs: list[tuple[int, float]]) -> tuple[float, bool]:
  """(slope of the last third, whether it is significant)."""
  pairs = pairs[-max(3, round(_TREND_SHARE * len(pairs))) :]
  if len(pairs) < 3 or len({step for step, _ in pairs}) < 3:
    return 0.0, False
  steps, values = zip(*pairs, strict=True)
  slope, intercept = statistics.linear_regression(steps, values)
  residuals = [v - (slope * s + intercept) for s, v in pairs]
  deviation = math.sqrt(sum(r * r for r in residuals) / (len(residuals) - 2))
  mean_step = statistics.fmean(steps)
  step_norm = math.sqrt(sum((s - mean_step) ** 2 for s in steps))
  # Less than 2.5 standard errors is within the noise of batches.
  return slope, abs(slope) > 2.5 * deviation / step_norm


def _spike_steps(pairs: list[tuple[int, float]], window: int = 10) -> list[int]:
  return [
    step
    for i, (step, loss) in enumerate(pairs)
    if i >= window
    and loss
    > _SPIKE_RATIO * statistics.median(v for _, v in pairs[i - window : i])
  ]


def _validation(rows: list[dict], trained: list[dict]) -> list[str]:
  points = [
    (row['step'], row['validation_loss'])
    for row in rows
    if is_number(row.get('validation_loss'))
  ]
  if not points:
    return ['validation: none while training']
  (first_step, first), (last_step, last) = points[0], points[-1]
  best_step, best = min(points, key=lambda pair: pair[1])
  lines = [
    f'validation: {first:.4g} at step {first_step}, best {best:.4g} at step '
    f'{best_step}, {last:.4g} at step {last_step}'
  ]
  losses = [(r['step'], r['loss']) for r in trained if is_number(r['loss'])]
  early = [loss for step, loss in losses if step <= best_step]
  late = [loss for step, loss in losses if step > best_step]
  if last > _RISE_RATIO * best and early and late:
    cause = ''
    if _last_median(late) < _last_median(early):
      cause = ' while that of training falls: overfitting'
    lines.append(f'! the validation loss rises after step {best_step}{cause}')
  return lines


def _numbers(rows: list[dict], key: str) -> list[float]:
  return [row[key] for row in rows if is_number(row.get(key))]


def _gradients(trained: list[dict]) -> list[str]:
  norms = _numbers(trained, 'gradient_norm')
  if not norms:
    return []
  return [
    f'gradient norm: median {statistics.median(norms):.3g}, at last '
    f'{_last_median(norms):.3g}, most {max(norms):.3g}'
  ]


def _throughput(trained: list[dict]) -> list[str]:
  rates = _numbers(trained, 'tokens_per_s')
  if not rates:
    return []
  count = max(1, len(rates) // 2)
  first, last = map(statistics.median, (rates[:count], rates[-count:]))
  line = f'throughput: {statistics.median(rates):,.0f} tokens/s (median)'
  padding = [
    f'{100 * row[key]:.0f} % of {key.partition("_")[0]}'
    for row in trained[-1:]
    for key in sorted(row)
    if key.endswith('_padding') and is_number(row[key])
  ]
  lines = [line + (f'; padding: {", ".join(padding)}' if padding else '')]
  if len(rates) > 3 and last < 0.7 * first:
    lines.append(
      f'! throughput falls from {first:,.0f} to {last:,.0f} tokens/s'
    )
  return lines


def _evaluation(run: Run) -> list[str]:
  evaluations = {
    'before': _read_json(run.before_file),
    'after': _read_json(run.after_file),
  }
  lines = []
  for name, evaluation in evaluations.items():
    means = evaluation.get('means')
    scores = {
      key: value
      for key, value in (means if isinstance(means, dict) else {}).items()
      if is_number(value)
    }
    loss = evaluation.get('validation_loss')
    if is_number(loss):
      scores = {'validation_loss': loss, **scores}
    if scores:
      text = ', '.join(f'{key} {value:.4g}' for key, value in scores.items())
      lines.append(f'{name} training: {text}')
  return lines + before_after.describe_changes(*evaluations.values())

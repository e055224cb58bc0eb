# SPDX-License-Identifier: Apache-2.0
"""A run's work directory in words: losses, routers, before and after.

The end of training prints some of it, and the skill read-training-run all.
Nothing here imports JAX or NumPy, so that the skill's script starts at once.
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

# A run's ends are these shares of its rows, for medians of more than a step.
_EDGE, _LATE = 0.1, 0.33
# A loss this many times the least is divergence; over the median, a spike.
_DIVERGED, _SPIKE = 1.5, 3.0
# A rise of the validation loss that is more than noise.
_RISE = 1.02


def summary(folder: Path) -> str:
  """All that there is to say, in some twenty lines; findings begin with '!'.

  Raises:
    ValueError: there is no run, or its metrics are damaged; a sentence.
  """
  run = Run(str(folder))
  rows = _rows(Path(run.metrics_file))
  trained = [row for row in rows if 'loss' in row]
  if not trained:
    raise ValueError(
      f'{run.metrics_file} has no rows of training; name the work '
      'directory of a run that has begun'
    )
  config = _json(run.config_file)
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
  """The findings of `summary`, without '!'; none where there is no run."""
  try:
    lines = summary(folder).splitlines()
  except ValueError:
    return []
  return [line[2:] for line in lines if line.startswith('! ')]


def _rows(path: Path) -> list[dict]:
  if not path.is_file():
    raise ValueError(f'{path} does not exist; name the work directory of a run')
  rows = []
  for line in path.read_text(encoding='utf-8', errors='replace').splitlines():
    try:
      row = untrusted.parse_json(line)
    except ValueError:
      # A kill may leave a torn last line.
      continue
    if isinstance(row, dict) and isinstance(row.get('step'), int):
      rows.append(row)
  return rows


def _json(path: str) -> dict:
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
    f'{"ended" if has_ended else "no summary.json: not ended, or broken off"}',
  ]
  if is_number(steps) and last < steps:
    lines.append(f'! the run stands at step {last} of {steps}')
  return lines


def _losses(trained: list[dict]) -> list[str]:
  values = [(row['step'], row['loss']) for row in trained]
  bad = [step for step, loss in values if not is_number(loss)]
  good = [(step, loss) for step, loss in values if is_number(loss)]
  # Infinite and undefined numbers are null in the file.
  lines = []
  if bad:
    lines.append(
      f'! the loss is not a number in {len(bad)} steps, first at step {bad[0]}'
    )
  if not good:
    return lines
  losses = [loss for _, loss in good]
  first, last = _edge(losses, True), _edge(losses, False)
  least_step, least = min(good, key=lambda pair: pair[1])
  slope, clear = _trend(good)
  trend = ('falling' if slope < 0 else 'rising') if clear else 'flat'
  lines.append(
    f'loss: {first:.4g} at first, {last:.4g} at last (medians), least '
    f'{least:.4g} at step {least_step}; {trend} over the last third '
    f'({slope * 100:+.3g} per 100 steps)'
  )
  # Losses of pairs (DPO) are noisy: a low batch alone is no divergence.
  up = last > first or trend == 'rising'
  if up and last > _DIVERGED * _least_median(losses):
    lines.append('! the loss diverges: its end is far above its least')
  elif last > 0.97 * first and len(losses) > 20:
    lines.append('! the loss has hardly fallen')
  elif trend == 'falling':
    lines.append('! the loss still falls at the end: more steps may help')
  spikes = _spikes(good)
  if spikes:
    lines.append(
      f'! {len(spikes)} spikes of the loss, the first at step {spikes[0]}'
    )
  return lines


def _edge(values: Sequence[float], begin: bool) -> float:
  count = max(1, round(_EDGE * len(values)))
  return statistics.median(values[:count] if begin else values[-count:])


def _least_median(values: Sequence[float]) -> float:
  """The least median of a tenth of the rows, so that a step cannot be it."""
  count = max(1, round(_EDGE * len(values)))
  return min(
    statistics.median(values[i : i + count])
    for i in range(0, max(1, len(values) - count + 1), count)
  )


def _trend(pairs: list[tuple[int, float]]) -> tuple[float, bool]:
  """The slope of the last third, and whether it is clear of its error."""
  pairs = pairs[-max(3, round(_LATE * len(pairs))) :]
  if len(pairs) < 3 or len({step for step, _ in pairs}) < 3:
    return 0.0, False
  steps, values = zip(*pairs, strict=True)
  slope, level = statistics.linear_regression(steps, values)
  residuals = [v - (slope * s + level) for s, v in pairs]
  spread = math.sqrt(sum(r * r for r in residuals) / (len(residuals) - 2))
  wide = math.sqrt(sum((s - statistics.fmean(steps)) ** 2 for s in steps))
  # Two and a half standard errors; less is within the noise of batches.
  return slope, abs(slope) > 2.5 * spread / wide


def _spikes(pairs: list[tuple[int, float]], around: int = 10) -> list[int]:
  return [
    step
    for i, (step, loss) in enumerate(pairs)
    if i >= around
    and loss > _SPIKE * statistics.median(v for _, v in pairs[i - around : i])
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
  if last > _RISE * best and early and late:
    falls = _edge(late, False) < _edge(early, False)
    why = ' while that of training falls: overfitting' if falls else ''
    lines.append(f'! the validation loss rises after step {best_step}{why}')
  return lines


def _numbers(rows: list[dict], key: str) -> list[float]:
  return [row[key] for row in rows if is_number(row.get(key))]


def _gradients(trained: list[dict]) -> list[str]:
  norms = _numbers(trained, 'gradient_norm')
  if not norms:
    return []
  return [
    f'gradient norm: median {statistics.median(norms):.3g}, at last '
    f'{_edge(norms, False):.3g}, most {max(norms):.3g}'
  ]


def _throughput(trained: list[dict]) -> list[str]:
  rates = _numbers(trained, 'tokens_per_s')
  if not rates:
    return []
  half = max(1, len(rates) // 2)
  first, last = map(statistics.median, (rates[:half], rates[-half:]))
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
    'before': _json(run.before_file),
    'after': _json(run.after_file),
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

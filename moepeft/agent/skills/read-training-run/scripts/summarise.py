# SPDX-License-Identifier: Apache-2.0
"""Prints what a run's work directory shows, in a few lines.

  python summarise.py WORKDIR

Needs nothing but Python, so that it starts at once.
"""

import json
import math
import statistics
import sys
from pathlib import Path

# A run's ends are these shares of its rows, for medians of more than a step.
_EDGE, _LATE = 0.1, 0.33
# A loss this many times the least is divergence; over the median, a spike.
_DIVERGED, _SPIKE = 1.5, 3.0
# A rise of the validation loss that is more than noise.
_RISE = 1.02
# Shares of a site's load: of an expert that holds all, and of one that is idle.
_FULL, _IDLE = 0.9, 0.01
# Of its most: an entropy below it is of weights that differ.
_SHARP = 0.9


def main(argv: list[str]) -> str:
  """The summary.

  Raises:
    ValueError: there is no run, a sentence.
  """
  if len(argv) != 1:
    raise ValueError('expected one argument, the work directory of a run')
  folder = Path(argv[0]).expanduser()
  if not folder.is_dir():
    raise ValueError(f'there is no directory {str(folder)!r}')
  rows = _rows(folder / 'metrics.jsonl')
  trained = [row for row in rows if 'loss' in row]
  if not trained:
    raise ValueError(
      f'{folder / "metrics.jsonl"} has no rows of training; name the work '
      'directory of a run that has begun'
    )
  config = _json(folder / 'config.json')
  said = [
    *_settings(config, trained, (folder / 'summary.json').exists()),
    *_losses(trained),
    *_validation(rows, trained),
    *_gradients(trained),
    *_throughput(trained),
    *_routers(trained),
    *_evaluation(folder),
  ]
  plain = [line for line in said if not line.startswith('!')]
  found = [line for line in said if line.startswith('!')]
  return '\n'.join([*plain, *(found or ['no findings'])])


def _rows(path: Path) -> list[dict]:
  if not path.is_file():
    raise ValueError(f'{path} does not exist; name the work directory of a run')
  rows = []
  for line in path.read_text(encoding='utf-8').splitlines():
    try:
      row = json.loads(line)
    except ValueError:
      # A kill may leave a torn last line.
      continue
    if isinstance(row, dict) and 'step' in row:
      rows.append(row)
  return rows


def _json(path: Path) -> dict:
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError):
    return {}
  return found if isinstance(found, dict) else {}


def _settings(config: dict, trained: list[dict], done: bool) -> list[str]:
  steps, last = config.get('steps'), trained[-1]['step']
  optimizer, model = config.get('optimizer', {}), config.get('model', {})
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
    f'{"ended" if done else "no summary.json: not ended, or broken off"}',
  ]
  if steps and last < steps:
    lines.append(f'! the run stands at step {last} of {steps}')
  return lines


def _losses(trained: list[dict]) -> list[str]:
  values = [(row['step'], row['loss']) for row in trained]
  bad = [step for step, loss in values if not _is_number(loss)]
  good = [(step, loss) for step, loss in values if _is_number(loss)]
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


def _edge(values: list[float], begin: bool) -> float:
  count = max(1, round(_EDGE * len(values)))
  return statistics.median(values[:count] if begin else values[-count:])


def _least_median(values: list[float]) -> float:
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
  left = [v - (slope * s + level) for s, v in pairs]
  spread = math.sqrt(sum(r * r for r in left) / (len(left) - 2))
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
  found = [
    (row['step'], row['validation_loss'])
    for row in rows
    if _is_number(row.get('validation_loss'))
  ]
  if not found:
    return ['validation: none while training']
  (first_step, first), (last_step, last) = found[0], found[-1]
  best_step, best = min(found, key=lambda pair: pair[1])
  lines = [
    f'validation: {first:.4g} at step {first_step}, best {best:.4g} at step '
    f'{best_step}, {last:.4g} at step {last_step}'
  ]
  early = [r['loss'] for r in trained if r['step'] <= best_step]
  late = [r['loss'] for r in trained if r['step'] > best_step]
  early, late = filter(_is_number, early), filter(_is_number, late)
  early, late = list(early), list(late)
  if last > _RISE * best and early and late:
    falls = _edge(late, False) < _edge(early, False)
    why = ' while that of training falls: overfitting' if falls else ''
    lines.append(f'! the validation loss rises after step {best_step}{why}')
  return lines


def _gradients(trained: list[dict]) -> list[str]:
  norms = [
    row['gradient_norm']
    for row in trained
    if _is_number(row.get('gradient_norm'))
  ]
  if not norms:
    return []
  return [
    f'gradient norm: median {statistics.median(norms):.3g}, at last '
    f'{_edge(norms, False):.3g}, most {max(norms):.3g}'
  ]


def _throughput(trained: list[dict]) -> list[str]:
  rates = [
    row['tokens_per_s']
    for row in trained
    if _is_number(row.get('tokens_per_s'))
  ]
  if not rates:
    return []
  half = max(1, len(rates) // 2)
  first, last = map(statistics.median, (rates[:half], rates[-half:]))
  line = f'throughput: {statistics.median(rates):,.0f} tokens/s (median)'
  padding = [
    f'{100 * row[key]:.0f} % of {key.partition("_")[0]}'
    for row in trained[-1:]
    for key in sorted(row)
    if key.endswith('_padding') and _is_number(row[key])
  ]
  lines = [line + (f'; padding: {", ".join(padding)}' if padding else '')]
  if len(rates) > 3 and last < 0.7 * first:
    lines.append(
      f'! throughput falls from {first:,.0f} to {last:,.0f} tokens/s'
    )
  return lines


def _routers(trained: list[dict]) -> list[str]:
  routed = [row for row in trained if row.get('routing')]
  if not routed:
    return ['routers: none']
  step, layers = routed[-1]['step'], list(_layers(routed[-1]['routing']))
  if not layers:
    return ['routers: of one expert each']
  tops = sorted(layers, key=lambda layer: -max(layer[1]))
  idle = sum(load < _IDLE for _, loads, _ in layers for load in loads)
  every = sum(len(loads) for _, loads, _ in layers)
  shares = [
    entropy / math.log(len(loads))
    for _, loads, entropy in layers
    if entropy is not None
  ]
  lines = [
    f'routers at step {step}: {len(layers)} with {len(layers[0][1])} experts '
    'each; fullest expert '
    f'{statistics.fmean(max(own) for _, own, _ in layers):.0%} '
    f'of the load on average, {max(tops[0][1]):.0%} at most ({tops[0][0]}); '
    f'{idle} of {every} experts below {_IDLE:.0%}'
  ]
  if shares:
    lines[0] += f'; entropy {statistics.fmean(shares):.0%} of its most'
  full = [
    name
    for name, loads, entropy in layers
    if max(loads) > _FULL and _is_sharp(entropy, len(loads))
  ]
  if full:
    lines.append(
      f'! router collapse: one expert holds over {_FULL:.0%} of the load in '
      f'{len(full)} of {len(layers)}: {", ".join(full[:5])}'
      + (' ...' if len(full) > 5 else '')
    )
  elif idle > every / 4:
    lines.append(f'! {idle} of {every} experts are idle')
  return lines


def _is_sharp(entropy: float | None, experts: int) -> bool:
  """Whether weights are far from even: a soft router's load counts the
  largest weight of a token, however little it is ahead."""
  return entropy is None or entropy < _SHARP * math.log(experts)


def _layers(routing: dict):
  """(site and layer, loads, entropy) of all with several experts."""
  for site, values in routing.items():
    loads, entropies = values.get('load') or [], values.get('entropy')
    single = bool(loads) and not isinstance(loads[0], list)
    loads = [loads] if single else loads
    entropies = [entropies] if single else entropies or []
    for i, own in enumerate(loads):
      own = [load or 0.0 for load in own]
      if len(own) > 1:
        entropy = entropies[i] if i < len(entropies) else None
        yield f'{site} {i}', own, entropy


def _evaluation(folder: Path) -> list[str]:
  lines = []
  for name in ('before', 'after'):
    found = _json(folder / f'{name}.json')
    scores = {
      key: value
      for key, value in (found.get('means') or {}).items()
      if _is_number(value)
    }
    if _is_number(found.get('validation_loss')):
      scores = {'validation_loss': found['validation_loss'], **scores}
    if scores:
      said = ', '.join(f'{key} {value:.4g}' for key, value in scores.items())
      lines.append(f'{name} training: {said}')
  return lines


def _is_number(value: object) -> bool:
  return (
    isinstance(value, int | float)
    and not isinstance(value, bool)
    and math.isfinite(value)
  )


if __name__ == '__main__':
  try:
    print(main(sys.argv[1:]))
  except ValueError as e:
    sys.exit(f'error: {e}')

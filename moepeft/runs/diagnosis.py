# SPDX-License-Identifier: Apache-2.0
"""A run's work directory in words: losses, routers, before and after.

The end of training prints some of it, and the skill read-training-run all.
Nothing here imports JAX or NumPy, so that the skill's script starts at once.
"""

import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moepeft.core import untrusted
from moepeft.runs import metrics_log
from moepeft.runs.run import Run

# Of ln e: with a mean entropy of a token's weights from here on, a router mixes
# several experts, whichever has the most.
EVEN = 0.75
# The share of one expert that is a collapse (the default of
# config.router_collapse_threshold), for so many logs in a row, and that of one
# that is idle.
_FULL, _IN_A_ROW, _IDLE = 0.9, 3, 0.01
# A run's ends are these shares of its rows, for medians of more than a step.
_EDGE, _LATE = 0.1, 0.33
# A loss this many times the least is divergence; over the median, a spike.
_DIVERGED, _SPIKE = 1.5, 3.0
# A rise of the validation loss that is more than noise.
_RISE = 1.02
# Standard errors of a difference beyond which it is no noise of the examples.
_ERRORS = 1.96
# Groups or tasks that a line names.
_NAMED = 6


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
    *_routers(trained),
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


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
  """Lines on what rose and what fell; none without a `before`.

  A difference of accuracies within 1.96 standard errors of as many independent
  examples is called noise.

  Args:
    before, after: as in before.json and after.json.
  """
  lines = []
  figures = sorted(
    (key for key in after if key.startswith('validation_')),
    key=lambda key: (key != 'validation_loss', key),
  )
  for key in figures:
    old, new = before.get(key), after.get(key)
    if _is_number(old) and _is_number(new):
      verb = 'rose' if new > old else 'fell'
      name, (first, last) = key.replace('_', ' '), numbers(old, new)
      lines.append(
        f'{name} stayed at {last}'
        if first == last
        else f'{name} {verb} from {first} to {last}'
      )
  groups = _groups(before, after)
  for name, chosen in (
    ('accuracy rose', [g for g in groups if g[1] > g[2]]),
    ('accuracy fell', [g for g in groups if g[1] < -g[2]]),
    ('accuracy within noise', [g for g in groups if abs(g[1]) <= g[2]]),
  ):
    if chosen:
      lines.append(f'{name}: {", ".join(g[0] for g in chosen[:_NAMED])}')
      lines[-1] += ', ...' if len(chosen) > _NAMED else ''
  return lines + _extremes(before, after)


def numbers(old: float, new: float) -> tuple[str, str]:
  """Two numbers to be compared; what is nothing beside the other is 0."""
  threshold = 1e-4 * max(abs(old), abs(new))
  return tuple('0' if abs(x) < threshold else f'{x:.4g}' for x in (old, new))


def _groups(before, after) -> list[tuple[str, float, float]]:
  """(text, difference, its 95 % half width) of each mean over tasks."""
  olds, news = before.get('means'), after.get('means')
  if not isinstance(olds, dict) or not isinstance(news, dict):
    return []
  groups = []
  for name, new in news.items():
    old = olds.get(name)
    if _is_number(old) and _is_number(new):
      variances = []
      for evaluation in (before, after):
        rows = [r for r in _tasks(evaluation) if _group(r) == name]
        variances += [_variance(r) / len(rows) ** 2 for r in rows]
      text = f'{name} {100 * old:.1f} -> {100 * new:.1f} %'
      half = _ERRORS * math.sqrt(sum(variances))
      groups.append((text, new - old, half))
  return groups


def differ(old: Mapping[str, Any], new: Mapping[str, Any], tasks: int) -> bool:
  """Whether a task's accuracies differ by more than the noise of its examples.

  The largest of many differences is large by chance alone, so the 5 % are those
  of all tasks together (Bonferroni).

  Args:
    old, new: rows of before.json and after.json.
    tasks: rows that are compared.
  """
  errors = statistics.NormalDist().inv_cdf(1 - 0.025 / max(tasks, 1))
  noise = errors * math.sqrt(_variance(old) + _variance(new))
  return abs(new['accuracy'] - old['accuracy']) > noise


def _extremes(before, after) -> list[str]:
  """The tasks that rose and fell the most, beyond their noise."""
  olds = {_task(row): row for row in _tasks(before)}
  pairs = [(olds[_task(r)], r) for r in _tasks(after) if _task(r) in olds]
  moved = [
    (100 * (new['accuracy'] - old['accuracy']), _task(new))
    for old, new in pairs
    if differ(old, new, len(olds))
  ]
  if len(olds) < 2 or not moved:
    return []
  ends = dict.fromkeys((max(moved), min(moved)))
  names = ', '.join(f'{name} {change:+.0f} points' for change, name in ends)
  return [f'tasks that moved the most: {names}']


def _tasks(evaluation) -> list[dict]:
  rows = evaluation.get('rows')
  return [
    row
    for row in (rows if isinstance(rows, list) else [])
    if isinstance(row, dict) and _is_number(row.get('accuracy'))
  ]


def _group(row: Mapping[str, Any]) -> str:
  return f'{row.get("group", "")} {row.get("templates", "")}'.strip()


def _task(row: Mapping[str, Any]) -> str:
  return f'{row.get("task", "")} {row.get("templates", "")}'.strip()


def _variance(row: Mapping[str, Any]) -> float:
  """The variance of an accuracy of n examples: p (1 - p) / n, with p drawn to
  the middle (Agresti and Coull, 1998), so that 0 and 1 are not certain."""
  count = row.get('examples')
  count = count if _is_number(count) and count > 0 else 1
  p = (row['accuracy'] * count + 2) / (count + 4)
  return p * (1 - p) / (count + 4)


def collapsed(
  sites: Mapping[str, Mapping[str, Any]], limit: float
) -> dict[str, str]:
  """{'site, layer n': what is so} where one expert has nearly all.

  A router is collapsed where one expert has more than `limit` of the weight
  (dense) or gets more than `limit` of the tokens (sparse), and the entropy of
  a token's weights is below EVEN of ln e. So a dense router that is even, with
  one expert ahead by little, is none.

  Args:
    sites: a row's 'routing'. Of older rows, with 'load', the entropy is the
      router's before any selection, as they have no other.
  """
  lines = {}
  for site, layer, kind, shares, values in _layers(sites):
    key = 'entropy' if kind == 'load' else 'weight_entropy'
    nats = values.get(key)
    if nats is None or max(shares) <= limit:
      continue
    most = math.log(len(shares))
    evenness, bound = nats / most, EVEN
    if kind == 'load':
      # That an expert with `limit` of the weight leaves at most, the others
      # sharing the rest evenly.
      rest = 1 - limit
      rest_entropy = (
        rest * math.log(rest / (len(shares) - 1)) if rest > 0 else 0.0
      )
      bound = (-limit * math.log(limit) - rest_entropy) / most
    if evenness < bound:
      has = {
        'weight': 'has {:.0%} of the weight',
        'tokens': 'gets {:.0%} of the tokens',
        'load': 'has the largest weight for {:.0%} of the tokens',
      }[kind].format(max(shares))
      lines[f'{site}, layer {layer}'] = (
        f"expert {shares.index(max(shares))} {has}, the entropy of a token's "
        f'weights is {evenness:.2f} of ln {len(shares)} '
        f'(config.router_collapse_threshold={limit})'
      )
  return lines


def _layers(
  sites: Mapping[str, Any],
) -> Iterator[tuple[str, int, str, list[float], dict[str, float]]]:
  """(site, layer, key of rows.SHARES, shares, entropies) of routers with
  several experts; what is no routing is left out."""
  for site, values in sites.items():
    if not isinstance(values, dict) or not metrics_log.SHARES.keys() & values:
      continue
    kind, layers = metrics_log.shares(values)
    entropies = {}
    for key in ('entropy', 'weight_entropy'):
      value = values.get(key)
      entropies[key] = value if isinstance(value, list) else [value]
    for layer, shares in enumerate(layers):
      shares = [s if _is_number(s) else 0.0 for s in shares]
      if len(shares) > 1:
        yield (
          site,
          layer,
          kind,
          shares,
          {
            key: by_layer[layer]
            for key, by_layer in entropies.items()
            if layer < len(by_layer) and _is_number(by_layer[layer])
          },
        )


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
  if _is_number(steps) and last < steps:
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
    if _is_number(row.get('validation_loss'))
  ]
  if not points:
    return ['validation: none while training']
  (first_step, first), (last_step, last) = points[0], points[-1]
  best_step, best = min(points, key=lambda pair: pair[1])
  lines = [
    f'validation: {first:.4g} at step {first_step}, best {best:.4g} at step '
    f'{best_step}, {last:.4g} at step {last_step}'
  ]
  losses = [(r['step'], r['loss']) for r in trained if _is_number(r['loss'])]
  early = [loss for step, loss in losses if step <= best_step]
  late = [loss for step, loss in losses if step > best_step]
  if last > _RISE * best and early and late:
    falls = _edge(late, False) < _edge(early, False)
    why = ' while that of training falls: overfitting' if falls else ''
    lines.append(f'! the validation loss rises after step {best_step}{why}')
  return lines


def _numbers(rows: list[dict], key: str) -> list[float]:
  return [row[key] for row in rows if _is_number(row.get(key))]


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
    if key.endswith('_padding') and _is_number(row[key])
  ]
  lines = [line + (f'; padding: {", ".join(padding)}' if padding else '')]
  if len(rates) > 3 and last < 0.7 * first:
    lines.append(
      f'! throughput falls from {first:,.0f} to {last:,.0f} tokens/s'
    )
  return lines


def _routers(trained: list[dict]) -> list[str]:
  routed = [row for row in trained if isinstance(row.get('routing'), dict)]
  routed = [row for row in routed if row['routing']]
  if not routed:
    return ['routers: none']
  step, layers = routed[-1]['step'], list(_layers(routed[-1]['routing']))
  if not layers:
    return ['routers: of one expert each']
  lines = [f'routers at step {step}: {len(layers)}']
  entropies = [
    values['entropy'] / math.log(len(shares))
    for *_, shares, values in layers
    if 'entropy' in values
  ]
  if entropies:
    lines[0] += f', entropy {statistics.fmean(entropies):.0%} of its most'
  for kind in metrics_log.SHARES:
    lines += _shares(kind, [layer for layer in layers if layer[2] == kind])
  full = [collapsed(row['routing'], _FULL) for row in routed[-_IN_A_ROW:]]
  lasting = [place for place in full[-1] if all(place in log for log in full)]
  if lasting:
    lines.append(
      f'! router collapse: one expert has over {_FULL:.0%} (see '
      f'references/curves.md) in the last {len(full)} logs at {len(lasting)} '
      f'of {len(layers)}: {", ".join(lasting[:5])}'
      + (' ...' if len(lasting) > 5 else '')
    )
  return lines


def _shares(kind: str, layers: list[tuple]) -> list[str]:
  """A line on one kind of share, and idle experts."""
  if not layers:
    return []
  tops = sorted(((max(row[3]), row) for row in layers), key=lambda p: -p[0])
  most, (site, layer, *_) = tops[0]
  mean = statistics.fmean(top for top, _ in tops)
  idle = sum(share < _IDLE for *_, shares, _ in layers for share in shares)
  every = sum(len(shares) for *_, shares, _ in layers)
  line = {
    'weight': 'dense: the fullest expert has {} of the weight',
    'tokens': 'sparse: the fullest expert gets {} of the tokens',
    'load': 'argmax share (an older log, no mean weights): the fullest expert '
    'has the largest weight for {} of the tokens',
  }[kind].format(f'{mean:.0%}')
  line += (
    f' on average, {most:.0%} at most ({site} {layer}); {idle} of {every} '
    f'experts below {_IDLE:.0%}'
  )
  # An expert that never has the largest weight may have much of it.
  if kind != 'load' and idle > every / 4:
    return [line, f'! {idle} of {every} experts are idle']
  return [line]


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
      if _is_number(value)
    }
    loss = evaluation.get('validation_loss')
    if _is_number(loss):
      scores = {'validation_loss': loss, **scores}
    if scores:
      text = ', '.join(f'{key} {value:.4g}' for key, value in scores.items())
      lines.append(f'{name} training: {text}')
  return lines + changes(*evaluations.values())


def _is_number(value: object) -> bool:
  return (
    isinstance(value, int | float)
    and not isinstance(value, bool)
    and math.isfinite(value)
  )

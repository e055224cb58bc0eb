# SPDX-License-Identifier: Apache-2.0
"""What a run tells: metrics.jsonl, a progress bar or lines, plots, alarms."""

import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from moepeft.moe import stats
from moepeft.typing import State


class Rows:
  """`<workdir>/<name>`, one JSON object a line, flushed at each."""

  def __init__(self, workdir: str, name: str = 'metrics.jsonl', step: int = 0):
    """Rows of steps after `step` are dropped: they will be done again."""
    self.path = os.path.join(workdir, name)
    kept = [row for row in read(self.path) if row['step'] <= step]
    self._file = open(self.path, 'w')
    for row in kept:
      self.write(row)

  def write(self, row: Mapping[str, Any]) -> None:
    self._file.write(json.dumps(row) + '\n')
    self._file.flush()


def read(path: str) -> list[dict[str, Any]]:
  """The rows of a file, none if it does not exist; a torn last line is left."""
  if not os.path.exists(path):
    return []
  rows = []
  with open(path) as lines:
    for line in lines:
      if line.endswith('\n'):
        rows.append(json.loads(line))
  return rows


class Progress:
  """Steps done, throughput and time left, as a bar or as plain lines."""

  def __init__(self, steps: int, start: int):
    self._steps, self._step = steps, start
    self._bar = None
    if sys.stderr.isatty():
      self._bar = tqdm(total=steps, initial=start, unit='step', leave=True)
    self.begin(start)

  def begin(self, step: int) -> None:
    """Lets the clock begin at a step, so that compiling is not counted."""
    self._last = (step, time.monotonic())
    if self._bar is not None:
      self._bar.unpause()

  def update(
    self, step: int, loss: float, examples: int, tokens: int
  ) -> dict[str, float]:
    """Shows the state at a step.

    Args:
      examples, tokens: seen since the last call.

    Returns:
      {'examples_per_s', 'tokens_per_s'}.
    """
    now = time.monotonic()
    before, since = self._last
    timed, seconds = step - before, max(now - since, 1e-9)
    self._last = (step, now)
    # Of what was seen, as much as falls into the time: not the first step.
    share = timed / max(step - self._step, 1)
    rates = {
      'examples_per_s': share * examples / seconds,
      'tokens_per_s': share * tokens / seconds,
    }
    left = _clock((self._steps - step) * seconds / timed) if timed else '?'
    if self._bar is not None:
      self._bar.set_postfix_str(
        f'loss {loss:.4f}, {rates["tokens_per_s"]:,.0f} tokens/s',
        refresh=False,
      )
      self._bar.update(step - self._step)
    else:
      print(
        f'step {step}/{self._steps}  loss {loss:.4f}  '
        f'{rates["examples_per_s"]:.1f} examples/s  '
        f'{rates["tokens_per_s"]:,.0f} tokens/s  '
        f'ETA {left}',
        flush=True,
      )
    self._step = step
    return rates

  def say(self, line: str) -> None:
    """Prints a line without tearing the bar."""
    if self._bar is not None:
      self._bar.write(line)
    else:
      print(line, flush=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()


def introduce(
  base: Any, built: Any, state: State, words: Any, workdir: str
) -> None:
  """Prints what is about to be trained: method, base, sizes, devices."""
  size = lambda tree: sum(a.size for a in jax.tree.leaves(tree))  # noqa: E731
  trained, frozen = size(state.trainable), size(state.frozen)
  total = trained if built.trainable == 'params' else frozen
  print(
    f'method   {built.method} ({built.semantics} semantics)\n'
    f'base     {base.path or "random weights"}, {total:,} parameters\n'
    f'trained  {trained:,} parameters ({100 * trained / total:.2f} %)\n'
    f'tokens   {words}\n'
    f'devices  {jax.device_count()} x {jax.devices()[0].device_kind}\n'
    f'workdir  {workdir}',
    flush=True,
  )


def conclude(
  summary: Mapping[str, Any], places: Mapping[str, str | None]
) -> None:
  """Prints how long it took and where everything is."""
  lines = [f'done in {summary["seconds"]} s: {summary["method"]}']
  lines += [f'  {name:11}  {place}' for name, place in places.items() if place]
  print('\n'.join(lines), flush=True)


def routing(collection: Any) -> dict[str, dict[str, Any]]:
  """{site: statistics}, arrays as lists, one entry a layer."""
  found = {}
  for site, sums in stats.by_site(jax.device_get(collection)).items():
    values = stats.statistics(sums)
    found[site] = {
      name: np.round(np.asarray(value, np.float64), 4).tolist()
      for name, value in vars(values).items()
    }
  return found


def alarms(sites: Mapping[str, Mapping[str, Any]], limit: float) -> list[str]:
  """A line for each site and layer where one expert holds too much."""
  lines = []
  for site, values in sites.items():
    loads = np.atleast_2d(values['load'])
    for layer, load in enumerate(loads):
      if len(load) > 1 and load.max() > limit:
        lines.append(
          f'router alarm: {site}, layer {layer}: expert {load.argmax()} holds '
          f'{load.max():.0%} of the load (config.router_alarm={limit})'
        )
  return lines


def plot_loss(rows: list[dict[str, Any]], path: str) -> None:
  """Draws the training loss over steps into a PNG."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  points = [(row['step'], row['loss']) for row in rows if 'loss' in row]
  steps, losses = zip(*points, strict=True)
  figure, axes = pyplot.subplots(figsize=(7, 4), layout='constrained')
  axes.plot(steps, losses, color='#9ecae1', linewidth=1, label='each step')
  axes.plot(steps, _smooth(losses), color='#08519c', label='smoothed')
  axes.set(xlabel='step', ylabel='loss (nats a token)', title='Training loss')
  axes.set_ylim(bottom=0)
  axes.grid(alpha=0.3)
  axes.legend()
  os.makedirs(os.path.dirname(path), exist_ok=True)
  figure.savefig(path, dpi=120)
  pyplot.close(figure)


def _smooth(values, weight: float = 0.9) -> list[float]:
  """An exponential mean without the pull of its start."""
  mean, norm, out = 0.0, 0.0, []
  for value in values:
    mean = weight * mean + (1 - weight) * value
    norm = weight * norm + (1 - weight)
    out.append(mean / norm)
  return out


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return (
    f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'
  )

# SPDX-License-Identifier: Apache-2.0
"""The price of mixtures against experts, rank, k, length and depth.

python benchmarks/scaling.py [--json=FILE] [--plot=FILE.png]

One option is varied at a time; the others are those of DEFAULTS. The model and
the step are those of `method_table.py`. A mixture takes turns with its baseline
of equal rank; the ratio is the median over the rounds of a round's ratio. The
ratio of the FLOPs of the traced steps is beside it: what the price would be if
all products took the time of LoRA's.

- molora: all experts of MoLoRA, over one LoRA of rank experts x rank.
- topk: the same with a router that chooses k experts, over the same LoRA.
- mov: MoV, over MoV with one expert.
"""

import dataclasses
import json
import os

import method_table
from absl import flags
from matplotlib.figure import Figure

from moepeft.config import command_line
from moepeft.runs import plots

DEFAULTS = dict(experts=10, rank=4, k=2, length=256, depth=2)
TOKENS = 2048
# {option: its values}
AXES = {
  'experts': (2, 5, 10, 20, 40),
  'rank': (1, 4, 16, 64),
  'k': (1, 2, 4, 8),
  'length': (64, 256, 1024),
  'depth': (1, 2, 4),
}
# {series: (method, baseline, the options that it has)}
SERIES = {
  'molora': (
    'molora(experts={experts}, rank={rank})',
    'lora(rank={total})',
    ('experts', 'rank', 'length', 'depth'),
  ),
  'topk': (
    'molora(experts={experts}, rank={rank}, router=topk(k={k}))',
    'lora(rank={total})',
    tuple(DEFAULTS),
  ),
  'mov': (
    'mov(experts={experts})',
    'mov(experts=1)',
    ('experts', 'length', 'depth'),
  ),
}


@dataclasses.dataclass(frozen=True)
class Point:
  """A measured ratio.

  Attributes:
    axis, value: the varied option.
    time, flops: of a step of the series, over those of its baseline.
  """

  series: str
  axis: str
  value: int
  time: float
  flops: float


def texts(series: str, axis: str, value: int) -> list[str]:
  """The methods of a series and of its baseline with one option varied."""
  options = DEFAULTS | {axis: value}
  options['total'] = options['experts'] * options['rank']
  return [text.format(**options) for text in SERIES[series][:2]]


def measure(series: str, axis: str, value: int, rounds: int) -> Point:
  options = DEFAULTS | {axis: value}
  shape = dataclasses.replace(method_table.SHAPE, layers=options['depth'])
  rows = TOKENS // options['length']
  mixture, baseline = (
    method_table.make(text, shape, rows, options['length'])
    for text in texts(series, axis, value)
  )
  flops = [row.forward + row.backward for row in (mixture, baseline)]
  time = method_table.step_ratio(mixture, baseline, rounds)
  return Point(series, axis, value, time, round(flops[0] / flops[1], 3))


def ratios(points: list[Point]) -> dict[str, float]:
  """{'time_molora_experts_2': ratio} of all points, and of their FLOPs."""
  return {
    f'{kind}_{p.series}_{p.axis}_{p.value}': getattr(p, kind)
    for p in points
    for kind in ('time', 'flops')
  }


def draw(points: list[Point]) -> Figure:
  """A panel for each option; lines are times, dashes FLOPs."""
  figure = Figure(figsize=(3.2 * len(AXES), 3.4), layout='constrained')
  panels = figure.subplots(1, len(AXES), sharey=True)
  for axes, axis in zip(panels, AXES, strict=True):
    for i, series in enumerate(SERIES):
      line = [p for p in points if (p.series, p.axis) == (series, axis)]
      if line:
        values, color = [p.value for p in line], f'C{i}'
        axes.plot(values, [p.time for p in line], 'o-', color=color)
        axes.plot(values, [p.flops for p in line], '--', color=color, lw=1)
    axes.set_xscale('log', base=2)
    axes.set_xticks(AXES[axis], [str(value) for value in AXES[axis]])
    axes.minorticks_off()
    axes.set_xlabel(axis)
    axes.grid(alpha=0.3)
  panels[0].set_ylabel('step over the baseline')
  for i, series in enumerate(SERIES):
    panels[0].plot([], [], 'o-', color=f'C{i}', label=f'{series}, time')
    panels[0].plot([], [], '--', color=f'C{i}', label=f'{series}, FLOPs')
  panels[0].legend(fontsize='small')
  return figure


def main(argv) -> None:
  del argv
  for path in filter(None, (_JSON.value, _PLOT.value)):
    command_line.check_can_write(path)
  points = []
  print('| series | option | value | time | FLOPs |')
  print('| --- | --- | --- | --- | --- |')
  for axis, values in AXES.items():
    for series, (*_, options) in SERIES.items():
      for value in values if axis in options else ():
        point = measure(series, axis, value, _ROUNDS.value)
        points.append(point)
        print(
          f'| {series} | {axis} | {value} | {point.time} | {point.flops} |',
          flush=True,
        )
  if _JSON.value:
    with open(_JSON.value, 'w') as f:
      json.dump(ratios(points), f, indent=2)
  if _PLOT.value:
    plots.save(draw(points), os.path.abspath(_PLOT.value))


if __name__ == '__main__':
  _JSON = flags.DEFINE_string('json', None, 'Where to write the ratios.')
  _PLOT = flags.DEFINE_string('plot', None, 'Where to draw them, a PNG.')
  _ROUNDS = flags.DEFINE_integer(
    'rounds', 5, 'Turns of each pair.', lower_bound=1
  )
  command_line.run(main)

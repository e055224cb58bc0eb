# SPDX-License-Identifier: Apache-2.0
"""Costs of fine-tuning on one accelerator, at T5 1.1 large and xl shapes.

python benchmarks/device_table.py [--sizes=large,xl] [--json=FILE]

Prints a Markdown table: tokens/s, MFU and peak memory of `moepeft.train`'s
update on random weights, made on the device, and of LoRA in Hugging Face's
peft and torch where both are installed and see the device. Activations and
frozen weights are bfloat16, rows are full: 1024 tokens of inputs and 256 of
targets, in four segments (peft's are not packed); no dropout. `full` trains
float32 weights by Adafactor, the rest trains by AdamW.

Every row is a process of its own. Where the device's memory does not do, the
row says so and the batch is halved in the next. Rows are written to the JSON
as they come.

MFU = model FLOPs / (seconds * the peak of dense bfloat16). Model FLOPs are the
base's products alone, so that methods differ by their speed only: 2 P forward
for a token and a weight matrix of P, 2 P backward through the activations,
and 2 P more for its gradient where it is trained (`full`): a frozen weight has
none. Attention adds 4 t s n h forward and twice that backward for a layer and
row, the masked part of it included. What remat computes again is not counted,
nor are adapters (3 % of the base's weights at most in these rows, for which
they are charged the time).
"""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from moepeft.config import command_line
from moepeft.models.t5 import model as t5
from moepeft.nn.scan_layers import REMAT
from moepeft.peft import build

_HERE = pathlib.Path(__file__).parent
# The rank of peft's LoRA, as our row's.
_RANK = 4
# Dense bfloat16, from the vendors' data sheets, by JAX's device_kind.
PEAKS = {
  'NVIDIA A100-SXM4-40GB': 312e12,
  'NVIDIA A100-SXM4-80GB': 312e12,
  'NVIDIA A100-PCIE-40GB': 312e12,
  'NVIDIA A100 80GB PCIe': 312e12,
  'NVIDIA H100 80GB HBM3': 989e12,
  'NVIDIA H200': 989e12,
  'NVIDIA L4': 121e12,
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5e': 197e12,
  'TPU v5': 459e12,
  'TPU v5p': 459e12,
  'TPU v6 lite': 918e12,
  'TPU v6e': 918e12,
}
GOALS = {'mfu_xl': 0.45, 'lora_over_peft': 1.5}
METHODS = (
  'lora(rank=4)',
  'ia3',
  'mov(experts=10)',
  'molora(experts=10, rank=4)',
  'full',
)
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
  """The measurements to take; fields are named as the command's flags."""

  sizes: Sequence[str] = ('large', 'xl')
  methods: Sequence[str] = METHODS
  remat: Sequence[str] = ('none', 'dots', 'full')
  batch: int = 32
  inputs: int = 1024
  targets: int = 256
  steps: int = 10


def flops(c: t5.T5Config, rows: int, s: int, t: int, full: bool) -> int:
  """Model FLOPs of a step, as in the module's docstring.

  Args:
    rows: each of s tokens of inputs and t of targets.
    full: whether the weights have gradients too.
  """
  d, nh = c.d_model, c.heads * c.head_dim
  mlp = (3 if c.gated else 2) * d * c.ffn
  # Keys and values of cross-attention are of the inputs.
  inputs = c.encoder_layers * (4 * d * nh + mlp) + c.decoder_layers * 2 * d * nh
  targets = c.decoder_layers * (6 * d * nh + mlp) + d * c.vocab
  pairs = c.encoder_layers * s * s + c.decoder_layers * (t * t + t * s)
  products = 2 * rows * (inputs * s + targets * t)
  return (3 if full else 2) * products + 3 * 4 * rows * nh * pairs


def peak_of(kind: str, platform: str, tflops: float | None) -> float | None:
  """FLOPs a second; None on a CPU of which nothing is said.

  Raises:
    ValueError: an accelerator that is not known.
  """
  if tflops is not None:
    return tflops * 1e12
  if kind not in PEAKS and platform != 'cpu':
    raise ValueError(
      f'the peak of {kind!r} is not known; give it in dense bfloat16 as '
      '--peak_tflops'
    )
  return PEAKS.get(kind)


def run(row: Mapping[str, Any]) -> Row:
  """The result of benchmarks/device_row.py, or {'failed': reason}."""
  paths = [str(_HERE.parent), os.environ.get('PYTHONPATH', '')]
  env = {
    # JAX takes three quarters by default.
    'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.92',
    **os.environ,
    'PYTHONPATH': os.pathsep.join(filter(None, paths)),
  }
  done = subprocess.run(
    [sys.executable, str(_HERE / 'device_row.py'), json.dumps(row)],
    env=env,
    capture_output=True,
    text=True,
  )
  if done.returncode == 0:
    return json.loads(done.stdout.splitlines()[-1])
  return {'failed': f'exit code {done.returncode}: {reason(done.stderr)}'}


def reason(stderr: str) -> str:
  """The last line that names an error; the last of all where none does."""
  lines = stderr.strip().splitlines() or ['it said nothing']
  # JAX writes a remark of its own below the error.
  named = [
    line for line in lines if re.match(r'[\w.]+(Error|Exception)\b', line)
  ]
  return (named or lines)[-1]


def measured(
  plan: Mapping[str, Any], batch: int, peak: float | None
) -> Iterator[Row]:
  """A row for each batch that is tried, from the largest to what fits."""
  while batch:
    row = {**plan, 'batch': batch}
    row |= run(row)
    if 'seconds' in row:
      tokens = batch * (row['inputs'] + row['targets'])
      row['tokens_per_s'] = tokens / row['seconds']
      work = flops(
        t5.config(row['size']),
        batch,
        row['inputs'],
        row['targets'],
        row['method'] == 'full',
      )
      row['mfu'] = work / row['seconds'] / peak if peak else None
    yield row
    batch = batch // 2 if 'out_of_memory' in row else 0


def plans(options: Options, platform: str, with_peft: bool) -> Iterator[Row]:
  """The rows to measure: by size, method and remat."""
  shared = {
    'inputs': options.inputs,
    'targets': options.targets,
    'steps': options.steps,
    'platform': platform,
  }
  for size in options.sizes:
    sides = [('moepeft', method) for method in options.methods]
    if with_peft:
      sides.append(('peft', f'lora(rank={_RANK}) in peft'))
    for side, method in sides:
      for remat in options.remat:
        # transformers has all or nothing.
        if side == 'moepeft' or remat != 'dots':
          yield {
            'size': size,
            'side': side,
            'method': method,
            'rank': _RANK,
            'remat': remat,
            **shared,
          }


_HEAD = ('size', 'method', 'remat', 'batch', 'tokens/s', 'MFU', 'peak GB')


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
  """A row of the table as text."""
  first = row['size'], f'`{row["method"]}`', row['remat'], str(row['batch'])
  if 'out_of_memory' in row:
    return (*first, 'out of memory', '-', '-')
  if 'failed' in row:
    return (*first, f'failed: {row["failed"]}', '-', '-')
  mfu, memory = row['mfu'], row['bytes']
  return (
    *first,
    f'{row["tokens_per_s"]:,.0f}',
    '-' if mfu is None else f'{100 * mfu:.1f} %',
    '-' if memory is None else f'{memory / 1e9:.1f}',
  )


def line(texts: Sequence[str]) -> str:
  return f'| {" | ".join(texts)} |'


def goals(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
  """The figures that GOALS bound, of the best remat and batch on each side.

  mfu_xl is of lora; lora_over_peft of tokens/s, where both are measured the
  least over the sizes. None where it was not measured.
  """
  best: dict[tuple[str, str], Mapping[str, Any]] = {}
  for row in rows:
    is_moepeft_lora = (
      row['side'] == 'moepeft' and row['method'] == f'lora(rank={_RANK})'
    )
    if 'seconds' in row and (is_moepeft_lora or row['side'] == 'peft'):
      key = row['size'], row['side']
      if row['tokens_per_s'] > best.get(key, {}).get('tokens_per_s', 0):
        best[key] = row
  ratios = [
    row['tokens_per_s'] / best[size, 'peft']['tokens_per_s']
    for (size, side), row in best.items()
    if side == 'moepeft' and (size, 'peft') in best
  ]
  return {
    'mfu_xl': best.get(('xl', 'moepeft'), {}).get('mfu'),
    'lora_over_peft': min(ratios, default=None),
  }


def keep(path: str, kind: str, rows: Sequence[Row]) -> None:
  with open(path, 'w') as f:
    report = {'device': kind, 'rows': rows, 'goals': goals(rows)}
    json.dump(report, f, indent=2)


def check(options: Options, path: str | None) -> None:
  """Meets what is wrong before the first row, which takes minutes.

  Raises:
    ValueError: a size, method or remat does not exist, or there is none of
      them, or `path` cannot be written.
  """
  for name in ('sizes', 'methods', 'remat'):
    if not any(getattr(options, name)):
      raise ValueError(f'--{name} is empty; name one, or leave it out')
  for remat in options.remat:
    if remat not in REMAT:
      raise ValueError(f'--remat takes {", ".join(REMAT)}; got {remat!r}')
  for size in options.sizes:
    sites = t5.sites(t5.config(size))
    for method in options.methods:
      build(method, sites)
  if path:
    command_line.check_can_write(path)


def show(options: Options, tflops: float | None, path: str | None) -> list[Row]:
  """Measures and prints; returns the rows.

  Args:
    path: where the rows are kept as they come.

  Raises:
    ValueError: as `check`; or the device's peak is not known, or there is
      no device.
  """
  check(options, path)
  device = run({'side': 'device'})
  if 'failed' in device:
    raise ValueError(f'no device was found ({device["failed"]})')
  kind, platform = device['kind'], device['platform']
  peak = peak_of(kind, platform, tflops)
  why = run({'side': 'why_no_peft', 'platform': platform})['why']
  print(f'device: {kind}', f'no rows of peft: {why}' if why else '', sep='\n')
  print(line(_HEAD), line(['---'] * len(_HEAD)), sep='\n', flush=True)
  rows = []
  for plan in plans(options, platform, not why):
    for row in measured(plan, options.batch, peak):
      rows.append(row)
      print(line(cells(row)), flush=True)
      if path:
        keep(path, kind, rows)
  print()
  for name, figure in goals(rows).items():
    text = 'not measured' if figure is None else f'{figure:.3f}'
    print(f'{name}: {text}; the goal is at least {GOALS[name]}')
  return rows


def main(argv) -> None:
  del argv
  options = Options(*(flags.FLAGS[name].value for name in _FLAGS))
  rows = show(options, _PEAK.value, _JSON.value)
  if any('failed' in row for row in rows):
    sys.exit(1)


_FLAGS = [field.name for field in dataclasses.fields(Options)]

if __name__ == '__main__':
  plain = Options()
  flags.DEFINE_list('sizes', list(plain.sizes), 'Of T5 1.1.')
  flags.DEFINE_list(
    'remat', list(plain.remat), 'Each has a row of every method.'
  )
  flags.DEFINE_multi_string(
    'methods', list(plain.methods), 'Given once for each.'
  )
  for name, help_text in (
    ('batch', 'Rows of a batch, halved until they fit.'),
    ('inputs', 'Tokens of a row.'),
    ('targets', 'Tokens of a row.'),
    ('steps', 'Steps timed.'),
  ):
    flags.DEFINE_integer(name, getattr(plain, name), help_text, lower_bound=1)
  _PEAK = flags.DEFINE_float(
    'peak_tflops', None, "The device's peak, where this file lacks it."
  )
  _JSON = flags.DEFINE_string('json', None, 'Where to keep the rows.')
  command_line.run(main)

# SPDX-License-Identifier: Apache-2.0
"""python -m moepeft.data --config=FILE: what the model will see.

Rates of the mixture, lengths and cuts, padding, and examples as they stand in
a batch, decoded, with what is trained in brackets.
"""

import collections
import itertools
from collections.abc import Iterable, Sequence

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from moepeft import command
from moepeft import config as config_lib
from moepeft.data import batching, sources, vocabulary
from moepeft.data.loader import WINDOW, arrange
from moepeft.data.packing import Pair
from moepeft.data.seqio_stream import Stream
from moepeft.data.source import Sources
from moepeft.data.vocabulary import Vocabulary
from moepeft.typing import Batch

_BARS = 8
_WIDTH = 40
_UNCUT = 1 << 30


def show(config: ConfigDict, windows: int, rows: int) -> None:
  """Prints everything of a config.

  Args:
    windows: how much to look at, in windows of `WINDOW` examples.
    rows: how many rows of the first batch to decode.
  """
  data = config.data
  words = vocabulary(data.vocabulary, config.model.path)
  found = sources(data, config.seed)
  print(f'source   {data.source} {data.path or data.tasks}')
  print(f'tokens   {words}')
  for note in found.notes:
    print(note)
  lengths = data.inputs_length, data.targets_length
  names, pairs = look(found, words, windows * WINDOW)
  sizes = np.array([(len(x), len(y)) for x, y in pairs])
  print(f'\n{mixture(found, names, sizes, lengths)}\n')
  for side, name in enumerate(('inputs', 'targets')):
    print(histogram(sizes[:, side], name, lengths[side]))
  place = arrange(*lengths, data.packing, config.seed)
  cut = [
    tuple(
      np.append(ids[: n - 1], ids[-1])
      for ids, n in zip(pair, lengths, strict=True)
    )
    for pair in pairs
  ]
  parts = [place(i, cut[i * WINDOW : (i + 1) * WINDOW]) for i in range(windows)]
  print(f'\n{padding(parts, len(pairs))}')
  for row in range(min(rows, len(parts[0]['inputs']))):
    print('\n'.join(decoded(parts[0], row, words)))
  print('\n[...] is trained: the loss is taken of these tokens')


def look(
  found: Sources, words: Vocabulary, count: int
) -> tuple[list[str], list[Pair]]:
  """(dataset, ids) of the first examples; SeqIO tells no names, and cuts."""
  if isinstance(found.train, Stream):
    elements = itertools.islice(found.train.open(0), count)
    return [], [(e['inputs'], e['targets']) for e in elements]
  examples = [found.train[i] for i in range(count)]
  names = [e.task for e in examples]
  if not set(names) <= set(found.shares):
    # At the rates of a named mixture, which go by template.
    names = [f'{e.task}/{e.template}' for e in examples]
  return names, batching.encode_all(words, examples, _UNCUT, _UNCUT)


def mixture(
  found: Sources,
  names: Sequence[str],
  sizes: np.ndarray,
  lengths: tuple[int, int],
) -> str:
  """A table of datasets: rows, rate, what came of it, lengths and cuts."""
  rows = collections.Counter(e.task for e in found.rows)
  rows |= collections.Counter(f'{e.task}/{e.template}' for e in found.rows)
  where = collections.defaultdict(list)
  for i, name in enumerate(names):
    where[name].append(i)
  lines = [
    ('dataset', 'rows', 'rate', 'seen', 'inputs', 'targets', 'cut'),
  ]
  for name, share in sorted(found.shares.items(), key=lambda s: -s[1]):
    own = sizes[where[name]] if where[name] else np.zeros((0, 2))
    cut = int(np.any(own > lengths, axis=1).sum())
    lines.append(
      (
        name,
        f'{rows[name]:,}' if rows[name] else '-',
        f'{share:.2%}',
        f'{len(own) / len(names):.2%}' if names else '-',
        *_means(own),
        f'{cut:,}',
      )
    )
  total = int(np.any(sizes > lengths, axis=1).sum())
  lines.append(('all', '', '', '', *_means(sizes), f'{total:,}'))
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  shown = (
    '  '.join(
      cell.ljust(width) if i == 0 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    )
    for line in lines
  )
  said = f'{len(sizes):,} examples; lengths in tokens, before cuts'
  return '\n'.join([said, *shown])


def _means(sizes: np.ndarray) -> tuple[str, str]:
  x, y = sizes.mean(0) if len(sizes) else (0, 0)
  return f'{x:.0f}', f'{y:.0f}'


def histogram(lengths: np.ndarray, name: str, most: int) -> str:
  """How long a side is, against the length that it is cut to."""
  half, nine = np.percentile(lengths, (50, 90))
  cut = int((lengths > most).sum())
  lines = [
    f'{name}: median {half:.0f}, 90 % up to {nine:.0f}, longest '
    f'{lengths.max()}; {cut:,} of {len(lengths):,} are cut to {most}'
  ]
  least, largest = int(lengths.min()), int(lengths.max())
  width = -(-(largest - least + 1) // _BARS)
  edges = range(least, largest + width + 1, width)
  counts, _ = np.histogram(lengths, edges)
  for count, low in zip(counts, edges, strict=False):
    bar = '#' * round(_WIDTH * count / counts.max())
    lines.append(f'  {low:>6} .. {low + width - 1:<6} {count:>7,}  {bar}')
  return '\n'.join(lines)


def padding(parts: Iterable[Batch], examples: int) -> str:
  """Examples a row, and the shares of padding."""
  rows = sum(len(part['inputs']) for part in parts)
  shares = [
    1 - np.concatenate([part[f'{side}_mask'] for part in parts]).mean()
    for side in ('inputs', 'targets')
  ]
  return (
    f'{examples / rows:.2f} examples a row; padding: {shares[0]:.1%} of the '
    f'inputs, {shares[1]:.1%} of the targets'
  )


def decoded(part: Batch, row: int, words: Vocabulary) -> list[str]:
  """The examples of a row as text."""
  lines = []
  segments = [
    # A row of its own where nothing is packed.
    part.get(f'{side}_segments', part[f'{side}_mask'].astype(int))[row]
    for side in ('inputs', 'targets')
  ]
  for segment in range(1, segments[0].max() + 1):
    lines.append(f'\nrow {row}, example {segment}')
    x, y = (
      text(words, part[side][row][own == segment])
      for side, own in zip(('inputs', 'targets'), segments, strict=True)
    )
    lines += [f'  inputs   {x}', f'  targets  [{y}]']
  return lines


def text(words: Vocabulary, ids: np.ndarray) -> str:
  """Decoded ids, the end of sequence visible, lines indented."""
  ids = ids.tolist()
  end = ' <eos>' if ids and ids[-1] == words.eos else ''
  return words.decode(ids).replace('\n', '\n           ') + end


def main(argv) -> None:
  del argv
  config_lib.check(_CONFIG.value)
  if min(_WINDOWS.value, _ROWS.value) < 1:
    raise ValueError('--windows and --rows are at least 1')
  show(_CONFIG.value, _WINDOWS.value, _ROWS.value)


if __name__ == '__main__':
  _CONFIG = command.define_config('configs/molora_t5.py')
  _WINDOWS = flags.DEFINE_integer(
    'windows', 4, f'How much to look at, in {WINDOW:,} examples.'
  )
  _ROWS = flags.DEFINE_integer('rows', 3, 'Rows of a batch to decode.')
  command.run(main)

# SPDX-License-Identifier: Apache-2.0
"""python -m moepeft.data --config=FILE: shows a config's training batches.

It prints the mixture's rates, lengths, truncation and padding, and decoded rows
of a batch with the tokens that have a loss in brackets.
"""

import collections
import itertools
import sys
from collections.abc import Sequence

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from moepeft import registries
from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints.solve_method import with_explicit_method
from moepeft.config import check as config_check
from moepeft.config import command_line
from moepeft.core import terminal
from moepeft.core.types import Batch
from moepeft.data import load_tokenizer, open_data
from moepeft.data.batching.collators import Collator, make_model_collator
from moepeft.data.dataset import TrainingData
from moepeft.data.loader import WINDOW_SIZE
from moepeft.data.preference.dataset import PairCollator
from moepeft.data.preview import row_lines
from moepeft.data.tokenizers.tokenizer import Tokenizer, check_vocab_size
from moepeft.models import decoder_only
from moepeft.objectives.batches import make_collator
from moepeft.tasks import Example

_NUM_BINS = 8
# Characters of the longest bar of a histogram.
_BAR_LENGTH = 40
_NO_LIMIT = 1 << 30


def open_training_data(
  config: ConfigDict,
) -> tuple[TrainingData, Collator, bool]:
  """(data, collator, whether the model is a decoder only) of a config.

  Raises:
    ValueError: the data, the tokenizer or the model cannot be read.
  """
  data = config.data
  tokenizer = load_tokenizer(data.tokenizer, config.model.path)
  family, shape = base_lib.shape(config.model)
  check_vocab_size(tokenizer, shape.vocab)
  config = with_explicit_method(config)
  adapters = base_lib.adapter_map(family, shape, config)
  collator = make_model_collator(data, tokenizer, shape, config.seed, adapters)
  collator = make_collator(config, collator)
  source = open_data(
    data, config.seed, vocab_size=shape.vocab, collator=collator
  )
  return source, collator, decoder_only(shape)


def show(config: ConfigDict, windows: int, rows: int, only: bool) -> None:
  """Prints a summary of a config's data, and decoded rows.

  Args:
    windows: the number of windows of `WINDOW_SIZE` examples to read.
    rows: the number of rows of the first batch to decode.
    only: whether to print the decoded rows only.
  """
  source, collator, is_decoder = open_training_data(config)
  names, items = first_items(source, windows * WINDOW_SIZE)
  batch = collator.rows(0, collator.encode(items[:WINDOW_SIZE]))
  if only:
    print(*source.notes, sep='\n', file=sys.stderr)
  else:
    print_summary(config, source, collator, names, items)
  colour = sys.stdout.isatty()
  for row in range(min(rows, len(next(iter(batch.values()))))):
    for side, part in split_sides(batch, collator):
      name = heading(side, batch, row, collator.packed)
      lines = (
        row_lines(part, row, collator.tokenizer, colour)
        if is_decoder
        else example_lines(part, row, collator.tokenizer)
      )
      print('\n'.join([*([f'\n{name}'] if name else []), *lines]))
  green = 'green' if colour and is_decoder else '[...]'
  print(f'\n{green} is trained: the loss is taken of these tokens')
  if 'label' in batch:
    print(
      f'of mismatched answers {green} is measured and nothing is trained: a '
      'row beside the answer to another prompt'
    )


def heading(side: str, batch: Batch, row: int, packed: bool = False) -> str:
  """A side's name, with the labels of judged answers.

  Args:
    packed: whether a row has several answers, with a label each.
  """
  if side != 'judged':
    return side
  if not packed:
    return f'judged {"good" if batch["label"][row] else "bad"}'
  # Entry i is the label of segment i + 1.
  count = int(batch['inputs_segments'][row].max())
  labels = ('good' if label else 'bad' for label in batch['label'][row][:count])
  return f'judged {", ".join(labels)} (segment by segment)'


def print_summary(
  config: ConfigDict,
  source: TrainingData,
  collator: Collator,
  names: Sequence[str],
  items,
) -> None:
  """Prints rates, lengths and padding."""
  data = config.data
  print(f'source   {data.source} {data.path or data.tasks}')
  print(f'tokens   {collator.tokenizer}')
  for note in source.notes:
    terminal.show(note)
  untruncated = collator.resized((_NO_LIMIT,) * len(collator.lengths))
  sides, max_lengths = ('inputs', 'targets'), collator.lengths
  sizes, trained = collator.sizes(untruncated.encode(items))
  if len(max_lengths) == 1:
    # A decoder's columns are all tokens, and the tokens with a loss.
    sides, max_lengths = ('tokens', 'trained'), max_lengths * 2
    sizes = [(*size, n) for size, n in zip(sizes, trained, strict=True)]
  sizes = np.array(sizes)
  terminal.show(
    f'\n{mixture_table(source, names, sizes, max_lengths, sides)}\n'
  )
  if source.replay is not None:
    print(f'{replay_shares(source, trained)}\n')
  for side, name in enumerate(sides[: len(collator.lengths)]):
    print(histogram(sizes[:, side], name, max_lengths[side]))
  windows = [
    items[i : i + WINDOW_SIZE] for i in range(0, len(items), WINDOW_SIZE)
  ]
  batches = [
    collator.rows(i, collator.encode(part)) for i, part in enumerate(windows)
  ]
  parts = [
    part for batch in batches for _, part in split_sides(batch, collator)
  ]
  print(f'\n{padding(parts, len(items) * len(parts) // len(batches))}')


def replay_shares(source: TrainingData, trained: Sequence[int]) -> str:
  """The share of replayed text in the trained tokens of the first examples."""
  is_replayed = np.array(
    [source.replay[i][0] for i in range(len(trained))], bool
  )
  tokens = np.array(trained)
  share = tokens[is_replayed].sum() / max(tokens.sum(), 1)
  return (
    f'replayed text: {is_replayed.mean():.1%} of the examples, {share:.1%} '
    'of the trained tokens (before cuts)'
  )


def split_sides(batch: Batch, collator: Collator) -> list[tuple[str, Batch]]:
  """(name, batch) of each side; ('', batch) for batches without sides."""
  if not isinstance(collator, PairCollator):
    return [('', batch)]
  names = (
    ('judged', 'mismatched') if collator.judged else ('chosen', 'rejected')
  )
  return [
    (name, {k.removeprefix(s): v for k, v in batch.items() if k.startswith(s)})
    for name, s in zip(names, collator.sides, strict=True)
  ]


def first_items(source: TrainingData, count: int) -> tuple[list[str], list]:
  """(dataset names, items) of the first `count` items.

  Names are [] for streams, whose items are truncated already, and for mixtures
  of texts.
  """
  if source.open_stream is not None:
    elements = itertools.islice(source.open_stream(0), count)
    return [], [(e['inputs'], e['targets']) for e in elements]
  items = [source.train[i] for i in range(count)]
  if not all(isinstance(e, Example) for e in items):
    return list(source.shares) * count if len(source.shares) == 1 else [], items
  names = [e.task for e in items]
  if not set(names) <= set(source.shares):
    # A named mixture has a rate for each template.
    names = [f'{e.task}/{e.template}' for e in items]
  return names, items


def mixture_table(
  source: TrainingData,
  names: Sequence[str],
  sizes: np.ndarray,
  lengths: tuple[int, int],
  sides: tuple[str, str] = ('inputs', 'targets'),
) -> str:
  """A table of datasets: rows, rate, share, mean lengths, truncated items."""
  rows = collections.Counter(e.task for e in source.rows)
  rows |= collections.Counter(f'{e.task}/{e.template}' for e in source.rows)
  indices = collections.defaultdict(list)
  for i, name in enumerate(names):
    indices[name].append(i)
  lines = [
    ('dataset', 'rows', 'rate', 'seen', *sides, 'cut'),
  ]
  for name, share in sorted(source.shares.items(), key=lambda s: -s[1]):
    dataset_sizes = sizes[indices[name]] if indices[name] else np.zeros((0, 2))
    cut = int(np.any(dataset_sizes > lengths, axis=1).sum())
    lines.append(
      (
        name,
        f'{rows[name]:,}' if rows[name] else '-',
        f'{share:.2%}',
        f'{len(dataset_sizes) / len(names):.2%}' if names else '-',
        *_means(dataset_sizes),
        f'{cut:,}',
      )
    )
  total = int(np.any(sizes > lengths, axis=1).sum())
  lines.append(('all', '', '', '', *_means(sizes), f'{total:,}'))
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  aligned = (
    '  '.join(
      cell.ljust(width) if i == 0 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    )
    for line in lines
  )
  heading = f'{len(sizes):,} examples; lengths in tokens, before cuts'
  return '\n'.join([heading, *aligned])


def _means(sizes: np.ndarray) -> tuple[str, str]:
  x, y = sizes.mean(0) if len(sizes) else (0, 0)
  return f'{x:.0f}', f'{y:.0f}'


def histogram(lengths: np.ndarray, name: str, max_length: int) -> str:
  """A histogram of lengths, with the number of those above `max_length`."""
  median, percentile_90 = np.percentile(lengths, (50, 90))
  cut = int((lengths > max_length).sum())
  lines = [
    f'{name}: median {median:.0f}, 90 % up to {percentile_90:.0f}, longest '
    f'{lengths.max()}; {cut:,} of {len(lengths):,} are cut to {max_length}'
  ]
  smallest, largest = int(lengths.min()), int(lengths.max())
  width = -(-(largest - smallest + 1) // _NUM_BINS)
  edges = range(smallest, largest + width + 1, width)
  counts, _ = np.histogram(lengths, edges)
  for count, low in zip(counts, edges, strict=False):
    bar = '#' * round(_BAR_LENGTH * count / counts.max())
    lines.append(f'  {low:>6} .. {low + width - 1:<6} {count:>7,}  {bar}')
  return '\n'.join(lines)


def padding(parts: Sequence[Batch], examples: int) -> str:
  """The mean number of examples in a row, and the shares of padding."""
  rows = sum(len(part['inputs']) for part in parts)
  shares = [
    1 - np.concatenate([part[f'{side}_mask'] for part in parts]).mean()
    for side in ('inputs', 'targets')
  ]
  summary = (
    f'{examples / rows:.2f} examples a row; padding: {shares[0]:.1%} of '
  )
  if 'decoder_inputs' not in parts[0]:
    trained = (1 - shares[1]) / (1 - shares[0])
    return f'{summary}the tokens; {trained:.1%} of the others are trained'
  return f'{summary}the inputs, {shares[1]:.1%} of the targets'


def example_lines(batch: Batch, row: int, tokenizer: Tokenizer) -> list[str]:
  """The decoded examples of a row."""
  lines = []
  for i, (inputs, targets) in enumerate(row_examples(batch, row), 1):
    lines.append(f'\nrow {row}, example {i}')
    x, y = decode(tokenizer, inputs), decode(tokenizer, targets)
    example = [f'  inputs   {x}', f'  targets  [{y}]']
    lines += map(terminal.visible, example)
  return lines


def row_examples(batch: Batch, row: int) -> list[tuple[np.ndarray, np.ndarray]]:
  """(ids of the inputs, ids of the targets) of each example of a row."""
  inputs, targets = (
    # A row that is not packed is one segment.
    batch.get(f'{side}_segments', batch[f'{side}_mask'].astype(int))[row]
    for side in ('inputs', 'targets')
  )
  return [
    (
      batch['inputs'][row][inputs == segment],
      batch['targets'][row][targets == segment],
    )
    for segment in range(1, inputs.max() + 1)
  ]


def decode(tokenizer: Tokenizer, ids: np.ndarray) -> str:
  """Decodes ids with special tokens, and indents the lines."""
  return tokenizer.show(ids.tolist()).replace('\n', '\n           ')


def main(argv) -> None:
  del argv
  config_check.check(_CONFIG.value, registries.BY_KEY)
  only = _SHOW_BATCH.value
  # The decoded rows are all in the first window.
  show(_CONFIG.value, 1 if only else _WINDOWS.value, _ROWS.value, only)


if __name__ == '__main__':
  _CONFIG = command_line.define_config('configs/molora_t5.py')
  _WINDOWS = flags.DEFINE_integer(
    'windows',
    4,
    f'How much to look at, in {WINDOW_SIZE:,} examples.',
    lower_bound=1,
    upper_bound=100_000,
  )
  _ROWS = flags.DEFINE_integer(
    'rows',
    3,
    'Rows of a batch to decode.',
    lower_bound=1,
    upper_bound=100_000,
  )
  _SHOW_BATCH = flags.DEFINE_bool(
    'show_batch', False, 'Print the decoded rows alone.'
  )
  command_line.run(main)

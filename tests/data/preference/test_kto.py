# SPDX-License-Identifier: Apache-2.0
"""Judged answers: previews of packed rows, and data of one class."""

import json
import re

import numpy as np
import pytest

from moepeft import config as config_lib
from moepeft.data import open_data
from moepeft.data.__main__ import heading
from moepeft.data.batching.decoder_only import CausalCollator
from moepeft.data.preference import dataset as preference_dataset
from moepeft.data.tokenizers.tokenizer import ByteTokenizer


def read(tmp_path, labels, **changes):
  rows = [
    {'prompt': f'Say {i}', 'completion': f'well {i}', 'label': label}
    for i, label in enumerate(labels)
  ]
  (tmp_path / 'r.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  data = config_lib.default().data
  data.source, data.path = 'preference', str(tmp_path / 'r.jsonl')
  data.validation_fraction = 0.0
  own = preference_dataset.objective_collator(
    data, 'kto', 'judged', CausalCollator(ByteTokenizer(), 64, **changes)
  )
  return own, open_data(data, 0, collator=own)


@pytest.mark.parametrize(
  ('label', 'said'),
  [
    (True, 'is good and none is bad, .* rows whose label is false'),
    (False, 'is bad and none is good, .* rows whose label is true'),
  ],
)
def test_data_of_one_class_are_told_which_is_missing(tmp_path, label, said):
  _, actual = read(tmp_path, [label] * 4)
  assert any(re.search(said, note) for note in actual.notes)
  _, actual = read(tmp_path, [label, not label, label])
  assert not any('none is' in note for note in actual.notes)


def test_a_packed_row_is_previewed_with_each_segments_label(tmp_path):
  own, actual = read(tmp_path, [True, False, False], packed=True)
  items = [actual.train[i] for i in range(3)]
  batch = own.pack(items, [[0, 1, 2]])
  words = ['good' if item.label else 'bad' for item in items]
  assert heading('judged', batch, 0, True) == (
    f'judged {", ".join(words)} (segment by segment)'
  )
  assert heading('mismatched', batch, 0, True) == 'mismatched'
  padded = own.pad(items)
  assert heading('judged', padded, 0) == f'judged {words[0]}'
  assert np.ndim(batch['label'][0]) == 1

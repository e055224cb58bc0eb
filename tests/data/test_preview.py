# SPDX-License-Identifier: Apache-2.0
"""The preview of a decoder's rows by python -m moepeft.data."""

import json

import numpy as np
import pytest

from moepeft import config as config_lib
from moepeft.data.__main__ import decode as decoded_text
from moepeft.data.__main__ import show
from moepeft.data.batching.decoder_only import make_sample, pack_samples
from moepeft.data.preview import highlight, row_lines
from moepeft.data.tokenizers.tokenizer import ByteTokenizer


def ids(text):
  return [byte + 3 for byte in text.encode()]


def test_trained_text_stands_in_brackets_or_in_green():
  one = make_sample(ids('ab\n'), [*ids('cd'), 1])
  assert (
    highlight(one.ids, one.loss_mask, ByteTokenizer(), False) == 'ab\n[cd<eos>]'
  )
  green = highlight(one.ids, one.loss_mask, ByteTokenizer(), True)
  assert green == 'ab\n\033[32mcd<eos>\033[0m'


def test_each_segment_of_a_packed_row_is_shown():
  some = [make_sample(ids('ab'), ids('c')), make_sample(ids('d'), ids('efg'))]
  rows = pack_samples(some, 7, [[1, 0]])
  lines = row_lines(rows, 0, ByteTokenizer(), False)
  assert lines == [
    '\nrow 0, segment 1: 3 tokens, 3 trained',
    '  d[efg]',
    '\nrow 0, segment 2: 2 tokens, 1 trained',
    '  ab[c]',
  ]


def decoder(**changes):
  c = config_lib.default()
  c.model.path, c.model.family, c.model.size = '', 'llama', 'tiny'
  c.objective, c.data.tokenizer, c.data.length = 'causal', 'bytes', 96
  with c.unlocked():
    c.update_from_flattened_dict(changes)
  return c


@pytest.mark.parametrize('only', [False, True])
def test_a_decoders_batch_is_shown(capsys, only):
  config = decoder(**{'data.tasks': 'stars', 'data.packing': True})
  show(config, 1, 2, only)
  output = capsys.readouterr().out
  assert 'row 1, segment 1: ' in output and '<eos>]' in output
  assert ('of the others are trained' in output) != only
  assert ('tokens: median' in output) != only


def test_an_encoder_s_hidden_spans_are_shown_with_their_sentinels():
  # 'ab', the sentinel 299, the end; 'cd' after the sentinel.
  x, y = np.array([*ids('ab'), 299, 1]), np.array([299, *ids('cd'), 1])
  assert decoded_text(ByteTokenizer(), x) == 'ab<299><eos>'
  assert decoded_text(ByteTokenizer(), y) == '<299>cd<eos>'


def test_hidden_spans_are_shown_as_they_are_told(tmp_path, capsys):
  rows = [{'text': 'the quick brown fox jumps over the lazy dog'}] * 9
  (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  source = {'data.source': 'text', 'data.path': str(tmp_path / 'a.jsonl')}
  config = decoder(**source)
  config.data.pretraining_objective = 'spans'
  config.model.shape.update(vocab=300)
  show(config, 1, 1, True)
  output = capsys.readouterr().out
  before, _, after = output.partition('<eos>[')
  assert '<299>' in before and after.startswith('<299>')


def test_a_vocabulary_larger_than_the_embedding_is_refused():
  # Bytes are 259 tokens; `train` refuses the same.
  config = decoder(**{'data.tasks': 'stars'})
  config.model.shape.update(vocab=258)
  with pytest.raises(ValueError, match='has 259 tokens, the model 258'):
    show(config, 1, 1, True)

# SPDX-License-Identifier: Apache-2.0
"""Text that comes token by token is that of all tokens, whole and cut."""

import itertools

import numpy as np
import pytest

from moepeft.data.tokenizers.tokenizer import ByteTokenizer
from moepeft.inference.detokenizer import Detokenizer, StopStrings, TextStream
from tests import ROOT

WORDS = ByteTokenizer()
TEXT = 'naïve 你好 🙂 e\u0301!'


def pieces(ids, sizes):
  """Ids in parts of the sizes, over and over."""
  sizes = itertools.cycle(sizes)
  while ids:
    size = next(sizes)
    yield ids[:size]
    ids = ids[size:]


@pytest.mark.parametrize('sizes', [(1,), (2,), (3, 1, 5), (100,)])
def test_streamed_text_is_the_decoded_text_in_whole_characters(sizes):
  stream = Detokenizer(WORDS.decode)
  actual = [stream.feed(part) for part in pieces(WORDS.encode(TEXT), sizes)]
  assert all('\ufffd' not in piece for piece in actual)
  assert ''.join(actual) == TEXT and stream.finish() == ''


def test_a_character_comes_with_its_last_byte():
  stream = Detokenizer(WORDS.decode)
  # '你' is three bytes.
  assert [stream.feed([i]) for i in WORDS.encode('a你b')] == [
    'a',
    '',
    '',
    '你',
    'b',
  ]


def test_broken_bytes_are_marked_where_they_stay_broken():
  stream = Detokenizer(WORDS.decode)
  first, *_ = WORDS.encode('你')
  assert stream.feed([first]) == ''
  # Another character begins: the byte before it will never be one.
  assert stream.feed(WORDS.encode('a')) == '\ufffda'
  assert stream.feed([first]) == ''
  assert stream.finish() == '\ufffd'
  assert stream.finish() == ''


def joined(ids):
  """A decoder that drops the first space, as SentencePiece's does, and that
  marks a broken run byte by byte, as a fallback to bytes does.
  """
  text = b''.join([b' hi', b' you', b'\xe4', b'\xbd', b'\xa0'][i] for i in ids)
  try:
    return text.decode().removeprefix(' ')
  except UnicodeDecodeError:
    return text.decode(errors='ignore').removeprefix(' ') + '\ufffd' * (
      len(text) - len(text.decode(errors='ignore').encode())
    )


@pytest.mark.parametrize('sizes', [(1,), (2,), (3,), (4, 1)])
def test_a_token_is_joined_to_those_before_it(sizes):
  ids = [0, 1, 2, 3, 4, 1, 2, 3, 4, 2, 3, 4, 0]
  stream = Detokenizer(joined)
  actual = ''.join(stream.feed(part) for part in pieces(ids, sizes))
  assert actual + stream.finish() == 'hi you你 you你你 hi'


TOKENIZERS = ROOT.parent / 'shared' / 'models'


@pytest.mark.parametrize('name', ['smollm2-tokenizer', 'flan-t5-small-int8'])
def test_a_real_tokenizer_is_streamed(name):
  if not (TOKENIZERS / name / 'tokenizer.json').exists():
    pytest.skip(f'no tokenizer at {TOKENIZERS / name}')
  from moepeft.data.tokenizers.tokenizer import HuggingFaceTokenizer

  words = HuggingFaceTokenizer(str(TOKENIZERS / name))
  ids = words.encode(f'Hello there.  {TEXT}\n\tDon’t, “x”?')
  whole = words.decode(ids)
  for sizes in ((1,), (3, 1)):
    stream = Detokenizer(words.decode)
    actual = [stream.feed(part) for part in pieces(ids, sizes)]
    assert ''.join(actual) + stream.finish() == whole


@pytest.mark.parametrize(
  'stops, expected',
  [
    ((), 'say: abcabd.'),
    (('abd',), 'say: abc'),
    (('zz', ': '), 'say'),
    # 'bc' ends before 'abca' does.
    (('abca', 'bc'), 'say: a'),
    # Both end there: the one that is longer begins first.
    (('c', 'abc'), 'say: '),
    (('.x',), 'say: abcabd.'),
  ],
)
def test_a_stop_string_cuts_whatever_the_pieces_are(stops, expected):
  text = 'say: abcabd.'
  for size in range(1, len(text) + 1):
    actual = StopStrings(stops)
    parts = [actual.feed(part) for part in pieces(text, (size,))]
    assert ''.join(parts) + actual.finish() == expected
    assert actual.matched == (expected != text)


def test_what_may_begin_a_stop_string_is_held_back():
  stops = StopStrings(('END',))
  assert [stops.feed(c) for c in 'aENEND'] == ['a', '', '', 'EN', '', '']
  assert stops.matched and stops.feed('more') == '' and stops.finish() == ''


def test_an_empty_stop_string_is_refused():
  with pytest.raises(ValueError, match='a stop string is empty'):
    StopStrings(('a', ''))


def test_a_stream_holds_characters_and_stop_strings():
  rng = np.random.default_rng(0)
  ids = WORDS.encode('ask 你 STOP 好')
  for _ in range(7):
    stream = TextStream(WORDS.decode, ('STOP',))
    sizes = tuple(rng.integers(1, 5, 9))
    actual = ''.join(stream.feed(part) for part in pieces(ids, sizes))
    assert actual + stream.finish() == 'ask 你 ' and stream.stopped


@pytest.mark.parametrize('sizes', [(1,), (2,), (3, 1, 5), (100,)])
def test_a_stop_string_may_hold_special_tokens(sizes):
  # Decoded, 300 and 301 have no text, as special tokens of a tokenizer.
  contents = {300: '<|user|>', 301: '<|end|>'}

  def decode(ids):
    return WORDS.decode([i for i in ids if i not in contents])

  def hidden(text):
    return {i: content for i, content in contents.items() if content in text}

  ids = [*WORDS.encode('a\n'), 300, *WORDS.encode('b'), 301, 300]
  ids += WORDS.encode('\nc')
  for stop, text in (
    ('<|user|>', 'a\n'),
    ('\n<|user|>b', 'a'),
    ('<|end|><|user|>\n', 'a\nb'),
    ('<|user|>c', 'a\nb\nc'),
  ):
    stream = TextStream(decode, (stop,), hidden)
    actual = ''.join(stream.feed(part) for part in pieces(ids, sizes))
    assert actual + stream.finish() == text
    assert stream.stopped == (text != 'a\nb\nc')

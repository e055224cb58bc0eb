# SPDX-License-Identifier: Apache-2.0
"""Tokens that are parts of characters show which ones."""

import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

from moepeft.data.tokenizers.tokenizer import (
  ByteTokenizer,
  HuggingFaceTokenizer,
)
from moepeft.evaluation.routing.token_text import TokenText


def byte_level(path):
  """A byte-level BPE with one token of ' ' and the first byte of '中'."""
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  # The letters of the bytes 20 and E4; see GPT-2's table.
  merge = ('Ġ', 'ä')
  pieces = [*letters, ''.join(merge), '<end>']
  ids = {piece: i for i, piece in enumerate(pieces)}
  made = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=[merge]))
  made.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  made.decoder = decoders.ByteLevel()
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=made, eos_token='<end>'
  ).save_pretrained(path)
  return HuggingFaceTokenizer(str(path))


def test_a_character_stands_on_the_first_of_its_bytes():
  tokenizer = ByteTokenizer()
  ids = [*tokenizer.encode('我a好'), 1]
  # U+6211 and U+597D in UTF-8.
  assert TokenText(tokenizer).of_text(ids) == [
    ('我', '我', 'E6'),
    ('', '我', '88'),
    ('', '我', '91'),
    'a',
    ('好', '好', 'E5'),
    ('', '好', 'A5'),
    ('', '好', 'BD'),
    '<eos>',
  ]


def test_a_token_of_a_character_and_a_part_of_the_next_has_both(tmp_path):
  tokenizer = byte_level(tmp_path)
  ids = [*tokenizer.encode('x 中 y'), tokenizer.eos]
  assert TokenText(tokenizer).of_text(ids) == [
    'x',
    (' 中', ' 中', '20 E4'),
    ('', '中', 'B8'),
    ('', '中', 'AD'),
    ' ',
    'y',
    '<end>',
  ]


def test_incomplete_characters_are_bytes():
  tokenizer = ByteTokenizer()
  first, second, third = tokenizer.encode('中')
  text = TokenText(tokenizer)
  alone = [('', '', byte) for byte in ('E4', 'B8', 'AD')]
  assert [text.of_token(i) for i in (first, second, third)] == alone
  assert text.of_token(1) == '<eos>'
  # The end is cut; a byte in the middle is missing; a first byte is missing.
  assert text.of_text([first, second]) == alone[:2]
  (letter,) = tokenizer.encode('a')
  assert text.of_text([first, letter]) == [alone[0], 'a']
  assert text.of_text([second, letter]) == [alone[1], 'a']
  assert text.of_text([first, first, second, third]) == [
    alone[0],
    ('中', '中', 'E4'),
    ('', '中', 'B8'),
    ('', '中', 'AD'),
  ]


def test_parts_have_the_first_characters_of_texts_that_they_are_in():
  tokenizer = ByteTokenizer()
  text = TokenText(tokenizer)
  # U+4E2D, U+4E00 to U+4E04: E4 B8 AD and E4 B8 80 to 84.
  texts = [tokenizer.encode(text) for text in ('a中一', '一丁丂七丄')]
  characters = text.characters(texts)
  first, second, third = tokenizer.encode('中')
  assert characters[first] == characters[second] == '中 一 丁 丂 …'
  assert text.of_token(third, characters[third]) == ('', '中', 'AD')
  assert tokenizer.encode('a')[0] not in characters

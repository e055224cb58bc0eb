# SPDX-License-Identifier: Apache-2.0
"""Tokenizers trained from text: ids, round trips, errors."""

import codecs
import importlib.util

import pytest

from moepeft import tokenizer
from moepeft.data.tokenizers.tokenizer import HuggingFaceTokenizer
from moepeft.data.tokenizers.train_tokenizer import KINDS, TokenizerSpec, train
from moepeft.tokenizer import train_and_save

WORDS = 'the quick brown fox jumps over a lazy dog'.split()
# Unigram's trainer begins with what several words share: some are plural.
LINES = [
  ' '.join(
    word + 's' * (i % 3 // 2) for word in WORDS[i % 9 :] + WORDS[: i % 7]
  )
  for i in range(197)
]


@pytest.fixture
def text(tmp_path):
  (tmp_path / 'a.txt').write_text('\n'.join(LINES))
  return str(tmp_path / 'a.txt')


@pytest.mark.parametrize(
  ('kind', 'size'),
  [('bytes', 300), ('bpe', 90), ('wordpiece', 90), ('unigram', 60)],
)
def test_each_kind_is_read_back_and_keeps_words_whole(
  text, tmp_path, kind, size
):
  form = TokenizerSpec(kind, size, extra_ids=3, chat=True)
  lines = train_and_save(form, text, str(tmp_path / 'out'), 0.05)
  assert '0.00% unknown' in lines[-2]
  words = HuggingFaceTokenizer(str(tmp_path / 'out'))
  assert words.eos == 1 and words.tokenizer.pad_token_id == 0
  assert words.decode(words.encode(LINES[3])) == LINES[3]
  # The first sentinel has the last id.
  assert words.sentinels(0) == [words.size - 1, words.size - 2, words.size - 3]
  assert words.size <= size
  # Nine words that come again and again are a piece or little more each.
  assert len(words.encode(LINES[3])) < 2 * len(LINES[3].split())
  shown = words.tokenizer.apply_chat_template(
    [{'role': 'user', 'content': 'fox'}], tokenize=False
  )
  assert shown == '<|im_start|>user\nfox<|im_end|>\n'
  assert words.encode('<|im_end|>') == [1]


def test_bytes_know_every_text(text, tmp_path):
  train_and_save(TokenizerSpec('bytes', 280), text, str(tmp_path / 'out'), 0.05)
  words = HuggingFaceTokenizer(str(tmp_path / 'out'))
  odd = 'naïve 漢字\n\n\ttabs  and spaces '
  assert words.decode(words.encode(odd)) == odd


_SENTENCEPIECE = pytest.mark.skipif(
  importlib.util.find_spec('sentencepiece') is None,
  reason='needs sentencepiece',
)


@pytest.mark.parametrize(
  ('kind', 'library'),
  [
    *((kind, 'tokenizers') for kind in KINDS),
    pytest.param('unigram', 'sentencepiece', marks=_SENTENCEPIECE),
  ],
)
def test_every_kind_gives_back_lines_and_blanks(tmp_path, kind, library):
  lines = [f'{line}\n\n  {line}.' for line in LINES]
  # sentencepiece finds no more than 48 pieces here.
  size = {'bytes': 300, 'wordpiece': 90}.get(kind, 47)
  actual = train(TokenizerSpec(kind, size, chat=True, library=library), lines)
  actual.save_pretrained(tmp_path)
  words = HuggingFaceTokenizer(str(tmp_path))
  for said in (
    f'{LINES[3]}\n\n{LINES[5]}',
    ' the  quick\n   lazy fox .\n\tdog \n',
    '<|im_start|>the\nfox<|im_end|>\nthe',
  ):
    ids = words.encode(said)
    assert words.tokenizer.unk_token_id not in ids
    assert words.tokenizer.decode(ids) == said


@pytest.mark.parametrize('kind', ['bytes', 'bpe', 'wordpiece'])
def test_marks_of_pieces_that_go_on_are_text_too(kind):
  actual = train(TokenizerSpec(kind, 290), [*LINES, '## #the ##fox##'] * 5)
  said = '## the ###fox ##\n##'
  assert actual.decode(actual(said)['input_ids']) == said


@pytest.mark.parametrize('kind', ['bpe', 'wordpiece', 'unigram'])
def test_lines_are_known_where_the_text_has_none(kind):
  actual = train(TokenizerSpec(kind, 90), LINES)
  ids = actual('the\n\tfox')['input_ids']
  assert actual.unk_token_id not in ids and actual.decode(ids) == 'the\n\tfox'


@_SENTENCEPIECE
def test_sentencepiece_trains_unigram_too(text, tmp_path):
  form = TokenizerSpec('unigram', 36, library='sentencepiece')
  train_and_save(form, text, str(tmp_path / 'out'), 0.05)
  words = HuggingFaceTokenizer(str(tmp_path / 'out'))
  assert words.eos == 1 and words.decode(words.encode(LINES[3])) == LINES[3]
  form = TokenizerSpec('unigram', 5000, library='sentencepiece')
  with pytest.raises(ValueError, match='lower --size or give more text'):
    train_and_save(form, text, str(tmp_path / 'more'), 0.05)


def test_tokens_a_word_are_counted():
  actual = train(TokenizerSpec('bytes', 259), LINES)
  # No merge: as many tokens as bytes; 'ab cd' has 5 of them and 2 words.
  assert str(tokenizer.measure_fit(actual, ['ab cd'])) == (
    '2.500 tokens a word, 1.000 a byte, 0.00% unknown'
  )


@pytest.mark.parametrize(
  ('options', 'said'),
  [
    ({'kind': 'words'}, '--kind is one of bytes, bpe'),
    ({'size': 200}, '--size=200 has no room for 259 pieces'),
    ({'library': 'sentencepiece'}, 'trains --kind=unigram'),
    ({'extra_ids': -1}, '--extra_ids=-1'),
  ],
  ids=str,
)
def test_a_form_that_cannot_be_is_refused(options, said):
  with pytest.raises(ValueError, match=said):
    TokenizerSpec(**options)


def test_what_cannot_be_trained_or_written_is_told(text, tmp_path):
  (tmp_path / 'one.txt').write_text('one line')
  with pytest.raises(ValueError, match='expected at least two'):
    train_and_save(
      TokenizerSpec(), str(tmp_path / 'one.txt'), str(tmp_path / 'out'), 0.05
    )
  with pytest.raises(ValueError, match='is not empty; name another'):
    train_and_save(TokenizerSpec(), text, str(tmp_path), 0.05)
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match="file' is a file; name a directory"):
    train_and_save(TokenizerSpec(), 'not read', str(tmp_path / 'file'), 0.05)
  with pytest.raises(ValueError, match="file/out' cannot be made"):
    train_and_save(
      TokenizerSpec(), 'not read', str(tmp_path / 'file' / 'out'), 0.05
    )


@pytest.mark.parametrize('kind', ['bpe', 'wordpiece', 'unigram'])
def test_a_text_of_more_letters_than_pieces_is_refused(text, tmp_path, kind):
  # The letters of WORDS are all 26, and there are 3 special pieces.
  with pytest.raises(ValueError, match=r'are \d+ pieces, but .* 20; raise'):
    train_and_save(TokenizerSpec(kind, 20), text, str(tmp_path / 'out'), 0.05)


def test_a_byte_order_mark_in_a_tokenizers_files_is_no_text(text, tmp_path):
  """As editors of Windows save them (cases 011)."""
  folder = tmp_path / 'out'
  train_and_save(TokenizerSpec('bpe', 90, chat=True), text, str(folder), 0.05)
  (folder / 'config.json').write_text('{"model_type": "llama"}')
  plain = HuggingFaceTokenizer(str(folder))
  for file in folder.iterdir():
    file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
  marked = HuggingFaceTokenizer(str(folder))
  assert marked.encode('a quick dog') == plain.encode('a quick dog')
  assert marked.tokenizer.chat_template == plain.tokenizer.chat_template

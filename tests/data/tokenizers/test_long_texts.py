# SPDX-License-Identifier: Apache-2.0
"""Texts' ids are those of the whole text, however long and however many."""

import numpy as np
import pytest

from moepeft import config as config_lib
from moepeft.data.batching.collators import Seq2SeqCollator
from moepeft.data.batching.decoder_only import CausalCollator
from moepeft.data.text import dataset as text_dataset
from moepeft.data.text import documents
from moepeft.data.text.documents import Document
from moepeft.data.tokenizers import long_texts
from moepeft.data.tokenizers.tokenizer import HuggingFaceTokenizer

from ... import chat_cases

KINDS = ('bytes', 'lines', 'spaces')


@pytest.fixture(scope='module')
def vocabularies(tmp_path_factory):
  made = {}
  for kind in (*KINDS, 'bos'):
    path = tmp_path_factory.mktemp(kind)
    actual = chat_cases.learnt(
      'spaces' if kind == 'bos' else kind, kind == 'bos'
    )
    actual.save_pretrained(path)
    made[kind] = HuggingFaceTokenizer(str(path))
  return made


def whole(words, said):
  return words.tokenizer(said, add_special_tokens=False)['input_ids']


def drawn(size, seed=0):
  rng = np.random.default_rng(seed)
  words = ['the', 'cat', 'sat', ':)', 'x = 1', '\n\n', '\n', '  again', 'é中']
  return ' '.join(rng.choice(words, size))


@pytest.mark.parametrize('kind', KINDS)
def test_a_document_s_ids_are_those_of_its_text(vocabularies, kind):
  words = vocabularies[kind]
  actual = [
    Document('a', ('the cat sat', 'on the mat', '  x = 1')),
    Document('b', ('the cat sat', 'on the mat'), '\n'),
  ]
  for ids, document in zip(
    text_dataset.encode_documents(words, actual), actual, strict=True
  ):
    joined = document.separator.join(document.passages)
    assert ids.tolist() == [*whole(words, joined), words.eos]
    assert ids.dtype == np.int32


@pytest.mark.parametrize('kind', KINDS)
def test_a_long_text_s_ids_are_those_of_the_whole(vocabularies, kind):
  words, said = vocabularies[kind], drawn(1999)
  calls = []

  def counted(texts, **options):
    calls.append(max(map(len, texts)))
    return words.tokenizer(texts, **options)

  (actual,) = long_texts.encode(counted, [said], part=4096, overlap=128)
  assert actual.tolist() == whole(words, said)
  # An eighth of 4,096 characters at most: never the whole text.
  assert max(calls) == 512 and len(calls) > 1


def test_a_text_that_has_no_joint_is_given_as_a_whole(vocabularies):
  # One token a character of unknown bytes would agree; a row of one letter
  # agrees anywhere, so what must hold is the count.
  words, said = vocabularies['bytes'], 'é' * 3001
  (actual,) = long_texts.encode(words.tokenizer, [said], part=4096, overlap=128)
  assert actual.tolist() == whole(words, said)


def test_many_texts_keep_their_order_in_batches(vocabularies):
  words = vocabularies['lines']
  texts = [drawn(size, size) for size in (3, 0, 50, 7, 400, 11, 2)]
  actual = long_texts.encode(words.tokenizer, texts, part=500, overlap=32)
  assert [ids.tolist() for ids in actual] == [whole(words, t) for t in texts]
  assert long_texts.encode(words.tokenizer, []) == []


def test_documents_begin_with_what_the_tokenizer_begins_texts_with(
  vocabularies, tmp_path
):
  words = vocabularies['bos']
  assert words.bos is not None and vocabularies['spaces'].bos is None
  (tmp_path / 'a.jsonl').write_text(
    '{"text": "the cat"}\n{"text": "on the mat"}\n'
  )
  data = config_lib.default().data
  data.source, data.path = 'text', str(tmp_path)
  actual, _ = documents.read_documents(data.path)
  assert len(actual) == 2
  made = text_dataset.read_chunks(data, CausalCollator(words, 997), data.path)
  said = words.show(made.ids.tolist())
  assert said.count('<s>') == said.count('</s>') == 2
  assert made.ids[0] == words.bos and made.ids[-1] == words.eos
  packed = text_dataset.read_chunks(
    data, CausalCollator(words, 997, packed=True), data.path
  )
  assert [ids[0] for ids in packed] == [words.bos] * 2
  # An encoder's texts begin with nothing.
  data.pretraining_objective = 'prefix'
  pairs = text_dataset.read_chunks(
    data, Seq2SeqCollator(words, 97, 97), data.path
  )
  assert words.bos not in pairs.ids

# SPDX-License-Identifier: Apache-2.0
"""SentencePiece's tokenizers in GGUF files against the library itself."""

import io
import random

import gguf
import pytest

from moepeft.checkpoints.gguf import sentencepiece as gguf_sentencepiece
from moepeft.checkpoints.gguf import tokenizer as gguf_tokenizer
from moepeft.checkpoints.gguf.sentencepiece import (
  CONTROL,
  NORMAL,
  UNKNOWN,
  UNUSED,
  USER_DEFINED,
)
from moepeft.checkpoints.hf import model as hf
from moepeft.data.tokenizers.tokenizer import HuggingFaceTokenizer
from moepeft.models.weight_mapping import CheckpointError

from ..gguf_files import CONFIGS, random_params
from .test_tokenizer import TEMPLATE, TEXT, TRICKY

sentencepiece = pytest.importorskip('sentencepiece')

TURN = '<turn>'
EDGES = ('', ' ', '  two', 'a ', '\n\n x\t', '∑ of bytes 🙂', 'x' * 50)


def trained(kind='bpe', **options):
  """A model of 400 pieces: bytes, a mark of turns, and what words share."""
  file = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([TEXT, *TRICKY] * 5),
    model_writer=file,
    model_type=kind,
    vocab_size=400,
    # A unigram model may find fewer.
    hard_vocab_limit=kind == 'bpe',
    byte_fallback=True,
    normalization_rule_name='identity',
    remove_extra_whitespaces=False,
    user_defined_symbols=[TURN],
    minloglevel=2,
    **options,
  )
  return sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())


def types(model):
  asked = {
    UNKNOWN: model.IsUnknown,
    CONTROL: model.IsControl,
    UNUSED: model.IsUnused,
    gguf_sentencepiece.BYTE: model.IsByte,
    USER_DEFINED: lambda i: model.IdToPiece(i) == TURN,
    NORMAL: lambda i: True,
  }
  return [
    next(kind for kind, holds in asked.items() if holds(i))
    for i in range(model.vocab_size())
  ]


def write(path, model, more=lambda writer: None, scores=None):
  """A GGUF file as llama.cpp's converter writes it, without tensors."""
  size = model.vocab_size()
  writer = gguf.GGUFWriter(path, 'llama')
  writer.add_tokenizer_model('llama')
  writer.add_tokenizer_pre('default')
  writer.add_token_list([model.IdToPiece(i) for i in range(size)])
  writer.add_token_scores(scores or [model.GetScore(i) for i in range(size)])
  writer.add_token_types(types(model))
  writer.add_bos_token_id(model.bos_id())
  writer.add_eos_token_id(model.eos_id())
  writer.add_unk_token_id(model.unk_id())
  writer.add_chat_template(TEMPLATE)
  more(writer)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def texts():
  """Edges, and cuts of a text anywhere: also within its words."""
  rng = random.Random(0)
  whole = ' '.join((TEXT, *TRICKY))
  starts = (rng.randrange(len(whole)) for _ in range(300))
  return *EDGES, *(whole[at : at + rng.randrange(40)] for at in starts)


@pytest.mark.parametrize('prefix', [True, False])
def test_texts_are_cut_as_sentencepiece_cuts_them(prefix, tmp_path):
  model = trained(add_dummy_prefix=prefix)
  path = str(tmp_path / 'model.gguf')
  write(path, model, lambda writer: writer.add_add_space_prefix(prefix))
  actual = HuggingFaceTokenizer(path)
  assert (actual.size, actual.bos, actual.eos) == (400, 1, 2)
  for text in texts():
    ids = model.encode(text)
    assert actual.encode(text) == ids, text
    assert actual.decode(ids) == model.decode(ids), text
  # The mark of turns is one token, wherever it stands.
  assert actual.encode(f'a{TURN}b').count(model.PieceToId(TURN)) == 1


def test_texts_begin_as_the_file_says(tmp_path):
  path = str(tmp_path / 'model.gguf')
  write(path, trained())
  assert gguf_tokenizer.read(path)('old')['input_ids'][0] == 1
  write(path, trained(), lambda writer: writer.add_add_bos_token(False))
  assert HuggingFaceTokenizer(path).bos is None


@pytest.mark.parametrize('prefix', [True, False])
def test_directories_hold_what_sentencepiece_reads(prefix, tmp_path):
  from transformers import AutoTokenizer

  model = trained(add_dummy_prefix=prefix)
  path = str(tmp_path / 'model.gguf')
  write(path, model, lambda writer: writer.add_add_space_prefix(prefix))
  params = random_params(CONFIGS['llama'])
  hf.save(tmp_path / 'out', CONFIGS['llama'], params, tokenizer=path)
  file = tmp_path / 'out' / 'tokenizer.model'
  written = sentencepiece.SentencePieceProcessor(model_file=str(file))
  again = AutoTokenizer.from_pretrained(tmp_path / 'out')
  assert again.chat_template == TEMPLATE
  for text in texts():
    ids = model.encode(text)
    assert written.encode(text) == ids, text
    assert again(text)['input_ids'] == [1, *ids], text
  assert [written.GetScore(i) for i in range(400)] == [
    model.GetScore(i) for i in range(400)
  ]
  assert types(written) == types(model)
  ids = written.unk_id(), written.bos_id(), written.eos_id(), written.pad_id()
  assert ids == (0, 1, 2, -1)


def test_scores_that_are_no_ranks_are_refused(tmp_path):
  path = str(tmp_path / 'model.gguf')
  # A unigram model's are logarithms; some converters write one for all.
  write(path, trained('unigram'))
  with pytest.raises(CheckpointError, match='not ranks of merges') as error:
    gguf_tokenizer.read(path)
  assert '\n' not in str(error.value)
  write(path, trained(), scores=[-1000.0] * 400)
  with pytest.raises(CheckpointError, match='not ranks of merges'):
    gguf_tokenizer.read(path)


def test_another_number_of_scores_is_refused(tmp_path):
  path = str(tmp_path / 'model.gguf')
  write(path, trained(), scores=[0.0] * 399)
  with pytest.raises(CheckpointError, match='has 400 pieces.* 399 scores'):
    gguf_tokenizer.read(path)

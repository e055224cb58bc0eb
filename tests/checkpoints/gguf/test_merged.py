# SPDX-License-Identifier: Apache-2.0
"""A base in a GGUF file, with an adapter or without: one directory that
transformers reads, text and all."""

import dataclasses
import functools
import json
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from moepeft import convert
from moepeft.checkpoints import adapter as adapter_lib
from moepeft.checkpoints.adapter import AdapterWeights
from moepeft.checkpoints.gguf import model as gguf_lib
from moepeft.data.tokenizers.tokenizer import HuggingFaceTokenizer
from moepeft.models.decoder.model import Decoder, sites
from moepeft.peft import build

from .. import gguf_files
from ..cases import adapter_tree
from . import test_sentencepiece as test_pieces
from . import test_tokenizer as test_gguf_tokenizer
from .test_tokenizer import TEMPLATE, TEXT, TRICKY

pytest.importorskip('sentencepiece')

AT = ['decoder/self/q', 'decoder/mlp/wo']
ADAPTER = f"lora(rank=7, alpha=3, targets='{'|'.join(AT)}')"


def pieces(writer):
  """400 pieces of SentencePiece's."""
  model = test_pieces.trained()
  size = model.vocab_size()
  writer.add_tokenizer_model('llama')
  writer.add_token_list([model.IdToPiece(i) for i in range(size)])
  writer.add_token_scores([model.GetScore(i) for i in range(size)])
  writer.add_token_types(test_pieces.types(model))
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  writer.add_unk_token_id(0)
  writer.add_chat_template(TEMPLATE)


def merges(split, writer):
  """330 pieces of bytes."""
  made = json.loads(test_gguf_tokenizer.trained(split).to_str())['model']
  tokens = sorted(made['vocab'], key=made['vocab'].get)
  special = test_gguf_tokenizer.SPECIAL
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre(split)
  writer.add_token_list(tokens)
  writer.add_token_types([3 if token in special else 1 for token in tokens])
  writer.add_token_merges([' '.join(pair) for pair in made['merges']])
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  writer.add_add_bos_token(False)
  writer.add_chat_template(TEMPLATE)


KINDS = {
  'llama-pieces': ('llama', pieces, 400),
  'llama-merges': ('llama', functools.partial(merges, 'smollm'), 330),
  'qwen2-merges': ('qwen2', functools.partial(merges, 'qwen2'), 330),
  'gemma2-pieces': ('gemma2', pieces, 400),
}


@pytest.fixture(params=KINDS)
def base(request, tmp_path, monkeypatch):
  """The path of a model in 8 bits whose vocabulary is its tokenizer's."""
  monkeypatch.chdir(tmp_path)
  arch, more, size = KINDS[request.param]
  config = dataclasses.replace(gguf_files.CONFIGS[arch], vocab=size)
  params = gguf_files.random_params(config)
  gguf_files.write('base.gguf', arch, params, 'Q8_0', config, more=more)
  return 'base.gguf'


def run(*arguments):
  assert convert.main(['convert', *arguments]) == 0


def agrees(base, adapter=None):
  """Whether 'out' has a base's tokens, template and (adapted) logits."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  words, reference = HuggingFaceTokenizer(base), transformers.AutoTokenizer
  reference = reference.from_pretrained('out')
  for text in (*TRICKY, *test_pieces.texts()[:50]):
    actual = reference(text, add_special_tokens=False)['input_ids']
    assert actual == words.encode(text), text
  assert reference.chat_template == TEMPLATE
  ids = np.array([reference(TEXT)['input_ids'][:23]])
  assert (ids[0, 0] == 1) == (words.bos == 1)
  loaded = gguf_lib.load(base)
  model, variables = Decoder(loaded.config), {'params': loaded.params}
  if adapter is not None:
    built = build(adapter.method, sites(loaded.config))
    model, variables['peft'] = (
      Decoder(loaded.config, built.adapter_map),
      adapter.tree,
    )
  expected = jax.jit(model.apply)(variables, {'inputs': ids})
  their_model = transformers.AutoModelForCausalLM.from_pretrained(
    'out', dtype=torch.float32, attn_implementation='eager'
  ).eval()
  assert their_model.config.eos_token_id == 2
  with torch.no_grad():
    actual = their_model(torch.tensor(ids)).logits.numpy()
  # Sums of 256 products in another order; a lost adapter gives 1e-1.
  assert np.abs(actual - expected).max() < 2e-5 * np.abs(expected).max()


def test_a_base_becomes_a_directory(base):
  run(f'--input={base}', '--output=out', '--to=hf')
  agrees(base)


def test_a_base_and_its_adapter_become_a_directory(base):
  loaded = gguf_lib.load(base)
  leaves = {'lora/a': '{in}r', 'lora/b': 'r{out}'}
  adapter = AdapterWeights(ADAPTER, adapter_tree(loaded.config, leaves, AT))
  card = adapter_lib.describe(
    ADAPTER, 'official', base, loaded.sha256, 'llama', loaded.config
  )
  adapter_lib.save('adapter', adapter.tree, json.loads(json.dumps(card)))
  run('--input=adapter', '--output=out', '--to=hf')
  agrees(base, adapter)


def test_a_run_keeps_the_tokenizer_that_it_read(base, monkeypatch):
  """A model that began with random weights has no base with a tokenizer."""
  loaded = gguf_lib.load(base)
  run(f'--input={base}', '--output=words', '--to=hf')
  for name in ('config.json', 'model.safetensors'):
    Path('words', name).unlink()
  Path('run').mkdir()
  data = {'data': {'tokenizer': 'words'}}
  Path('run/config.json').write_text(json.dumps(data))
  card = adapter_lib.describe(
    'full', 'official', '', '', 'llama', loaded.config
  )
  card |= {'trainable': 'params', 'step': 7}
  module = types.ModuleType('moepeft.checkpoints.manager')
  module.restore_trained = lambda workdir: (loaded.params, card)
  monkeypatch.setitem(sys.modules, 'moepeft.checkpoints.restore', module)
  monkeypatch.setattr('moepeft.checkpoints.restore', module, raising=False)
  run('--workdir=run', '--output=out')
  agrees(base)


def test_a_tokenizer_that_is_gone_is_said_to_be(capsys):
  values = convert.define_flags()
  values(['convert'])
  assert convert._tokenizer(values, './gone') is None
  assert 'without a tokenizer: ./gone is not a directory' in (
    capsys.readouterr().out
  )
  assert convert._tokenizer(values, '') is None
  assert capsys.readouterr().out == ''


def test_nothing_else_is_made_of_a_file(base, capsys):
  for form in ('peft', 'moepeft', 't5x'):
    code = convert.main(
      ['convert', f'--input={base}', '--output=out', f'--to={form}']
    )
    assert code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
  assert not Path('out').exists()

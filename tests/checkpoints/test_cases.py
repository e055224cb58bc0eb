# SPDX-License-Identifier: Apache-2.0
"""Inputs of public reports about models and adapters; what each gives."""

import importlib
import json
import os

import pytest

from moepeft import convert
from moepeft.checkpoints import adapter as adapter_lib
from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints.gguf import model as gguf_lib
from moepeft.checkpoints.hf import model as hf
from moepeft.core.files import NotAFile
from moepeft.inference import loaded_model, prompts
from moepeft.models import weight_mapping
from tests import ROOT

from . import gguf_files
from .cases import CONFIGS, adapter_tree, random_params

# The package gives its function the module's name.
vocabulary_lib = importlib.import_module('moepeft.data.tokenizers.tokenizer')
SHARED = ROOT.parent / 'shared' / 'cases'
here = pytest.mark.skipif(not SHARED.exists(), reason='the cases are not here')


@pytest.mark.parametrize(
  'pairs, expected',
  [
    ({}, ('default', 1.0)),
    ({'scale_linear': 4.0}, ('linear', 4.0)),
    ({'scale_linear': 1.0}, ('default', 1.0)),
    # llama.cpp: a factor without a type is linear, the newer key counts.
    ({'scaling.factor': 3.0}, ('linear', 3.0)),
    ({'scaling.factor': 3.0, 'scale_linear': 4.0}, ('linear', 3.0)),
    ({'scaling.type': 'linear', 'scale_linear': 4.0}, ('linear', 4.0)),
    ({'scaling.type': 'none', 'scale_linear': 4.0}, ('default', 1.0)),
    ({'scaling.type': 'none', 'scaling.factor': 4.0}, ('default', 1.0)),
  ],
)
def test_a_gguf_files_linear_scaling_is_kept(tmp_path, pairs, expected):
  def more(writer):
    for key, value in pairs.items():
      add = writer.add_string if isinstance(value, str) else writer.add_float32
      add(f'llama.rope.{key}', value)

  path = str(tmp_path / 'm.gguf')
  params = gguf_files.random_params(gguf_files.CONFIGS['llama'])
  gguf_files.write(path, 'llama', params, more=more)
  rope = gguf_lib.load_config(path).rope
  assert (rope.kind, rope.factor) == expected


@here
def test_030_the_old_key_of_llama_cpp_reaches_config_json(tmp_path):
  flags = [f'--input={SHARED}/030/old_key.gguf', '--to=hf']
  assert convert.main(['convert', *flags, f'--output={tmp_path}/o']) == 0
  fields = json.loads((tmp_path / 'o' / 'config.json').read_text())
  assert fields['rope_parameters']['rope_type'] == 'linear'
  assert fields['rope_parameters']['factor'] == 4.0


ODD_METADATA = {
  'block_count': ['x', -1, 2**31, 0.5],
  'attention.head_count': ['x', 0],
  'embedding_length': ['x', 0, 2**40],
  'rope.freq_base': ['x', float('nan')],
  'rope.scaling.type': [3],
  'rope.scaling.factor': ['x', -1.0],
}


@pytest.mark.parametrize('key', ODD_METADATA)
def test_odd_metadata_of_a_gguf_file_are_one_sentence(
  tmp_path, key, monkeypatch
):
  path = str(tmp_path / 'm.gguf')
  params = gguf_files.random_params(gguf_files.CONFIGS['llama'])
  gguf_files.write(path, 'llama', params)
  file = gguf_lib.open_file(path)
  for value in ODD_METADATA[key]:
    file.metadata = dict(file.metadata) | {f'llama.{key}': value}
    with pytest.raises(weight_mapping.CheckpointError) as error:
      file.config()
    assert '\n' not in str(error.value)
  gguf_lib._open_cached.cache_clear()


@here
def test_011_a_config_with_a_byte_order_mark_is_read():
  assert hf.load_config(str(SHARED / '011' / 'model_bom')).vocab > 0


def test_a_token_beyond_the_embedding_is_refused():
  prompts.check_ids([0, 261], 262)
  for bad in (262, -1):
    with pytest.raises(ValueError, match=f'token {bad}, the model has .* 261'):
      prompts.check_ids([5, bad], 262)


@here
def test_018_generate_refuses_a_token_beyond_the_embedding():
  run = loaded_model.load_model(str(SHARED / '018' / 'model'))
  ids = prompts.encode_text(run.tokenizer, 'a<|extra_3|>', decoder_only=True)
  assert max(ids) >= run.model.config.vocab
  with pytest.raises(ValueError, match='more tokens than its embedding'):
    prompts.check_ids(ids, run.model.config.vocab)


def test_prompt_encoder_checks_the_ids_of_every_prompt(monkeypatch):
  loaded = loaded_model.load_model('package:t5_tiny')
  monkeypatch.setattr(prompts, 'encode_text', lambda *arguments: [3, 999])
  with pytest.raises(ValueError, match='the token 999, the model has tokens 0'):
    loaded.prompt_encoder()(['x'])


def test_a_missing_sentencepiece_is_named_with_its_command(
  tmp_path, monkeypatch
):
  (tmp_path / 'spiece.model').write_bytes(b'x')
  monkeypatch.setattr(vocabulary_lib, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match='pip install sentencepiece'):
    vocabulary_lib.load_tokenizer('', str(tmp_path))


@pytest.mark.parametrize(
  'name, text',
  [
    ('tokenizer.json', '[1]'),
    ('tokenizer.json', '{"version": 3, "model": {"type": "BPE"}}'),
    ('tokenizer.json', '[' * 3000),
    ('tokenizer_config.json', '[1]'),
    ('tokenizer_config.json', '{"tokenizer_class": 3}'),
    ('tokenizer_config.json', '{"tokenizer_class": "PreTrainedTokenizerFast"}'),
    ('tokenizer_config.json', '[' * 3000),
    ('tokenizer_config.json', '{"auto_map": {"AutoTokenizer": ["a.B", null]}}'),
  ],
)
def test_a_damaged_tokenizer_is_one_sentence(tmp_path, name, text):
  (tmp_path / name).write_text(text)
  (tmp_path / 'config.json').write_text('{"model_type": "llama"}')
  with pytest.raises(ValueError, match='no tokenizer could be read') as error:
    vocabulary_lib.load_tokenizer('', str(tmp_path))
  assert '\n' not in str(error.value)


def test_a_pipe_beside_a_tokenizer_is_refused_at_once(tmp_path):
  os.mkfifo(tmp_path / 'tokenizer.json')
  with pytest.raises((ValueError, NotAFile), match='named pipe'):
    vocabulary_lib.load_tokenizer('', str(tmp_path))


@pytest.mark.parametrize(
  'text', ['[1]', '{"eos_token_id": "x"}', '{"eos_token_id": [1, null, "x"]}']
)
def test_odd_ends_in_generation_config_are_refused(tmp_path, text):
  (tmp_path / 'generation_config.json').write_text(text)
  with pytest.raises(ValueError, match='generation_config.json'):
    prompts.eos_token_ids(vocabulary_lib.ByteTokenizer(), str(tmp_path))


def test_refusing_to_merge_a_mixture_advises_a_form_that_works(
  tmp_path, capsys
):
  config = CONFIGS['gated-untied']
  hf.save(tmp_path / 'm', config, random_params(config))
  sha256 = hf.load(str(tmp_path / 'm')).sha256
  leaves = {
    'molora/a': '{in}er',
    'molora/b': 'er{out}',
    'molora/router/kernel': '({in})e',
  }
  site = 'encoder/mlp/wi_1'  # none of the released code's
  tree = adapter_tree(config, leaves, [site])
  method = f"molora(experts=2, rank=7, targets='{site}')"
  path = str(tmp_path / 'm')
  card = adapter_lib.describe(method, 'official', path, sha256, 't5', config)
  adapter_lib.save(tmp_path / 'a', tree, card)
  run = lambda to, out: convert.main(  # noqa: E731
    ['convert', f'--input={tmp_path}/a', f'--output={tmp_path}/{out}', to]
  )
  assert run('--to=hf', 'b') == 2
  error = capsys.readouterr().err
  assert '--to=moepeft keeps the adapter' in error
  assert '--to=peft' not in error and '--to=t5x' not in error
  assert run('--to=moepeft', 'c') == 0


def card_of(tmp_path):
  config = CONFIGS['gated-untied']
  leaves = {'lora/a': '{in}r', 'lora/b': 'r{out}'}
  tree = adapter_tree(config, leaves, ['encoder/self/q'])
  method = "lora(rank=7, targets='encoder/self/q')"
  card = adapter_lib.describe(method, 'official', 'x', 'y', 't5', config)
  adapter_lib.save(tmp_path / 'a', tree, card)
  return json.loads((tmp_path / 'a' / adapter_lib.METADATA_FILE).read_text())


@pytest.mark.parametrize('value', [None, 3, 'x', [1], {}, {'a': 1}, 2**70])
def test_no_type_in_our_card_is_a_traceback(tmp_path, value):
  whole = card_of(tmp_path)
  paths = [(name,) for name in whole]
  paths += [
    (name, sub) for name in ('base', 'model', 'arrays') for sub in whole[name]
  ]
  paths.append(('model', 'config', 'vocab'))
  for path in paths:
    card = json.loads(json.dumps(whole))
    node = card
    for key in path[:-1]:
      node = node[key]
    node[path[-1]] = value
    # As a program would that wrote it wrongly: with a hash that is right.
    card['card_sha256'] = adapter_lib._metadata_hash(card)
    if path == ('card_sha256',):
      card['card_sha256'] = value
    (tmp_path / 'a' / adapter_lib.METADATA_FILE).write_text(json.dumps(card))
    try:
      base_lib.load_adapter(str(tmp_path / 'a'), CONFIGS['gated-untied'])
      adapter_lib.config_of(adapter_lib.load(str(tmp_path / 'a'))[1])
    except (ValueError, OSError) as error:
      assert str(error)


@pytest.mark.parametrize('value', ['x', -1, [1], 1e9, True])
def test_odd_ids_of_a_gguf_file_are_refused(value):
  from moepeft.checkpoints.gguf import tokenizer as gguf_tokenizer

  said = {'tokenizer.ggml.bos_token_id': value}
  with pytest.raises(
    weight_mapping.CheckpointError, match='bos_token_id, expected the id'
  ):
    gguf_tokenizer.special_ids(said)


@pytest.mark.parametrize(
  'tokens', [3, [3], [{}], [{'content': 3, 'id': 1}], [{'content': 'a'}]]
)
def test_odd_added_tokens_are_refused_where_a_model_is_written(
  tmp_path, tokens
):
  from moepeft.checkpoints.hf import tokenizer_files

  (tmp_path / 'tokenizer.json').write_text(json.dumps({'added_tokens': tokens}))
  (tmp_path / 'tokenizer_config.json').write_text('{"bos_token": "a"}')
  with pytest.raises(weight_mapping.CheckpointError, match='added_tokens'):
    tokenizer_files.special_ids(str(tmp_path))

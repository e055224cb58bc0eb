# SPDX-License-Identifier: Apache-2.0
"""A base and an adapter are opened as the adapter was trained."""

import dataclasses
import json
import os

import jax
import numpy as np
import pytest

from moepeft import config as config_lib
from moepeft.checkpoints import adapter
from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints.hf import model as hf
from moepeft.data.chat import dataset as chat_dataset
from moepeft.data.chat import template as chat_template
from moepeft.data.chat.formats import Conversation, Turn
from moepeft.data.tokenizers.tokenizer import (
  ByteTokenizer,
  HuggingFaceTokenizer,
)
from moepeft.evaluation import evaluator
from moepeft.inference import loaded_model
from moepeft.models import weight_mapping as names
from moepeft.models.decoder.model import Decoder, DecoderConfig, sites
from moepeft.nn.initializers import init_params
from moepeft.objectives import reference_model
from moepeft.peft import build

from .. import chat_cases

CONFIG = DecoderConfig(
  vocab=263, d_model=11, heads=3, kv_heads=1, head_dim=6, ffn=17, layers=1
)


@pytest.fixture
def place(tmp_path, monkeypatch):
  """A work place with a base in it."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(
    loaded_model, 'load_tokenizer', lambda *names: ByteTokenizer()
  )
  params = init_params(Decoder(CONFIG), base_lib.example_batch(), 0)['params']
  hf.save('base', CONFIG, params)
  return jax.tree.map(np.asarray, params)


def saved(params, semantics='official', quantise=''):
  """The tree of an adapter that is now in 'adapter', and its method."""
  built = build('lora(rank=2)', sites(CONFIG), semantics)
  model = Decoder(CONFIG, built.adapter_map)
  tree = init_params(model, base_lib.example_batch(), 0, params)['peft']
  sha256 = names.content_hash(params)
  card = adapter.describe(
    built.method, semantics, 'base', sha256, 'llama', CONFIG, quantise
  )
  adapter.save('adapter', tree, card, overwrite=True)
  return tree, built


def config(**model):
  c = config_lib.default()
  c.model.path = 'base'
  c.model.update(model)
  return c


def test_an_adapter_brings_its_semantics(place):
  tree, built = saved(place, 'paper')
  # The official ones leave a projection out.
  assert built.adapter_map != build('lora(rank=2)', sites(CONFIG)).adapter_map
  run = loaded_model.load_model('base', 'adapter')
  assert run.config.semantics == 'paper'
  jax.tree.map(np.testing.assert_array_equal, run.variables['peft'], tree)
  c = config()
  c.method = 'lora(rank=2)'
  base = base_lib.load(c.model)
  model, own = base_lib.module(base, c)
  # A reference of other semantics than the policy's.
  _, actual = reference_model.make_reference('adapter', model, own, base)
  jax.tree.map(np.testing.assert_array_equal, actual, tree)
  with pytest.raises(ValueError, match="and config.semantics to 'paper'"):
    base_lib.with_adapter({'peft': tree}, own, 'adapter', base)


def test_an_adapter_brings_what_its_base_was_kept_in(place):
  _, built = saved(place, quantise='nf4')
  remaining = loaded_model.load_model('base', 'adapter').variables['params']
  base = base_lib.load(config(quantize='nf4').model)
  jax.tree.map(np.testing.assert_array_equal, remaining, base.params)
  for other in ('', 'int8'):
    base = base_lib.load(config(quantize=other).model)
    with pytest.raises(ValueError, match="quantize='nf4', this base has"):
      base_lib.with_adapter({}, built, 'adapter', base)
  saved(place)
  with pytest.raises(ValueError, match="quantize='', this base has 'int8'"):
    base_lib.with_adapter({}, built, 'adapter', base)


def test_ends_of_a_hub_name_are_found_and_are_an_evaluations(
  place, monkeypatch
):
  import huggingface_hub

  actual = os.path.abspath('base')
  fetched = lambda name, **how: actual  # noqa: E731
  monkeypatch.setattr(huggingface_hub, 'snapshot_download', fetched)
  for name, ids in (('generation_config', [5, 7]), ('config', 9)):
    path = f'base/{name}.json'
    said = json.load(open(path)) if os.path.exists(path) else {}
    with open(path, 'w') as f:
      json.dump(said | {'eos_token_id': ids}, f)
  run = loaded_model.load_model('some/name')
  assert run.eos_token_ids == (1, 5, 7, 9)
  # Of another vocabulary they would be other tokens.
  other = run.config.copy_and_resolve_references()
  other.data.tokenizer = 'bytes'
  assert dataclasses.replace(run, config=other).eos_token_ids == (1,)
  calls = []
  generator = lambda *rest: calls.append(rest[-1])  # noqa: E731
  monkeypatch.setattr(evaluator, 'BatchGenerator', generator)
  made = evaluator.Evaluator(
    run.model, run.tokenizer, (8, 8), 1, eos_token_ids=run.eos_token_ids
  )
  made._generator  # noqa: B018
  assert calls == [run.eos_token_ids]


def test_a_run_opens_with_the_template_of_its_config(place, monkeypatch):
  chat_cases.tokenizer(template='none of it').save_pretrained('words')
  words = HuggingFaceTokenizer('words')
  monkeypatch.setattr(loaded_model, 'load_tokenizer', lambda *names: words)
  with open('own.jinja', 'w') as f:
    f.write(chat_cases.CHATML)
  c = config()
  c.data.source, c.data.path = 'chat', 'chats.jsonl'
  c.data.chat_template, c.data.system_prompt = (
    'own.jinja',
    'Say "\u00fc"\n\U0001f600',
  )
  os.mkdir('run')
  with open('run/config.json', 'w') as f:
    f.write(c.to_json())
  run = loaded_model.load_run('run', 'base')
  turns = (Turn('user', 'a'),)
  expected = chat_dataset.ChatTemplate(
    words.tokenizer, chat_cases.CHATML
  ).encode_prompt(Conversation((Turn('system', c.data.system_prompt), *turns)))
  assert chat_dataset.ChatTemplate(run.tokenizer.tokenizer).encode_prompt(
    Conversation(turns)
  ) == (expected)
  # What has a system's turn keeps it.
  given = Conversation((Turn('system', 'b'), *turns))
  plain = chat_dataset.ChatTemplate(
    words.tokenizer, chat_cases.CHATML
  ).encode_prompt(given)
  assert (
    chat_dataset.ChatTemplate(run.tokenizer.tokenizer).encode_prompt(given)
    == plain
  )
  os.remove('own.jinja')
  with pytest.raises(ValueError, match='own.jinja.* cannot be read'):
    loaded_model.load_run('run', 'base')


def test_a_template_begins_as_before_behind_a_systems_turn():
  tokenizer = chat_cases.tokenizer()
  for text in ('\nbegin', '  {% if true %}x{% endif %}', ' y'):
    tokenizer.chat_template = text
    turns = [{'role': 'user', 'content': 'a'}]
    plain = tokenizer.apply_chat_template(turns, tokenize=False)
    tokenizer.chat_template = chat_template.with_system(text, 'b')
    assert tokenizer.apply_chat_template(turns, tokenize=False) == plain

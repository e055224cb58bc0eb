# SPDX-License-Identifier: Apache-2.0
"""From paths to answers: trained adapters of many kinds in one batch."""

import jax
import numpy as np
import pytest

from moepeft.checkpoints import adapter
from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints.hf import model as hf
from moepeft.data.tokenizers.tokenizer import ByteTokenizer
from moepeft.inference.api import LENGTH, UnknownAdapter
from moepeft.inference.engine.limits import EngineConfig
from moepeft.models import weight_mapping
from moepeft.models.decoder.model import Decoder, DecoderConfig, sites
from moepeft.nn.initializers import init_params
from moepeft.peft import build

from ..inference.engines import ask, logprobs, moved, paused, prompt

# Adapters' banks are another change's.
opening = pytest.importorskip('moepeft.serve.open_engine')

CONFIG = DecoderConfig(
  vocab=263,
  d_model=11,
  heads=3,
  kv_heads=1,
  head_dim=6,
  ffn=17,
  layers=2,
  length=40,
)
METHODS = {
  'lora': "lora(rank=3, alpha=5.0, targets='*/q|*/wo')",
  'molora': "molora(experts=3, rank=2, router=topk(k=2), targets='*/q|*/wo')",
  'ia3': 'ia3',
  'late': "lora(rank=2, targets='*/q|*/wo')",
}
# Ranks are padded and scales multiplied in before: float32's last digits.
CLOSE = 2e-5


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """(folder, params, {name: (model, 'peft')}) of a base and its adapters."""
  folder = tmp_path_factory.mktemp('served')
  params = init_params(Decoder(CONFIG), base_lib.example_batch(), 0)['params']
  params = jax.tree.map(np.asarray, moved(params, 5))
  hf.save(str(folder / 'base'), CONFIG, params)
  models = {'': (Decoder(CONFIG), {})}
  for seed, (name, method) in enumerate(METHODS.items()):
    built = build(method, sites(CONFIG))
    model = Decoder(CONFIG, built.adapter_map)
    clean = init_params(model, base_lib.example_batch(), 0, params)['peft']
    tree = jax.tree.map(np.asarray, moved(clean, seed))
    card = adapter.describe(
      built.method,
      'official',
      'base',
      weight_mapping.content_hash(params),
      'llama',
      CONFIG,
      '',
    )
    adapter.save(str(folder / name), tree, card)
    models[name] = model, tree
  return folder, params, models


@pytest.fixture(scope='module')
def engine(place):
  folder, _, _ = place
  settings = EngineConfig(
    slots=5,
    max_model_len=40,
    chunk=8,
    min_chunk=8,
    cache_lens=(40,),
    batch_sizes=(5,),
    routing=True,
  )
  paths = {
    name: str(folder / name) for name in METHODS if name != 'late'
  }  # fmt: skip
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(opening, 'load_tokenizer', lambda *args: ByteTokenizer())
    opened = opening.open_engine(str(folder / 'base'), paths, (), settings)
  assert opened.tokenizer.eos in opened.eos_token_ids
  opened.engine.start()
  yield opened.engine
  assert opened.engine.drain(60)
  opened.engine.stop()


def check(place, ids, name, answer):
  _, params, models = place
  model, tree = models[name]
  variables = {'params': params, 'peft': tree}
  rows = logprobs((*ids, *answer.tokens), model, variables, 40)
  for row, token in zip(rows[len(ids) - 1 :], answer.scored, strict=False):
    assert abs(token.logprob - row[token.id]) < CLOSE
    # The best, but for two that are equal nearly.
    assert row.max() - row[token.id] < CLOSE


@pytest.mark.slow
def test_a_mixed_batch_says_what_each_adapters_own_model_says(engine, place):
  with paused(engine):
    # At once, with the base's: five slots.
    requests = [
      (name, ids, ask(engine, ids, 6, adapter=name, logprobs=1, routing=True))
      for name in ('', 'lora', 'molora', 'ia3', '')
      for ids in [prompt(len(name), 11)]
    ]
  for name, ids, answer in requests:
    check(place, ids, name, answer)
    routing = answer.scored[0].experts
    assert (routing is not None) == (name == 'molora')
  experts = requests[2][2].scored[0].experts
  assert 'decoder/self/q' in experts
  for weights in experts.values():
    # Of three experts two, and not made to sum to one.
    assert len(weights) == 3 and 0 < sum(weights) <= 1 + 1e-6


def test_adapters_come_and_go_without_a_compilation(engine, place):
  folder, _, _ = place
  compiled, events = engine.stats().compiled, []
  listen = lambda event, *args, **kwargs: events.append(event)  # noqa: E731
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    ids = prompt(3, 9)
    busy = ask(engine, ids, 25, adapter='lora', logprobs=1)
    loaded = engine.load('late', str(folder / 'late'))
    answer = ask(engine, ids, 5, adapter='late', logprobs=1).wait()
    assert loaded in engine.adapters() and answer.end.cached == 0
    engine.unload('late')
    assert busy.end.reason == LENGTH
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  check(place, ids, 'late', answer)
  check(place, ids, 'lora', busy)
  assert engine.stats().compiled == compiled
  assert not [event for event in events if 'backend_compile' in event]
  with pytest.raises(UnknownAdapter):
    ask(engine, ids, adapter='late')


def test_what_cannot_be_loaded_changes_nothing(engine, place):
  folder, _, _ = place
  before = engine.adapters()
  with pytest.raises(ValueError):
    engine.load('lora', str(folder / 'nothing'))
  assert engine.adapters() == before

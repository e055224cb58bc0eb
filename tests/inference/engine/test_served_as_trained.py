# SPDX-License-Identifier: Apache-2.0
"""What is served is what was trained: log-probabilities of every kind of
adapter, all in one batch, by the trainer's whole call and by the engine's
cached steps."""

import jax
import numpy as np
import pytest

from moepeft.data.batching.router_inputs import embedding_size
from moepeft.inference.adapters.pool import AdapterPool
from moepeft.inference.adapters.served_modules import (
  experts_per_layer,
  request_tasks,
)
from moepeft.inference.engine.limits import EngineConfig
from moepeft.models import weight_mapping
from moepeft.models.t5 import model as t5
from moepeft.nn.adapter_hook import AdapterMap
from moepeft.peft.mixture import layer_counts

from ...contracts import small, small_decoders
from .. import banked
from ..engines import ask, paused, prompt, running

# Ranks padded, scales multiplied in before, sums in another order: float32's
# last digits, of log-probabilities up to 10 or so.
CLOSE = 1e-5
PLACES = 16
SIZES = (7, 3, 11, 5)
FEW = ('dora', 'ia3', 'large', 'mov', 'mixlora', 'shared', 'two')
LLAMA, QWEN2 = (small_decoders.CONFIGS[name] for name in ('llama', 'qwen2'))
ALL = tuple(banked.ADAPTERS)
# Only a decoder alone has a first pass.
ENCODED = tuple(name for name in ALL if name != 'xlora')
# Inputs beside the tokens, beside adapters that read none of them.
READS = (
  *('smear', 'moelora', 'xlora', 'ia3'),
  *('hmora', 'shares', 'moa', 'embedded'),
)
# Base, adapters, and whether all layers are one program.
CONFIGS = {
  # Low ranks, scales and routing; test_bank_rows.py has DoRA and two LoRA.
  'decoder, few': (QWEN2, ('ia3', 'molora', 'mov'), False),
  'decoder': (QWEN2, FEW, False),
  't5': (small.GATED, FEW, False),
  'decoder, scanned': (LLAMA, ('molora', 'large'), True),
  't5, scanned': (small.GATED, ('mov', 'large'), True),
  'decoder, all': (LLAMA, ALL, False),
  't5, all': (small.RELU, ENCODED, False),
  'decoder, inputs': (LLAMA, READS, False),
  'decoder, inputs, scanned': (LLAMA, READS, True),
}
# The others are tried by the slow suite.
QUICK = ('decoder, few',)


def test_every_method_is_tried():
  tried = {method.partition('(')[0] for method in banked.ADAPTERS.values()}
  # Soft prompts are tried in test_engine_prompt.
  assert tried | {'prompt'} == banked.pooled_methods()


@pytest.fixture(
  scope='module',
  params=[
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in CONFIGS
  ],
)
def served(request, tmp_path_factory):
  """(base, {name: (path, built, tree)}, engine)."""
  config, names, scan = CONFIGS[request.param]
  place, base = tmp_path_factory.mktemp('served'), banked.base_of(config)
  made = {
    name: banked.save(place / name, base, banked.ADAPTERS[name], seed)
    for seed, name in enumerate(names)
  }
  paths = {name: path for name, (path, _, _) in made.items()}
  banks = AdapterPool(base, paths, slots=len(names) + 1)
  slots = len(names) + 1
  settings = EngineConfig(
    slots=slots,
    max_model_len=PLACES,
    chunk=PLACES,
    min_chunk=PLACES,
    cache_lens=(PLACES,),
    batch_sizes=(1, slots),
    routing=True,
    scan=scan,
  )
  model = banked.model_of(base, banks.adapter_map)
  with running(model, base.params, banks, settings) as engine:
    yield base, made, engine


def fields_of(made, name):
  """The second of the tasks that an adapter routes by, and an embedding."""
  adapter_map = made[name][1].adapter_map if name else AdapterMap()
  tasks = request_tasks(adapter_map)
  embedding = tuple(0.5 + i for i in range(embedding_size(adapter_map)))
  return {'task': tasks[1] if tasks else '', 'embedding': embedding}


def rows_of(base, made, name, ids, answer):
  """log-probabilities [t, v] of an answer's tokens, as training has them."""
  if isinstance(base.config, t5.T5Config):
    inputs, before = np.zeros((2, 1, PLACES), np.int32)
    inputs[0, : len(ids)], before[0, 1 : len(answer)] = ids, answer[:-1]
    mask = np.arange(PLACES)[None] < len(ids)
    batch = {'inputs': inputs, 'inputs_mask': mask, 'decoder_inputs': before}
    first = 0
  else:
    text = (*ids, *answer[:-1])
    inputs = np.zeros((1, PLACES), np.int32)
    inputs[0, : len(text)] = text
    # What stands behind the text is seen by nobody.
    batch = {'inputs': inputs}
    first = len(ids) - 1
  batch['targets_mask'] = np.arange(PLACES)[None] >= first
  task, embedding = fields_of(made, name).values()
  if task:
    tasks = np.full((1, PLACES), 2)
    batch |= dict.fromkeys(('inputs_tasks', 'targets_tasks'), tasks)
  if embedding:
    batch['embeddings'] = np.array(embedding, np.float32)[None, None]
  if name:
    _, built, tree = made[name]
    logits = banked.alone(base, built, tree, batch)
  else:
    model = banked.model_of(base, AdapterMap())
    logits = jax.jit(model.apply)({'params': base.params}, batch)
  rows = np.asarray(jax.nn.log_softmax(logits[0]))
  return rows[first : first + len(answer)]


def test_the_servers_log_probabilities_are_the_trainers(served):
  base, made, engine = served
  names = ['', *made]
  asked = [(name, prompt(i, SIZES[i % 4])) for i, name in enumerate(names)]
  with paused(engine):
    mixed = [
      ask(
        engine,
        ids,
        5,
        adapter=name,
        logprobs=3,
        routing=True,
        **fields_of(made, name),
      )
      for name, ids in asked
    ]
  for (name, ids), answer in zip(asked, mixed, strict=True):
    rows = rows_of(base, made, name, ids, answer.tokens)
    close = CLOSE * np.abs(rows).max()
    for row, token in zip(rows, answer.scored, strict=True):
      assert abs(token.logprob - row[token.id]) < close, name
      for id, logprob in token.top:
        assert abs(logprob - row[id]) < close, name
      assert row.max() - row[token.id] < close, name


def test_a_request_in_a_mixed_batch_is_as_alone(served):
  _, made, engine = served
  asked = [
    (name, prompt(40 + i, SIZES[i % 4])) for i, name in enumerate(['', *made])
  ]

  def ask_row(name, ids):
    fields = fields_of(made, name)
    return ask(engine, ids, 5, adapter=name, logprobs=5, **fields)

  alone = [ask_row(name, ids).wait() for name, ids in asked]
  with paused(engine):
    mixed = [ask_row(name, ids) for name, ids in asked]
  for one, other in zip(alone, mixed, strict=True):
    assert one.tokens == other.tokens
    for a, b in zip(one.scored, other.scored, strict=True):
      expected, actual = dict(a.top), dict(b.top)
      # The fifth may be another where two are equal nearly.
      both = set(expected) & set(actual)
      assert len(both) >= 4
      for id in both:
        assert abs(expected[id] - actual[id]) < CLOSE * max(
          1, abs(expected[id])
        )


def test_experts_are_told_of_the_sites_where_the_adapter_routes(served):
  base, made, engine = served
  for name, (_, built, tree) in made.items():
    arrays = {
      path.replace('/layers/', '/') for path in weight_mapping.flatten(tree)
    }
    # Sites that share a router tell of it once, at the first of them.
    routes = {
      path
      for path, module in built.adapter_map.entries
      if hasattr(module, 'router')
      and not (
        getattr(module, 'shares_routing', False)
        and f'{path}/{module.name}/router/kernel' not in arrays
      )
    }
    if isinstance(base.config, t5.T5Config):
      # Answers' tokens meet neither the encoder nor the keys of its states.
      routes -= {'decoder/cross/k', 'decoder/cross/v'}
      routes = {path for path in routes if path.startswith('decoder/')}
    fields = fields_of(made, name)
    answer = ask(engine, prompt(3, 5), 2, adapter=name, routing=True, **fields)
    for token in answer.scored:
      assert set(token.experts or ()) == routes, name
      for path, counts in experts_per_layer(built.adapter_map).items():
        weights = token.layer_experts[path]
        counts = layer_counts(counts, len(weights))
        assert tuple(np.isfinite(weights).sum(axis=1)) == counts

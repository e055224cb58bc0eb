# SPDX-License-Identifier: Apache-2.0
"""Mixtures that are routed by an embedding of each example."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moepeft.core.types import Context
from moepeft.data.batching.collators import Seq2SeqCollator
from moepeft.data.batching.decoder_only import CausalCollator
from moepeft.data.batching.router_inputs import RouterInputs
from moepeft.data.readers import jsonl_rows
from moepeft.data.tokenizers.tokenizer import ByteTokenizer
from moepeft.models.t5 import model as t5
from moepeft.objectives.seq2seq import loss_sums
from moepeft.peft import build
from moepeft.tasks import Example
from scripts import embed_rows

from ..contracts import small, small_decoders
from .test_semantics import CLOSE, adapter, call, normal, projection, softmax

SIZE = 4
METHOD = (
  'molora(experts=3, rank=2, alpha=2.0, '
  f"reads='embedding', embedding_size={SIZE}, targets='*/self/k|*/wo')"
)
OF_EMBEDDINGS = RouterInputs(embedding_size=SIZE)


def test_every_token_has_the_routing_of_its_example_s_embedding():
  f, x, y, inside, outside = projection('wo')
  a, b = normal('a', *inside, 3, 2), normal('b', 3, 2, *outside)
  kernel, embeddings = normal('kernel', SIZE, 3), normal('v', 2, 2, SIZE)
  # Row 0 has two examples and padding, row 1 the first of two places.
  segments = np.array([[1, 1, 1, 2, 2, 2, 0], [1] * 7])
  ctx = Context(
    segment_ids=jnp.asarray(segments),
    token_mask=jnp.asarray(segments > 0),
    embeddings=jnp.asarray(embeddings, jnp.float32),
  )
  tree = {'a': a, 'b': b, 'router': {'kernel': kernel}}
  actual = call(adapter(METHOD), tree, f, x, ctx)
  real = segments > 0
  vectors = np.stack(
    [embeddings[i, segments[i] - 1] for i in range(2)]
  )  # That of padding is not compared.
  p = softmax(vectors @ kernel)
  # alpha / r is one.
  expected = y + np.einsum('btf,fer,erd,bte->btd', x, a, b, p)
  np.testing.assert_allclose(actual[real], expected[real], **CLOSE)


def test_the_size_of_an_embedding_stands_beside_reads():
  sites = t5.sites(small.GATED)
  for text in ("molora(reads='embedding')", 'molora(embedding_size=4)'):
    with pytest.raises(ValueError, match='give both or none'):
      build(text, sites)


@pytest.mark.parametrize('embeddings', [None, (2, 1, 3)])
def test_a_batch_without_the_embeddings_is_refused(embeddings):
  f, x, _, inside, outside = projection('wo')
  tree = {
    'a': normal('a', *inside, 3, 2),
    'b': normal('b', 3, 2, *outside),
    'router': {'kernel': normal('kernel', SIZE, 3)},
  }
  if embeddings is not None:
    embeddings = jnp.zeros(embeddings)
  actual = 'none' if embeddings is None else '3'
  with pytest.raises(ValueError, match=f'of 4 numbers, and .* has {actual};'):
    call(adapter(METHOD), tree, f, x, Context(embeddings=embeddings))


def examples():
  rng = np.random.default_rng(0)
  texts = [('abc', 'yes'), ('a longer one', 'no'), ('b', 'maybe'), ('cc', 'x')]
  return [
    Example('t', '', i, *pair, (), -1, rng.normal(size=SIZE).astype('float32'))
    for i, pair in enumerate(texts)
  ]


def made(kind):
  """(model, variables, collator) of a family."""
  words = ByteTokenizer()
  if kind == 'decoder':
    config = dataclasses.replace(small_decoders.CONFIGS['llama'], vocab=263)
    collator = CausalCollator(words, 40, router_inputs=OF_EMBEDDINGS)
    return *small_decoders.make(config, METHOD, noise=0.3), collator
  config = dataclasses.replace(small.GATED, vocab=263)
  collator = Seq2SeqCollator(words, 40, 24, router_inputs=OF_EMBEDDINGS)
  model, _ = small.make(METHOD, config)
  return model, small.variables(METHOD, config, noise=0.3), collator


def test_packed_examples_have_the_losses_of_padded_ones():
  model, variables, collator = made('decoder')
  encoded = collator.encode(examples())
  run = jax.jit(lambda rows: loss_sums(model.apply, variables, rows, None)[0])
  rows = collator.pad(encoded)
  packed = run(collator.pack(encoded, [[3, 0, 2], [1]]))
  np.testing.assert_allclose(packed, run(rows), rtol=1e-5)
  # Another embedding is another loss.
  others = rows | {'embeddings': rows['embeddings'][::-1].copy()}
  assert abs(run(others) - packed) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['encoder-decoder', 'decoder'])
def test_packed_examples_have_the_gradients_of_padded_ones(kind):
  model, variables, collator = made(kind)
  encoded = collator.encode(examples())

  @jax.jit
  def slope(peft, rows):
    def loss(peft):
      values = {**variables, 'peft': peft}
      return loss_sums(model.apply, values, rows, None)[0]

    return jax.grad(loss)(peft)

  padded = slope(variables['peft'], collator.pad(encoded))
  packed = slope(variables['peft'], collator.pack(encoded, [[3, 0, 2], [1]]))
  # Sums of hundreds of float32 terms in another order.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
    packed,
    padded,
  )
  flat = jax.tree_util.tree_leaves_with_path(padded)
  routers = [g for path, g in flat if 'router' in jax.tree_util.keystr(path)]
  assert routers and all(np.abs(g).max() > 0 for g in routers)


def test_rows_of_a_file_keep_their_embeddings(tmp_path):
  row = {'inputs': 'a', 'targets': 'b'}
  values = [[0.5, -2], 'text', [1, 'x'], [[1.0]], [float('inf')], [], None]
  path = tmp_path / 'rows.jsonl'
  lines = [json.dumps(row | {'embedding': value}) for value in values]
  path.write_text('\n'.join([*lines[:4], *lines[5:]]))
  actual = [e.embedding for e in jsonl_rows.read(str(path))]
  np.testing.assert_array_equal(actual[0], np.float32([0.5, -2]))
  # Other values may have another purpose, and are an error where one is read.
  assert actual[1:] == [None] * 5


def test_a_script_writes_the_embeddings_of_inputs():
  rows = [('line 1', {'inputs': 'ab', 'idx': 7}), ('line 2', {'inputs': 'c'})]
  encode = lambda texts: np.float32([[len(t), 1 / 3] for t in texts])  # noqa: E731
  actual = list(embed_rows.embedded(rows, encode))
  assert actual[0]['idx'] == 7 and actual[1]['inputs'] == 'c'
  vectors = np.array([row['embedding'] for row in actual], np.float32)
  np.testing.assert_array_equal(vectors, encode(['ab', 'c']))
  with pytest.raises(ValueError, match="line 3: expected text in 'inputs'"):
    list(embed_rows.embedded([('line 3', {'inputs': None})], encode))


@pytest.mark.slow
def test_a_mixture_learns_an_answer_that_only_the_embedding_says():
  # One text, with the answer 'x' or 'y' and EOS, and a control of which half of
  # each embedding's rows have either answer. It cannot know the answer: ln 2
  # more, of two tokens half of that, 0.35 a token.
  model, variables, collator = made('decoder')
  vectors = 3 * np.eye(2, SIZE, dtype=np.float32)
  optimizer = optax.adam(3e-2)

  @jax.jit
  def step(peft, state, batch):
    def loss(peft):
      values = {**variables, 'peft': peft}
      total, sums = loss_sums(model.apply, values, batch, None)
      return total / sums['weight']

    value, slope = jax.value_and_grad(loss)(peft)
    updates, state = optimizer.update(slope, state)
    return optax.apply_updates(peft, updates), state, value

  def trained(kinds):
    rows = [
      Example('t', '', i, 'ab', 'xy'[i % 2], (), -1, vectors[kind])
      for i, kind in enumerate(kinds)
    ]
    batch = collator.pad(collator.encode(rows))
    peft = variables['peft']
    state = optimizer.init(peft)
    for _ in range(100):
      peft, state, value = step(peft, state, batch)
    return value

  assert trained([0, 1, 0, 1]) < trained([0, 0, 1, 1]) - 0.3

# SPDX-License-Identifier: Apache-2.0
"""Each real token has its example's task, each example its embedding."""

import dataclasses

import numpy as np
import pytest

from moepeft.data.batching.collators import Seq2SeqCollator
from moepeft.data.batching.decoder_only import CausalCollator
from moepeft.data.batching.router_inputs import RouterInputs
from moepeft.data.tokenizers.tokenizer import ByteTokenizer
from moepeft.models.t5 import model as t5
from moepeft.peft import build
from moepeft.tasks import Example

from ...contracts import small

TASKS = ('rte', 'cola', 'mrpc')
# Of unlike lengths, so that an example is known by how many tokens it has.
EXAMPLES = [
  Example('cola', '', 0, 'aa', 'b', (), -1),
  Example('mrpc', '', 0, 'aaaa', 'bbb', (), -1),
  Example('rte', '', 0, 'a', 'bb', (), -1),
]


def collators(**options):
  options = {'router_inputs': RouterInputs(TASKS)} | options
  return {
    'encoder-decoder': Seq2SeqCollator(ByteTokenizer(), 13, 11, **options),
    'decoder': CausalCollator(ByteTokenizer(), 29, **options),
  }


@pytest.mark.parametrize('kind', ['encoder-decoder', 'decoder'])
@pytest.mark.parametrize('prefix_ids', [(), (259, 260)], ids=str)
def test_padded_rows_have_the_id_of_their_task(kind, prefix_ids):
  collator = collators(prefix_ids=prefix_ids)[kind]
  rows = collator.pad(collator.encode(EXAMPLES))
  for side in ('inputs', 'targets') if kind != 'decoder' else ('inputs',):
    expected = np.array([[2], [3], [1]]) * rows[f'{side}_mask']
    np.testing.assert_array_equal(rows[f'{side}_tasks'], expected)


@pytest.mark.parametrize('kind', ['encoder-decoder', 'decoder'])
def test_packed_examples_keep_the_id_of_their_task(kind):
  collator = collators(packed=True)[kind]
  encoded = collator.encode(EXAMPLES)
  rows = collator.pack(encoded, [[2, 0], [1]])
  for side in ('inputs', 'targets') if kind != 'decoder' else ('inputs',):
    # Examples 2 and 0 are of tasks 1 and 2, example 1 is of task 3.
    expected = np.choose(rows[f'{side}_segments'], [[[0], [0]], [[1], [3]], 2])
    np.testing.assert_array_equal(rows[f'{side}_tasks'], expected)
    assert {0, 1, 2, 3} == set(rows[f'{side}_tasks'].flat)


@pytest.mark.parametrize('kind', ['encoder-decoder', 'decoder'])
def test_batches_say_nothing_of_tasks_where_no_router_reads_them(kind):
  collator = collators(router_inputs=RouterInputs())[kind]
  rows = collator.pad(collator.encode(EXAMPLES))
  assert not [key for key in rows if key.endswith('_tasks')]


@pytest.mark.parametrize('kind', ['encoder-decoder', 'decoder'])
def test_a_task_without_an_id_is_named_with_the_one_that_is_like_it(kind):
  stranger = Example('mrcp', '', 0, 'a', 'b', (), -1)
  with pytest.raises(ValueError, match="task 'mrcp'.*did you mean 'mrpc'"):
    collators()[kind].encode([stranger])


def test_rows_of_a_source_without_tasks_are_refused():
  collator = collators()['encoder-decoder']
  with pytest.raises(ValueError, match='reads the task of each example'):
    collator.pad(collator.encode([([5, 6], [7])]))


def with_embeddings(*vectors):
  return [
    dataclasses.replace(example, embedding=np.array(vector, np.float32))
    for example, vector in zip(EXAMPLES, vectors, strict=True)
  ]


OF_EMBEDDINGS = RouterInputs(embedding_size=2)
VECTORS = np.array([(1, 2), (3, 4), (5, 6)])


def packed_collators():
  # In 24 tokens there are three examples at most.
  options = {'router_inputs': OF_EMBEDDINGS, 'packed': True}
  return {
    'encoder-decoder': Seq2SeqCollator(ByteTokenizer(), 24, 23, **options),
    'decoder': CausalCollator(ByteTokenizer(), 24, **options),
  }


@pytest.mark.parametrize('kind', ['encoder-decoder', 'decoder'])
def test_rows_have_the_embeddings_of_their_examples_in_order(kind):
  collator = packed_collators()[kind]
  encoded = collator.encode(with_embeddings(*VECTORS))
  padded = collator.pad(encoded)['embeddings']
  np.testing.assert_array_equal(padded, VECTORS[:, None])
  packed = collator.pack(encoded, [[2, 0], [1]])['embeddings']
  expected = [[(5, 6), (1, 2), (0, 0)], [(3, 4), (0, 0), (0, 0)]]
  np.testing.assert_array_equal(packed, expected)
  assert packed.dtype == np.float32


@pytest.mark.parametrize('kind', ['encoder-decoder', 'decoder'])
def test_a_packed_row_has_no_more_examples_than_embeddings(kind):
  # Of three and four tokens, so that five or more would fit.
  rows = packed_collators()[kind]
  examples = [
    Example('t', '', i, 'a', 'b', (), -1, np.array([i, 1], np.float32))
    for i in range(20)
  ]
  batch = rows.rows(0, rows.encode(examples))
  assert batch['inputs_segments'].max() == 3
  places = batch['embeddings'].reshape(-1, 2)
  assert sorted(places[places[:, 1] > 0, 0]) == [*range(20)]


@pytest.mark.parametrize('kind', ['encoder-decoder', 'decoder'])
def test_an_example_without_an_embedding_of_the_size_is_named(kind):
  collator = packed_collators()[kind]
  with pytest.raises(ValueError, match="'cola' .idx 0. has no embedding"):
    collator.encode(EXAMPLES)
  with pytest.raises(ValueError, match='an embedding of 1 numbers.* one of 2'):
    collator.encode(with_embeddings((1, 2), (3,), (5, 6)))
  with pytest.raises(ValueError, match='reads the embedding of each example'):
    collator.pad(collator.encode([([5, 6], [7])]))


def test_mixtures_of_a_method_read_one_embedding():
  sites = t5.sites(small.GATED)
  method = "lora(rank=2) + molora(rank=2, reads='embedding', embedding_size=2)"
  actual = RouterInputs.of_method(build(method, sites).adapter_map)
  assert actual == RouterInputs((), 2)
  method += "+ molora(rank=2, reads='embedding', embedding_size=3)"
  with pytest.raises(ValueError, match='embedding_size=2 and 3'):
    RouterInputs.of_method(build(method, sites).adapter_map)

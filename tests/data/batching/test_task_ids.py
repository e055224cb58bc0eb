# SPDX-License-Identifier: Apache-2.0
"""Task ids of batches: each real token has the id of its example's task."""

import numpy as np
import pytest

from moepeft.data.batching.collators import Seq2SeqCollator
from moepeft.data.batching.decoder_only import CausalCollator
from moepeft.data.tokenizers.tokenizer import ByteTokenizer
from moepeft.tasks import Example

TASKS = ('rte', 'cola', 'mrpc')
# Of unlike lengths, so that an example is known by how many tokens it has.
EXAMPLES = [
  Example('cola', '', 0, 'aa', 'b', (), -1),
  Example('mrpc', '', 0, 'aaaa', 'bbb', (), -1),
  Example('rte', '', 0, 'a', 'bb', (), -1),
]


def collators(**options):
  options = {'tasks': TASKS} | options
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
  collator = collators(tasks=())[kind]
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

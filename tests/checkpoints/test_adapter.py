# SPDX-License-Identifier: Apache-2.0
"""Our own form of adapters: deterministic, and every byte verified."""

import json

import ml_dtypes
import numpy as np
import pytest

from moepeft.checkpoints import adapter
from moepeft.models import weight_mapping
from moepeft.models.weight_mapping import CheckpointError

from .cases import CONFIGS, adapter_tree, assert_equal_trees

CONFIG = CONFIGS['gated-untied']
TREE = adapter_tree(
  CONFIG, {'lora/a': '{in}r', 'lora/b': 'r{out}'}, ['encoder/self/q']
)
CARD = adapter.describe(
  "lora(rank=7, targets='encoder/self/q')",
  'official',
  'models/base',
  '0' * 64,
  't5',
  CONFIG,
)


@pytest.fixture
def saved(tmp_path):
  adapter.save(tmp_path / 'a', TREE, CARD)
  return tmp_path / 'a'


def test_round_trip_is_exact(saved):
  tree, card = adapter.load(str(saved))
  assert_equal_trees(tree, TREE)
  assert {key: card[key] for key in CARD} == CARD
  # a is [2, 11, 7], b is [2, 7, 3, 5].
  assert card['parameters'] == 2 * 11 * 7 + 2 * 7 * 15
  assert card['arrays']['encoder/layers/self/q/lora/a']['shape'] == [2, 11, 7]
  assert adapter.config_of(card) == CONFIG


def test_bytes_depend_on_the_adapter_alone(saved, tmp_path):
  backwards = weight_mapping.unflatten(
    dict(reversed(weight_mapping.flatten(TREE).items()))
  )
  adapter.save(tmp_path / 'b', backwards, dict(reversed(CARD.items())))
  tree, card = adapter.load(str(saved))
  adapter.save(tmp_path / 'c', tree, card)
  for name in (adapter.ARRAYS, adapter.METADATA_FILE):
    first = (saved / name).read_bytes()
    assert (tmp_path / 'b' / name).read_bytes() == first
    assert (tmp_path / 'c' / name).read_bytes() == first


def test_arrays_are_written_as_float32(tmp_path):
  half = weight_mapping.unflatten(
    {
      path: leaf.astype(ml_dtypes.bfloat16)
      for path, leaf in weight_mapping.flatten(TREE).items()
    }
  )
  adapter.save(tmp_path / 'a', half, CARD)
  leaves = weight_mapping.flatten(adapter.load(str(tmp_path / 'a'))[0]).values()
  assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}


@pytest.mark.parametrize('name', [adapter.ARRAYS, adapter.METADATA_FILE])
def test_no_flipped_byte_goes_unnoticed(saved, name):
  data = (saved / name).read_bytes()
  rng = np.random.default_rng(0)
  for place in [0, 8, len(data) - 2, *rng.integers(0, len(data), 100)]:
    broken = bytearray(data)
    broken[place] ^= 1
    (saved / name).write_bytes(broken)
    try:
      _, card = adapter.load(str(saved))
    except CheckpointError as error:
      assert str(saved) in str(error)
    else:
      # White space between the card's words is no part of what it says.
      assert name == adapter.METADATA_FILE and chr(data[place]).isspace(), place


@pytest.mark.parametrize('name', [adapter.ARRAYS, adapter.METADATA_FILE])
@pytest.mark.parametrize('kept', [0, 10, 0.5, -5])
def test_a_truncated_file_is_refused(saved, name, kept):
  data = (saved / name).read_bytes()
  size = int(kept * len(data)) if isinstance(kept, float) else kept
  (saved / name).write_bytes(data[:size])
  with pytest.raises(CheckpointError) as error:
    adapter.load(str(saved))
  assert name in str(error.value)


def test_a_damaged_array_is_named(saved):
  file = saved / adapter.ARRAYS
  file.write_bytes(file.read_bytes()[:-1] + b'\x7f')
  with pytest.raises(CheckpointError, match='encoder/layers/self/q/lora/b'):
    adapter.load(str(saved))


def test_arrays_of_another_adapter_are_refused(saved, tmp_path):
  other = adapter_tree(CONFIG, {'ia3/scale': '{out}'}, ['encoder/self/k'])
  adapter.save(tmp_path / 'b', other, CARD)
  file = saved / adapter.ARRAYS
  file.write_bytes((tmp_path / 'b' / adapter.ARRAYS).read_bytes())
  with pytest.raises(CheckpointError) as error:
    adapter.load(str(saved))
  assert '- encoder/layers/self/q/lora/a [2, 11, 7]' in str(error.value)


def test_a_newer_format_says_update(saved):
  card = json.loads((saved / adapter.METADATA_FILE).read_text()) | {'format': 2}
  (saved / adapter.METADATA_FILE).write_text(json.dumps(card))
  with pytest.raises(CheckpointError, match='update moepeft'):
    adapter.load(str(saved))


def test_a_card_that_lacks_the_base_is_not_written(tmp_path):
  card = {key: value for key, value in CARD.items() if key != 'base'}
  with pytest.raises(CheckpointError, match='lack base'):
    adapter.save(tmp_path / 'a', TREE, card)

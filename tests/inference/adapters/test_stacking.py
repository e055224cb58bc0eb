# SPDX-License-Identifier: Apache-2.0
"""Adapters come and go while requests use them."""

import dataclasses
import threading
import weakref

import jax
import numpy as np
import pytest

from moepeft.checkpoints import adapter
from moepeft.inference.adapters import stacking
from moepeft.inference.adapters.pool import AdapterPool
from moepeft.inference.adapters.stacking import row_tree
from moepeft.inference.api import EngineFull, UnknownAdapter
from moepeft.models.decoder.model import DecoderConfig

from .. import banked

CONFIG = DecoderConfig(
  vocab=7, d_model=5, heads=3, kv_heads=1, head_dim=2, ffn=11, layers=2
)
# One slot of lora(rank=4): features in and out are 5 + 6 of q, 5 + 2 of k and
# of v, 6 + 5 of o, 5 + 11 of wi_0, of wi_1 and of wo, times the rank, two
# layers and 4 bytes.
LORA = (11 + 7 + 7 + 11 + 16 + 16 + 16) * 4 * 2 * 4


@pytest.fixture(scope='module')
def base():
  return banked.base_of(CONFIG)


@pytest.fixture(scope='module')
def paths(base, tmp_path_factory):
  """Four LoRA of other contents each, and an (IA)^3."""
  place = tmp_path_factory.mktemp('adapters')
  actual = {
    name: banked.save(place / name, base, f'lora(rank={rank})', rank)[0]
    for rank, name in enumerate('abcd', 1)
  }
  return actual | {'ia3': banked.save(place / 'ia3', base, 'ia3')[0]}


@pytest.fixture
def banks(base, paths):
  """Room for two LoRA and two (IA)^3."""
  return AdapterPool(base, {'a': paths['a']}, ['ia3'], slots=3)


def query(banks, held):
  """What a row reads of q's B, [l, r, n, h]."""
  bank = banks.tree['lora']['decoder']['layers']['self']['q']['lora']['b']
  return np.asarray(bank)[
    held.row[[f.name for f in banks.buckets].index('lora')]
  ]


def wanted(paths, name):
  """The adapter's own B times its scale, padded to rank four."""
  tree, card = adapter.load(paths[name])
  rank = int(card['method'].partition('=')[2].strip(')'))
  b = tree['decoder']['layers']['self']['q']['lora']['b'] * (16 / rank)
  return np.pad(b, [(0, 0), (0, 4 - rank), (0, 0), (0, 0)])


def test_a_row_takes_one_slot_and_elsewhere_the_identity(banks, paths):
  banks.load('i', paths['ia3'])
  assert [form.name for form in banks.buckets] == ['ia3', 'lora']
  np.testing.assert_array_equal(banks.row(''), [0, 0])
  np.testing.assert_array_equal(banks.row('a'), [0, 1])
  np.testing.assert_array_equal(banks.row('i'), [1, 0])
  stored = banks.acquire('a')
  np.testing.assert_allclose(
    query(banks, stored), wanted(paths, 'a'), rtol=1e-6
  )
  assert not query(banks, banks.acquire('')).any()


def test_what_is_loaded_is_told(banks, paths):
  loaded = banks.load('b', paths['b'])
  assert [one.name for one in banks.loaded()] == ['a', 'b']
  assert loaded == banks.loaded()[1]
  assert loaded.method == 'lora(rank=2)'
  assert loaded.source == paths['b']
  assert loaded.bytes == LORA


def test_a_content_is_one_whatever_it_is_called(banks, paths, base, tmp_path):
  first, second = banks.loaded()[0], banks.load('twin', paths['a'])
  assert first.sha256 == second.sha256
  np.testing.assert_array_equal(banks.row('a'), banks.row('twin'))
  banks.unload('a')
  np.testing.assert_array_equal(banks.row('twin'), [0, 1])
  # The same method said otherwise, and one number changed.
  spelled = 'lora(alpha=16.0, rank=1)'
  again, _, tree = banked.save(tmp_path / 'again', base, spelled, 1)
  assert banks.load('again', again).sha256 == first.sha256
  tree['decoder']['layers']['self']['q']['lora']['a'][0, 0, 0] += 1e-3
  _, card = adapter.load(again)
  adapter.save(tmp_path / 'other', tree, card)
  other = banks.load('other', str(tmp_path / 'other'))
  assert other.sha256 != first.sha256


def test_a_replaced_adapter_serves_its_requests_to_their_end(banks, paths):
  before = banks.acquire('a')
  banks.load('a', paths['b'])
  now = banks.acquire('a')
  assert now.sha256 != before.sha256
  assert now.row[1] != before.row[1]
  np.testing.assert_allclose(query(banks, before), wanted(paths, 'a'), 1e-6)
  np.testing.assert_allclose(query(banks, now), wanted(paths, 'b'), 1e-6)
  # Both slots are in use: a third has to wait for the end of one.
  banks.load('c', paths['c'])
  with pytest.raises(EngineFull) as caught:
    banks.acquire('c')
  assert caught.value.seconds == 1
  banks.release(before)
  third = banks.acquire('c')
  assert third.row[1] == before.row[1]
  np.testing.assert_allclose(query(banks, third), wanted(paths, 'c'), 1e-6)
  np.testing.assert_allclose(query(banks, now), wanted(paths, 'b'), 1e-6)


def test_a_replaced_adapter_that_nobody_uses_is_forgotten(banks, paths):
  fitted = banks.read(paths['b'])
  gone = weakref.ref(fitted)
  banks.put('a', fitted)
  del fitted
  stored = banks.acquire('a')
  banks.load('a', paths['c'])
  assert gone() is not None
  banks.release(stored)
  assert gone() is None


def test_an_unloaded_adapter_is_unknown_at_once_and_ends_in_order(banks, paths):
  stored = banks.acquire('a')
  banks.unload('a')
  with pytest.raises(UnknownAdapter, match="no adapter 'a'; there are none"):
    banks.acquire('a')
  with pytest.raises(UnknownAdapter):
    banks.unload('a')
  banks.load('b', paths['b'])
  banks.acquire('b')
  np.testing.assert_allclose(query(banks, stored), wanted(paths, 'a'), 1e-6)
  banks.release(stored)
  banks.load('c', paths['c'])
  assert banks.acquire('c').row[1] == stored.row[1]


def test_an_adapter_that_made_room_comes_back_when_it_is_asked_for(
  banks, paths
):
  for name in 'bcd':
    banks.load(name, paths[name])
  # Two slots for four; each is right whenever its turn is.
  for name in 'abcdab':
    stored = banks.acquire(name)
    np.testing.assert_allclose(query(banks, stored), wanted(paths, name), 1e-6)
    banks.release(stored)
  assert len(banks.loaded()) == 4


def test_a_slot_that_could_not_be_written_serves_nobody(
  banks, paths, monkeypatch
):
  # There are two slots: 'a' has made room.
  for name in 'bc':
    banks.load(name, paths[name])

  def fails(*_):
    raise RuntimeError('out of memory')

  with monkeypatch.context() as patch:
    patch.setattr(stacking, 'write_slot', fails)
    with pytest.raises(RuntimeError):
      banks.acquire('a')
    with pytest.raises(RuntimeError):
      banks.load('d', paths['d'])
  banks.load('d', paths['d'])
  for name in 'abcd':
    stored = banks.acquire(name)
    np.testing.assert_allclose(query(banks, stored), wanted(paths, name), 1e-6)
    banks.release(stored)


def test_a_step_that_is_under_way_keeps_its_tree(banks, paths):
  tree, stored = banks.tree, banks.acquire('a')
  banks.release(stored)
  for name in 'bcd':
    banks.load(name, paths[name])
  own = row_tree(tree, stored.row)['decoder']['layers']['self']['q']
  assert sorted(own) == ['lora']
  np.testing.assert_allclose(own['lora']['b'], wanted(paths, 'a'), 1e-6)


def test_loading_compiles_nothing(banks, paths):
  @jax.jit
  def step(tree, slots):
    return row_tree(tree, slots)

  step(banks.tree, banks.row('a'))
  writes = stacking.write_slot._cache_size()
  for name in ('b', 'c', 'd', 'ia3'):
    banks.load(name, paths[name])
    step(banks.tree, banks.row(name))
  assert step._cache_size() == 1
  assert stacking.write_slot._cache_size() == writes


def test_a_budget_lowers_the_slots_and_is_never_exceeded(base, paths):
  # Three and a half slots are three.
  banks = AdapterPool(base, {'a': paths['a']}, slots=9, budget=LORA * 7 // 2)
  assert banks.bytes == 3 * LORA
  assert jax.tree.leaves(banks.tree)[0].shape[0] == 3
  real = sum(leaf.nbytes for leaf in jax.tree.leaves(banks.tree))
  assert real == banks.bytes
  with pytest.raises(ValueError, match=rf'needs two slots.*{2 * LORA:,} bytes'):
    AdapterPool(base, {'a': paths['a']}, budget=2 * LORA - 1)


def test_a_form_that_is_not_there_is_an_error_that_names_the_flag(
  base, paths, tmp_path
):
  banks = AdapterPool(base, {'a': paths['a']}, slots=2)
  large, _, _ = banked.save(tmp_path / 'large', base, 'lora(rank=5)')
  for path in (paths['ia3'], large):
    with pytest.raises(ValueError, match=r'\(lora\(rank=4\)\).*--form='):
      banks.load('other', path)
  assert [one.name for one in banks.loaded()] == ['a']
  banks.add_bucket('lora(rank=5)')
  banks.load('large', large)
  stored = banks.acquire('a')
  assert query(banks, stored).shape[1] == 8
  np.testing.assert_allclose(
    query(banks, stored)[:, :4], wanted(paths, 'a'), 1e-6
  )
  with pytest.raises(ValueError, match='requests use adapters'):
    banks.add_bucket('ia3')


def test_without_forms_there_is_the_base_alone(base):
  banks = AdapterPool(base)
  assert banks.tree == {} and banks.bytes == 0
  assert banks.acquire('').row.shape == (0,)
  with pytest.raises(UnknownAdapter):
    banks.acquire('a')


def test_the_base_has_no_other_name(banks, paths):
  with pytest.raises(ValueError, match='needs a name'):
    banks.load('', paths['a'])


def test_threads_take_turns(banks, paths):
  """None sees another's adapter, and all slots are free at the end."""
  for name in 'bcd':
    banks.load(name, paths[name])
  right = {name: wanted(paths, name) for name in 'abcd'}
  wrong = []

  def ask(seed):
    rng = np.random.default_rng(seed)
    for name in rng.choice(list('abcd'), 7):
      try:
        stored = banks.acquire(name)
      except EngineFull:
        continue
      if not np.allclose(query(banks, stored), right[name], rtol=1e-6):
        wrong.append(name)
      banks.release(stored)

  threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(timeout=60)
    assert not thread.is_alive()
  assert wrong == []
  first, second = banks.acquire('c'), banks.acquire('d')
  assert {first.row[1], second.row[1]} == {1, 2}


def test_held_rows_are_not_compared_by_arrays(banks):
  # A dataclass of arrays has no truth: two are the same one or not.
  first, second = banks.acquire('a'), banks.acquire('a')
  assert first != second and dataclasses.replace(first) != first

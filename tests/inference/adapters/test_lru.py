# SPDX-License-Identifier: Apache-2.0
"""Slots of a bank: who has one, and who has to go."""

import pytest

from moepeft.inference.adapters.lru import LruSlots
from moepeft.inference.api import EngineFull


def test_slot_zero_is_nobodys():
  slots = LruSlots(4)
  assert sorted(slots.take(name) for name in 'abc') == [1, 2, 3]


def test_the_one_used_longest_ago_makes_room():
  slots = LruSlots(3)
  first, second = slots.take('a'), slots.take('b')
  slots.acquire('a')
  slots.release('a')
  assert slots.take('c') == second
  assert 'b' not in slots
  assert slots['a'] == first


def test_one_that_is_used_stays():
  slots = LruSlots(3)
  slots.take('a')
  slots.acquire('a')
  slots.acquire('a')
  slots.release('a')
  taken = slots.take('b')
  # 'a' is the older one.
  assert slots.take('c') == taken
  assert 'a' in slots


def test_full_says_when_to_come_back_and_changes_nothing():
  slots = LruSlots(2)
  slots.take('a')
  slots.acquire('a')
  assert not slots.has_free()
  with pytest.raises(EngineFull, match='try again') as caught:
    slots.take('b')
  assert caught.value.seconds == 1
  assert 'a' in slots and 'b' not in slots
  slots.release('a')
  assert slots.has_free()
  assert slots.take('b') == 1


def test_a_slot_is_not_given_back_twice_nor_under_a_user():
  slots = LruSlots(3)
  slots.take('a')
  slots.acquire('a')
  with pytest.raises(ValueError, match='still use'):
    slots.drop('a')
  slots.release('a')
  with pytest.raises(ValueError, match='more often'):
    slots.release('a')
  slots.drop('a')
  slots.drop('a')
  assert sorted(slots.take(name) for name in 'bc') == [1, 2]

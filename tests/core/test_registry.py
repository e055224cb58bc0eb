# SPDX-License-Identifier: Apache-2.0
"""Registries import lazily, refuse double names and suggest near ones."""

import sys

import pytest

from moepeft.core.registry import Registry


def shapes():
  return Registry('shape', 'xml', {'sax': 'sax:parse', 'dom': 'dom:Node'})


def test_an_entry_is_imported_when_it_is_looked_up(monkeypatch):
  monkeypatch.delitem(sys.modules, 'xml.sax', raising=False)
  registry = shapes()
  assert 'sax' in registry and list(registry) == ['sax', 'dom']
  assert 'xml.sax' not in sys.modules
  entry = registry['sax']
  assert entry is sys.modules['xml.sax'].parse


def test_an_entry_of_a_user_stands_beside_the_others():
  registry = shapes()
  registry.register('mine', 1)
  registry.register('mine', 1)
  assert registry.lookup('mine') == 1
  assert len(registry) == 3 and list(registry)[-1] == 'mine'


@pytest.mark.parametrize('name', ['sax', 'mine'])
def test_a_name_is_not_taken_twice(name):
  registry = shapes()
  registry.register('mine', 1)
  with pytest.raises(ValueError, match=f"there is a shape '{name}' already"):
    registry.register(name, 2)


def test_an_unknown_name_is_told_with_the_known_ones():
  with pytest.raises(ValueError) as error:
    shapes().lookup('saxx')
  assert str(error.value) == (
    "there is no shape 'saxx'; there are sax, dom; did you mean 'sax'?"
  )


def test_it_is_a_mapping():
  with pytest.raises(KeyError):
    shapes()['none']
  assert shapes().get('none') is None

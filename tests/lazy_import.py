# SPDX-License-Identifier: Apache-2.0
"""Modules that take seconds to import, which no collection of tests needs."""

import importlib


class LazyModule:
  """A module that is imported when an attribute of it is first read."""

  def __init__(self, name: str):
    self._name = name

  def __getattr__(self, attribute: str):
    # pytest asks every name of a test file whether it is a mock, or wraps a
    # fixture.
    if attribute == '_mock_name' or attribute.startswith('__'):
      raise AttributeError(attribute)
    return getattr(importlib.import_module(self._name), attribute)

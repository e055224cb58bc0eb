# SPDX-License-Identifier: Apache-2.0
"""Checks of the fields of a model's config."""

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np

from moepeft.core.ranges import Range, shortened, suggestion

# Sizes of arrays that XLA indexes by 32 bits; no model is near them. Layers are
# listed one by one, so they have a bound of their own.
_MOST, _MOST_LAYERS = 2**31 - 1, 10_000
_KINDS: dict[type, tuple[str, Any]] = {
  bool: ('True or False', (bool, np.bool_)),
  int: ('a whole number', numbers.Integral),
  float: ('a number', numbers.Real),
  str: ('a text', str),
}


def check(config: Any, minimums: Mapping[str, float], prefix: str = '') -> None:
  """Checks the plain fields of a dataclass: their types and ranges.

  Args:
    minimums: {field: its least value}.
    prefix: goes before a field's name in messages.

  Raises:
    ValueError: a field is of another type or out of range; the message begins
      with its name.
  """
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    name = prefix + field.name
    if field.type in _KINDS:
      expectation, types = _KINDS[field.type]
      # Python counts truth values among the whole numbers.
      is_bool = field.type is not bool and isinstance(value, (bool, np.bool_))
      if is_bool or not isinstance(value, types):
        raise ValueError(f'{name} is {expectation}; got {shortened(value)}')
    if field.type in (int, float):
      minimum = minimums.get(field.name, -_MOST)
      maximum = _MOST_LAYERS if field.name.endswith('layers') else _MOST
      Range(minimum, maximum).check(name, value)


def check_one_of(name: str, value: Any, choices: Any) -> None:
  """Raises a ValueError that names the field where `value` is not known."""
  if value not in choices:
    raise ValueError(
      f'{name} is one of {", ".join(choices)}; got {shortened(value)}'
      f'{suggestion(value, choices)}'
    )


def check_names(
  config_class: type, fields: Mapping[str, Any], prefix: str = ''
) -> None:
  """Raises a ValueError where a name is none of a dataclass's fields."""
  names = [field.name for field in dataclasses.fields(config_class)]
  for name in fields:
    if name not in names:
      raise ValueError(
        f'{prefix}{name} is not known; there are {", ".join(names)}'
        f'{suggestion(name, names)}'
      )


def from_fields(config_class: type, fields: Mapping[str, Any]) -> Any:
  """The config whose `dataclasses.asdict` went through JSON.

  Raises:
    ValueError: a field is unknown or cannot be; the message begins with its
      name.
  """
  check_names(config_class, fields)
  return config_class(**fields)


# '1.1' is what a config has that says nothing: T5's.
_NO_VERSION = ('', '1.1')


def released(
  title: str,
  table: Mapping[str, Any],
  size: str,
  version: str = '',
) -> Any:
  """The configuration of a released size, by its name in a family's table.

  Args:
    title: the family's name in messages.

  Raises:
    ValueError: there is no such size, or a version is asked for.
  """
  if version not in _NO_VERSION:
    raise ValueError(
      f'{title} has no versions beside its sizes, {", ".join(table)}; got '
      f'config.model.version={version!r}: leave it out'
    )
  if size not in table:
    raise ValueError(
      f'{title} comes as {", ".join(table)}; got {size!r}'
      f'{suggestion(size, table)}'
    )
  return table[size]

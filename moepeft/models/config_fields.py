# SPDX-License-Identifier: Apache-2.0
"""Checks the fields of model configs."""

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np

from moepeft.core.ranges import Range, short_repr, suggestion

# XLA indexes arrays with 32 bits. Layers have a lower limit, as they are listed
# one by one.
_MAX_VALUE, _MAX_LAYERS = 2**31 - 1, 10_000
_TYPES: dict[type, tuple[str, Any]] = {
  bool: ('True or False', (bool, np.bool_)),
  int: ('a whole number', numbers.Integral),
  float: ('a number', numbers.Real),
  str: ('a text', str),
}


def check(config: Any, minimums: Mapping[str, float], prefix: str = '') -> None:
  """Checks the plain fields of a dataclass: their types and ranges.

  Args:
    minimums: {field: minimum value}.
    prefix: a prefix of field names in messages.

  Raises:
    ValueError: a field has a wrong type or is out of range; the message starts
      with its name.
  """
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    name = prefix + field.name
    if field.type in _TYPES:
      expectation, types = _TYPES[field.type]
      # bool is a subclass of int.
      is_bool = field.type is not bool and isinstance(value, (bool, np.bool_))
      if is_bool or not isinstance(value, types):
        raise ValueError(f'{name} is {expectation}; got {short_repr(value)}')
    if field.type in (int, float):
      minimum = minimums.get(field.name, -_MAX_VALUE)
      maximum = _MAX_LAYERS if field.name.endswith('layers') else _MAX_VALUE
      Range(minimum, maximum).check(name, value)


def check_one_of(name: str, value: Any, choices: Any) -> None:
  """Raises a ValueError with the field's name if `value` is not a choice."""
  if value not in choices:
    raise ValueError(
      f'{name} is one of {", ".join(choices)}; got {short_repr(value)}'
      f'{suggestion(value, choices)}'
    )


def check_names(
  config_class: type, fields: Mapping[str, Any], prefix: str = ''
) -> None:
  """Raises a ValueError if a name is not a field of a dataclass."""
  names = [field.name for field in dataclasses.fields(config_class)]
  for name in fields:
    if name not in names:
      raise ValueError(
        f'{prefix}{name} is not known; there are {", ".join(names)}'
        f'{suggestion(name, names)}'
      )


def from_fields(config_class: type, fields: Mapping[str, Any]) -> Any:
  """Makes a config from its `dataclasses.asdict`, which may be from JSON.

  Raises:
    ValueError: a field is unknown or invalid; the message starts with its
      name.
  """
  check_names(config_class, fields)
  return config_class(**fields)


# '1.1' is the default of config.model.version, for T5.
_NO_VERSION = ('', '1.1')


def released_config(
  title: str,
  table: Mapping[str, Any],
  size: str,
  version: str = '',
) -> Any:
  """The config of a released size from a family's table.

  Args:
    title: the family's name in messages.

  Raises:
    ValueError: the size is unknown, or a version is given.
  """
  if version not in _NO_VERSION:
    raise ValueError(
      f'{title} has no versions, only sizes, {", ".join(table)}; got '
      f'config.model.version={version!r}: leave it out'
    )
  if size not in table:
    raise ValueError(
      f'{title} comes as {", ".join(table)}; got {size!r}'
      f'{suggestion(size, table)}'
    )
  return table[size]

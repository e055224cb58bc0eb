# SPDX-License-Identifier: Apache-2.0
"""config.json of a work directory, read with the types that a config has."""

import functools
import json
import os
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from moepeft.config import check as config_check
from moepeft.config import defaults as config_lib
from moepeft.config import imports
from moepeft.core import untrusted

NAME = 'config.json'


def read(workdir: str) -> dict[str, Any]:
  """The config that a run was begun with, nested.

  Keys that this version does not have are kept, and those that an older run
  lacks are absent.

  Raises:
    ValueError: there is none, or it is damaged: no JSON, or a key's value is
      of another type than in `moepeft.config.defaults`.
  """
  path = os.path.join(workdir, NAME)
  if not os.path.exists(path):
    raise ValueError(
      f'{workdir!r} is no work directory of moepeft.train: it has no {NAME}'
    )
  # data.temperature may be infinite; `load` checks every value's range.
  advice = 'copy it from another run of its command'
  return read_object(path, _shape(), advice, finite=False)


def load(workdir: str) -> ConfigDict:
  """The same as a config, with the defaults for what it lacks.

  Raises:
    ValueError: as `read`, a value is none that training takes, or a module of
      config.imports cannot be imported.
  """
  config = config_lib.default()
  with config.unlocked():
    config.update(read(workdir))
  try:
    imports.import_modules(config.imports)
    config_check.check(config)
  except ValueError as e:
    raise ValueError(f'{os.path.join(workdir, NAME)}: {e}') from None
  return config


def read_object(
  path: str, shape: Any, advice: str, finite: bool = True
) -> dict[str, Any]:
  """A JSON object that a run has written.

  Args:
    shape: see `untrusted.check_shape`.
    advice: what to do about a damaged file.
    finite: whether its numbers have to be.

  Raises:
    ValueError: it is damaged; the message names the file.
    OSError: it cannot be opened.
  """
  try:
    value = untrusted.read_json_object(path)
    untrusted.check_shape(value, shape, finite=finite)
  except untrusted.Malformed as e:
    reason = str(e).removeprefix(f'{path} ').removesuffix('; copy it again')
    raise ValueError(f'{path} is damaged ({reason}); {advice}') from None
  return value


@functools.cache
def _shape() -> dict[str, Any]:
  return shape_of(json.loads(config_lib.default().to_json()))


def shape_of(value: Any) -> Any:
  """The shape of a config that has the types of another, all keys optional."""
  if isinstance(value, Mapping):
    return {f'{key}?': shape_of(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return list
  return type(value)

# SPDX-License-Identifier: Apache-2.0
"""The trials of a sweep: the combinations of a grid's values."""

import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from moepeft.config import method_string, suggestions
from moepeft.config.budget import without_request
from moepeft.core.ranges import suggestion
from moepeft.core.untrusted import Malformed, parse_literal
from moepeft.peft.method_text import resolve
from moepeft.sweeps import method_options

_MAX_TRIALS = 10_000
_MAX_NAME = 80
# The spellings of absl.
_SWITCHES = {'true': True, 't': True, '1': True} | {
  'false': False,
  'f': False,
  '0': False,
}
# Sections whose keys the config does not list.
_OPEN_SECTIONS = ('model.shape.', 'router_losses.')


@dataclasses.dataclass(frozen=True)
class Trial:
  """A run of a sweep.

  Attributes:
    index: its place in the grid, from 0; the last key varies fastest.
    name: of its directory; a function of the settings alone.
    settings: {key of the grid: value}.
    method: the method's text, with the options that are keys of the grid.
    flags: the arguments of moepeft.train that set it apart.
    config: the config of the run.
  """

  index: int
  name: str
  settings: Mapping[str, Any]
  method: str
  flags: tuple[str, ...]
  config: ConfigDict = dataclasses.field(repr=False, compare=False)


def make_trials(
  config: ConfigDict, grid: Mapping[str, tuple[str, ...]]
) -> list[Trial]:
  """The trials of a grid over a config, in the grid's order.

  Args:
    config: of all trials, but for the keys of the grid.
    grid: from `grid.parse`.

  Raises:
    ValueError: a key or an option does not exist, a value has another type, or
      two trials are the same run.
  """
  methods = grid.get('method', (config.method,))
  option_keys = [key for key in grid if _is_option(key, config, methods)]
  count = math.prod(map(len, grid.values()))
  if count > _MAX_TRIALS:
    raise ValueError(
      f'--grid has {count:,} trials; expected {_MAX_TRIALS:,} at most'
    )
  values = {key: _parse_values(config, key, grid[key]) for key in grid}
  trials: dict[str, Trial] = {}
  for combination in itertools.product(*values.values()):
    settings = dict(zip(values, combination, strict=True))
    method = settings.get('method', config.method)
    for key in option_keys:
      adapter = key.rpartition('.')[0]
      if adapter and adapter not in method_options.names(method):
        del settings[key]
      else:
        method = method_options.with_option(method, key, settings[key])
    trial = _make_trial(config, len(trials), settings, method, option_keys)
    twin = trials.setdefault(trial.name, trial)
    if twin.settings != trial.settings:
      raise ValueError(
        f'--grid has the run {trial.name} twice, as {_describe(twin.settings)} '
        f'and as {_describe(trial.settings)}; drop one of them'
      )
  return list(trials.values())


def _make_trial(
  config: ConfigDict,
  index: int,
  settings: dict[str, Any],
  method: str,
  option_keys: Iterable[str],
) -> Trial:
  changes = {k: v for k, v in settings.items() if k not in option_keys}
  parts = []
  if 'method' in settings or method != config.method:
    changes = {'method': method} | changes | {'method': method}
    parts.append(method)
  parts += [
    f'{key.rpartition(".")[2]}-{value}'
    for key, value in changes.items()
    if key != 'method'
  ]
  config = config.copy_and_resolve_references()
  for key, value in changes.items():
    _set(config, key, value)
  # The run reads the files of from_adapters, and solves budgets and scales.
  if 'from_adapters' not in method:
    specs = map(without_request, method_string.parse_method(method))
    resolve(method_string.format_method(s for s, _ in specs), config.semantics)
  return Trial(
    index=index,
    name=_name(parts, changes),
    settings=settings,
    method=method,
    flags=tuple(f'--config.{key}={value}' for key, value in changes.items()),
    config=config,
  )


def _name(parts: Iterable[str], changes: Mapping[str, Any]) -> str:
  """A name for paths, 'molora-experts-2_learning_rate-0.001_seed-0'.

  It has no =, which separates a served adapter's name from its path.
  It ends in a hash where it would be too long, or has left out characters that
  may tell two trials apart.
  """
  plain = (re.sub('[\'"]', '', part) for part in parts)
  slugs = (re.sub('[^A-Za-z0-9_.+-]+', '-', part) for part in plain)
  name = '_'.join(slug.strip('-') for slug in slugs)
  keys = [key.rpartition('.')[2] for key in changes]
  is_exact = all(re.fullmatch('[A-Za-z0-9_.+=(), -]*', part) for part in parts)
  if is_exact and len(name) <= _MAX_NAME and len({*keys}) == len(keys):
    return name
  digest = hashlib.sha256(json.dumps(changes, sort_keys=True).encode())
  return f'{name[: _MAX_NAME - 9].rstrip("-_")}_{digest.hexdigest()[:8]}'


def _is_option(key: str, config: ConfigDict, methods: Iterable[str]) -> bool:
  """Whether a key of the grid is an option of methods, and not of the config.

  Raises:
    ValueError: it is neither.
  """
  if key in suggestions.keys(config) or key.startswith(_OPEN_SECTIONS):
    return False
  adapter, _, option = key.rpartition('.')
  names = {name for text in methods for name in method_options.names(text)}
  if adapter in names:
    return True
  options = {o for text in methods for o in method_options.options(text)}
  if not adapter and option in options:
    return True
  known_keys = [*suggestions.keys(config), *options]
  exact = suggestions.unknown_key(f'--config.{key}=')
  near = suggestion(key, known_keys)
  if near and 'lists all keys' in exact:
    exact = f'there is no config.{key} and no option {key} of a method{near}'
  raise ValueError(f'--grid: {exact}')


def _parse_values(
  config: ConfigDict, key: str, texts: tuple[str, ...]
) -> list[Any]:
  """The values of a key, of its type in the config.

  Those of options are numbers and texts.

  Raises:
    ValueError: a value has another type than the key, or stands twice.
  """
  values = [_parse_value(config, key, text) for text in texts]
  for i, value in enumerate(values):
    if value in values[:i]:
      raise ValueError(
        f'--grid: {key} has the value {texts[i]} twice; drop one'
      )
  return values


def _parse_value(config: ConfigDict, key: str, text: str) -> Any:
  node = config
  for part in key.split('.'):
    node = node.get(part) if isinstance(node, ConfigDict) else None
  if isinstance(node, str):
    return text
  if isinstance(node, bool | int | float):
    try:
      is_switch = isinstance(node, bool)
      return _SWITCHES[text.lower()] if is_switch else type(node)(text)
    except (KeyError, ValueError):
      error = suggestions.wrong_type(f'--config.{key}={text}')
      kind = type(node).__name__
      error = error or f'config.{key} is of type {kind}; got {text!r}'
      raise ValueError(f'--grid: {error}') from None
  try:
    value = parse_literal(text)
  except Malformed:
    return text
  # Other values of options are parsed as in a method.
  is_option = node is None and not key.startswith(_OPEN_SECTIONS)
  return text if is_option and not isinstance(value, int | float) else value


def _set(config: ConfigDict, key: str, value: Any) -> None:
  *parents, name = key.split('.')
  with config.unlocked(), config.ignore_type():
    for parent in parents:
      if not isinstance(config.get(parent), ConfigDict):
        config[parent] = ConfigDict()
      config = config[parent]
    config[name] = value


def _describe(settings: Mapping[str, Any]) -> str:
  return '; '.join(f'{key}={value}' for key, value in settings.items())

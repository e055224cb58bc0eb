# SPDX-License-Identifier: Apache-2.0
"""Learning rates and weight decay by parameter pattern.

The form of config.optimizer.groups:

  '*/router/*: learning_rate=1e-4, weight_decay=0; */lora/b: learning_rate=2e-3'

A pattern must match the whole path of a parameter, like
'encoder/layers/self/q/molora/router/kernel'; * matches any characters. The
first matching pattern applies; other parameters have the values of
config.optimizer. A group's learning rate follows config.optimizer.schedule.
'*/lora/b: rate_ratio=16' is 16 times config.optimizer.learning_rate.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Sequence

import jax

from moepeft.core.ranges import Range, nearest
from moepeft.core.types import Tree

# The values that a group may have, with their ranges.
KEYS = {
  'learning_rate': Range(0, 100),
  'rate_ratio': Range(0, 1_000_000),
  'weight_decay': Range(0, 1_000),
}
DEFAULT = 'default'
_EXAMPLE = "'*/router/*: learning_rate=1e-4, weight_decay=0'"


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
  """A pattern of parameters, with their learning rate and weight decay.

  Attributes:
    pattern: matched against a parameter's path.
    learning_rate, weight_decay: None for the value of config.optimizer.
    rate_ratio: multiplies the learning rate of config.optimizer.
  """

  pattern: str
  learning_rate: float | None = None
  weight_decay: float | None = None
  rate_ratio: float | None = None


def parse_groups(text: str) -> tuple[ParameterGroup, ...]:
  """Reads config.optimizer.groups.

  Raises:
    ValueError: the text has an invalid form, or a value is out of range.
  """
  return tuple(_parse_group(part) for part in text.split(';') if part.strip())


def _parse_group(text: str) -> ParameterGroup:
  pattern, colon, assignments = text.partition(':')
  if not colon or not pattern.strip() or not assignments.strip():
    raise ValueError(
      'config.optimizer.groups has groups of the form pattern: key=value, '
      f'separated by semicolons, like {_EXAMPLE}; got {text.strip()!r}'
    )
  values: dict[str, float] = {}
  for assignment in assignments.split(','):
    key, equals, value = map(str.strip, assignment.partition('='))
    if key not in KEYS or not equals:
      raise ValueError(
        f'a group of config.optimizer.groups sets {" or ".join(KEYS)}, like '
        f'{_EXAMPLE}; got {assignment.strip()!r}'
      )
    try:
      values[key] = float(value)
    except ValueError:
      raise ValueError(
        f'config.optimizer.groups: {key} is a number; got {value!r}'
      ) from None
    KEYS[key].check(f'config.optimizer.groups: {key}', values[key])
  if {'learning_rate', 'rate_ratio'} <= values.keys():
    raise ValueError(
      'a group of config.optimizer.groups has a learning_rate or a rate_ratio; '
      f'got both in {text.strip()!r}: leave one out'
    )
  return ParameterGroup(pattern.strip(), **values)


def label_fn(groups: Sequence[ParameterGroup]) -> Callable[[Tree], Tree]:
  """Makes the function that labels parameters, for `optax.multi_transform`.

  Labels are 'group_0', 'group_1', ... in the order of the groups, and
  `DEFAULT`.

  Raises:
    ValueError: (when called) a pattern matches no parameter that earlier
      patterns do not match.
  """

  def label(path: str) -> str:
    for i, group in enumerate(groups):
      if fnmatch.fnmatchcase(path, group.pattern):
        return f'group_{i}'
    return DEFAULT

  def labels(params: Tree) -> Tree:
    tree = jax.tree_util.tree_map_with_path(
      lambda path, _: label(
        jax.tree_util.keystr(path, simple=True, separator='/')
      ),
      params,
    )
    used = set(jax.tree.leaves(tree))
    for i, group in enumerate(groups):
      if f'group_{i}' not in used:
        raise ValueError(_no_match_message(group, groups[:i], params))
    return tree

  return labels


def _no_match_message(
  group: ParameterGroup, earlier: Sequence[ParameterGroup], params: Tree
) -> str:
  flat, _ = jax.tree_util.tree_flatten_with_path(params)
  paths = [
    jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in flat
  ]
  if any(fnmatch.fnmatchcase(path, group.pattern) for path in paths):
    patterns = ', '.join(repr(g.pattern) for g in earlier)
    return (
      f'config.optimizer.groups: earlier patterns ({patterns}) match all '
      f'parameters that {group.pattern!r} matches; put it first'
    )
  similar = nearest(group.pattern, paths) or paths[0]
  return (
    f'config.optimizer.groups: no trained parameter matches {group.pattern!r}; '
    f'paths are like {similar!r}'
  )

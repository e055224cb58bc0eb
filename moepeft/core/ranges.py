# SPDX-License-Identifier: Apache-2.0
"""Ranges of numbers and sets of names for options.

Every number and every enumerated text that a user sets has one of these: config
keys in `moepeft.config.ranges`, options of methods and routers in the fields of
their modules, with the default.
"""

import dataclasses
import difflib
import math
import numbers
from collections.abc import Iterable
from typing import Any

# Of jax.random.key, which silently drops the upper bits of larger seeds.
MAX_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Range:
  """Numbers from `low` to `high`.

  Attributes:
    low, high: the bounds, included unless `above` or `below` is set.
    above: whether `low` is excluded.
    below: whether `high` is excluded.
    infinite: whether infinity is allowed too.
    note: the reason, as the end of a sentence.
  """

  low: float
  high: float
  above: bool = False
  below: bool = False
  infinite: bool = False
  note: str = ''

  def __contains__(self, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
      return False
    if value == math.inf:
      return self.infinite
    low = value > self.low if self.above else value >= self.low
    high = value < self.high if self.below else value <= self.high
    return low and high

  def __str__(self) -> str:
    low = f'{"above" if self.above else "at least"} {_number(self.low)}'
    high = f'{"below" if self.below else "at most"} {_number(self.high)}'
    or_infinite = ', or inf' if self.infinite else ''
    return f'{low} and {high}{or_infinite}{self.note and f": {self.note}"}'

  def check(self, name: str, value: Any) -> None:
    """
    Raises:
      ValueError: the value is out of range; the message begins with `name`.
    """
    if not _is_traced(value) and value not in self:
      raise ValueError(f'{name} is {self}; got {short_repr(value)}')


@dataclasses.dataclass(frozen=True)
class Choices:
  """The allowed values of an enumerated text."""

  names: tuple[str, ...]

  def __contains__(self, value: Any) -> bool:
    return isinstance(value, str) and value in self.names

  def check(self, name: str, value: Any) -> None:
    """
    Raises:
      ValueError: the value is none of the names; the message begins with
        `name`, lists them and suggests the nearest.
    """
    if value not in self:
      listed = ', '.join(choice or "''" for choice in self.names)
      raise ValueError(
        f'{name} is one of {listed}; got {short_repr(value)}'
        f'{suggestion(value, self.names)}'
      )


@dataclasses.dataclass(frozen=True)
class IntegerList:
  """Lists of at least one integer, each in a range, or names of such lists."""

  each: Range
  names: tuple[str, ...] = ()

  def __contains__(self, value: Any) -> bool:
    if isinstance(value, str):
      return value in self.names
    return (
      isinstance(value, tuple)
      and bool(value)
      and all(type(v) is int and v in self.each for v in value)
    )

  def __str__(self) -> str:
    names = f', or one of {", ".join(self.names)}' if self.names else ''
    return f'a list of integers, each {self.each}{names}'

  def check(self, name: str, value: Any) -> None:
    """
    Raises:
      ValueError: the value is no such list; the message begins with `name`.
    """
    if value not in self:
      raise ValueError(f'{name} is {self}; got {short_repr(value)}')


@dataclasses.dataclass(frozen=True)
class Texts:
  """Lists of at least one text.

  Attributes:
    kind: the noun for the texts in messages.
    example: a list, for messages.
  """

  kind: str = 'paths'
  example: str = "['runs/a/adapter']"

  def check(self, name: str, value: Any) -> None:
    """
    Raises:
      ValueError: the value is no such list; the message begins with `name`.
    """
    is_list = isinstance(value, tuple) and bool(value)
    if not is_list or not all(isinstance(v, str) and v for v in value):
      raise ValueError(
        f'{name} is a list of {self.kind} like {self.example}; got '
        f'{short_repr(value)}'
      )


def option(
  default: Any,
  allowed: Range | Choices | IntegerList | Texts | None,
  training_only: bool = False,
) -> Any:
  """A dataclass field with its default and its allowed values.

  Args:
    training_only: whether the option changes training only, not the function
      of the trained parameters: noise, initialization, whether to train.
  """
  metadata = {'allowed': allowed, 'training_only': training_only}
  return dataclasses.field(default=default, metadata=metadata)


def is_zero(value: Any) -> bool:
  """Whether a setting is 0, so that its term is left out of a program.

  A setting that is an argument of the program never is.
  """
  return not _is_traced(value) and value == 0


def _is_traced(value: Any) -> bool:
  """Whether a setting is an array of JAX, whose value a trace does not have."""
  return hasattr(value, 'aval')


def nearest(name: Any, names: Iterable[str]) -> str:
  """The known name that is most similar to a wrong one, or ''."""
  # Long texts are slow to compare and similar to no name.
  close = difflib.get_close_matches(str(name)[:100], list(names), 1, 0.6)
  return close[0] if close else ''


def suggestion(name: Any, names: Iterable[str]) -> str:
  """The end of a message, "; did you mean 'adamw'?", or ''."""
  close = nearest(name, names)
  return f'; did you mean {close!r}?' if close else ''


def short_repr(value: Any, max_length: int = 80) -> str:
  """The repr of a value for a message, truncated if it is long."""
  try:
    text = repr(value)
  except ValueError:  # an integer of more than 4,300 digits
    return 'a number of more than 4,300 digits'
  return text if len(text) <= max_length else f'{text[:max_length]}...'


def _number(value: float) -> str:
  return f'{value:,}' if isinstance(value, int) else f'{value:g}'

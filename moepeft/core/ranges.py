# SPDX-License-Identifier: Apache-2.0
"""Ranges of numbers and sets of names that options may take.

Every number and every enumerated text that a user gives has one of these beside
its default: keys of a config in `moepeft.config.ranges`, options of methods and
routers in the fields of their modules.
"""

import dataclasses
import difflib
import math
import numbers
from collections.abc import Iterable
from typing import Any

# Seeds of jax.random.key: larger ones lose their upper bits without a word.
MAX_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Range:
  """Numbers from `low` to `high`.

  Attributes:
    low, high: the ends, allowed themselves unless `above` or `below` is set.
    above: whether `low` itself is excluded.
    below: whether `high` itself is excluded.
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
      ValueError: the value is outside; the message begins with `name`.
    """
    if value not in self:
      raise ValueError(f'{name} is {self}; got {shortened(value)}')


@dataclasses.dataclass(frozen=True)
class Choices:
  """The names that a text may be; '' is one where it is listed."""

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
        f'{name} is one of {listed}; got {shortened(value)}'
        f'{suggestion(value, self.names)}'
      )


@dataclasses.dataclass(frozen=True)
class IntegerList:
  """Lists of integers, one at least, each of a range; or names of lists."""

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
      raise ValueError(f'{name} is {self}; got {shortened(value)}')


@dataclasses.dataclass(frozen=True)
class Texts:
  """Lists of texts, one at least.

  Attributes:
    kind, example: for messages, what the texts are, and such a list.
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
        f'{shortened(value)}'
      )


def option(
  default: Any,
  allowed: Range | Choices | IntegerList | Texts | None,
  training_only: bool = False,
) -> Any:
  """A field of a module with the values that it may take beside its default.

  Args:
    training_only: whether it changes training alone, not the function that is
      trained: noise, where a parameter starts and whether it is trained.
  """
  metadata = {'allowed': allowed, 'training_only': training_only}
  return dataclasses.field(default=default, metadata=metadata)


def nearest(name: Any, names: Iterable[str]) -> str:
  """The known name that is most like a wrong one, or ''."""
  # Long texts take time to compare and are like nothing.
  close = difflib.get_close_matches(str(name)[:100], list(names), 1, 0.6)
  return close[0] if close else ''


def suggestion(name: Any, names: Iterable[str]) -> str:
  """The end of a message, "; did you mean 'adamw'?", or ''."""
  close = nearest(name, names)
  return f'; did you mean {close!r}?' if close else ''


def shortened(value: Any, most: int = 80) -> str:
  """A value as a message shows it: its repr, cut where it is long."""
  try:
    text = repr(value)
  except ValueError:  # an integer of more than 4,300 digits
    return 'a number of more than 4,300 digits'
  return text if len(text) <= most else f'{text[:most]}...'


def _number(value: float) -> str:
  return f'{value:,}' if isinstance(value, int) else f'{value:g}'

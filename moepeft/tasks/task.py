# SPDX-License-Identifier: Apache-2.0
"""A task: a function that draws instances, and templates that render them."""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from moepeft.tasks.stable_random import StableRandom

_HELD_OUT_DIVISOR = 10


@dataclasses.dataclass(frozen=True)
class Example:
  """A rendered example; evaluation ranks its choices.

  Attributes:
    task: the task's name.
    template: the template's name.
    idx: the index in the stream of `moepeft.tasks.example`.
    inputs: text of at most 160 bytes.
    targets: the answer `choices[label]`, at most 16 bytes.
    choices: 2 to 4 distinct answers in random order.
    label: the index of the right answer in `choices`.
    embedding: a vector for routers, float32 [i]; None for none.
  """

  task: str
  template: str
  idx: int
  inputs: str
  targets: str
  choices: tuple[str, ...]
  label: int
  embedding: np.ndarray | None = dataclasses.field(
    default=None, compare=False, repr=False
  )


class Instance(NamedTuple):
  """An instance of a task before a template renders it.

  Attributes:
    fields: {name: text} for the templates. They identify the instance: draws
      with equal fields have the same answer and are in the same split.
    answer: the right answer.
    distractors: wrong answers.
  """

  fields: dict[str, str]
  answer: str
  distractors: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Template:
  """A prompt template.

  Attributes:
    name: unique in the task.
    text: a `str.format` string with the instance's fields; `{options}` lists
      the choices.
    verbalizer: pairs (answer of the task, text in this template); other answers
      are their own text.
  """

  name: str
  text: str
  verbalizer: tuple[tuple[str, str], ...] = ()

  def render(
    self, instance: Instance, order: Sequence[str]
  ) -> tuple[str, tuple[str, ...]]:
    """Returns (inputs, choices).

    Args:
      order: the answers of the task in the order of the choices.
    """
    verbalizer = dict(self.verbalizer)
    choices = tuple(verbalizer.get(answer, answer) for answer in order)
    inputs = self.text.format(**instance.fields, options=', '.join(choices))
    return inputs, choices


@dataclasses.dataclass(frozen=True)
class Task:
  """A registry entry of a task.

  Attributes:
    name: unique among the tasks.
    group: 'A' (for pretraining), 'B' (for adaptation), 'C' (for evaluation
      only), or '' for a task that is selected only by its name.
    draw: draws an instance of either split.
    templates: all templates.
    held_out: the number of templates, the last ones, that are not trained on.
  """

  name: str
  group: str
  draw: Callable[[StableRandom], Instance]
  templates: tuple[Template, ...]
  held_out: int = 1

  def templates_of(self, split: str) -> tuple[Template, ...]:
    """Returns the templates of 'train', 'held_out' or 'all'."""
    train_count = len(self.templates) - self.held_out
    by_split = {
      'train': self.templates[:train_count],
      'held_out': self.templates[train_count:],
      'all': self.templates,
    }
    if split not in by_split:
      raise ValueError(
        f'templates are one of {", ".join(by_split)}; got {split!r}'
      )
    return by_split[split]

  def split_of(self, instance: Instance) -> str:
    """Returns 'held_out' for a fixed tenth of the instances, otherwise 'train'.

    It is a hash of the fields, so that the splits share no instance for any
    seed, template or order of the choices.
    """
    fields = instance.fields
    key = '|'.join((self.name, *(fields[name] for name in sorted(fields))))
    held_out = zlib.crc32(key.encode()) % _HELD_OUT_DIVISOR == 0
    return 'held_out' if held_out else 'train'

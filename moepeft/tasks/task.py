# SPDX-License-Identifier: Apache-2.0
"""A task: a draw of instances, and templates that word them."""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from moepeft.tasks.dice import Dice

_HELD_OUT_ONE_IN = 10


@dataclasses.dataclass(frozen=True)
class Example:
  """One rendered example, scored by ranking its choices.

  Attributes:
    task: the task's name.
    template: the template's name.
    idx: the index in the stream that `example` was asked for.
    inputs: text, at most 160 bytes.
    targets: the answer, at most 16 bytes; equals `choices[label]`.
    choices: 2 to 4 distinct answers in random order.
    label: the place of the answer among the choices.
  """

  task: str
  template: str
  idx: int
  inputs: str
  targets: str
  choices: tuple[str, ...]
  label: int


class Instance(NamedTuple):
  """One instance before it is worded.

  `fields` fill the templates and say which instance it is: two draws with
  equal fields are the same instance and have the same answer.
  """

  fields: dict[str, str]
  answer: str
  distractors: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Template:
  """One wording.

  Attributes:
    name: unique in the task.
    text: a `str.format` text over the fields; `{options}` lists the choices.
    words: verbaliser, pairs (answer of the task, its wording here); other
      answers are worded as they are.
  """

  name: str
  text: str
  words: tuple[tuple[str, str], ...] = ()

  def render(
    self, instance: Instance, order: Sequence[str]
  ) -> tuple[str, tuple[str, ...]]:
    """The inputs and the choices, the latter in the given order of answers."""
    words = dict(self.words)
    choices = tuple(words.get(answer, answer) for answer in order)
    inputs = self.text.format(**instance.fields, options=', '.join(choices))
    return inputs, choices


@dataclasses.dataclass(frozen=True)
class Task:
  """The entry of a task: instances, and templates of which some are held out.

  Attributes:
    name: unique among the tasks.
    group: 'A' (bases are pretrained on it), 'B' (methods adapt to it), 'C'
      (never trained on), or '' for a task that is selected by name alone.
    draw: one instance from the dice, over both splits.
    templates: all wordings.
    held_out: how many of the last templates are never trained on.
  """

  name: str
  group: str
  draw: Callable[[Dice], Instance]
  templates: tuple[Template, ...]
  held_out: int = 1

  def templates_of(self, split: str) -> tuple[Template, ...]:
    """The templates of 'train', 'held_out' or 'all'."""
    cut = len(self.templates) - self.held_out
    parts = {
      'train': self.templates[:cut],
      'held_out': self.templates[cut:],
      'all': self.templates,
    }
    if split not in parts:
      raise ValueError(
        f'templates are one of {", ".join(parts)}; got {split!r}'
      )
    return parts[split]

  def split_of(self, instance: Instance) -> str:
    """'held_out' for a fixed tenth of the instances, else 'train'.

    A hash of the fields decides, so the splits share no instance whatever
    the seed, the template or the order of the choices.
    """
    fields = instance.fields
    key = '|'.join((self.name, *(fields[name] for name in sorted(fields))))
    held_out = zlib.crc32(key.encode()) % _HELD_OUT_ONE_IN == 0
    return 'held_out' if held_out else 'train'

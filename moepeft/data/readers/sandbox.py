# SPDX-License-Identifier: Apache-2.0
"""Jinja in its sandbox, with the words that promptsource adds to it."""

import collections
import functools
import random
from collections.abc import Sequence
from typing import Any

import jinja2
from jinja2.filters import do_truncate
from jinja2.sandbox import SandboxedEnvironment

SEPARATOR = '|||'
# What stands for it while a template is rendered, so that the separator in a
# row's own text separates nothing.
MARK = '\x1emoepeft\x1e'
# The variable that `choice` draws from; no template can spell this name.
DICE = ' dice'


class Dice:
  """What the choices of one rendering are drawn from."""

  def __init__(self, key: str):
    self._key = key
    self._random = None

  def choice(self, items: Sequence) -> Any:
    if self._random is None:
      # Made here: most templates draw nothing, and seeding takes longer than
      # rendering.
      self._random = random.Random(self._key)
    return self._random.choice(items)


@jinja2.pass_context
def _choice(context: jinja2.runtime.Context, items: Sequence) -> Any:
  return context.resolve(DICE).choice(items)


def _most_frequent(items: Sequence) -> list | None:
  """All items that occur as often as the one that occurs most."""
  counts = collections.Counter(items)
  most = max(counts.values(), default=0)
  return [i for i, count in counts.items() if count == most] or None


@functools.cache
def _environment(longest: int) -> SandboxedEnvironment:
  """Jinja with promptsource's words; values longer than this are cut."""

  @jinja2.pass_environment
  def printed(environment: jinja2.Environment, value: Any) -> str:
    if value is None:
      raise jinja2.UndefinedError('a null has no text to print')
    text = str(value)
    return do_truncate(environment, text, longest) if longest else text

  environment = SandboxedEnvironment(
    undefined=jinja2.StrictUndefined, finalize=printed
  )
  environment.globals['zip'] = zip
  # Jinja's own `random` and `lipsum` draw from what no seed of ours sets.
  environment.filters['choice'] = environment.filters['random'] = _choice
  del environment.globals['lipsum']
  environment.filters['most_frequent'] = _most_frequent
  return environment


@functools.lru_cache(maxsize=4096)
def compiled(text: str, longest: int) -> jinja2.Template:
  """A text as a program whose rendering has `MARK` where it has `|||`.

  Args:
    text: in Jinja.
    longest: characters that a printed value is cut to; 0 for no end.

  Raises:
    jinja2.TemplateError: it is not Jinja.
  """
  return _environment(longest).from_string(text.replace(SEPARATOR, MARK))

# SPDX-License-Identifier: Apache-2.0
"""The card of a checkpoint: its run, a hash of each array, its own hash."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from moepeft.checkpoints import adapter as adapter_lib
from moepeft.checkpoints.run_progress import Course
from moepeft.core.types import Tree
from moepeft.core.untrusted import Malformed, field
from moepeft.models import weight_mapping
from moepeft.peft import Built

_TYPES = (
  ('method', str),
  ('semantics', str),
  ('trainable', str),
  ('step', int),
  ('base', dict),
  ('hashes', dict),
  ('course', dict),
)


def card(base: Any, built: Built, seed: int) -> dict[str, Any]:
  """A run's identity as JSON: method, semantics, base and seed."""
  described = adapter_lib.describe(
    built.method,
    built.semantics,
    base.path,
    base.sha256,
    base.config.family,
    base.config,
    base.quantise,
  )
  named = described | {'trainable': built.trainable, 'seed': seed}
  # Fields that are tuples are lists in the card that is read back.
  return json.loads(json.dumps(named))


def seal(card: Mapping[str, Any]) -> str:
  """The SHA-256 of a card without its own entry 'sha256'."""
  bare = {key: value for key, value in card.items() if key != 'sha256'}
  return hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()


def check(card: Any) -> None:
  """
  Raises:
    Malformed: the card differs from its hash, or an entry is of another type
      than a run writes.
  """
  sha256 = field(card, 'sha256', str, '')
  if sha256 != seal(card):
    raise Malformed('its card differs from its hash')
  for key, kind in _TYPES:
    field(card, key, kind)
  field(card, 'base.sha256', str, None)
  field(card, 'base.quantise', str, None)
  for digest in card['hashes'].values():
    field({'hashes': digest}, 'hashes', str)
  course(card)


def course(card: Mapping[str, Any]) -> Course:
  """The course of a run up to its checkpoint.

  Raises:
    Malformed: an entry is of another type than a run writes.
  """
  value = card['course']
  place = []
  for pair in field(value, 'place', list):
    if not isinstance(pair, list) or [*map(type, pair)] != [int, int]:
      raise Malformed(f"expected pairs of integers in 'place', got {pair!r}")
    place.append(tuple(pair))
  return Course(
    place=tuple(place),
    best=field(value, 'best', float, None),
    best_step=field(value, 'best_step', int),
    waited=field(value, 'waited', int),
  )


def hashes(parts: Tree) -> dict[str, str]:
  """{path: hash} of every array; optimizer states are no plain dicts."""
  return {
    jax.tree_util.keystr(
      path, simple=True, separator='/'
    ): weight_mapping.array_hash(np.asarray(leaf))
    for path, leaf in jax.tree_util.tree_flatten_with_path(parts)[0]
  }


def verify(parts: Mapping[str, Tree], expected: Mapping[str, str]) -> None:
  """Compares arrays with their hashes.

  Args:
    parts: {'trainable': tree, 'rest': tree}, or one of them.
    expected: the card's hashes, of all parts.

  Raises:
    Malformed: an array differs from its hash, has none, or is absent.
  """
  read = hashes(parts)
  for name, digest in read.items():
    if digest != expected.get(name):
      raise Malformed(f'{name} differs from its hash')
  for name in expected:
    if name.partition('/')[0] in parts and name not in read:
      raise Malformed(f'{name} is absent')

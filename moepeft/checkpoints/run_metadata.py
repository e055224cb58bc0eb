# SPDX-License-Identifier: Apache-2.0
"""Metadata of a checkpoint: its run, a checksum of each array, its own hash."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from moepeft.checkpoints import adapter as adapter_lib
from moepeft.checkpoints.checksums import checksums
from moepeft.checkpoints.run_progress import RunProgress
from moepeft.core.sharding import gather
from moepeft.core.types import Tree
from moepeft.core.untrusted import Malformed, field
from moepeft.models import weight_mapping
from moepeft.peft import Built
from moepeft.peft.method_text import portable_text

_TYPES = (
  ('method', str),
  ('semantics', str),
  ('trainable', str),
  ('step', int),
  ('base', dict),
  ('course', dict),
)

# Entries that a run must share with the checkpoint that it resumes.
_SAME = ('method', 'semantics', 'trainable', 'seed', 'model', 'experts')


def describe_run(
  base: Any,
  built: Built,
  seed: int,
  experts: Sequence[Mapping[str, str]] = (),
) -> dict[str, Any]:
  """A run's identity as JSON: method, semantics, base and seed.

  Args:
    experts: {'path', 'sha256'} of each file that an expert was read from.
  """
  described = adapter_lib.describe(
    portable_text(built.method),
    built.semantics,
    base.path,
    base.sha256,
    base.config.family,
    base.config,
    base.quantise,
  )
  if experts:
    described['experts'] = list(experts)
  named = described | {'trainable': built.trainable, 'seed': seed}
  # Fields that are tuples are lists in the metadata that are read back.
  return json.loads(json.dumps(named))


def seal(metadata: Mapping[str, Any]) -> str:
  """The SHA-256 of metadata without its own entry 'sha256'."""
  bare = {key: value for key, value in metadata.items() if key != 'sha256'}
  return hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()


def check(metadata: Any) -> None:
  """
  Raises:
    Malformed: the metadata differ from their hash, or an entry is of another
      type than a run writes.
  """
  sha256 = field(metadata, 'sha256', str, '')
  if sha256 != seal(metadata):
    raise Malformed('its metadata differ from their hash')
  for key, kind in _TYPES:
    field(metadata, key, kind)
  field(metadata, 'base.sha256', str, None)
  field(metadata, 'base.quantise', str, None)
  for digest in _digests(metadata).values():
    field({'checksums': digest}, 'checksums', str)
  run_progress(metadata)


def run_progress(metadata: Mapping[str, Any]) -> RunProgress:
  """The progress of a run up to its checkpoint.

  Raises:
    Malformed: an entry is of another type than a run writes.
  """
  value = metadata['course']
  place = []
  for pair in field(value, 'place', list):
    if not isinstance(pair, list) or [*map(type, pair)] != [int, int]:
      raise Malformed(f"expected pairs of integers in 'place', got {pair!r}")
    place.append(tuple(pair))
  return RunProgress(
    place=tuple(place),
    best=field(value, 'best', float, None),
    best_step=field(value, 'best_step', int),
    waited=field(value, 'waited', int),
  )


def check_same_run(
  path: str, read: Mapping[str, Any], described: Mapping[str, Any]
) -> None:
  """Compares a checkpoint's metadata with those of the run that resumes it.

  Args:
    path: the run's directory of checkpoints, for messages.
    read: of the checkpoint; described: of the run, from `describe_run`.

  Raises:
    ValueError: the checkpoint belongs to another run.
  """
  for key in _SAME:
    if read.get(key) != described.get(key):
      raise ValueError(
        f'{path} belongs to another run: its {key} is '
        f'{read.get(key)!r}, this run has {described.get(key)!r}; choose '
        'another --workdir, or set the config back'
      )
  if read['base'].get('sha256') != described['base']['sha256']:
    raise ValueError(
      f'{path} belongs to a run on another base than '
      f'{described["base"]["path"]!r} (their content hashes differ); set '
      'config.model.path to its own, or choose another --workdir'
    )
  before, now = (
    metadata['base'].get('quantise', '') for metadata in (read, described)
  )
  if before != now:
    raise ValueError(
      f'{path} belongs to a run with config.model.quantize={before!r}, '
      f'this run has {now!r}; set it back, or choose another --workdir'
    )


def verify(parts: Mapping[str, Tree], metadata: Mapping[str, Any]) -> None:
  """Compares arrays with their checksums.

  Args:
    parts: {'trainable': tree, 'rest': tree}, or one of them.
    metadata: of the checkpoint; its checksums are of all parts.

  Raises:
    Malformed: an array differs from its checksum, has none, or is absent.
  """
  expected = _digests(metadata)
  read = checksums(parts) if 'checksums' in metadata else _hashes(parts)
  for name, digest in read.items():
    if digest != expected.get(name):
      raise Malformed(f'{name} differs from its checksum')
  for name in expected:
    if name.partition('/')[0] in parts and name not in read:
      raise Malformed(f'{name} is absent')


def _digests(metadata: Mapping[str, Any]) -> dict[str, str]:
  """{path: digest}; checkpoints of version 0.1 have SHA-256 of the arrays."""
  return field(
    metadata, 'hashes' if 'hashes' in metadata else 'checksums', dict
  )


def _hashes(parts: Tree) -> dict[str, str]:
  """{path: SHA-256}, as version 0.1 wrote them."""
  return {
    jax.tree_util.keystr(
      path, simple=True, separator='/'
    ): weight_mapping.array_hash(leaf)
    for path, leaf in jax.tree_util.tree_flatten_with_path(gather(parts))[0]
  }

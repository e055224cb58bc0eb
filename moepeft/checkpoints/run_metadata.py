# SPDX-License-Identifier: Apache-2.0
"""Metadata of a checkpoint: run identity, array checksums, a hash of itself."""

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

# Entries that must be equal in a run and the checkpoint that it resumes.
_IDENTITY_KEYS = (
  'method',
  'semantics',
  'trainable',
  'seed',
  'model',
  'experts',
)


def describe_adapter(base: Any, built: Built) -> dict[str, Any]:
  """The metadata of an adapter of a base, for `adapter.save`."""
  return adapter_lib.describe(
    portable_text(built.method),
    built.semantics,
    base.path,
    base.sha256,
    base.config.family,
    base.config,
    base.quantise,
  )


def describe_run(
  base: Any,
  built: Built,
  seed: int,
  experts: Sequence[Mapping[str, str]] = (),
) -> dict[str, Any]:
  """A run's identity as JSON: method, semantics, base and seed.

  Args:
    experts: {'path', 'sha256'} of each file of a pretrained expert.
  """
  identity = describe_adapter(base, built)
  if experts:
    identity['experts'] = list(experts)
  identity |= {'trainable': built.trainable, 'seed': seed}
  # Through JSON, which turns tuples into lists as in restored metadata.
  return json.loads(json.dumps(identity))


def metadata_hash(metadata: Mapping[str, Any]) -> str:
  """The SHA-256 of metadata without its own entry 'sha256'."""
  content = {key: value for key, value in metadata.items() if key != 'sha256'}
  return hashlib.sha256(
    json.dumps(content, sort_keys=True).encode()
  ).hexdigest()


def check(metadata: Any) -> None:
  """
  Raises:
    Malformed: the metadata differ from their hash, or an entry has a wrong
      type.
  """
  sha256 = field(metadata, 'sha256', str, '')
  if sha256 != metadata_hash(metadata):
    raise Malformed('its metadata differ from their hash')
  for key, kind in _TYPES:
    field(metadata, key, kind)
  field(metadata, 'base.sha256', str, None)
  field(metadata, 'base.quantise', str, None)
  for digest in _digests(metadata).values():
    field({'checksums': digest}, 'checksums', str)
  run_progress(metadata)


def run_progress(metadata: Mapping[str, Any]) -> RunProgress:
  """The progress of a run at its checkpoint.

  Raises:
    Malformed: an entry has a wrong type.
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
  path: str, metadata: Mapping[str, Any], identity: Mapping[str, Any]
) -> None:
  """Compares a checkpoint's metadata with those of the run that resumes it.

  Args:
    path: the run's directory of checkpoints, for messages.
    metadata: of the checkpoint.
    identity: of the run, from `describe_run`.

  Raises:
    ValueError: the checkpoint belongs to another run.
  """
  for key in _IDENTITY_KEYS:
    if metadata.get(key) != identity.get(key):
      raise ValueError(
        f'{path} belongs to another run: its {key} is '
        f'{metadata.get(key)!r}, this run has {identity.get(key)!r}; choose '
        'another --workdir, or set the config back'
      )
  if metadata['base'].get('sha256') != identity['base']['sha256']:
    raise ValueError(
      f'{path} belongs to a run on another base than '
      f'{identity["base"]["path"]!r} (their content hashes differ); set '
      'config.model.path to that base, or choose another --workdir'
    )
  old, new = (m['base'].get('quantise', '') for m in (metadata, identity))
  if old != new:
    raise ValueError(
      f'{path} belongs to a run with config.model.quantize={old!r}, '
      f'this run has {new!r}; set it back, or choose another --workdir'
    )


def verify(parts: Mapping[str, Tree], metadata: Mapping[str, Any]) -> None:
  """Compares arrays with their checksums.

  Args:
    parts: {'trainable': tree, 'rest': tree}, or one of them.
    metadata: of the checkpoint, with the checksums of all parts.

  Raises:
    Malformed: an array differs from its checksum, has none, or is missing.
  """
  expected = _digests(metadata)
  actual = checksums(parts) if 'checksums' in metadata else _hashes(parts)
  for name, digest in actual.items():
    if digest != expected.get(name):
      raise Malformed(f'{name} differs from its checksum')
  for name in expected:
    if name.partition('/')[0] in parts and name not in actual:
      raise Malformed(f'{name} is absent')


def _digests(metadata: Mapping[str, Any]) -> dict[str, str]:
  """{path: digest}; checkpoints of version 0.1 have SHA-256 of the arrays."""
  return field(
    metadata, 'hashes' if 'hashes' in metadata else 'checksums', dict
  )


def _hashes(parts: Tree) -> dict[str, str]:
  """{path: SHA-256}, as version 0.1 wrote it."""
  return {
    jax.tree_util.keystr(
      path, simple=True, separator='/'
    ): weight_mapping.array_hash(leaf)
    for path, leaf in jax.tree_util.tree_flatten_with_path(gather(parts))[0]
  }

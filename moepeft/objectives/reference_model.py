# SPDX-License-Identifier: Apache-2.0
"""The reference model of preference objectives: the base, frozen adapters, or
log-likelihoods that were computed before training."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moepeft.checkpoints import base as base_lib
from moepeft.core import distributed, files, untrusted
from moepeft.core.disk import tell_full_disk
from moepeft.core.progress import Pass
from moepeft.core.sharding import gather, round_up, shard_whole_batch
from moepeft.core.types import Array, Batch, Tree
from moepeft.data.preference.dataset import PairCollator, PreferenceDataset
from moepeft.models import weight_mapping
from moepeft.nn import initializers as start
from moepeft.nn.adapter_hook import Advice
from moepeft.objectives.paired_batch import (
  ReferenceFn,
  stack_sides,
  token_logps,
)
from moepeft.peft import Built, build
from moepeft.runs.run import Run

BASE, PRECOMPUTED = 'base', 'precomputed'


def make_reference(
  source: str, model: Any, built: Built, base: base_lib.Base
) -> tuple[ReferenceFn | None, Tree]:
  """The reference model of a run, and the adapters that it needs.

  It is the frozen base with other adapters than the policy's, without dropout:
  one more pass of the same weights, and no copy of them.

  Args:
    source: config.preference.reference.
    model, built: the policy and its method.

  Returns:
    (variables, rows) -> log p of each target, 0 where there is none, [b, t],
    and a tree that is to be `variables['reference']`; (None, {}) where batches
    bring what was computed before.

  Raises:
    ValueError: the base itself is trained, so that nothing of it stays; or
      the path holds no adapter of this base.
  """
  if source == PRECOMPUTED:
    return None, {}
  if built.trainable == 'params':
    raise ValueError(
      f'{built.method} changes the base, which config.preference.reference='
      f"{source!r} would measure against; set it to 'precomputed'"
    )
  if source == BASE:
    return reference_fn(model.clone(advice=Advice())), {}
  if not os.path.isdir(os.path.expanduser(source)):
    raise ValueError(
      f'config.preference.reference={source!r} is no directory; name a run, an '
      f'adapter that python -m moepeft.convert wrote, {BASE!r} or '
      f'{PRECOMPUTED!r}'
    )
  adapter = base_lib.load_adapter(source, base.config)
  semantics = adapter.semantics or built.semantics
  reference = build(adapter.method, base.family.sites(base.config), semantics)
  reference_model = model.clone(advice=reference.advice)
  variables = start.fresh(
    reference_model, base_lib.example_batch(), 0, base.params
  )
  tree = base_lib.with_adapter(variables, reference, source, base)['peft']
  return reference_fn(reference_model), tree


def reference_fn(model: Any) -> ReferenceFn:
  """log p of each target by a model without noise, its adapters those of
  `variables['reference']`."""

  def logps(variables: Tree, rows: Batch) -> Array:
    frozen = {k: v for k, v in variables.items() if k not in _POLICY_KEYS}
    if 'reference' in variables:
      frozen['peft'] = variables['reference']
    return token_logps(model.apply(frozen, rows), rows)

  return logps


_POLICY_KEYS = ('peft', 'reference')


def precomputed(
  workdir: str | None,
  found: PreferenceDataset,
  own: PairCollator,
  model: Any,
  variables: Tree,
  described: Mapping[str, Any],
  mesh: Mesh,
  rows: int,
) -> np.ndarray:
  """log p of every target of every item, by the policy as a run begins.

  They are kept in `<workdir>/reference` with the key of what they are of: the
  base's hash, the adapter's arrays, the method and the data's ids.

  Args:
    workdir: None to keep nothing.
    found, own: the items, and the form of their batches.
    model, variables: the policy at the start, its adapter as it begins.
    described: the checkpoint's card.
    rows: of a batch, rounded up to the mesh's devices.

  Returns:
    float32 [items, k, t], 0 where there is no target; on disk.

  Raises:
    ValueError: others are kept there, of another base, adapter or data.
  """
  folder = workdir and Run(workdir).reference_dir
  card = {'key': _key(found, own, variables, described)}
  if folder and os.path.exists(os.path.join(folder, _CARD)):
    if _kept(folder, _CARD, untrusted.read_json_object) != card:
      raise ValueError(
        f'{folder} was computed of another base, adapter or data than those '
        'of this run; put them back, or choose another --workdir'
      )
    array = _kept(folder, _ARRAY, _mapped)
    expected = (len(found.items), len(own.sides))
    if array.dtype != np.float32 or array.shape[:2] != expected:
      raise _damaged(folder, _ARRAY, f'{array.dtype} {list(array.shape)}')
    return array
  array = _computed(found, own, model, variables, mesh, rows)
  if folder and distributed.first():
    os.makedirs(folder, exist_ok=True)
    with tell_full_disk(folder, lambda: None):
      np.save(os.path.join(folder, _ARRAY), array)
    # Last: without it the array counts as none.
    distributed.write_json(os.path.join(folder, _CARD), card)
  return array


_ARRAY, _CARD = 'log_p.npy', 'card.json'


def _kept(folder: str, name: str, read: Callable[[str], Any]) -> Any:
  path = os.path.join(folder, name)
  try:
    return read(path)
  except (ValueError, EOFError) as e:
    reason = (str(e).splitlines() or [type(e).__name__])[0]
    raise _damaged(folder, name, reason) from None


def _mapped(path: str) -> np.ndarray:
  files.check_file(path)
  return np.load(path, mmap_mode='r', allow_pickle=False)


def _damaged(folder: str, name: str, reason: str) -> ValueError:
  return ValueError(
    f'{folder}/{name} is damaged ({reason}); remove {folder} to compute it '
    'again'
  )


def _key(
  found: PreferenceDataset, own: PairCollator, variables: Tree, described
) -> str:
  start = {
    name: weight_mapping.array_hash(np.asarray(array))
    for name, array in weight_mapping.flatten(
      gather(variables.get('peft', {}))
    ).items()
  }
  base = described['base']['sha256'] or {
    name: weight_mapping.array_hash(np.asarray(array))
    for name, array in weight_mapping.flatten(
      gather(variables['params'])
    ).items()
  }
  lengths, method = own.lengths, described['method']
  parts = [found.sha256, lengths, base, method, start]
  text = json.dumps(parts, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _computed(
  found: PreferenceDataset, own: PairCollator, model, variables, mesh, rows: int
):
  rows = round_up(mesh, rows)

  @jax.jit
  def log_p(variables, batch):
    one = stack_sides(batch, own.sides)
    found = token_logps(model.apply(variables, one), one)
    return found.reshape(-1, len(own.sides), found.shape[-1])

  shown = Pass(len(found.items), 'reference')
  parts = []
  for at in range(0, len(found.items), rows):
    part = found.items[at : at + rows]
    batch = own.pad([*part, *[part[-1]] * (rows - len(part))])
    whole = gather(log_p(variables, shard_whole_batch(mesh, batch)))
    parts.append(whole[: len(part)])
    shown(len(part))
  shown.close()
  return np.concatenate(parts)

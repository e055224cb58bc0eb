# SPDX-License-Identifier: Apache-2.0
"""The reference model of an objective: the base model, the base with another
adapter, or log-probabilities computed before training."""

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
from moepeft.data.batching.router_inputs import RouterInputs
from moepeft.data.preference.dataset import PairCollator, PreferenceDataset
from moepeft.models import weight_mapping
from moepeft.nn import initializers
from moepeft.nn.adapter_hook import AdapterMap
from moepeft.objectives.paired_batch import (
  ReferenceFn,
  stack_sides,
  token_logps,
)
from moepeft.peft import Built, build
from moepeft.runs.run import Run

BASE, PRECOMPUTED = 'base', 'precomputed'


def make_reference(
  source: str,
  model: Any,
  built: Built,
  base: base_lib.Base,
  output: str = 'log_probs',
) -> tuple[ReferenceFn | None, Tree]:
  """Returns the reference model of a run, and its adapter.

  It shares the policy's frozen base weights, so it needs a second forward pass
  but no copy of the weights. It has no dropout.

  Args:
    source: config.preference.reference.
    model, built: the policy and its method.
    output: `ObjectiveSpec.reference_output`.

  Returns:
    (reference function, adapter tree for `variables['reference']`). The
    function maps (variables, rows) to log p of each target [b, t], 0 on
    padding, or to logits [b, t, v]. If the log-probabilities are precomputed,
    (None, {}).

  Raises:
    ValueError: the method trains the base weights, the path has no adapter for
      this base model, or that adapter reads what batches do not have; or the
      logits are those of no adapter.
  """
  if output == 'logits' and source in (BASE, PRECOMPUTED):
    raise ValueError(
      f'config.preference.reference={source!r} is no teacher; set it to the '
      'run, or the exported adapter, whose distribution is learned'
    )
  if source == PRECOMPUTED:
    return None, {}
  if built.trainable == 'params':
    raise ValueError(
      f'{built.method} trains the base model, which the reference '
      f'config.preference.reference={source!r} needs; set it to '
      f'{PRECOMPUTED!r}'
    )
  if source == BASE:
    return reference_fn(model.clone(adapter_map=AdapterMap())), {}
  if not os.path.isdir(os.path.expanduser(source)):
    raise ValueError(
      f'config.preference.reference={source!r} is no directory; name a run, an '
      f'adapter that python -m moepeft.convert wrote, {BASE!r} or '
      f'{PRECOMPUTED!r}'
    )
  adapter = base_lib.load_adapter(source, base.config)
  semantics = adapter.semantics or built.semantics
  reference = build(adapter.method, base.family.sites(base.config), semantics)
  inputs = RouterInputs.of_method(reference.adapter_map)
  if inputs not in (RouterInputs(), RouterInputs.of_method(built.adapter_map)):
    raise ValueError(
      f'config.preference.reference={source!r} has a router of tasks or '
      f'embeddings, which batches for {built.method} do not have; name another'
    )
  reference_model = model.clone(adapter_map=reference.adapter_map)
  variables = initializers.init_params(
    reference_model, base_lib.example_batch(), 0, base.params
  )
  tree = base_lib.with_adapter(variables, reference, source, base)['peft']
  return reference_fn(reference_model, output), tree


def reference_fn(model: Any, output: str = 'log_probs') -> ReferenceFn:
  """Returns (variables, rows) -> log p of each target [b, t], without dropout.

  The model's adapter is `variables['reference']`, or none.

  Args:
    output: 'logits' for those of the whole vocabulary, [b, t, v].
  """

  def evaluate(variables: Tree, rows: Batch) -> Array:
    frozen = {k: v for k, v in variables.items() if k not in _POLICY_KEYS}
    if 'reference' in variables:
      frozen['peft'] = variables['reference']
    logits = model.apply(frozen, rows)
    return logits if output == 'logits' else token_logps(logits, rows)

  return evaluate


_POLICY_KEYS = ('peft', 'reference')


def precompute_logps(
  workdir: str | None,
  preferences: PreferenceDataset,
  collator: PairCollator,
  model: Any,
  variables: Tree,
  run_metadata: Mapping[str, Any],
  mesh: Mesh,
  rows: int,
) -> np.ndarray:
  """Computes log p of all targets with the policy at the start of training.

  The array is cached in `<workdir>/reference` with a hash of its inputs: the
  base, the adapter's arrays, the method and the data's token ids.

  Args:
    workdir: None for no cache.
    preferences, collator: the items, and the collator of their batches.
    model, variables: the policy and its variables at the start of training.
    run_metadata: from `checkpoints.run_metadata`.
    rows: batch size, which is rounded up to a multiple of the devices.

  Returns:
    float32 [items, k, t], 0 on padding; memory-mapped if it was cached.

  Raises:
    ValueError: the cached array is damaged, or of another base, adapter or
      data.
  """
  folder = workdir and Run(workdir).reference_dir
  metadata = {'key': _cache_key(preferences, collator, variables, run_metadata)}
  if folder and os.path.exists(os.path.join(folder, _METADATA_FILE)):
    if _read(folder, _METADATA_FILE, untrusted.read_json_object) != metadata:
      raise ValueError(
        f'{folder} was computed with another base, adapter or data than those '
        'of this run; restore them, or choose another --workdir'
      )
    array = _read(folder, _ARRAY_FILE, _read_array)
    expected = (len(preferences.items), len(collator.sides))
    if array.dtype != np.float32 or array.shape[:2] != expected:
      raise _damaged_error(
        folder, _ARRAY_FILE, f'{array.dtype} {list(array.shape)}'
      )
    return array
  array = _compute_logps(preferences, collator, model, variables, mesh, rows)
  if folder and distributed.first():
    os.makedirs(folder, exist_ok=True)
    with tell_full_disk(folder, lambda: None):
      np.save(os.path.join(folder, _ARRAY_FILE), array)
    # Written last, because the array is valid only with its metadata.
    distributed.write_json(os.path.join(folder, _METADATA_FILE), metadata)
  return array


_ARRAY_FILE, _METADATA_FILE = 'log_p.npy', 'card.json'


def _read(folder: str, name: str, read: Callable[[str], Any]) -> Any:
  path = os.path.join(folder, name)
  try:
    return read(path)
  except (ValueError, EOFError) as e:
    reason = (str(e).splitlines() or [type(e).__name__])[0]
    raise _damaged_error(folder, name, reason) from None


def _read_array(path: str) -> np.ndarray:
  files.check_file(path)
  return np.load(path, mmap_mode='r', allow_pickle=False)


def _damaged_error(folder: str, name: str, reason: str) -> ValueError:
  return ValueError(
    f'{folder}/{name} is damaged ({reason}); remove {folder} to compute it '
    'again'
  )


def _cache_key(
  preferences: PreferenceDataset,
  collator: PairCollator,
  variables: Tree,
  run_metadata,
) -> str:
  adapter = {
    name: weight_mapping.array_hash(np.asarray(array))
    for name, array in weight_mapping.flatten(
      gather(variables.get('peft', {}))
    ).items()
  }
  base = run_metadata['base']['sha256'] or {
    name: weight_mapping.array_hash(np.asarray(array))
    for name, array in weight_mapping.flatten(
      gather(variables['params'])
    ).items()
  }
  lengths, method = collator.lengths, run_metadata['method']
  parts = [preferences.sha256, lengths, base, method, adapter]
  text = json.dumps(parts, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _compute_logps(
  preferences: PreferenceDataset,
  collator: PairCollator,
  model,
  variables,
  mesh,
  rows: int,
):
  rows = round_up(mesh, rows)

  @jax.jit
  def compute(variables, batch):
    sides = stack_sides(batch, collator.sides)
    logps = token_logps(model.apply(variables, sides), sides)
    return logps.reshape(-1, len(collator.sides), logps.shape[-1])

  progress = Pass(len(preferences.items), 'reference')
  parts = []
  for first in range(0, len(preferences.items), rows):
    items = preferences.items[first : first + rows]
    batch = collator.pad([*items, *[items[-1]] * (rows - len(items))])
    logps = gather(compute(variables, shard_whole_batch(mesh, batch)))
    parts.append(logps[: len(items)])
    progress(len(items))
  progress.close()
  return np.concatenate(parts)

# SPDX-License-Identifier: Apache-2.0
"""Reads and writes adapters of `peft`: LoRA, DoRA, (IA)^3, prompt tuning.

An adapter is a directory with adapter_config.json and
adapter_model.safetensors. (IA)^3 on the input of `wo`, one of peft's
`feedforward_modules`, is moepeft's `ia3` at the site */mlp/hidden; on the input
of other modules it is `ia3(on='input')`. The model family names the modules.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from moepeft.checkpoints import directory
from moepeft.checkpoints.adapter import (
  AdapterWeights,
  instances,
  site_patterns,
  sites_in,
)
from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.hf import peft_config, peft_lora, peft_prompt
from moepeft.checkpoints.hf.peft_names import PREFIX, module_of, unique_module
from moepeft.config import method_string
from moepeft.config.method_string import Spec
from moepeft.models import weight_mapping
from moepeft.models.weight_mapping import CheckpointError, Entry, Rule, Shape
from moepeft.peft.methods.ia3 import Ia3

ARRAYS, CONFIG = 'adapter_model.safetensors', peft_config.FILE
_PICKLE = 'adapter_model.bin'
_IA3_SUFFIX = '.ia3_l'


def load(path: str, config: Any, dtype: Any = 'float32') -> AdapterWeights:
  """Reads an adapter's method and 'peft' tree.

  Arrays of layers without a LoRA are zeros, whose gradients are zero, too;
  arrays of layers without (IA)^3 are ones.

  Args:
    config: the base model's config, which the adapter's files lack.
    dtype: the dtype of the result; None keeps the file's.

  Raises:
    CheckpointError: a file is damaged, the adapter is not supported, or its
      names or shapes do not match the model.
  """
  fields, family = peft_config.read(path), hf.family_of(config)
  tensors = _open_tensors(Path(path))
  if fields['peft_type'] == peft_prompt.KIND:
    return peft_prompt.read(path, config, fields, tensors)
  rank_sizes, shapes, fetch_stored = {}, tensors.shapes, tensors.fetch
  if fields['peft_type'] == 'LORA':
    read = peft_lora.read(config, fields, tensors)
    method, rules, rank_sizes = read.method, read.rules, read.rank_sizes
    shapes, fetch_stored = read.shapes, read.fetch
  else:
    method, rules = _read_ia3(config, shapes)
  sizes = family.axis_sizes(config) | rank_sizes
  entries = weight_mapping.entries(rules, sizes, family.depths(config))
  missing_shapes = _missing_arrays(entries, shapes)
  weight_mapping.check(
    {e.stored_name: e.stored_shape for e in entries},
    missing_shapes | shapes,
    f'{Path(path) / ARRAYS} does not fit the model',
    'give the base model that the adapter was trained on',
  )
  stored = tensors.fetch(next(iter(shapes))).dtype

  def fetch(name):
    if name in missing_shapes:
      neutral = np.ones if name.endswith(_IA3_SUFFIX) else np.zeros
      return neutral(missing_shapes[name], stored)
    return fetch_stored(name)

  return AdapterWeights(
    method, weight_mapping.read(entries, sizes, fetch, dtype, path)[0]
  )


def save(
  path: str,
  config: Any,
  adapter: AdapterWeights,
  base: str = '',
  like: Mapping[str, Any] | None = None,
  overwrite: bool = False,
) -> None:
  """Writes a directory that `peft.PeftModel.from_pretrained` reads.

  Layers whose LoRA is all zeros are omitted.

  Args:
    base: path or name of the base model, for adapter_config.json.
    like: an earlier adapter_config.json from `peft_config.read`; fields that
      are still valid are kept.

  Raises:
    CheckpointError: peft cannot represent the method, or `path` is not empty.
  """
  if [spec.name for spec in instances(adapter.method).values()] == ['prompt']:
    fields, arrays = peft_prompt.write(config, adapter)
    _write(path, config, arrays, fields, base, like or {}, overwrite)
    return
  family = hf.family_of(config)
  fields, rules, rank_sizes = _describe(config, adapter)
  sizes = family.axis_sizes(config) | rank_sizes
  entries = weight_mapping.entries(rules, sizes, family.depths(config))
  arrays = {
    entry.stored_name: array
    for entry, array in weight_mapping.write(entries, sizes, adapter.tree)
  }
  if 'r' in fields:
    arrays = _without_zeros(arrays)
  like = like or {}
  inputs = {
    module_of(name)
    for name, array in arrays.items()
    if 'r' not in fields and array.shape[0] == 1
  }
  modules, adapted = family.hf.module_names(config), set(map(module_of, arrays))
  earlier_fields = like if like.get('peft_type') == fields['peft_type'] else {}
  fields |= peft_config.selection(modules, adapted, inputs, earlier_fields)
  _write(path, config, arrays, fields, base, like, overwrite)


def check(config: Any, adapter: AdapterWeights) -> None:
  """
  Raises:
    CheckpointError: peft cannot represent the adapter.
  """
  if [spec.name for spec in instances(adapter.method).values()] == ['prompt']:
    peft_prompt.write(config, adapter)
  else:
    _describe(config, adapter)


def _write(
  path: str,
  config: Any,
  arrays: dict[str, np.ndarray],
  fields: dict[str, Any],
  base: str,
  like: Mapping[str, Any],
  overwrite: bool,
) -> None:
  """Writes both files; see `save`."""
  earlier_fields = (
    dict(like) if like.get('peft_type') == fields['peft_type'] else {}
  )
  if base or 'base_model_name_or_path' not in earlier_fields:
    earlier_fields['base_model_name_or_path'] = base
  with directory.atomic_directory(path, overwrite) as output_dir:
    save_file(arrays, output_dir / ARRAYS, metadata={'format': 'pt'})
    task = hf.family_of(config).hf.peft_task
    fixed = {'inference_mode': True, 'task_type': task}
    directory.write_json(output_dir / CONFIG, fixed | earlier_fields | fields)


def _open_tensors(folder: Path) -> directory.Tensors:
  if not (folder / ARRAYS).exists() and (folder / _PICKLE).exists():
    raise CheckpointError(
      f'{folder} holds {_PICKLE}, a pickle, and no {ARRAYS}: load it with peft '
      '(PeftModel.from_pretrained) and save it again (save_pretrained), which '
      'writes safetensors'
    )
  return directory.Tensors([folder / ARRAYS])


def _ia3_rule(config: Any, site: str, instance: str, on: str) -> Rule:
  """The rule of a scale; in peft, [out, 1] for outputs, [1, in] for inputs."""
  family = hf.family_of(config)
  path = f'{weight_mapping.in_layers(site)}/{instance}/scale'
  if site in family.activations(config):
    # Scaling the activation or the input of wo is the same function.
    site, on = site.rpartition('/')[0] + '/wo', 'input'
  input_axes, output_axes = family.projections(config)[site]
  peft_name = f'{PREFIX}{unique_module(config, site)}.ia3_l'
  if on == 'input':
    return Rule(path, peft_name, input_axes, f'1({input_axes})')
  return Rule(path, peft_name, output_axes, f'({output_axes})1')


def _read_ia3(config, shapes) -> tuple[str, list[Rule]]:
  family = hf.family_of(config)
  sites = family.projections(config) | family.activations(config)
  outputs, inputs = [], []
  for site in family.projections(config):
    site_shapes = _shapes_at(config, site, 'ia3_l', shapes)
    if site_shapes and site_shapes[0][0] != 1:
      outputs.append(site)
    elif site_shapes and site.endswith('/wo'):
      outputs.append(site.removesuffix('/wo') + '/hidden')
    elif site_shapes:
      inputs.append(site)
  specs = []
  if outputs:
    specs.append(Spec('ia3', (('targets', site_patterns(outputs, sites)),)))
  if inputs:
    options = (('on', 'input'), ('targets', site_patterns(inputs, sites)))
    specs.append(Spec('ia3', options))
  method = method_string.format_method(tuple(specs))
  last = 'ia3_2' if outputs else 'ia3'
  rules = [_ia3_rule(config, site, 'ia3', 'output') for site in outputs]
  rules += [_ia3_rule(config, site, last, 'input') for site in inputs]
  return method, rules


def _shapes_at(config: Any, site: str, leaf: str, shapes: Mapping[str, Shape]):
  """The shapes of a module's arrays, over the layers that have it."""
  module = re.escape(PREFIX + hf.family_of(config).hf.module_name(site, config))
  pattern = module.replace(re.escape('{l}'), r'\d+') + re.escape(f'.{leaf}')
  return [s for name, s in shapes.items() if re.fullmatch(pattern, name)]


def _missing_arrays(
  entries: Sequence[Entry], shapes: Mapping[str, Shape]
) -> dict[str, Shape]:
  """{name: shape} of the arrays of modules that the file lacks."""
  if not shapes:
    raise CheckpointError(f'{ARRAYS} holds no arrays: save the adapter again')
  stored_modules = {module_of(name) for name in shapes}
  absent = {
    e.stored_name: e.stored_shape
    for e in entries
    if module_of(e.stored_name) not in stored_modules
  }
  missing_magnitudes = [name for name in absent if name.endswith('_vector')]
  if missing_magnitudes:
    raise CheckpointError(
      f'{ARRAYS} has no magnitude of {module_of(missing_magnitudes[0])}: a '
      'DoRA must have all layers of a module; merge it into its base with peft '
      '(merge_and_unload) and convert the merged model'
    )
  return absent


def _describe(
  config: Any, adapter: AdapterWeights
) -> tuple[dict[str, Any], list[Rule], dict[str, int]]:
  """(fields of adapter_config.json, rules, sizes of the rank letters)."""
  specs = instances(adapter.method)
  names = [spec.name for spec in specs.values()]
  if set(names) in ({'lora'}, {'dora'}):
    return peft_lora.describe(config, adapter.tree, specs)
  if set(names) == {'ia3'}:
    fields = {'peft_type': 'IA3', 'feedforward_modules': []}
    return fields, _all_ia3_rules(config, adapter, specs), {}
  raise CheckpointError(
    f'peft cannot represent {adapter.method!r}: it has one lora, one dora, one '
    'prompt, or ia3; write the moepeft format instead'
  )


def _all_ia3_rules(
  config: Any, adapter: AdapterWeights, specs: Mapping[str, Spec]
) -> list[Rule]:
  family = hf.family_of(config)
  sites = family.projections(config) | family.activations(config)
  rules = []
  for instance, spec in specs.items():
    adapter_sites = sites_in(adapter.tree, instance)
    peft_lora.check_sites(adapter_sites, sites)
    on = spec.get('on', Ia3.on)
    rules += [_ia3_rule(config, site, instance, on) for site in adapter_sites]
  if len({rule.stored_name for rule in rules}) < len(rules):
    raise CheckpointError(
      'peft has one scale per module: this adapter has several at wo (act, '
      'hidden and wo count as one); write the moepeft format instead'
    )
  return rules


def _without_zeros(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  used = {module_of(name) for name, array in arrays.items() if array.any()}
  return {n: array for n, array in arrays.items() if module_of(n) in used}

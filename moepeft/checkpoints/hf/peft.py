# SPDX-License-Identifier: Apache-2.0
"""Reads and writes adapters of `peft`.

LoRA, DoRA, (IA)^3, norms, prompts, prefixes, Poly and the VeRA of moepeft are
read and written; VeRA of peft, AdaLoRA, LoHa and LoKr are read as LoRA
(`peft_low_rank`).

An adapter is a directory with adapter_config.json and
adapter_model.safetensors. peft scales the inputs of `feedforward_modules`: at
`wo` this is moepeft's `ia3` at the site */mlp/hidden, at other modules it is
`ia3(on='input')`. Each model family defines its module names.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from moepeft.checkpoints import directory
from moepeft.checkpoints.adapter import (
  AdapterWeights,
  method_instances,
  site_patterns,
  sites_in,
)
from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.hf import (
  peft_config,
  peft_lora,
  peft_low_rank,
  peft_norms,
  peft_poly,
  peft_prefix,
  peft_prompt,
  peft_vera,
)
from moepeft.checkpoints.hf.peft_names import PREFIX, module_of, site_module
from moepeft.config import method_string
from moepeft.config.method_string import Spec
from moepeft.models import weight_mapping
from moepeft.models.weight_mapping import CheckpointError, Entry, Rule, Shape
from moepeft.peft.methods.ia3 import Ia3

WEIGHTS_FILE, CONFIG_FILE = 'adapter_model.safetensors', peft_config.FILE
_PICKLE_FILE = 'adapter_model.bin'
_IA3_SUFFIX = '.ia3_l'


def load(path: str, config: Any, dtype: Any = 'float32') -> AdapterWeights:
  """Reads an adapter's method and 'peft' tree.

  A layer that the adapter omits gets LoRA arrays of zeros, whose gradients are
  also zero, or (IA)^3 scales of ones.

  Args:
    config: the base model's config; the adapter's files do not contain it.
    dtype: the dtype of the result; None keeps the file's.

  Raises:
    CheckpointError: a file is damaged, the adapter is not supported, or its
      names or shapes do not match the model.
  """
  fields, family = peft_config.read(path), hf.family_of(config)
  tensors = _open_tensors(Path(path))
  if fields['peft_type'] in peft_prompt.PEFT_TYPES:
    return peft_prompt.read(path, config, fields, tensors)
  if fields['peft_type'] == peft_prefix.PEFT_TYPE:
    return peft_prefix.read(path, config, fields, tensors)
  lora = None
  if fields['peft_type'] == peft_vera.PEFT_TYPE:
    lora = peft_vera.read(config, fields, tensors)
  if fields['peft_type'] in peft_config.LOW_RANK_TYPES and not lora:
    fields, tensors = peft_low_rank.as_lora(config, fields, tensors)
  if fields['peft_type'] == peft_poly.PEFT_TYPE:
    return peft_poly.read(path, config, fields, tensors)
  rank_sizes, shapes, fetch_stored = {}, tensors.shapes, tensors.fetch
  if fields['peft_type'] == 'LORA':
    lora = peft_lora.read(config, fields, tensors)
  if lora:
    method, rules, rank_sizes = lora.method, lora.rules, lora.rank_sizes
    shapes, fetch_stored = lora.shapes, lora.fetch
  elif fields['peft_type'] == peft_norms.PEFT_TYPE:
    method, rules = peft_norms.read(config, shapes)
  else:
    method, rules = _read_ia3(config, shapes)
  sizes = family.axis_sizes(config) | rank_sizes
  entries = weight_mapping.entries(rules, sizes, family.depths(config))
  missing_shapes = _missing_arrays(entries, shapes)
  weight_mapping.check(
    {e.stored_name: e.stored_shape for e in entries},
    missing_shapes | shapes,
    f'{Path(path) / WEIGHTS_FILE} does not fit the model',
    'give the base model that the adapter was trained on',
  )
  stored_dtype = tensors.fetch(next(iter(shapes))).dtype

  def fetch(name):
    if name in missing_shapes:
      fill_value = 1 if name.endswith(_IA3_SUFFIX) else 0
      return np.full(missing_shapes[name], fill_value, stored_dtype)
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

  Layers whose LoRA is all zeros are omitted. A LoRA that started from kernels
  (`init_weights`) becomes one of twice the rank.

  Args:
    base: path or name of the base model, for adapter_config.json.
    like: the fields of an earlier adapter_config.json from `peft_config.read`;
      with the same peft_type, those that this adapter does not set are copied.

  Raises:
    CheckpointError: peft cannot represent the method, or `path` is not empty.
  """
  adapter = peft_lora.without_initial_factors(adapter)
  if module := _module_of(adapter):
    fields, arrays = module.write(config, adapter)
    _write(path, config, arrays, fields, base, like or {}, overwrite)
    return
  family = hf.family_of(config)
  fields, rules, rank_sizes = _fields_and_rules(config, adapter)
  sizes = family.axis_sizes(config) | rank_sizes
  entries = weight_mapping.entries(rules, sizes, family.depths(config))
  arrays = {
    entry.stored_name: array
    for entry, array in weight_mapping.write(entries, sizes, adapter.tree)
  }
  if 'r' in fields:
    arrays = _drop_zero_modules(arrays)
  like = like or {}
  input_scaled_modules = {
    module_of(name)
    for name, array in arrays.items()
    if 'r' not in fields and array.shape[0] == 1
  }
  fields |= peft_config.selection(
    family.hf.module_names(config),
    set(map(module_of, arrays)),
    input_scaled_modules,
    like if like.get('peft_type') == fields['peft_type'] else {},
  )
  if 'projection_prng_key' in fields:
    vera = peft_vera.vera_of(method_instances(adapter.method)['vera'])
    arrays = peft_vera.with_matrices(config, arrays, vera)
  _write(path, config, arrays, fields, base, like, overwrite)


def check(config: Any, adapter: AdapterWeights) -> None:
  """Checks that peft can represent an adapter.

  Raises:
    CheckpointError: it cannot.
  """
  adapter = peft_lora.without_initial_factors(adapter)
  if module := _module_of(adapter):
    module.write(config, adapter)
  else:
    _fields_and_rules(config, adapter)


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
    save_file(arrays, output_dir / WEIGHTS_FILE, metadata={'format': 'pt'})
    task = hf.family_of(config).hf.peft_task
    defaults = {'inference_mode': True, 'task_type': task}
    directory.write_json(
      output_dir / CONFIG_FILE, defaults | earlier_fields | fields
    )


def _module_of(adapter: AdapterWeights) -> ModuleType | None:
  """The module that writes an adapter which is no LoRA or (IA)^3, else None."""
  names = [spec.name for spec in method_instances(adapter.method).values()]
  if len(names) > 1:
    return None
  return {
    'prompt': peft_prompt,
    'prefix': peft_prefix,
    'poly': peft_poly,
    'mhr': peft_poly,
  }.get(names[0])


def _open_tensors(folder: Path) -> directory.Tensors:
  if not (folder / WEIGHTS_FILE).exists() and (folder / _PICKLE_FILE).exists():
    raise CheckpointError(
      f'{folder} holds {_PICKLE_FILE}, a pickle, and no {WEIGHTS_FILE}: load '
      'it with peft (PeftModel.from_pretrained) and save it again '
      '(save_pretrained), which writes safetensors'
    )
  return directory.Tensors([folder / WEIGHTS_FILE])


def _ia3_rule(config: Any, site: str, instance: str, on: str) -> Rule:
  """The mapping rule of an (IA)^3 scale.

  peft's array is [out, 1] if it scales outputs, and [1, in] if inputs.
  """
  family = hf.family_of(config)
  path = f'{weight_mapping.path_in_layers(site)}/{instance}/scale'
  if site in family.activations(config):
    # A scale of an activation is a scale of the input of wo.
    site, on = site.rpartition('/')[0] + '/wo', 'input'
  input_axes, output_axes = family.projections(config)[site]
  peft_name = f'{PREFIX}{site_module(config, site)}.ia3_l'
  if on == 'input':
    return Rule(path, peft_name, input_axes, f'1({input_axes})')
  return Rule(path, peft_name, output_axes, f'({output_axes})1')


def _read_ia3(config, shapes) -> tuple[str, list[Rule]]:
  family = hf.family_of(config)
  sites = family.projections(config) | family.activations(config)
  output_sites, input_sites = [], []
  for site in family.projections(config):
    site_shapes = _shapes_at(config, site, 'ia3_l', shapes)
    if site_shapes and site_shapes[0][0] != 1:
      output_sites.append(site)
    elif site_shapes and site.endswith('/wo'):
      output_sites.append(site.removesuffix('/wo') + '/hidden')
    elif site_shapes:
      input_sites.append(site)
  specs = []
  if output_sites:
    targets = site_patterns(output_sites, sites)
    specs.append(Spec('ia3', (('targets', targets),)))
  if input_sites:
    targets = site_patterns(input_sites, sites)
    specs.append(Spec('ia3', (('on', 'input'), ('targets', targets))))
  method = method_string.format_method(tuple(specs))
  # The second method of a name is the instance with the suffix _2.
  input_instance = 'ia3_2' if output_sites else 'ia3'
  rules = [_ia3_rule(config, site, 'ia3', 'output') for site in output_sites]
  rules += [
    _ia3_rule(config, site, input_instance, 'input') for site in input_sites
  ]
  return method, rules


def _shapes_at(
  config: Any, site: str, suffix: str, shapes: Mapping[str, Shape]
):
  """The shapes of the arrays at a site, one per layer that the file has."""
  module = re.escape(PREFIX + hf.family_of(config).hf.module_name(site, config))
  pattern = module.replace(re.escape('{l}'), r'\d+') + re.escape(f'.{suffix}')
  return [s for name, s in shapes.items() if re.fullmatch(pattern, name)]


def _missing_arrays(
  entries: Sequence[Entry], shapes: Mapping[str, Shape]
) -> dict[str, Shape]:
  """Returns {name: shape} of the arrays of modules that the file lacks.

  Raises:
    CheckpointError: the file is empty, or lacks a norm or a DoRA magnitude.
  """
  if not shapes:
    raise CheckpointError(
      f'{WEIGHTS_FILE} holds no arrays: save the adapter again'
    )
  stored_modules = {module_of(name) for name in shapes}
  missing_shapes = {
    e.stored_name: e.stored_shape
    for e in entries
    if module_of(e.stored_name) not in stored_modules
  }
  missing_norms = [name for name in missing_shapes if '.ln_tuning_' in name]
  if missing_norms:
    raise CheckpointError(
      f'{WEIGHTS_FILE} has no {module_of(missing_norms[0])}: an adapter must '
      'tune a norm in all layers or in none; merge it into its base with peft '
      '(merge_and_unload) and convert the merged model'
    )
  missing_magnitudes = [
    name for name in missing_shapes if name.endswith('_vector')
  ]
  if missing_magnitudes:
    raise CheckpointError(
      f'{WEIGHTS_FILE} has no magnitude vector of '
      f'{module_of(missing_magnitudes[0])}: a DoRA adapter must adapt a module '
      'in all layers; merge it into its base with peft (merge_and_unload) and '
      'convert the merged model'
    )
  return missing_shapes


def _fields_and_rules(
  config: Any, adapter: AdapterWeights
) -> tuple[dict[str, Any], list[Rule], dict[str, int]]:
  """(fields of adapter_config.json, rules, {rank axis in the rules: rank})."""
  specs = method_instances(adapter.method)
  names = [spec.name for spec in specs.values()]
  if set(names) in ({'lora'}, {'dora'}):
    return peft_lora.describe(config, adapter.tree, specs)
  if set(names) == {'ia3'}:
    fields = {'peft_type': 'IA3', 'feedforward_modules': []}
    return fields, _all_ia3_rules(config, adapter, specs), {}
  describe = _SINGLE.get(names[0]) if len(names) == 1 else None
  if describe is not None:
    return describe(config, adapter.tree, specs[names[0]])
  raise CheckpointError(
    f'peft cannot represent {adapter.method!r}: an adapter of peft is lora, '
    'dora, one poly, ia3, one vera, one ln_tuning, one prompt or one prefix; '
    'write the moepeft format instead'
  )


# Methods of which peft has one in an adapter.
_SINGLE = {
  'ln_tuning': peft_norms.describe,
  'vera': peft_vera.describe,
}


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
      'peft has one scale per module: this adapter has several at wo, where '
      'peft has those of act and hidden too; write the moepeft format instead'
    )
  return rules


def _drop_zero_modules(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  used = {module_of(name) for name, array in arrays.items() if array.any()}
  return {n: array for n, array in arrays.items() if module_of(n) in used}

# SPDX-License-Identifier: Apache-2.0
"""moepeft's adapter format: adapter.safetensors, metadata in adapter.json.

The keys are the paths of the 'peft' tree in training, with layers stacked on
axis 0, so that reading needs neither a model nor a name table. Both files
depend on the trained adapter only: no dates, no work directories, sorted keys,
float32. The format holds any method, also mixtures:

  adapter.safetensors  decoder/layers/self/q/molora/a  [l, d, e, r]
                       decoder/layers/self/q/molora/router/kernel  [l, d, e]
  adapter.json  format       1
                method       'molora(experts=10, rank=4, ...)'
                semantics    'official' or 'paper'
                base         path; sha256, the content hash of its weights;
                             quantise, if it was trained on 'int8' or 'nf4'
                model        family, and its config, field by field
                parameters   of the adapter
                experts      of a mixture that started with trained adapters:
                             path and sha256 of each file
                arrays       {key: shape, sha256}; if the layers differ in
                             their number of experts, an array per layer under
                             'layers_0', 'layers_1', ..., without padding
                file_sha256, card_sha256: of both files, checked on load
"""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from moepeft.checkpoints import directory
from moepeft.config import method_string, renamed
from moepeft.config.method_string import Spec
from moepeft.core import untrusted
from moepeft.models import FAMILIES, weight_mapping
from moepeft.models.weight_mapping import CheckpointError, Tree
from moepeft.nn import expert_padding, initializers
from moepeft.nn.expert_padding import PaddedAxis
from moepeft.peft import build
from moepeft.peft.method_text import flatten_expert, method_entry

FORMAT = 1
ARRAYS, METADATA_FILE = 'adapter.safetensors', 'adapter.json'
_DESCRIBED_KEYS = ('method', 'semantics', 'base', 'model')
_OPTIONAL_KEYS = ('experts',)


class AdapterWeights(NamedTuple):
  """A method string and its 'peft' tree."""

  method: str
  tree: Tree


def describe(
  method: str,
  semantics: str,
  base_path: str,
  base_sha256: str,
  family: str,
  config: Any,
  quantise: str = '',
) -> dict[str, Any]:
  """The metadata of an adapter, for `save`.

  Args:
    method: the method string, which `moepeft.peft.build` reads.
    semantics: 'official' or 'paper'.
    base_path, base_sha256: the frozen model and its content hash.
    family: the model's family, e.g. 't5'.
    config: the model's config, a dataclass.
    quantise: the format of the base's projections; the hash is that of the
      unquantized base.
  """
  quantization = {'quantise': quantise} if quantise else {}
  return {
    'method': method,
    'semantics': semantics,
    'base': {'path': base_path, 'sha256': base_sha256} | quantization,
    'model': {'family': family, 'config': dataclasses.asdict(config)},
  }


def save(
  path: str, tree: Tree, metadata: Mapping[str, Any], overwrite: bool = False
) -> None:
  """Writes the directory atomically.

  Args:
    tree: the 'peft' tree; arrays become float32.
    metadata: from `describe`; entries derived from `tree` are added.

  Raises:
    CheckpointError: the metadata lack a key or `path` is not empty.
  """
  missing_keys = [key for key in _DESCRIBED_KEYS if key not in metadata]
  if missing_keys:
    raise CheckpointError(
      f'the metadata lack {", ".join(missing_keys)}: make them with '
      'adapter.describe'
    )
  arrays = {
    name: np.ascontiguousarray(np.asarray(leaf, np.float32))
    for name, leaf in expert_padding.split(
      weight_mapping.flatten(tree), _padded_axes(metadata)
    ).items()
  }
  with directory.atomic_directory(path, overwrite) as output_dir:
    save_file(arrays, output_dir / ARRAYS)
    keys = (*_DESCRIBED_KEYS, *_OPTIONAL_KEYS)
    fields = {key: metadata[key] for key in keys if key in metadata} | {
      'format': FORMAT,
      'parameters': sum(array.size for array in arrays.values()),
      'arrays': {
        name: {'shape': list(a.shape), 'sha256': weight_mapping.array_hash(a)}
        for name, a in arrays.items()
      },
      'file_sha256': _file_hash(output_dir / ARRAYS),
    }
    directory.write_json(
      output_dir / METADATA_FILE,
      fields | {'card_sha256': _metadata_hash(fields)},
    )


def load(path: str) -> tuple[Tree, dict[str, Any]]:
  """Reads and verifies what `save` wrote: (tree, metadata).

  Raises:
    CheckpointError: a file is missing, truncated or altered, or of a newer
      format.
  """
  metadata = directory.read_json(Path(path) / METADATA_FILE)
  if metadata.get('format') != FORMAT:
    raise CheckpointError(
      f'{path}/{METADATA_FILE} has the format {metadata.get("format")!r}; '
      f'this version reads {FORMAT}: update moepeft, or export the adapter '
      'again'
    )
  if metadata.get('card_sha256') != _metadata_hash(metadata):
    raise CheckpointError(
      f'{path}/{METADATA_FILE} was altered after it was written (its hash '
      'differs): copy it again or export the adapter again'
    )
  try:
    _check_types(metadata)
  except ValueError as error:
    raise CheckpointError(
      f'{path}/{METADATA_FILE} has no metadata of an adapter ({error}): '
      'export the adapter again'
    ) from None
  file = Path(path) / ARRAYS
  tensors = directory.Tensors([file])
  shapes = {name: tuple(a['shape']) for name, a in metadata['arrays'].items()}
  advice = 'copy both files again from where they were written'
  weight_mapping.check(
    shapes, tensors.shapes, f"{file} is not {METADATA_FILE}'s", advice
  )
  arrays = {name: tensors.fetch(name) for name in sorted(shapes)}
  for name, array in arrays.items():
    weight_mapping.check_finite(name, array, file)
    if weight_mapping.array_hash(array) != metadata['arrays'][name]['sha256']:
      raise CheckpointError(
        f'{file} is damaged: {name} differs from its hash in '
        f'{METADATA_FILE}; {advice}'
      )
  if _file_hash(file) != metadata['file_sha256']:
    raise CheckpointError(f'{file} is damaged in its header; {advice}')
  try:
    stacked = expert_padding.stack_layers(arrays)
  except ValueError as error:
    raise CheckpointError(f'{file}: {error}; {advice}') from None
  method = renamed.translate_method(metadata['method'])
  return weight_mapping.unflatten(stacked), {**metadata, 'method': method}


def _padded_axes(metadata: Mapping[str, Any]) -> dict[str, PaddedAxis]:
  """The padded axes of an adapter's arrays; traces the model if needed."""
  if 'experts_per_layer' not in metadata['method']:
    return {}
  config = config_of(metadata)
  family = FAMILIES[config.family]
  built = build(metadata['method'], family.sites(config), metadata['semantics'])
  ids = np.zeros((1, 2), np.int32)
  return initializers.padded_axes(
    family.module(config, built.adapter_map),
    {'inputs': ids, 'decoder_inputs': ids},
  )


def _check_types(metadata: Mapping[str, Any]) -> None:
  """
  Raises:
    ValueError: a metadata field is missing or has another type.
  """
  for name in ('method', 'semantics', 'base.path', 'base.sha256'):
    untrusted.field(metadata, name, str)
  untrusted.field(metadata, 'base.quantise', str, '')
  untrusted.field(metadata, 'model.family', str)
  untrusted.field(metadata, 'model.config', dict)
  untrusted.field(metadata, 'file_sha256', str)
  for name, array in untrusted.field(metadata, 'arrays', dict).items():
    untrusted.field(array, 'sha256', str)
    shape = untrusted.field(array, 'shape', list)
    if not all(type(size) is int and size >= 0 for size in shape):
      raise ValueError(f'expected sizes in the shape of {name}, got {shape}')


def config_of(metadata: Mapping[str, Any]) -> Any:
  """The model config that the metadata describe, as its family's dataclass.

  Raises:
    ValueError: the family or a field is unknown, or a field is invalid.
  """
  family = metadata['model']['family']
  if family not in FAMILIES:
    raise CheckpointError(
      f'the metadata name the model family {family!r}; there are '
      f'{", ".join(FAMILIES)}'
    )
  return FAMILIES[family].from_fields(metadata['model']['config'])


def method_instances(method: str) -> dict[str, Spec]:
  """{name in the tree: spec} of each adapter; names are lora, then lora_2."""
  specs: dict[str, Spec] = {}
  for spec in method_string.parse_method(method):
    name, i = spec.name, 2
    while name in specs:
      name, i = f'{spec.name}_{i}', i + 1
    specs[name] = spec
  return specs


def sites_in(tree: Tree, instance: str) -> dict[str, Tree]:
  """{site: {'a': ..., 'router/kernel': ...}} of an adapter in a tree."""
  leaves_by_site: dict[str, Tree] = {}
  for path, leaf in weight_mapping.flatten(tree).items():
    place, separator, leaf_name = path.partition(f'/{instance}/')
    if separator:
      leaves_by_site.setdefault(place.replace('/layers/', '/'), {})[
        leaf_name
      ] = leaf
  return leaves_by_site


def folded(adapter: AdapterWeights) -> AdapterWeights:
  """The same function without what only training needs; see `Method.fold`."""
  leaves = weight_mapping.flatten(adapter.tree)
  specs, parts = [], []
  for instance, spec in method_instances(adapter.method).items():
    places: dict[str, Tree] = {}
    for path, leaf in leaves.items():
      place, separator, name = path.partition(f'/{instance}/')
      if separator:
        places.setdefault(place, {})[name] = np.asarray(leaf)
    fold = method_entry(flatten_expert(spec)).fold
    for place, arrays in places.items() if fold else ():
      folded_spec, places[place] = fold(spec, arrays)
    specs.append(folded_spec if fold and places else spec)
    parts.append(places)
  method = method_string.format_method(tuple(specs))
  tree = {
    f'{place}/{instance}/{name}': array
    for instance, places in zip(method_instances(method), parts, strict=True)
    for place, arrays in places.items()
    for name, array in arrays.items()
  }
  return AdapterWeights(method, weight_mapping.unflatten(tree))


def site_patterns(sites: Collection[str], model_sites: Collection[str]) -> str:
  """The option `targets` that selects some of a model's sites, with '*'.

  'encoder/self/q' and 'decoder/self/q' become '*/self/q'.
  """
  patterns = []
  for site in model_sites:
    suffix = site.split('/', 1)[1]
    same_suffix = [s for s in model_sites if s.split('/', 1)[1] == suffix]
    all_adapted = len(same_suffix) > 1 and all(s in sites for s in same_suffix)
    pattern = f'*/{suffix}' if all_adapted else site
    if site in sites and pattern not in patterns:
      patterns.append(pattern)
  return '|'.join(patterns)


def _metadata_hash(metadata: Mapping[str, Any]) -> str:
  rest = {key: value for key, value in metadata.items() if key != 'card_sha256'}
  text = json.dumps(rest, sort_keys=True, ensure_ascii=False)
  return hashlib.sha256(text.encode()).hexdigest()


def _file_hash(path: Path) -> str:
  return hashlib.sha256(path.read_bytes()).hexdigest()

# SPDX-License-Identifier: Apache-2.0
"""Converts LoRA and DoRA of `peft` to moepeft's names and shapes, and back.

In peft, modules and layers may differ in rank and alpha (`rank_pattern`,
`alpha_pattern`). A site of moepeft has one rank and one alpha for all layers:
the largest rank, with zero padding of smaller ones, and the alpha of the first
layer of that rank. The B of other layers is multiplied by the ratio of the
scales. Sites of another rank or alpha become a further `lora` in the method.
"""

import collections
import dataclasses
import itertools
import re
import string
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from moepeft.checkpoints.adapter import (
  AdapterWeights,
  method_instances,
  site_patterns,
  sites_in,
)
from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.hf import peft_config
from moepeft.checkpoints.hf.peft_names import PREFIX, module_of, site_module
from moepeft.config import method_string
from moepeft.config.method_string import Spec
from moepeft.models import weight_mapping
from moepeft.models.weight_mapping import CheckpointError, Rule, Shape, Tree
from moepeft.peft.methods.lora import FROM_BASE, Lora

# Names of the arrays of linear modules, and of embeddings, [r, v] and [d, r].
_LEAVES = ('lora_A.weight', 'lora_B.weight')
_EMBEDDING_LEAVES = ('lora_embedding_A', 'lora_embedding_B')
_MAGNITUDE = 'lora_magnitude_vector'
# peft saves the frozen table with the adapter of an embedding.
_FROZEN_TABLE = re.compile(r'base_model\.model\.(.*)\.base_layer\.weight')


@dataclasses.dataclass(frozen=True)
class Site:
  """An adapted site.

  Attributes:
    path: 'decoder/self/q', 'embed' or 'head'.
    rank, alpha: of the site in moepeft.
    factors: {module: (its rank, the factor of its B)}.
  """

  path: str
  rank: int
  alpha: float
  factors: Mapping[str, tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class LoraAdapter:
  """An adapter in the form of mapping rules, with one rank per site.

  Attributes:
    method: the method string.
    rules: rules between moepeft's and peft's arrays.
    rank_sizes: the sizes of the rank letters.
    shapes, fetch: of the arrays by name, padded to the rank of their site.
  """

  method: str
  rules: list[Rule]
  rank_sizes: dict[str, int]
  shapes: dict[str, Shape]
  fetch: Callable[[str], np.ndarray]


def read(config: Any, fields: Mapping[str, Any], tensors: Any) -> LoraAdapter:
  """
  Args:
    config: of the base model.
    fields: of adapter_config.json, as `peft_config.read` returns them.
    tensors: of adapter_model.safetensors.

  Raises:
    CheckpointError: ranks differ from the fields, a saved table has another
      shape than the model's, or the adapter is tied.
  """
  family = hf.family_of(config)
  site_axes = family.projections(config) | family.hf.peft_ends(config)
  shapes = _without_frozen_tables(config, tensors.shapes)
  all_sites = [
    site
    for path in site_axes
    if (site := _site(config, path, fields, shapes)) is not None
  ]
  table_sites = [site.path for site in all_sites if '/' not in site.path]
  if table_sites and fields.get('ensure_weight_tying') and config.tied:
    raise CheckpointError(
      f'the adapter is at {" and ".join(table_sites)} of a model whose head is '
      'its embedding, and ties the two (ensure_weight_tying), which is not '
      'supported: merge it into its base with peft (merge_and_unload)'
    )
  groups = collections.defaultdict(list)
  for site in all_sites:
    groups[site.rank, site.alpha].append(site)
  if len(groups) > len(string.ascii_uppercase):
    raise CheckpointError(
      f'the adapter has {len(groups)} pairs of rank and alpha; at most '
      f'{len(string.ascii_uppercase)} are supported: merge it into its base '
      'with peft (merge_and_unload) and convert the merged model'
    )
  kind = 'dora' if fields.get('use_dora') else 'lora'
  specs, rules, rank_sizes = [], [], {}
  for i, ((rank, alpha), sites) in enumerate(groups.items()):
    letter = string.ascii_uppercase[i]
    rank_sizes[letter] = rank
    instance = kind if i == 0 else f'{kind}_{i + 1}'
    paths = [site.path for site in sites]
    specs.append(_spec(kind, rank, alpha, fields, paths, site_axes))
    for path in paths:
      rules += rules_at(config, path, kind, instance, letter)
  factors = dict(
    itertools.chain.from_iterable(site.factors.items() for site in all_sites)
  )
  ranks = {module: site.rank for site in all_sites for module in site.factors}
  method = method_string.format_method(tuple(specs))
  padded_shapes = {
    name: _padded_shape(name, shape, ranks) for name, shape in shapes.items()
  }
  fetch = lambda name: _pad_rank(  # noqa: E731
    name, tensors.fetch(name), padded_shapes[name], factors
  )
  return LoraAdapter(method, rules, rank_sizes, padded_shapes, fetch)


def rules_at(
  config: Any, path: str, kind: str, instance: str, letter: str = 'r'
) -> list[Rule]:
  """The rules of a `lora` at a site, or of a `dora` with its magnitude.

  Args:
    instance: its name in the tree, 'lora' or 'lora_2'.
    letter: the letter of its rank.
  """
  family = hf.family_of(config)
  table_sites = family.hf.peft_ends(config)
  input_axes, output_axes = (family.projections(config) | table_sites)[path]
  prefix = path if path in table_sites else weight_mapping.path_in_layers(path)
  instance_path = f'{prefix}/{instance}'
  module_name = f'{PREFIX}{site_module(config, path)}'
  a, b = _leaves(path)
  rules = [
    Rule(
      f'{instance_path}/a',
      f'{module_name}.{a}',
      input_axes + letter,
      f'{letter}({input_axes})',
    ),
    Rule(
      f'{instance_path}/b',
      f'{module_name}.{b}',
      letter + output_axes,
      f'({output_axes}){letter}',
    ),
  ]
  if kind == 'dora':
    name = f'{module_name}.{_MAGNITUDE}'
    rules.append(
      Rule(f'{instance_path}/magnitude', name, output_axes, f'({output_axes})')
    )
  return rules


def describe(
  config: Any, tree: Tree, specs: Mapping[str, Spec]
) -> tuple[dict[str, Any], list[Rule], dict[str, int]]:
  """(fields of adapter_config.json, rules, sizes of the rank letters).

  Args:
    tree: the 'peft' tree.
    specs: its instances of one kind, 'lora', 'lora_2'.

  Raises:
    CheckpointError: two instances share a site or differ in more than rank,
      alpha and sites, or peft does not adapt a site.
  """
  family = hf.family_of(config)
  peft_sites = family.projections(config) | family.hf.peft_ends(config)
  fields, rules, rank_sizes, adapted_sites = {}, [], {}, set()
  for letter, (instance, spec) in zip(
    string.ascii_uppercase, specs.items(), strict=False
  ):
    sites = sites_in(tree, instance)
    check_sites(sites, peft_sites)
    rank = next(iter(sites.values()))['a'].shape[-1]
    alpha = spec.get('alpha', Lora.alpha)
    alpha = int(alpha) if alpha == int(alpha) else alpha
    common = {
      'peft_type': 'LORA',
      'lora_dropout': spec.get('dropout', Lora.dropout),
      'use_rslora': spec.get('rslora', Lora.rslora),
      'use_dora': spec.name == 'dora',
      'bias': 'none',
    }
    fields = fields or common | {'r': rank, 'lora_alpha': alpha}
    if adapted_sites & set(sites) or common.items() - fields.items():
      raise CheckpointError(
        'peft has one LoRA per module, with equal options except rank and '
        f'alpha: {instance} shares a site with another or differs in other '
        'options; write the moepeft format instead'
      )
    for name, value, default in (
      ('rank_pattern', rank, fields['r']),
      ('alpha_pattern', alpha, fields['lora_alpha']),
    ):
      if value != default:
        patterns = fields.setdefault(name, {})
        patterns |= {_pattern(config, path): value for path in sites}
    adapted_sites |= set(sites)
    rank_sizes[letter] = rank
    for path in sites:
      rules += rules_at(config, path, spec.name, instance, letter)
  if len(rank_sizes) < len(specs):
    raise CheckpointError(
      f'at most {len(string.ascii_uppercase)} LoRAs can be one adapter of '
      'peft; write the moepeft format instead'
    )
  return fields, rules, rank_sizes


def without_initial_factors(adapter: AdapterWeights) -> AdapterWeights:
  """The adapter with each frozen copy of a LoRA's factors inside of the LoRA.

  x A B - x A0 B0 is x [A, A0] [B, -B0], a LoRA of twice the rank, as peft
  converts PiSSA and OLoRA.
  """
  specs, flat = [], weight_mapping.flatten(adapter.tree)
  for instance, spec in method_instances(adapter.method).items():
    if spec.get('init_weights') in FROM_BASE:
      for path in [p for p in flat if p.endswith(f'/{instance}/initial_a')]:
        prefix = path.removesuffix('initial_a')
        a0, b0 = flat.pop(path), flat.pop(f'{prefix}initial_b')
        flat[f'{prefix}a'] = np.concatenate([flat[f'{prefix}a'], a0], axis=-1)
        axis = prefix.count('/layers/')
        flat[f'{prefix}b'] = np.concatenate(
          [flat[f'{prefix}b'], -b0], axis=axis
        )
      lora = Lora(**{k: v for k, v in spec.options if k != 'targets'})
      rank = 2 * lora.rank
      spec = spec.replace(
        rank=rank,
        alpha=lora.scale * rank,
        rslora=False,
        init_weights=Lora.init_weights,
      )
    specs.append(spec)
  return AdapterWeights(
    method_string.format_method(tuple(specs)), weight_mapping.unflatten(flat)
  )


def _pattern(config: Any, path: str) -> str:
  """The regular expression of a site's modules, a key of peft's patterns."""
  module = re.escape(hf.family_of(config).hf.module_name(path, config))
  return module.replace(re.escape('{l}'), r'\d+')


def check_sites(sites: Mapping[str, Tree], peft_sites: Collection[str]) -> None:
  """
  Raises:
    CheckpointError: an adapter has no site, or one outside `peft_sites`.
  """
  unsupported = sorted(set(sites) - set(peft_sites))
  if unsupported or not sites:
    raise CheckpointError(
      f'peft adapts projections, embedding and head; this adapter is at '
      f'{", ".join(unsupported) or "no site"}: write the moepeft format instead'
    )


def _leaves(path: str) -> tuple[str, str]:
  return _EMBEDDING_LEAVES if path == 'embed' else _LEAVES


def _without_frozen_tables(
  config: Any, shapes: Mapping[str, Shape]
) -> dict[str, Shape]:
  """The shapes without those of the base's frozen tables."""
  family = hf.family_of(config)
  sizes = family.axis_sizes(config)
  table = (sizes['v'], sizes['d'])
  tables = {site_module(config, path) for path in family.hf.peft_ends(config)}
  remaining = {}
  for name, shape in shapes.items():
    match = _FROZEN_TABLE.fullmatch(name)
    if not match or match[1] not in tables:
      remaining[name] = shape
    elif shape != table:
      raise CheckpointError(
        f'{name} has the shape {list(shape)}, the model {list(table)}: its '
        'vocabulary was resized for the adapter, which is not supported; merge '
        'it into its base with peft (merge_and_unload)'
      )
  return remaining


def _site(
  config: Any,
  path: str,
  fields: Mapping[str, Any],
  shapes: Mapping[str, Shape],
) -> Site | None:
  """The site with its adapted layers; None if no layer is adapted."""
  module = re.escape(PREFIX + hf.family_of(config).hf.module_name(path, config))
  leaf = re.escape(_leaves(path)[0])
  pattern = module.replace(re.escape('{l}'), r'\d+') + rf'\.{leaf}'
  modules = {}
  for name, shape in shapes.items():
    if re.fullmatch(pattern, name):
      modules[module_of(name)] = _rank_and_alpha(module_of(name), shape, fields)
  if not modules:
    return None
  rank = max(r for r, _ in modules.values())
  alpha = next(alpha for r, alpha in modules.values() if r == rank)
  scale = _scale(rank, alpha, fields)
  factors = {
    name: (r, _scale(r, a, fields) / scale) for name, (r, a) in modules.items()
  }
  return Site(path, rank, alpha, factors)


def _rank_and_alpha(module: str, shape: Shape, fields) -> tuple[int, float]:
  rank = peft_config.pattern_value(fields, 'rank_pattern', module, fields['r'])
  alpha = peft_config.pattern_value(
    fields, 'alpha_pattern', module, fields['lora_alpha']
  )
  if shape[0] != rank:
    raise CheckpointError(
      f'{module} has the rank {shape[0]}, {peft_config.FILE} gives it {rank}: '
      'copy both files again from where they were written'
    )
  return int(rank), alpha


def _scale(rank: int, alpha: float, fields: Mapping[str, Any]) -> float:
  return alpha / (rank**0.5 if fields.get('use_rslora') else rank)


def _spec(kind, rank, alpha, fields, paths, site_axes) -> Spec:
  options = [('rank', rank), ('alpha', alpha)]
  if fields.get('use_rslora'):
    options.append(('rslora', True))
  if fields.get('lora_dropout'):
    options.append(('dropout', fields['lora_dropout']))
  inside = [path for path in paths if '/' in path]
  layer_sites = [path for path in site_axes if '/' in path]
  patterns = [site_patterns(inside, layer_sites)] if inside else []
  patterns += [path for path in paths if '/' not in path]
  options.append(('targets', '|'.join(patterns)))
  return Spec(kind, tuple(options))


def _padded_shape(name: str, shape: Shape, ranks: Mapping[str, int]) -> Shape:
  rank = ranks.get(module_of(name))
  axis = _rank_axis(name)
  if rank is None or axis is None or len(shape) != 2:
    return shape
  return (rank, shape[1]) if axis == 0 else (shape[0], rank)


def _rank_axis(name: str) -> int | None:
  leaves = zip(_LEAVES, _EMBEDDING_LEAVES, strict=True)
  for axis, suffixes in enumerate(leaves):
    if name.endswith(suffixes):
      return axis
  return None


def _pad_rank(
  name: str,
  array: np.ndarray,
  shape: Shape,
  factors: Mapping[str, tuple[int, float]],
) -> np.ndarray:
  """Pads an array to its site's rank with zeros, and scales a B."""
  _, factor = factors.get(module_of(name), (0, 1.0))
  if _rank_axis(name) == 1 and factor != 1.0:
    array = array.astype(np.float32) * np.float32(factor)
  if array.shape == shape:
    return array
  padded = np.zeros(shape, array.dtype)
  padded[tuple(slice(size) for size in array.shape)] = array
  return padded

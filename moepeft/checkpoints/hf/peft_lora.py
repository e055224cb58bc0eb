# SPDX-License-Identifier: Apache-2.0
"""LoRA and DoRA of Hugging Face's `peft`, in our names and shapes.

Modules may differ in rank and alpha (`rank_pattern`, `alpha_pattern`), layers
of one module too. A site of ours has one rank and one alpha for all layers: the
largest rank, smaller ones filled with zeros, and the alpha of the first layer
that has it; what another layer's scale differs by is multiplied into its B.
Sites of another rank or alpha are another `lora` of the method's text.
"""

import collections
import dataclasses
import itertools
import re
import string
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from moepeft.checkpoints.adapter import site_patterns, sites_in
from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.hf import peft_config
from moepeft.checkpoints.hf.peft_names import PREFIX, module_of, own_module
from moepeft.config import method_string
from moepeft.config.method_string import Spec
from moepeft.models import weight_mapping
from moepeft.models.weight_mapping import CheckpointError, Rule, Shape, Tree
from moepeft.peft.methods.lora import Lora

# Of arrays beside a linear module, and beside an embedding, [r, v] and [d, r].
_LEAVES = ('lora_A.weight', 'lora_B.weight')
_OF_TABLES = ('lora_embedding_A', 'lora_embedding_B')
_MAGNITUDE = 'lora_magnitude_vector'
# peft keeps the frozen table beside an adapter of it.
_COPY = re.compile(r'base_model\.model\.(.*)\.base_layer\.weight')


@dataclasses.dataclass(frozen=True)
class Site:
  """An adapted site.

  Attributes:
    path: 'decoder/self/q', 'embed' or 'head'.
    rank, alpha: of ours.
    factors: {module: (its rank, what its B is multiplied by)}.
  """

  path: str
  rank: int
  alpha: float
  factors: Mapping[str, tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Read:
  """An adapter as the rules see it: one rank a site.

  Attributes:
    method, rules: in our words.
    letters: sizes of the ranks' letters.
    shapes, fetch: of the arrays by their names, filled to their site's rank.
  """

  method: str
  rules: list[Rule]
  letters: dict[str, int]
  shapes: dict[str, Shape]
  fetch: Callable[[str], np.ndarray]


def read(config: Any, fields: Mapping[str, Any], tensors: Any) -> Read:
  """
  Args:
    config: of the base model.
    fields: of adapter_config.json, as `peft_config.read` returns them.
    tensors: of adapter_model.safetensors.

  Raises:
    CheckpointError: ranks differ from what the fields say, the copy of a
      table has another shape than the model's, or the adapter is tied.
  """
  family = hf.family_of(config)
  places = family.projections(config) | family.hf.peft_ends(config)
  shapes = _without_copies(config, tensors.shapes)
  all_sites = [
    site
    for path in places
    if (site := _site(config, path, fields, shapes)) is not None
  ]
  ends = [site.path for site in all_sites if '/' not in site.path]
  if ends and fields.get('ensure_weight_tying') and config.tied:
    raise CheckpointError(
      f'the adapter is at {" and ".join(ends)} of a model whose head is its '
      'embedding, and ties the two (ensure_weight_tying), which is not '
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
  specs, rules, letters = [], [], {}
  for i, ((rank, alpha), sites) in enumerate(groups.items()):
    letter = string.ascii_uppercase[i]
    letters[letter] = rank
    instance = kind if i == 0 else f'{kind}_{i + 1}'
    paths = [site.path for site in sites]
    specs.append(_spec(kind, rank, alpha, fields, paths, places))
    for path in paths:
      rules += rules_at(config, path, kind, instance, letter)
  factors = dict(
    itertools.chain.from_iterable(site.factors.items() for site in all_sites)
  )
  ranks = {module: site.rank for site in all_sites for module in site.factors}
  method = method_string.format_method(tuple(specs))
  filled = {
    name: _filled_shape(name, shape, ranks) for name, shape in shapes.items()
  }
  fetch = lambda name: _filled(  # noqa: E731
    name, tensors.fetch(name), filled[name], factors
  )
  return Read(method, rules, letters, filled, fetch)


def rules_at(
  config: Any, path: str, kind: str, instance: str, letter: str = 'r'
) -> list[Rule]:
  """Rules of a `lora` at a site, or of a `dora`, which has a magnitude too.

  Args:
    instance: its name in the tree, 'lora' or 'lora_2'.
    letter: of its rank.
  """
  family = hf.family_of(config)
  ends = family.hf.peft_ends(config)
  inner, outer = (family.projections(config) | ends)[path]
  within = path if path in ends else weight_mapping.in_layers(path)
  instance_path = f'{within}/{instance}'
  module_name = f'{PREFIX}{own_module(config, path)}'
  a, b = _leaves(path)
  rules = [
    Rule(
      f'{instance_path}/a',
      f'{module_name}.{a}',
      inner + letter,
      f'{letter}({inner})',
    ),
    Rule(
      f'{instance_path}/b',
      f'{module_name}.{b}',
      letter + outer,
      f'({outer}){letter}',
    ),
  ]
  if kind == 'dora':
    name = f'{module_name}.{_MAGNITUDE}'
    rules.append(Rule(f'{instance_path}/magnitude', name, outer, f'({outer})'))
  return rules


def describe(
  config: Any, tree: Tree, specs: Mapping[str, Spec]
) -> tuple[dict[str, Any], list[Rule], dict[str, int]]:
  """(fields of adapter_config.json, rules, sizes of the ranks' letters).

  Args:
    tree: the 'peft' tree; specs: its instances of one kind, 'lora', 'lora_2'.

  Raises:
    CheckpointError: two of them are at one site or differ in more than rank,
      alpha and sites, or one is at a site that peft does not adapt.
  """
  family = hf.family_of(config)
  peft_sites = family.projections(config) | family.hf.peft_ends(config)
  fields, rules, letters, adapted_sites = {}, [], {}, set()
  for letter, (instance, spec) in zip(
    string.ascii_uppercase, specs.items(), strict=False
  ):
    at = sites_in(tree, instance)
    require(at, peft_sites)
    rank = next(iter(at.values()))['a'].shape[-1]
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
    if adapted_sites & set(at) or common.items() - fields.items():
      raise CheckpointError(
        'peft keeps one LoRA a module, and all of one adapter with the same '
        f'options beside rank and alpha: {instance} is at a site of another '
        'or differs in more; write the moepeft form instead'
      )
    for name, value, usual in (
      ('rank_pattern', rank, fields['r']),
      ('alpha_pattern', alpha, fields['lora_alpha']),
    ):
      if value != usual:
        patterns = fields.setdefault(name, {})
        patterns |= {_pattern(config, path): value for path in at}
    adapted_sites |= set(at)
    letters[letter] = rank
    for path in at:
      rules += rules_at(config, path, spec.name, instance, letter)
  if len(letters) < len(specs):
    raise CheckpointError(
      f'at most {len(string.ascii_uppercase)} LoRAs are written as one of '
      'peft; write the moepeft form instead'
    )
  return fields, rules, letters


def _pattern(config: Any, path: str) -> str:
  """The modules of a site, as a key of peft's patterns."""
  module = re.escape(hf.family_of(config).hf.module_name(path, config))
  return module.replace(re.escape('{l}'), r'\d+')


def require(at: Mapping[str, Tree], peft_sites: Collection[str]) -> None:
  """
  Raises:
    CheckpointError: an adapter is at no site, or at others than `known`.
  """
  foreign = sorted(set(at) - set(peft_sites))
  if foreign or not at:
    raise CheckpointError(
      f'peft adapts projections, embedding and head; this adapter is at '
      f'{", ".join(foreign) or "no site"}: write the moepeft form instead'
    )


def _leaves(path: str) -> tuple[str, str]:
  return _OF_TABLES if path == 'embed' else _LEAVES


def _without_copies(
  config: Any, shapes: Mapping[str, Shape]
) -> dict[str, Shape]:
  """The arrays less copies of the base's frozen tables."""
  family = hf.family_of(config)
  sizes = family.axis_sizes(config)
  table = (sizes['v'], sizes['d'])
  tables = {own_module(config, path) for path in family.hf.peft_ends(config)}
  remaining = {}
  for name, shape in shapes.items():
    match = _COPY.fullmatch(name)
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
  """The site with the layers that are adapted, or None."""
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


def _spec(kind, rank, alpha, fields, paths, places) -> Spec:
  options = [('rank', rank), ('alpha', alpha)]
  if fields.get('use_rslora'):
    options.append(('rslora', True))
  if fields.get('lora_dropout'):
    options.append(('dropout', fields['lora_dropout']))
  inside = [path for path in paths if '/' in path]
  layer_sites = [path for path in places if '/' in path]
  patterns = [site_patterns(inside, layer_sites)] if inside else []
  patterns += [path for path in paths if '/' not in path]
  options.append(('targets', '|'.join(patterns)))
  return Spec(kind, tuple(options))


def _filled_shape(name: str, shape: Shape, ranks: Mapping[str, int]) -> Shape:
  rank = ranks.get(module_of(name))
  axis = _rank_axis(name)
  if rank is None or axis is None or len(shape) != 2:
    return shape
  return (rank, shape[1]) if axis == 0 else (shape[0], rank)


def _rank_axis(name: str) -> int | None:
  leaves = zip(_LEAVES, _OF_TABLES, strict=True)
  for axis, ends in enumerate(leaves):
    if name.endswith(ends):
      return axis
  return None


def _filled(
  name: str,
  array: np.ndarray,
  shape: Shape,
  factors: Mapping[str, tuple[int, float]],
) -> np.ndarray:
  """An array with zeros up to its site's rank, a B times its factor."""
  _, factor = factors.get(module_of(name), (0, 1.0))
  if _rank_axis(name) == 1 and factor != 1.0:
    array = array.astype(np.float32) * np.float32(factor)
  if array.shape == shape:
    return array
  wide = np.zeros(shape, array.dtype)
  wide[tuple(slice(size) for size in array.shape)] = array
  return wide

# SPDX-License-Identifier: Apache-2.0
"""Adapters of `peft` that compute a LoRA: VeRA, AdaLoRA, LoHa and LoKr.

They are read as the LoRA of the same function, with its scale in B. A LoHa of
the rank r has the rank r^2, a LoKr that of its factors multiplied.
"""

import collections
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from moepeft.checkpoints.adapter import sites_in
from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.hf import peft_config, peft_lora
from moepeft.checkpoints.hf.peft_names import PREFIX, site_module
from moepeft.config.method_string import Spec
from moepeft.models.weight_mapping import (
  CheckpointError,
  Rule,
  Shape,
  Tree,
  path_in_layers,
)
from moepeft.peft.methods.vera import Vera

_VERA_MATRICES = ('base_model.vera_A', 'base_model.vera_B')
_VECTORS = ('vera_lambda_d', 'vera_lambda_b')
_LOHA = ('hada_w1_a', 'hada_w1_b', 'hada_w2_a', 'hada_w2_b')
_ADALORA = ('lora_A', 'lora_E', 'lora_B')
_LEAVES = (
  *_VECTORS,
  *_ADALORA,
  *_LOHA,
  *(f'lokr_w{i}{part}' for i in (1, 2) for part in ('', '_a', '_b')),
)


class LoraTensors:
  """Arrays in memory by the names of a LoRA, as `directory.Tensors`."""

  def __init__(self, arrays: Mapping[str, np.ndarray]):
    self._arrays = dict(arrays)
    self.shapes: dict[str, Shape] = {n: a.shape for n, a in arrays.items()}

  def fetch(self, name: str) -> np.ndarray:
    return self._arrays[name]


def as_lora(
  config: Any, fields: Mapping[str, Any], tensors: Any
) -> tuple[dict[str, Any], LoraTensors]:
  """The fields and the arrays of the LoRA of the same function.

  Args:
    config: of the base model.
    fields: of adapter_config.json, as `peft_config.read` returns them.
    tensors: of adapter_model.safetensors.

  Raises:
    CheckpointError: an array is missing or has another shape than its like.
  """
  modules: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
  arrays = {}
  for name in tensors.shapes:
    module, _, leaf = name.rpartition('.')
    if leaf in _LEAVES:
      modules[module][leaf] = np.asarray(tensors.fetch(name), np.float32)
    elif name not in _VERA_MATRICES:
      arrays[name] = tensors.fetch(name)
  try:
    factors = _FORMS[fields['peft_type']](config, fields, modules, tensors)
  except (KeyError, ValueError) as error:
    raise CheckpointError(
      f'the adapter is no {fields["peft_type"]} of this model ({error}): give '
      'the base model that it was trained on'
    ) from None
  ranks = {}
  for module, (a, b) in factors.items():
    if not len(a):
      continue
    arrays |= {f'{module}.lora_A.weight': a, f'{module}.lora_B.weight': b}
    ranks[re.escape(module.removeprefix(PREFIX))] = len(a)
  rank = max(ranks.values(), default=1)
  names = ('base_model_name_or_path', 'target_modules', 'fan_in_fan_out')
  lora = {name: fields[name] for name in names if name in fields}
  lora |= {'peft_type': 'LORA', 'r': rank, 'lora_alpha': rank}
  # The scale is one.
  lora |= {'rank_pattern': ranks, 'alpha_pattern': ranks}
  return lora, LoraTensors(arrays)


def _vera_factors(config, fields, modules, tensors):
  """{module: (d A, b B)} with the shared A and B cut to the module."""
  outputs = {m: len(arrays['vera_lambda_b']) for m, arrays in modules.items()}
  inputs = _inputs(config, outputs)
  if _VERA_MATRICES[0] in tensors.shapes:
    a, b = (np.float32(tensors.fetch(name)) for name in _VERA_MATRICES)
  else:
    largest = max(inputs.values()), max(outputs.values())
    a, b = _torch_matrices(fields, *largest)
  return {
    module: (
      arrays['vera_lambda_d'][:, None] * a[:, : inputs[module]],
      arrays['vera_lambda_b'][:, None] * b[: outputs[module]],
    )
    for module, arrays in modules.items()
  }


def _torch_matrices(fields, inputs, outputs):
  """A and B that peft draws from a seed where its file has none.

  torch takes the lower 24 bits of each number of MT19937.
  """
  generator = np.random.RandomState(fields.get('projection_prng_key', 0))
  matrices = []
  for shape in ((fields['r'], inputs), (outputs, fields['r'])):
    bits = generator.randint(0, 2**32, math.prod(shape), np.uint32)
    numbers = (bits & 0xFFFFFF).astype(np.float32) / 2**23 - 1
    bound = np.float32((6 / shape[1]) ** 0.5)
    matrices.append(numbers.reshape(shape) * bound)
  return matrices


def _inputs(config: Any, outputs: Mapping[str, int]) -> dict[str, int]:
  """The number of inputs of modules of the base.

  Args:
    outputs: {module: its number of outputs}.
  """
  shapes = {e.stored_name: e.stored_shape for e in hf.model_entries(config)}
  inputs = {}
  for module, size in outputs.items():
    shape = shapes[f'{module.removeprefix(PREFIX)}.weight']
    if size not in shape:
      raise ValueError(f'{module} has {size} outputs, its weight is {shape}')
    # [out, in], or [in, out] of a Conv1D.
    inputs[module] = math.prod(shape) // size
  return inputs


def _adalora_factors(config, fields, modules, tensors):
  """B diag(E) A; the scale stays that of the initial rank after pruning."""
  del config, tensors
  factors = {}
  # As peft has it, its small number too.
  scale = (fields['lora_alpha'] or fields['init_r']) / (fields['init_r'] + 1e-5)
  for module, arrays in modules.items():
    a, e, b = (arrays[name] for name in _ADALORA)
    factors[module] = (a * e, np.float32(scale) * b)
  return factors


def _loha_factors(config, fields, modules, tensors):
  """The columns of a product by elements are those of both, each by each."""
  del config, tensors
  factors = {}
  for module, arrays in modules.items():
    a1, b1, a2, b2 = (arrays[name] for name in _LOHA)
    scale = _scale(fields, module)
    up = (a1[:, :, None] * a2[:, None, :]).reshape(len(a1), -1)
    down = (b1[:, None, :] * b2[None, :, :]).reshape(-1, b1.shape[1])
    factors[module] = (down, scale * up)
  return factors


def _lokr_factors(config, fields, modules, tensors):
  """kron(L1 R1, L2 R2) is kron(L1, L2) kron(R1, R2)."""
  del config, tensors
  factors = {}
  for module, arrays in modules.items():
    (l1, r1), (l2, r2) = (_kronecker_factor(arrays, i) for i in (1, 2))
    scale = np.float32(_scale(fields, module))
    factors[module] = (np.kron(r1, r2), scale * np.kron(l1, l2))
  return factors


def _kronecker_factor(arrays, i) -> tuple[np.ndarray, np.ndarray]:
  """(L, R) with the factor i as L R; a whole matrix is one of the two."""
  whole = arrays.get(f'lokr_w{i}')
  if whole is None:
    return arrays[f'lokr_w{i}_a'], arrays[f'lokr_w{i}_b']
  rows, columns = whole.shape
  if rows < columns:
    return np.eye(rows, dtype=np.float32), whole
  return whole, np.eye(columns, dtype=np.float32)


def _scale(fields, module) -> float:
  name = module.removeprefix(PREFIX)
  values = (
    peft_config.pattern_value(fields, f'{key}_pattern', name, fields[default])
    for key, default in (('alpha', 'alpha'), ('rank', 'r'))
  )
  alpha, rank = values
  return alpha / rank


# By peft_type.
_FORMS = {
  'VERA': _vera_factors,
  'ADALORA': _adalora_factors,
  'LOHA': _loha_factors,
  'LOKR': _lokr_factors,
}


def vera_of(spec: Spec) -> Vera:
  return Vera(**{name: v for name, v in spec.options if name != 'targets'})


def describe_vera(
  config: Any, tree: Tree, spec: Spec
) -> tuple[dict[str, Any], list[Rule], dict[str, int]]:
  """(fields of adapter_config.json, rules, size of the rank's letter).

  Raises:
    CheckpointError: a site is no projection.
  """
  vera, rules = vera_of(spec), []
  projections = hf.family_of(config).projections(config)
  sites = sites_in(tree, spec.name)
  peft_lora.check_sites(sites, projections)
  for site in sites:
    path = f'{path_in_layers(site)}/{spec.name}'
    name = f'{PREFIX}{site_module(config, site)}'
    out = projections[site][1]
    rules += [
      Rule(f'{path}/d', f'{name}.{_VECTORS[0]}', 'r', 'r'),
      Rule(f'{path}/b', f'{name}.{_VECTORS[1]}', out, f'({out})'),
    ]
  fields = {
    'peft_type': 'VERA',
    'r': vera.rank,
    'd_initial': vera.d_initial,
    'projection_prng_key': vera.seed,
    'save_projection': True,
    'vera_dropout': vera.dropout,
    'bias': 'none',
  }
  return fields, rules, {'r': vera.rank}


def with_matrices(
  config: Any, arrays: Mapping[str, np.ndarray], vera: Vera
) -> dict[str, np.ndarray]:
  """The arrays of a VeRA with A and B of the largest module, as peft has them.

  peft scales A by the largest number of inputs, moepeft by a module's own: d
  takes the difference.

  Args:
    arrays: {name in peft: array}, of the vectors.
  """
  vectors_d, vectors_b = (
    {n.rpartition('.')[0]: a for n, a in arrays.items() if n.endswith(leaf)}
    for leaf in _VECTORS
  )
  outputs = {module: len(b) for module, b in vectors_b.items()}
  inputs = _inputs(config, outputs)
  largest = max(inputs.values()), max(outputs.values())
  scaled = {
    f'{module}.{_VECTORS[0]}': d
    * np.float32((largest[0] / inputs[module]) ** 0.5)
    for module, d in vectors_d.items()
  }
  matrices = vera.matrices(*((size,) for size in largest))
  transposed = (np.ascontiguousarray(np.asarray(m).T) for m in matrices)
  named = dict(zip(_VERA_MATRICES, transposed, strict=True))
  return {**arrays, **scaled, **named}

# SPDX-License-Identifier: Apache-2.0
"""Adapters of `peft` that compute a LoRA: VeRA, AdaLoRA, LoHa and LoKr.

They are read as the LoRA of the same function, with its scale in B. A LoHa of
the rank r has the rank r^2, a LoKr that of its factors multiplied. A VeRA that
moepeft wrote stays one, see `peft_vera`.
"""

import collections
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from moepeft.checkpoints.hf import peft_config, peft_vera
from moepeft.checkpoints.hf.peft_names import PREFIX
from moepeft.models.weight_mapping import CheckpointError, Shape

_LOHA = ('hada_w1_a', 'hada_w1_b', 'hada_w2_a', 'hada_w2_b')
_ADALORA = ('lora_A', 'lora_E', 'lora_B')
_LEAVES = (
  *peft_vera.VECTORS,
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
    elif name not in peft_vera.MATRICES:
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
  'VERA': peft_vera.factors,
  'ADALORA': _adalora_factors,
  'LOHA': _loha_factors,
  'LOKR': _lokr_factors,
}

# SPDX-License-Identifier: Apache-2.0
"""VeRA of `peft`: written, and read where its matrices are those of moepeft.

The matrices of an adapter that peft trained come from torch, and are no
function of moepeft's seed: such an adapter is read as a LoRA (`factors`).
"""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from moepeft.checkpoints.adapter import site_patterns, sites_in
from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.hf import peft_lora
from moepeft.checkpoints.hf.peft_names import PREFIX, site_module
from moepeft.config.method_string import Spec
from moepeft.models.weight_mapping import Rule, Tree, path_in_layers
from moepeft.peft.methods.vera import Vera

PEFT_TYPE = 'VERA'
MATRICES = ('base_model.vera_A', 'base_model.vera_B')
VECTORS = ('vera_lambda_d', 'vera_lambda_b')


def vera_of(spec: Spec) -> Vera:
  return Vera(**{name: v for name, v in spec.options if name != 'targets'})


def describe(
  config: Any, tree: Tree, spec: Spec
) -> tuple[dict[str, Any], list[Rule], dict[str, int]]:
  """(fields of adapter_config.json, rules, size of the rank's letter).

  Raises:
    CheckpointError: a site is no projection.
  """
  vera, sites = vera_of(spec), sites_in(tree, spec.name)
  peft_lora.check_sites(sites, hf.family_of(config).projections(config))
  fields = {
    'peft_type': PEFT_TYPE,
    'r': vera.rank,
    'd_initial': vera.d_initial,
    'projection_prng_key': vera.seed,
    'save_projection': True,
    'vera_dropout': vera.dropout,
    'bias': 'none',
  }
  return fields, _rules(config, sites), {'r': vera.rank}


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
    for leaf in VECTORS
  )
  outputs = {module: len(b) for module, b in vectors_b.items()}
  inputs = _inputs(config, outputs)
  largest = max(inputs.values())
  scaled = {
    f'{module}.{VECTORS[0]}': d * np.float32((largest / inputs[module]) ** 0.5)
    for module, d in vectors_d.items()
  }
  matrices = _matrices(vera, largest, max(outputs.values()))
  return {**arrays, **scaled, **dict(zip(MATRICES, matrices, strict=True))}


def read(
  config: Any, fields: Mapping[str, Any], tensors: Any
) -> peft_lora.LoraAdapter | None:
  """The adapter with its vectors; None where its matrices are not moepeft's.

  Args: as of `peft_low_rank.as_lora`.
  """
  vectors = [n for n in tensors.shapes if n.endswith(VECTORS)]
  outputs = {
    n.rpartition('.')[0]: math.prod(tensors.shapes[n])
    for n in vectors
    if n.endswith(VECTORS[1])
  }
  if not outputs or not {*MATRICES} <= tensors.shapes.keys():
    return None
  vera = Vera(rank=fields['r'], seed=fields.get('projection_prng_key', 0))
  try:
    inputs = _inputs(config, outputs)
  except (KeyError, ValueError):
    # Of another model; as a LoRA it is refused.
    return None
  largest = max(inputs.values())
  matrices = _matrices(vera, largest, max(outputs.values()))
  for name, matrix in zip(MATRICES, matrices, strict=True):
    stored = np.asarray(tensors.fetch(name), np.float32)
    if stored.shape != matrix.shape or not np.allclose(stored, matrix):
      return None

  def fetch(name: str) -> np.ndarray:
    array = np.asarray(tensors.fetch(name), np.float32)
    if name.endswith(VECTORS[0]):
      size = inputs[name.rpartition('.')[0]]
      return array / np.float32((largest / size) ** 0.5)
    return array

  projections = hf.family_of(config).projections(config)
  sites = [s for s in projections if _is_adapted(config, s, outputs)]
  options = {'rank': vera.rank, 'seed': vera.seed}
  options['targets'] = site_patterns(sites, projections)
  return peft_lora.LoraAdapter(
    str(Spec('vera', tuple(options.items()))),
    _rules(config, sites),
    {'r': vera.rank},
    {name: tensors.shapes[name] for name in vectors},
    fetch,
  )


def _is_adapted(config: Any, site: str, modules: Collection[str]) -> bool:
  """Whether modules at a site are among those of an adapter."""
  name = re.escape(PREFIX + site_module(config, site))
  pattern = name.replace(re.escape('{l}'), r'\d+')
  return any(re.fullmatch(pattern, module) for module in modules)


def _rules(config: Any, sites: Collection[str]) -> list[Rule]:
  projections, rules = hf.family_of(config).projections(config), []
  for site in sites:
    path = f'{path_in_layers(site)}/vera'
    name = f'{PREFIX}{site_module(config, site)}'
    out = projections[site][1]
    rules += [
      Rule(f'{path}/d', f'{name}.{VECTORS[0]}', 'r', 'r'),
      Rule(f'{path}/b', f'{name}.{VECTORS[1]}', out, f'({out})'),
    ]
  return rules


def _matrices(vera: Vera, inputs: int, outputs: int) -> list[np.ndarray]:
  """A [r, in] and B [out, r], as torch has them."""
  matrices = vera.matrices((inputs,), (outputs,))
  return [np.ascontiguousarray(np.asarray(m).T) for m in matrices]


def factors(config, fields, modules, tensors):
  """{module: (d A, b B)} with the shared A and B cut to the module."""
  outputs = {m: len(arrays['vera_lambda_b']) for m, arrays in modules.items()}
  inputs = _inputs(config, outputs)
  if MATRICES[0] in tensors.shapes:
    a, b = (np.float32(tensors.fetch(name)) for name in MATRICES)
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

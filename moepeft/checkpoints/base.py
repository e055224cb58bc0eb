# SPDX-License-Identifier: Apache-2.0
"""Loads the base model and the initial adapter that a config names."""

import dataclasses
from types import ModuleType
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from moepeft.checkpoints import formats as checkpoint_formats
from moepeft.checkpoints import from_adapters, quantize
from moepeft.checkpoints.gguf import model as gguf
from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.open_adapter import (
  check_base,
  load_adapter,
  resolve,
)
from moepeft.checkpoints.t5x import model as t5x
from moepeft.config import budget
from moepeft.core.types import Batch, Tree
from moepeft.models import FAMILIES, ModelFamily, weight_mapping
from moepeft.nn import initializers
from moepeft.nn.adapter_hook import AdapterMap
from moepeft.nn.expert_padding import PaddedAxis
from moepeft.peft import Built, build
from moepeft.peft.build import function_of


@dataclasses.dataclass(frozen=True)
class Base:
  """A base model without adapters.

  Attributes:
    family: its entry in moepeft.models.FAMILIES.
    config: the family's config.
    params: host arrays, or None for random weights.
    path: the path in the config; '' for random weights.
    sha256: the content hash of `params` as stored, '' for random weights.
    quantise: the format of the projections, 'int8' or 'nf4'; '' if they are not
      quantized.
    folder: the directory or file that was read, also for a name on the hub.
  """

  family: ModelFamily
  config: Any
  params: Tree | None
  path: str
  sha256: str
  quantise: str = ''
  folder: str = ''


def shape(model: ConfigDict) -> tuple[ModelFamily, Any]:
  """(family, config) of a model, without reading its weights.

  If both a head and an embedding are stored, they are compared, as the config
  says whether they are tied.

  Raises:
    ValueError: a name is unknown, or a shape is invalid.
  """
  if model.path:
    if model.shape:
      raise ValueError(
        f'config.model.shape is for random weights, but {model.path} defines '
        "its shape; set config.model.path to '', or leave "
        f'{", ".join(model.shape)} out'
      )
    path = resolve(model.path)
    config = _format_module(path).load_config(path)
    return _family(model, config), _with_dropout(config, model)
  if model.family not in FAMILIES:
    raise ValueError(
      'without config.model.path, config.model.family is one of '
      f'{", ".join(FAMILIES)}; got {model.family!r}'
    )
  family = FAMILIES[model.family]
  config = family.config(model.size, model.version)
  return family, _with_dropout(_with_shape(family, config, model.shape), model)


def _with_shape(family: ModelFamily, config: Any, changes: ConfigDict) -> Any:
  """The config with the fields that config.model.shape changes."""
  fields = dataclasses.asdict(config)
  for key, value in changes.to_dict().items():
    # The model config would ignore it.
    if key in ('dropout', 'family'):
      raise ValueError(
        f'config.model.shape.{key} has no effect; set config.model.{key}'
      )
    is_nested = isinstance(value, dict) and isinstance(fields.get(key), dict)
    fields[key] = {**fields[key], **value} if is_nested else value
  try:
    return family.from_fields(fields)
  except ValueError as e:
    raise ValueError(f'config.model.shape.{e}') from e


def _format_module(path: str) -> ModuleType:
  """The module that reads the format of the base at a path."""
  return {'t5x': t5x, 'gguf': gguf}.get(checkpoint_formats.detect(path), hf)


def _with_dropout(config: Any, model: ConfigDict) -> Any:
  return dataclasses.replace(config, dropout=model.dropout)


def _family(model: ConfigDict, config: Any) -> ModelFamily:
  """The family of a loaded config; config.model.family must agree."""
  if model.family not in ('', config.family):
    raise ValueError(
      f'{model.path} is of the family {config.family!r}, config.model.family '
      f"is {model.family!r}; set it to '' or leave it out"
    )
  return FAMILIES[config.family]


def load(model: ConfigDict) -> Base:
  """Reads the base that `config.model` names, and quantizes it if configured.

  Raises:
    ValueError: there is no base, or it is damaged or unsupported.
  """
  if model.quantize:
    quantize.check(model.quantize)
  if not model.path:
    if model.quantize:
      raise ValueError(
        f'config.model.quantize={model.quantize!r} is for pretrained weights; '
        "set config.model.path, or set quantize to ''"
      )
    family, config = shape(model)
    return Base(family, config, None, '', '')
  path = resolve(model.path)
  kind, dtype = model.quantize, jnp.dtype(model.param_dtype)
  # The stored weights are quantized; only the rest is cast to param_dtype.
  loaded = _format_module(path).load(path, dtype='float32' if kind else dtype)
  family = _family(model, loaded.config)
  config = _with_dropout(loaded.config, model)
  params = loaded.params
  if kind:
    params = quantize.pack(params, config, kind, dtype)
  folder = loaded.path
  return Base(family, config, params, model.path, loaded.sha256, kind, folder)


def with_resolved_method(config: ConfigDict) -> ConfigDict:
  """The config with the options that `from_adapters` reads from its files.

  The method can then be built without the files; methods without
  `from_adapters` are not changed.

  Raises:
    ValueError: as `from_adapters.resolve_method`.
  """
  if not from_adapters.reads_files(config.method):
    return config
  config = config.copy_and_resolve_references()
  family, model = shape(config.model)
  config.method = from_adapters.resolve_method(
    config.method, family.sites(model), model
  )
  return config


def _build(config: ConfigDict, family: ModelFamily, shape: Any) -> Built:
  if request := budget.request(config):
    raise ValueError(
      f'{request!r} is not solved yet; write the method that python -m '
      'moepeft.count prints for it, and leave budget and scale out'
    )
  sites = family.sites(shape)
  method = from_adapters.resolve_method(config.method, sites, shape)
  return build(method, sites, config.semantics)


def with_experts(
  variables: dict[str, Tree], model: Any, built: Built, base: Base
) -> tuple[dict[str, Tree], list[dict[str, str]]]:
  """(variables with the experts of `from_adapters`, their files).

  Raises:
    ValueError: as `from_adapters.load_experts`, or there are no adapters, and a
      router is computed from them.
  """
  if not from_adapters.has_trained_experts(built):
    return variables, []
  metadata = initializers.param_metadata(model, example_batch(), base.params)
  peft, files = from_adapters.load_experts(
    variables['peft'], metadata, built, base
  )
  return {**variables, 'peft': peft}, files


def module(base: Base, config: ConfigDict) -> tuple[Any, Built]:
  """(Flax module with the config's adapters, built method)."""
  built = _build(config, base.family, base.config)
  model = config.model
  return base.family.module(
    base.config,
    built.adapter_map,
    remat=model.remat,
    unroll=model.scan_unroll,
    dtype=jnp.dtype(model.dtype),
    param_dtype=jnp.dtype(model.param_dtype),
    attention=model.attention,
  ), built


def adapter_map(
  family: ModelFamily, shape: Any, config: ConfigDict
) -> AdapterMap:
  """The adapters of a config's method.

  Args:
    family, shape: from `shape`.
  """
  return _build(config, family, shape).adapter_map


def example_batch(rows: int = 1) -> Batch:
  """A minimal batch to initialize a model of any family."""
  ids = jnp.zeros((rows, 2), jnp.int32)
  tasks = {f'{side}_tasks': ids for side in ('inputs', 'targets')}
  # Without it no context has a prompt, which some routers read.
  trained = {'targets_mask': jnp.ones((rows, 2), bool)}
  return {'inputs': ids, 'decoder_inputs': ids} | tasks | trained


def initialise(base: Base, model: Any, seed: int) -> dict[str, Tree]:
  """{'params': ..., 'peft': ...}: the base's weights and an initial adapter."""
  return initializers.init_params(model, example_batch(), seed, base.params)


def logical_axes(model: Any, base: Base) -> dict[str, Tree]:
  """{'params': ..., 'peft': ...}: the logical axes of each array."""
  return initializers.logical_axes(model, example_batch(), base.params)


def padded_axes(model: Any, base: Base) -> dict[str, PaddedAxis]:
  """{path: axis} of the adapter's arrays that have padding."""
  return initializers.padded_axes(model, example_batch(), base.params)


def with_adapter(
  variables: dict[str, Tree], built: Built, path: str, base: Base
) -> dict[str, Tree]:
  """The variables with a trained adapter instead of the initial one.

  Raises:
    ValueError: the adapter computes another function than the method, its
      arrays differ, or it was trained on another base or quantization.
  """
  loaded = load_adapter(path, base.config)
  check_base(loaded, path, base)
  method, tree, semantics = loaded.method, loaded.tree, loaded.semantics
  semantics = semantics or built.semantics
  adapter_build = build(method, base.family.sites(base.config), semantics)
  advice = (
    f'set config.method to {adapter_build.method!r} and config.semantics to '
    f'{semantics!r}, or name another adapter'
  )
  if function_of(adapter_build.adapter_map) != function_of(built.adapter_map):
    raise ValueError(
      f'{path} holds {adapter_build.method!r} with {semantics!r} semantics, '
      f'the config has {built.method!r} with {built.semantics!r}; {advice}'
    )
  expected, arrays = (
    weight_mapping.flatten(variables['peft']),
    weight_mapping.flatten(tree),
  )
  weight_mapping.check(
    {name: tuple(a.shape) for name, a in expected.items()},
    {name: tuple(a.shape) for name, a in arrays.items()},
    f'{path} does not fit {built.method!r}',
    advice,
  )
  return {**variables, 'peft': tree}

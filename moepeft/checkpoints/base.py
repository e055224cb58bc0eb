# SPDX-License-Identifier: Apache-2.0
"""The base model and the starting adapter that a config names."""

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
from moepeft.core.types import Batch, Tree
from moepeft.models import FAMILIES, ModelFamily, weight_mapping
from moepeft.nn import initializers
from moepeft.nn.adapter_hook import AdapterMap
from moepeft.nn.expert_padding import PaddedAxis
from moepeft.peft import Built, build
from moepeft.peft.build import function_of


@dataclasses.dataclass(frozen=True)
class Base:
  """A base model before any method.

  Attributes:
    family: its entry in moepeft.models.FAMILIES.
    config: the family's config.
    params: host arrays, or None for random weights.
    path: as the config named it; '' for random weights.
    sha256: the content hash of `params` as stored, '' for random weights.
    quantise: what projections are kept in, 'int8' or 'nf4'; '' as they were.
    folder: the directory or file that was read, of a hub's name too.
  """

  family: ModelFamily
  config: Any
  params: Tree | None
  path: str
  sha256: str
  quantise: str = ''
  folder: str = ''


def shape(model: ConfigDict) -> tuple[ModelFamily, Any]:
  """The family and the model's config, without its weights.

  Where a head and an embedding are stored, these two are read: whether they
  are one is part of the config.

  Raises:
    ValueError: nothing is known by the names, or a shape cannot be.
  """
  if model.path:
    if model.shape:
      raise ValueError(
        f'config.model.shape is for random weights, and {model.path} has a '
        "shape of its own; set config.model.path to '', or leave "
        f'{", ".join(model.shape)} out'
      )
    path = resolve(model.path)
    config = _form(path).load_config(path)
    return _family(model, config), _with_dropout(config, model)
  if model.family not in FAMILIES:
    raise ValueError(
      f'config.model.family is one of {", ".join(FAMILIES)} where '
      f'config.model.path is empty; got {model.family!r}'
    )
  family = FAMILIES[model.family]
  config = family.config(model.size, model.version)
  return family, _with_dropout(_shaped(family, config, model.shape), model)


def _shaped(family: ModelFamily, config: Any, changes: ConfigDict) -> Any:
  """The config with the fields that config.model.shape changes."""
  fields = dataclasses.asdict(config)
  for key, value in changes.to_dict().items():
    # It would be lost.
    if key in ('dropout', 'family'):
      raise ValueError(
        f'config.model.shape.{key} is not looked at; set config.model.{key}'
      )
    is_nested = isinstance(value, dict) and isinstance(fields.get(key), dict)
    fields[key] = {**fields[key], **value} if is_nested else value
  try:
    return family.from_fields(fields)
  except ValueError as e:
    raise ValueError(f'config.model.shape.{e}') from e


def _form(path: str) -> ModuleType:
  """The module that reads the form of the base at a path."""
  return {'t5x': t5x, 'gguf': gguf}.get(checkpoint_formats.detect(path), hf)


def _with_dropout(config: Any, model: ConfigDict) -> Any:
  return dataclasses.replace(config, dropout=model.dropout)


def _family(model: ConfigDict, config: Any) -> ModelFamily:
  """The family of a config that was read; config.model.family must agree."""
  if model.family not in ('', config.family):
    raise ValueError(
      f'{model.path} is of the family {config.family!r}, config.model.family '
      f"is {model.family!r}; set it to '' or leave it out"
    )
  return FAMILIES[config.family]


def load(model: ConfigDict) -> Base:
  """Reads the base that `config.model` names, and quantises it if it says so.

  Raises:
    ValueError: nothing there, or not of the form it should be.
  """
  if model.quantize:
    quantize.check(model.quantize)
  if not model.path:
    if model.quantize:
      raise ValueError(
        f'config.model.quantize={model.quantize!r} is for weights that are '
        "read; set config.model.path, or quantise to ''"
      )
    family, config = shape(model)
    return Base(family, config, None, '', '')
  path = resolve(model.path)
  kind, dtype = model.quantize, jnp.dtype(model.param_dtype)
  # Codes are of what is stored, whatever the rest is cast to.
  loaded = _form(path).load(path, dtype='float32' if kind else dtype)
  family = _family(model, loaded.config)
  config = _with_dropout(loaded.config, model)
  params = loaded.params
  if kind:
    params = quantize.pack(params, config, kind, dtype)
  where = loaded.path
  return Base(family, config, params, model.path, loaded.sha256, kind, where)


def with_resolved_method(config: ConfigDict) -> ConfigDict:
  """The config with a method that names its experts' form and sites.

  Only a method with `from_adapters` changes: it can then be built without the
  adapters' files.

  Raises:
    ValueError: as `from_adapters.resolved`.
  """
  if not from_adapters.reads_files(config.method):
    return config
  config = config.copy_and_resolve_references()
  family, model = shape(config.model)
  config.method = from_adapters.resolved(
    config.method, family.sites(model), model
  )
  return config


def _build(config: ConfigDict, family: ModelFamily, shape: Any) -> Built:
  sites = family.sites(shape)
  method = from_adapters.resolved(config.method, sites, shape)
  return build(method, sites, config.semantics)


def with_experts(
  variables: dict[str, Tree], model: Any, built: Built, base: Base
) -> tuple[dict[str, Tree], list[dict[str, str]]]:
  """The variables with the experts of `from_adapters`, and their files.

  Raises:
    ValueError: as `from_adapters.load_experts`.
  """
  if not from_adapters.has_trained_experts(built):
    return variables, []
  metadata = initializers.param_metadata(model, example_batch(), base.params)
  peft, files = from_adapters.load_experts(
    variables['peft'], metadata, built, base
  )
  return {**variables, 'peft': peft}, files


def module(base: Base, config: ConfigDict) -> tuple[Any, Built]:
  """The Flax module of a config with its method's adapters."""
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
    family, shape: of `shape`.
  """
  return _build(config, family, shape).adapter_map


def example_batch(rows: int = 1) -> Batch:
  """The smallest batch that a model of any family can be initialised with."""
  ids = jnp.zeros((rows, 2), jnp.int32)
  tasks = {f'{side}_tasks': ids for side in ('inputs', 'targets')}
  # Without it no context has a prompt, which some routers read.
  trained = {'targets_mask': jnp.ones((rows, 2), bool)}
  return {'inputs': ids, 'decoder_inputs': ids} | tasks | trained


def initialise(base: Base, model: Any, seed: int) -> dict[str, Tree]:
  """{'params': ..., 'peft': ...}: the base's weights and a fresh adapter."""
  return initializers.init_params(model, example_batch(), seed, base.params)


def logical_axes(model: Any, base: Base) -> dict[str, Tree]:
  """{'params': ..., 'peft': ...}: the names of every array's axes."""
  return initializers.logical_axes(model, example_batch(), base.params)


def padded_axes(model: Any, base: Base) -> dict[str, PaddedAxis]:
  """{path: axis} of the adapter's arrays that have padding."""
  return initializers.padded_axes(model, example_batch(), base.params)


def with_adapter(
  variables: dict[str, Tree], built: Built, path: str, base: Base
) -> dict[str, Tree]:
  """The variables, with an adapter read from a path in place of the fresh one.

  Raises:
    ValueError: it computes something else than the method, was trained on
      another base or on one kept in other bits, or its arrays are not those
      of the method.
  """
  start = load_adapter(path, base.config)
  check_base(start, path, base)
  method, tree, semantics = start.method, start.tree, start.semantics
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

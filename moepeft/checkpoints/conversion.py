# SPDX-License-Identifier: Apache-2.0
"""Base models and adapters from one format to another: the work of convert."""

from pathlib import Path
from typing import Any

from moepeft.checkpoints import adapter as adapter_file
from moepeft.checkpoints import directory, quantize
from moepeft.checkpoints import formats as checkpoint_formats
from moepeft.checkpoints.adapter import AdapterWeights
from moepeft.checkpoints.directory import LoadedCheckpoint
from moepeft.checkpoints.gguf import model as gguf
from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.hf import peft
from moepeft.checkpoints.t5x import model as t5x
from moepeft.core.types import Tree
from moepeft.models import FAMILIES, weight_mapping
from moepeft.models.weight_mapping import CheckpointError
from moepeft.peft import build
from moepeft.peft.merge import merge

SEMANTICS = 'official'  # of adapters in the formats of T5X and peft


def load_base(
  path: str, dtype: str | None = None, top_k: int | None = None
) -> LoadedCheckpoint:
  """Loads a base model of any format.

  Args:
    dtype: of the result; None keeps the file's.
    top_k: experts per token of an adapter in a T5X checkpoint.

  Raises:
    CheckpointError: the path holds no base model.
  """
  base_format = checkpoint_formats.detect(path)
  if base_format == 'hf':
    return hf.load(path, dtype)
  if base_format == 'gguf':
    return gguf.load(path, dtype)
  if base_format == 't5x':
    return t5x.load(path, dtype, top_k)
  raise CheckpointError(
    f'{path} is an adapter ({base_format}), expected a base model (hf, gguf '
    'or t5x)'
  )


def merged(
  base: LoadedCheckpoint,
  adapter: AdapterWeights,
  semantics: str,
  kind: str = '',
) -> Tree:
  """The parameters of a base with an adapter merged into them.

  Args:
    kind: the quantization of the base in training. The adapter is merged into
      the dequantized base, which gives the logits of training.

  Raises:
    CheckpointError: the method does not merge; the message names the formats
      that keep the adapter as it is.
  """
  sites = FAMILIES[base.config.family].sites(base.config)
  built = build(adapter.method, sites, semantics)
  params = base.params
  if kind:
    packed = quantize.pack(params, base.config, kind)
    params = quantize.unpack(packed, base.config)
  try:
    return merge(built, {'params': params, 'peft': adapter.tree})
  except ValueError as error:
    formats = _adapter_formats(base.config, adapter)
    named = ' or '.join(f'--to={name}' for name in formats)
    raise CheckpointError(
      f'{error}; {named} keeps the adapter as it is'
    ) from None


def _adapter_formats(config: Any, adapter: AdapterWeights) -> list[str]:
  """The formats that can represent an adapter without its base."""
  formats = ['moepeft']
  for name, check in (('peft', peft.check), ('t5x', t5x.check)):
    try:
      check(config, adapter)
      formats.append(name)
    except ValueError:
      continue
  return formats


def write_hf(path: str, base: LoadedCheckpoint, overwrite: bool) -> None:
  # base.path, as the input may be a name on the hub.
  hf.save(
    path, base.config, base.params, tokenizer=base.path, overwrite=overwrite
  )


def write_base_and_adapter(
  output: str,
  adapter_format: str,
  base: t5x.LoadedT5X,
  adapter: AdapterWeights,
  is_cast: bool,
  overwrite: bool,
) -> None:
  """Writes base/ and adapter/ atomically.

  Args:
    adapter_format: 'peft'; every other is 'moepeft'.
    is_cast: whether the base has another dtype than its file.
  """
  # The hash is that of base/, whose weights may be cast.
  sha256 = weight_mapping.content_hash(base.params) if is_cast else base.sha256
  path = str(Path(output) / 'base')
  with directory.atomic_directory(output, overwrite) as staging:
    write_hf(str(staging / 'base'), base, overwrite)
    target = str(staging / 'adapter')
    if adapter_format == 'peft':
      peft.save(target, base.config, adapter, path)
    else:
      metadata = describe(adapter, path, sha256, base.config)
      adapter_file.save(target, adapter.tree, metadata)


def describe(
  adapter: AdapterWeights, path: str, sha256: str, config: Any
) -> dict[str, Any]:
  """The metadata of an adapter that another format has none of.

  Args:
    path, sha256, config: of its base.
  """
  return adapter_file.describe(
    adapter.method, SEMANTICS, path, sha256, config.family, config
  )

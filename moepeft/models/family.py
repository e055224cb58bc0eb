# SPDX-License-Identifier: Apache-2.0
"""The entry of a family in FAMILIES: its Flax module and formats."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from moepeft.models.hf_fields import FieldType
from moepeft.models.hf_tensor_names import TensorNames
from moepeft.models.weight_mapping import Rule

# {site: (input axes, output axes)}, one letter per axis.
SiteAxes = dict[str, tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class HuggingFaceFormat:
  """The Hugging Face format of a family: config.json and tensors.

  Attributes:
    model_types: the values of `model_type` in config.json.
    from_fields: (config.json, tied) -> config; `tied` is whether the files
      have no separate head.
    to_fields: config -> config.json.
    tensor_names: config.json -> names that differ from those of the rules.
    rules: config -> a rule for every array.
    module_name: (site, config) -> 'model.layers.{l}.self_attn.q_proj'.
    module_names: config -> every module with a weight, as peft names it.
    peft_task: the `task_type` of the model in peft.
    peft_ends: config -> the sites of embedding and head that peft can adapt.
    field_types: types of fields that only this family reads; see `hf_fields`.
    aliases: {alternative name of a field of config.json: its name}.
    special_ids: whether config.json has the tokenizer's ids of special tokens;
      else `to_fields` sets them.
  """

  model_types: tuple[str, ...]
  from_fields: Callable[[Mapping[str, Any], bool], Any]
  to_fields: Callable[[Any], dict[str, Any]]
  tensor_names: Callable[[Mapping[str, Any]], TensorNames]
  rules: Callable[[Any], tuple[Rule, ...]]
  module_name: Callable[[str, Any], str]
  module_names: Callable[[Any], set[str]]
  peft_task: str
  peft_ends: Callable[[Any], SiteAxes]
  field_types: Mapping[str, FieldType] = dataclasses.field(default_factory=dict)
  aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
  special_ids: bool = True


@dataclasses.dataclass(frozen=True)
class GgufFormat:
  """The GGUF format of a family.

  Attributes:
    model_types: {`general.architecture`: `model_type` in config.json}.
    fields: (architecture, metadata, factors of RoPE or None) -> config.json.
    rules: config -> a rule for every tensor.
    accepts: metadata -> whether a file of the architecture is of this family.
    bias_from_tensors: whether the tensors determine which projections have a
      bias.
    interleaved_rope: whether rows of queries and keys are in the order of
      llama.cpp's RoPE, which rotates features 2i and 2i + 1.
  """

  model_types: Mapping[str, str]
  fields: Callable[[str, Mapping[str, Any], Any], dict[str, Any]]
  rules: Callable[[Any], tuple[Rule, ...]]
  accepts: Callable[[Mapping[str, Any]], bool] = lambda metadata: True
  bias_from_tensors: bool = False
  interleaved_rope: bool = False


@dataclasses.dataclass(frozen=True)
class ModelFamily:
  """An entry of FAMILIES.

  Attributes:
    module: the Flax module, `module(config, adapter_map, ...)`; the config has
      the field `family`, the entry's name.
    architecture: 'encoder-decoder', 'decoder' or 'encoder'.
    sizes: {size: config} of released models.
    config: (size, version) -> config; raises a ValueError if it is unknown.
    from_fields: `dataclasses.asdict` of a config, maybe from JSON -> config.
    sites: config -> {path: role} of all adapter sites.
    axis_sizes: config -> {axis letter: size}.
    depths: config -> {stack: layers}.
    projections: config -> the projections' sites and axes, in model order.
    hf: the format in Hugging Face's directories.
    gguf: the format in GGUF files, or None.
  """

  module: Any
  architecture: str
  sizes: Mapping[str, Any]
  config: Callable[..., Any]
  from_fields: Callable[[Mapping[str, Any]], Any]
  sites: Callable[[Any], dict[str, str]]
  axis_sizes: Callable[[Any], dict[str, int]]
  depths: Callable[[Any], dict[str, int]]
  projections: Callable[[Any], SiteAxes]
  hf: HuggingFaceFormat
  gguf: GgufFormat | None = None

  def activations(self, config: Any) -> SiteAxes:
    """The sites of activations inside feed-forwards."""
    return {
      site: ('f', 'f')
      for site, role in self.sites(config).items()
      if role in ('act', 'hidden')
    }

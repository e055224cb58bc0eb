# SPDX-License-Identifier: Apache-2.0
"""Makes the entries of FAMILIES whose module is `decoder.model.Decoder`."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from moepeft.models import config_fields, weight_mapping
from moepeft.models.decoder import arrays
from moepeft.models.decoder.arrays import DecoderNames
from moepeft.models.decoder.config import DecoderConfig, from_fields
from moepeft.models.decoder.model import Decoder, sites
from moepeft.models.family import GgufFormat, HuggingFaceFormat, ModelFamily
from moepeft.models.hf_fields import FieldType
from moepeft.models.weight_mapping import CheckpointError

# The names of LlamaForCausalLM and of similar classes.
LLAMA_NAMES = DecoderNames(
  layer='model.layers.{l}.',
  modules={
    'self/q': 'self_attn.q_proj',
    'self/k': 'self_attn.k_proj',
    'self/v': 'self_attn.v_proj',
    'self/o': 'self_attn.o_proj',
    'self/q_norm': 'self_attn.q_norm',
    'self/k_norm': 'self_attn.k_norm',
    'mlp/wi_0': 'mlp.gate_proj',
    'mlp/wi_1': 'mlp.up_proj',
    'mlp/wo': 'mlp.down_proj',
  },
  norms={
    'self/norm': 'input_layernorm',
    'mlp/norm': 'post_attention_layernorm',
  },
  post_norms={
    'self/norm': 'input_layernorm',
    'self_post_norm': 'post_attention_layernorm',
    'mlp/norm': 'pre_feedforward_layernorm',
    'mlp_post_norm': 'post_feedforward_layernorm',
  },
  embedding='model.embed_tokens',
  norm='model.norm',
  head='lm_head',
  prefix='model.',
  # RoPE frequencies in older files.
  ignored=r'model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq',
)


@dataclasses.dataclass(frozen=True)
class DecoderFormat:
  """The Hugging Face format of a family of decoders.

  Attributes:
    model_types: the values of `model_type` in config.json.
    from_fields: (config.json, tied) -> config.
    to_fields: config -> config.json. A config that `from_fields` does not
      restore is refused.
    tied: whether the head is tied if config.json does not say so.
    names: the names of the arrays.
    field_types, aliases: see `family.HuggingFaceFormat`.
  """

  model_types: tuple[str, ...]
  from_fields: Callable[[Mapping[str, Any], bool], DecoderConfig]
  to_fields: Callable[[DecoderConfig], dict[str, Any]]
  tied: bool = False
  names: DecoderNames = LLAMA_NAMES
  field_types: Mapping[str, FieldType] = dataclasses.field(default_factory=dict)
  aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def checked_from_fields(
    self, fields: Mapping[str, Any], tied: bool
  ) -> DecoderConfig:
    """Reads a `config.json`.

    Raises:
      CheckpointError: the family does not support an option.
    """
    if tied and not fields.get('tie_word_embeddings', self.tied):
      raise CheckpointError(
        'config.json says that the head is not tied (tie_word_embeddings is '
        'false, or missing and false in this family), but the files hold no '
        'head: expected a model that was saved as one for causal language '
        'modeling'
      )
    return self.from_fields(fields, bool(tied))

  def checked_to_fields(self, config: DecoderConfig) -> dict[str, Any]:
    """The content of a `config.json`.

    Raises:
      CheckpointError: config.json cannot represent an option.
    """
    fields = self.to_fields(config)
    loaded = _normalized(self.from_fields(fields, config.tied))
    unsupported = [
      name
      for name, value in _normalized(config).items()
      if loaded[name] != value
    ]
    if unsupported:
      raise CheckpointError(
        f"Hugging Face's {fields['model_type']} does not support this model's "
        f"{', '.join(unsupported)}; use moepeft's own checkpoints"
      )
    return fields


def decoder_family(
  title: str,
  sizes: Mapping[str, DecoderConfig],
  hf: DecoderFormat,
  gguf: GgufFormat | None = None,
) -> ModelFamily:
  """Makes an entry of FAMILIES.

  Args:
    title: the family's name in messages.
    sizes: {size: config} of released models.
    hf, gguf: the checkpoint formats.
  """
  return ModelFamily(
    module=Decoder,
    architecture='decoder',
    sizes=sizes,
    config=functools.partial(config_fields.released_config, title, sizes),
    from_fields=from_fields,
    sites=sites,
    axis_sizes=arrays.axis_sizes,
    depths=arrays.depths,
    projections=arrays.projections,
    hf=HuggingFaceFormat(
      model_types=hf.model_types,
      from_fields=hf.checked_from_fields,
      to_fields=hf.checked_to_fields,
      tensor_names=lambda fields: hf.names.tensor_names,
      rules=hf.names.rules,
      module_name=lambda site, config: hf.names.module(site),
      module_names=functools.partial(_module_names, hf.names),
      peft_task='CAUSAL_LM',
      peft_ends=lambda config: {'embed': ('v', 'd'), 'head': ('d', 'v')},
      field_types=hf.field_types,
      aliases=hf.aliases,
    ),
    gguf=gguf,
  )


def _module_names(names: DecoderNames, config: DecoderConfig) -> set[str]:
  return weight_mapping.module_names(
    names.rules(config), arrays.axis_sizes(config), arrays.depths(config)
  )


def _normalized(config: DecoderConfig) -> dict[str, Any]:
  """The fields in a canonical form, without dropout, which no file has."""
  fields = dataclasses.asdict(config)
  fields['scale'] = config.scale or config.head_dim**-0.5
  windowed = config.windowed or (True,) * config.layers
  windowed = tuple(layer and config.window > 0 for layer in windowed)
  fields |= {'windowed': windowed, 'window': any(windowed) and config.window}
  del fields['dropout']
  return fields

# SPDX-License-Identifier: Apache-2.0
"""The entry 't5' of FAMILIES, which includes mT5 (arXiv:2010.11934)."""

import functools

from moepeft.models import config_fields, weight_mapping
from moepeft.models.family import HuggingFaceFormat, ModelFamily
from moepeft.models.hf_fields import INTEGER, NUMBER, SIZE, SWITCH, TEXT
from moepeft.models.t5 import weights
from moepeft.models.t5.model import SIZES, T5, T5Config, config, sites


def _module_names(config: T5Config) -> set[str]:
  return weight_mapping.module_names(
    weights.hf_rules(config), weights.axis_sizes(config), weights.depths(config)
  )


_SIZE_FIELDS = (
  'd_model',
  'd_kv',
  'd_ff',
  'num_layers',
  'num_decoder_layers',
  'num_heads',
  'relative_attention_num_buckets',
  'relative_attention_max_distance',
)

FAMILY = ModelFamily(
  module=T5,
  architecture='encoder-decoder',
  sizes=SIZES,
  config=config,
  from_fields=functools.partial(config_fields.from_fields, T5Config),
  sites=sites,
  axis_sizes=weights.axis_sizes,
  depths=weights.depths,
  projections=weights.projections,
  hf=HuggingFaceFormat(
    model_types=('t5', 'mt5'),
    from_fields=weights.from_hf_fields,
    to_fields=weights.to_hf_fields,
    tensor_names=lambda fields: weights.TENSOR_NAMES,
    rules=weights.hf_rules,
    module_name=weights.hf_module,
    module_names=_module_names,
    peft_task='SEQ_2_SEQ_LM',
    # peft does not adapt the embedding that encoder and decoder share.
    peft_ends=lambda config: {'head': ('d', 'v')},
    field_types={
      **dict.fromkeys(_SIZE_FIELDS, SIZE),
      'decoder_start_token_id': INTEGER,
      'dropout_rate': NUMBER,
      'feed_forward_proj': TEXT,
      'scale_decoder_outputs': SWITCH,
    },
    aliases={
      'hidden_size': 'd_model',
      'num_attention_heads': 'num_heads',
      'num_hidden_layers': 'num_layers',
      'head_dim': 'd_kv',
    },
    special_ids=False,
  ),
)

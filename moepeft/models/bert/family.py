# SPDX-License-Identifier: Apache-2.0
"""The entry 'bert' of FAMILIES."""

import functools

from moepeft.models import config_fields
from moepeft.models.bert import weights
from moepeft.models.bert.model import SIZES, Bert, BertConfig, sites
from moepeft.models.family import HuggingFaceFormat, ModelFamily
from moepeft.models.hf_fields import NUMBER, SIZE, SWITCH, TEXT

FAMILY = ModelFamily(
  module=Bert,
  architecture='encoder',
  sizes=SIZES,
  config=functools.partial(config_fields.released_config, 'BERT', SIZES),
  from_fields=functools.partial(config_fields.from_fields, BertConfig),
  sites=sites,
  axis_sizes=weights.axis_sizes,
  depths=weights.depths,
  projections=weights.projections,
  hf=HuggingFaceFormat(
    model_types=('bert',),
    from_fields=weights.from_hf_fields,
    to_fields=weights.to_hf_fields,
    tensor_names=weights.tensor_names,
    rules=weights.hf_rules,
    module_name=weights.hf_module,
    module_names=weights.hf_modules,
    peft_task='FEATURE_EXTRACTION',
    # No peft adapters of the embedding and the head.
    peft_ends=lambda config: {},
    field_types={
      'type_vocab_size': SIZE,
      'layer_norm_eps': NUMBER,
      'hidden_dropout_prob': NUMBER,
      'position_embedding_type': TEXT,
      'is_decoder': SWITCH,
    },
  ),
)

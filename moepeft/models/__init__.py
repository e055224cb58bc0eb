# SPDX-License-Identifier: Apache-2.0
"""The families of base models. A new one is a file and a line."""

from typing import Any

from moepeft.models.bert import model as bert
from moepeft.models.bert.model import Bert, BertConfig
from moepeft.models.decoder import gemma, gpt2, llama, mistral, qwen2, qwen3
from moepeft.models.decoder.config import DecoderConfig
from moepeft.models.decoder.model import Decoder
from moepeft.models.t5 import model as t5

FAMILIES = {
  't5': t5,
  'llama': llama,
  'mistral': mistral,
  'qwen2': qwen2,
  'qwen3': qwen3,
  'gemma': gemma,
  'gpt2': gpt2,
  'bert': bert,
}


def decoder_only(model: Any) -> bool:
  """Whether a model, or a config of one, has no encoder."""
  return isinstance(model, (Decoder, DecoderConfig))


def encoder_only(model: Any) -> bool:
  """Whether a model, or a config of one, has no decoder."""
  return isinstance(model, (Bert, BertConfig))


def check_decodes(model: Any) -> None:
  """Refuses a model, or a config of one, that has no decoder.

  Raises:
    ValueError: it has none.
  """
  if encoder_only(model):
    raise ValueError(
      'the model is an encoder alone, which is neither trained nor generates '
      'here: expected a family with a decoder; set config.model to one, or '
      'ask moepeft.serve.embeddings.encoder for vectors'
    )

# SPDX-License-Identifier: Apache-2.0
"""Encodes prompts as in training, and finds the eos tokens of a model."""

import dataclasses
import os
from collections.abc import Sequence

from ml_collections import ConfigDict

from moepeft.checkpoints.gguf import model as gguf
from moepeft.core import untrusted
from moepeft.data.batching import decoder_only as batching_decoder_only
from moepeft.data.chat import dataset as chat_dataset
from moepeft.data.chat.formats import Conversation, Turn
from moepeft.data.preference.tokenize import has_chat_template
from moepeft.data.tokenizers.tokenizer import Tokenizer


def encode_text(
  tokenizer: Tokenizer, text: str, decoder_only: bool
) -> list[int]:
  """Encodes a text: with eos for an encoder, with bos for a decoder.

  Raises:
    ValueError: a decoder-only model's prompt is empty.
  """
  ids = list(tokenizer.encode(text))
  if not decoder_only:
    return [*ids, tokenizer.eos]
  ids = ids if tokenizer.bos is None else [tokenizer.bos, *ids]
  if not ids:
    raise ValueError(
      'the prompt is empty, and the tokenizer has no bos token; enter some text'
    )
  return ids


def encode_example_prompt(
  tokenizer: Tokenizer, text: str, decoder_only: bool
) -> list[int]:
  """Encodes the inputs of an example as in training."""
  if not decoder_only:
    return encode_text(tokenizer, text, decoder_only)
  return batching_decoder_only.encode_prompts(tokenizer, [text])[0]


def check_ids(ids: Sequence[int], vocab: int) -> None:
  """Checks that a prompt's ids are below `vocab`, the size of the embedding.

  Raises:
    ValueError: an id is not.
  """
  invalid = [i for i in ids if not 0 <= i < vocab]
  if invalid:
    raise ValueError(
      f'the prompt has the token {invalid[0]}, the model has tokens 0 to '
      f'{vocab - 1}: its tokenizer has more tokens than its embedding; leave '
      'that token out, or use the tokenizer that belongs to the model'
    )


def load_chat_template(
  tokenizer: Tokenizer, data: ConfigDict, system: str = ''
) -> chat_dataset.ChatTemplate:
  """Loads the chat template of a run's config.data, or of its tokenizer.

  Args:
    system: a system prompt that replaces config.data.system_prompt.

  Raises:
    ValueError: there is no chat template.
  """
  if not data.chat_template and not has_chat_template(tokenizer):
    raise ValueError(
      f'the tokenizer {tokenizer} has no chat template; leave out --chat, '
      'or name a model that has one'
    )
  chat_template = chat_dataset.load_chat_template(data, tokenizer)
  # Prompts have today's date, not that of the training run.
  return dataclasses.replace(
    chat_template, system_prompt=system or chat_template.system_prompt, date=''
  )


def to_conversation(turns: Sequence[str]) -> Conversation:
  """Makes a conversation of turns, the first the user's, then alternating."""
  roles = ('user', 'assistant')
  return Conversation(
    tuple(Turn(roles[i % 2], text) for i, text in enumerate(turns))
  )


def eos_token_ids(tokenizer: Tokenizer, folder: str) -> tuple[int, ...]:
  """The ids that end an answer.

  They are the eos tokens of the tokenizer, of its chat template, and of the
  model's generation_config.json, config.json or GGUF metadata.

  Args:
    folder: the model's directory or GGUF file; '' for none.
  """
  eos_ids = [tokenizer.eos]
  if has_chat_template(tokenizer):
    eos_ids += chat_dataset.ChatTemplate(tokenizer.tokenizer).eos_token_ids()
  if folder.endswith(gguf.SUFFIX):
    metadata = gguf.metadata(folder)
    eos_ids += [
      metadata.get(f'tokenizer.ggml.{kind}_token_id')
      for kind in _GGUF_EOS_KINDS
    ]
  for name in ('generation_config.json', 'config.json'):
    path = os.path.join(folder, name)
    if os.path.exists(path):
      source = untrusted.read_json_object(path)
      try:
        untrusted.check_shape(source, {'eos_token_id?': (int, [int], None)})
      except untrusted.Malformed:
        raise ValueError(
          f'{path} has eos_token_id={source["eos_token_id"]!r}, expected an '
          'integer or a list of them; copy it again'
        ) from None
      ids = source.get('eos_token_id')
      eos_ids += ids if isinstance(ids, list) else [ids]
  return tuple(dict.fromkeys(i for i in eos_ids if i is not None))


# End of text, of turn and of message.
_GGUF_EOS_KINDS = ('eos', 'eot', 'eom')

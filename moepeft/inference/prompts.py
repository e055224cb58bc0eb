# SPDX-License-Identifier: Apache-2.0
"""Prompts to token ids, as a model was trained to read them, and what ends
answers."""

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
  """The ids of a text: with its end for an encoder, open for a decoder.

  Raises:
    ValueError: it is empty, and a decoder has nothing to go on from.
  """
  ids = list(tokenizer.encode(text))
  if not decoder_only:
    return [*ids, tokenizer.eos]
  ids = ids if tokenizer.bos is None else [tokenizer.bos, *ids]
  if not ids:
    raise ValueError(
      'an empty prompt has no token to go on from; say something'
    )
  return ids


def encode_example_prompt(
  tokenizer: Tokenizer, text: str, decoder_only: bool
) -> list[int]:
  """The ids of an example's inputs, as in training on examples."""
  if not decoder_only:
    return encode_text(tokenizer, text, decoder_only)
  return batching_decoder_only.encode_prompts(tokenizer, [text])[0]


def check_ids(ids: Sequence[int], vocab: int) -> None:
  """
  Raises:
    ValueError: an id is beyond the model's embedding, of `vocab` rows.
  """
  beyond = [i for i in ids if not 0 <= i < vocab]
  if beyond:
    raise ValueError(
      f'the prompt has the token {beyond[0]}, the model has tokens 0 to '
      f'{vocab - 1}: its tokenizer has more tokens than its embedding; leave '
      'that token out, or use the tokenizer that belongs to the model'
    )


def template(
  tokenizer: Tokenizer, data: ConfigDict, system: str = ''
) -> chat_dataset.ChatTemplate:
  """The chat template of a run's config.data, or of a model's tokenizer.

  Args:
    system: instead of config.data.system_prompt.

  Raises:
    ValueError: there is none.
  """
  if not data.chat_template and not has_chat_template(tokenizer):
    raise ValueError(
      f'the vocabulary {tokenizer} has no chat template; leave out --chat, '
      'or name a model that has one'
    )
  template_ = chat_dataset.load_chat_template(data, tokenizer)
  # What is asked is dated today, whatever day the run was begun on.
  return dataclasses.replace(
    template_, system_prompt=system or template_.system_prompt, date=''
  )


def conversation(turns: Sequence[str]) -> Conversation:
  """Turns that change between a user and an assistant."""
  roles = ('user', 'assistant')
  return Conversation(
    tuple(Turn(roles[i % 2], text) for i, text in enumerate(turns))
  )


def eos_token_ids(tokenizer: Tokenizer, folder: str) -> tuple[int, ...]:
  """Ids that end an answer: the vocabulary's, what its chat template ends
  answers with, and those that the model's files name.

  Args:
    folder: the model's directory or GGUF file, '' for none.
  """
  ids_of_ends = [tokenizer.eos]
  if has_chat_template(tokenizer):
    ids_of_ends += chat_dataset.ChatTemplate(
      tokenizer.tokenizer
    ).eos_token_ids()
  if folder.endswith(gguf.SUFFIX):
    metadata = gguf.metadata(folder)
    ids_of_ends += [
      metadata.get(f'tokenizer.ggml.{kind}_token_id') for kind in _GGUF
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
      ids_of_ends += ids if isinstance(ids, list) else [ids]
  return tuple(dict.fromkeys(i for i in ids_of_ends if i is not None))


# The ends of a text, of a turn and of a message.
_GGUF = ('eos', 'eot', 'eom')

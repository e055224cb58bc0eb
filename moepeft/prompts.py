# SPDX-License-Identifier: Apache-2.0
"""Prompts to token ids, plain or as a conversation, and what ends answers."""

import json
import os
from collections.abc import Mapping, Sequence

from moepeft.data.vocabulary import Tokenizer, Vocabulary


def plain(words: Vocabulary, text: str, decoder_only: bool) -> list[int]:
  """The ids of a text: with its end for an encoder, open for a decoder."""
  ids = list(words.encode(text))
  if not decoder_only:
    return [*ids, words.eos]
  bos = getattr(words, 'bos', None)
  ids = ids if bos is None else [bos, *ids]
  if not ids:
    raise ValueError(
      'an empty prompt has no token to go on from; say something'
    )
  return ids


def chat(words: Vocabulary, turns: Sequence[Mapping[str, str]]) -> list[int]:
  """The ids of a conversation up to where the assistant speaks.

  Args:
    turns: {'role': 'system', 'user' or 'assistant', 'content': text}.

  Raises:
    ValueError: the vocabulary has no chat template, or it refuses the turns.
  """
  if not isinstance(words, Tokenizer):
    raise ValueError(
      f'the vocabulary {words} has no chat template; leave out --chat, or name '
      'a model that has one'
    )
  return words.chat(turns)


def ends(words: Vocabulary, folder: str) -> tuple[int, ...]:
  """Ids that end an answer: the vocabulary's, and those the model's files name.

  Args:
    folder: the model's, with a generation_config.json or not.
  """
  found = [words.eos]
  path = os.path.join(folder, 'generation_config.json')
  if os.path.isfile(path):
    with open(path) as f:
      said = json.load(f).get('eos_token_id')
    found += said if isinstance(said, list) else [said]
  return tuple(dict.fromkeys(i for i in found if i is not None))

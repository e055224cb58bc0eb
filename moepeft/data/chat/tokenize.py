# SPDX-License-Identifier: Apache-2.0
"""Tokenization of rendered chats, with a loss mask on the trained answers.

The trained tokens of an answer are the tokens that the model has to generate
after the template's generation prompt, up to and including the end-of-turn
token.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from moepeft.data.batching.decoder_only import Sample
from moepeft.data.chat.render import RenderedChat

# Contexts to put before a text, so that a tokenizer does not treat the text as
# the start of a sequence.
_CONTEXTS = ('.', 'a', '\n')
# (token ids, character offset at which each token starts)
IdsAndOffsets = tuple[list[int], list[int]]


def encode_chats(tokenizer: Any, chats: Sequence[RenderedChat]) -> list[Sample]:
  """Tokenizes rendered chats.

  The ids before an answer equal the ids of the text before the answer,
  tokenized alone: the prompt from which a model generates. If a token of the
  whole text would span the start of an answer, it is replaced by two tokens.
  All other ids equal those of the whole text.

  After such a split, the ids of the answer may differ from those of the whole
  text. They are the ids that the model learns to generate, and the next answer
  has them in its prompt.
  """
  prefix_lengths = [[*_answer_starts(chat), len(chat.text)] for chat in chats]
  prefixes = [
    chat.text[:length]
    for chat, lengths in zip(chats, prefix_lengths, strict=True)
    for length in lengths
  ]
  encoded = iter(_encode(tokenizer, prefixes) if prefixes else ())
  special_tokens = special_ids(tokenizer)
  return [
    _make_sample(
      tokenizer,
      chat,
      lengths,
      list(itertools.islice(encoded, len(lengths))),
      special_tokens,
    )
    for chat, lengths in zip(chats, prefix_lengths, strict=True)
  ]


def _answer_starts(chat: RenderedChat) -> list[int]:
  return [start for start, _ in chat.spans or ()]


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[IdsAndOffsets]:
  encoding = tokenizer(
    list(texts),
    add_special_tokens=False,
    return_offsets_mapping=True,
    return_attention_mask=False,
    return_token_type_ids=False,
  )
  offsets = ([start for start, _ in o] for o in encoding['offset_mapping'])
  return list(zip(encoding['input_ids'], offsets, strict=True))


def _make_sample(
  tokenizer: Any,
  chat: RenderedChat,
  prefix_lengths: Sequence[int],
  prefixes: Sequence[IdsAndOffsets],
  special_tokens: set[int],
) -> Sample:
  """Joins the ids of a text's prefixes into one sample.

  Args:
    prefix_lengths: length of each prefix, in characters. There is a prefix up
      to each trained answer; the last prefix is the whole text.
    prefixes: the token ids and offsets of each prefix.
  """
  if chat.spans is None:
    ids = np.array(prefixes[0][0], np.int32)
    return Sample(ids, np.ones(len(ids), bool))
  ids = list(prefixes[0][0])
  loss_mask = [False] * len(ids)
  for (_, answer_end), (start, stop), (prompt, extended) in zip(
    chat.spans,
    itertools.pairwise(prefix_lengths),
    itertools.pairwise(prefixes),
    strict=True,
  ):
    prompt_size = len(prompt[0])
    new_ids, offsets = extended[0][prompt_size:], extended[1][prompt_size:]
    if extended[0][:prompt_size] != prompt[0]:
      new_ids, offsets = _encode_continuation(tokenizer, chat.text[start:stop])
      offsets = [start + offset for offset in offsets]
    ids += new_ids
    count = sum(offset < answer_end for offset in offsets)
    count = _count_trained(new_ids[:count], special_tokens, tokenizer)
    loss_mask += [True] * count + [False] * (len(new_ids) - count)
  return Sample(np.array(ids, np.int32), np.array(loss_mask, bool))


def _encode_continuation(tokenizer: Any, text: str) -> IdsAndOffsets:
  """Tokenizes a text as the continuation of another text."""
  texts = [context + part for context in _CONTEXTS for part in ('', text)]
  encoded = _encode(tokenizer, texts)
  for i, context in enumerate(_CONTEXTS):
    (context_ids, _), (ids, offsets) = encoded[2 * i : 2 * i + 2]
    size = len(context_ids)
    if ids[:size] == context_ids:
      return ids[size:], [max(o - len(context), 0) for o in offsets[size:]]
  return _encode(tokenizer, [text])[0]


def special_ids(tokenizer: Any) -> set[int]:
  """Ids of special tokens, such as the end-of-turn token."""
  added_tokens = tokenizer.added_tokens_decoder.items()
  added_special_ids = {i for i, token in added_tokens if token.special}
  return added_special_ids | set(tokenizer.all_special_ids)


def _count_trained(
  ids: Sequence[int], special_tokens: set[int], tokenizer
) -> int:
  """Number of an answer's tokens without white space after its end-of-turn."""
  ends = [i for i, token in enumerate(ids) if token in special_tokens]
  if ends and not tokenizer.decode(list(ids[ends[-1] + 1 :])).strip():
    return ends[-1] + 1
  return len(ids)

# SPDX-License-Identifier: Apache-2.0
"""Ids of conversations' texts, and which of them are trained.

What is trained of an answer is what a model is to say after the template's
generation prompt: all up to the end-of-turn token, which is trained too.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from moepeft.data.batching.decoder_only import Sample
from moepeft.data.chat.render import RenderedChat

# What may stand before a text so that a tokenizer takes it for no beginning.
_BEFORE = ('.', 'a', '\n')
# (ids, where in the text the token of each begins)
Ids = tuple[list[int], list[int]]


def encode_chats(tokenizer: Any, texts: Sequence[RenderedChat]) -> list[Sample]:
  """Texts as ids.

  Of an answer the ids before it are those of the text before it, tokenized by
  itself: what a model generates from. Where a token of the whole text would
  lie across an answer's beginning, it is two here; elsewhere the ids are those
  of the whole text. (An answer after one that was cut so follows what the
  model was trained to say there, which may be other ids of the same text.)
  """
  ends = [[*_starts(text), len(text.whole)] for text in texts]
  parts = [
    text.whole[:end]
    for text, text_ends in zip(texts, ends, strict=True)
    for end in text_ends
  ]
  encoded = iter(_encoded(tokenizer, parts) if parts else ())
  special_tokens = special_ids(tokenizer)
  return [
    _sample(
      tokenizer,
      text,
      text_ends,
      list(itertools.islice(encoded, len(text_ends))),
      special_tokens,
    )
    for text, text_ends in zip(texts, ends, strict=True)
  ]


def _starts(text: RenderedChat) -> list[int]:
  return [start for start, _ in text.spans or ()]


def _encoded(tokenizer: Any, texts: Sequence[str]) -> list[Ids]:
  encoding = tokenizer(
    list(texts),
    add_special_tokens=False,
    return_offsets_mapping=True,
    return_attention_mask=False,
    return_token_type_ids=False,
  )
  begins = (
    [start for start, _ in offsets] for offsets in encoding['offset_mapping']
  )
  return list(zip(encoding['input_ids'], begins, strict=True))


def _sample(
  tokenizer: Any,
  text: RenderedChat,
  ends: Sequence[int],
  parts: Sequence[Ids],
  special: set[int],
) -> Sample:
  """Joins the ids of a text's parts into one sample.

  Args:
    ends: of the parts, each of which begins at the text's start.
    parts: (ids, start of each token) of each.
  """
  if text.spans is None:
    ids = np.array(parts[0][0], np.int32)
    return Sample(ids, np.ones(len(ids), bool))
  ids = list(parts[0][0])
  trained = [False] * len(ids)
  for (_, end), (start, stop), (shorter, longer) in zip(
    text.spans,
    itertools.pairwise(ends),
    itertools.pairwise(parts),
    strict=True,
  ):
    answer_ids, begins = (
      longer[0][len(shorter[0]) :],
      longer[1][len(shorter[0]) :],
    )
    if longer[0][: len(shorter[0])] != shorter[0]:
      answer_ids, begins = _following(tokenizer, text.whole[start:stop])
      begins = [start + begin for begin in begins]
    ids += answer_ids
    count = sum(begin < end for begin in begins)
    count = _up_to_the_end(answer_ids[:count], special, tokenizer)
    trained += [True] * count + [False] * (len(answer_ids) - count)
  return Sample(np.array(ids, np.int32), np.array(trained, bool))


def _following(tokenizer: Any, text: str) -> Ids:
  """A text as it is tokenized after another one."""
  texts = [context + part for context in _BEFORE for part in ('', text)]
  encoded = _encoded(tokenizer, texts)
  for i, context in enumerate(_BEFORE):
    (alone, _), (ids, begins) = encoded[2 * i : 2 * i + 2]
    if ids[: len(alone)] == alone:
      places = (max(begin - len(context), 0) for begin in begins[len(alone) :])
      return ids[len(alone) :], list(places)
  return _encoded(tokenizer, [text])[0]


def special_ids(tokenizer: Any) -> set[int]:
  """Ids that are no text, as the end of a turn."""
  added = tokenizer.added_tokens_decoder.items()
  marked = {i for i, token in added if token.special}
  return marked | set(tokenizer.all_special_ids)


def _up_to_the_end(ids: Sequence[int], special: set[int], tokenizer) -> int:
  """An answer's tokens without the blanks after its end-of-turn token."""
  ends = [place for place, i in enumerate(ids) if i in special]
  if ends and not tokenizer.decode(list(ids[ends[-1] + 1 :])).strip():
    return ends[-1] + 1
  return len(ids)

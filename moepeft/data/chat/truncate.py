# SPDX-License-Identifier: Apache-2.0
"""Truncation of conversations that are longer than a row.

Whole turns go before any is cut, and the last answer stays whole where it
fits. No row begins within a turn's header.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from moepeft.data.batching.decoder_only import Sample, truncate
from moepeft.data.chat.formats import Conversation

# The share of a row that a prompt may keep before an answer that fits none.
_LEAST = 4
Fits = Callable[[Conversation], bool]


def truncate_chat(
  conversation: Conversation,
  make: Callable[[Conversation], Sample],
  most: int,
  too_long: str,
) -> Sample | None:
  """A conversation in at most so many ids.

  Args:
    make: renders it.
    too_long: 'prompt' drops what follows the last answer that is trained, then
      the oldest exchanges, then the oldest calls of tools (with what they
      gave) before the last answer; then the last question loses its beginning,
      and where that is not enough, the system's turn. The last answer loses
      its end only where it alone is too long. 'end' cuts; 'drop' drops.

  Returns:
    None where nothing is left to train, or where tools leave no room for the
    last answer.
  """
  whole = make(conversation)
  if len(whole.ids) <= most or too_long != 'prompt':
    return truncate(whole, most, too_long)
  conversation = _to_the_last_answer(conversation)

  def fits(shortened: Conversation) -> bool:
    return len(make(shortened).ids) <= most

  short = _shorter(conversation, fits)
  if not fits(short):
    if fits(_bare(short)):
      return None
    short = _shorter(conversation, lambda c: _start(make(c)) <= most // _LEAST)
  cut = truncate(make(short), most, 'end')
  return cut and dataclasses.replace(cut, cut=True)


def _start(sample: Sample) -> int:
  """The place at which the last answer begins."""
  trained = np.flatnonzero(sample.loss_mask)
  last = trained[-1] if len(trained) else 0
  untrained = np.flatnonzero(~sample.loss_mask[:last])
  return int(untrained[-1]) + 1 if len(untrained) else 0


def _to_the_last_answer(conversation: Conversation) -> Conversation:
  turns = conversation.turns
  last = max(
    (i for i, t in enumerate(turns) if t.role == 'assistant' and t.trained),
    default=len(turns) - 1,
  )
  return dataclasses.replace(conversation, turns=turns[: last + 1])


def _shorter(conversation: Conversation, fits: Fits) -> Conversation:
  """Without as little as makes it fit, or as short as can be."""
  conversation = _without_calls(_without_oldest(conversation, fits), fits)
  question = max(
    i for i, turn in enumerate(conversation.turns) if turn.role == 'user'
  )
  texts = [question, *range(question + 1, len(conversation.turns) - 1)]
  if conversation.turns[0].role == 'system':
    # What is asked is worth more, where it is not enough to cut it.
    least = _without_beginning(conversation, question, lambda c: False)
    texts = texts if fits(least) else [0, *texts]
  for place in texts:
    if conversation.turns[place].role != 'assistant' and not fits(conversation):
      conversation = _without_beginning(conversation, place, fits)
  return conversation


def _bare(conversation: Conversation) -> Conversation:
  """Without what the system says and without tools."""
  turns = tuple(turn for turn in conversation.turns if turn.role != 'system')
  return Conversation(turns)


def _least(count: int, holds: Callable[[int], bool]) -> int:
  """The least number up to `count` that holds, `count` if none does."""
  low, high = 0, count
  while low < high:
    middle = (low + high) // 2
    if holds(middle):
      high = middle
    else:
      low = middle + 1
  return low


def _without_oldest(conversation: Conversation, fits: Fits) -> Conversation:
  """Exchanges go from the first on; the last question and its answer stay."""
  turns = conversation.turns
  begins = [i for i, turn in enumerate(turns) if turn.role == 'user']
  head = turns[: begins[0]]

  def rest(dropped: int) -> Conversation:
    return dataclasses.replace(
      conversation, turns=head + turns[begins[dropped] :]
    )

  return rest(_least(len(begins) - 1, lambda n: fits(rest(n))))


def _without_calls(conversation: Conversation, fits: Fits) -> Conversation:
  """Answers before the last one go with what tools gave, from the first on."""
  turns = conversation.turns
  question = max(i for i, turn in enumerate(turns) if turn.role == 'user')
  begins = [
    i for i in range(question + 1, len(turns)) if turns[i].role == 'assistant'
  ]
  head = turns[: question + 1]

  def rest(dropped: int) -> Conversation:
    return dataclasses.replace(
      conversation, turns=head + turns[begins[dropped] :]
    )

  return rest(_least(len(begins) - 1, lambda n: fits(rest(n))))


def _without_beginning(
  conversation: Conversation, place: int, fits: Fits
) -> Conversation:
  turn = conversation.turns[place]

  def rest(dropped: int) -> Conversation:
    short = dataclasses.replace(turn, content=turn.content[dropped:])
    turns = (
      *conversation.turns[:place],
      short,
      *conversation.turns[place + 1 :],
    )
    return dataclasses.replace(conversation, turns=turns)

  # At least a character stays: templates may leave out empty turns.
  most = len(turn.content.rstrip()) - 1
  return rest(_least(most, lambda n: fits(rest(n))))

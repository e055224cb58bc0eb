# SPDX-License-Identifier: Apache-2.0
"""What of a conversation stays where it is longer than a row.

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
  found: Conversation,
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
  whole = make(found)
  if len(whole.ids) <= most or too_long != 'prompt':
    return truncate(whole, most, too_long)
  found = _to_the_last_answer(found)

  def fits(some: Conversation) -> bool:
    return len(make(some).ids) <= most

  short = _shorter(found, fits)
  if not fits(short):
    if fits(_bare(short)):
      return None
    short = _shorter(found, lambda c: _start(make(c)) <= most // _LEAST)
  cut = truncate(make(short), most, 'end')
  return cut and dataclasses.replace(cut, cut=True)


def _start(sample: Sample) -> int:
  """Where the last answer begins."""
  trained = np.flatnonzero(sample.loss_mask)
  last = trained[-1] if len(trained) else 0
  before = np.flatnonzero(~sample.loss_mask[:last])
  return int(before[-1]) + 1 if len(before) else 0


def _to_the_last_answer(found: Conversation) -> Conversation:
  turns = found.turns
  last = max(
    (i for i, t in enumerate(turns) if t.role == 'assistant' and t.trained),
    default=len(turns) - 1,
  )
  return dataclasses.replace(found, turns=turns[: last + 1])


def _shorter(found: Conversation, fits: Fits) -> Conversation:
  """Without as little as makes it fit, or as short as can be."""
  found = _without_calls(_without_oldest(found, fits), fits)
  asked = max(i for i, turn in enumerate(found.turns) if turn.role == 'user')
  texts = [asked, *range(asked + 1, len(found.turns) - 1)]
  if found.turns[0].role == 'system':
    # What is asked is worth more, where it is not enough to cut it.
    least = _without_beginning(found, asked, lambda c: False)
    texts = texts if fits(least) else [0, *texts]
  for place in texts:
    if found.turns[place].role != 'assistant' and not fits(found):
      found = _without_beginning(found, place, fits)
  return found


def _bare(found: Conversation) -> Conversation:
  """Without what the system says and without tools."""
  turns = tuple(turn for turn in found.turns if turn.role != 'system')
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


def _without_oldest(found: Conversation, fits: Fits) -> Conversation:
  """Exchanges go from the first on; the last question and its answer stay."""
  turns = found.turns
  begins = [i for i, turn in enumerate(turns) if turn.role == 'user']
  head = turns[: begins[0]]

  def rest(dropped: int) -> Conversation:
    return dataclasses.replace(found, turns=head + turns[begins[dropped] :])

  return rest(_least(len(begins) - 1, lambda n: fits(rest(n))))


def _without_calls(found: Conversation, fits: Fits) -> Conversation:
  """Answers before the last one go with what tools gave, from the first on."""
  turns = found.turns
  asked = max(i for i, turn in enumerate(turns) if turn.role == 'user')
  begins = [
    i for i in range(asked + 1, len(turns)) if turns[i].role == 'assistant'
  ]
  head = turns[: asked + 1]

  def rest(dropped: int) -> Conversation:
    return dataclasses.replace(found, turns=head + turns[begins[dropped] :])

  return rest(_least(len(begins) - 1, lambda n: fits(rest(n))))


def _without_beginning(
  found: Conversation, place: int, fits: Fits
) -> Conversation:
  turn = found.turns[place]

  def rest(dropped: int) -> Conversation:
    short = dataclasses.replace(turn, content=turn.content[dropped:])
    turns = (*found.turns[:place], short, *found.turns[place + 1 :])
    return dataclasses.replace(found, turns=turns)

  # At least a character stays: templates may leave out empty turns.
  most = len(turn.content.rstrip()) - 1
  return rest(_least(most, lambda n: fits(rest(n))))

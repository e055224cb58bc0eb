# SPDX-License-Identifier: Apache-2.0
"""Truncation of conversations that are longer than a row.

Complete turns are removed before the text of any turn is shortened. The last
answer stays complete if it fits. A turn's header is never cut.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from moepeft.data.batching.decoder_only import Sample, truncate
from moepeft.data.chat.formats import Conversation

# If the last answer does not fit into a row, its prompt gets at most 1 / 4 of
# the row.
_PROMPT_DIVISOR = 4
Fits = Callable[[Conversation], bool]


def truncate_chat(
  conversation: Conversation,
  render: Callable[[Conversation], Sample],
  max_length: int,
  truncation: str,
) -> Sample | None:
  """Truncates a conversation to at most `max_length` ids.

  With truncation 'prompt' the parts below are removed, in this order, until the
  conversation fits:

  1. all turns after the last trained answer;
  2. the oldest exchanges;
  3. the oldest tool calls before the last answer, with their results;
  4. the start of the last question;
  5. the start of the system turn (before 4 if step 4 alone is not enough);
  6. the end of the last answer.

  Args:
    render: renders and tokenizes a conversation.
    truncation: 'prompt', 'end' (removes the end of the ids) or 'drop' (removes
      the conversation).

  Returns:
    None if no trained token remains, or if the tools' schemas leave no room for
    the last answer.
  """
  sample = render(conversation)
  if len(sample.ids) <= max_length or truncation != 'prompt':
    return truncate(sample, max_length, truncation)
  conversation = _drop_after_last_answer(conversation)

  def fits(candidate: Conversation) -> bool:
    return len(render(candidate).ids) <= max_length

  shortened = _shorten(conversation, fits)
  if not fits(shortened):
    if fits(_without_system_and_tools(shortened)):
      return None
    max_prompt = max_length // _PROMPT_DIVISOR
    shortened = _shorten(
      conversation,
      lambda c: last_answer_start(render(c).loss_mask) <= max_prompt,
    )
  truncated = truncate(render(shortened), max_length, 'end')
  return truncated and dataclasses.replace(truncated, cut=True)


def last_answer_start(loss_mask: np.ndarray) -> int:
  """The index of the last answer's first token; 0 without an answer."""
  trained = np.flatnonzero(loss_mask)
  last = trained[-1] if len(trained) else 0
  untrained = np.flatnonzero(~loss_mask[:last])
  return int(untrained[-1]) + 1 if len(untrained) else 0


def _drop_after_last_answer(conversation: Conversation) -> Conversation:
  turns = conversation.turns
  last = max(
    (i for i, t in enumerate(turns) if t.role == 'assistant' and t.trained),
    default=len(turns) - 1,
  )
  return dataclasses.replace(conversation, turns=turns[: last + 1])


def _shorten(conversation: Conversation, fits: Fits) -> Conversation:
  """Removes as little as possible until the conversation fits.

  If no conversation fits, the result is the shortest one.
  """
  conversation = _drop_oldest_exchanges(conversation, fits)
  conversation = _drop_oldest_calls(conversation, fits)
  question = _last_question(conversation)
  indices = [question, *range(question + 1, len(conversation.turns) - 1)]
  if conversation.turns[0].role == 'system':
    # The system turn is shortened first if the conversation does not fit even
    # with the shortest question: then the question keeps as much as possible.
    shortest = _shorten_turn(conversation, question, lambda c: False)
    indices = indices if fits(shortest) else [0, *indices]
  for index in indices:
    if conversation.turns[index].role != 'assistant' and not fits(conversation):
      conversation = _shorten_turn(conversation, index, fits)
  return conversation


def _last_question(conversation: Conversation) -> int:
  """Index of the last turn of the user."""
  return max(
    i for i, turn in enumerate(conversation.turns) if turn.role == 'user'
  )


def _without_system_and_tools(conversation: Conversation) -> Conversation:
  turns = tuple(turn for turn in conversation.turns if turn.role != 'system')
  return Conversation(turns)


def _bisect(count: int, predicate: Callable[[int], bool]) -> int:
  """The least number below `count` for which `predicate` is true.

  Returns:
    `count` if there is no such number.
  """
  low, high = 0, count
  while low < high:
    mid = (low + high) // 2
    if predicate(mid):
      high = mid
    else:
      low = mid + 1
  return low


def _drop_oldest_exchanges(
  conversation: Conversation, fits: Fits
) -> Conversation:
  """Removes the oldest exchanges; the last question and its answer stay."""
  turns = conversation.turns
  starts = [i for i, turn in enumerate(turns) if turn.role == 'user']
  return _drop_oldest(conversation, starts[0], starts, fits)


def _drop_oldest_calls(conversation: Conversation, fits: Fits) -> Conversation:
  """Removes the oldest tool calls after the last question, with results."""
  turns, first = conversation.turns, _last_question(conversation) + 1
  starts = [i for i in range(first, len(turns)) if turns[i].role == 'assistant']
  return _drop_oldest(conversation, first, starts, fits)


def _drop_oldest(
  conversation: Conversation, first: int, starts: list[int], fits: Fits
) -> Conversation:
  """Removes the first groups of turns until the conversation fits.

  Args:
    first: the turns before this index stay.
    starts: index of the first turn of each group. The last group stays.
  """
  turns = conversation.turns
  head = turns[:first]

  def drop(count: int) -> Conversation:
    return dataclasses.replace(
      conversation, turns=head + turns[starts[count] :]
    )

  return drop(_bisect(len(starts) - 1, lambda n: fits(drop(n))))


def _shorten_turn(
  conversation: Conversation, index: int, fits: Fits
) -> Conversation:
  """Removes the start of a turn's content until the conversation fits."""
  turn = conversation.turns[index]

  def drop(count: int) -> Conversation:
    shortened = dataclasses.replace(turn, content=turn.content[count:])
    turns = (
      *conversation.turns[:index],
      shortened,
      *conversation.turns[index + 1 :],
    )
    return dataclasses.replace(conversation, turns=turns)

  # At least one character stays, because templates may omit empty turns.
  max_dropped = len(turn.content.rstrip()) - 1
  return drop(_bisect(max_dropped, lambda n: fits(drop(n))))

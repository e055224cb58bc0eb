# SPDX-License-Identifier: Apache-2.0
"""Whether a prompt and its answer fit a model: the one check of all callers.

A decoder has one limit for soft prompt, prompt and answer together; an
encoder-decoder the same limit for its inputs and for its answer.
"""

from moepeft.inference.api import PromptTooLong


def answer_room(
  prompt: int, limit: int, decoder_only: bool, soft_prompt: int = 0
) -> int:
  """The largest number of tokens that an answer may have; below 0 where the
  prompt alone does not fit.

  Args:
    prompt, soft_prompt: their tokens.
    limit: of tokens.
  """
  left = limit - soft_prompt - prompt
  return left if decoder_only or left < 0 else limit


def check_length(
  prompt: int,
  answer: int,
  limit: int,
  decoder_only: bool,
  soft_prompt: int = 0,
) -> None:
  """
  Args:
    answer: the largest number of its tokens.

  Raises:
    PromptTooLong: prompt and answer do not fit.
  """
  if answer <= answer_room(prompt, limit, decoder_only, soft_prompt):
    return
  before = f', {soft_prompt:,} of a soft prompt before it,' * bool(soft_prompt)
  scope = 'for both together' if decoder_only else 'for each'
  raise PromptTooLong(
    f'the prompt has {prompt:,} tokens{before} and an answer up to '
    f'{answer:,}; the model takes {limit:,} {scope}: shorten the prompt, or '
    'the length of the answer'
  )

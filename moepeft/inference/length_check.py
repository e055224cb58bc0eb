# SPDX-License-Identifier: Apache-2.0
"""Checks whether a prompt and its answer fit a model.

A decoder-only model has one limit for soft prompt, prompt and answer together.
An encoder-decoder applies the limit to its inputs and to its answer.
"""

from moepeft.inference.api import PromptTooLong


def max_answer_length(
  prompt: int, limit: int, decoder_only: bool, soft_prompt: int = 0
) -> int:
  """The maximum number of answer tokens; below 0 if the prompt does not fit.

  Args:
    prompt, soft_prompt: the numbers of their tokens.
    limit: the model's maximum number of tokens.
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
  """Checks the length of a prompt and its answer.

  Args:
    answer: the maximum number of answer tokens.

  Raises:
    PromptTooLong: prompt and answer do not fit.
  """
  if answer <= max_answer_length(prompt, limit, decoder_only, soft_prompt):
    return
  soft = f', its soft prompt {soft_prompt:,},' * bool(soft_prompt)
  scope = 'for both together' if decoder_only else 'for each'
  raise PromptTooLong(
    f'the prompt has {prompt:,} tokens{soft} and an answer up to '
    f'{answer:,}; the model takes {limit:,} {scope}: shorten the prompt, or '
    'the length of the answer'
  )

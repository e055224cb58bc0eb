# SPDX-License-Identifier: Apache-2.0
"""Whether a request can be answered at all, said before it waits."""

from typing import Any

import numpy as np

from moepeft.inference import sampling
from moepeft.inference.api import Refused, Request, TooLong
from moepeft.inference.engine.limits import TOP, Settings


def check(request: Request, model: Any, settings: Settings) -> None:
  """
  Raises:
    Refused: it cannot; the sentence says why.
  """
  _check_ids(request.ids, model.config.vocab)
  for name in ('logprobs', 'prompt_logprobs'):
    value = getattr(request, name)
    if value is not None and not 0 <= value <= TOP:
      raise Refused(f'{name} is from 0 to {TOP}; got {value}')
  if request.routing and not settings.routing:
    raise Refused(
      'this server does not tell what routers do; start it with --routing'
    )
  if request.seconds is not None and not request.seconds > 0:
    raise Refused(f'the seconds are above 0; got {request.seconds}')
  try:
    sampling.check(request.sampling)
  except ValueError as e:
    raise Refused(str(e)) from None


def _check_ids(ids: tuple[int, ...], v: int) -> None:
  if not ids:
    raise Refused('the prompt has no token; give at least one')
  low, high = np.min(ids), np.max(ids)
  if low < 0 or high >= v:
    raise Refused(
      f'tokens are from 0 to {v - 1}; the prompt has {low if low < 0 else high}'
    )


def check_length(
  request: Request, model: Any, settings: Settings, before: int
) -> None:
  """
  Args:
    before: tokens of the adapter's soft prompt.

  Raises:
    Refused: the length of the answer is none.
    TooLong: prompt and answer do not fit.
  """
  prompt, answer = len(request.ids), request.length
  decoder_only = hasattr(model, 'extend')
  scored = request.prompt_logprobs is not None
  if scored and not decoder_only:
    raise Refused(
      'an encoder-decoder reads its prompt at once and has no log-'
      'probabilities of it; leave prompt_logprobs (echo) out'
    )
  if answer < (0 if scored else 1):
    raise Refused(f'the answer has at least 1 token; got length={answer}')
  places = places_of(model, settings)
  whole = before + prompt
  size = whole + answer if decoder_only else max(whole, answer)
  if size > places:
    more = f', {before:,} of the adapter before it,' if before else ''
    whose = 'for both together' if decoder_only else 'for each'
    raise TooLong(
      f'the prompt has {prompt:,} tokens{more} and the answer up to '
      f'{answer:,}; there are {places:,} places {whose}: shorten the prompt, '
      'or the length of the answer'
    )


def places_of(model: Any, settings: Settings) -> int:
  """Tokens of a prompt and its answer, at most: what the engine has room
  for, and no more than what a decoder was made for."""
  if not hasattr(model, 'extend'):
    return settings.places
  return min(settings.places, model.config.length)

# SPDX-License-Identifier: Apache-2.0
"""What a client asks, as questions to the engine."""

import hashlib
import logging
import secrets
from collections.abc import Sequence

import numpy as np

from moepeft.inference import api
from moepeft.inference.api import Constraint
from moepeft.inference.engine.engine import Engine
from moepeft.inference.sampling import Sampling
from moepeft.serve.http.errors import Problem, later, refused, wrong
from moepeft.serve.http.event_bridge import Underway
from moepeft.serve.http.limits import Limits
from moepeft.serve.http.schemas import Asked, ResponseFormat
from moepeft.serve.http.service import Compiler

_LOG = logging.getLogger('moepeft.serve')
_MASK = (1 << 64) - 1


def sampling(asked: Asked) -> Sampling:
  """OpenAI's temperature is 1 where none is given."""
  temperature = 1.0 if asked.temperature is None else asked.temperature
  penalty = asked.repetition_penalty
  penalty = None if penalty == 1 else penalty
  # Of the most probable token alone nothing is left to draw.
  if not temperature or asked.top_p == 0:
    return Sampling(repetition_penalty=penalty)
  return Sampling(
    temperature,
    asked.top_k,
    None if asked.top_p == 1 else asked.top_p,
    asked.min_p or None,
    penalty,
  )


def seeds(asked: Asked, count: int) -> list[int]:
  """One an answer: the first is the one that was asked for.

  The others are drawn from it by a hash, so that the second answer to seed 1
  is not the first to seed 2.
  """
  first = secrets.randbits(31) if asked.seed is None else asked.seed
  others = (
    int.from_bytes(hashlib.sha256(f'{first}/{i}'.encode()).digest()[:4])
    for i in range(1, count)
  )
  return [seed & _MASK for seed in (first, *others)]


def check_ids(ids: Sequence[int], vocab: int, param: str) -> None:
  """
  Raises:
    Problem: an id is beyond the vocabulary.
  """
  most = max(ids, default=0)
  if most >= vocab:
    raise wrong(
      f'{param} holds the token {most}; the vocabulary has {vocab:,}, from 0 '
      f'to {vocab - 1:,}',
      param,
    )


def length(
  wanted: int | None,
  default: int | None,
  prompt: int,
  engine: Engine,
  limits: Limits,
  param: str,
  before: int = 0,
) -> int:
  """Tokens of an answer at most.

  Args:
    wanted: by the request, None where it does not say.
    default: then; None for as many as there is room for.
    prompt: its tokens.
    param: the field that holds the prompt.
    before: tokens of the adapter's soft prompt, which take places too.

  Raises:
    Problem: more than the server gives, or there is no room.
  """
  most, places = (
    limits.answer or engine.max_model_len,
    engine.max_model_len - before,
  )
  if wanted is not None and wanted > most:
    raise wrong(
      f'max_tokens is at most {most:,} here; got {wanted:,}', 'max_tokens'
    )
  room = places - prompt if engine.decoder_only else engine.max_model_len
  if prompt > places or room < (0 if wanted == 0 else 1):
    raise Problem(
      400,
      f'the prompt has {prompt:,} tokens, and the model takes {places:,}'
      f'{", its answer included" * engine.decoder_only}; shorten it',
      param,
      'context_length_exceeded',
    )
  if wanted is not None:
    return wanted
  return min(most, room, room if default is None else default)


def check_choices(count: int, limits: Limits) -> None:
  """
  Raises:
    Problem: more answers than one request may ask for.
  """
  if count > limits.choices:
    raise wrong(
      f'a request may ask for {limits.choices} answers (prompts times n); got '
      f'{count}',
      'n',
    )


def constraint(
  wanted: ResponseFormat | None, compiler: Compiler | None
) -> api.Constraint | None:
  """A new one for each answer; None where any text will do.

  Raises:
    Problem: there is nothing to make it with, or it cannot be.
  """
  if wanted is None or wanted.type == 'text':
    return None
  if compiler is None:
    raise wrong(
      f'response_format of the type {wanted.type!r} needs llguidance, which '
      "is not installed here; run pip install 'moepeft[serve]'",
      'response_format',
    )
  try:
    return Watched(_compiled(wanted, compiler))
  except api.EngineFull as e:
    raise refused(e, 'response_format') from None
  except ValueError as e:
    raise wrong(f'response_format: {e}', 'response_format') from None


def _compiled(wanted: ResponseFormat, compiler: Compiler) -> api.Constraint:
  if wanted.type == 'json_object':
    return compiler.json_schema({'type': 'object'})
  if wanted.type == 'json_schema':
    own = wanted.json_schema
    # Where nothing is said, a keyword that cannot be kept is told.
    return compiler.json_schema(own.schema_, own.strict is not False)
  made = {
    'regex': compiler.regex,
    'grammar': compiler.grammar,
    'choice': compiler.choice,
  }[wanted.type]
  return made(getattr(wanted, wanted.type))


def submit(
  engine: Engine, requests: Sequence[api.Request], param: str
) -> Underway:
  """
  Args:
    param: the field that holds the prompt.

  Raises:
    Problem: the engine does not take one of them.
  """
  try:
    return Underway(engine, requests)
  except api.RequestRefused as e:
    if not engine.ready:
      _LOG.error('the engine takes no request: %s', e)
      raise later(
        "the engine takes no requests now; the server's log says why",
        10,
        'not_ready',
      ) from None
    raise refused(e, param) from None


class Watched:
  """A `Constraint` that remembers why it could not go on.

  A grammar may turn out too complex only when an answer has come far: this is
  the request's fault, while the engine says no more than that it failed.

  Attributes:
    reason: a sentence; '' while all is well.
  """

  def __init__(self, constraint: Constraint):
    self._constraint, self.reason = constraint, ''

  def mask(self) -> np.ndarray:
    try:
      return self._constraint.mask()
    except ValueError as e:
      self.reason = str(e)
      raise

  def accept(self, token: int) -> bool:
    try:
      return self._constraint.accept(token)
    except ValueError as e:
      self.reason = str(e)
      raise

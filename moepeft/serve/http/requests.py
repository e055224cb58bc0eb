# SPDX-License-Identifier: Apache-2.0
"""Turns the fields of an HTTP request into the engine's requests."""

import hashlib
import logging
import secrets
from collections.abc import Sequence

import numpy as np

from moepeft.inference import api
from moepeft.inference.api import Constraint
from moepeft.inference.constraints.grammar import Compiler
from moepeft.inference.engine.engine import Engine
from moepeft.inference.length_check import check_length, max_answer_length
from moepeft.inference.sampling import Sampling
from moepeft.serve.http.errors import (
  invalid_request,
  refusal_error,
  unavailable,
)
from moepeft.serve.http.event_bridge import ClientRequests
from moepeft.serve.http.limits import RequestLimits
from moepeft.serve.http.schemas import GenerationFields, ResponseFormat

_LOG = logging.getLogger('moepeft.serve')
_MASK = (1 << 64) - 1


def sampling(body: GenerationFields) -> Sampling:
  """OpenAI's temperature is 1 where none is given."""
  temperature = 1.0 if body.temperature is None else body.temperature
  penalty = body.repetition_penalty
  penalty = None if penalty == 1 else penalty
  # Of the most probable token alone nothing is left to draw.
  if not temperature or body.top_p == 0:
    return Sampling(repetition_penalty=penalty)
  return Sampling(
    temperature,
    body.top_k,
    None if body.top_p == 1 else body.top_p,
    body.min_p or None,
    penalty,
  )


def seeds(body: GenerationFields, count: int) -> list[int]:
  """One an answer: the first is the one that was asked for.

  The others are drawn from it by a hash, so that the second answer to seed 1
  is not the first to seed 2.
  """
  first = secrets.randbits(31) if body.seed is None else body.seed
  random_seeds = (
    int.from_bytes(hashlib.sha256(f'{first}/{i}'.encode()).digest()[:4])
    for i in range(1, count)
  )
  return [seed & _MASK for seed in (first, *random_seeds)]


def check_ids(ids: Sequence[int], vocab: int, param: str) -> None:
  """
  Raises:
    ApiError: an id is beyond the vocabulary.
  """
  most = max(ids, default=0)
  if most >= vocab:
    raise invalid_request(
      f'{param} holds the token {most}; the vocabulary has {vocab:,}, from 0 '
      f'to {vocab - 1:,}',
      param,
    )


def answer_length(
  requested: int | None,
  default: int | None,
  prompt: int,
  engine: Engine,
  limits: RequestLimits,
  param: str,
  soft_prompt: int = 0,
) -> int:
  """Tokens of an answer at most.

  Args:
    requested: by the request, None where it does not say.
    default: then; None for as many as there is room for.
    prompt: its tokens.
    param: the field that holds the prompt.
    soft_prompt: tokens of the adapter's, which count too.

  Raises:
    ApiError: more than the server gives, or there is no room.
  """
  most = limits.answer or engine.max_model_len
  if requested is not None and requested > most:
    raise invalid_request(
      f'max_tokens is at most {most:,} here; got {requested:,}', 'max_tokens'
    )
  limit, decoder_only = engine.max_model_len, engine.decoder_only
  least = 1 if requested is None else requested
  try:
    check_length(prompt, least, limit, decoder_only, soft_prompt)
  except api.PromptTooLong as e:
    raise refusal_error(e, param) from None
  if requested is not None:
    return requested
  room = max_answer_length(prompt, limit, decoder_only, soft_prompt)
  return min(most, room, room if default is None else default)


def check_choices(count: int, limits: RequestLimits) -> None:
  """
  Raises:
    ApiError: more answers than one request may ask for.
  """
  if count > limits.choices:
    raise invalid_request(
      f'a request may ask for {limits.choices} answers (prompts times n); got '
      f'{count}',
      'n',
    )


def constraint(
  response_format: ResponseFormat | None, compiler: Compiler | None
) -> api.Constraint | None:
  """A new one for each answer; None where any text will do.

  Raises:
    ApiError: there is nothing to make it with, or it cannot be.
  """
  if response_format is None or not response_format.is_constraint:
    return None
  if compiler is None:
    raise invalid_request(
      f'response_format of the type {response_format.type!r} needs llguidance, '
      "which is not installed here; run pip install 'moepeft[serve]'",
      'response_format',
    )
  try:
    return CheckedConstraint(_compile_constraint(response_format, compiler))
  except api.EngineFull as e:
    raise refusal_error(e, 'response_format') from None
  except ValueError as e:
    raise invalid_request(f'response_format: {e}', 'response_format') from None


def _compile_constraint(
  response_format: ResponseFormat, compiler: Compiler
) -> api.Constraint:
  if response_format.type == 'json_object':
    return compiler.json_schema({'type': 'object'})
  if response_format.type == 'json_schema':
    json_schema = response_format.json_schema
    # Where nothing is said, a keyword that cannot be kept is told.
    return compiler.json_schema(
      json_schema.schema_, json_schema.strict is not False
    )
  compilers = {
    'regex': compiler.regex,
    'grammar': compiler.grammar,
    'choice': compiler.choice,
  }[response_format.type]
  return compilers(getattr(response_format, response_format.type))


def submit(
  engine: Engine, requests: Sequence[api.Request], param: str
) -> ClientRequests:
  """
  Args:
    param: the field that holds the prompt.

  Raises:
    ApiError: the engine does not take one of them.
  """
  try:
    return ClientRequests(engine, requests)
  except api.RequestRefused as e:
    if not engine.ready:
      _LOG.error('the engine takes no request: %s', e)
      raise unavailable(
        "the engine takes no requests now; the server's log says why",
        10,
        'not_ready',
      ) from None
    raise refusal_error(e, param) from None


class CheckedConstraint:
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

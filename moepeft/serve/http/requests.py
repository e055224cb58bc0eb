# SPDX-License-Identifier: Apache-2.0
"""Converts the fields of an HTTP request to engine requests."""

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
_UINT64_MASK = (1 << 64) - 1


def make_sampling(body: GenerationFields) -> Sampling:
  """Makes the sampling parameters; the default temperature is OpenAI's, 1."""
  temperature = 1.0 if body.temperature is None else body.temperature
  penalty = body.repetition_penalty
  sampling = Sampling(
    repetition_penalty=None if penalty == 1 else penalty,
    frequency_penalty=body.frequency_penalty or None,
    presence_penalty=body.presence_penalty or None,
    logit_bias=body.token_bias,
  )
  # Both settings leave only the most probable token.
  if not temperature or body.top_p == 0:
    return sampling
  return sampling.replace(
    temperature=temperature,
    top_k=body.top_k,
    top_p=None if body.top_p == 1 else body.top_p,
    min_p=body.min_p or None,
  )


def answer_seeds(body: GenerationFields, count: int) -> list[int]:
  """Returns a seed for each answer; the first is the request's seed.

  The others are hashes of it, so that the second answer for seed 1 is not the
  first answer for seed 2.
  """
  first = secrets.randbits(31) if body.seed is None else body.seed
  random_seeds = (
    int.from_bytes(hashlib.sha256(f'{first}/{i}'.encode()).digest()[:4])
    for i in range(1, count)
  )
  return [seed & _UINT64_MASK for seed in (first, *random_seeds)]


def check_ids(ids: Sequence[int], vocab: int, param: str) -> None:
  """Checks token ids.

  Raises:
    ApiError: an id is not below `vocab`.
  """
  largest = max(ids, default=0)
  if largest >= vocab:
    raise invalid_request(
      f'{param} holds the token {largest}; the vocabulary has {vocab:,}, '
      f'from 0 to {vocab - 1:,}',
      param,
    )


def max_new_tokens(
  requested: int | None,
  default: int | None,
  prompt: int,
  engine: Engine,
  limits: RequestLimits,
  param: str,
  soft_prompt: int = 0,
) -> int:
  """Returns the maximum number of answer tokens.

  Args:
    requested: the number in the request, or None.
    default: the number without `requested`; None for as many as fit.
    prompt: the number of prompt tokens.
    param: the field that holds the prompt.
    soft_prompt: the number of tokens of the adapter's soft prompt.

  Raises:
    ApiError: the number exceeds the server's limit, or the model's length.
  """
  limit = limits.answer or engine.max_model_len
  if requested is not None and requested > limit:
    raise invalid_request(
      f'max_tokens is at most {limit:,} here; got {requested:,}', 'max_tokens'
    )
  max_len, decoder_only = engine.max_model_len, engine.decoder_only
  answer = 1 if requested is None else requested
  try:
    check_length(prompt, answer, max_len, decoder_only, soft_prompt)
  except api.PromptTooLong as e:
    raise refusal_error(e, param) from None
  if requested is not None:
    return requested
  fits = max_answer_length(prompt, max_len, decoder_only, soft_prompt)
  return min(limit, fits, fits if default is None else default)


def check_choices(count: int, limits: RequestLimits) -> None:
  """Checks the number of answers to a request.

  Raises:
    ApiError: it exceeds the limit.
  """
  if count > limits.choices:
    raise invalid_request(
      f'a request may ask for {limits.choices} answers (prompts times n); got '
      f'{count}',
      'n',
    )


def make_constraint(
  response_format: ResponseFormat | None, compiler: Compiler | None
) -> api.Constraint | None:
  """Makes the constraint of one answer; None without restrictions.

  Raises:
    ApiError: llguidance is not installed, or the constraint is invalid.
  """
  if response_format is None or not response_format.is_constraint:
    return None
  if compiler is None:
    raise invalid_request(
      f'response_format of the type {response_format.type!r} needs llguidance, '
      "which is not installed; run pip install 'moepeft[serve]'",
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
    # By default, schema keywords that cannot be enforced are errors.
    return compiler.json_schema(
      json_schema.schema_, json_schema.strict is not False
    )
  compile_ = {
    'regex': compiler.regex,
    'grammar': compiler.grammar,
    'choice': compiler.choice,
  }[response_format.type]
  return compile_(getattr(response_format, response_format.type))


def submit(
  engine: Engine, requests: Sequence[api.Request], param: str
) -> ClientRequests:
  """Submits requests to the engine.

  Args:
    param: the field that holds the prompt.

  Raises:
    ApiError: the engine does not accept one of the requests.
  """
  try:
    return ClientRequests(engine, requests)
  except api.RequestRefused as e:
    if not engine.ready:
      _LOG.error('the engine does not accept requests: %s', e)
      raise unavailable(
        "the engine does not accept requests; the server's log says why",
        10,
        'not_ready',
      ) from None
    raise refusal_error(e, param) from None


class CheckedConstraint:
  """A `Constraint` that records the error message of its failure.

  A grammar may become too complex during an answer. The engine then reports a
  failure; with the message, the server can report an invalid request.

  Attributes:
    reason: the error message; '' without an error.
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

# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of given answers.

A decoder-only model scores an answer in the prefill, as part of the prompt. An
encoder-decoder scores it in one call without a cache.
"""

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

import jax.numpy as jnp
import numpy as np

from moepeft.data.batching.seq2seq import PAD
from moepeft.inference.api import (
  LENGTH,
  Event,
  Finished,
  LogprobRequest,
  PromptLogprobs,
  Request,
)
from moepeft.inference.engine.engine_core import EngineCore
from moepeft.inference.engine.limits import (
  check_request,
  check_request_length,
  padded_size,
)
from moepeft.inference.engine.sequence import Sequence


def echo_requests(
  requests: SequenceOf[LogprobRequest], first: int
) -> list[Request]:
  """Makes requests whose prompts are the prompts and answers to be scored.

  Args:
    first: the number in the id of the first request; ids must be unique.
  """
  return [
    Request(
      f'log_probs/{first + i}',
      (*request.prompt_ids, *request.answer_ids),
      0,
      request.adapter,
      prompt_logprobs=0,
      task=request.task,
      embedding=request.embedding,
      prompt_size=len(request.prompt_ids),
    )
    for i, request in enumerate(requests)
  ]


def answer_logprobs(
  requests: SequenceOf[LogprobRequest],
  events: Iterable[tuple[Request, Event]],
) -> list[np.ndarray]:
  """Returns the log-probabilities of the answers, float64 [t] each.

  Args:
    events: the events of the requests from `echo_requests`.

  Raises:
    ArithmeticError: a request failed.
  """
  logprobs: dict[str, list[float]] = {}
  for request, event in events:
    if isinstance(event, PromptLogprobs):
      logprobs[request.id] = [token.logprob for token in event.tokens]
    elif isinstance(event, Finished) and event.reason != LENGTH:
      raise ArithmeticError(event.message or event.reason)
  rows = sorted(logprobs.items(), key=lambda row: int(row[0].split('/')[1]))
  return [
    np.array(row[len(request.prompt_ids) :])
    for request, (_, row) in zip(requests, rows, strict=True)
  ]


def score_answer(core: EngineCore, request: LogprobRequest) -> np.ndarray:
  """Returns the log-probabilities of an encoder-decoder's answer, float64 [t].

  Raises:
    RequestRefused: the engine cannot compute the request.
    ArithmeticError: the log-probabilities are NaN or infinite.
  """
  runner, answer = core.runner, request.answer_ids
  as_request = Request(
    *('', request.prompt_ids, len(answer), request.adapter),
    task=request.task,
    embedding=request.embedding,
  )
  check_request(as_request, runner.model, runner.config)
  adapter = runner.adapters.acquire(request.adapter)
  try:
    sequence = Sequence(as_request, lambda event: None)
    sequence.set_adapter(adapter)
    ids, soft_prompt = sequence.ids, len(adapter.soft_prompt_ids)
    check_request_length(as_request, runner.model, runner.config, soft_prompt)
    states = core.prefill.encode(sequence)
    length = padded_size(runner.cache_lens, len(answer))
    if length > len(states):
      states = jnp.pad(states, ((0, length - len(states)), (0, 0)))
    inputs, next_ids = np.full((2, len(states)), PAD, np.int32)
    inputs[1 : len(answer)], next_ids[: len(answer)] = answer[:-1], answer
    logprobs = runner.score_answer(
      *(adapter.row, inputs, next_ids, states, ids, sequence.task_id),
      runner.router_inputs([sequence]),
    )
  finally:
    runner.adapters.release(adapter)
  logprobs = np.asarray(logprobs, np.float64)[: len(answer)]
  if not np.isfinite(logprobs).all():
    raise ArithmeticError("the answer's log-probabilities are NaN or infinite")
  return logprobs

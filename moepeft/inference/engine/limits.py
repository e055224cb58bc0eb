# SPDX-License-Identifier: Apache-2.0
"""Sizes of an engine, and the check of a request against them.

Time of a step in float32 on CPU, of 6 layers of SmolLM2-135M and its head, in
milliseconds of one core: of 1, 2 and 8 rows 79, 88 and 107 where the cache has
256 entries, of 1 and 8 rows 86 and 182 where it has 1,040. So a request that
is alone gains by a program of its own, and short texts by a cache length of
their own; sizes between are worth fewer programs, which take seconds each to
compile.
"""

import dataclasses
from typing import Any

import numpy as np

from moepeft.inference import sampling
from moepeft.inference.api import Request, RequestRefused
from moepeft.inference.length_check import check_length

# Rows and tokens are int32.
_LARGEST = 2**31 - 1
# The largest number of alternatives that a token is reported with.
TOP = 20


@dataclasses.dataclass(frozen=True)
class EngineConfig:
  """Sizes of an engine.

  Attributes:
    slots: sequences that run at once.
    max_model_len: limit on the tokens of a prompt and its answer: of both
      together in a decoder, of each in an encoder-decoder.
    queue: limit on the requests that wait for a slot.
    chunk: limit on the tokens of a prompt that are read between two steps of
      the running answers; a power of two.
    min_chunk: a shorter chunk is padded to about so many tokens; a power of
      two.
    cache_lens: lengths of a row's keys and values that have programs; the
      last is `max_model_len`. () for it and a quarter of it, where that is
      128 or more.
    batch_sizes: rows of a step that have programs; the last is `slots`. ()
      for 1, 4, 16, ... below it, and it.
    prefill_batch_sizes: the same for the prompts that are read at once.
    routing: whether programs report what routers do.
    encoder_bytes: device memory for inputs that T5 has encoded before.
    scan: whether all layers are one program; None for wherever the device is
      no CPU. See `per_layer`.
    compile_ahead: whether `start` compiles all programs; else each is compiled
      when it is first needed.
  """

  slots: int = 8
  max_model_len: int = 1024
  queue: int = 64
  chunk: int = 256
  min_chunk: int = 16
  cache_lens: tuple[int, ...] = ()
  batch_sizes: tuple[int, ...] = ()
  prefill_batch_sizes: tuple[int, ...] = (1,)
  routing: bool = False
  encoder_bytes: int = 1 << 27
  scan: bool | None = None
  compile_ahead: bool = True

  def __post_init__(self):
    for name in ('slots', 'max_model_len', 'queue'):
      value = getattr(self, name)
      if not 1 <= value <= _LARGEST:
        raise ValueError(
          f'{name} is at least 1 and at most {_LARGEST:,}; got {value:,}'
        )
    for name in ('chunk', 'min_chunk'):
      value = getattr(self, name)
      if value < 1 or value & (value - 1):
        raise ValueError(f'{name} is a power of two; got {value}')
    if self.min_chunk > self.chunk:
      raise ValueError(
        f'min_chunk is at most chunk={self.chunk}; got {self.min_chunk}'
      )
    quarter = self.max_model_len // 4
    self._fill(
      'cache_lens', (quarter,) if quarter >= 128 else (), self.max_model_len
    )
    powers = tuple(4**i for i in range(self.slots.bit_length()))
    self._fill('batch_sizes', powers, self.slots)

  def _fill(self, name: str, smaller: tuple[int, ...], last: int) -> None:
    """Replaces () by the default sizes, or checks the given ones."""
    sizes = getattr(self, name)
    if not sizes:
      sizes = (*(size for size in smaller if size < last), last)
      object.__setattr__(self, name, sizes)
    if list(sizes) != sorted(set(sizes)) or sizes[0] < 1 or sizes[-1] != last:
      raise ValueError(
        f'{name} grow from 1 or more and end with {last}; got {sizes}'
      )

  @property
  def chunks(self) -> tuple[int, ...]:
    """Lengths of chunks that have programs: each a quarter of the next."""
    sizes = [self.chunk]
    while sizes[0] // 4 >= self.min_chunk:
      sizes.insert(0, sizes[0] // 4)
    return tuple(sizes)

  @property
  def input_lens(self) -> tuple[int, ...]:
    """Lengths of inputs that an encoder has programs for."""
    sizes = [min(self.min_chunk, self.max_model_len)]
    while sizes[-1] < self.max_model_len:
      sizes.append(min(2 * sizes[-1], self.max_model_len))
    return tuple(sizes)


def at_least(sizes: tuple[int, ...], size: int) -> int:
  """The smallest of growing sizes that is at least `size`.

  Raises:
    ValueError: all are smaller.
  """
  for large_enough in sizes:
    if large_enough >= size:
      return large_enough
  raise ValueError(f'there is no size of {size} or more among {sizes}')


def check_request(request: Request, model: Any, config: EngineConfig) -> None:
  """Checks everything but the lengths, for which see `check_request_length`.

  Raises:
    RequestRefused: the request cannot be computed; the sentence says why.
  """
  _check_ids(request.prompt_ids, model.config.vocab)
  for name in ('logprobs', 'prompt_logprobs'):
    value = getattr(request, name)
    if value is not None and not 0 <= value <= TOP:
      raise RequestRefused(f'{name} is from 0 to {TOP}; got {value}')
  if request.routing and not config.routing:
    raise RequestRefused(
      'this server does not tell what routers do; start it with --routing'
    )
  if request.timeout is not None and not request.timeout > 0:
    raise RequestRefused(f'the timeout is above 0 s; got {request.timeout}')
  try:
    sampling.check(request.sampling)
  except ValueError as e:
    raise RequestRefused(str(e)) from None


def _check_ids(ids: tuple[int, ...], v: int) -> None:
  if not ids:
    raise RequestRefused('the prompt has no token; give at least one')
  low, high = np.min(ids), np.max(ids)
  if low < 0 or high >= v:
    raise RequestRefused(
      f'tokens are from 0 to {v - 1}; the prompt has {low if low < 0 else high}'
    )


def check_request_length(
  request: Request, model: Any, config: EngineConfig, soft_prompt: int
) -> None:
  """Checks the lengths of prompt and answer.

  Args:
    soft_prompt: tokens of the adapter's soft prompt.

  Raises:
    RequestRefused: no token of an answer is asked for.
    PromptTooLong: prompt and answer do not fit.
  """
  answer, decoder_only = request.max_new_tokens, hasattr(model, 'extend')
  echo = request.prompt_logprobs is not None
  if echo and not decoder_only:
    raise RequestRefused(
      'an encoder-decoder reads its prompt at once and has no log-'
      'probabilities of it; leave prompt_logprobs (echo) out'
    )
  if answer < (0 if echo else 1):
    raise RequestRefused(
      f'the answer has at least 1 token; got max_new_tokens={answer}'
    )
  check_length(
    len(request.prompt_ids),
    answer,
    max_model_len(model, config),
    decoder_only,
    soft_prompt,
  )


def max_model_len(model: Any, config: EngineConfig) -> int:
  """The limit on a prompt and its answer: the engine's cache, and of a
  decoder at most the length that it was made for."""
  if not hasattr(model, 'extend'):
    return config.max_model_len
  return min(config.max_model_len, model.config.length)

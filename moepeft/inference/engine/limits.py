# SPDX-License-Identifier: Apache-2.0
"""Sizes of an engine, and the check of a request against them.

A decode step of 6 layers of SmolLM2-135M and its head takes, in float32 on one
CPU core, 79, 88 and 107 ms for 1, 2 and 8 rows with 256 cache entries, and 86
and 182 ms for 1 and 8 rows with 1,040 entries. The default sizes therefore
include a program for one row and one for short sequences. Sizes between gain
less than the seconds that each program takes to compile.
"""

import dataclasses
from typing import Any

import numpy as np

from moepeft.inference import sampling
from moepeft.inference.api import Request, RequestRefused
from moepeft.inference.length_check import check_length

# Row and token indices are int32.
_MAX_INT32 = 2**31 - 1
# The largest number of tokens that a step proposes. The cache has room
# for the padding of a chunk of the default `min_chunk`.
MAX_PROPOSED = 15
# The largest number of alternatives reported with a token.
MAX_LOGPROBS = 20


@dataclasses.dataclass(frozen=True)
class EngineConfig:
  """Sizes of an engine.

  Attributes:
    slots: the number of sequences that can run at once.
    max_model_len: the maximum number of tokens: of prompt and answer together
      in a decoder-only model, of each of the two in an encoder-decoder.
    queue: the maximum number of requests that wait for a slot.
    chunk: the maximum number of prompt tokens that are read between two decode
      steps; a power of two.
    min_chunk: the length to which shorter chunks are padded; a power of two.
    cache_lens: the cache lengths for which programs are compiled; the last is
      `max_model_len`. () stands for `max_model_len` and a quarter of it, if
      the quarter is at least 128.
    batch_sizes: the numbers of rows for which decode programs are compiled; the
      last is `slots`. () stands for 1, 4, 16, ... and `slots`.
    prefill_batch_sizes: the numbers of prompts for which prefill programs are
      compiled.
    routing: whether programs return the experts' weights.
    encoder_bytes: device memory for the cache of encoder states.
    scan: whether one program runs all layers; None for True on accelerators and
      False on CPU. See `per_layer`.
    compile_ahead: whether `start` compiles all programs; otherwise the first
      call of each program compiles it.
    prompt_lookup_num_tokens: the maximum number of tokens that a decode step
      proposes for each row of a decoder-only model; see `prompt_lookup`. 0 for
      none.
    num_assistant_tokens: the same for proposals of a draft model.
    prefill_first: whether a decode step waits until the prompts of all slots
      are read. This takes fewer steps in all, as every step has all rows; the
      first answer begins later.
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
  prompt_lookup_num_tokens: int = 0
  num_assistant_tokens: int = 0
  prefill_first: bool = False

  def __post_init__(self):
    for name in ('slots', 'max_model_len', 'queue'):
      value = getattr(self, name)
      if not 1 <= value <= _MAX_INT32:
        raise ValueError(
          f'{name} is at least 1 and at most {_MAX_INT32:,}; got {value:,}'
        )
    for name in ('chunk', 'min_chunk'):
      value = getattr(self, name)
      if value < 1 or value & (value - 1):
        raise ValueError(f'{name} is a power of two; got {value}')
    if self.min_chunk > self.chunk:
      raise ValueError(
        f'min_chunk is at most chunk={self.chunk}; got {self.min_chunk}'
      )
    # The cache has room for the padding of the shortest chunk.
    for name in ('prompt_lookup_num_tokens', 'num_assistant_tokens'):
      value = getattr(self, name)
      if not 0 <= value < self.min_chunk:
        raise ValueError(
          f'{name} is from 0 to {self.min_chunk - 1}; got {value}'
        )
    if self.prompt_lookup_num_tokens and self.num_assistant_tokens:
      raise ValueError(
        'tokens are proposed from the prompt or by a draft model; set one of '
        'prompt_lookup_num_tokens and num_assistant_tokens to 0'
      )
    quarter = self.max_model_len // 4
    self._set_sizes(
      'cache_lens', (quarter,) if quarter >= 128 else (), self.max_model_len
    )
    powers = tuple(4**i for i in range(self.slots.bit_length()))
    self._set_sizes('batch_sizes', powers, self.slots)

  def _set_sizes(self, name: str, smaller: tuple[int, ...], last: int) -> None:
    """Sets the default sizes in place of (), or checks the given sizes."""
    sizes = getattr(self, name)
    if not sizes:
      sizes = (*(size for size in smaller if size < last), last)
      object.__setattr__(self, name, sizes)
    if list(sizes) != sorted(set(sizes)) or sizes[0] < 1 or sizes[-1] != last:
      raise ValueError(
        f'{name} are increasing, from 1 or more to {last}; got {sizes}'
      )

  @property
  def chunks(self) -> tuple[int, ...]:
    """The chunk lengths that have programs; each is a quarter of the next."""
    sizes = [self.chunk]
    while sizes[0] // 4 >= self.min_chunk:
      sizes.insert(0, sizes[0] // 4)
    return tuple(sizes)

  @property
  def num_proposed_tokens(self) -> int:
    """The maximum number of tokens that a decode step proposes for a row."""
    return self.prompt_lookup_num_tokens or self.num_assistant_tokens

  @property
  def decode_lens(self) -> tuple[int, ...]:
    """The numbers of tokens of a row for which decode programs are compiled."""
    return tuple(sorted({1, 1 + self.num_proposed_tokens}))

  @property
  def input_lens(self) -> tuple[int, ...]:
    """The input lengths for which encoder programs are compiled."""
    sizes = [min(self.min_chunk, self.max_model_len)]
    while sizes[-1] < self.max_model_len:
      sizes.append(min(2 * sizes[-1], self.max_model_len))
    return tuple(sizes)


def padded_size(sizes: tuple[int, ...], size: int) -> int:
  """Returns the smallest of increasing sizes that is at least `size`.

  Raises:
    ValueError: all sizes are smaller.
  """
  for candidate in sizes:
    if candidate >= size:
      return candidate
  raise ValueError(f'there is no size of {size} or more among {sizes}')


def check_request(request: Request, model: Any, config: EngineConfig) -> None:
  """Checks all of a request but its length; see `check_request_length`.

  Raises:
    RequestRefused: the engine cannot compute the request.
  """
  _check_ids(request.prompt_ids, model.config.vocab)
  for name in ('logprobs', 'prompt_logprobs'):
    value = getattr(request, name)
    if value is not None and not 0 <= value <= MAX_LOGPROBS:
      raise RequestRefused(f'{name} is from 0 to {MAX_LOGPROBS}; got {value}')
  if request.routing and not config.routing:
    raise RequestRefused(
      "this server does not report experts' weights; start it with --routing"
    )
  if request.timeout is not None and not request.timeout > 0:
    raise RequestRefused(f'the timeout is above 0 s; got {request.timeout}')
  try:
    sampling.check(request.sampling, model.config.vocab)
  except ValueError as e:
    raise RequestRefused(str(e)) from None


def find_task(task: str, tasks: tuple[str, ...]) -> int:
  """The index of a request's task in an adapter's list, from 1; 0 for none.

  Raises:
    RequestRefused: the adapter needs another name, or none.
  """
  if not tasks and task:
    raise RequestRefused(
      f'the adapter does not route by the task; leave out task={task!r}'
    )
  if tasks and task not in tasks:
    raise RequestRefused(
      f'the adapter routes by the task, which is one of {", ".join(tasks)}; '
      f'got task={task!r}'
    )
  return tasks.index(task) + 1 if tasks else 0


def check_embedding(embedding: tuple[float, ...], size: int) -> None:
  """Checks a request's embedding against the size that its adapter reads.

  Raises:
    RequestRefused: the adapter needs one of another size, or none.
  """
  if len(embedding) != size:
    needs = f'an embedding of {size} numbers' if size else 'no embedding'
    raise RequestRefused(
      f'the adapter routes by {needs}; the request has {len(embedding)} numbers'
    )
  if not np.isfinite(embedding).all():
    raise RequestRefused('the embedding has NaN or infinite numbers')


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
    soft_prompt: the number of tokens of the adapter's soft prompt.

  Raises:
    RequestRefused: max_new_tokens is 0 without prompt_logprobs, or an
      encoder-decoder gets prompt_logprobs.
    PromptTooLong: prompt and answer do not fit.
  """
  answer, decoder_only = request.max_new_tokens, hasattr(model, 'extend')
  echo = request.prompt_logprobs is not None
  if echo and not decoder_only:
    raise RequestRefused(
      'an encoder-decoder computes no log-probabilities of its prompt; leave '
      'prompt_logprobs (echo) out'
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
  """The maximum number of tokens of a prompt and its answer.

  It is the engine's cache length; for a decoder-only model at most the model's
  own length.
  """
  if not hasattr(model, 'extend'):
    return config.max_model_len
  return min(config.max_model_len, model.config.length)

# SPDX-License-Identifier: Apache-2.0
"""How large an engine is: slots, places, and the shapes that are compiled.

Time of a step in float32 on CPU, of 6 layers of SmolLM2-135M and its head, in
milliseconds of one core: of 1, 2 and 8 rows 79, 88 and 107 where they have 256
places, of 1 and 8 rows 86 and 182 where they have 1,040. So a request that is
alone gains by a program of its own, and short texts by a room of their own;
rows between are worth fewer programs, which take seconds each to compile.
"""

import dataclasses
from typing import Any

import numpy as np

from moepeft.inference import sampling
from moepeft.inference.api import PromptTooLong, Request, RequestRefused

# Rows and tokens are int32.
_LARGEST = 2**31 - 1
# Alternatives that a token comes with, at most.
TOP = 20


@dataclasses.dataclass(frozen=True)
class EngineConfig:
  """How large an engine is.

  Attributes:
    slots: requests that run at once.
    places: tokens of a prompt and its answer, at most; see `protocol.Engine`.
    queue: requests that wait for a slot, at most.
    chunk: tokens of a prompt that are read between two steps of the answers
      beside it, at most; a power of two.
    least: tokens that a shorter chunk is padded to, about; a power of two.
    rooms: lengths of a row's keys and values that have programs; the last is
      `places`. () for `places` and a quarter of it, where that is 128 or more.
    batches: rows of a step that have programs; the last is `slots`. () for
      1, 4, 16, ... below it, and it.
    routing: whether programs report what routers do.
    encoder_bytes: device memory for inputs that T5 has encoded before.
    together: whether all layers are one program; None for wherever the device
      is no CPU. See `layered`.
  """

  slots: int = 8
  places: int = 1024
  queue: int = 64
  chunk: int = 256
  least: int = 16
  rooms: tuple[int, ...] = ()
  batches: tuple[int, ...] = ()
  routing: bool = False
  encoder_bytes: int = 1 << 27
  together: bool | None = None

  def __post_init__(self):
    for name in ('slots', 'places', 'queue'):
      value = getattr(self, name)
      if not 1 <= value <= _LARGEST:
        raise ValueError(
          f'{name} is at least 1 and at most {_LARGEST:,}; got {value:,}'
        )
    for name in ('chunk', 'least'):
      value = getattr(self, name)
      if value < 1 or value & (value - 1):
        raise ValueError(f'{name} is a power of two; got {value}')
    if self.least > self.chunk:
      raise ValueError(f'least is at most chunk={self.chunk}; got {self.least}')
    quarter = self.places // 4
    self._fill('rooms', (quarter,) if quarter >= 128 else (), self.places)
    powers = tuple(4**i for i in range(self.slots.bit_length()))
    self._fill('batches', powers, self.slots)

  def _fill(self, name: str, smaller: tuple[int, ...], last: int) -> None:
    """Puts what stands for (), or checks what was given."""
    given = getattr(self, name)
    if not given:
      given = (*(size for size in smaller if size < last), last)
      object.__setattr__(self, name, given)
    if list(given) != sorted(set(given)) or given[0] < 1 or given[-1] != last:
      raise ValueError(
        f'{name} grow from 1 or more and end with {last}; got {given}'
      )

  @property
  def chunks(self) -> tuple[int, ...]:
    """Lengths of chunks that have programs: each a quarter of the next."""
    found = [self.chunk]
    while found[0] // 4 >= self.least:
      found.insert(0, found[0] // 4)
    return tuple(found)

  @property
  def inputs(self) -> tuple[int, ...]:
    """Lengths that an encoder has programs for."""
    found = [min(self.least, self.places)]
    while found[-1] < self.places:
      found.append(min(2 * found[-1], self.places))
    return tuple(found)


def at_least(sizes: tuple[int, ...], size: int) -> int:
  """The smallest of growing sizes that holds so many.

  Raises:
    ValueError: none does.
  """
  for found in sizes:
    if found >= size:
      return found
  raise ValueError(f'there is no size of {size} or more among {sizes}')


def check_request(request: Request, model: Any, settings: EngineConfig) -> None:
  """
  Raises:
    Refused: it cannot; the sentence says why.
  """
  _check_ids(request.ids, model.config.vocab)
  for name in ('logprobs', 'prompt_logprobs'):
    value = getattr(request, name)
    if value is not None and not 0 <= value <= TOP:
      raise RequestRefused(f'{name} is from 0 to {TOP}; got {value}')
  if request.routing and not settings.routing:
    raise RequestRefused(
      'this server does not tell what routers do; start it with --routing'
    )
  if request.seconds is not None and not request.seconds > 0:
    raise RequestRefused(f'the seconds are above 0; got {request.seconds}')
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


def check_length(
  request: Request, model: Any, settings: EngineConfig, before: int
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
    raise RequestRefused(
      'an encoder-decoder reads its prompt at once and has no log-'
      'probabilities of it; leave prompt_logprobs (echo) out'
    )
  if answer < (0 if scored else 1):
    raise RequestRefused(
      f'the answer has at least 1 token; got length={answer}'
    )
  places = places_of(model, settings)
  whole = before + prompt
  size = whole + answer if decoder_only else max(whole, answer)
  if size > places:
    more = f', {before:,} of the adapter before it,' if before else ''
    whose = 'for both together' if decoder_only else 'for each'
    raise PromptTooLong(
      f'the prompt has {prompt:,} tokens{more} and the answer up to '
      f'{answer:,}; there are {places:,} places {whose}: shorten the prompt, '
      'or the length of the answer'
    )


def places_of(model: Any, settings: EngineConfig) -> int:
  """Tokens of a prompt and its answer, at most: what the engine has room
  for, and no more than what a decoder was made for."""
  if not hasattr(model, 'extend'):
    return settings.places
  return min(settings.places, model.config.length)

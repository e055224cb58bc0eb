# SPDX-License-Identifier: Apache-2.0
"""Generation for the commands: batches of prompts to texts, by the engine."""

import concurrent.futures
import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from moepeft.core.types import Tree
from moepeft.data.batching.bucketing import round_up
from moepeft.data.batching.seq2seq import PAD
from moepeft.data.tokenizers.tokenizer import Tokenizer, skipped_special_tokens
from moepeft.inference.adapters.fixed import FixedAdapter
from moepeft.inference.api import FAILED, Event, Finished, Request, Token
from moepeft.inference.beam_search import BeamConfig
from moepeft.inference.detokenizer import TextStream
from moepeft.inference.engine.engine import Engine
from moepeft.inference.engine.limits import EngineConfig
from moepeft.inference.length_check import check_length
from moepeft.inference.sampling import Sampling
from moepeft.peft.prefix import model_prefix_ids

# A shorter length is not worth a program.
_MIN_LENGTH = 64
_LARGEST = 1 << 30


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
  """Settings of generation, named as in `transformers`.

  Attributes:
    max_new_tokens: limit on an answer, its end included.
    eos_token_ids: ids that end an answer and are no text.
    min_new_tokens: before so many tokens no end is chosen.
    sampling: greedy by default.
    beams: settings of a beam search instead of sampling, or None.
    stop_strings: an answer ends before the first of them.
  """

  max_new_tokens: int
  eos_token_ids: tuple[int, ...]
  min_new_tokens: int = 0
  sampling: Sampling = Sampling()
  beams: BeamConfig | None = None
  stop_strings: tuple[str, ...] = ()

  def __post_init__(self):
    if self.max_new_tokens < 1:
      raise ValueError(
        'an answer has at least 1 token; got max_new_tokens='
        f'{self.max_new_tokens}'
      )
    if not 0 <= self.min_new_tokens <= self.max_new_tokens:
      raise ValueError(
        f'min_new_tokens is from 0 to max_new_tokens={self.max_new_tokens}; '
        f'got {self.min_new_tokens}'
      )
    if '' in self.stop_strings:
      raise ValueError('a stop string is empty; leave it out')
    samples = self.sampling != Sampling() or self.min_new_tokens
    if self.beams is not None and samples:
      raise ValueError(
        'beams are searched for the most probable answer; leave out '
        'temperature, its filters, penalties and min_new_tokens'
      )


@dataclasses.dataclass(frozen=True)
class Chunk:
  """New text of one answer.

  Attributes:
    row: the prompt's number.
    text: '' while a character, or a stop string, is incomplete.
    token: the new token; None of an answer's last chunk.
  """

  row: int
  text: str
  token: int | None = None


def row_seeds(seed: int, rows: int) -> list[int]:
  """Seeds of draws, different in each row, of one seed."""
  return [seed & 0xFFFFFFFF | row << 32 for row in range(rows)]


class Generator:
  """Answers to prompts, the model's soft prompt before each.

  Prompts are divided among the machine's devices, each with an engine.
  """

  def __init__(
    self,
    model: Any,
    variables: Tree,
    tokenizer: Tokenizer,
    config: GenerationConfig,
    batch_size: int = 8,
  ):
    """
    Args:
      batch_size: answers that a device computes at once.
    """
    self._model, self._variables = model, variables
    self._tokenizer, self._config = tokenizer, config
    self._batch_size = batch_size
    self._soft_prompt, decoder_only = (
      model_prefix_ids(model),
      hasattr(model, 'extend'),
    )
    self._decoder_only = decoder_only
    # An encoder-decoder may generate padding; it is no text either.
    self._silent = {*config.eos_token_ids, *(() if decoder_only else (PAD,))}
    # Slots of an answer.
    self._beam_count = config.beams.count if config.beams else 1
    self._engines: list[Engine] = []

  def check(self, prompts: Sequence[Sequence[int]]) -> None:
    """Checks prompts (ids) before any of them is answered.

    Raises:
      ValueError: one has no token, or the model has no room for its answer.
    """
    lengths = [len(ids) for ids in prompts]
    if lengths and not min(lengths):
      raise ValueError(
        f'prompt {lengths.index(0)} has no token to go on from; leave it out'
      )
    if self._decoder_only:
      check_length(
        max(lengths, default=0),
        self._config.max_new_tokens,
        self._model.config.length,
        decoder_only=True,
        soft_prompt=len(self._soft_prompt),
      )

  def update_weights(self, variables: Tree) -> None:
    """Answers with other values of the weights from now on."""
    if variables is self._variables:
      return
    self._variables = variables
    new = {
      key: variables[key] for key in ('params', 'peft') if key in variables
    }
    for engine in self._engines:
      engine.update_weights(new)

  def texts(
    self,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int] | None = None,
    progress: Callable[[int], None] = lambda answers: None,
  ) -> list[str]:
    """The answer to each prompt (ids), as text.

    Args:
      seeds: of each row's draws, where there is a temperature.
      progress: called with the number of answers that are new.
    """
    if not self._config.stop_strings:
      answers = self.tokens(prompts, seeds, progress)
      return [self._tokenizer.decode(self._visible(ids)) for ids in answers]
    texts = [''] * len(prompts)
    for chunk in self.stream(prompts, seeds):
      texts[chunk.row] += chunk.text
      if chunk.token is None:
        progress(1)
    return texts

  def tokens(
    self,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int] | None = None,
    progress: Callable[[int], None] = lambda answers: None,
  ) -> list[list[int]]:
    """The ids of each answer, its end included; stop strings do not count."""
    if self._config.beams is not None:
      return self._search(prompts, progress)
    answers: list[list[int]] = [[] for _ in prompts]
    for _, request, event in self._events(prompts, seeds):
      if isinstance(event, Token):
        answers[int(request.id)].append(event.token.id)
      else:
        progress(1)
    return answers

  def stream(
    self,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int] | None = None,
  ) -> Iterator[Chunk]:
    """Texts as they come, a chunk for each token and one at each end."""
    texts = [
      TextStream(
        self._tokenizer.decode,
        self._config.stop_strings,
        lambda text: skipped_special_tokens(self._tokenizer, text),
      )
      for _ in prompts
    ]
    if self._config.beams is not None:
      for row, answer in enumerate(self._search(prompts)):
        for token in answer:
          yield Chunk(row, self._feed(texts[row], token), token)
        yield Chunk(row, texts[row].finish())
      return
    for engine, request, event in self._events(prompts, seeds):
      row = int(request.id)
      if isinstance(event, Finished):
        yield Chunk(row, texts[row].finish())
      elif not texts[row].stopped:
        token = event.token.id
        yield Chunk(row, self._feed(texts[row], token), token)
        if texts[row].stopped:
          engine.cancel(request.id)

  def _feed(self, text: TextStream, token: int) -> str:
    return text.feed(self._visible([token]))

  def _visible(self, ids: list[int]) -> list[int]:
    """The ids that are text."""
    return [token for token in ids if token not in self._silent]

  def _events(
    self, prompts: Sequence[Sequence[int]], seeds: Sequence[int] | None
  ) -> Iterator[tuple[Engine, Request, Event]]:
    """The events of all prompts as they come; a request's id is its row.

    Raises:
      ValueError: as `check`.
      RuntimeError: an answer failed.
    """
    requests = self._requests(prompts, seeds)
    for engine, request, event in _stream(self._open(prompts), requests):
      if isinstance(event, Finished) and event.reason == FAILED:
        raise RuntimeError(f'prompt {request.id} failed: {event.message}')
      yield engine, request, event

  def _requests(
    self,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int] | None = None,
  ) -> list[Request]:
    """
    Raises:
      ValueError: as `check`.
    """
    self.check(prompts)
    config = self._config
    return [
      Request(
        str(row),
        tuple(map(int, ids)),
        config.max_new_tokens,
        sampling=config.sampling,
        seed=0 if seeds is None else seeds[row],
        eos_token_ids=config.eos_token_ids,
        min_new_tokens=config.min_new_tokens,
      )
      for row, ids in enumerate(prompts)
    ]

  def _open(self, prompts: Sequence[Sequence[int]]) -> list[Engine]:
    """Engines for prompts; those of an earlier call where they are enough."""
    if not prompts:
      return []
    devices = jax.local_devices()[: len(prompts)]
    longest = max(map(len, prompts)) + len(self._soft_prompt)
    answer = self._config.max_new_tokens
    size = longest + answer if self._decoder_only else max(longest, answer)
    rows = -(-len(prompts) // len(devices))
    slots = min(self._batch_size, rows) * self._beam_count
    enough = len(devices) <= len(self._engines) and all(
      engine.max_model_len >= size and engine.slots >= slots
      for engine in self._engines
    )
    if not enough:
      # Those before are freed first.
      self._engines = []
      limit = self._model.config.length if self._decoder_only else _LARGEST
      length = round_up(size, _MIN_LENGTH, limit)
      self._engines = [
        self._engine(device if i else None, slots, length)
        for i, device in enumerate(devices)
      ]
    return self._engines[: len(devices)]

  def _engine(self, device: Any, slots: int, length: int) -> Engine:
    """
    Args:
      device: None for the default.
    """
    peft = self._variables.get('peft')
    if device is not None:
      peft = jax.device_put(peft, device)
    # On CPU a batch of prompts takes as long as one after the other.
    one_by_one = jax.default_backend() == 'cpu'
    config = EngineConfig(
      slots=slots,
      max_model_len=length,
      batch_sizes=tuple(sorted({self._beam_count, slots})),
      prefill_batch_sizes=(1,) if one_by_one else tuple(sorted({1, slots})),
      compile_ahead=False,
    )
    adapter = FixedAdapter(self._model, peft)
    return Engine(
      self._model, self._variables['params'], adapter, config, device
    )

  def _search(
    self, prompts: Sequence[Sequence[int]], progress: Callable[[int], None]
  ) -> list[list[int]]:
    """The best answer to each prompt by a beam search."""
    requests = self._requests(prompts)
    engines, size = self._open(prompts), self._batch_size
    answers: list[list[int]] = [[] for _ in prompts]

    def run(engine: Engine, rows: range) -> int:
      beams = engine.beam_search(
        [requests[row] for row in rows], self._config.beams
      )
      for row, (best, *_) in zip(rows, beams, strict=True):
        answers[row] = best.ids
      return len(rows)

    shares = [
      range(len(prompts))[i :: len(engines)] for i in range(len(engines))
    ]
    with concurrent.futures.ThreadPoolExecutor() as pool:
      for at in range(0, max(map(len, shares), default=0), size):
        batches = [share[at : at + size] for share in shares]
        for count in pool.map(run, engines, batches):
          progress(count)
    return answers


def _stream(
  engines: list[Engine], requests: list[Request]
) -> Iterator[tuple[Engine, Request, Event]]:
  """The events of requests that are divided among engines."""
  if len(engines) < 2:
    for engine in engines:
      for request, event in engine.stream(requests):
        yield engine, request, event
    return
  events: queue.SimpleQueue = queue.SimpleQueue()

  def run(i: int) -> None:
    try:
      for request, event in engines[i].stream(requests[i :: len(engines)]):
        events.put((engines[i], request, event))
    except BaseException as e:
      events.put(e)

  for i in range(len(engines)):
    threading.Thread(target=run, args=(i,), daemon=True).start()
  unfinished = len(requests)
  while unfinished:
    event = events.get()
    if isinstance(event, BaseException):
      raise event
    unfinished -= isinstance(event[-1], Finished)
    yield event

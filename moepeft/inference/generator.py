# SPDX-License-Identifier: Apache-2.0
"""Generation of answers to batches of prompts, by the engine."""

import concurrent.futures
import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from moepeft.core.types import Tree
from moepeft.data.batching.bucketing import round_up
from moepeft.data.batching.router_inputs import embedding_size
from moepeft.data.batching.seq2seq import PAD
from moepeft.data.tokenizers.tokenizer import Tokenizer, skipped_special_tokens
from moepeft.inference.adapters.fixed import FixedAdapter
from moepeft.inference.adapters.served_modules import request_tasks
from moepeft.inference.api import (
  FAILED,
  Event,
  Finished,
  Request,
  RouterFields,
  Token,
)
from moepeft.inference.beam_search import BeamConfig
from moepeft.inference.detokenizer import TextStream
from moepeft.inference.engine.draft_model import Draft
from moepeft.inference.engine.engine import Engine
from moepeft.inference.engine.limits import (
  EngineConfig,
  check_embedding,
  find_task,
)
from moepeft.inference.length_check import check_length
from moepeft.inference.sampling import Sampling
from moepeft.peft.prefix import model_prefix_ids

# The smallest cache length; a shorter one is not worth a program.
_MIN_LENGTH = 64
_NO_LIMIT = 1 << 30


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
  """Settings of generation, named as in `transformers`.

  Attributes:
    max_new_tokens: the maximum number of tokens of an answer, its end included.
    eos_token_ids: ids that end an answer and are not decoded.
    min_new_tokens: the minimum number of tokens before an end.
    sampling: the sampling parameters; greedy by default.
    beams: settings of a beam search instead of sampling, or None.
    stop_strings: an answer ends before the first of them.
    prompt_lookup_num_tokens: the maximum number of tokens that a step of a
      decoder-only model proposes from what precedes; the answers are the same.
      0 for none.
    num_assistant_tokens: the same for proposals of a draft model.
  """

  max_new_tokens: int
  eos_token_ids: tuple[int, ...]
  min_new_tokens: int = 0
  sampling: Sampling = Sampling()
  beams: BeamConfig | None = None
  stop_strings: tuple[str, ...] = ()
  prompt_lookup_num_tokens: int = 0
  num_assistant_tokens: int = 0

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
        'temperature, its filters, penalties, logit_bias and min_new_tokens'
      )
    for name in ('prompt_lookup_num_tokens', 'num_assistant_tokens'):
      if self.beams is not None and getattr(self, name):
        raise ValueError(f'{name} has no use with beams')


@dataclasses.dataclass(frozen=True)
class Chunk:
  """New text of one answer.

  Attributes:
    row: the index of the prompt.
    text: the new text; '' while a character or a stop string is incomplete.
    token: the new token; None in an answer's last chunk.
  """

  row: int
  text: str
  token: int | None = None


def row_seeds(seed: int, rows: int) -> list[int]:
  """Derives a different seed for each row from one seed."""
  return [seed & 0xFFFFFFFF | row << 32 for row in range(rows)]


class Generator:
  """Generates answers to prompts; the model's soft prompt precedes each.

  Prompts are divided among the local devices, each with its own engine.
  """

  def __init__(
    self,
    model: Any,
    variables: Tree,
    tokenizer: Tokenizer,
    config: GenerationConfig,
    batch_size: int = 8,
    draft: Draft | None = None,
  ):
    """
    Args:
      batch_size: the number of answers that a device computes at once.
      draft: a smaller model with the same tokenizer, if the config has
        `num_assistant_tokens`.
    """
    self._model, self._variables = model, variables
    self._tokenizer, self._config = tokenizer, config
    self._batch_size, self._draft = batch_size, draft
    self._soft_prompt = model_prefix_ids(model)
    self._tasks = request_tasks(model.adapter_map)
    self._embedding_size = embedding_size(model.adapter_map)
    self._decoder_only = hasattr(model, 'extend')
    self._non_text_ids = {*config.eos_token_ids}
    if not self._decoder_only:
      # An encoder-decoder may generate padding.
      self._non_text_ids.add(PAD)
    # The number of slots of an answer.
    self._beam_count = config.beams.count if config.beams else 1
    self._engines: list[Engine] = []

  def check_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
    """Checks prompts (ids) before any of them is answered.

    Raises:
      ValueError: a prompt is empty, or its answer does not fit.
    """
    lengths = [len(ids) for ids in prompts]
    if lengths and not min(lengths):
      raise ValueError(f'prompt {lengths.index(0)} has no token; leave it out')
    if self._decoder_only:
      check_length(
        max(lengths, default=0),
        self._config.max_new_tokens,
        self._model.config.length,
        decoder_only=True,
        soft_prompt=len(self._soft_prompt),
      )

  def update_weights(self, variables: Tree) -> None:
    """Replaces the weights; see `Engine.update_weights`."""
    if variables is self._variables:
      return
    self._variables = variables
    new = {
      key: variables[key] for key in ('params', 'peft') if key in variables
    }
    for engine in self._engines:
      engine.update_weights(new)

  def generate_texts(
    self,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int] | None = None,
    progress: Callable[[int], None] = lambda answers: None,
    router_fields: Sequence[RouterFields] | None = None,
  ) -> list[str]:
    """Generates the answer to each prompt (ids), as text.

    Args:
      seeds: a sampling seed for each prompt; 0 by default.
      router_fields: of each prompt, for routers that read them.
      progress: called with the number of newly finished answers.
    """
    if not self._config.stop_strings:
      answers = self.generate_ids(prompts, seeds, progress, router_fields)
      return [self._tokenizer.decode(self._text_ids(ids)) for ids in answers]
    texts = [''] * len(prompts)
    for chunk in self.stream(prompts, seeds, router_fields):
      texts[chunk.row] += chunk.text
      if chunk.token is None:
        progress(1)
    return texts

  def generate_ids(
    self,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int] | None = None,
    progress: Callable[[int], None] = lambda answers: None,
    router_fields: Sequence[RouterFields] | None = None,
  ) -> list[list[int]]:
    """Generates the ids of each answer, eos included, without stop strings."""
    if self._config.beams is not None:
      return self._beam_search(prompts, progress, router_fields)
    answers: list[list[int]] = [[] for _ in prompts]
    for _, request, event in self._stream_events(prompts, seeds, router_fields):
      if isinstance(event, Token):
        answers[int(request.id)].append(event.token.id)
      else:
        progress(1)
    return answers

  def stream(
    self,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int] | None = None,
    router_fields: Sequence[RouterFields] | None = None,
  ) -> Iterator[Chunk]:
    """Yields a chunk for each new token, and one at the end of each answer."""
    texts = [
      TextStream(
        self._tokenizer.decode,
        self._config.stop_strings,
        lambda text: skipped_special_tokens(self._tokenizer, text),
      )
      for _ in prompts
    ]
    if self._config.beams is not None:
      for row, answer in enumerate(
        self._beam_search(prompts, router_fields=router_fields)
      ):
        for token in answer:
          yield Chunk(row, self._feed(texts[row], token), token)
        yield Chunk(row, texts[row].finish())
      return
    for engine, request, event in self._stream_events(
      prompts, seeds, router_fields
    ):
      row = int(request.id)
      if isinstance(event, Finished):
        yield Chunk(row, texts[row].finish())
      elif not texts[row].stopped:
        token = event.token.id
        yield Chunk(row, self._feed(texts[row], token), token)
        if texts[row].stopped:
          engine.cancel(request.id)

  def _feed(self, text: TextStream, token: int) -> str:
    return text.feed(self._text_ids([token]))

  def _text_ids(self, ids: list[int]) -> list[int]:
    """The ids that are decoded to text."""
    return [token for token in ids if token not in self._non_text_ids]

  def _stream_events(
    self,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int] | None,
    router_fields: Sequence[RouterFields] | None,
  ) -> Iterator[tuple[Engine, Request, Event]]:
    """Yields the events of all prompts; the id of a request is its row.

    Raises:
      ValueError: see `check_prompts`.
      RuntimeError: a request failed.
    """
    requests = self._make_requests(prompts, seeds, router_fields)
    for engine, request, event in _stream(self._get_engines(prompts), requests):
      if isinstance(event, Finished) and event.reason == FAILED:
        raise RuntimeError(f'prompt {request.id} failed: {event.message}')
      yield engine, request, event

  def _make_requests(
    self,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int] | None = None,
    router_fields: Sequence[RouterFields] | None = None,
  ) -> list[Request]:
    """
    Raises:
      ValueError: see `check_prompts`, or a task is not one of the routers'.
    """
    self.check_prompts(prompts)
    config = self._config
    router_fields = router_fields or [RouterFields()] * len(prompts)
    for fields in router_fields:
      find_task(fields.task, self._tasks)
      check_embedding(fields.embedding, self._embedding_size)
    return [
      Request(
        str(row),
        tuple(map(int, ids)),
        config.max_new_tokens,
        sampling=config.sampling,
        seed=0 if seeds is None else seeds[row],
        eos_token_ids=config.eos_token_ids,
        min_new_tokens=config.min_new_tokens,
        **fields._asdict(),
      )
      for row, (ids, fields) in enumerate(
        zip(prompts, router_fields, strict=True)
      )
    ]

  def _get_engines(self, prompts: Sequence[Sequence[int]]) -> list[Engine]:
    """Returns engines for prompts, those of earlier calls if possible."""
    if not prompts:
      return []
    devices = jax.local_devices()[: len(prompts)]
    longest = max(map(len, prompts)) + len(self._soft_prompt)
    answer = self._config.max_new_tokens
    size = longest + answer if self._decoder_only else max(longest, answer)
    rows = -(-len(prompts) // len(devices))
    slots = min(self._batch_size, rows) * self._beam_count
    reusable = len(devices) <= len(self._engines) and all(
      engine.max_model_len >= size and engine.slots >= slots
      for engine in self._engines
    )
    if not reusable:
      # The old engines are freed before the new ones take memory.
      self._engines = []
      limit = self._model.config.length if self._decoder_only else _NO_LIMIT
      length = round_up(size, _MIN_LENGTH, limit)
      self._engines = [
        self._make_engine(device if i else None, slots, length)
        for i, device in enumerate(devices)
      ]
    return self._engines[: len(devices)]

  def _make_engine(self, device: Any, slots: int, length: int) -> Engine:
    """Makes an engine.

    Args:
      device: the JAX device; None for the default.
    """
    peft = self._variables.get('peft')
    if device is not None:
      peft = jax.device_put(peft, device)
    # On CPU a batch of prompts takes as long as one prompt after the other.
    sequential_prefill = jax.default_backend() == 'cpu'
    config = EngineConfig(
      slots=slots,
      max_model_len=length,
      batch_sizes=tuple(sorted({self._beam_count, slots})),
      prefill_batch_sizes=(1,)
      if sequential_prefill
      else tuple(sorted({1, slots})),
      compile_ahead=False,
      prompt_lookup_num_tokens=self._config.prompt_lookup_num_tokens,
      num_assistant_tokens=self._config.num_assistant_tokens,
      prefill_first=True,
    )
    adapter = FixedAdapter(self._model, peft)
    return Engine(
      *(self._model, self._variables['params'], adapter, config, device),
      draft=self._draft,
    )

  def _beam_search(
    self,
    prompts: Sequence[Sequence[int]],
    progress: Callable[[int], None] = lambda answers: None,
    router_fields: Sequence[RouterFields] | None = None,
  ) -> list[list[int]]:
    """Returns the best answer to each prompt by beam search."""
    requests = self._make_requests(prompts, router_fields=router_fields)
    engines, size = self._get_engines(prompts), self._batch_size
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
      for start in range(0, max(map(len, shares), default=0), size):
        batches = [share[start : start + size] for share in shares]
        for count in pool.map(run, engines, batches):
          progress(count)
    return answers


def _stream(
  engines: list[Engine], requests: list[Request]
) -> Iterator[tuple[Engine, Request, Event]]:
  """Divides requests among engines, and yields their events."""
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

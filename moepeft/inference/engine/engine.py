# SPDX-License-Identifier: Apache-2.0
"""The inference engine: the thread-safe interface to an `EngineCore`.

A server calls `start`, which creates the engine thread. Only the engine thread
uses JAX. Other threads append calls to an inbox, and the engine thread runs
them between two steps of its `EngineCore`. A command that only waits for
answers calls `generate`, `stream` and `log_probs` without `start`; the steps
then run on the thread of the caller.
"""

import collections
import math
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np

from moepeft.core.types import Tree
from moepeft.inference.adapters.fixed import FixedAdapter
from moepeft.inference.api import (
  CANCELLED,
  FAILED,
  EngineFull,
  EngineStats,
  Event,
  Finished,
  GeneratedAnswer,
  LoadedAdapter,
  LogprobRequest,
  Request,
  RequestRefused,
  Token,
  UnknownAdapter,
)
from moepeft.inference.beam_search import BeamAnswer, BeamConfig, search
from moepeft.inference.engine import prompt_lookup, scoring
from moepeft.inference.engine import sequence as sequences
from moepeft.inference.engine.calls import EngineCall, RetryLater
from moepeft.inference.engine.draft_model import Draft, DraftModel
from moepeft.inference.engine.engine_core import (
  EngineCore,
  Proposer,
  run_test_request,
)
from moepeft.inference.engine.limits import (
  EngineConfig,
  check_embedding,
  check_request,
  check_request_length,
  find_task,
  max_model_len,
)
from moepeft.inference.engine.model_runner import ModelRunner
from moepeft.inference.engine.weights import Adapters

T = TypeVar('T')
# Called before each program is compiled, with (name of the program, number of
# compiled programs, total number of programs).
Progress = Callable[[str, int, int], None]


class Engine:
  """Generates with a model and its adapters, and computes log-probabilities.

  After `start`, every method may be called from any thread.

  Attributes:
    vocab: the size of the model's vocabulary.
    max_model_len: the maximum number of tokens: of prompt and answer together
      in a decoder-only model, of each of the two in an encoder-decoder.
    decoder_only: whether the model is decoder-only.
    slots: the number of sequences that can run at once.
    routing: whether tokens can be reported with their experts' weights.
  """

  def __init__(
    self,
    model: Any,
    params: Tree,
    adapters: Adapters,
    config: EngineConfig,
    device: Any = None,
    draft: Draft | None = None,
  ):
    """
    Args:
      model: the module of the base model. The engine sets its adapter_map.
      params: the weights of the base model.
      device: the JAX device to use; None for JAX's default device.
      draft: a smaller model with the same tokenizer, whose proposals this one
        verifies, `num_assistant_tokens` of the config at a time.
    """
    if bool(config.num_assistant_tokens) != (draft is not None):
      raise ValueError(
        'a draft model and num_assistant_tokens go together; give both or none'
      )
    self._draft = draft
    self._model, self._params, self._device = model, params, device
    self._adapters, self._config = adapters, config
    self.vocab = model.config.vocab
    self.max_model_len = max_model_len(model, config)
    self.decoder_only = hasattr(model, 'extend')
    self.slots = config.slots
    self.routing = config.routing
    # The condition guards the attributes below, and is notified of each change.
    self._condition = threading.Condition()
    self._inbox: collections.deque[EngineCall] = collections.deque()
    self._sequences: dict[str, sequences.Sequence] = {}
    self._unloading: set[str] = set()
    self._closed_reason, self._stopped = 'the engine has not started', False
    self._thread: threading.Thread | None = None
    self._core: EngineCore | None = None
    self._logprob_requests = 0

  @property
  def ready(self) -> bool:
    """Whether the engine has started and can accept requests."""
    return not self._closed_reason and not self._core.failure_message

  def start(self, progress: Progress = lambda *args: None) -> None:
    """Starts the engine thread, and returns when the engine is `ready`.

    The thread compiles every program and runs one generation as a test. Then it
    accepts requests.

    Raises:
      RuntimeError: a program does not compile, or the generation failed.
    """
    if self._thread is not None:
      raise ValueError('the engine has been started already')
    startup: Future[None] = Future()
    self._thread = threading.Thread(
      target=self._run, args=(progress, startup), name='engine', daemon=True
    )
    self._thread.start()
    startup.result()

  def submit(self, request: Request, deliver: Callable[[Event], None]) -> None:
    """Enqueues a request, and returns before its events are delivered.

    Args:
      deliver: called on the engine thread with each event. An asyncio server
        passes `lambda event: loop.call_soon_threadsafe(queue.put_nowait,
        event)`.

    Raises:
      RequestRefused: the engine does not accept the request.
    """
    check_request(request, self._model, self._config)
    with self._condition:
      if self._closed_reason or self._core.failure_message:
        raise RequestRefused(self._closed_reason or self._core.failure_message)
      if isinstance(self._adapters, FixedAdapter):
        adapter = self._adapters.acquire(request.adapter)
        soft_prompt = len(adapter.soft_prompt_ids)
        tasks, embedding_size = adapter.tasks, adapter.embedding_size
      elif request.adapter:
        adapter = self._check_adapter(request.adapter)
        soft_prompt = adapter.soft_prompt_length
        tasks, embedding_size = adapter.tasks, adapter.embedding_size
      else:
        soft_prompt, tasks, embedding_size = 0, (), 0
      find_task(request.task, tasks)
      check_embedding(request.embedding, embedding_size)
      check_request_length(request, self._model, self._config, soft_prompt)
      if request.id in self._sequences:
        raise RequestRefused(f'a request {request.id!r} is already in progress')
      waiting = self._count_waiting()
      # Requests in the inbox can take the free slots at the next step.
      if (
        waiting >= self._config.queue + self._core.scheduler.prefix_cache.free()
      ):
        raise EngineFull(
          f'{waiting} requests wait already; try again later',
          self._seconds_until_slot(waiting),
        )
      sequence = sequences.Sequence(request, deliver)
      self._sequences[request.id] = sequence
      self._enqueue(EngineCall(lambda: self._core.scheduler.add(sequence)))

  def cancel(self, id: str) -> None:
    """Ends a request with CANCELLED; does nothing if the id is unknown."""
    with self._condition:
      if id in self._sequences:
        self._sequences[id].cancelled = True

  def stream(
    self, requests: Iterable[Request]
  ) -> Iterator[tuple[Request, Event]]:
    """Yields the events of several requests in the order of their delivery.

    There may be more requests than fit into the queue: the others are submitted
    when earlier ones finish. Closing the iterator cancels the requests that are
    not finished.

    Raises:
      RequestRefused: the engine does not accept one of the requests.
    """
    self._build_core_inline()
    events: queue.SimpleQueue[tuple[Request, Event]] = queue.SimpleQueue()
    pending, unfinished = collections.deque(requests), set()
    try:
      while pending or unfinished:
        while pending and self._try_submit(pending[0], events.put, unfinished):
          unfinished.add(pending.popleft().id)
        if self._thread is None and self._run_calls():
          self._core.step()
        while unfinished and (self._thread or not events.empty()):
          request, event = events.get()
          if isinstance(event, Finished):
            unfinished.discard(request.id)
          yield request, event
          if pending and isinstance(event, Finished):
            break
    finally:
      for id in unfinished:
        self.cancel(id)
      while unfinished and self._thread is None and self._sequences:
        self._run_calls()
        self._core.step()

  def generate(self, requests: Sequence[Request]) -> list[GeneratedAnswer]:
    """Generates an answer to each request, in the order of the requests.

    Raises:
      RequestRefused: the engine does not accept one of the requests.
    """
    tokens = {request.id: [] for request in requests}
    finished = {}
    for request, event in self.stream(requests):
      if isinstance(event, Token):
        tokens[request.id].append(event.token)
      elif isinstance(event, Finished):
        finished[request.id] = event
    return [
      GeneratedAnswer(tuple(tokens[r.id]), finished[r.id]) for r in requests
    ]

  def beam_search(
    self, requests: Sequence[Request], beams: BeamConfig
  ) -> list[list[BeamAnswer]]:
    """Searches the most probable answers to each request, best first.

    Waits until no request runs. Ignores the requests' options for sampling,
    constraints and log-probabilities.

    Raises:
      RequestRefused: the engine does not accept one of the requests.
      ValueError: the engine has fewer slots than beams.
      ArithmeticError: the model's logits are NaN or infinite.
    """
    for request in requests:
      check_request(request, self._model, self._config)
    if beams.count > self.slots:
      raise ValueError(
        f'{beams.count} beams need as many slots; the engine has {self.slots}'
      )
    self._build_core_inline()
    return self._run_on_engine_thread(
      lambda: search(self._core, requests, beams)
    )

  def log_probs(self, requests: Sequence[LogprobRequest]) -> list[np.ndarray]:
    """Computes the log-probability of each token of the answers, in nats.

    Returns:
      A float64 array [t] for each request.

    Raises:
      RequestRefused: the engine does not accept one of the requests.
      ArithmeticError: the log-probabilities are NaN or infinite.
    """
    self._build_core_inline()
    if not self.decoder_only:
      return [
        self._run_on_engine_thread(
          lambda r=r: scoring.score_answer(self._core, r)
        )
        for r in requests
      ]
    echo_requests = scoring.echo_requests(requests, self._logprob_requests)
    self._logprob_requests += len(echo_requests)
    return scoring.answer_logprobs(requests, self.stream(echo_requests))

  def update_weights(self, variables: Tree) -> None:
    """Replaces the weights, for example after a training step.

    Waits until no request runs, and clears the prefix cache. The adapters of a
    pool do not change.

    Args:
      variables: Flax collections: 'params' (the base model), 'peft' (the
        model's single adapter), or both. Names, shapes and dtypes must equal
        those of the current weights.

    Raises:
      ValueError: a name, shape or dtype differs, or `variables` contains 'peft'
        but the engine has a pool of adapters.
    """
    self._build_core_inline()
    self._run_on_engine_thread(lambda: self._core.update_weights(variables))

  def adapters(self) -> Sequence[LoadedAdapter]:
    """The adapters that requests may name."""
    return self._adapters.loaded()

  def load(self, name: str, path: str) -> LoadedAdapter:
    """Loads an adapter from a training run or an exported directory.

    An adapter of the same name is replaced. Running requests keep the adapter
    with which they started.

    Args:
      name: the name by which requests select the adapter.

    Raises:
      ValueError: the adapter cannot be read or served, belongs to another base
        model, or does not fit into memory. The loaded adapters do not change.
    """
    # Reading may take long, so it runs on the caller's thread, and the engine
    # thread continues to generate.
    adapter = self._adapters.read(path)
    return self._run_on_engine_thread(lambda: self._adapters.put(name, adapter))

  def unload(self, name: str) -> None:
    """Removes an adapter as soon as no request uses it.

    Raises:
      UnknownAdapter: no adapter has this name.
    """
    with self._condition:
      self._check_adapter(name)
      self._unloading.add(name)
    self._run_on_engine_thread(lambda: self._unload(name))

  def stats(self) -> EngineStats:
    with self._condition:
      adapters, core = self._adapters.loaded(), self._core
      waiting = self._count_waiting()
      return EngineStats(
        running=len(self._sequences) - waiting,
        waiting=waiting,
        slots=self.slots,
        finished=dict(core.finished) if core else {},
        prompt_tokens=core.prompt_tokens if core else 0,
        cached_tokens=core.cached_tokens if core else 0,
        answer_tokens=core.answer_tokens if core else 0,
        proposed_tokens=core.proposed_tokens if core else 0,
        accepted_tokens=core.accepted_tokens if core else 0,
        compiled=len(core.runner.programs) if core else 0,
        adapters=len(adapters),
        adapter_bytes=self._adapters.bytes,
      )

  def drain(self, seconds: float) -> bool:
    """Stops accepting requests, and waits until all have finished.

    Returns:
      False if requests are unfinished after `seconds`.
    """
    with self._condition:
      self._closed_reason = self._closed_reason or 'the server is shutting down'
      return self._condition.wait_for(lambda: not self._sequences, seconds)

  def stop(self) -> None:
    """Stops the engine thread; unfinished requests end with CANCELLED."""
    with self._condition:
      self._closed_reason = self._closed_reason or 'the server is shutting down'
      self._stopped = True
      self._condition.notify_all()
    if self._thread is not None:
      self._thread.join()

  def _count_waiting(self) -> int:
    return sum(s.adapter is None for s in self._sequences.values())

  def _check_adapter(self, name: str) -> LoadedAdapter:
    adapters = {adapter.name: adapter for adapter in self._adapters.loaded()}
    if name not in adapters or name in self._unloading:
      raise UnknownAdapter(
        f'there is no adapter {name!r}; there are '
        f'{", ".join(adapters) or "none besides the base model"}'
      )
    return adapters[name]

  def _seconds_until_slot(self, waiting: int) -> float:
    """Estimates how many seconds a new request would wait for a slot."""
    seconds = self._core.scheduler.slot_seconds * (waiting + 1) / self.slots
    return max(1, math.ceil(seconds))

  def _enqueue(self, call: EngineCall) -> None:
    self._inbox.append(call)
    self._condition.notify_all()

  def _run_on_engine_thread(self, function: Callable[[], T]) -> T:
    """Calls a function on the engine thread, between two steps."""
    call = EngineCall(function)
    with self._condition:
      if self._stopped:
        raise RequestRefused('the engine has been stopped')
      if self._thread is not None:
        self._enqueue(call)
    if self._thread is None and not call.run():
      raise ValueError('requests are running; wait for their answers first')
    return call.future.result()

  def _try_submit(self, request, put, unfinished: set[str]) -> bool:
    """Submits a request.

    Returns:
      False if the queue is full, but requests of the same caller will leave it.

    Raises:
      EngineFull: only requests of other callers fill the queue.
    """
    try:
      self.submit(request, lambda event: put((request, event)))
    except EngineFull:
      if not unfinished:
        raise
      return False
    return True

  def _unload(self, name: str) -> None:
    if self._core is not None and self._core.scheduler.waits_for(name):
      raise RetryLater
    try:
      self._adapters.unload(name)
    finally:
      self._unloading.discard(name)

  def _run(self, progress: Progress, startup: Future) -> None:
    """The main function of the engine thread."""
    try:
      self._build_core(progress)
    except BaseException as e:
      self._abort_all(FAILED, 'the engine did not start')
      startup.set_exception(e)
      return
    startup.set_result(None)
    try:
      while self._run_calls():
        self._core.step()
    except BaseException as e:
      self._core.failure_message = (
        f'the engine stopped: {e}; restart the server'
      )
      self._abort_all(FAILED, self._core.failure_message)
      raise
    self._abort_all(CANCELLED, 'the server has shut down')

  def _build_core_inline(self) -> None:
    """Builds the core on this thread, unless `start` was called."""
    if self._thread is None and self._core is None:
      self._build_core(lambda *args: None)

  def _build_core(self, progress: Progress) -> None:
    runner = ModelRunner(
      self._model, self._params, self._adapters, self._config, self._device
    )
    # The runner has its own copy of the weights; this one can be freed.
    self._params = None
    runner.compile(progress)
    if self._config.compile_ahead:
      run_test_request(runner)
    core = EngineCore(
      runner, self._remove_sequence, self._build_proposer(progress)
    )
    with self._condition:
      self._core = core
      if not self._stopped:
        self._closed_reason = ''

  def _build_proposer(self, progress: Progress) -> Proposer | None:
    if self._draft is not None:
      core = self._draft.build_core(self._config, self._device, progress)
      # The runner has its own copy of the weights.
      self._draft = None
      return DraftModel(core, self.vocab).propose
    if self._config.prompt_lookup_num_tokens:
      return prompt_lookup.propose_all
    return None

  def _run_calls(self) -> bool:
    """Waits for calls or running requests, and runs the calls in the inbox.

    Returns:
      False if the engine has been stopped.
    """
    with self._condition:
      self._condition.wait_for(
        lambda: (
          self._inbox or self._core.scheduler.has_unfinished or self._stopped
        )
      )
      if self._stopped:
        return False
      calls = list(self._inbox)
      self._inbox.clear()
    retries = [call for call in calls if not call.run()]
    with self._condition:
      self._inbox.extendleft(reversed(retries))
    return True

  def _remove_sequence(self, sequence: sequences.Sequence) -> None:
    with self._condition:
      self._sequences.pop(sequence.request.id, None)
      self._condition.notify_all()

  def _abort_all(self, reason: str, message: str) -> None:
    """Ends all requests, and fails all calls in the inbox."""
    with self._condition:
      self._closed_reason, self._stopped = self._closed_reason or message, True
      calls = list(self._inbox)
      self._inbox.clear()
      unfinished = list(self._sequences.values())
    for call in calls:
      call.future.set_exception(RequestRefused(message))
    for sequence in unfinished:
      self._core.finish(sequence, reason, message)

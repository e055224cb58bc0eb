# SPDX-License-Identifier: Apache-2.0
"""The engine: requests in, tokens out.

A server starts it on a thread of its own (`start`), which owns JAX; other
threads leave calls in an inbox, which that thread empties between two steps of
its `EngineCore`. A command that only waits for answers calls `generate`,
`stream` and `log_probs` without `start`: the steps are then done on its thread.
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
from moepeft.inference.engine import scoring
from moepeft.inference.engine import sequence as sequences
from moepeft.inference.engine.calls import EngineCall, NotYet
from moepeft.inference.engine.engine_core import EngineCore, check_runs
from moepeft.inference.engine.limits import (
  EngineConfig,
  check_request,
  check_request_length,
  max_model_len,
)
from moepeft.inference.engine.model_runner import ModelRunner
from moepeft.inference.engine.weights import Adapters

T = TypeVar('T')
# Called with (program, number done, number in all) before each is compiled.
Progress = Callable[[str, int, int], None]


class Engine:
  """Continuations and log-probabilities by a model with its adapters.

  After `start`, every method may be called from any thread.

  Attributes:
    vocab: the size of the model's vocabulary.
    max_model_len: limit on a prompt and its answer, together in a decoder; on
      each of the two in an encoder-decoder.
    decoder_only: whether the prompt is part of the text.
    slots: sequences that run at once.
  """

  def __init__(
    self,
    model: Any,
    params: Tree,
    adapters: Adapters,
    config: EngineConfig,
    device: Any = None,
  ):
    """
    Args:
      model: the base's; it is given the adapter_map of the adapters.
      params: its weights.
      device: the one that computes; by default JAX's.
    """
    self._model, self._params, self._device = model, params, device
    self._adapters, self._config = adapters, config
    self.vocab = model.config.vocab
    self.max_model_len = max_model_len(model, config)
    self.decoder_only = hasattr(model, 'extend')
    self.slots = config.slots
    # Guards all below; notified of every change.
    self._changed = threading.Condition()
    self._inbox: collections.deque[EngineCall] = collections.deque()
    self._sequences: dict[str, sequences.Sequence] = {}
    self._unloading: set[str] = set()
    self._closed, self._stopped = 'the engine has not started', False
    self._thread: threading.Thread | None = None
    self._core: EngineCore | None = None
    self._logprob_requests = 0

  @property
  def ready(self) -> bool:
    """Whether a generation has run since the start."""
    return not self._closed and not self._core.broken

  def start(self, progress: Progress = lambda *args: None) -> None:
    """Compiles every program, runs a real generation, then takes requests.

    Returns once `ready`.

    Raises:
      RuntimeError: the first generation failed, or a program does not compile.
    """
    if self._thread is not None:
      raise ValueError('the engine has been started already')
    started: Future[None] = Future()
    self._thread = threading.Thread(
      target=self._run, args=(progress, started), name='engine', daemon=True
    )
    self._thread.start()
    started.result()

  def submit(self, request: Request, deliver: Callable[[Event], None]) -> None:
    """Takes a request; its events are delivered later.

    Args:
      deliver: called on the engine's thread. An asyncio server passes `lambda
        event: loop.call_soon_threadsafe(queue.put_nowait, event)`.

    Raises:
      RequestRefused: it is not taken.
    """
    check_request(request, self._model, self._config)
    with self._changed:
      if self._closed or self._core.broken:
        raise RequestRefused(self._closed or self._core.broken)
      if isinstance(self._adapters, FixedAdapter):
        adapter = self._adapters.acquire(request.adapter)
        soft_prompt = len(adapter.soft_prompt_ids)
      elif request.adapter:
        soft_prompt = self._check_adapter(request.adapter).soft_prompt_length
      else:
        soft_prompt = 0
      check_request_length(request, self._model, self._config, soft_prompt)
      if request.id in self._sequences:
        raise RequestRefused(f'a request {request.id!r} is under way already')
      waiting = self._waiting()
      # What has come in since the last step may find slots free.
      if waiting >= self._config.queue + self._core.scheduler.slots.free():
        raise EngineFull(
          f'{waiting} requests wait already; try again later',
          self._estimate(waiting),
        )
      sequence = sequences.Sequence(request, deliver)
      self._sequences[request.id] = sequence
      self._put(EngineCall(lambda: self._core.scheduler.add(sequence)))

  def cancel(self, id: str) -> None:
    """Ends a request with CANCELLED; of an unknown id, nothing."""
    with self._changed:
      if id in self._sequences:
        self._sequences[id].cancelled = True

  def stream(
    self, requests: Iterable[Request]
  ) -> Iterator[tuple[Request, Event]]:
    """The events of requests as they come, those of all requests mixed.

    More requests than may wait are submitted as others finish. Requests that
    have not finished when the iterator is closed are cancelled.

    Raises:
      RequestRefused: the engine does not take one of them.
    """
    self._open_inline()
    events: queue.SimpleQueue[tuple[Request, Event]] = queue.SimpleQueue()
    pending, unfinished = collections.deque(requests), set()
    try:
      while pending or unfinished:
        while pending and self._submitted(pending[0], events.put, unfinished):
          unfinished.add(pending.popleft().id)
        if self._thread is None and self._do_calls():
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
        self._do_calls()
        self._core.step()

  def generate(self, requests: Sequence[Request]) -> list[GeneratedAnswer]:
    """The answers to requests, in their order.

    Raises:
      RequestRefused: the engine does not take one of them.
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
    """The most probable answers to each request, best first.

    Waits until no request runs. Sampling, constraints and log-probabilities of
    the requests are not looked at.

    Raises:
      RequestRefused: the engine does not take one of them.
      ValueError: it has fewer slots than beams.
      ArithmeticError: the model's logits are no numbers.
    """
    for request in requests:
      check_request(request, self._model, self._config)
    if beams.count > self.slots:
      raise ValueError(
        f'{beams.count} beams need as many slots; the engine has {self.slots}'
      )
    self._open_inline()
    return self._call(lambda: search(self._core, requests, beams))

  def log_probs(self, requests: Sequence[LogprobRequest]) -> list[np.ndarray]:
    """Log-probability of each token of the answers, in nats: float64 [t] each.

    Raises:
      RequestRefused: the engine does not take one of them.
      ArithmeticError: the log-probabilities are no numbers.
    """
    self._open_inline()
    if not self.decoder_only:
      return [
        self._call(lambda r=r: scoring.score_answer(self._core, r))
        for r in requests
      ]
    scored = scoring.echo_requests(requests, self._logprob_requests)
    self._logprob_requests += len(scored)
    return scoring.answer_logprobs(requests, self.stream(scored))

  def update_weights(self, variables: Tree) -> None:
    """Takes new values of the weights, as a trainer has them.

    Waits until no request runs, and forgets all prefixes. Adapters of a pool
    stay as they were loaded.

    Args:
      variables: 'params', the base's, or 'peft', the model's own adapter, or
        both; with the names, shapes and types of before.

    Raises:
      ValueError: names, shapes or types differ, or the engine has a pool of
        adapters and 'peft' is given.
    """
    self._open_inline()
    self._call(lambda: self._core.update_weights(variables))

  def adapters(self) -> Sequence[LoadedAdapter]:
    """The adapters that requests may name."""
    return self._adapters.loaded()

  def load(self, name: str, path: str) -> LoadedAdapter:
    """Reads an adapter (a run, or an exported directory) under a name.

    Running requests continue with the adapter that they began with.

    Raises:
      ValueError: it cannot be read, is another base's, is not for serving, or
        there is no memory for it; what was loaded before stays.
    """
    # On the caller's thread: it may take long, and answers go on beside it.
    adapter = self._adapters.read(path)
    return self._call(lambda: self._adapters.put(name, adapter))

  def unload(self, name: str) -> None:
    """Removes an adapter once no request uses it.

    Raises:
      UnknownAdapter: there is none of that name.
    """
    with self._changed:
      self._check_adapter(name)
      self._unloading.add(name)
    self._call(lambda: self._unload(name))

  def stats(self) -> EngineStats:
    with self._changed:
      loaded, counts = self._adapters.loaded(), self._core
      waiting = self._waiting()
      return EngineStats(
        running=len(self._sequences) - waiting,
        waiting=waiting,
        slots=self.slots,
        finished=dict(counts.finished) if counts else {},
        prompt_tokens=counts.prompt_tokens if counts else 0,
        cached_tokens=counts.cached_tokens if counts else 0,
        answer_tokens=counts.answer_tokens if counts else 0,
        compiled=len(counts.runner.programs) if counts else 0,
        adapters=len(loaded),
        adapter_bytes=self._adapters.bytes,
      )

  def drain(self, seconds: float) -> bool:
    """Takes no more requests and waits; whether all have finished."""
    with self._changed:
      self._closed = self._closed or 'the server is shutting down'
      return self._changed.wait_for(lambda: not self._sequences, seconds)

  def stop(self) -> None:
    """Ends the thread; unfinished requests are CANCELLED."""
    with self._changed:
      self._closed = self._closed or 'the server is shutting down'
      self._stopped = True
      self._changed.notify_all()
    if self._thread is not None:
      self._thread.join()

  def _waiting(self) -> int:
    return sum(s.adapter is None for s in self._sequences.values())

  def _check_adapter(self, name: str) -> LoadedAdapter:
    loaded = {adapter.name: adapter for adapter in self._adapters.loaded()}
    if name not in loaded or name in self._unloading:
      raise UnknownAdapter(
        f'there is no adapter {name!r}; there are '
        f'{", ".join(loaded) or "none, but the base"}'
      )
    return loaded[name]

  def _estimate(self, waiting: int) -> float:
    """Seconds until one of those that wait has got a slot, about."""
    seconds = self._core.scheduler.slot_seconds * (waiting + 1) / self.slots
    return max(1, math.ceil(seconds))

  def _put(self, call: EngineCall) -> None:
    self._inbox.append(call)
    self._changed.notify_all()

  def _call(self, do: Callable[[], T]) -> T:
    """Calls on the engine's thread, between two steps."""
    call = EngineCall(do)
    with self._changed:
      if self._stopped:
        raise RequestRefused('the engine has been stopped')
      if self._thread is not None:
        self._put(call)
    if self._thread is None and not call.run():
      raise ValueError('requests are running; wait for their answers first')
    return call.future.result()

  def _submitted(self, request, put, unfinished: set[str]) -> bool:
    """Submits a request; False while the queue is full of our own."""
    try:
      self.submit(request, lambda event: put((request, event)))
    except EngineFull:
      if not unfinished:
        raise
      return False
    return True

  def _unload(self, name: str) -> None:
    if self._core is not None and self._core.scheduler.waits_for(name):
      raise NotYet
    try:
      self._adapters.unload(name)
    finally:
      self._unloading.discard(name)

  def _run(self, progress: Progress, started: Future) -> None:
    """The engine's thread."""
    try:
      self._open(progress)
    except BaseException as e:
      self._close(FAILED, 'the engine did not start')
      started.set_exception(e)
      return
    started.set_result(None)
    try:
      while self._do_calls():
        self._core.step()
    except BaseException as e:
      self._core.broken = f'the engine stopped: {e}; restart the server'
      self._close(FAILED, self._core.broken)
      raise
    self._close(CANCELLED, 'the server has shut down')

  def _open_inline(self) -> None:
    """Compiles on this thread, where no other was started."""
    if self._thread is None and self._core is None:
      self._open(lambda *args: None)

  def _open(self, progress: Progress) -> None:
    runner = ModelRunner(
      self._model, self._params, self._adapters, self._config, self._device
    )
    # The runner has them as it needs them.
    self._params = None
    runner.compile(progress)
    if self._config.compile_ahead:
      check_runs(runner)
    core = EngineCore(runner, self._forget)
    with self._changed:
      self._core = core
      if not self._stopped:
        self._closed = ''

  def _do_calls(self) -> bool:
    """Waits for something to do, and runs the calls of other threads.

    Returns:
      Whether the engine goes on.
    """
    with self._changed:
      self._changed.wait_for(
        lambda: self._inbox or self._core.scheduler.busy or self._stopped
      )
      if self._stopped:
        return False
      calls = list(self._inbox)
      self._inbox.clear()
    again = [call for call in calls if not call.run()]
    with self._changed:
      self._inbox.extendleft(reversed(again))
    return True

  def _forget(self, sequence: sequences.Sequence) -> None:
    with self._changed:
      self._sequences.pop(sequence.request.id, None)
      self._changed.notify_all()

  def _close(self, reason: str, message: str) -> None:
    """Ends all requests and calls."""
    with self._changed:
      self._closed, self._stopped = self._closed or message, True
      calls = list(self._inbox)
      self._inbox.clear()
      unfinished = list(self._sequences.values())
    for call in calls:
      call.future.set_exception(RequestRefused(message))
    for sequence in unfinished:
      self._core.finish(sequence, reason, message)

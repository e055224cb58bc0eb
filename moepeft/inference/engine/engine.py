# SPDX-License-Identifier: Apache-2.0
"""The engine: requests in, tokens out, computed on one thread.

Others leave what they want done in an inbox, which that thread empties
between two turns of its `Batcher`.
"""

import collections
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from moepeft.core.types import Tree
from moepeft.inference.adapters.protocol import Banks
from moepeft.inference.api import (
  CANCELLED,
  FAILED,
  LENGTH,
  EngineFull,
  EngineStats,
  Event,
  LoadedAdapter,
  Request,
  RequestRefused,
  UnknownAdapter,
)
from moepeft.inference.engine.limits import (
  EngineConfig,
  check_length,
  check_request,
  places_of,
)
from moepeft.inference.engine.model_runner import ModelRunner
from moepeft.inference.engine.scheduler import Scheduler
from moepeft.inference.engine.sequence import Running

T = TypeVar('T')


class Later(Exception):
  """Raised by a task that cannot be done yet."""


class Task(Generic[T]):
  """A call whose result, or error, another thread waits for in `done`."""

  def __init__(self, do: Callable[[], T]):
    self._do = do
    self.done: Future[T] = Future()

  def run(self) -> bool:
    """Does it; whether that was the end of it."""
    try:
      self.done.set_result(self._do())
    except Later:
      return False
    except Exception as e:
      self.done.set_exception(e)
    return True


Progress = Callable[[str, int, int], None]


class Engine:
  """Implements `moepeft.inference.api.Engine`."""

  def __init__(
    self,
    model: Any,
    params: Tree,
    banks: Banks,
    settings: EngineConfig,
  ):
    """
    Args:
      model: the base's; the pool's adapter map replaces its own.
      params: its weights.
    """
    self._model, self._params = model, params
    self._banks, self._settings = banks, settings
    self.vocab = model.config.vocab
    self.places = places_of(model, settings)
    self.decoder_only = hasattr(model, 'extend')
    # Guards what follows; told of whatever changes.
    self._changed = threading.Condition()
    self._inbox: collections.deque[Task] = collections.deque()
    self._underway: dict[str, Running] = {}
    self._leaving: set[str] = set()
    self._closed, self._stopped = 'the engine has not started', False
    self._thread: threading.Thread | None = None
    self._core: ModelRunner | None = None
    self._batcher: Scheduler | None = None

  @property
  def ready(self) -> bool:
    return not self._closed and not self._batcher.broken

  def start(self, progress: Progress = lambda *args: None) -> None:
    """See the protocol; returns once `ready`.

    Raises:
      RuntimeError: the first generation failed, or a program does not compile.
    """
    if self._thread is not None:
      raise ValueError('the engine has been started already')
    begun: Future[None] = Future()
    self._thread = threading.Thread(
      target=self._run, args=(progress, begun), name='engine', daemon=True
    )
    self._thread.start()
    begun.result()

  def submit(self, request: Request, deliver: Callable[[Event], None]) -> None:
    check_request(request, self._model, self._settings)
    with self._changed:
      if self._closed or self._batcher.broken:
        raise RequestRefused(self._closed or self._batcher.broken)
      before = 0
      if request.adapter:
        before = self._check_adapter(request.adapter).before
      check_length(request, self._model, self._settings, before)
      if request.id in self._underway:
        raise RequestRefused(f'a request {request.id!r} is under way already')
      waiting = sum(row.held is None for row in self._underway.values())
      # What has come in since the last turn may find slots free.
      if waiting >= self._settings.queue + self._batcher.free:
        raise EngineFull(
          f'{waiting} requests wait already; try again later',
          self._estimate(waiting),
        )
      row = Running(request, deliver)
      self._underway[request.id] = row
      self._put(Task(lambda: self._batcher.arrive(row)))

  def cancel(self, id: str) -> None:
    with self._changed:
      if id in self._underway:
        self._underway[id].gone = True

  def adapters(self) -> Sequence[LoadedAdapter]:
    return self._banks.loaded()

  def load(self, name: str, path: str) -> LoadedAdapter:
    # On the caller's thread: it may take long, and answers go on beside it.
    read = self._banks.read(path)
    return self._call(lambda: self._banks.put(name, read))

  def unload(self, name: str) -> None:
    with self._changed:
      self._check_adapter(name)
      self._leaving.add(name)
    self._call(lambda: self._unload(name))

  def stats(self) -> EngineStats:
    with self._changed:
      rows = list(self._underway.values())
      loaded = self._banks.loaded()
      counts, waiting = self._batcher, sum(row.held is None for row in rows)
      return EngineStats(
        running=len(rows) - waiting,
        waiting=waiting,
        slots=self._settings.slots,
        finished=dict(counts.finished) if counts else {},
        prompt_tokens=counts.prompt_tokens if counts else 0,
        cached_tokens=counts.cached_tokens if counts else 0,
        answer_tokens=counts.answer_tokens if counts else 0,
        compiled=len(self._core.programs) if self._core else 0,
        adapters=len(loaded),
        adapter_bytes=self._banks.bytes,
      )

  def drain(self, seconds: float) -> bool:
    with self._changed:
      self._closed = self._closed or 'the server is shutting down'
      return self._changed.wait_for(lambda: not self._underway, seconds)

  def stop(self) -> None:
    with self._changed:
      self._closed = self._closed or 'the server is shutting down'
      self._stopped = True
      self._changed.notify_all()
    if self._thread is not None:
      self._thread.join()

  def _check_adapter(self, name: str) -> LoadedAdapter:
    found = {one.name: one for one in self._banks.loaded()}
    names = list(found)
    if name not in names or name in self._leaving:
      raise UnknownAdapter(
        f'there is no adapter {name!r}; there are '
        f'{", ".join(names) or "none, but the base"}'
      )
    return found[name]

  def _estimate(self, waiting: int) -> float:
    """Seconds until one of those that wait has got a slot, about."""
    return max(
      1, math.ceil(self._batcher.seconds * (waiting + 1) / self._settings.slots)
    )

  def _put(self, task: Task) -> None:
    self._inbox.append(task)
    self._changed.notify_all()

  def _call(self, do: Callable[[], T]) -> T:
    """Done on the engine's thread, between two turns."""
    task = Task(do)
    with self._changed:
      if self._stopped:
        raise RequestRefused('the engine has been stopped')
      if self._thread is not None:
        self._put(task)
    if self._thread is None:
      task.run()
    return task.done.result()

  def _unload(self, name: str) -> None:
    if self._batcher is not None and self._batcher.waits_for(name):
      raise Later
    try:
      self._banks.unload(name)
    finally:
      self._leaving.discard(name)

  def _run(self, progress: Progress, begun: Future) -> None:
    try:
      self._begin(progress)
    except BaseException as e:
      self._end(FAILED, 'the engine did not start')
      begun.set_exception(e)
      return
    begun.set_result(None)
    try:
      while self._do_tasks():
        self._batcher.turn()
        if self._batcher.broken:
          self._batcher.end_all(FAILED, self._batcher.broken)
    except BaseException as e:
      self._batcher.broken = f'the engine stopped: {e}; restart the server'
      self._end(FAILED, self._batcher.broken)
      raise
    self._end(CANCELLED, 'the server has shut down')

  def _begin(self, progress: Progress) -> None:
    core = ModelRunner(self._model, self._params, self._banks, self._settings)
    # The core has them as it needs them.
    self._params = None
    core.compile(progress)
    _check_runs(core)
    batcher = Scheduler(core, self._forget)
    with self._changed:
      self._core, self._batcher = core, batcher
      if not self._stopped:
        self._closed = ''

  def _do_tasks(self) -> bool:
    """Waits for something to do, and does what others asked for.

    Returns:
      Whether the engine goes on.
    """
    with self._changed:
      self._changed.wait_for(
        lambda: self._inbox or self._batcher.busy or self._stopped
      )
      if self._stopped:
        return False
      tasks = list(self._inbox)
      self._inbox.clear()
    later = [task for task in tasks if not task.run()]
    with self._changed:
      self._inbox.extendleft(reversed(later))
    return True

  def _forget(self, row: Running) -> None:
    with self._changed:
      self._underway.pop(row.request.id, None)
      self._changed.notify_all()

  def _end(self, reason: str, message: str) -> None:
    """Whatever is under way ends."""
    with self._changed:
      self._closed, self._stopped = self._closed or message, True
      tasks = list(self._inbox)
      self._inbox.clear()
      rows = list(self._underway.values())
    for task in tasks:
      task.done.set_exception(RequestRefused(message))
    for row in rows:
      self._batcher.end(row, reason, message)


def _check_runs(core: ModelRunner) -> None:
  """A real generation, all the way.

  Raises:
    RuntimeError: it failed.
  """
  events: list[Event] = []
  batcher = Scheduler(core, lambda row: None)
  prompt = (0,) * max(1, min(3, core.settings.places - 2))
  batcher.arrive(Running(Request('first', prompt, 2), events.append))
  while batcher.busy:
    batcher.turn()
  if events[-1].reason != LENGTH:
    raise RuntimeError(f'the first generation failed: {events[-1].message}')

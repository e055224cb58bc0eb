# SPDX-License-Identifier: Apache-2.0
"""An engine without a model: it says what a test tells it to.

Ids are those of bytes, plus 3; 1 ends an answer. A token's log-probability is
-id / 100, and -2 and -3 are those of ids 5 and 6 beside it.
"""

import collections
import dataclasses
import threading
import time

import numpy as np

from moepeft.inference import api
from moepeft.inference.api import (
  EngineStats,
  Finished,
  LoadedAdapter,
  PromptLogprobs,
  Token,
  TokenLogprob,
)

END = 1


def ids_of(text):
  return [byte + 3 for byte in text.encode()]


def text_of(ids):
  return bytes(i - 3 for i in ids if i >= 3).decode(errors='replace')


def scored(i, request, first=False):
  # Two layers, the first with one expert.
  weights = np.array([[1, np.nan], [0.25, 0.75]], np.float32)
  experts = {'mlp/wo': weights} if request.routing else None
  if request.logprobs is None and request.prompt_logprobs is None or first:
    return TokenLogprob(i, layer_experts=experts)
  top = sorted([(i, -i / 100), (5, -2.0), (6, -3.0)], key=lambda x: -x[1])
  return TokenLogprob(i, -i / 100, tuple(top[: request.logprobs or 0]), experts)


def choose(mask):
  """The end where it is allowed, else the greatest id of a letter."""
  if mask[END]:
    return END
  letters = mask[: ord('~') + 4]
  return int(letters.nonzero()[0][-1])


@dataclasses.dataclass
class Row:
  request: api.Request
  deliver: object
  answer_ids: collections.deque
  until: float
  sent: int = 0


class FakeEngine:
  """
  Attributes:
    say: request -> the ids of its answer; by default its prompt's last
      characters, and an end.
    failure: the message of an answer that an id below 0 ends.
    running: cleared, no token comes (`hold`); set, they come.
    requests: every request that was accepted.
    cancelled: ids.
  """

  vocab, decoder_only, routing = 259, True, True

  def __init__(self, slots=4, queue=8, places=512, pause=0.0):
    self.slots, self.queue, self.max_model_len = slots, queue, places
    self.pause = pause
    self.answer = lambda request: [*request.prompt_ids[-5:], END]
    self.failure = 'as the test told it'
    self.ready = False
    self.running = threading.Event()
    self.running.set()
    self.requests, self.cancelled, self.loads = [], [], {}
    self._rows, self._lock = {}, threading.Condition()
    self._ended, self._draining = False, False
    self._counts = collections.Counter()
    self._finished = collections.Counter()
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def start(self, progress):
    progress('prefill', 0, 1)
    self.ready = True

  def submit(self, request, deliver):
    with self._lock:
      if self._draining:
        raise api.RequestRefused('the engine takes no more requests')
      if request.adapter and request.adapter not in self.loads:
        raise api.UnknownAdapter(f'there is no adapter {request.adapter!r}')
      prompt_length = len(request.prompt_ids) if self.decoder_only else 0
      if prompt_length + request.max_new_tokens > self.max_model_len:
        raise api.PromptTooLong('prompt and answer are too long')
      if len(self._rows) >= self.slots + self.queue:
        raise api.EngineFull('the queue is full; try again later', 2.5)
      assert request.id not in self._rows
      self.requests.append(request)
      until = time.monotonic() + (request.timeout or 1e9)
      answer_ids = collections.deque(self.answer(request))
      self._rows[request.id] = Row(request, deliver, answer_ids, until)
      self._lock.notify_all()

  def cancel(self, id):
    with self._lock:
      if id in self._rows:
        self.cancelled.append(id)
        self._finish(self._rows[id], api.CANCELLED)

  def adapters(self):
    return list(self.loads.values())

  def load(self, name, path):
    if 'broken' in path:
      raise ValueError(f'{path!r} holds no adapter; name a run')
    self.loads[name] = LoadedAdapter(
      name, 'lora(rank=4)', f'sha of {path}', 99, path
    )
    return self.loads[name]

  def unload(self, name):
    if name not in self.loads:
      raise api.UnknownAdapter(f'there is no adapter {name!r}')
    del self.loads[name]

  def stats(self):
    with self._lock:
      count = min(len(self._rows), self.slots)
      return EngineStats(
        count,
        len(self._rows) - count,
        self.slots,
        dict(self._finished),
        self._counts['prompt'],
        0,
        self._counts['answer'],
        0,
        0,
        7,
        len(self.loads),
        99 * len(self.loads),
      )

  def drain(self, seconds):
    with self._lock:
      self._draining = True
      return self._lock.wait_for(lambda: not self._rows, seconds)

  def stop(self):
    with self._lock:
      self._draining = self._ended = True
      for row in list(self._rows.values()):
        self._finish(row, api.CANCELLED)
      self._lock.notify_all()
    self.running.set()
    self._thread.join(5)

  def idle(self, count=0, seconds=5):
    """Whether at most so many are under way, at once or soon."""
    with self._lock:
      return self._lock.wait_for(lambda: len(self._rows) <= count, seconds)

  def busy(self, count=1, seconds=5):
    """Whether at least so many are under way, at once or soon."""
    with self._lock:
      return self._lock.wait_for(lambda: len(self._rows) >= count, seconds)

  def _run(self):
    while not self._ended:
      self.running.wait(0.01)
      with self._lock:
        if not self._rows:
          self._lock.wait(0.05)
        for row in list(self._rows.values()):
          if time.monotonic() > row.until:
            self._finish(row, api.TIME)
        # Looked at when there is a row: it may have been held in between.
        if self.running.is_set():
          for row in list(self._rows.values())[: self.slots]:
            self._step(row)
      if self.pause:
        time.sleep(self.pause)

  def _step(self, row):
    request = row.request
    if not row.sent:
      self._counts['prompt'] += len(request.prompt_ids)
      if request.prompt_logprobs is not None:
        logprobs = [
          scored(i, request, not at) for at, i in enumerate(request.prompt_ids)
        ]
        row.deliver(PromptLogprobs(tuple(logprobs)))
    if row.sent >= request.max_new_tokens:
      self._finish(row, api.LENGTH)
      return
    if request.constraint is not None:
      try:
        token = choose(request.constraint.mask())
        over = (
          request.constraint.accept(token) or token in request.eos_token_ids
        )
      except ValueError as e:
        self._finish(row, api.FAILED, str(e))
        return
    else:
      token = row.answer_ids.popleft() if row.answer_ids else END
      over = token in request.eos_token_ids
    if token < 0:
      self._finish(row, api.FAILED, self.failure)
      return
    row.sent += 1
    self._counts['answer'] += 1
    row.deliver(Token(scored(token, request)))
    if over:
      self._finish(row, api.STOP)
    elif row.sent >= request.max_new_tokens:
      self._finish(row, api.LENGTH)

  def _finish(self, row, reason, message=''):
    del self._rows[row.request.id]
    self._finished[reason] += 1
    row.deliver(
      Finished(reason, len(row.request.prompt_ids), 0, row.sent, message)
    )
    self._lock.notify_all()

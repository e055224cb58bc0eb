# SPDX-License-Identifier: Apache-2.0
"""Requests for embeddings wait in a bounded queue, and not for ever."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from moepeft.inference.api import EngineFull
from moepeft.serve.http.bounded import BoundedThread
from moepeft.serve.http.limits import RequestLimits
from tests.serve.in_process import in_process
from tests.serve.small_server import fake

RAW = json.dumps({'model': 'vectors', 'input': 'a'}).encode()


class SlowEmbedder:
  """Waits for the test."""

  name, dimensions = 'vectors', 3

  def __init__(self):
    self.begun, self.go = threading.Semaphore(0), threading.Event()

  def encode(self, texts):
    self.begun.release()
    assert self.go.wait(20)
    return np.eye(3, dtype=np.float32)[:1], 1


def test_beyond_the_queue_a_request_for_vectors_is_a_429():
  service = fake(limits=RequestLimits(queue=2))
  service.embedder = embedder = SlowEmbedder()
  with in_process(service) as client, ThreadPoolExecutor(3) as pool:

    def ask():
      return client.send('POST', '/v1/embeddings', RAW)

    waiting = [pool.submit(ask) for _ in range(3)]
    assert embedder.begun.acquire(timeout=10)
    until = time.monotonic() + 10
    # One runs and two wait.
    while service.embedding_thread._count < 3:
      assert time.monotonic() < until
      time.sleep(0.01)
    status, _, answer = ask()
    assert status == 429
    assert json.loads(answer)['error']['code'] == 'queue_full'
    embedder.go.set()
    assert [future.result()[0] for future in waiting] == [200] * 3
    assert ask()[0] == 200


def test_vectors_that_take_too_long_are_a_503():
  service = fake(limits=RequestLimits(seconds=0.2))
  service.embedder = embedder = SlowEmbedder()
  with in_process(service) as client:
    status, _, answer = client.send('POST', '/v1/embeddings', RAW)
    assert status == 503
    assert json.loads(answer)['error']['code'] == 'timeout'
    embedder.go.set()
    assert client.send('POST', '/v1/embeddings', RAW)[0] == 200


def test_a_call_that_fails_or_is_canceled_leaves_the_queue():
  thread, go = BoundedThread('test'), threading.Event()
  first = thread.submit(1, go.wait, 20)
  second = thread.submit(1, lambda: 1 / 0)
  with pytest.raises(EngineFull):
    thread.submit(1, int)
  assert second.cancel()
  third = thread.submit(1, lambda: 1 / 0)
  go.set()
  assert first.result(10)
  assert isinstance(third.exception(10), ZeroDivisionError)
  assert thread.submit(0, int).result(10) == 0

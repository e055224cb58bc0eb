# SPDX-License-Identifier: Apache-2.0
"""Two hundred requests over 32 connections: none lost, none mixed up."""

import contextlib
import http.client
import json
import queue
import random
import threading
import time

import pytest

from tests.serve.real_server import BASE, METHODS, QUEUE, SLOTS

pytestmark = pytest.mark.slow
REQUESTS, CONNECTIONS = 200, 32
# For all of them, on a machine that does other things too.
SECONDS = 500
MIB = 1 << 20
KINDS = ('whole', 'stream', 'left', 'bad')
# What the process may grow by in a round of the same size as the one before:
# seen were less than 1 MiB. A row of logits (49,152 of 4 bytes) that each
# request left behind would be 37 MiB.
GROWTH = 32 * MIB


class Plan:
  """One request and its outcome.

  Attributes:
    kind: 'whole', 'stream', 'left' (a client that leaves) or 'bad'.
    body: of the request.
    after: of one that is left, events that are read before.
    status, text: what came of it; text is None where it was left.
  """

  def __init__(self, number, salt):
    rng = random.Random(f'{salt}/{number}')
    self.kind = rng.choices(KINDS, (4, 4, 2, 1))[0]
    self.body = {
      'model': rng.choice((BASE, *METHODS)),
      # Another prompt for each request, of another length.
      'prompt': f'Request {salt}{number}: '
      + ' '.join(
        rng.choices(('one', 'two', 'red', 'blue'), k=rng.randint(1, 60))
      ),
      'max_tokens': rng.randint(1, 24),
      'temperature': 0,
      'stream': self.kind == 'stream' or rng.random() < 0.5,
    }
    if self.kind == 'whole':
      self.body['stream'] = False
    self.after = rng.randint(0, 3)
    self.pause = rng.random()
    self.status, self.text, self.tries = None, None, 0

  def raw(self):
    if self.kind == 'bad':
      return json.dumps({**self.body, 'max_tokens': -1}).encode()
    if self.kind == 'left':
      # So long that it is still going on.
      return json.dumps({**self.body, 'max_tokens': 200}).encode()
    return json.dumps(self.body).encode()


def ask(connection, plan):
  """Sends a request and reads what the plan says; whether it is to be sent
  again, as there was no room."""
  plan.tries += 1
  headers = {'Content-Type': 'application/json'}
  connection.request('POST', '/v1/completions', plan.raw(), headers)
  if plan.kind == 'left' and not plan.body['stream']:
    # Nothing comes before the whole answer; the client loses patience.
    time.sleep(plan.pause)
    connection.close()
    return False
  answer = connection.getresponse()
  plan.status = answer.status
  if answer.status == 429:
    answer.read()
    time.sleep(min(2.0, float(answer.headers['Retry-After'])))
    return True
  if plan.kind == 'left':
    for _ in range(2 * plan.after):
      answer.readline()
    connection.close()
    return False
  raw = answer.read()
  if answer.status == 200 and plan.body['stream']:
    plan.text = joined(raw)
  elif answer.status == 200:
    plan.text = json.loads(raw)['choices'][0]['text']
  return False


def joined(raw):
  """The text of a stream that has ended as it should."""
  *events, done = raw.decode().strip().split('\n\n')
  assert done == 'data: [DONE]', raw
  parts = [json.loads(event.removeprefix('data: ')) for event in events]
  assert parts[-1]['choices'][0]['finish_reason'], raw
  return ''.join(part['choices'][0]['text'] for part in parts)


def work(real, waiting, failed):
  """One connection, which is kept until it is left."""
  with contextlib.closing(
    http.client.HTTPConnection('127.0.0.1', real.port, timeout=SECONDS)
  ) as connection:
    while True:
      try:
        plan = waiting.get_nowait()
      except queue.Empty:
        return
      try:
        while ask(connection, plan):
          pass
      except Exception as e:
        failed.append((plan.body, repr(e)))
        connection.close()


def load(real, plans):
  """All plans at once, over 32 connections."""
  waiting, failed = queue.Queue(), []
  for plan in plans:
    waiting.put(plan)
  threads = [
    threading.Thread(target=work, args=(real, waiting, failed), daemon=True)
    for _ in range(CONNECTIONS)
  ]
  until = time.monotonic() + SECONDS
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(max(0, until - time.monotonic()))
  assert not any(thread.is_alive() for thread in threads), 'a request hangs'
  assert failed == []


def idle(real):
  until = time.monotonic() + 60
  while True:
    values = real.metrics()
    if not values['moepeft_running'] + values['moepeft_waiting']:
      return values
    assert time.monotonic() < until, 'a request is still under way'
    time.sleep(0.2)


def test_no_request_is_lost_or_mixed_up_and_nothing_grows(real, capsys):
  # There is room for all connections: none need be refused.
  assert CONNECTIONS <= SLOTS + QUEUE
  # The first round fills what is kept: caches, pools, the allocator's own.
  load(real, [Plan(i, 'a') for i in range(REQUESTS)])
  before, memory = idle(real), real.memory()
  plans = [Plan(i, 'b') for i in range(REQUESTS)]
  began = time.monotonic()
  load(real, plans)
  took = time.monotonic() - began
  after, holds = idle(real), real.memory()
  kinds = {kind: [p for p in plans if p.kind == kind] for kind in KINDS}
  assert all(len(values) >= 10 for values in kinds.values())
  # None is lost.
  assert all(plan.tries == 1 for plan in plans)
  answered = kinds['whole'] + kinds['stream']
  assert all(plan.status == 200 and plan.text is not None for plan in answered)
  assert all(plan.status == 400 for plan in kinds['bad'])
  # Whatever was left did not go on to its end, as far as it had begun.
  name = 'moepeft_finished_total{reason="cancelled"}'
  left = after[name] - before.get(name, 0)
  assert 0.5 * len(kinds['left']) <= left <= len(kinds['left'])
  # None is mixed up: alone, each says the same.
  connection = http.client.HTTPConnection('127.0.0.1', real.port, timeout=60)
  for plan in answered[::4]:
    text, plan.text = plan.text, None
    ask(connection, plan)
    assert plan.text == text, plan.body
  connection.close()
  with capsys.disabled():
    print(
      f'\n{REQUESTS} requests in {took:.0f} s; memory {memory / MIB:.0f} MiB '
      f'before, {holds / MIB:.0f} MiB after; {left:.0f} of '
      f'{len(kinds["left"])} left ones cancelled'
    )
  assert holds - memory < GROWTH

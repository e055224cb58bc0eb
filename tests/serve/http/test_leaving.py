# SPDX-License-Identifier: Apache-2.0
"""Clients that leave, times that are over, and a server that goes down."""

import logging
import threading
import time

import pytest

from moepeft.data.tokenizers.tokenizer import ByteTokenizer
from moepeft.serve.http import server
from moepeft.serve.http.limits import RequestLimits
from tests.serve.fake_engine import FakeEngine, ids_of
from tests.serve.small_server import (
  TIMEOUT,
  port_is_open,
  running,
  service,
  wait_until,
)

CHAT, COMPLETIONS = '/v1/chat/completions', '/v1/completions'
TEXT = {'model': 'base', 'prompt': 'a', 'max_tokens': 400}


def endless(pause=0.002, **limits):
  """A service whose engine goes on until it is told to end."""
  engine = FakeEngine(pause=pause)
  engine.answer = lambda request: ids_of('x' * 500)
  return service(engine, ByteTokenizer(), limits=RequestLimits(**limits))


@pytest.fixture
def client():
  with running(endless()) as service_:
    yield service_


@pytest.mark.parametrize('stream', [False, True])
@pytest.mark.parametrize('n', [1, 3])
def test_a_disconnected_client_frees_its_slots(client, stream, n):
  # Held: without a cancellation nothing would ever end.
  client.engine.running.clear()
  connection = client.connect()
  body = {**TEXT, 'stream': stream, 'n': n}
  client.begin(connection, 'POST', COMPLETIONS, body)
  assert client.engine.busy(n)
  connection.close()
  assert client.engine.idle()
  assert len(client.engine.cancelled) == n


def test_a_client_that_leaves_amid_a_stream_frees_its_slot(client):
  connection = client.connect()
  client.begin(connection, 'POST', COMPLETIONS, {**TEXT, 'stream': True})
  answer = connection.getresponse()
  assert answer.readline().startswith(b'data: ')
  client.engine.running.clear()
  answer.close()
  connection.close()
  assert client.engine.idle()
  assert len(client.engine.cancelled) == 1


def test_one_client_leaves_and_another_is_answered(client):
  client.engine.running.clear()
  first, second = client.connect(), client.connect()
  client.begin(first, 'POST', COMPLETIONS, TEXT)
  assert client.engine.busy(1)
  client.begin(second, 'POST', COMPLETIONS, {**TEXT, 'max_tokens': 5})
  assert client.engine.busy(2)
  first.close()
  assert client.engine.idle(1)
  client.engine.running.set()
  answer = second.getresponse()
  assert answer.status == 200 and b'xxxxx' in answer.read()
  assert client.engine.cancelled == [client.engine.requests[0].id]
  second.close()


def test_a_client_that_leaves_before_its_body_is_sent_does_no_harm(client):
  connection = client.connect()
  connection.putrequest('POST', COMPLETIONS)
  connection.putheader('Content-Type', 'application/json')
  connection.putheader('Content-Length', '100')
  connection.endheaders(b'{"model"')
  connection.close()
  assert client.complete(max_tokens=3)[0] == 200
  assert len(client.engine.requests) == 1


def test_an_answer_ends_when_its_time_is_over():
  with running(endless(seconds=0.3)) as client:
    status, answer = client.post(COMPLETIONS, TEXT)
    assert status == 200
    (choice,) = answer['choices']
    # Far from all of the 400, and what there is is given.
    assert 0 < len(choice['text']) < 400
    assert choice['finish_reason'] == 'length'


def test_an_answer_has_no_more_tokens_than_the_server_gives():
  with running(endless(answer=5)) as client:
    status, answer = client.complete(max_tokens=6)
    assert status == 400 and answer['error']['param'] == 'max_tokens'
    _, answer = client.complete()
    assert answer['choices'][0]['text'] == 'x' * 5


def test_a_time_that_is_over_before_the_first_token_is_a_503():
  with running(endless(seconds=0.1)) as client:
    client.engine.running.clear()
    status, headers, body = client.send('POST', COMPLETIONS, TEXT)
    assert status == 503 and headers['retry-after']
    assert b'timeout' in body


def test_a_server_that_starts_lives_and_is_not_ready():
  with running(endless(), started=False) as client:
    assert client.get('/health')[0] == 200
    for method, path, body in (
      ('GET', '/ready', None),
      ('POST', COMPLETIONS, TEXT),
    ):
      status, headers, _ = client.send(method, path, body)
      assert status == 503 and headers['retry-after']
    client.engine.start(lambda *_: None)
    assert client.get('/ready')[0] == 200


def drained(client, seconds):
  """Begins the end; whether the server's thread has ended in time."""
  client.server._drain_seconds = seconds
  client.server.drain()
  client.thread.join(TIMEOUT)
  return not client.thread.is_alive()


def test_a_server_that_goes_down_finishes_what_is_under_way(client):
  client.engine.running.clear()
  stream, whole = client.connect(), client.connect()
  body = {**TEXT, 'max_tokens': 5}
  client.begin(stream, 'POST', COMPLETIONS, {**body, 'stream': True})
  client.begin(whole, 'POST', COMPLETIONS, body)
  assert client.engine.busy(2)
  ended = []
  thread = threading.Thread(target=lambda: ended.append(drained(client, 10)))
  thread.start()
  while not client.service.draining:
    time.sleep(0.005)
  # uvicorn looks every 0.1 s whether it is to close its port.
  time.sleep(0.35)
  # It still answers, so that a client knows to ask elsewhere.
  status, headers, body = client.send('POST', COMPLETIONS, TEXT)
  assert status == 503 and headers['retry-after'] and b'shutting down' in body
  assert client.get('/ready')[0] == 503
  assert client.get('/health')[0] == 200
  client.engine.running.set()
  assert whole.getresponse().read().count(b'xxxxx') == 1
  assert stream.getresponse().read().endswith(b'data: [DONE]\n\n')
  stream.close()
  whole.close()
  thread.join(TIMEOUT)
  assert ended == [True]
  assert not port_is_open(client.port)


def test_a_stream_that_does_not_end_is_cut_when_the_server_goes_down(client):
  connection = client.connect()
  client.begin(connection, 'POST', COMPLETIONS, {**TEXT, 'stream': True})
  answer = connection.getresponse()
  assert answer.readline().startswith(b'data: ')
  # 400 tokens take the engine a second or more; it gets 0.1.
  assert drained(client, 0.1)
  last = answer.read().decode().strip().split('\n\n')[-1]
  assert '"error"' in last and 'the answer was cancelled' in last
  connection.close()


def test_an_answer_that_the_engine_does_not_end_is_a_503(monkeypatch, caplog):
  monkeypatch.setattr(server, '_CLOSE_SECONDS', 1)
  service_ = endless()
  with running(service_) as client:
    service_.engine.running.clear()
    connection = client.connect()
    client.begin(connection, 'POST', COMPLETIONS, TEXT)
    assert client.engine.busy(1)
    # As where it compiles a program for minutes.
    stop, service_.engine.stop = service_.engine.stop, lambda: None
    assert drained(client, 0.1)
    answer = connection.getresponse()
    assert answer.status == 503 and b'shutting down' in answer.read()
    connection.close()
    service_.engine.stop = stop
  assert 'Traceback' not in caplog.text and 'Exception' not in caplog.text


def test_a_server_that_cannot_end_says_so_to_its_command(monkeypatch):
  monkeypatch.setattr(server, '_CLOSE_SECONDS', 0.2)
  released, overdue = threading.Event(), threading.Event()
  service_ = endless()
  with running(service_) as client:
    # As where a thread holds the engine's lock for ever.
    service_.engine.drain = lambda seconds: released.wait(TIMEOUT)
    client.server.on_timeout = overdue.set
    begun = time.monotonic()
    client.server._drain_seconds = 0.3
    client.server.drain()
    assert overdue.wait(TIMEOUT)
    # The time for answers, then twice what is left for the rest.
    assert time.monotonic() - begun >= 0.3 + 2 * 0.2
    assert client.thread.is_alive()
    released.set()


def test_the_log_has_a_line_a_request_with_its_tokens(client, caplog):
  caplog.set_level(logging.INFO, 'moepeft.serve')
  _, headers, _ = client.send(
    'POST', COMPLETIONS, {**TEXT, 'max_tokens': 5}, X_Request_Id='mine-7'
  )
  assert headers['x-request-id'] == 'mine-7'

  def lines():
    messages = (record.getMessage() for record in caplog.records)
    return [line for line in messages if 'POST' in line]

  # It is written when the answer is out.
  wait_until(lines)
  (line,) = lines()
  assert '127.0.0.1 POST /v1/completions 200' in line
  assert 'id=mine-7 model=base in=1 cached=0 out=5 first=' in line
  assert 'tokens/s' in line
  # One that could forge a line is not taken.
  _, headers, _ = client.send('GET', '/health', X_Request_Id='a b')
  assert headers['x-request-id'].startswith('req_')


def test_counts_are_there_for_prometheus(client):
  client.post(COMPLETIONS, {**TEXT, 'max_tokens': 5})
  client.post(COMPLETIONS, {**TEXT, 'model': 'none'})
  client.get('/v1/secret/../../etc')
  _, headers, body = client.send('GET', '/metrics')
  assert headers['content-type'].startswith('text/plain')
  lines = body.decode().splitlines()
  count = 'moepeft_requests_total{{route="{}",status="{}"}} 1.0'
  assert count.format('/v1/completions', 200) in lines
  assert count.format('/v1/completions', 404) in lines
  # Whatever is asked for beside the routes is one series.
  assert count.format('other', 404) in lines
  assert 'moepeft_answer_tokens_total 5.0' in lines
  for name in ('time_to_first_token', 'time_per_token', 'request'):
    start = f'moepeft_{name}_seconds_count{{route="/v1/completions"}}'
    assert any(line.startswith(start) for line in lines), name
  for name in ('running', 'waiting', 'slots', 'adapters', 'compiled_total'):
    assert any(line.startswith(f'moepeft_{name} ') for line in lines), name


def test_the_event_loop_answers_while_a_tokenizer_is_busy():
  service_ = service(FakeEngine(), ByteTokenizer())
  entered, go_on = threading.Event(), threading.Event()
  plain = service_.tokenizer.encode_prompt

  def slow(text):
    entered.set()
    assert go_on.wait(TIMEOUT)
    return plain(text)

  service_.tokenizer.encode_prompt = slow
  with running(service_) as client:
    connection = client.connect()
    client.begin(connection, 'POST', COMPLETIONS, TEXT)
    assert entered.wait(TIMEOUT)
    assert client.get('/health')[0] == 200
    go_on.set()
    assert connection.getresponse().status == 200
    connection.close()

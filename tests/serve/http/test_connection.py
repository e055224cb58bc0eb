# SPDX-License-Identifier: Apache-2.0
"""Connections that send nothing, slowly or too much, and too many of them."""

import contextlib
import dataclasses
import json
import resource
import socket
import time

import pytest

from moepeft.data.tokenizers.tokenizer import ByteTokenizer
from moepeft.serve.http import connection
from moepeft.serve.http.connection import ConnectionLimits
from tests.serve.fake_engine import FakeEngine, ids_of
from tests.serve.small_server import running, service, wait_until

SHORT = ConnectionLimits(
  max_connections=5,
  head_seconds=0.3,
  body_seconds=0.3,
  idle_seconds=0.3,
  send_seconds=0.3,
  max_head_bytes=2000,
)
HEAD = (
  b'POST /v1/completions HTTP/1.1\r\nHost: a\r\n'
  b'Content-Type: application/json\r\n'
)
GET = b'GET /health HTTP/1.1\r\nHost: a\r\n\r\n'
# An answer to a whole request comes in less on a busy machine.
PATIENCE = 10


def served(limits=SHORT, pause=0.0, length=500):
  engine = FakeEngine(pause=pause, places=4096)
  engine.answer = lambda request: ids_of('x' * length)
  return running(service(engine, ByteTokenizer()), connections=limits)


@pytest.fixture(scope='module')
def client():
  with served() as client_:
    yield client_


@contextlib.contextmanager
def raw(client):
  with socket.create_connection(('127.0.0.1', client.port), PATIENCE) as sock:
    yield sock


def rest(sock):
  """All bytes until the server closes."""
  received = b''
  with contextlib.suppress(ConnectionError):
    while chunk := sock.recv(1 << 16):
      received += chunk
  return received


def status_of(answer):
  return int(answer.split()[1])


def error_of(answer):
  """The error in OpenAI's form of a raw response."""
  return json.loads(answer.partition(b'\r\n\r\n')[2])['error']


def health(sock):
  sock.sendall(GET)
  return status_of(until(sock, b'alive"}'))


def until(sock, end):
  answer = b''
  while not answer.endswith(end):
    chunk = sock.recv(1 << 16)
    assert chunk, answer
    answer += chunk
  return answer


def test_a_connection_that_sends_nothing_is_closed(client):
  with raw(client) as sock:
    began = time.monotonic()
    assert rest(sock) == b''
    # Not at once: a browser opens connections ahead of its requests.
    assert time.monotonic() - began > 0.2


@pytest.mark.parametrize('begun', [b'POS', HEAD, HEAD + b'X: ' + b'a' * 500])
def test_half_a_head_is_a_408(client, begun):
  with raw(client) as sock:
    sock.sendall(begun)
    answer = rest(sock)
  assert status_of(answer) == 408
  assert 'headers' in error_of(answer)['message']


def test_headers_that_trickle_are_a_408(client):
  with raw(client) as sock:
    began = time.monotonic()
    with contextlib.suppress(ConnectionError):
      # A byte every 0.05 s: each gap is far below the limit of 0.3 s.
      for i in range(60):
        sock.sendall(HEAD[i : i + 1])
        time.sleep(0.05)
        sock.setblocking(False)
        try:
          answer = sock.recv(1 << 16)
          break
        except BlockingIOError:
          sock.setblocking(True)
    assert status_of(answer) == 408
    assert time.monotonic() - began < 2


def test_headers_that_trickle_on_a_kept_connection_are_a_408(client):
  with raw(client) as sock:
    assert health(sock) == 200
    sock.sendall(b'GET /hea')
    assert status_of(rest(sock)) == 408


@pytest.mark.parametrize(
  'begun',
  [
    b'Content-Length: 50\r\n\r\n{"model"',
    b'Content-Length: 50\r\n\r\n',
    b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"mod',
  ],
)
def test_half_a_body_is_a_408(client, begun):
  with raw(client) as sock:
    sock.sendall(HEAD + begun)
    answer = rest(sock)
  assert status_of(answer) == 408
  assert 'body' in error_of(answer)['message']


def test_a_body_that_trickles_is_a_408(client):
  with raw(client) as sock:
    sock.sendall(HEAD + b'Content-Length: 1000\r\n\r\n')
    with contextlib.suppress(ConnectionError):
      for _ in range(8):
        sock.sendall(b' ')
        time.sleep(0.05)
    assert status_of(rest(sock)) == 408


def test_a_body_that_nobody_reads_holds_no_connection(client):
  # Answered 400 by its content type, before its body is there.
  with raw(client) as sock:
    sock.sendall(
      b'POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: text/plain'
      b'\r\nContent-Length: 50\r\n\r\n{'
    )
    answer = rest(sock)
  assert status_of(answer) == 400 and answer.count(b'HTTP/1.1') == 1


def test_a_body_that_comes_after_its_answer_keeps_the_connection(client):
  with raw(client) as sock:
    sock.sendall(
      b'POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: text/plain'
      b'\r\nContent-Length: 2\r\n\r\n{'
    )
    assert status_of(until(sock, b'}}')) == 400
    sock.sendall(b'}')
    assert health(sock) == 200
    sock.sendall(GET.replace(b'health', b'none') + b'GET /hea')
    # The 404, then the 408 of the half head: no 408 of the body.
    answer = rest(sock)
    assert b' 404 ' in answer and b'headers of the request' in answer


def test_an_idle_connection_is_closed_between_requests(client):
  with raw(client) as sock:
    assert health(sock) == 200
    assert health(sock) == 200
    assert rest(sock) == b''


def test_an_answer_may_take_longer_than_every_limit(client):
  client.engine.pause = 0.03
  try:
    body = {'model': 'base', 'prompt': 'a', 'max_tokens': 25}
    began = time.monotonic()
    for stream in (True, False):
      status, _, answer = client.send(
        'POST', '/v1/completions', {**body, 'stream': stream}
      )
      assert status == 200 and answer.count(b'x') >= 25
    # 50 tokens, 0.03 s each: 1.5 s, each answer twice the limits' 0.3 s.
    assert time.monotonic() - began > 1.2
  finally:
    client.engine.pause = 0


def test_pipelined_requests_are_answered_in_order(client):
  with raw(client) as sock:
    sock.sendall(GET * 3)
    assert rest(sock).count(b'alive') == 3


def test_a_client_that_reads_nothing_loses_its_connection():
  limits = ConnectionLimits(send_seconds=0.3)
  with served(limits) as client, raw(client) as sock:
    # 20,000 kB of an answer are more than the buffers of both sockets hold.
    client.service.page = type('Page', (), {})()
    client.service.page.body, client.service.page.headers = (
      b'a' * 20_000_000,
      {},
    )
    sock.sendall(b'GET / HTTP/1.1\r\nHost: a\r\n\r\n')
    connections = client.server.server_state.connections
    wait_until(lambda: connections)
    wait_until(lambda: not connections)


@pytest.mark.parametrize(
  'head, status',
  [
    (b'GET /health HTTP/1.1\r\nHost: a\r\nX: ' + b'a' * 5000, 431),
    (b'GET /' + b'a' * 5000, 431),
    (b'nonsense\r\n\r\n', 400),
    (b'GET /health HTTP/1.1\r\n\r\n', 400),
    (b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n', 400),
  ],
)
def test_a_head_that_is_too_long_or_no_http_is_refused(client, head, status):
  with raw(client) as sock:
    sock.sendall(head)
    answer = rest(sock)
  assert status_of(answer) == status
  assert error_of(answer)['type'] == 'invalid_request_error'


def test_many_waiting_connections_keep_nobody_out():
  # Longer than the test: none of them is closed by its time.
  limits = ConnectionLimits(max_connections=5, head_seconds=60, idle_seconds=60)
  with served(limits) as client, contextlib.ExitStack() as stack:
    socks = [stack.enter_context(raw(client)) for _ in range(30)]
    for sock in socks:
      with contextlib.suppress(ConnectionError):
        sock.sendall(b'GET /heal')
    assert client.get('/health')[0] == 200
    assert len(client.server.server_state.connections) <= 6


def test_beyond_the_connections_that_are_answered_a_new_one_gets_503():
  limits = ConnectionLimits(max_connections=3)
  with served(limits) as client:
    client.engine.running.clear()
    begun = [client.connect() for _ in range(3)]
    body = {'model': 'base', 'prompt': 'a', 'max_tokens': 2}
    for connection_ in begun:
      client.begin(connection_, 'POST', '/v1/completions', body)
    assert client.engine.busy(3)
    status, headers, answer = client.send('GET', '/health')
    assert status == 503 and headers['retry-after'] == '5'
    assert json.loads(answer)['error']['code'] == 'busy'
    client.engine.running.set()
    assert [connection_.getresponse().status for connection_ in begun] == [
      200
    ] * 3
    for connection_ in begun:
      connection_.close()
    assert client.get('/health')[0] == 200


@pytest.mark.parametrize('value', [0, -3, float('nan'), float('inf'), 1e9])
@pytest.mark.parametrize(
  'name', [field.name for field in dataclasses.fields(ConnectionLimits)]
)
def test_limits_of_connections_are_checked(name, value):
  with pytest.raises(ValueError, match=name):
    ConnectionLimits(**{name: value})


def allowed_connections(max_connections):
  limits = ConnectionLimits(max_connections)
  return connection.reserve_file_descriptors(limits).max_connections


def test_connections_fit_the_files_that_the_process_may_open(monkeypatch):
  calls = []
  monkeypatch.setattr(
    connection.resource, 'getrlimit', lambda resource_: (256, 1000)
  )
  monkeypatch.setattr(
    connection.resource, 'setrlimit', lambda resource_, to: calls.append(to)
  )
  # 64 to refuse and 256 other files leave 680 of 1,000.
  assert allowed_connections(5000) == 680
  assert allowed_connections(100) == 100
  assert calls == [(1000, 1000), (420, 1000)]
  monkeypatch.setattr(
    connection.resource, 'getrlimit', lambda resource_: (300, 300)
  )
  with pytest.raises(ValueError, match='ulimit -n'):
    allowed_connections(512)


def test_a_limit_of_files_without_bound_is_left_alone(monkeypatch):
  endless = resource.RLIM_INFINITY
  monkeypatch.setattr(
    connection.resource, 'getrlimit', lambda resource_: (endless, endless)
  )
  assert allowed_connections(512) == 512

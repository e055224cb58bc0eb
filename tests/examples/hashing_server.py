# SPDX-License-Identifier: Apache-2.0
"""A server with OpenAI's API: embeddings by hashing, chat by a function.

So tests need no model: texts with words in common have near vectors.
"""

import base64
import contextlib
import http.server
import json
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tests.agent.scripted import text_reply

DIMENSIONS = 1024
CHAT, EMBEDDINGS = 'scripted', 'hashing'


def embed(text: str) -> np.ndarray:
  """float32 [d]: the counts of a text's words, as two hashes sign them."""
  vector = np.full(DIMENSIONS, 1e-3, np.float32)
  for word in text.lower().replace('.', ' ').replace('?', ' ').split():
    code = zlib.crc32(word.encode())
    vector[code % DIMENSIONS] += 1 if code >> 31 else -1
  return vector / np.linalg.norm(vector)


class HashingServer:
  """The address of a server, and the chat requests so far."""

  def __init__(self, url: str):
    self.url, self.requests = url, []

  def flags(self) -> list[str]:
    return [f'--base_url={self.url}', f'--embeddings={EMBEDDINGS}']


@contextlib.contextmanager
def serving(
  chat: Callable[[dict], str | dict], models: Sequence[str] = (CHAT,)
) -> Iterator[HashingServer]:
  """Serves on loopback.

  Args:
    chat: the body of a request -> its answer, as a text or a whole reply.
    models: the names that it lists.
  """

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      self._send(200, {'object': 'list', 'data': [{'id': m} for m in models]})

    def do_POST(self):
      body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
      if self.path.endswith('/embeddings'):
        return self._embed(body)
      running.requests.append(body)
      reply = chat(body)
      self._send(200, text_reply(reply) if isinstance(reply, str) else reply)

    def _embed(self, body):
      if body['model'] != EMBEDDINGS:
        message = f'the model {body["model"]!r} makes no embeddings'
        return self._send(400, {'error': {'message': message}})
      texts = (
        [body['input']] if isinstance(body['input'], str) else body['input']
      )
      rows = [
        {
          'object': 'embedding',
          'index': i,
          'embedding': base64.b64encode(embed(text).tobytes()).decode(),
        }
        for i, text in enumerate(texts)
      ]
      usage = {'prompt_tokens': 1, 'total_tokens': 1}
      answer = {'object': 'list', 'data': rows, 'model': EMBEDDINGS}
      self._send(200, answer | {'usage': usage})

    def _send(self, status, value):
      data = json.dumps(value).encode()
      self.send_response(status)
      self.send_header('Content-Type', 'application/json')
      self.send_header('Content-Length', str(len(data)))
      self.end_headers()
      self.wfile.write(data)

    def log_message(self, *args):
      pass

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  server.daemon_threads = True
  running = HashingServer(f'http://127.0.0.1:{server.server_address[1]}/v1')
  thread = threading.Thread(
    target=server.serve_forever, kwargs={'poll_interval': 0.02}, daemon=True
  )
  thread.start()
  try:
    yield running
  finally:
    server.shutdown()
    server.server_close()
    thread.join(5)

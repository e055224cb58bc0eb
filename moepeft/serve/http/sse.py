# SPDX-License-Identifier: Apache-2.0
"""Server-sent events: an answer that is sent while it is made."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from moepeft.serve.http.body import ClientDisconnected
from moepeft.serve.http.errors import ApiError, server_error
from moepeft.serve.http.event_bridge import cancel_on_disconnect

_LOG = logging.getLogger('moepeft.serve')
DONE = b'data: [DONE]\n\n'


class EventStream(Response):
  """Sends JSON objects as they come, then `[DONE]`.

  What fails midway, when the status is out already, is an event in OpenAI's
  form of errors, and the last.
  """

  media_type = 'text/event-stream'

  def __init__(
    self, events: AsyncGenerator[dict[str, Any], None], close: Callable
  ):
    """
    Args:
      close: called at the end, and when the client leaves.
    """
    headers = {
      'Cache-Control': 'no-cache',
      # Proxies would keep the answer until it is whole.
      'X-Accel-Buffering': 'no',
    }
    super().__init__(None, 200, headers)
    # The length that an empty body would have.
    del self.headers['content-length']
    self._events, self._close = events, close

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    try:
      await cancel_on_disconnect(receive, self._send_all(send))
    except OSError:
      raise ClientDisconnected from None
    finally:
      self._close()
      await self._events.aclose()

  async def _send_all(self, send: Send) -> None:
    await send(
      {
        'type': 'http.response.start',
        'status': self.status_code,
        'headers': self.raw_headers,
      }
    )

    async def put(data: bytes, more: bool = True) -> None:
      await send(
        {'type': 'http.response.body', 'body': data, 'more_body': more}
      )

    try:
      async with contextlib.aclosing(self._events) as events:
        async for event in events:
          await put(line(event))
      await put(DONE)
    except ApiError as e:
      await put(line(e.body()))
    except (asyncio.CancelledError, OSError):
      raise
    except Exception:
      _LOG.exception('an answer broke off')
      await put(
        line(server_error('the server failed; its log says how').body())
      )
    await put(b'', False)


def line(event: dict[str, Any]) -> bytes:
  """An event; its characters are whole, so its bytes are UTF-8."""
  text = json.dumps(event, ensure_ascii=False, separators=(',', ':'))
  return f'data: {text}\n\n'.encode()

# SPDX-License-Identifier: Apache-2.0
"""The event stream (server-sent events) of an answer."""

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
  """Sends JSON objects as server-sent events, and `[DONE]` at the end.

  An error after the status was sent becomes the last event, in OpenAI's format.
  """

  media_type = 'text/event-stream'

  def __init__(
    self,
    events: AsyncGenerator[dict[str, Any], None],
    close: Callable,
    typed: bool = False,
  ):
    """
    Args:
      close: called at the end, and when the client disconnects.
      typed: whether events are named by their field `type`, without `[DONE]`
        at the end, as in /v1/responses.
    """
    headers = {
      'Cache-Control': 'no-cache',
      # Otherwise nginx buffers the stream.
      'X-Accel-Buffering': 'no',
    }
    super().__init__(None, 200, headers)
    # Starlette sets it for the empty body.
    del self.headers['content-length']
    self._events, self._close, self._typed = events, close, typed

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

    async def send_body(data: bytes, more_body: bool = True) -> None:
      await send(
        {'type': 'http.response.body', 'body': data, 'more_body': more_body}
      )

    try:
      async with contextlib.aclosing(self._events) as events:
        async for event in events:
          name = event['type'] if self._typed else ''
          await send_body(format_event(event, name))
      if not self._typed:
        await send_body(DONE)
    except ApiError as e:
      await send_body(format_event(e.body()))
    except (asyncio.CancelledError, OSError):
      raise
    except Exception:
      _LOG.exception('an event stream failed')
      await send_body(
        format_event(
          server_error("the server failed; see the server's log").body()
        )
      )
    await send_body(b'', False)


def format_event(event: dict[str, Any], name: str = '') -> bytes:
  """Formats a server-sent event; '' is the name of most."""
  text = json.dumps(event, ensure_ascii=False, separators=(',', ':'))
  head = f'event: {name}\n' if name else ''
  return f'{head}data: {text}\n\n'.encode()

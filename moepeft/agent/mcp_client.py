# SPDX-License-Identifier: Apache-2.0
"""Tools of MCP servers, for an agent.

A server is a command that is started and talks over its standard input and
output, or a URL (modelcontextprotocol.io). Names, descriptions, schemas and
results are the server's, so they are data: markers of chat templates in them
are escaped, and results are quoted like those of all tools.
"""

import asyncio
import contextlib
import json
import shlex
import tempfile
import threading
from collections.abc import Callable, Iterable
from typing import IO, Any

import httpx2
import mcp
from mcp.client.streamable_http import streamable_http_client

from moepeft.agent import chat_markers
from moepeft.agent.tools import NAME, InvalidArguments, Tool
from moepeft.core import terminal
from moepeft.core.untrusted import Malformed, parse_json

_MAX_TOOLS, _MAX_SCHEMA, _MAX_DESCRIPTION = 64, 20_000, 2_000
# A call has longer than a command of --mcp_serve.
_START_SECONDS, _CALL_SECONDS = 30.0, 330.0


class McpConnection:
  """A connection to an MCP server, on an event loop in a thread of its own.

  Attributes:
    tools: the server's tools.
  """

  def __init__(self, server: str, warn: Callable[[str], None]):
    """Starts or reaches the server, and lists its tools.

    Args:
      server: a command with its arguments, or an http(s) URL.
      warn: called with a message for each tool that is left out.

    Raises:
      ValueError: the server does not start, or does not speak MCP.
    """
    self._server = server
    self._loop = asyncio.new_event_loop()
    self._stop = asyncio.Event()
    self._client: mcp.Client | None = None
    with tempfile.TemporaryFile('w+', errors='replace') as log:
      ready: asyncio.Future = asyncio.Future(loop=self._loop)
      self._task = self._loop.create_task(self._run(ready, log))
      self._thread = threading.Thread(
        target=self._loop.run_forever, daemon=True
      )
      self._thread.start()
      try:
        listed = self._call(_wait(ready))
      except Exception as e:
        self.close()
        raise ValueError(
          f'the MCP server {server!r} gave no tools ({_reason(e)}'
          f'{_last_line(log)}); check --mcp'
        ) from None
    self.tools = list(self._make_tools(listed, warn))

  def close(self) -> None:
    """Ends the connection, and the server if it is a command."""

    async def finish() -> None:
      self._stop.set()
      await asyncio.wait([self._task], timeout=10)

    if self._thread.is_alive():
      self._call(finish())
      self._loop.call_soon_threadsafe(self._loop.stop)
      self._thread.join(10)

  def _call(self, coroutine) -> Any:
    return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

  async def _run(self, ready: asyncio.Future, log: IO[str]) -> None:
    """Connects, and stays connected until `close`."""
    try:
      async with contextlib.AsyncExitStack() as stack:
        async with asyncio.timeout(_START_SECONDS):
          transport = await _transport(self._server, log, stack)
          self._client = await stack.enter_async_context(mcp.Client(transport))
          ready.set_result(await _list_tools(self._client))
        await self._stop.wait()
    except BaseException as e:
      if not ready.done():
        ready.set_exception(e if isinstance(e, Exception) else OSError(str(e)))
      elif not isinstance(e, Exception):
        raise

  def _make_tools(
    self, listed: Iterable, warn: Callable[[str], None]
  ) -> Iterable[Tool]:
    for tool in listed:
      size = len(json.dumps(tool.input_schema))
      if not NAME.fullmatch(tool.name) or size > _MAX_SCHEMA:
        warn(
          f'the tool {tool.name[:80]!r} of the MCP server {self._server!r} is '
          'left out: its name is not 1 to 64 letters, digits, _ or -, or its '
          f'schema is longer than {_MAX_SCHEMA:,} characters'
        )
        continue
      description = (tool.description or '')[:_MAX_DESCRIPTION]
      yield Tool(
        tool.name,
        chat_markers.escape_markers(description),
        _escape_strings(tool.input_schema),
        self._runner(tool.name),
        _CALL_SECONDS + 5,
      )

  def _runner(self, name: str) -> Callable[[str], str]:
    def run(text: str) -> str:
      try:
        arguments = parse_json(text or '{}')
      except Malformed as e:
        raise InvalidArguments(f'the arguments are {e}') from None
      if not isinstance(arguments, dict):
        raise InvalidArguments('the arguments are not a JSON object')
      try:
        result = self._call(
          self._client.call_tool(name, arguments, _CALL_SECONDS)
        )
      except Exception as e:
        raise RuntimeError(f'the MCP server failed: {_reason(e)}') from None
      text = _result_text(result)
      if result.is_error:
        raise RuntimeError(text)
      return text

    return run


async def _wait(future: asyncio.Future) -> Any:
  return await future


async def _transport(
  server: str, log: IO[str], stack: contextlib.AsyncExitStack
) -> Any:
  """The transport of a server; its standard error goes to `log`."""
  if server.startswith(('http://', 'https://')):
    # A redirect would send calls to another server.
    http = httpx2.AsyncClient(
      follow_redirects=False, timeout=httpx2.Timeout(30.0, read=_CALL_SECONDS)
    )
    await stack.enter_async_context(http)
    return streamable_http_client(server, http_client=http)
  command, *arguments = shlex.split(server) or ['']
  parameters = mcp.StdioServerParameters(command=command, args=arguments)
  return mcp.stdio_client(parameters, errlog=log)


async def _list_tools(client: mcp.Client) -> list:
  """The server's tools, from all pages.

  Raises:
    ValueError: there are too many.
  """
  tools, cursor = [], None
  while True:
    page = await client.list_tools(cursor=cursor)
    tools += page.tools
    if len(tools) > _MAX_TOOLS:
      raise ValueError(f'it has more than {_MAX_TOOLS} tools')
    cursor = page.next_cursor
    if not cursor:
      return tools


def _escape_strings(node: Any) -> Any:
  """Escapes the markers of chat templates in all strings of a schema."""
  if isinstance(node, str):
    return chat_markers.escape_markers(node)
  if isinstance(node, list):
    return [_escape_strings(child) for child in node]
  if isinstance(node, dict):
    return {
      chat_markers.escape_markers(key): _escape_strings(child)
      for key, child in node.items()
    }
  return node


def _result_text(result: Any) -> str:
  """The text of a result; other content is named, not shown."""
  parts = []
  for content in result.content:
    if isinstance(content, mcp.types.TextContent):
      parts.append(content.text)
    else:
      parts.append(f'[{content.type} is left out]')
  if not parts and result.structured_content is not None:
    return json.dumps(result.structured_content)
  return '\n'.join(parts)


def _reason(error: BaseException) -> str:
  """The message of an error, or of the first one in a group, as a line."""
  while isinstance(error, BaseExceptionGroup):
    error = error.exceptions[0]
  if isinstance(error, TimeoutError):
    return 'no reply came in time'
  text = ' '.join(str(error).split())[:300]
  return terminal.visible(text or type(error).__name__)


def _last_line(log: IO[str]) -> str:
  """The last line that a command wrote to standard error, after a colon."""
  log.seek(0)
  lines = [line for line in log.read(1 << 20).splitlines() if line.strip()]
  return f': {terminal.visible(lines[-1][:300])}' if lines else ''

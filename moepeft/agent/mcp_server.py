# SPDX-License-Identifier: Apache-2.0
"""An MCP server of tools, over standard input and output.

The Model Context Protocol (modelcontextprotocol.io) is how programs offer tools
to agents. Standard output has its messages alone.
"""

import asyncio
import json
from collections.abc import Sequence

from mcp.server import Server
from mcp.server.stdio import stdio_server
from mcp.types import CallToolResult, ListToolsResult, TextContent
from mcp.types import Tool as McpTool

import moepeft
from moepeft.agent import tool_calls
from moepeft.agent.tools import Tool

# Calls that run at once; more wait.
_MAX_CALLS = 2
# Characters of a result.
_MAX_OUTPUT = 20_000


def make_server(tools: Sequence[Tool]) -> Server:
  """Makes an MCP server that lists and runs tools."""
  by_name = {tool.name: tool for tool in tools}
  slots = asyncio.Semaphore(_MAX_CALLS)

  async def list_tools(context, params) -> ListToolsResult:
    del context, params
    listed = [
      McpTool(
        name=tool.name,
        description=tool.description,
        input_schema=dict(tool.schema),
      )
      for tool in tools
    ]
    return ListToolsResult(tools=listed)

  async def call_tool(context, params) -> CallToolResult:
    del context
    function = {
      'name': params.name,
      'arguments': json.dumps(params.arguments or {}),
    }
    call = {'id': '', 'function': function}
    async with slots:
      (result,) = await asyncio.to_thread(
        tool_calls.run_calls, by_name, [call], output=_MAX_OUTPUT
      )
    text = TextContent(type='text', text=result.text)
    return CallToolResult(content=[text], is_error=result.failed)

  return Server(
    'moepeft',
    version=moepeft.__version__,
    on_list_tools=list_tools,
    on_call_tool=call_tool,
  )


def serve(tools: Sequence[Tool]) -> None:
  """Serves tools until standard input ends."""

  async def run() -> None:
    server = make_server(tools)
    async with stdio_server() as (reader, writer):
      options = server.create_initialization_options()
      await server.run(reader, writer, options)

  asyncio.run(run())

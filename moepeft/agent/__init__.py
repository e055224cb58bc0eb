# SPDX-License-Identifier: Apache-2.0
"""An agent: tools, a loop and skills for servers with OpenAI's API.

tools, tool_calls   typed functions with strict schemas, and their execution
chat_model          a model behind an OpenAI-compatible server
agent, loop         requests, tool calls, planning and reflection in a budget
react               tool calls as text, for models without tool calls
memory              the conversation, limited to a number of tokens
structured_output   answers as instances of a pydantic model
traces              event logs and their replay
skills              SKILL.md directories, loaded on demand
config_file         config files that a model may write, as data
chat_markers        escapes markers of chat templates in tool outputs
commands            commands of moepeft as tools
flags               flags and errors of commands that ask a server
mcp_client          tools of MCP servers
mcp_server          an MCP server of tools
http_server         questions over HTTP, with server-sent events
sandbox             runs Python and shell programs in bubblewrap
"""

from moepeft.core.extras import require

require(__name__, 'agent', ('openai', 'pydantic'))

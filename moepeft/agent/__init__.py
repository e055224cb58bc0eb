# SPDX-License-Identifier: Apache-2.0
"""A thin agent layer: tools, a loop and skills over a chat server's API.

tools, tool_calls   typed functions with strict schemas; how calls are run
chat_model          a model behind an OpenAI-compatible server
agent, loop         asks, calls tools, plans and reflects in a budget; events
react               tools by text, for models without tool calls
memory              the conversation, kept within a number of tokens
structured_output   a pydantic model in, an instance out
traces              events written to a file, and replayed
skills              SKILL.md directories, loaded in three steps
config_file         config files that a model may write, as data
chat_markers        markers of chat templates, escaped in tools' outputs
sandbox             Python and shell programs in bubblewrap
"""

from moepeft.core.extras import require

require(__name__, 'agent', ('openai', 'pydantic'))

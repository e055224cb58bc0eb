# SPDX-License-Identifier: Apache-2.0
"""A thin agent layer: tools, a loop and skills over a chat server's API.

tools, calls      typed functions with strict schemas; how calls are run
model             what answers: an OpenAI-compatible server
agent, loop       asks, calls, plans and reflects within a budget; its events
react             tools by text, for models without calls
memory            the conversation, kept within so many tokens
structured        a pydantic model in, an instance out
traces            events written down, and replayed
skills            SKILL.md directories, loaded in three steps
sandbox           Python and shell programs in bubblewrap
"""

from moepeft.core.extras import require

require(__name__, 'agent', ('openai', 'pydantic'))

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

import importlib.util

for _name in ('openai', 'pydantic'):
  if importlib.util.find_spec(_name) is None:
    raise ImportError(
      f"moepeft.agent needs the package {_name}: pip install 'moepeft[agent]'"
    )

# SPDX-License-Identifier: Apache-2.0
"""OpenAI's API over an engine: text and JSON on one side, token ids on the
other.

`app.make(service)` is the application, `server.Server` runs it. A request
comes through `gate` (its id, keys, limits, the log), is read by `body` into a
model of `schemas`, becomes token ids in `words` and a question to the engine
in `asking`; the engine's events come back through `underway`, become text in
`answer` and JSON in `chat` or `completions`.
"""

from moepeft.core.extras import require

require('moepeft.serve', 'serve', ('fastapi', 'prometheus_client', 'uvicorn'))

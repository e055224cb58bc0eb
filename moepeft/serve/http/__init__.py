# SPDX-License-Identifier: Apache-2.0
"""OpenAI's API over an engine: text and JSON outside, token ids inside.

`app.make_app(service)` is the application, and `server` runs it. `middleware`
checks a request's host and key and logs it, `body` parses it into a model of
`schemas`, and `requests` submits it to the engine. Events of the engine come
back through `event_bridge`, become text in `generation`, and JSON in `chat`,
`completions` and `responses`.
"""

from moepeft.core.extras import require

require('moepeft.serve', 'serve', ('fastapi', 'prometheus_client', 'uvicorn'))

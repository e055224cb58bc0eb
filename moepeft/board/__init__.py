# SPDX-License-Identifier: Apache-2.0
"""The board: a page that shows, starts, stops and compares runs."""

from moepeft.core.extras import require

require('moepeft.board', 'serve', ['fastapi', 'uvicorn'])

# SPDX-License-Identifier: Apache-2.0
"""The chat page: an HTML file, and its response headers."""

import dataclasses
import hashlib
import pathlib

from moepeft.core import pages

_FILE = pathlib.Path(__file__).parent / 'index.html'
# The page calls the API of its own server.
CONNECT = "'self'"


@dataclasses.dataclass(frozen=True)
class Page:
  """The response of the route `/`.

  Attributes:
    body: the HTML file, in UTF-8.
    headers: the response headers, with the content type.
  """

  body: bytes
  headers: dict[str, str]


def read_page() -> Page:
  """Reads the installed page."""
  html = pages.read(_FILE, CONNECT)
  # frame-ancestors works only as a header, not in a meta element.
  policies = (
    f"{pages.content_security_policy(html, CONNECT)}; frame-ancestors 'none'"
  )
  body = html.encode()
  headers = {
    'Content-Type': 'text/html; charset=utf-8',
    'Content-Security-Policy': policies,
    'X-Content-Type-Options': 'nosniff',
    'Referrer-Policy': 'no-referrer',
    # Browsers revalidate the page, so an update of the package shows at once.
    'Cache-Control': 'no-cache',
    'ETag': f'"{hashlib.sha256(body).hexdigest()[:32]}"',
  }
  return Page(body, headers)

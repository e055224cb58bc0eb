# SPDX-License-Identifier: Apache-2.0
"""The chat page: an HTML file, and its response headers."""

import base64
import dataclasses
import hashlib
import pathlib
import re

_FILE = pathlib.Path(__file__).parent / 'index.html'
# Blocks with attributes, such as type="application/json", need no hash.
_INLINE = r'<{0}>(.*?)</{0}>'


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
  body = _FILE.read_bytes()
  # frame-ancestors works only as a header, not in a meta element.
  policies = f"{content_security_policy(body.decode())}; frame-ancestors 'none'"
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


def content_security_policy(html: str) -> str:
  """Makes the Content-Security-Policy of the page.

  It allows the page's own script and style by their hashes and connections to
  its own server, and requires Trusted Types, so that no text becomes markup.
  """
  return '; '.join(
    (
      "default-src 'none'",
      f'script-src {_hashes(html, "script")}',
      f'style-src {_hashes(html, "style")}',
      'img-src data:',
      "connect-src 'self'",
      "base-uri 'none'",
      "form-action 'none'",
      "require-trusted-types-for 'script'",
      "trusted-types 'none'",
    )
  )


def _hashes(html: str, tag: str) -> str:
  blocks = re.findall(_INLINE.format(tag), html, re.DOTALL)
  digests = [hashlib.sha256(text.encode()).digest() for text in blocks]
  return ' '.join(f"'sha256-{base64.b64encode(d).decode()}'" for d in digests)

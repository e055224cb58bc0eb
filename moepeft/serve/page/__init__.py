# SPDX-License-Identifier: Apache-2.0
"""The chat page: one file, and the headers that it is to be served with."""

import base64
import dataclasses
import hashlib
import pathlib
import re

_FILE = pathlib.Path(__file__).parent / 'index.html'
# Blocks of data, as type="application/json", run nothing and need no hash.
_INLINE = r'<{0}>(.*?)</{0}>'


@dataclasses.dataclass(frozen=True)
class Page:
  """The chat page as it is served at `/`.

  Attributes:
    body: UTF-8.
    headers: of the response, the media type included.
  """

  body: bytes
  headers: dict[str, str]


def read_page() -> Page:
  """The page as it is installed; to be read once, when the server starts."""
  body = _FILE.read_bytes()
  # What a meta element cannot say: no site may frame the page.
  policies = f"{content_security_policy(body.decode())}; frame-ancestors 'none'"
  headers = {
    'Content-Type': 'text/html; charset=utf-8',
    'Content-Security-Policy': policies,
    'X-Content-Type-Options': 'nosniff',
    'Referrer-Policy': 'no-referrer',
    # Kept, but asked after: an update of the package is seen at once.
    'Cache-Control': 'no-cache',
    'ETag': f'"{hashlib.sha256(body).hexdigest()[:32]}"',
  }
  return Page(body, headers)


def content_security_policy(html: str) -> str:
  """The Content-Security-Policy under which the page works, and no other code.

  Its own script and style run by their hashes, it speaks to its own server
  alone, and no text can become markup (Trusted Types).
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

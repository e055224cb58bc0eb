# SPDX-License-Identifier: Apache-2.0
"""HTML pages of one file: their shared style and script, and their policy."""

import base64
import hashlib
import pathlib
import re

from moepeft.core import files

_FOLDER = pathlib.Path(__file__).parent
# Blocks with attributes, such as type="application/json", need no hash.
_INLINE = r'<{0}>(.*?)</{0}>'


def read(path: str | pathlib.Path, connect: str = "'none'") -> str:
  """A page, with what it names in place of the names.

  The comment /* style.css */ stands for the shared style, /* script.js */ for
  the shared script, and POLICY for the Content-Security-Policy.

  Args:
    connect: as for `content_security_policy`.
  """
  html = files.read_text(path)
  for name in ('style.css', 'script.js'):
    html = html.replace(f'/* {name} */\n', files.read_text(_FOLDER / name), 1)
  return html.replace('POLICY', content_security_policy(html, connect), 1)


def content_security_policy(html: str, connect: str) -> str:
  """Makes the Content-Security-Policy of a page.

  It allows the page's own script and style by their hashes and connections to
  `connect`, and requires Trusted Types, so that no text becomes markup.

  Args:
    connect: the sources of connect-src.
  """
  return '; '.join(
    (
      "default-src 'none'",
      f'script-src {_hashes(html, "script")}',
      f'style-src {_hashes(html, "style")}',
      'img-src data:',
      f'connect-src {connect}',
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

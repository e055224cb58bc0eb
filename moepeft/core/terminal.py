# SPDX-License-Identifier: Apache-2.0
"""Escapes text of models, files and requests for printing at a terminal.

Control characters move the cursor, retitle the window, write the clipboard or
reorder a line. All text from outside moepeft is printed through `visible`, to
terminals and to pipes alike: `| less -R` and `| tee` lead to a terminal too.
The API and `--trace` have the exact text.
"""

import re
from typing import Any, TextIO

# C0 but tab and newline, DEL, C1; line ends of Unicode with the embeddings and
# overrides of UAX 9, its isolates; halves of surrogate pairs. The marks of
# right-to-left scripts (U+200E, U+200F, U+061C) move nothing but themselves.
_CONTROL = re.compile(
  '[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]'
)


def visible(value: Any) -> str:
  r"""A value's text with control characters written as `\x1b` or `\u202e`.

  Newlines and tabs stay. A text may be escaped in parts of any size, except
  that a split `\r\n` is not one newline.
  """
  text = str(value).replace('\r\n', '\n')
  return _CONTROL.sub(lambda match: escaped(match[0]), text)


def escaped(char: str) -> str:
  r"""A character of the basic plane as `\x1b` or `\u202e`."""
  code = ord(char)
  return f'\\x{code:02x}' if code < 0x100 else f'\\u{code:04x}'


def json_safe(text: str) -> str:
  r"""Escapes the control characters in a JSON text as `\u009b`.

  The text keeps its value. `json.dumps(ensure_ascii=False)` does not escape C1,
  DEL, overrides and halves of surrogate pairs.
  """
  return _CONTROL.sub(lambda match: f'\\u{ord(match[0]):04x}', text)


def show(value: Any, end: str = '\n', file: TextIO | None = None) -> None:
  """Prints a value's visible text at once; standard output by default."""
  print(visible(value), end=end, file=file, flush=True)

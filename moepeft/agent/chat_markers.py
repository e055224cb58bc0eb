# SPDX-License-Identifier: Apache-2.0
"""Escapes markers of chat templates in tool outputs.

Chat templates write roles and turns as special tokens: `<|im_start|>`,
`[INST]`, `<<SYS>>`, `</s>`. A tokenizer would convert the same characters of a
tool output to special tokens, and a model may follow similar text. As each
tokenizer has other names, everything with the form of a marker is escaped, as
in HTML. Only HTML elements and comparisons are kept.
"""

import re
import unicodedata

# HTML elements, without `<s>`, which is a marker of many tokenizers.
_HTML = frozenset(
  'a abbr address article aside b blockquote body br button caption cite code '
  'col dd del details div dl dt em fieldset figcaption figure footer form h1 '
  'h2 h3 h4 h5 h6 head header hr html i iframe input ins kbd label legend '
  'li link main meta nav ol option p pre section select small span strong '
  'style sub summary sup table tbody td textarea tfoot th thead title tr u '
  'ul'.split()
)
_ELEMENT = re.compile(r'</?([a-z][a-z0-9]*)(?:\s[^<>]*)?/?>')
# Lookalikes of ASCII brackets and slashes that NFKC does not convert. Quotation
# marks («, 《) are not included, as languages use them.
_LOOKALIKES = str.maketrans(
  '‹〈⟨❮❬❰≺⧼ᐸ˂⦑⟦〔【〖⁅⦋⟧〕】〗⁆⦌∕⁄⧸', '<<<<<<<<<<<[[[[[[]]]]]]///'
)
# `<` before a letter, bar or slash, but not before what follows a comparison, a
# shift or an arrow. Before a digit only if it is closed: <2en>.
_ANGLE = re.compile(r'<(?!$|[\s\d<=.,;()\'"-])|<(?=\w{1,60}>|\s*[/|])')
# The marker <tool_output> of this package, with any spacing.
_OUTPUT = re.compile(r'<(?=\W{0,40}tool[\W_]{0,40}output)', re.IGNORECASE)
# [INST], [/TOOL_CALLS], [gMASK]; known names in lower case, too; [|user|],
# [e~[, ]~b] and ]~!b[ by their first two characters.
_UPPER_CASE = re.compile(r'\[(?=[\s/_]{0,40}\w{0,40}[A-Z]{2}[\w ]{0,40}\s*\])')
_KNOWN_NAMES = re.compile(
  r'\[(?=[\s/_]{0,40}(?:b_inst|e_inst|inst|tool\w*|available_\w*|system\w*|'
  r'sys|unused\w*|[gs]?mask|cls|sep|bos|eos|pad|unk|im_\w+|start_\w+|'
  r'end_\w+|think\w*|user|assistant|human|bot|args|call_id|model_settings)'
  r'\s*\])|\[(?=[\s_]{0,40}\||e~\[)|\](?=~)',
  re.IGNORECASE,
)
_ESCAPED = {'<': '&lt;', '[': '&#91;', ']': '&#93;'}


def escape_markers(text: str) -> str:
  """Escapes all markers: `<` becomes `&lt;`, `[` becomes `&#91;`.

  `a < b`, `x[0]`, `<b>` and `<div class="x">` are kept.
  """
  normalized = _normalize(text)
  positions = {match.start() for match in _OUTPUT.finditer(normalized)}
  for pattern in (_UPPER_CASE, _KNOWN_NAMES):
    positions |= {match.start() for match in pattern.finditer(normalized)}
  for match in _ANGLE.finditer(normalized):
    element = _ELEMENT.match(text, match.start())
    if not element or element[1] not in _HTML:
      positions.add(match.start())
  pieces, end = [], 0
  for position in sorted(positions):
    pieces += [text[end:position], _ESCAPED[normalized[position]]]
    end = position + 1
  return ''.join([*pieces, text[end:]])


def _normalize(text: str) -> str:
  """Replaces lookalikes by ASCII characters; the length does not change.

  Invisible characters (joiners, direction marks, control characters) become
  `_`, so that they cannot hide a marker.
  """
  if text.isascii() and text.isprintable():
    return text
  return ''.join(map(_normalize_char, text))


def _normalize_char(char: str) -> str:
  if char.isascii() and (char.isprintable() or char.isspace()):
    return char
  if unicodedata.category(char) in ('Cc', 'Cf', 'Me', 'Mn'):
    return '_'
  plain = unicodedata.normalize('NFKC', char).translate(_LOOKALIKES)
  return plain if len(plain) == 1 else char

# SPDX-License-Identifier: Apache-2.0
"""Marks of prompts, made plain text where a tool's output has them.

Chat templates write roles and turns as tokens of their own: `<|im_start|>`,
`[INST]`, `<<SYS>>`, `</s>`. A tokenizer takes the same characters of a tool's
output for them, and a model takes what looks like them. The rule goes by shape,
since each tokenizer has other names: whatever could begin a mark is escaped, as
in HTML, and only elements of HTML and comparisons stay.
"""

import re
import unicodedata

# Elements that carry a page's text; `<s>` is a mark of many tokenizers.
_HTML = frozenset(
  'a abbr address article aside b blockquote body br button caption cite code '
  'col dd del details div dl dt em fieldset figcaption figure footer form h1 '
  'h2 h3 h4 h5 h6 head header hr html i iframe input ins kbd label legend '
  'li link main meta nav ol option p pre section select small span strong '
  'style sub summary sup table tbody td textarea tfoot th thead title tr u '
  'ul'.split()
)
_ELEMENT = re.compile(r'</?([a-z][a-z0-9]*)(?:\s[^<>]*)?/?>')
# Angles, brackets and slashes that are no compatibility form of the ASCII ones.
# Quotation marks («, 《) are left as they are: whole languages use them.
_LOOKALIKES = str.maketrans(
  '‹〈⟨❮❬❰≺⧼ᐸ˂⦑⟦〔【〖⁅⦋⟧〕】〗⁆⦌∕⁄⧸', '<<<<<<<<<<<[[[[[[]]]]]]///'
)
# An angle before a letter, a bar, a slash: anything but what follows a
# comparison, a shift or an arrow. Before a number where it is closed: <2en>.
_ANGLE = re.compile(r'<(?!$|[\s\d<=.,;()\'"-])|<(?=\w{1,60}>|\s*[/|])')
# The mark of this program, however it is spaced.
_OUTPUT = re.compile(r'<(?=\W{0,40}tool[\W_]{0,40}output)', re.IGNORECASE)
# [INST], [/TOOL_CALLS], [gMASK]; those of known names in small letters too;
# [|user|], [e~[, ]~b] and ]~!b[ by their first two characters.
_UPPER = re.compile(r'\[(?=[\s/_]{0,40}\w{0,40}[A-Z]{2}[\w ]{0,40}\s*\])')
_NAMED = re.compile(
  r'\[(?=[\s/_]{0,40}(?:b_inst|e_inst|inst|tool\w*|available_\w*|system\w*|'
  r'sys|unused\w*|[gs]?mask|cls|sep|bos|eos|pad|unk|im_\w+|start_\w+|'
  r'end_\w+|think\w*|user|assistant|human|bot|args|call_id|model_settings)'
  r'\s*\])|\[(?=[\s_]{0,40}\||e~\[)|\](?=~)',
  re.IGNORECASE,
)
_ESCAPED = {'<': '&lt;', '[': '&#91;', ']': '&#93;'}


def escape_markers(text: str) -> str:
  """A text in which no mark of a prompt is left: `<` is `&lt;`, `[` is `&#91;`.

  `a < b`, `x[0]`, `<b>` and `<div class="x">` stay.
  """
  folded = _normalize(text)
  places = {match.start() for match in _OUTPUT.finditer(folded)}
  for pattern in (_UPPER, _NAMED):
    places |= {match.start() for match in pattern.finditer(folded)}
  for match in _ANGLE.finditer(folded):
    element = _ELEMENT.match(text, match.start())
    if not element or element[1] not in _HTML:
      places.add(match.start())
  pieces, at = [], 0
  for place in sorted(places):
    pieces += [text[at:place], _ESCAPED[folded[place]]]
    at = place + 1
  return ''.join([*pieces, text[at:]])


def _normalize(text: str) -> str:
  """A text of the same length in which lookalikes are what they look like.

  A character that is not seen (a joiner, a mark of direction, a control
  character) becomes a `_`, so that a mark with one inside is a mark.
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

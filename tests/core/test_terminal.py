# SPDX-License-Identifier: Apache-2.0
"""Text of others cannot steer a terminal, whole or in pieces."""

import io
import json
import random

import pytest

from moepeft.core import terminal

# Clear the screen, retitle, write the clipboard; CSI and OSC of C1; backspaces
# and a carriage return over a line; an override that swaps a file's ending.
ATTACKS = (
  '\x1b[2J\x1b[1;1H',
  '\x1b]0;title\x07',
  '\x1b]52;c;cm0gLXJmIH4=\x1b\\',
  '\x9b31m',
  '\x9d0;title\x9c',
  'safe\x08\x08\x08\x08evil',
  'rm -rf ~\rls',
  'gpj.\u202eexe',
  '\u2066\u2069',
  'a\x7f\x00\x0b\x0cb',
  'line\u2028line\u2029',
  'half\ud83d',
)


@pytest.mark.parametrize('text', ATTACKS)
def test_no_control_character_is_left_whole_or_in_pieces(text):
  whole = terminal.visible(text)
  assert all(char.isprintable() for char in whole)
  # Each character by itself, as a stream may bring it.
  assert ''.join(map(terminal.visible, text)) == whole
  # Nothing is lost: each character is there or written out.
  assert len(whole) > len(text)
  whole.encode()


def test_ordinary_text_stays_and_windows_line_ends_are_newlines():
  # With joiners of emoji, marks of Hebrew and Arabic, accents that combine.
  text = 'a\tb\nè 日本語 👩‍👩‍👧 שלום\u200f ‎عربى e\u0301 \U000e0067'
  assert terminal.visible(text) == text
  assert terminal.visible('a\r\nb') == 'a\nb'
  assert terminal.visible('\x1b[0m') == '\\x1b[0m'
  assert terminal.visible(ValueError('\x9b')) == '\\x9b'


def test_all_of_unicode_keeps_to_the_rule():
  for code in range(0x110000):
    char = chr(code)
    control = code < 32 or 127 <= code < 160 or 0xD800 <= code < 0xE000
    control |= 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069
    control |= code in (0x2028, 0x2029)
    control &= char not in '\n\t'
    assert (terminal.visible(char) != char) == control, hex(code)


def test_json_keeps_its_value_and_has_no_control_character():
  draw = random.Random(7)
  for _ in range(200):
    codes = draw.choices((*range(0x300), 0x202E, 0x2028, 0x1F600), k=20)
    value = ''.join(map(chr, codes))
    text = terminal.json_safe(json.dumps([value], ensure_ascii=False))
    assert json.loads(text) == [value]
    assert terminal.visible(text) == text


def test_show_prints_visible_text_and_the_end_that_it_is_given():
  stream = io.StringIO()
  terminal.show('\x1b[2J', end='', file=stream)
  terminal.show('x', file=stream)
  assert stream.getvalue() == '\\x1b[2Jx\n'

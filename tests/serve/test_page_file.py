# SPDX-License-Identifier: Apache-2.0
"""The chat page as a file: what can be known of it without a browser."""

import itertools
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from moepeft.core import pages
from moepeft.serve import page

HTML = page.read_page().body.decode()
SCRIPT = re.findall(r'<script>(.*?)</script>', HTML, re.DOTALL)[-1]
STYLE = re.search(r'<style>(.*?)</style>', HTML, re.DOTALL)[1]
# Elements that have no end.
EMPTY = {'meta', 'link', 'input', 'br', 'hr'}


class Elements(HTMLParser):
  """Every element as (tag, attributes, tags that it is in)."""

  def __init__(self):
    super().__init__()
    self.elements, self.open = [], []
    self.feed(HTML)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs), tuple(self.open)))
    if tag not in EMPTY:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag


ELEMENTS = Elements()
WORDS = json.loads(
  re.search(r'id="words">(.*?)</script>', HTML, re.DOTALL)[1],
)


def of(tag):
  return [attrs for name, attrs, _ in ELEMENTS.elements if name == tag]


def test_every_element_is_closed_and_ids_are_unique():
  assert ELEMENTS.open == []
  ids = [a['id'] for _, a, _ in ELEMENTS.elements if 'id' in a]
  assert len(ids) == len(set(ids)) > 20


def test_nothing_comes_from_elsewhere():
  assert re.findall(r'(?:https?:)?//[\w-]+\.\w+', HTML) == []
  assert '@import' not in STYLE and 'url(' not in STYLE
  sources = {a.get(k) for _, a, _ in ELEMENTS.elements for k in ('src', 'href')}
  assert sources == {None, 'data:,'}


def test_calls_stay_below_where_the_page_is():
  # Relative, so that a proxy may serve it under a prefix.
  assert re.findall(r"\bcall\('([^']*)'", SCRIPT) == [
    'ready',
    'v1/models',
    'v1/chat/completions',
  ]


def test_no_text_can_become_markup():
  banned = (
    'innerHTML',
    'outerHTML',
    'insertAdjacentHTML',
    'document.write',
    'DOMParser',
    'eval(',
    'new Function',
    'srcdoc',
  )
  assert [word for word in banned if word in HTML] == []
  assert not [
    a for _, a, _ in ELEMENTS.elements if any(k[:2] == 'on' for k in a)
  ]
  # A style attribute would need 'unsafe-inline'.
  assert not [a for _, a, _ in ELEMENTS.elements if 'style' in a]


def test_the_pages_own_policy_has_the_hashes_of_what_it_runs():
  (meta,) = [a for a in of('meta') if a.get('http-equiv')]
  value = meta['content']
  assert value == pages.content_security_policy(HTML, page.CONNECT)
  assert value.count("'sha256-") == 2 and 'unsafe' not in value


def test_the_policy_stands_before_what_it_is_about():
  assert HTML.index('Content-Security-Policy') < HTML.index('<style>')


def test_headers_forbid_framing_and_let_a_new_page_be_seen():
  headers = page.read_page().headers
  policy = headers['Content-Security-Policy']
  expected = pages.content_security_policy(HTML, page.CONNECT)
  assert policy == f"{expected}; frame-ancestors 'none'"
  assert headers['Content-Type'] == 'text/html; charset=utf-8'
  assert headers['Cache-Control'] == 'no-cache'
  assert re.fullmatch(r'"[0-9a-f]{32}"', headers['ETag'])
  assert all('\n' not in value for value in headers.values())


def test_every_word_is_there_in_both_languages():
  english, chinese = WORDS['en'], WORDS['zh']
  assert english.keys() == chinese.keys()
  assert all(english.values()) and all(chinese.values())
  same = {key for key in english if english[key] == chinese[key]}
  assert same == {'top_p'}  # A name.
  names = re.compile(r'\{(\w+)\}')
  for key in english:
    first, two = names.findall(english[key]), names.findall(chinese[key])
    assert sorted(first) == sorted(two), key


def test_every_key_that_is_asked_for_has_words_and_the_other_way_round():
  in_html = {
    attrs[name]
    for _, attrs, _ in ELEMENTS.elements
    for name in ('data-i18n', 'data-i18n-placeholder')
    if name in attrs
  }
  assert in_html <= WORDS['en'].keys()
  quoted = set(re.findall(r"'([a-z_]+)'", SCRIPT))
  keys = set(re.findall(r"\b(?:t|button|arrow|Trouble)\('([a-z_]+)'", SCRIPT))
  keys |= set(re.findall(r"\bkey: '([a-z_]+)'", SCRIPT))
  assert keys and keys <= WORDS['en'].keys()
  # 'reason_' is joined to what the server said.
  left = WORDS['en'].keys() - in_html - quoted
  assert {key for key in left if not key.startswith('reason_')} == set()


def test_the_words_in_the_page_are_the_english_ones():
  # What is read where the script has not yet run.
  pairs = re.findall(r'data-i18n="(\w+)"\s*>([^<]*)<', HTML)
  assert len(pairs) > 15
  for key, text in pairs:
    assert ' '.join(text.split()) == WORDS['en'][key]


def test_every_field_has_a_label():
  labelled = {a['for'] for a in of('label') if 'for' in a}
  for tag, attrs, within in ELEMENTS.elements:
    if tag in ('input', 'select', 'textarea'):
      assert attrs['id'] in labelled or 'label' in within, attrs


def test_every_button_says_what_it_is_and_submits_only_where_meant():
  submits = [a.get('data-i18n') for a in of('button') if 'type' not in a]
  assert submits == ['use_key', 'send']


def test_the_key_is_kept_in_this_tab_only():
  uses = re.findall(r"\('(\w+Storage)', 'key'", SCRIPT)
  assert len(uses) >= 3 and set(uses) == {'sessionStorage'}
  (field,) = [a for a in of('input') if a['id'] == 'key']
  assert (field['type'], field['autocomplete']) == ('password', 'off')


# How the colour-blind see linear RGB: Machado, Oliveira and Fernandes (2009),
# severity 1.
SIGHT = {
  'all cones': np.eye(3),
  'protanopia': [
    [0.152286, 1.052583, -0.204868],
    [0.114503, 0.786281, 0.099216],
    [-0.003882, -0.048116, 1.051998],
  ],
  'deuteranopia': [
    [0.367322, 0.860646, -0.227968],
    [0.280085, 0.672501, 0.047413],
    [-0.011820, 0.042940, 0.968881],
  ],
  'tritanopia': [
    [1.255528, -0.076749, -0.178779],
    [-0.078411, 0.930809, 0.147602],
    [0.004733, 0.691367, 0.303900],
  ],
}
TO_XYZ = np.array(
  [
    [0.4124, 0.3576, 0.1805],
    [0.2126, 0.7152, 0.0722],
    [0.0193, 0.1192, 0.9505],
  ]
)


def lab(hexes, sight):
  """CIE L*a*b* [n, 3] of sRGB colours as someone sees them."""
  rgb = np.array([[int(h[i : i + 2], 16) for i in (1, 3, 5)] for h in hexes])
  rgb = rgb / 255
  linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
  visible = np.clip(linear @ np.array(SIGHT[sight]).T, 0, 1)
  xyz = visible @ TO_XYZ.T / TO_XYZ.sum(1)
  f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
  x, y, z = f.T
  return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


@pytest.mark.parametrize('sight', SIGHT)
def test_experts_differ_by_colour_or_by_underline(sight):
  hues = re.findall(r'\.x\d \{ --hue: (#\w{6}); \}', STYLE)
  lines = re.findall(r'\.u\d \{ text-decoration-style: (\w+); \}', STYLE)
  assert (len(set(hues)), len(set(lines))) == (8, 5)
  # As in the script: 40 of them, and then from the start.
  assert 'const HUES = 8' in SCRIPT and 'const UNDERLINES = 5' in SCRIPT
  colours = lab(hues, sight)
  for first, two in itertools.combinations(range(40), 2):
    if first % 5 == two % 5:
      # A difference of 2.3 is just visible side by side; words stand apart.
      far = np.linalg.norm(colours[first % 8] - colours[two % 8])
      assert far > 10, (first, two, far)

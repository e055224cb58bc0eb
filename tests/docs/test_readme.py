# SPDX-License-Identifier: Apache-2.0
"""The README and its translation say the same, and their links lead on."""

import re

import pytest

from tests import ROOT

_ENGLISH, _CHINESE = _NAMES = 'README.md', 'README.zh.md'
_FENCED = re.compile(r'^ *```(\w*)\n(.*?)^ *```$', re.M | re.S)


def _read(name: str) -> str:
  return (ROOT / name).read_text(encoding='utf-8')


def _prose(text: str) -> str:
  """A document without its fenced blocks, where '#' is no heading."""
  return _FENCED.sub('', text)


def _headings(text: str) -> list[tuple[str, str]]:
  """(its number signs, its words) of each heading."""
  return re.findall(r'^(#{1,6}) +(.+?) *$', _prose(text), re.M)


def _tables(text: str) -> list[list[list[str]]]:
  """Tables as rows of cells."""
  found = re.findall(r'(?:^\|.*\|$\n?)+', _prose(text), re.M)
  return [
    [row.split('|')[1:-1] for row in table.splitlines()] for table in found
  ]


def _figures(cell: str) -> list[str]:
  # Sorted, since languages may name them in different orders.
  return sorted(re.findall(r'\d+(?:[.,]\d+)*', cell))


def _code(text: str) -> set[str]:
  """What stands in backticks; one that goes over a line's end is joined."""
  return {' '.join(c.split()) for c in re.findall(r'`([^`]+)`', _prose(text))}


def _links(text: str) -> list[str]:
  found = re.findall(r'\]\(([^)\s]+)\)', _prose(text))
  return [link for link in found if '://' not in link]


def _slug(heading: str) -> str:
  """The anchor that GitHub gives a heading; CJK letters count as letters."""
  return re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')


def _anchors(text: str) -> set[str]:
  """Every anchor of a document; a repeated heading's ends with a number."""
  found, seen = set(), {}
  for _, heading in _headings(text):
    slug = _slug(heading)
    count = seen[slug] = seen.get(slug, -1) + 1
    found.add(f'{slug}-{count}' if count else slug)
  return found


def _pair(what) -> tuple:
  return tuple(what(_read(name)) for name in _NAMES)


def test_readmes_have_the_same_levels_of_headings_in_the_same_order():
  english, chinese = _pair(lambda text: [h[0] for h in _headings(text)])
  assert len(english) > 1
  assert chinese == english


def test_readmes_have_the_same_commands():
  english, chinese = _pair(
    lambda text: [code for kind, code in _FENCED.findall(text) if kind == 'sh']
  )
  assert len(english) > 1
  assert chinese == english


def _pictures(text: str) -> list[str]:
  """Plain blocks without Chinese characters: the same in both."""
  blocks = [code for kind, code in _FENCED.findall(text) if kind == 'text']
  return [code for code in blocks if not re.search('[一-鿿]', code)]


def _tree(text: str) -> list[str]:
  """The files and folders that the tree names, in its order."""
  (tree,) = (
    code for kind, code in _FENCED.findall(text) if 'moepeft/\n' in code
  )
  return re.findall(r'[\w.]+(?:\.(?:py|md|sh|ipynb)|/)(?!\w)', tree)


def _items(text: str) -> list[int]:
  """How many items of lists each section has."""
  sections = re.split(r'^#{1,6} ', _prose(text), flags=re.M)
  return [len(re.findall(r'^ *- ', part, re.M)) for part in sections]


def test_readmes_have_the_same_picture():
  english, chinese = _pair(_pictures)
  assert chinese[0] == english[0] and '(+)' in english[0]


def test_readmes_have_the_same_tree():
  english, chinese = _pair(_tree)
  assert len(english) > 50
  assert chinese == english


def test_files_of_the_tree_exist():
  found = {path.name for path in ROOT.rglob('*') if '.venv' not in path.parts}
  names = [name.rstrip('/') for name in _tree(_read(_ENGLISH))]
  assert [name for name in names if name not in found] == []


def test_readmes_have_lists_of_the_same_lengths():
  english, chinese = _pair(_items)
  assert sum(english) > 20
  assert chinese == english


def test_both_first_paragraphs_name_both_kinds_of_models():
  for text, kinds in (
    (_read(_ENGLISH), ('T5', 'decoder-only')),
    (_read(_CHINESE), ('T5', '仅解码器')),
  ):
    first = text.split('```')[0]
    assert all(kind in first for kind in kinds)


def test_readmes_have_the_same_kinds_of_fenced_blocks():
  english, chinese = _pair(lambda text: [b[0] for b in _FENCED.findall(text)])
  assert chinese == english


def test_readmes_have_tables_of_the_same_shape():
  english, chinese = _pair(
    lambda text: [[len(row) for row in table] for table in _tables(text)]
  )
  assert len(english) > 1
  assert chinese == english


def test_readmes_have_the_same_figures_in_every_cell():
  english, chinese = _pair(
    lambda text: [
      [_figures(cell) for cell in row]
      for table in _tables(text)
      for row in table
    ]
  )
  assert chinese == english


def test_readmes_name_the_same_options_and_files():
  english, chinese = _pair(_code)
  assert english ^ chinese == set()


@pytest.mark.parametrize(
  'name, first',
  [(_ENGLISH, f'[中文]({_CHINESE})'), (_CHINESE, f'[English]({_ENGLISH})')],
)
def test_readme_leads_to_the_other_below_its_title(name, first):
  assert _read(name).splitlines()[1:3] == ['', first]


@pytest.mark.parametrize('name', _NAMES)
def test_links_of_readme_lead_somewhere(name):
  lost = []
  for link in _links(_read(name)):
    path, _, anchor = link.partition('#')
    target = path or name
    if not (ROOT / target).exists():
      lost.append(link)
    elif anchor and anchor not in _anchors(_read(target)):
      lost.append(link)
  assert lost == []


@pytest.mark.parametrize(
  'heading, slug',
  [
    ('Semantics: released code and paper', 'semantics-released-code-and-paper'),
    ('语义：公开代码与论文', '语义公开代码与论文'),
    ("T5X's `gin` files, re-read", 't5xs-gin-files-re-read'),
  ],
)
def test_slug_is_githubs(heading, slug):
  assert _slug(heading) == slug


def test_repeated_heading_has_a_numbered_anchor():
  assert _anchors('# Data\n\n## Data\n') == {'data', 'data-1'}

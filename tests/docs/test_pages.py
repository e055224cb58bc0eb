# SPDX-License-Identifier: Apache-2.0
"""Pages and their translations say the same, and their links lead on.

A page is README.md or a file of docs/; its translation stands beside it and
ends in .zh.md.
"""

import re

import pytest

from tests import ROOT

_FENCED = re.compile(r'^ *```(\w*)\n(.*?)^ *```$', re.M | re.S)
PAGES = [
  'README.md',
  'CONTRIBUTING.md',
  *sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / 'docs').rglob('*.md')
  ),
]
TRANSLATED = [
  path.relative_to(ROOT).as_posix().replace('.zh.md', '.md')
  for path in [
    ROOT / 'README.zh.md',
    *sorted((ROOT / 'docs').rglob('*.zh.md')),
    *sorted((ROOT / 'examples').rglob('*.zh.md')),
  ]
]
ALL = sorted({*PAGES, *(name.replace('.md', '.zh.md') for name in TRANSLATED)})


def read(name: str) -> str:
  return (ROOT / name).read_text(encoding='utf-8')


def prose(text: str) -> str:
  """A document without its fenced blocks, where '#' is no heading."""
  return _FENCED.sub('', text)


def headings(text: str) -> list[tuple[str, str]]:
  """(number signs, title) of each heading."""
  return re.findall(r'^(#{1,6}) +(.+?) *$', prose(text), re.M)


def tables(text: str) -> list[list[list[str]]]:
  """Tables as rows of cells."""
  blocks = re.findall(r'(?:^\|.*\|$\n?)+', prose(text), re.M)
  return [
    [row.split('|')[1:-1] for row in block.splitlines()] for block in blocks
  ]


def numbers(cell: str) -> list[str]:
  # Sorted, since languages may name them in different orders.
  return sorted(re.findall(r'\d+(?:[.,]\d+)*', cell))


def code_spans(text: str) -> set[str]:
  """Text in backticks; a span that goes over a line's end is joined."""
  spans = re.findall(r'`([^`]+)`', prose(text))
  return {' '.join(span.split()) for span in spans}


def links(text: str) -> list[str]:
  targets = re.findall(r'\]\(([^)\s]+)\)', prose(text))
  return [target for target in targets if '://' not in target]


def slug(heading: str) -> str:
  """The anchor that GitHub gives a heading; CJK letters count as letters."""
  return re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')


def anchors(text: str) -> set[str]:
  """Every anchor of a document; a repeated heading's ends with a number."""
  names, counts = set(), {}
  for _, heading in headings(text):
    name = slug(heading)
    count = counts[name] = counts.get(name, -1) + 1
    names.add(f'{name}-{count}' if count else name)
  return names


def list_lengths(text: str) -> list[int]:
  """The number of list items of each section."""
  sections = re.split(r'^#{1,6} ', prose(text), flags=re.M)
  return [len(re.findall(r'^ *- ', section, re.M)) for section in sections]


def pictures(text: str) -> list[str]:
  """Plain blocks without Chinese characters: the same in both languages."""
  blocks = [code for kind, code in _FENCED.findall(text) if kind == 'text']
  return [code for code in blocks if not re.search('[一-鿿]', code)]


def tree(text: str) -> list[str]:
  """The files and folders that the tree names, in its order."""
  (block,) = (
    code for kind, code in _FENCED.findall(text) if 'moepeft/\n' in code
  )
  return re.findall(r'[\w.]+(?:\.(?:py|md|sh|ipynb)|/)(?!\w)', block)


def in_both(name: str, measure) -> tuple:
  """A measure of the English page and of its translation."""
  chinese = name.replace('.md', '.zh.md')
  return measure(read(name)), measure(read(chinese))


translated = pytest.mark.parametrize('name', TRANSLATED)


@translated
def test_same_levels_of_headings_in_the_same_order(name):
  english, chinese = in_both(name, lambda text: [h[0] for h in headings(text)])
  assert chinese == english


@translated
def test_same_commands(name):
  english, chinese = in_both(
    name,
    lambda text: [code for kind, code in _FENCED.findall(text) if kind == 'sh'],
  )
  assert chinese == english


@translated
def test_same_pictures(name):
  english, chinese = in_both(name, pictures)
  assert set(chinese) <= set(english)


@translated
def test_lists_of_the_same_lengths(name):
  english, chinese = in_both(name, list_lengths)
  assert chinese == english


@translated
def test_same_kinds_of_fenced_blocks(name):
  english, chinese = in_both(
    name, lambda text: [block[0] for block in _FENCED.findall(text)]
  )
  assert chinese == english


@translated
def test_tables_of_the_same_shape(name):
  english, chinese = in_both(
    name, lambda text: [[len(row) for row in table] for table in tables(text)]
  )
  assert chinese == english


@translated
def test_same_numbers_in_every_cell(name):
  english, chinese = in_both(
    name,
    lambda text: [
      [numbers(cell) for cell in row] for table in tables(text) for row in table
    ],
  )
  assert chinese == english


@translated
def test_same_options_and_files(name):
  english, chinese = in_both(name, code_spans)
  assert english ^ chinese == set()


@pytest.mark.parametrize(
  'name', [n for n in TRANSLATED if not n.startswith('docs/extending/')]
)
def test_page_leads_to_the_other_language_below_its_title(name):
  english, chinese = in_both(name, lambda text: text.splitlines()[1:3])
  file = name.rpartition('/')[2]
  assert english == ['', f'[中文]({file.replace(".md", ".zh.md")})']
  assert chinese == ['', f'[English]({file})']


@pytest.mark.parametrize('name', ALL)
def test_links_lead_somewhere(name):
  lost = []
  for link in links(read(name)):
    path, _, anchor = link.partition('#')
    target = (ROOT / name).parent / path if path else ROOT / name
    if not target.exists():
      lost.append(link)
    elif anchor and anchor not in anchors(target.read_text(encoding='utf-8')):
      lost.append(link)
  assert lost == []


@pytest.mark.parametrize('name', [n for n in ALL if n.startswith('docs/')])
def test_page_is_in_the_navigation(name):
  assert f' {name.removeprefix("docs/")}\n' in read('mkdocs.yml')


@pytest.mark.parametrize('name', [n for n in ALL if n.endswith('.zh.md')])
def test_chinese_page_links_to_chinese_pages(name):
  for link in links(read(name))[1:]:
    path = link.partition('#')[0]
    chinese = (ROOT / name).parent / path.replace('.md', '.zh.md')
    if path.endswith('.md') and not path.endswith('.zh.md'):
      assert not chinese.exists(), link


def test_readme_is_short():
  assert len(read('README.md').splitlines()) <= 250


def test_methods_of_readme_are_those_of_the_guide():
  for ending in ('.md', '.zh.md'):
    readme, guide = (
      [row for row in read(name + ending).splitlines() if row.startswith('| `')]
      for name in ('README', 'docs/methods')
    )
    assert readme and set(readme) <= set(guide)


def test_both_first_paragraphs_name_both_kinds_of_models():
  english, chinese = in_both('README.md', lambda text: text.split('```')[0])
  assert 'T5' in english and 'decoder-only' in english
  assert 'T5' in chinese and '仅解码器' in chinese


def test_tree_names_what_exists_in_both_languages():
  english, chinese = in_both('docs/architecture.md', tree)
  assert len(english) > 50
  assert chinese == english
  names = {path.name for path in ROOT.rglob('*') if '.venv' not in path.parts}
  assert [name for name in english if name.rstrip('/') not in names] == []


@pytest.mark.parametrize(
  'heading, expected',
  [
    ('Semantics: released code and paper', 'semantics-released-code-and-paper'),
    ('语义：公开代码与论文', '语义公开代码与论文'),
    ("T5X's `gin` files, re-read", 't5xs-gin-files-re-read'),
  ],
)
def test_slug_is_githubs(heading, expected):
  assert slug(heading) == expected


def test_repeated_heading_has_a_numbered_anchor():
  assert anchors('# Data\n\n## Data\n') == {'data', 'data-1'}


def paths_of_files(text: str) -> set[str]:
  """Paths below the repository that end like a file."""
  folders = 'moepeft|tests|configs|gin|scripts|benchmarks|notebooks'
  pattern = (
    rf'(?<![\w./-])(?:{folders})/[\w/.-]*\.(?:py|sh|gin|ipynb|html)(?![a-z])'
  )
  return set(re.findall(pattern, text))


# The log keeps names as they were, and these examples add files.
_OTHER_FILES = ('docs/LOG.md', 'docs/results.md', 'CONTRIBUTING.md')


@pytest.mark.parametrize(
  'name',
  [n for n in ALL if n not in _OTHER_FILES and 'docs/extending/' not in n]
  + ['third_party/README.md'],
)
def test_files_that_a_page_names_exist(name):
  paths = paths_of_files(read(name))
  assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_paths_of_files_are_told_from_other_paths():
  text = 'see `moepeft/a/b.py`, workdirs/configs/x.py and moepeft/serve'
  assert paths_of_files(text) == {'moepeft/a/b.py'}


@pytest.mark.parametrize(
  'name', ['docs/architecture.md', 'docs/architecture.zh.md']
)
def test_files_of_the_architecture_exist(name):
  paths = re.findall(r'(?<![\w/.{*])[a-z_0-9]+/[\w/]+\.py', read(name))
  assert len(paths) > 30
  missing = [
    path
    for path in paths
    if not (ROOT / path).exists() and not (ROOT / 'moepeft' / path).exists()
  ]
  assert missing == []

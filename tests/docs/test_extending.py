# SPDX-License-Identifier: Apache-2.0
"""Examples of docs/extending and docs/api.md run, block by block, as written.

A page's ```python blocks run in order in one namespace, in an empty directory
from which modules can be imported. A block whose first line is
`# FILE: name.py` is written to that file instead of being run.
"""

import ast
import builtins
import contextlib
import importlib
import pathlib
import re
import sys

import pytest

from moepeft.core.registry import Registry
from tests import ROOT

FOLDER = ROOT / 'docs' / 'extending'
EXTENDING = sorted(p for p in FOLDER.glob('*.md') if not p.match('*.zh.md'))
PAGES = [*EXTENDING, ROOT / 'docs' / 'api.md']
_BLOCK = re.compile(r'^```python\n(.*?)^```$', re.M | re.S)
_FILE = re.compile(r'# FILE: (\S+)\n')


def python_blocks(text: str) -> list[tuple[int, str]]:
  """(number of its first line, code) of each ```python block of a page."""
  return [
    (text.count('\n', 0, match.start(1)) + 1, match[1])
    for match in _BLOCK.finditer(text)
  ]


def execute(page: pathlib.Path, directory: pathlib.Path) -> dict:
  """Runs the blocks of a page; returns the namespace that they leave."""
  namespace = {'__name__': page.stem}
  for line, code in python_blocks(page.read_text(encoding='utf-8')):
    if match := _FILE.match(code):
      path = directory / match[1]
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(code)
      importlib.invalidate_caches()
    else:
      # Empty lines ahead: a traceback names the line of the page.
      padded = '\n' * (line - 1) + code
      exec(compile(padded, str(page), 'exec'), namespace)
  return namespace


@contextlib.contextmanager
def undone(directory: pathlib.Path):
  """Takes back what is registered, and imported from a directory, inside."""
  before = [(registry, set(registry)) for registry in _registries()]
  modules = set(sys.modules)
  yield
  for registry, names in before:
    for name in set(registry) - names:
      del registry._entries[name]
  for name in sys.modules.keys() - modules:
    path = getattr(sys.modules[name], '__file__', None) or ''
    if path.startswith(str(directory)):
      del sys.modules[name]


def _registries() -> list[Registry]:
  # Each is a global of its package. Not by isinstance, which asks proxies for
  # their class.
  return [
    value
    for name, module in sys.modules.items()
    if name.partition('.')[0] in ('builtins', 'moepeft')
    for value in vars(module).values()
    if type(value) is Registry
  ]


@pytest.fixture
def directory(tmp_path, monkeypatch):
  """An empty working directory that modules are imported from."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(str(tmp_path))
  with undone(tmp_path):
    yield tmp_path


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_example_runs(page, directory):
  blocks = python_blocks(page.read_text(encoding='utf-8'))
  if page.stem != 'index':
    assert any('assert' in code for _, code in blocks), 'it shows nothing'
  execute(page, directory)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_chinese_page_has_the_same_example(page):
  # Comments may be translated; they are no part of a syntax tree.
  english, chinese = (
    [
      ast.dump(ast.parse(code))
      for _, code in python_blocks(path.read_text(encoding='utf-8'))
    ]
    for path in (page, page.with_suffix('.zh.md'))
  )
  assert chinese == english


def test_every_chinese_page_has_an_english_one():
  chinese = {
    path.name.removesuffix('.zh.md') for path in FOLDER.glob('*.zh.md')
  }
  assert chinese == {page.stem for page in EXTENDING}


@pytest.mark.parametrize('language', ['.md', '.zh.md'])
def test_index_leads_to_every_page(language):
  text = (FOLDER / f'index{language}').read_text(encoding='utf-8')
  links = set(re.findall(r'\]\(([^)#]+)', text))
  stems = {page.stem for page in EXTENDING} - {'index'}
  names = {stem + language for stem in stems}
  assert names - links == set()


def test_blocks_run_in_order_and_are_undone(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(str(tmp_path))
  page = tmp_path / 'colors.md'
  page.write_text(
    'Text.\n\n```python\n# FILE: red_module.py\nCOLOR = "red"\n```\n\n'
    '```sh\nexit 1\n```\n\n```python\nimport red_module\n```\n\n'
    '```python\nregistry.register(red_module.COLOR, 1)\nraise KeyError\n```\n'
  )
  assert [line for line, _ in python_blocks(page.read_text())] == [4, 13, 17]
  registry = Registry('color', 'no.package', {})
  monkeypatch.setattr(builtins, 'registry', registry, raising=False)
  with undone(tmp_path):
    with pytest.raises(KeyError) as error:
      execute(page, tmp_path)
    assert error.traceback[-1].lineno + 1 == 18  # pytest counts from zero
    assert 'red' in registry and 'red_module' in sys.modules
  assert 'red' not in registry and 'red_module' not in sys.modules

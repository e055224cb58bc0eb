# SPDX-License-Identifier: Apache-2.0
"""The shipped package works elsewhere, and the documents are true."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from moepeft import config as config_lib
from moepeft import moe
from moepeft.checkpoints.count_parameters import count
from moepeft.checkpoints.solve_method import with_explicit_method
from moepeft.models import FAMILIES
from moepeft.peft import METHODS
from tests import ROOT

_CARDS = sorted((ROOT / 'configs').rglob('*.py'))
_DOCUMENTS = [
  *sorted(ROOT.glob('*.md')),
  *sorted((ROOT / 'docs').rglob('*.md')),
  *_CARDS,
]
# What a source distribution is made of, beside the files at the top.
_FOLDERS = (
  'benchmarks',
  'configs',
  'docs',
  'gin',
  'moepeft',
  'notebooks',
  'scripts',
  'tests',
  'third_party',
)


def _name(path: Path) -> str:
  return path.relative_to(ROOT).as_posix()


def _read(name: str) -> str:
  return (ROOT / name).read_text(encoding='utf-8')


@pytest.fixture(scope='module')
def built(tmp_path_factory) -> Path:
  """A folder with a source distribution and the wheel that is built from it."""
  made = tmp_path_factory.mktemp('built')
  source = made / 'source'
  # A copy, so that nothing is written to the checkout or left from before.
  ignored = shutil.ignore_patterns('__pycache__', '*.egg-info')
  for folder in _FOLDERS:
    shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
  for file in filter(Path.is_file, ROOT.iterdir()):
    shutil.copy(file, source)
  command = [sys.executable, '-m', 'build', '--no-isolation']
  command += ['--outdir', str(made / 'dist'), str(source)]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  return made / 'dist'


@pytest.fixture(scope='module')
def wheel(built, tmp_path_factory) -> Path:
  """The wheel, unpacked."""
  unpacked = tmp_path_factory.mktemp('wheel')
  (file,) = built.glob('*.whl')
  with zipfile.ZipFile(file) as archive:
    archive.extractall(unpacked)
  return unpacked


def test_source_distribution_holds_every_file_of_python(built):
  (file,) = built.glob('*.tar.gz')
  with tarfile.open(file) as archive:
    held = {name.partition('/')[2] for name in archive.getnames()}
  ours = {
    _name(path)
    for folder in _FOLDERS
    for path in (ROOT / folder).rglob('*')
    if path.suffix in ('.py', '.sh', '.jsonl')
  }
  assert any(name.startswith('benchmarks/') for name in ours)
  assert ours - held == set()


def test_wheel_holds_the_package_and_nothing_beside_it(wheel):
  tops = sorted(path.name.split('-')[0] for path in wheel.iterdir())
  assert tops == ['moepeft', 'moepeft']  # the package and its metadata
  ours = {p.relative_to(ROOT) for p in (ROOT / 'moepeft').rglob('*.py')}
  assert {path for path in ours if not (wheel / path).is_file()} == set()


def test_wheel_holds_the_shipped_model_and_data_and_every_card(wheel):
  assets = ROOT / 'moepeft' / 'assets'
  for here in filter(Path.is_file, assets.rglob('*')):
    there = wheel / 'moepeft' / 'assets' / here.relative_to(assets)
    assert there.read_bytes() == here.read_bytes()
  for card in _CARDS:
    assert (wheel / 'moepeft' / _name(card)).read_text() == card.read_text()


def test_wheel_installs_the_program(wheel):
  (file,) = wheel.glob('*.dist-info/entry_points.txt')
  assert 'moepeft = moepeft.__main__:main' in file.read_text()


@pytest.mark.parametrize(
  'name',
  [
    *('core/pages/script.js', 'core/pages/style.css'),
    *('evaluation/routing/page.html', 'serve/page/index.html'),
  ],
)
def test_wheel_holds_the_pages(wheel, name):
  here, there = ROOT / 'moepeft' / name, wheel / 'moepeft' / name
  assert there.read_bytes() == here.read_bytes()


def test_wheel_holds_every_gin_file_and_finds_it_elsewhere(wheel, tmp_path):
  here = sorted((ROOT / 'gin').rglob('*.gin'))
  there = {p.relative_to(wheel / 'moepeft') for p in wheel.rglob('*.gin')}
  assert there == {path.relative_to(ROOT) for path in here}
  options = ('--gin_file=gin/mov.gin', '--noflops')
  command = [sys.executable, '-m', 'moepeft.count', *options]
  env = {**os.environ, 'PYTHONPATH': str(wheel), 'JAX_PLATFORMS': 'cpu'}
  counted = subprocess.check_output(command, env=env, cwd=tmp_path, text=True)
  # 30 experts on T5 1.1 large, arXiv:2309.05444.
  assert json.loads(counted)['peft'] == 12_810_240


def test_wheel_names_its_licence_and_never_asks_for_torch(wheel):
  (folder,) = wheel.glob('*.dist-info')
  metadata = (folder / 'METADATA').read_text(encoding='utf-8')
  assert re.search(r'^License(-Expression)?: Apache-2.0$', metadata, re.M)
  assert re.search(r'^Requires-Python: >=3.11$', metadata, re.M)
  extras = re.findall(r'^Provides-Extra: (.*)$', metadata, re.M)
  wanted = 'agent all course data docs eval or rag seqio serve test'
  assert sorted(extras) == wanted.split()
  assert not re.search(r'^Requires-Dist: torch', metadata, re.M | re.I)
  licences = [path.name for path in folder.rglob('*LICENSE*')]
  assert licences == ['LICENSE']


@pytest.mark.slow
def test_wheel_runs_the_main_job_elsewhere(wheel, tmp_path):
  env = {
    **os.environ,
    'PYTHONPATH': str(wheel),
    'HF_HUB_OFFLINE': '1',
    'JAX_PLATFORMS': 'cpu',
  }
  python = [sys.executable, '-c']
  where = 'from moepeft.config import command_line; print(command_line.PACKAGE)'
  found = subprocess.check_output(
    [*python, where], env=env, cwd=tmp_path, text=True
  )
  assert Path(found.strip()) == wheel / 'moepeft'
  command = [sys.executable, *shlex.split(_main_job())[1:]]
  small = [
    '--config.steps=2',
    '--config.evaluation.max_examples=2',
    '--config.evaluation.batch_size=2',
    '--workdir=run',
  ]
  done = subprocess.run(
    command + small, env=env, cwd=tmp_path, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout + done.stderr
  run = tmp_path / 'run'
  rows = (run / 'metrics.jsonl').read_text().splitlines()
  # What is measured before the first step is step 0's.
  # ... and what is measured after the last step is the last step's.
  assert [json.loads(row)['step'] for row in rows] == [0, 1, 2, 2]
  for name in ('before.json', 'after.json', 'summary.json', 'plots/loss.png'):
    assert (run / name).stat().st_size > 0
  assert json.loads((run / 'config.json').read_text())['steps'] == 2
  assert (run / 'checkpoints' / '2').is_dir()


def _load_card(path: Path):
  spec = importlib.util.spec_from_file_location(f'card_{path.stem}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize(
  'path',
  # tests/config/test_method_configs.py builds the others' methods.
  [path for path in _CARDS if path.parent.name != 'methods'],
  ids=_name,
)
def test_card_builds_its_model_and_method(path):
  counted = count(with_explicit_method(_load_card(path).get_config()))
  assert 0 < counted['peft'] <= counted['params']


@pytest.mark.parametrize('path', _CARDS, ids=_name)
def test_card_names_a_command_that_uses_it(path):
  card = _load_card(path)
  used = re.findall(r'--config=(\S+)', card.__doc__)
  assert used
  for name, _, values in (text.partition(':') for text in used):
    assert name == _name(path)
    card.get_config(values)
  with pytest.raises(ValueError, match='has no value'):
    card.get_config('no_such_value=1')


def _commands(text: str) -> list[str]:
  """The lines of a document's ```sh blocks, continued lines joined."""
  blocks = re.findall(r'^ *```sh\n(.*?)^ *```', text, re.M | re.S)
  lines = ''.join(blocks).replace('\\\n', ' ').splitlines()
  return [line.strip() for line in lines if line.strip()]


def _readme_command(end: str) -> str:
  """The README's only command that starts with pip and has a given end."""
  commands = _commands(_read('README.md'))
  (found,) = {c for c in commands if c.startswith('pip') and c.endswith(end)}
  return found


def _main_job() -> str:
  return _readme_command('configs/molora_t5.py').partition(' && ')[2]


def test_ci_runs_the_readmes_test_command():
  assert f'timed "{_readme_command("&& pytest")}"\n' in _read('.ci/run')


def test_readmes_main_job_names_a_card():
  assert _main_job().startswith('python -m moepeft.train --config=')
  assert (ROOT / _main_job().partition('=')[2]).is_file()


def test_config_keys_in_documents_exist():
  known, missing = config_lib.default(), []
  for document in _DOCUMENTS:
    for key in set(re.findall(r'--config\.([\w.]*\w)', _read(_name(document)))):
      if not _has(known, key.split('.')):
        missing.append(f'{_name(document)}: --config.{key}')
  assert missing == []


def _has(config: ConfigDict, keys: list[str]) -> bool:
  if keys[:2] == ['model', 'shape']:
    # Any field of a family's config.
    shape = FAMILIES['llama'].config('tiny', '')
    for key in keys[2:]:
      if not hasattr(shape, key):
        return False
      shape = getattr(shape, key)
    return True
  if keys[0] == 'router_losses':
    # Routers of the reader's own have losses too.
    return True
  for key in keys:
    if not isinstance(config, ConfigDict) or key not in config:
      return False
    config = config[key]
  return True


@pytest.mark.parametrize(
  'document', [_name(d) for d in _DOCUMENTS if d.suffix == '.md']
)
def test_commands_in_documents_exist_with_their_flags(document):
  for command in _commands(_read(document)):
    if match := re.search(r'python -m (moepeft\.\w+)(.*)', command):
      name = match[1].replace('.', '/')
      if not (ROOT / f'{name}.py').exists():
        name += '/__main__'
      shared = ('moepeft/config/command_line.py', 'moepeft/config/gin/flags.py')
      if name.startswith('moepeft/agent/'):
        shared += ('moepeft/agent/flags.py',)
      source = ''.join(map(_read, (f'{name}.py', *shared)))
      for flag in re.findall(r'(?<=--)\w+(?=[=\s.]|$)', match[2]):
        known = (f"'{flag}'", f"'--{flag}", f"'{flag}.")
        assert any(k in source for k in known), f'{command}: --{flag}'


def test_methods_and_routers_are_in_tables():
  readme, guide = (
    set(re.findall(r'^(?:\||-) `(\w+)', _read(name), re.M))
    for name in ('README.md', 'docs/methods.md')
  )
  assert set(METHODS) <= readme
  assert {*METHODS, *moe.ROUTERS} <= guide


def test_papers_cited_are_in_the_notices():
  cited = set()
  for path in (ROOT / 'moepeft').rglob('*.py'):
    cited |= set(re.findall(r'arXiv:(\d+\.\d+)', path.read_text()))
  # The course also names a paper by its number alone: year, month, count.
  number = r'\b\d{2}(?:0[1-9]|1[0-2])\.\d{4,5}\b'
  sources = (ROOT / 'notebooks' / 'source').glob('*.py')
  for path in (ROOT / 'docs' / 'course.md', *sources):
    cited |= set(re.findall(number, path.read_text('utf-8')))
  notices = _read('third_party/README.md')
  assert [paper for paper in sorted(cited) if paper not in notices] == []

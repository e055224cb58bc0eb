# SPDX-License-Identifier: Apache-2.0
"""The shipped skills follow the open convention, and their commands exist."""

import functools
import re
import shlex

import pytest

pytest.importorskip('openai')

from moepeft import config as config_lib  # noqa: E402
from moepeft.agent import skills  # noqa: E402
from tests import ROOT, commands  # noqa: E402

FOLDERS = sorted(p for p in skills.BUILTIN_SKILLS.iterdir() if p.is_dir())
TEXTS = {
  path.relative_to(skills.BUILTIN_SKILLS).as_posix(): path.read_text()
  for path in sorted(skills.BUILTIN_SKILLS.rglob('*.md'))
}
# A config in place of the word in the commands.
CONFIG = 'configs/molora_t5.py'


def skill_commands() -> list[tuple[str, list[str]]]:
  """(module, arguments) of each command in a fenced block of a skill."""
  pairs = []
  for text in TEXTS.values():
    for block in re.findall(r'^ *```sh\n(.*?)^ *```', text, re.M | re.S):
      for line in block.strip().splitlines():
        python, option, module, *arguments = shlex.split(line)
        assert (python, option) == ('python', '-m'), line
        pairs.append((module, arguments))
  return pairs


COMMANDS = skill_commands()


@functools.cache
def flags_of(module: str) -> set[str]:
  """The names of a command's flags, from its --help."""
  shown = commands.run(module, '--help')
  assert shown.returncode == 0, shown.stderr
  return set(re.findall(r'--(?:\[no\])?([a-z_]+)', shown.stdout))


@pytest.mark.parametrize('folder', FOLDERS, ids=lambda path: path.name)
def test_a_skill_follows_the_open_convention(folder):
  skills_ref = pytest.importorskip('skills_ref')
  assert skills_ref.validate(folder) == []


def test_the_validator_refuses_a_skill_of_another_name(tmp_path):
  skills_ref = pytest.importorskip('skills_ref')
  text = (FOLDERS[0] / skills.SKILL_FILE).read_text()
  (tmp_path / 'another').mkdir()
  (tmp_path / 'another' / skills.SKILL_FILE).write_text(text)
  assert skills_ref.validate(tmp_path / 'another')


@pytest.mark.parametrize('module', sorted({module for module, _ in COMMANDS}))
def test_the_flags_of_a_skills_commands_exist(module):
  if module.startswith('examples.'):
    pytest.importorskip(module)
  used = {
    argument.removeprefix('--').partition('=')[0]
    for name, arguments in COMMANDS
    for argument in arguments
    if name == module and argument.startswith('--')
  }
  keys = {flag for flag in used if flag.startswith('config.')}
  assert used - keys <= flags_of(module)
  for key in keys:
    assert 'config' in flags_of(module)
    assert_key_exists(key.removeprefix('config.'))


def assert_key_exists(key: str) -> None:
  value = config_lib.default()
  for name in key.split('.'):
    assert name in value, key
    value = value[name]


@pytest.mark.parametrize('name', TEXTS)
def test_configs_keys_and_skills_that_a_skill_names_exist(name):
  text = TEXTS[name]
  for path in re.findall(r'\bconfigs/[\w/]+\.py', text):
    assert (ROOT / path).is_file(), path
  for key in re.findall(r'--config\.([a-z_.]+[a-z_])', text):
    assert_key_exists(key)
  names = {path.name for path in FOLDERS}
  assert set(re.findall(r'the skill\s+([a-z]+(?:-[a-z]+)+)', text)) <= names


def test_every_command_stands_in_a_block_that_is_checked():
  assert len(COMMANDS) > 15
  for name, text in TEXTS.items():
    prose = re.sub(r'^ *```sh\n.*?^ *```', '', text, flags=re.M | re.S)
    assert 'python -m' not in prose, name


@pytest.mark.slow
@pytest.mark.parametrize(
  ('module', 'arguments'),
  [
    (module, arguments)
    for module, arguments in COMMANDS
    if '--dry_run' in arguments or module == 'moepeft.count'
  ],
  ids=lambda value: value if isinstance(value, str) else '',
)
def test_commands_that_write_nothing_run_as_they_stand(
  module, arguments, tmp_path
):
  arguments = [text.replace('=CONFIG', f'={CONFIG}') for text in arguments]
  done = commands.run(module, *arguments, cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  assert list(tmp_path.iterdir()) == []

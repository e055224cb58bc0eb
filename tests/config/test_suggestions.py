# SPDX-License-Identifier: Apache-2.0
"""Commands answer a wrong flag, key or config by one sentence and a hint."""

import re

import pytest

from moepeft import __main__, tasks
from moepeft.config import command_line, suggestions
from moepeft.core.files import local_path
from moepeft.data.text import quality
from moepeft.evaluation import plan
from moepeft.models import FAMILIES
from moepeft.models.t5 import model as t5
from tests import ROOT

from .. import commands

_PACKAGE = ROOT / 'moepeft'


def modules():
  """Modules of the package that `python -m` runs."""
  for path in sorted(_PACKAGE.rglob('*.py')):
    if "if __name__ == '__main__':" not in path.read_text():
      continue
    # Scripts of skills and the server's own processes are run by their paths.
    if path.parent == _PACKAGE or path.name == '__main__.py':
      parts = path.relative_to(_PACKAGE).with_suffix('').parts
      yield '.'.join(part for part in parts if part != '__main__')


def test_every_command_is_listed():
  assert set(__main__.COMMANDS) == {name for name in modules() if name}


def test_the_package_lists_its_commands():
  done = commands.run('moepeft')
  assert done.returncode == 0
  for name in __main__.COMMANDS:
    assert f'  moepeft {name} ' in done.stdout


def test_an_unknown_command_is_refused_with_the_nearest(capsys):
  assert __main__.main(['trian']) == 2
  assert "did you mean 'train'?" in capsys.readouterr().err


def test_a_subcommand_is_the_command():
  arguments = ('--config=configs/paper/t5_large_ia3.py', '--noflops')
  alone = commands.run('moepeft.count', *arguments)
  assert alone.returncode == 0, alone.stderr
  assert '282624' in alone.stdout
  assert commands.run('moepeft', 'count', *arguments).stdout == alone.stdout
  # The exit code and the sentence of a mistake are the command's own.
  mistaken = commands.run('moepeft', 'count', '--config.stpes=3')
  assert mistaken.returncode == 2 and 'steps' in mistaken.stderr


@pytest.mark.slow
@pytest.mark.parametrize('name', __main__.COMMANDS)
@pytest.mark.parametrize('flag', ['--help', '-h'])
def test_help_of_every_command_ends_with_zero(name, flag):
  done = commands.run(f'moepeft.{name}', flag)
  assert done.returncode == 0, done.stderr
  assert f'moepeft.{name}' in done.stdout
  assert 'Traceback' not in done.stderr


def test_help_ends_with_zero():
  done = commands.run('moepeft.count', '--help')
  assert done.returncode == 0, done.stderr
  assert '--config' in done.stdout


@pytest.mark.parametrize(
  ('arg', 'message'),
  [
    (
      '--config.stepz=3',
      'there is no config.stepz; did you mean config.steps?',
    ),
    (
      '--config.learning_rate=1',
      'did you mean config.optimizer.learning_rate?',
    ),
    ('--config.optimiser.name=x', 'did you mean config.optimizer.name?'),
    ('--config.modle.path=x', 'config.model.path'),
    ('--config.qqqqqqq=1', 'moepeft/config/defaults.py lists all keys'),
    ('--config.optimizer=adamw', 'is a section of a config'),
  ],
)
def test_an_unknown_key_suggests_the_nearest(arg, message):
  assert message in suggestions.unknown_key(arg)


def test_known_keys_are_not_unknown():
  for key in suggestions.keys():
    assert suggestions.unknown_key(f'--config.{key}=1') == ''
  assert suggestions.unknown_key('--config.model.shape.layers=3') == ''
  assert suggestions.unknown_key('--workdir=x') == ''


@pytest.mark.parametrize(
  ('arg', 'message'),
  [
    ('--config.steps=1e9', "config.steps is a whole number; got '1e9'"),
    ('--config.loss.z_loss=x', "config.loss.z_loss is a number; got 'x'"),
    ('--config.data.packing=perhaps', 'config.data.packing is true or false'),
    ('--config.data.packing', ''),
    ('--config.steps=3', ''),
    ('--config.data.path=3', ''),
  ],
)
def test_a_value_of_another_type_is_named(arg, message):
  sentence = suggestions.wrong_type(arg)
  assert message in sentence
  assert bool(message) == bool(sentence)


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('steps', 'did you mean --config.steps or --config.profile.steps?'),
    ('batch_size', '--config.batch_size or --config.evaluation.batch_size?'),
    ('workdr', 'did you mean --workdir?'),
    ('learning-rate', 'did you mean --config.optimizer.learning_rate?'),
    ('qqqqqqq', 'see --help'),
  ],
)
def test_an_unknown_flag_suggests_a_flag_or_a_key(name, message):
  assert message in suggestions.unknown_flag(name, ['workdir', 'dry_run'], True)


def test_without_a_config_no_key_is_suggested():
  assert 'config' not in suggestions.unknown_flag('steps', ['length'], False)


@pytest.mark.parametrize(
  ('file', 'message'),
  [
    ('configs/sft_smolm2.py', 'did you mean configs/sft_smollm2.py?'),
    ('sft_smollm2', 'did you mean configs/sft_smollm2.py?'),
    ('t5_xl_molora', 'did you mean configs/paper/t5_xl_molora.py?'),
    ('/no/where.txt', 'here or in the package'),
  ],
)
def test_an_unknown_config_suggests_one_that_ships(file, message):
  sentence = suggestions.unknown_config(file, [str(ROOT)])
  assert message in sentence
  # What is suggested exists.
  for path in re.findall(r'did you mean (\S+)\?', sentence):
    assert (ROOT / path).is_file()


@pytest.mark.slow
def test_a_config_that_fails_is_one_sentence(tmp_path):
  cases = {
    'import no_such_module': 'No module named',
    'def get_config(v=""): return 1 / 0': 'ZeroDivisionError',
    'def get_config(v=""): return {}': 'returned dict; expected the config',
    'def get_config(v=""): return None': 'returned NoneType',
    'x = 1': 'get_config',
  }
  for i, (source, message) in enumerate(cases.items()):
    file = tmp_path / f'{i}.py'
    file.write_text(source)
    done = commands.run('moepeft.count', f'--config={file}')
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith('error: ') and message in last, last


def test_a_bug_keeps_its_traceback():
  def main():
    raise ZeroDivisionError

  with pytest.raises(ZeroDivisionError):
    command_line.report_errors(main)


@pytest.mark.parametrize(
  ('read', 'name'),
  [
    (lambda: tasks.task_names('storge'), "'storage'"),
    (lambda: plan.check_metrics(['acuracy']), "'accuracy'"),
    (lambda: t5.config('smal'), "'small'"),
    (lambda: FAMILIES['llama'].config('3-8bb'), "'3-8b'"),
    (lambda: quality.rules('lenght'), "'length'"),
    (lambda: local_path('package:chat'), "'chats'"),
  ],
)
def test_wrong_names_of_other_kinds_suggest_the_nearest(read, name):
  with pytest.raises(ValueError, match=rf'; did you mean {name}\?$'):
    read()

# SPDX-License-Identifier: Apache-2.0
"""Modules of --imports are imported, recorded, and imported again for a run."""

import sys

import pytest

from moepeft.config import default, imports
from moepeft.runs.run import Run

from .. import commands

MODULE = "print('my_module is imported')\n"


@pytest.fixture
def module(tmp_path, monkeypatch):
  (tmp_path / 'my_module.py').write_text(MODULE)
  monkeypatch.syspath_prepend(tmp_path)
  yield 'my_module'
  sys.modules.pop('my_module', None)


@pytest.mark.parametrize('command', ['count', 'evaluate'])
def test_a_command_imports_the_modules_first(command, module, tmp_path):
  result = commands.run(
    f'moepeft.{command}', f'--imports={module}', cwd=tmp_path
  )
  assert result.stdout.startswith('my_module is imported\n')


def test_a_module_that_raises_is_one_sentence(tmp_path):
  (tmp_path / 'wrong.py').write_text('import no_such_library\n')
  result = commands.run('moepeft.count', '--imports=wrong', cwd=tmp_path)
  assert result.returncode == 2
  (line,) = result.stderr.splitlines()
  assert line == (
    "error: the module 'wrong' of --imports cannot be imported "
    "(ModuleNotFoundError: No module named 'no_such_library'); start the "
    'command in the folder of wrong, or put that folder on PYTHONPATH'
  )


def test_a_file_name_is_corrected():
  with pytest.raises(ValueError, match="got 'a/b.py', write a.b"):
    imports.module_names('my_module,a/b.py')


def test_a_run_imports_what_its_config_names(module, tmp_path, capsys):
  config = default()
  config.imports = module
  (tmp_path / 'config.json').write_text(config.to_json())
  assert Run(str(tmp_path)).load_config().imports == module
  assert capsys.readouterr().out == 'my_module is imported\n'

# SPDX-License-Identifier: Apache-2.0
"""A package that is missing is named with the extra that brings it."""

import os
import subprocess
import sys

import pytest

from moepeft.core.extras import require

# What site imports at the start of a Python that must not see a package.
_HIDDEN = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = (
  lambda name, *more: None if name == {name!r} else find(name, *more)
)
"""


def test_a_missing_package_is_named_with_its_extra():
  require('moepeft.serve', 'serve', ['json'])
  with pytest.raises(ImportError, match=r"pip install 'moepeft\[serve\]'"):
    require('moepeft.serve', 'serve', ['json', 'no_such_package'])


@pytest.mark.parametrize(
  ('command', 'package'), [('serve', 'fastapi'), ('agent', 'openai')]
)
def test_a_command_without_its_packages_ends_with_a_line(
  command, package, tmp_path
):
  hidden = _HIDDEN.format(name=package)
  (tmp_path / 'sitecustomize.py').write_text(hidden)
  path = os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')])
  ended = subprocess.run(
    [sys.executable, '-m', f'moepeft.{command}', '--help'],
    env=os.environ | {'PYTHONPATH': path},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert ended.returncode == 1
  assert ended.stderr.splitlines() == [
    f'moepeft.{command} needs the package {package}: '
    f"pip install 'moepeft[{command}]'"
  ]

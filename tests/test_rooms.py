# SPDX-License-Identifier: Apache-2.0
"""Imports point one way through the house."""

import ast

from tests import ROOT

PACKAGE = ROOT / 'moepeft'
# A room may import what stands on its own line or above.
FLOORS = (
  ('typing', 'spec', 'core'),
  ('nn',),
  ('moe',),
  ('peft',),
  ('models',),
  ('interop',),
  (
    'config',
    'config_check',
    'config_ranges',
    'run_config',
    'gin_files',
    'gin_flags',
    'hints',
    'pages',
    'command',
    'stopping',
  ),
  ('objectives', 'data', 'tasks', 'scoring'),
  ('adafactor', 'accumulate'),
  (
    'rows',
    'curves',
    'progress',
    'history',
    'router_plots',
    'before_after',
    'metrics',
    'workdir',
    'meeting',
    'processes',
  ),
  ('plots', 'writers'),
  ('sampling', 'stream'),
  ('sharding', 'checkpoint_card', 'orbax_output'),
  ('checkpoint',),
  ('optim', 'base', 'decoding'),
  ('beams', 'prompts'),
  ('generation',),
  ('talk',),
  ('placement', 'references', 'memory'),
  (
    'runs',
    'ranking',
    'likelihood',
    'answering',
    'report',
    'sets',
    'next_steps',
  ),
  ('judge', 'measures', 'unfinished', 'work', 'summary'),
  ('validation',),
  ('train', 'evaluate', 'generate', 'count', 'convert', 'tokenizer', 'ngrams'),
  ('headings', 'remarks', 'routed', 'compared', 'tables', '__main__'),
  # The agent knows a server's API alone.
  ('serve',),
  ('agent',),
)
HEIGHT = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}


def test_every_room_is_on_a_floor():
  found = {path.stem for path in PACKAGE.glob('*.py')} | {
    path.parent.name for path in PACKAGE.glob('*/__init__.py')
  }
  assert found - {'__init__'} <= set(HEIGHT)


def test_imports_point_down():
  wrong = []
  for path in PACKAGE.rglob('*.py'):
    room = path.relative_to(PACKAGE).parts[0].removesuffix('.py')
    # python -m moepeft.data is a command; the server's is the server's.
    if path.name == '__main__.py' and path.parent != PACKAGE:
      room = max(room, 'tables', key=HEIGHT.get)
    for imported in rooms_of(path):
      if imported in HEIGHT and room != '__init__':
        if HEIGHT[imported] > HEIGHT[room]:
          wrong.append(f'{path.relative_to(PACKAGE)} imports {imported}')
  assert wrong == []


def rooms_of(path):
  # Imports inside of functions too.
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      parts = node.module.split('.')
      if parts[0] == 'moepeft':
        if len(parts) > 1:
          yield parts[1]
        else:
          yield from (alias.name for alias in node.names)


def test_methods_are_imported_by_no_model_and_no_layer():
  for room in ('nn', 'moe', 'models'):
    for path in (PACKAGE / room).glob('*.py'):
      assert 'peft' not in set(rooms_of(path)), path


def test_every_file_has_a_licence_line_and_says_what_it_is():
  for path in PACKAGE.rglob('*.py'):
    text = path.read_text()
    assert text.startswith('# SPDX-License-Identifier: Apache-2.0'), path
    if len(text.splitlines()) > 1:
      assert ast.get_docstring(ast.parse(text)), path

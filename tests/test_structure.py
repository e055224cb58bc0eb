# SPDX-License-Identifier: Apache-2.0
"""Imports point one way, without circles, and every file says what it is."""

import ast

from scripts import structure

# A unit may import those of the lines above its own, and none beside it.
LAYERS = (
  ('core',),
  ('nn', 'metrics'),
  ('moe', 'models', 'tasks'),
  ('config',),
  ('peft',),
  ('runs',),
  ('checkpoints',),
  ('data',),
  ('objectives', 'inference'),
  ('training', 'evaluation', 'serve'),
  ('registries',),
  (
    *('train', 'evaluate', 'generate', 'count', 'convert', 'tables'),
    *('tokenizer', 'ngrams', 'data.__main__', 'serve.__main__', '__main__'),
  ),
)
# It knows a server's API alone.
ALONE = {'agent': {'core', 'config'}, 'agent.__main__': {'core', 'config'}}
HEIGHT = {unit: i for i, layer in enumerate(LAYERS) for unit in layer}


def test_every_unit_has_a_layer():
  _, units = structure.graphs()
  assert units.keys() == HEIGHT.keys() | ALONE.keys()


def test_imports_point_down():
  modules, _ = structure.graphs()
  wrong = [
    f'{module} imports {other}'
    for module, imported in modules.items()
    for other in imported
    if not allowed(structure.unit(module), structure.unit(other))
  ]
  assert wrong == []


def allowed(unit, other):
  if unit == other or not unit or not other:
    return True
  if unit in ALONE:
    return other in ALONE[unit] or other == unit.removesuffix('.__main__')
  return other in HEIGHT and HEIGHT[other] < HEIGHT[unit]


def test_no_circle():
  modules, units = structure.graphs()
  assert structure.circles(units) == structure.circles(modules) == []


def test_the_measure_finds_circles_and_layers():
  graph = {'a': {'b'}, 'b': {'c'}, 'c': {'b'}, 'd': {'a'}}
  assert structure.circles(graph) == [{'b', 'c'}]
  assert structure.layers(graph) == {'b': 1, 'c': 1, 'a': 2, 'd': 3}


def test_every_file_has_a_licence_line_and_says_what_it_is():
  for path in structure.sources(structure.PACKAGE).values():
    text = path.read_text()
    assert text.startswith('# SPDX-License-Identifier: Apache-2.0'), path
    if len(text.splitlines()) > 1:
      assert ast.get_docstring(ast.parse(text)), path

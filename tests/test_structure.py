# SPDX-License-Identifier: Apache-2.0
"""Imports point one way, without circles, and every file says what it is."""

import ast

from scripts import structure
from tests import ROOT
from tests.ci_tests import CI_TESTS

# Class names that stand in several files; the list only shrinks.
DUPLICATE_CLASSES = frozenset()
# Functions of more than 100 lines; the list only shrinks.
LONG_FUNCTIONS = frozenset()
# Comparisons with the name of a registry's entry outside of its file. Allowed
# are converters alone, which know the formats that they write.
CONVERTERS = {
  'moepeft.checkpoints.hf.peft': 'ia3',
  'moepeft.checkpoints.hf.peft_lora': 'dora',
  'moepeft.checkpoints.t5x.adapters': 'lora molora mov softmax topk',
}
# Words that happen to be the name of an entry, by what they are compared with.
OTHER_MEANINGS = {
  'prompt: a value of config.data.truncation': (
    'moepeft.data.batching.collators',
    'moepeft.data.batching.decoder_only',
    'moepeft.data.chat.dataset',
    'moepeft.data.chat.truncate',
    'moepeft.data.preference.tokenize',
  ),
  'prompt: a column of rows': (
    'moepeft.data.chat.formats',
    'moepeft.data.preference.formats',
  ),
  'prefix: a value of config.data.pretraining_objective': (
    'moepeft.data.text.dataset',
  ),
  'text: a column of rows': ('moepeft.data.row_fields',),
  'tokens: a value of config.loss.average_over': (
    'moepeft.objectives.cross_entropy',
  ),
  'qwen2: a pre-tokenizer of GGUF files': (
    'moepeft.checkpoints.gguf.tokenizer',
  ),
  'linear: a type of rope_scaling': (
    'moepeft.models.decoder.hf_rope',
    'moepeft.nn.rope',
  ),
  "constant: a factor of T5X's learning rate": (
    'moepeft.config.gin.translate',
  ),
  'random: the name of a base of random weights': (
    'moepeft.evaluation.tables.seeds',
  ),
}
# Modules of entries that others outside of the registry's package import: the
# converters, and the router that a mixture has by default.
ENTRY_IMPORTS = {
  'moepeft.checkpoints.hf.peft': 'ia3',
  'moepeft.checkpoints.hf.peft_lora': 'lora',
  'moepeft.checkpoints.hf.peft_vera': 'vera',
  'moepeft.checkpoints.hf.peft_poly': 'poly',
  'moepeft.checkpoints.t5x.adapters': 'family',
  'moepeft.peft.mixture': 'softmax',
}

# A unit may import those of the lines above its own, and none beside it.
LAYERS = (
  ('core',),
  ('nn', 'metrics'),
  ('moe', 'models', 'tasks'),
  ('config',),
  ('peft', 'runs'),
  ('checkpoints',),
  ('data',),
  ('objectives', 'inference'),
  ('evaluation', 'serve'),
  ('training', 'sweeps'),
  (
    *('registries', 'evaluate', 'generate', 'convert', 'tables', 'routing'),
    *('tokenizer', 'serve.__main__', '__main__'),
  ),
  ('library', 'count', 'ngrams', 'data.__main__', 'sweep'),
  ('train',),
  ('train_trials', 'board'),
  ('board.__main__',),
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


def test_a_command_runs_at_the_end_of_its_file():
  # What is defined after the block does not exist while the command runs.
  for path in structure.sources(structure.PACKAGE).values():
    body = ast.parse(path.read_text()).body
    for node in body[:-1]:
      assert not (
        isinstance(node, ast.If)
        and ast.unparse(node.test) == "__name__ == '__main__'"
      ), path


def test_tests_of_ci_exist():
  for path, names in CI_TESTS.items():
    text = (ROOT / path).read_text()
    for name in names:
      function = name.partition('[')[0]
      assert f'def {function}' in text, name


def test_class_names_are_unique():
  assert structure.duplicate_classes().keys() - DUPLICATE_CLASSES == set()


def test_functions_have_at_most_100_lines():
  long = {
    (module, name)
    for module, path in structure.sources(structure.PACKAGE).items()
    for name, lines in structure.functions(structure.parse(path))
    if lines > 100
  }
  assert long - LONG_FUNCTIONS == set()


def test_no_code_branches_on_an_entry_s_name():
  allowed_names = {
    module: set(names.split()) for module, names in CONVERTERS.items()
  }
  for meaning, modules in OTHER_MEANINGS.items():
    for module in modules:
      allowed_names.setdefault(module, set()).add(meaning.split(':')[0])
  assert structure.branches_on_names() == allowed_names


def test_no_code_imports_an_entry_past_its_registry():
  assert {
    module: ' '.join(sorted(entries))
    for module, entries in structure.entry_imports().items()
  } == ENTRY_IMPORTS


def test_the_measure_sees_registries_and_branches(tmp_path):
  assert structure.registered_names()['dpo'] == {
    'moepeft.objectives',
    'moepeft.objectives.dpo',
  }
  file = tmp_path / 'module.py'
  file.write_text(
    "if x == 'a' or y in ('b', 'c') or 'd' != z: pass\n"
    "match x:\n  case 'e': pass\n"
    "f('g', {'h': 1})\n"
  )
  assert structure.compared_texts(file) == set('abcde')


def test_the_measure_sees_imports_of_entries(tmp_path):
  assert structure.entry_modules()['moepeft.objectives.dpo'] == (
    'moepeft.objectives'
  )
  # simpo, in the same package, imports dpo's loss.
  assert 'moepeft.objectives.simpo' not in structure.entry_imports()

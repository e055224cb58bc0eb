# SPDX-License-Identifier: Apache-2.0
"""Imports point one way, without circles, and every file says what it is."""

import ast

from scripts import structure

# Class names that stand in several files; the list only shrinks.
DUPLICATE_CLASSES = frozenset(
  'Block Call Embedding Layout Memory Prompt Stack Task Tool'.split()
)
# Functions of more than 100 lines; the list only shrinks.
LONG_FUNCTIONS = frozenset()
# Comparisons with the name of a registry's entry, outside of its file; the list
# only shrinks, but for converters (hf, gguf, t5x, gin), which know the formats
# that they write, and for words with another meaning.
BRANCHES = {
  'moepeft.checkpoints.gguf.tokenizer': 'qwen2',
  'moepeft.checkpoints.hf.model': 't5',
  'moepeft.checkpoints.hf.peft': 'ia3 prompt',
  'moepeft.checkpoints.hf.peft_lora': 'dora',
  'moepeft.checkpoints.t5x.adapters': 'lora molora mov softmax topk',
  'moepeft.config.gin.translate': 'constant',
  'moepeft.data.batching.collators': 'preference prompt',
  'moepeft.data.batching.decoder_only': 'prompt',
  'moepeft.data.chat.dataset': 'prompt',
  'moepeft.data.chat.formats': 'prompt',
  'moepeft.data.chat.template': 'chat preference',
  'moepeft.data.chat.truncate': 'prompt',
  'moepeft.data.fingerprint': 'datasets preference',
  'moepeft.data.preference.formats': 'prompt',
  'moepeft.data.preference.tokenize': 'prompt',
  'moepeft.data.row_fields': 'text',
  'moepeft.evaluate': 'accuracy',
  'moepeft.evaluation.eval_sets': 'tasks',
  'moepeft.evaluation.metrics': 'bleu rouge_l',
  'moepeft.evaluation.ngrams': 'text',
  'moepeft.evaluation.runner': 'accuracy loss',
  'moepeft.evaluation.summary': 'accuracy bleu loss',
  'moepeft.evaluation.tables.aggregate': 'loss tasks',
  'moepeft.evaluation.tables.comparable': 'jsonl tasks',
  'moepeft.evaluation.tables.compare': 'accuracy loss tasks',
  'moepeft.evaluation.tables.footnotes': 'accuracy bleu loss',
  'moepeft.evaluation.tables.forest_plot': 'bleu loss',
  'moepeft.evaluation.tables.render': 'loss',
  'moepeft.evaluation.tables.seeds': 'random tasks',
  'moepeft.evaluation.tables.terminal': 'loss',
  'moepeft.generate': 'chat preference text',
  'moepeft.models.decoder.hf_rope': 'linear',
  'moepeft.models.decoder_gguf': 'gpt2 llama mistral qwen2',
  'moepeft.nn.rope': 'linear',
  'moepeft.objectives.cross_entropy': 'tokens',
  'moepeft.peft.build': 'topk',
  'moepeft.runs.diagnosis': 'loss',
  'moepeft.runs.resume': 'constant',
  'moepeft.serve.http.chat': 'text',
  'moepeft.serve.http.requests': 'text',
  'moepeft.serve.http.schemas': 'text',
  'moepeft.train': 'chat preference',
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
  ('training',),
  (
    *('registries', 'evaluate', 'generate', 'convert', 'tables'),
    *('tokenizer', 'serve.__main__', '__main__'),
  ),
  ('library', 'count', 'ngrams', 'data.__main__'),
  ('train',),
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
  new = {
    module: names - set(BRANCHES.get(module, '').split())
    for module, names in structure.branches_on_names().items()
  }
  assert {module: names for module, names in new.items() if names} == {}


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

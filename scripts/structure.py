# SPDX-License-Identifier: Apache-2.0
"""Measures of the package's structure: units, import layers, circles, sizes.

python scripts/structure.py [--json]

A unit is a file or folder at the top of moepeft/; a folder's __main__.py, which
is a command, counts as a unit of its own. Imports within functions and under
TYPE_CHECKING count. A circle is a set of modules, or of units, each of which
imports all others, directly or not. A layer is a step of the longest chain of
imports between units.
"""

import argparse
import ast
import collections
import functools
import json
import pathlib
import statistics
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'moepeft'

Graph = dict[str, set[str]]


def module_name(path: pathlib.Path) -> str:
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def sources(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """{module: file} of a folder; scripts of skills are no modules."""
  paths = (p for p in folder.rglob('*.py') if 'skills' not in p.parts)
  return {module_name(path): path for path in sorted(paths)}


@functools.cache
def parse(path: pathlib.Path) -> ast.Module:
  return ast.parse(path.read_text())


def imports(path: pathlib.Path, modules: dict[str, pathlib.Path]) -> set[str]:
  """The package's modules that a file imports anywhere."""
  here = module_name(path).split('.')
  imported = set()
  for node in ast.walk(parse(path)):
    if isinstance(node, ast.Import):
      imported |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      parts = here[: len(here) - node.level + (path.stem == '__init__')]
      parts = parts if node.level else []
      parent = '.'.join([*parts, *filter(None, [node.module])])
      for alias in node.names:
        name = f'{parent}.{alias.name}'
        imported.add(name if name in modules else parent)
  return imported & modules.keys() - {module_name(path)}


def unit(module: str) -> str:
  parts = module.split('.')[1:]
  if parts[-1:] == ['__main__'] and len(parts) > 1:
    return '.'.join(parts)
  return parts[0] if parts else ''


def components(graph: Graph) -> list[set[str]]:
  """Strongly connected components, those that are imported first (Tarjan)."""
  index, low, stack, result = {}, {}, [], []

  def visit(node):
    index[node] = low[node] = len(index)
    stack.append(node)
    for other in sorted(graph[node]):
      if other not in index:
        visit(other)
        low[node] = min(low[node], low[other])
      elif other in stack:
        low[node] = min(low[node], index[other])
    if low[node] == index[node]:
      at = stack.index(node)
      result.append(set(stack[at:]))
      del stack[at:]

  for node in sorted(graph):
    if node not in index:
      visit(node)
  return result


def circles(graph: Graph) -> list[set[str]]:
  return [group for group in components(graph) if len(group) > 1]


def layers(graph: Graph) -> dict[str, int]:
  """{unit: length of the longest chain of imports that ends in it}."""
  height = {}
  for group in components(graph):
    below = {other for node in group for other in graph[node]} - group
    level = 1 + max((height[other] for other in below), default=0)
    height |= dict.fromkeys(group, level)
  return height


def functions(tree: ast.AST) -> Iterator[tuple[str, int]]:
  """(name, lines) of each function, decorators left out."""
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      yield node.name, node.end_lineno - node.lineno + 1


def graphs() -> tuple[Graph, Graph]:
  """The imports between modules, and between units."""
  modules = sources(PACKAGE)
  by_module = {name: imports(path, modules) for name, path in modules.items()}
  by_unit = collections.defaultdict(set)
  for module, imported in by_module.items():
    by_unit[unit(module)] |= {unit(other) for other in imported}
  by_unit = {
    name: others - {name, ''} for name, others in by_unit.items() if name
  }
  return by_module, by_unit


def duplicate_classes() -> dict[str, list[str]]:
  """{name: files} of classes of one name in several places."""
  places = collections.defaultdict(list)
  for path in sources(PACKAGE).values():
    for node in ast.walk(parse(path)):
      if isinstance(node, ast.ClassDef):
        places[node.name].append(str(path.relative_to(ROOT)))
  return {name: files for name, files in places.items() if len(files) > 1}


def registries() -> Iterator[tuple[str, str, dict[str, str]]]:
  """(module, package, {name: 'module:ATTRIBUTE'}) of every Registry(...)."""
  for module, path in sources(PACKAGE).items():
    for node in ast.walk(parse(path)):
      match node:
        case ast.Call(
          func=ast.Name(id='Registry'), args=[_, package, ast.Dict() as table]
        ):
          yield module, ast.literal_eval(package), ast.literal_eval(table)


def registered_names() -> dict[str, set[str]]:
  """{entry's name: modules that may know it}.

  They are the module that has the registry, and the entry's own.
  """
  names = collections.defaultdict(set)
  for module, package, table in registries():
    for name, location in table.items():
      names[name] |= {module, f'{package}.{location.partition(":")[0]}'}
  return names


def entry_modules() -> dict[str, str]:
  """{module of a registry's entry: the registry's package}."""
  return {
    f'{package}.{location.partition(":")[0]}': package
    for _, package, table in registries()
    for location in table.values()
  }


def entry_imports() -> dict[str, set[str]]:
  """{module: names of the entries' modules that it imports}.

  Modules in the package of the registry are left out.
  """
  packages = entry_modules()
  findings = {
    module: {
      other.rpartition('.')[2]
      for other in imported & packages.keys()
      if not f'{module}.'.startswith(f'{packages[other]}.')
    }
    for module, imported in graphs()[0].items()
  }
  return {module: entries for module, entries in findings.items() if entries}


def compared_texts(path: pathlib.Path) -> set[str]:
  """Texts that a file compares values with: by ==, in, match, ..."""
  parts = []
  for node in ast.walk(parse(path)):
    if isinstance(node, ast.Compare):
      parts += [node.left, *node.comparators]
    elif isinstance(node, ast.MatchValue):
      parts.append(node.value)
  return {
    leaf.value
    for part in parts
    for leaf in getattr(part, 'elts', [part])
    if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str)
  }


def branches_on_names() -> dict[str, set[str]]:
  """{module: entries' names that it compares values with}, but its own."""
  registered = registered_names()
  findings = {
    module: {
      text
      for text in compared_texts(path)
      if text in registered and module not in registered[text]
    }
    for module, path in sources(PACKAGE).items()
  }
  return {module: names for module, names in findings.items() if names}


def measure() -> dict[str, int | float]:
  by_module, by_unit = graphs()
  modules = sources(PACKAGE)
  texts = {name: path.read_text() for name, path in modules.items()}
  lines = sorted(len(text.splitlines()) for text in texts.values())
  sizes = [n for text in texts.values() for _, n in functions(ast.parse(text))]
  tests = (ROOT / 'tests').rglob('*.py')
  return {
    'top_level_units': len({name for name in by_unit if '.' not in name}),
    'import_layers': max(layers(by_unit).values()),
    'circles': len(circles(by_module)) + len(circles(by_unit)),
    'files': len(modules),
    'file_median': statistics.median(lines),
    'file_p90': lines[len(lines) * 9 // 10],
    'file_max': lines[-1],
    'functions': len(sizes),
    'function_median': statistics.median(sizes),
    'function_max': max(sizes),
    'package_lines': sum(lines),
    'test_lines': sum(len(path.read_text().splitlines()) for path in tests),
    'duplicate_class_names': len(duplicate_classes()),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--json', action='store_true')
  parser.add_argument(
    '--list', action='store_true', help='layers, circles and double names'
  )
  options = parser.parse_args()
  if options.list:
    by_module, by_unit = graphs()
    by_layer = collections.defaultdict(list)
    for name, level in layers(by_unit).items():
      by_layer[level].append(name)
    for level in sorted(by_layer):
      print(level, *sorted(by_layer[level]))
    for group in circles(by_unit) + circles(by_module):
      print('circle:', *sorted(group))
    for name, files in sorted(duplicate_classes().items()):
      print(f'class {name}:', *files)
    return
  measured = measure()
  if options.json:
    print(json.dumps(measured))
  else:
    for key, value in measured.items():
      print(f'{key:22} {value:,}')


if __name__ == '__main__':
  main()

# SPDX-License-Identifier: Apache-2.0
"""'molora(experts=10, rank=4, router=topk(k=2))' <-> a frozen Spec: syntax.

Nothing here knows which methods exist: `moepeft.peft.method_text` does.
A method is one Spec or several joined by ' + ', which nest at shared sites.
"""

import ast
import dataclasses

from moepeft.core.ranges import shortened

# Characters of a method; real ones have under 200.
_MAX_LENGTH = 10_000

Value = 'int | float | str | bool | None | tuple | Spec'


@dataclasses.dataclass(frozen=True)
class Spec:
  """A name and its options in the order they were written; hashable."""

  name: str
  options: tuple[tuple[str, Value], ...] = ()

  def __str__(self) -> str:
    if not self.options:
      return self.name
    inside = ', '.join(f'{k}={_show(v)}' for k, v in self.options)
    return f'{self.name}({inside})'

  def get(self, key: str, default: Value = None) -> Value:
    return dict(self.options).get(key, default)

  def replace(self, **changes: Value) -> 'Spec':
    """The same Spec with options set; new ones go last."""
    return Spec(self.name, tuple((dict(self.options) | changes).items()))


def parse(text: str) -> Spec:
  """Reads one spec.

  Args:
    text: a name, or a name with keyword options in parentheses; a value is a
      Python literal, a bare word (a string), another spec with parentheses or
      a list of values, which is kept as a tuple.

  Raises:
    ValueError: the text is not of that form.
  """
  specs = parse_method(text)
  if len(specs) != 1:
    raise ValueError(
      f'expected one spec, got {len(specs)} in {shortened(text)}'
    )
  return specs[0]


def parse_method(text: str) -> tuple[Spec, ...]:
  """Reads 'a(...) + b(...)' into its specs; see `parse`."""
  try:
    if len(text) > _MAX_LENGTH:
      raise _error(text)
    tree = ast.parse(text.strip(), mode='eval').body
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    # A MemoryError is how the parser refuses a text that is nested too deeply.
    raise _error(text) from None
  specs = []
  while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
    specs.insert(0, _spec(tree.right, text))
    tree = tree.left
  return (_spec(tree, text), *specs)


def format_method(specs: tuple[Spec, ...]) -> str:
  """The text that `parse_method` reads back to the same specs."""
  return ' + '.join(map(str, specs))


def _spec(node: ast.expr, text: str) -> Spec:
  if isinstance(node, ast.Name):
    return Spec(node.id)
  if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
    raise _error(text)
  if node.args or any(k.arg is None for k in node.keywords):
    raise _error(text)
  options = tuple((k.arg, _value(k.value, text)) for k in node.keywords)
  if len(dict(options)) != len(options):
    raise ValueError(f'an option is given twice in {shortened(text)}; keep one')
  return Spec(node.func.id, options)


def _value(node: ast.expr, text: str) -> Value:
  if isinstance(node, ast.Call):
    return _spec(node, text)
  if isinstance(node, ast.Name):
    return node.id
  if isinstance(node, ast.List | ast.Tuple):
    return tuple(_value(element, text) for element in node.elts)
  try:
    return ast.literal_eval(node)
  except (ValueError, TypeError):  # TypeError: {[]: 1}
    raise _error(text) from None


def _show(value: Value) -> str:
  if isinstance(value, tuple):
    return f'[{", ".join(map(_show, value))}]'
  return str(value) if isinstance(value, Spec) else repr(value)


def _error(text: str) -> ValueError:
  return ValueError(
    f'cannot read the method {shortened(text)}: write it like '
    "'molora(experts=10, rank=4, router=topk(k=2))', options by name, several "
    "methods joined by ' + '"
  )

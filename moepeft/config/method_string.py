# SPDX-License-Identifier: Apache-2.0
"""Parses and formats method strings.

'molora(experts=10, rank=4, router=topk(k=2))' is a `Spec` with a name and
options. A method is one spec, or several joined by ' + ', which nest where they
adapt the same module. `moepeft.peft.method_text` resolves the names.
"""

import ast
import dataclasses

from moepeft.core.ranges import short_repr

# In characters; usual method strings have fewer than 200.
_MAX_LENGTH = 10_000

Value = 'int | float | str | bool | None | tuple | Spec'


@dataclasses.dataclass(frozen=True)
class Spec:
  """A name and its options, in the order of the text; hashable."""

  name: str
  options: tuple[tuple[str, Value], ...] = ()

  def __str__(self) -> str:
    if not self.options:
      return self.name
    options = ', '.join(f'{k}={_format(v)}' for k, v in self.options)
    return f'{self.name}({options})'

  def get(self, key: str, default: Value = None) -> Value:
    return dict(self.options).get(key, default)

  def replace(self, **changes: Value) -> 'Spec':
    """A copy with options set; new options are appended."""
    return Spec(self.name, tuple((dict(self.options) | changes).items()))


def parse(text: str) -> Spec:
  """Parses one spec.

  Args:
    text: a name, or a name with keyword options in parentheses. A value is a
      Python literal, an identifier (a string without quotes), a spec with
      parentheses, or a list of values, which becomes a tuple.

  Raises:
    ValueError: the text has another syntax.
  """
  specs = parse_method(text)
  if len(specs) != 1:
    raise ValueError(
      f'expected one spec, got {len(specs)} in {short_repr(text)}'
    )
  return specs[0]


def parse_method(text: str) -> tuple[Spec, ...]:
  """Parses 'a(...) + b(...)' into its specs; see `parse`."""
  try:
    if len(text) > _MAX_LENGTH:
      raise _syntax_error(text)
    tree = ast.parse(text.strip(), mode='eval').body
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    # The parser raises MemoryError if a text is nested too deeply.
    raise _syntax_error(text) from None
  specs = []
  while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
    specs.insert(0, _parse_spec(tree.right, text))
    tree = tree.left
  return (_parse_spec(tree, text), *specs)


def format_method(specs: tuple[Spec, ...]) -> str:
  """Formats specs as a method string; the inverse of `parse_method`."""
  return ' + '.join(map(str, specs))


def _parse_spec(node: ast.expr, text: str) -> Spec:
  if isinstance(node, ast.Name):
    return Spec(node.id)
  if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
    raise _syntax_error(text)
  if node.args or any(k.arg is None for k in node.keywords):
    raise _syntax_error(text)
  options = tuple((k.arg, _parse_value(k.value, text)) for k in node.keywords)
  if len(dict(options)) != len(options):
    raise ValueError(
      f'an option is given twice in {short_repr(text)}; keep one'
    )
  return Spec(node.func.id, options)


def _parse_value(node: ast.expr, text: str) -> Value:
  if isinstance(node, ast.Call):
    return _parse_spec(node, text)
  if isinstance(node, ast.Name):
    return node.id
  if isinstance(node, ast.List | ast.Tuple):
    return tuple(_parse_value(element, text) for element in node.elts)
  try:
    return ast.literal_eval(node)
  except (ValueError, TypeError):  # TypeError: {[]: 1}
    raise _syntax_error(text) from None


def _format(value: Value) -> str:
  if isinstance(value, tuple):
    return f'[{", ".join(map(_format, value))}]'
  return str(value) if isinstance(value, Spec) else repr(value)


def _syntax_error(text: str) -> ValueError:
  return ValueError(
    f'cannot read the method {short_repr(text)}: write it like '
    "'molora(experts=10, rank=4, router=topk(k=2))', options by name, several "
    "methods joined by ' + '"
  )

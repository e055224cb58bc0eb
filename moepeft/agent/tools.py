# SPDX-License-Identifier: Apache-2.0
"""Tools: typed Python functions with strict schemas that a model can call.

In a strict schema of OpenAI's API, all properties of an object are required,
and no others are allowed.
"""

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any

import openai
import pydantic
import pydantic_core

# Function names that the API allows.
NAME = re.compile(r'[a-zA-Z0-9_-]{1,64}')
_TYPE_KEYWORDS = {'type', 'enum', 'const', '$ref', 'anyOf', 'oneOf', 'allOf'}


@dataclasses.dataclass(frozen=True)
class Tool:
  """A function that a model may call.

  Attributes:
    name, description: for the model.
    schema: the strict JSON schema of the arguments.
    run: arguments as JSON text -> text for the model.
    seconds: the time limit of a call; None for the default limit.
    trusted: whether the output may have instructions, as of the user's skills;
      other outputs are data.
  """

  name: str
  description: str
  schema: Mapping[str, Any]
  run: Callable[[str], str]
  seconds: float | None = None
  trusted: bool = False

  def declared(self) -> dict[str, Any]:
    """The tool in the form of a chat completion request.

    It is declared as strict where its schema is, as tools of other programs
    have any schemas.
    """
    function = {
      'name': self.name,
      'description': self.description,
      'parameters': dict(self.schema),
      'strict': _is_strict(self.schema),
    }
    return {'type': 'function', 'function': function}


class InvalidArguments(ValueError):
  """The arguments of a call are invalid; the message is for the model."""


def make_tool(
  function: Callable[..., Any],
  seconds: float | None = None,
  trusted: bool = False,
) -> Tool:
  """Makes a tool from a function with typed arguments.

  Args:
    function: the model sees the start and the `Args:` of its docstring.
    seconds: the time limit of a call; None for the default limit.
    trusted: whether the output may have instructions for the model.

  Raises:
    ValueError: the signature has no strict schema.
  """
  name = function.__name__
  if not NAME.fullmatch(name):
    raise ValueError(
      f'the name of a tool has up to 64 letters, digits, _ or -; got {name!r}'
    )
  description, notes = _parse_docstring(inspect.getdoc(function) or '')
  arguments_model = _arguments_model(function, name, notes)

  def run(text: str) -> str:
    try:
      arguments = arguments_model.model_validate_json(text or '{}')
    except pydantic.ValidationError as e:
      raise InvalidArguments(
        f'the arguments do not fit: {validation_message(e)}'
      ) from None
    result = function(
      **{key: getattr(arguments, key) for key in arguments_model.model_fields}
    )
    if isinstance(result, str):
      return result
    return pydantic_core.to_json(result, fallback=str).decode()

  return Tool(
    name,
    description,
    strict_schema(arguments_model, name),
    run,
    seconds,
    trusted,
  )


def _parse_docstring(text: str) -> tuple[str, dict[str, str]]:
  """(description, {argument: description}) of a docstring."""
  description, _, rest = text.partition('\nArgs:\n')
  description = re.split(r'\n(?:Returns?|Raises?):\n', description)[0].strip()
  rest = re.split(r'\n(?=\S)', rest)[0]
  indent = re.match(' *', rest)[0]
  documented_arguments = re.findall(
    rf'^{indent}(\w+)(?: \([^)]*\))?:(.*(?:\n{indent} +.*)*)', rest, re.M
  )
  return description, {
    key: ' '.join(note.split()) for key, note in documented_arguments
  }


def _arguments_model(
  function: Callable, name: str, notes: dict[str, str]
) -> type[pydantic.BaseModel]:
  """A pydantic model with a field for each argument."""
  hints = typing.get_type_hints(function, include_extras=True)
  fields: dict[str, Any] = {}
  for key, parameter in inspect.signature(function).parameters.items():
    if parameter.kind not in (
      parameter.POSITIONAL_OR_KEYWORD,
      parameter.KEYWORD_ONLY,
    ):
      raise ValueError(
        f'the tool {name} takes {parameter}; give each argument a name'
      )
    if key not in hints:
      raise ValueError(
        f'the argument {key} of the tool {name} has no type; annotate it'
      )
    note, default = notes.pop(key, ''), parameter.default
    if default is parameter.empty:
      default = ...
    elif default is not None:
      # A strict schema has no defaults.
      default_text = pydantic_core.to_json(default, fallback=str).decode()
      note = f'{note} By default {default_text}.'.strip()
    fields[key] = hints[key], pydantic.Field(default, description=note or None)
  if notes:
    raise ValueError(
      f'the docstring of the tool {name} describes {min(notes)!r}, which it '
      'does not take'
    )
  model_config = pydantic.ConfigDict(extra='forbid')
  return pydantic.create_model(name, __config__=model_config, **fields)


def strict_schema(
  model: type[pydantic.BaseModel], subject: str
) -> dict[str, Any]:
  """The strict JSON schema of a pydantic model.

  Args:
    subject: the name of the model in errors.

  Raises:
    ValueError: an object has arbitrary keys, or a value an arbitrary type.
  """
  schema = openai.pydantic_function_tool(model)['function']['parameters']
  _check_strict(schema, subject)
  return schema


def _check_strict(node: dict[str, Any], subject: str) -> None:
  # The API refuses defaults, which the client does not remove.
  node.pop('default', None)
  has_free_keys = node.get('additionalProperties', False) is not False
  is_untyped = node.get('type') == 'array' and 'items' not in node
  if has_free_keys or is_untyped or not _TYPE_KEYWORDS & set(node):
    raise ValueError(
      f'{subject} has a value without one type (Any, a tuple or a dict); a '
      'strict schema needs lists, dataclasses or pydantic models'
    )
  parts = [part for kind in ('anyOf', 'oneOf') for part in node.get(kind, ())]
  for key in ('properties', '$defs'):
    parts += node.get(key, {}).values()
  for part in [*parts, *([node['items']] if 'items' in node else [])]:
    _check_strict(part, subject)


def _is_strict(node: Any) -> bool:
  """Whether all objects in a schema have their properties, and no others."""
  if isinstance(node, list):
    return all(map(_is_strict, node))
  if not isinstance(node, Mapping):
    return True
  kind = node.get('type')
  if kind == 'object' or (isinstance(kind, list) and 'object' in kind):
    required = set(node.get('required', ()))
    if node.get('additionalProperties') is not False or (
      required != set(node.get('properties', ()))
    ):
      return False
  return all(map(_is_strict, node.values()))


def validation_message(error: pydantic.ValidationError) -> str:
  """A pydantic validation error as one line."""
  # The keys are from the model, so their length and number are limited.
  items = error.errors(include_url=False)
  parts = [
    f'{".".join(map(str, item["loc"]))[:200] or "it"}: {item["msg"]}'
    for item in items[:10]
  ]
  return '; '.join([*parts, *(['...'] if len(items) > 10 else [])])

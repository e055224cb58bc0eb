# SPDX-License-Identifier: Apache-2.0
"""Tools: typed Python functions as a model calls them, with strict schemas.

A schema is strict in the sense of OpenAI's API: of every object all properties
are required and no others are allowed. What a function has a default for may
be null instead, and then is the default.
"""

import asyncio
import dataclasses
import inspect
import json
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any

import pydantic

from moepeft.agent.schemas import strict, without_nulls

# What the API allows as a function's name.
_NAME = re.compile(r'[a-zA-Z0-9_-]{1,64}')
_ARGUMENT = re.compile(r'^(\s*)(\w+)(?: \([^)]*\))?:\s*(.*)$')
_SECTION = re.compile(r'^(Returns?|Raises?|Yields?|Examples?|Notes?|Source):')


@dataclasses.dataclass(frozen=True)
class Tool:
  """A function that a model may call.

  Attributes:
    name, description: what the model is told.
    schema: strict JSON schema of its arguments.
    run: takes the arguments as JSON text and the seconds that it has, answers
      with text for the model.
    seconds: that a call may take; None for the limit of all tools.
    trusted: whether what it returns are instructions (of the user's own
      skills); of any other it is data.
  """

  name: str
  description: str
  schema: Mapping[str, Any]
  run: Callable[[str, float], str]
  seconds: float | None = None
  trusted: bool = False

  def declared(self) -> dict[str, Any]:
    """The tool as a request to chat completions names it."""
    return {
      'type': 'function',
      'function': {
        'name': self.name,
        'description': self.description,
        'parameters': dict(self.schema),
        'strict': True,
      },
    }


class Invalid(ValueError):
  """Arguments that do not fit; the sentence is for the model."""


def tool(
  function: Callable[..., Any],
  name: str = '',
  seconds: float | None = None,
  trusted: bool = False,
) -> Tool:
  """A tool from a function, sync or async, with a type for each argument.

  Args:
    function: its docstring's beginning and `Args:` are what the model reads.
    name: instead of the function's own.
    seconds: that a call may take, where it is not the limit of all tools.
    trusted: whether the model may follow what it returns.

  Raises:
    ValueError: no strict schema can be made of its signature.
  """
  name = name or function.__name__
  if not _NAME.fullmatch(name):
    raise ValueError(
      f'a tool is named by up to 64 letters, digits, _ or -; got {name!r}'
    )
  about, notes = _documented(inspect.getdoc(function) or '')
  arguments = _arguments(function, name, notes)
  loose = arguments.model_json_schema()

  def run(text: str, limit: float) -> str:
    values = _validated(arguments, loose, text)
    result = function(**values)
    if inspect.isawaitable(result):
      # Of an async function a call that is late can be ended.
      result = asyncio.run(asyncio.wait_for(result, limit))
    return shown(result)

  schema = strict(loose, f'the tool {name}')
  return Tool(name, about, schema, run, seconds, trusted)


def shown(result: Any) -> str:
  """A result as text: text itself, anything else as JSON."""
  if isinstance(result, str):
    return result
  if isinstance(result, pydantic.BaseModel):
    return result.model_dump_json()
  if dataclasses.is_dataclass(result) and not isinstance(result, type):
    result = dataclasses.asdict(result)
  return json.dumps(result, ensure_ascii=False, default=str)


def _documented(text: str) -> tuple[str, dict[str, str]]:
  """A docstring's beginning, and {argument: what} of its `Args:`."""
  about, _, rest = text.partition('\nArgs:\n')
  about = re.split(r'\n(?=Returns?:|Raises?:)', about)[0]
  notes, indent, last = {}, None, ''
  for line in rest.splitlines():
    if _SECTION.match(line):
      break
    found = _ARGUMENT.match(line)
    if found and indent in (None, len(found[1])):
      indent, last = len(found[1]), found[2]
      notes[last] = found[3]
    elif last and line.strip():
      notes[last] = f'{notes[last]} {line.strip()}'.strip()
  return about.strip(), notes


def _arguments(
  function: Callable, name: str, notes: Mapping[str, str]
) -> type[pydantic.BaseModel]:
  """A pydantic model with a field for each argument."""
  hints = typing.get_type_hints(function, include_extras=True)
  fields: dict[str, Any] = {}
  for key, parameter in inspect.signature(function).parameters.items():
    if parameter.kind in (
      parameter.VAR_POSITIONAL,
      parameter.VAR_KEYWORD,
      parameter.POSITIONAL_ONLY,
    ):
      raise ValueError(
        f'the tool {name} takes {parameter}; give each argument a name'
      )
    if key not in hints:
      raise ValueError(
        f'the argument {key} of the tool {name} has no type; annotate it'
      )
    empty = parameter.default is parameter.empty
    fields[key] = (
      hints[key],
      pydantic.Field(
        ... if empty else parameter.default, description=notes.get(key)
      ),
    )
  if unknown := sorted(set(notes) - set(fields)):
    raise ValueError(
      f'the docstring of the tool {name} describes {unknown[0]!r}, which it '
      'does not take'
    )
  form = pydantic.ConfigDict(extra='forbid')
  return pydantic.create_model(name, __config__=form, **fields)


def _validated(
  arguments: type[pydantic.BaseModel], schema: Mapping[str, Any], text: str
) -> dict[str, Any]:
  try:
    values = json.loads(text or '{}')
  except ValueError as e:
    raise Invalid(f'the arguments are not JSON: {e}') from None
  if not isinstance(values, dict):
    raise Invalid('the arguments are not a JSON object')
  values = without_nulls(values, schema, schema.get('$defs', {}))
  try:
    made = arguments.model_validate(values)
  except pydantic.ValidationError as e:
    raise Invalid(f'the arguments do not fit: {reasons(e)}') from None
  return {key: getattr(made, key) for key in type(made).model_fields}


def reasons(error: pydantic.ValidationError) -> str:
  """What does not fit where, in a line."""
  found = [
    f'{".".join(map(str, item["loc"])) or "it"}: {item["msg"]}'
    for item in error.errors(include_url=False)
  ]
  return '; '.join(found)

# SPDX-License-Identifier: Apache-2.0
"""Renders raw rows to inputs and targets with promptsource's templates.

A `templates.yaml` holds the templates of one dataset. A template is a Jinja
text in which `|||` separates inputs and targets. The syntax follows
promptsource 0.2.3 (arXiv:2202.01279): its filters `choice` and
`most_frequent`, its function `zip`, values truncated to 2,048 characters, and
`_` for a hyphen in a column's name. This module departs from it in five points:
- Jinja runs in its sandbox.
- `choice` and Jinja's `random` are seeded with (seed, dataset, template, row),
  so that a row is the same at every rendering.
- A missing column or element is an error, not an empty text.
- Printing a null is an error, and does not print 'None'.
- A printed value is truncated as a whole; promptsource truncates the last
  operand of the expression.
"""

import collections
import dataclasses
import functools
import os
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jinja2
import yaml
from jinja2.filters import do_truncate
from jinja2.sandbox import SandboxedEnvironment, SecurityError

from moepeft.core import files as core_files
from moepeft.core import untrusted
from moepeft.data import example as example_lib
from moepeft.data import fingerprint
from moepeft.data.example import BadRow, BadRows, ExampleRows
from moepeft.tasks import Example

SEPARATOR = '|||'
# Replaces the separator while a template is rendered, so that `|||` in a row's
# text is no separator.
MARK = '\x1emoepeft\x1e'
# The variable with the `SeededChoice`; a space, so that no template can use it.
RANDOM = ' random'


class SeededChoice:
  """The random generator of one rendering."""

  def __init__(self, key: str):
    self._key = key
    self._random = None

  def choice(self, items: Sequence) -> Any:
    if self._random is None:
      # Seeding takes longer than rendering, and most templates draw nothing.
      self._random = random.Random(self._key)
    return self._random.choice(items)


@jinja2.pass_context
def _choice(context: jinja2.runtime.Context, items: Sequence) -> Any:
  return context.resolve(RANDOM).choice(items)


def _most_frequent(items: Sequence) -> list | None:
  """All items with the highest count; None without items."""
  counts = collections.Counter(items)
  highest = max(counts.values(), default=0)
  return [i for i, count in counts.items() if count == highest] or None


@functools.cache
def _environment(max_length: int) -> SandboxedEnvironment:
  """A Jinja environment with promptsource's filters; see `compile_template`."""

  @jinja2.pass_environment
  def format_value(environment: jinja2.Environment, value: Any) -> str:
    if value is None:
      raise jinja2.UndefinedError('a null has no text to print')
    text = str(value)
    return do_truncate(environment, text, max_length) if max_length else text

  environment = SandboxedEnvironment(
    undefined=jinja2.StrictUndefined, finalize=format_value
  )
  environment.globals['zip'] = zip
  # Jinja's `random` and `lipsum` use Python's global generator.
  environment.filters['choice'] = environment.filters['random'] = _choice
  del environment.globals['lipsum']
  environment.filters['most_frequent'] = _most_frequent
  return environment


@functools.lru_cache(maxsize=4096)
def compile_template(text: str, max_length: int) -> jinja2.Template:
  """Compiles a Jinja text, with `MARK` for each `|||`.

  Args:
    max_length: printed values are truncated to so many characters; 0 for no
      truncation.

  Raises:
    jinja2.TemplateError: the text is not Jinja.
  """
  return _environment(max_length).from_string(text.replace(SEPARATOR, MARK))


# promptsource's: 300 words of 4.7 characters, with their spaces, rounded up.
_MAX_VALUE_LENGTH = 2048


@dataclasses.dataclass(frozen=True)
class PromptTemplate:
  """One prompt of a dataset.

  Attributes:
    name: P3's spelling, see `p3_name`.
    jinja: the text of inputs and targets, with `|||` between them.
    answer_choices: a text that renders to the choices, with `|||` between
      them; '' for open-ended answers.
    original: whether the prompt asks for the dataset's original task; None if
      the file does not say.
  """

  name: str
  jinja: str
  answer_choices: str = ''
  original: bool | None = None


@dataclasses.dataclass(frozen=True)
class TemplateGroup:
  """The templates of one dataset, in the order of their names.

  Attributes:
    task: the dataset and its subset in P3's spelling, 'glue_mrpc'.
    templates: at least one.
    path: the file.
  """

  task: str
  templates: tuple[PromptTemplate, ...]
  path: str

  @property
  def original(self) -> frozenset[tuple[str, str]]:
    """(dataset, template) of the prompts for the original task."""
    return frozenset((self.task, t.name) for t in self.templates if t.original)


def p3_name(text: str) -> str:
  """P3's spelling of a name: `_` for all but letters, digits, `_` and `.`."""
  return re.sub(r'[^\w.]+', '_', text)


class _Loader(getattr(yaml, 'CSafeLoader', yaml.SafeLoader)):
  """Safe YAML that reads promptsource's tags as plain mappings."""


for _tag in ('!TemplateGroup', '!Template', '!TemplateMetadata'):
  _Loader.add_constructor(
    _tag, lambda loader, node: loader.construct_mapping(node, deep=True)
  )


def read_templates(path: str) -> TemplateGroup:
  """Reads the templates of one file.

  Raises:
    ValueError: the file is missing or has another format; the message names
      the file and the template.
  """
  try:
    tree = untrusted.parse_yaml(core_files.read_text(path), _Loader)
  except (OSError, UnicodeDecodeError, untrusted.Malformed) as e:
    reason = ' '.join(str(e).split())
    raise ValueError(
      f'{path} cannot be read as a templates.yaml: {reason}'
    ) from None
  by_key = tree.get('templates') if isinstance(tree, dict) else None
  if not isinstance(by_key, dict) or not by_key or not tree.get('dataset'):
    raise ValueError(
      f"{path}: expected a mapping with 'dataset' and 'templates' (names or "
      'ids, each with a !Template), as in promptsource'
    )
  templates = [_parse_template(path, *item) for item in by_key.items()]
  counts = collections.Counter(t.name for t in templates)
  duplicates = [name for name, count in counts.items() if count > 1]
  if duplicates:
    raise ValueError(
      f'{path}: {counts[duplicates[0]]} templates have the name '
      f'{duplicates[0]!r}; give each another name'
    )
  parts = [str(tree[k]) for k in ('dataset', 'subset') if tree.get(k)]
  ordered = tuple(sorted(templates, key=lambda t: t.name))
  return TemplateGroup(p3_name('_'.join(parts)), ordered, path)


def _parse_template(path: str, key: str, fields: Any) -> PromptTemplate:
  if not isinstance(fields, dict):
    raise ValueError(f'{path}: expected a !Template at {key!r}; got {fields!r}')
  name = str(fields.get('name') or key)
  where = f'{path}, template {name!r}'
  jinja, choices = fields.get('jinja'), fields.get('answer_choices')
  choices = '' if choices is None else choices
  for field, text in (('jinja', jinja), ('answer_choices', choices)):
    if not isinstance(text, str):
      raise ValueError(f'{where}: expected text in {field!r}; got {text!r}')
    try:
      compile_template(text, 0)
    # Jinja generates Python code, whose compiler raises errors of its own.
    except Exception as e:
      reason = ' '.join(str(e).split()) or type(e).__name__
      raise ValueError(f'{where}: {field!r} is not Jinja ({reason})') from None
  if SEPARATOR not in jinja:
    raise ValueError(
      f'{where}: expected {SEPARATOR!r} between inputs and targets; got none'
    )
  metadata = fields.get('metadata') or {}
  original = metadata.get('original_task') if hasattr(metadata, 'get') else None
  return PromptTemplate(p3_name(name), jinja, choices, original)


def find_templates(path: str, name: str) -> TemplateGroup:
  """Reads the templates of a file, or of a dataset in a directory of them.

  Args:
    path: a templates.yaml; a directory that contains one, at any depth; or
      promptsource's whole `templates`.
    name: the dataset, 'glue/mrpc' or 'glue_mrpc'; used if a directory contains
      several files.

  Raises:
    ValueError: there are no templates, or none for this dataset.
  """
  path = core_files.local_path(path)
  core_files.check_file(path)
  if os.path.isfile(path):
    return read_templates(path)
  file = os.path.join(path, name, 'templates.yaml')
  if name and os.path.isfile(file):
    return read_templates(file)
  files = (
    fingerprint.list_directory(
      path, fingerprint.TEMPLATE_FILES.endings, deep=True
    ).files
    if os.path.isdir(path)
    else ()
  )
  if len(files) == 1:
    return read_templates(files[0])
  groups = [read_templates(file) for file in files]
  matching = [g for g in groups if g.task == p3_name(name)]
  if len(matching) != 1:
    names = ', '.join(g.task for g in groups[:9]) or 'none'
    raise ValueError(
      f'{path!r} has {len(matching)} sets of templates for {p3_name(name)!r} '
      f'(it has: {names}); name one templates.yaml'
    )
  return matching[0]


def render_templates(
  templates: TemplateGroup,
  table: Sequence[Mapping],
  bad: BadRows,
  row_location: Callable[[int], str] = 'row {}'.format,
  seed: int = 0,
) -> ExampleRows:
  """Renders each row with all templates, row by row.

  This call renders every example once, to find the templates that apply to
  each row and to check that none fails. `example.LazyExamples` renders an
  example again on access.

  Args:
    templates: the templates of the rows' dataset.
    table: raw rows.
    bad: called with the rows on which a template fails. A template that fails
      on every row is an error in any case.
    row_location: row index -> the row's file and line, for messages.
    seed: the seed of the filter `choice`.

  Raises:
    ValueError: there is no example, a template is unsafe or does not render
      two parts, or `bad` raises; the message names the template and the row.
  """
  example_fns = tuple(
    functools.partial(apply_template, t, templates.task, seed)
    for t in templates.templates
  )
  return example_lib.lazy_examples(
    templates.path, table, example_fns, row_location, bad
  )


def apply_template(
  template: PromptTemplate, task: str, seed: int, row: Mapping, index: int
) -> Example | None:
  """Renders one row with one template.

  Returns:
    An example whose `idx` is the row's index, with choices and label if the
    targets are one of the choices. None if the template renders no inputs or
    no targets, so does not apply to this row.

  Raises:
    BadRow: the template fails on this row.
    ValueError: the template is unsafe, or does not render two parts.
  """
  label = f'template {template.name!r} of {task}'
  # The templates share a row, and Jinja may change it.
  fields = {k.replace('-', '_'): _copy(v) for k, v in row.items()}
  fields[RANDOM] = SeededChoice(f'{seed} {task} {template.name} {index}')
  fields['answer_choices'] = choices = None
  if template.answer_choices:
    choices = _render(
      label, compile_template(template.answer_choices, 0), fields
    )
    fields['answer_choices'] = choices
  parts = _render(
    label, compile_template(template.jinja, _MAX_VALUE_LENGTH), fields
  )
  if len(parts) != 2 and any(parts):
    raise ValueError(
      f'{label} renders {len(parts)} part{"s" * (len(parts) > 1)}; expected '
      f'inputs {SEPARATOR} targets'
    )
  if not all(parts):
    return None
  inputs, targets = parts
  if (
    not choices
    or targets not in choices
    or not example_lib.has_distinct_choices(choices)
  ):
    choices = []
  answer = choices.index(targets) if choices else -1
  embedding = example_lib.parse_embedding(row.get('embedding'))
  return Example(
    task,
    template.name,
    index,
    inputs,
    targets,
    tuple(choices),
    answer,
    embedding,
  )


def _render(label: str, template: jinja2.Template, fields: dict) -> list[str]:
  """Renders a template to the texts between the separators, stripped."""
  try:
    text = template.render(fields)
  except SecurityError as e:
    raise ValueError(
      f'{label} is unsafe: {e} Templates may only read the columns of a row'
    ) from None
  # The code in a template may raise any exception.
  except Exception as e:
    columns = ', '.join(
      k for k in fields if k not in (RANDOM, 'answer_choices')
    )
    raise BadRow(
      f'{label} fails ({str(e) or type(e).__name__}; columns: {columns}); mend '
      'the template or the row'
    ) from None
  return [part.strip() for part in text.split(MARK)]


def _copy(value: Any) -> Any:
  if isinstance(value, list):
    return [_copy(v) for v in value]
  if isinstance(value, dict):
    return {k: _copy(v) for k, v in value.items()}
  return value


def original_prompts(path: str, names: Iterable[str]) -> set[tuple[str, str]]:
  """(dataset, template) of the prompts for the datasets' original tasks."""
  groups = [find_templates(path, name) for name in sorted(names) if path]
  return {pair for group in groups for pair in group.original}

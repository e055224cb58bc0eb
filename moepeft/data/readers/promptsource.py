# SPDX-License-Identifier: Apache-2.0
"""Templates in promptsource's form: raw rows in, inputs and targets out.

A `templates.yaml` holds the templates of one dataset; a template is a text in
Jinja whose `|||` stands between inputs and targets. Form and meaning follow
promptsource 0.2.3 (arXiv:2202.01279): its filters `choice` and
`most_frequent`, its function `zip`, values cut to 2,048 characters, a hyphen
in a column's name read as `_`. It departs from promptsource in five things:
Jinja runs in its sandbox; `choice` and Jinja's `random` draw from (seed,
dataset, template, row), so that a row is the same at every rendering; a column
or element that is not there is an error, not an empty text; a null that is
printed is one, not 'None'; and a value is cut as a whole, where promptsource
cuts the last operand of the expression that prints it.
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
# What stands for it while a template is rendered, so that the separator in a
# row's own text separates nothing.
MARK = '\x1emoepeft\x1e'
# The variable that `choice` draws from; no template can spell this name.
DICE = ' dice'


class SeededChoice:
  """The random generator of one rendering's choices."""

  def __init__(self, key: str):
    self._key = key
    self._random = None

  def choice(self, items: Sequence) -> Any:
    if self._random is None:
      # Made here: most templates draw nothing, and seeding takes longer than
      # rendering.
      self._random = random.Random(self._key)
    return self._random.choice(items)


@jinja2.pass_context
def _choice(context: jinja2.runtime.Context, items: Sequence) -> Any:
  return context.resolve(DICE).choice(items)


def _most_frequent(items: Sequence) -> list | None:
  """All items that occur as often as the one that occurs most."""
  counts = collections.Counter(items)
  most = max(counts.values(), default=0)
  return [i for i, count in counts.items() if count == most] or None


@functools.cache
def _environment(longest: int) -> SandboxedEnvironment:
  """Jinja with promptsource's words; values longer than this are cut."""

  @jinja2.pass_environment
  def printed(environment: jinja2.Environment, value: Any) -> str:
    if value is None:
      raise jinja2.UndefinedError('a null has no text to print')
    text = str(value)
    return do_truncate(environment, text, longest) if longest else text

  environment = SandboxedEnvironment(
    undefined=jinja2.StrictUndefined, finalize=printed
  )
  environment.globals['zip'] = zip
  # Jinja's own `random` and `lipsum` draw from what no seed of ours sets.
  environment.filters['choice'] = environment.filters['random'] = _choice
  del environment.globals['lipsum']
  environment.filters['most_frequent'] = _most_frequent
  return environment


@functools.lru_cache(maxsize=4096)
def compile_template(text: str, longest: int) -> jinja2.Template:
  """A text as a program whose rendering has `MARK` where it has `|||`.

  Args:
    text: in Jinja.
    longest: characters that a printed value is cut to; 0 for no end.

  Raises:
    jinja2.TemplateError: it is not Jinja.
  """
  return _environment(longest).from_string(text.replace(SEPARATOR, MARK))


# promptsource: 300 words of 4.7 characters and their spaces.
_LONGEST = 2048


@dataclasses.dataclass(frozen=True)
class PromptTemplate:
  """One prompt of a dataset.

  Attributes:
    name: as P3 spells it, see `clean`.
    jinja: the text of inputs and targets, with `|||` between them.
    answer_choices: a text that renders to the choices, with `|||` between
      them; '' where answers are open.
    original: whether it asks for what the dataset was made for; None where
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
    task: the dataset and its subset as P3 spells them, 'glue_mrpc'.
    templates: at least one.
    path: the file.
  """

  task: str
  templates: tuple[PromptTemplate, ...]
  path: str

  @property
  def original(self) -> frozenset[tuple[str, str]]:
    """(dataset, template) of those that ask for the original task."""
    return frozenset((self.task, t.name) for t in self.templates if t.original)


def p3_name(text: str) -> str:
  """A name as P3 spells it: other characters than word, digit, `.` are `_`."""
  return re.sub(r'[^\w.]+', '_', text)


class _Loader(getattr(yaml, 'CSafeLoader', yaml.SafeLoader)):
  """Plain YAML plus promptsource's tags, which make plain mappings here."""


for _tag in ('!TemplateGroup', '!Template', '!TemplateMetadata'):
  _Loader.add_constructor(
    _tag, lambda loader, node: loader.construct_mapping(node, deep=True)
  )


def read_templates(path: str) -> TemplateGroup:
  """The templates of one file.

  Raises:
    ValueError: no such file, or not of the form; the message names the file
      and the template.
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
      'ids, each with a !Template), as promptsource writes it'
    )
  templates = [_template(path, key, fields) for key, fields in by_key.items()]
  counts = collections.Counter(t.name for t in templates)
  twice = [name for name, count in counts.items() if count > 1]
  if twice:
    raise ValueError(
      f'{path}: {twice[0]!r} names {counts[twice[0]]} templates; give each a '
      'name of its own'
    )
  parts = [str(tree[k]) for k in ('dataset', 'subset') if tree.get(k)]
  ordered = tuple(sorted(templates, key=lambda t: t.name))
  return TemplateGroup(p3_name('_'.join(parts)), ordered, path)


def _template(path: str, key: str, fields: Any) -> PromptTemplate:
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
    # Jinja writes Python, whose compiler has bounds of its own.
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
  """The templates of a file, or those for a dataset in a directory of them.

  Args:
    path: a templates.yaml; a directory that holds one, anywhere below; or
      promptsource's whole `templates`.
    name: the dataset, 'glue/mrpc' or 'glue_mrpc', which chooses where a
      directory holds several.

  Raises:
    ValueError: none there, or none for this dataset.
  """
  path = core_files.local_path(path)
  core_files.check_file(path)
  if os.path.isfile(path):
    return read_templates(path)
  inside = os.path.join(path, name, 'templates.yaml')
  if name and os.path.isfile(inside):
    return read_templates(inside)
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
      f'{path!r} holds {len(matching)} sets of templates for {p3_name(name)!r} '
      f'(there: {names}); name one templates.yaml'
    )
  return matching[0]


def render_templates(
  templates: TemplateGroup,
  table: Sequence[Mapping],
  bad: BadRows,
  where: Callable[[int], str] = 'row {}'.format,
  seed: int = 0,
) -> ExampleRows:
  """Examples of all templates of each row, row by row.

  Each is rendered once here, to find the pairs that apply and to check that
  none fails, and again on access (`example.LazyExamples`).

  Args:
    templates: the templates of the rows' dataset.
    table: raw rows.
    bad: called with the rows on which a template fails. A template that fails
      on every row is an error in any case.
    where: row index -> the row's file and line, for messages.
    seed: of the filter `choice`, which draws at random.

  Raises:
    ValueError: there is no example, a template is unsafe, its text has not
      two parts, or `bad` raises; the message names the template and the row.
  """
  example_fns = tuple(
    functools.partial(apply_template, t, templates.task, seed)
    for t in templates.templates
  )
  return example_lib.lazy_examples(
    templates.path, table, example_fns, where, bad
  )


def apply_template(
  template: PromptTemplate, task: str, seed: int, row: Mapping, place: int
) -> Example | None:
  """One row in the words of one template.

  Returns:
    An example whose `idx` is the row's place; choices and label are filled
    where the targets are one of the choices. None where the template renders
    no inputs or no targets: it does not apply to this row.

  Raises:
    BadRow: the template fails on this row.
    ValueError: the template is unsafe, or its text has not two parts.
  """
  where = f'template {template.name!r} of {task}'
  # Rows of a list are shared by the templates, and Jinja may change them.
  fields = {k.replace('-', '_'): _copy(v) for k, v in row.items()}
  fields[DICE] = SeededChoice(f'{seed} {task} {template.name} {place}')
  fields['answer_choices'] = choices = None
  if template.answer_choices:
    choices = _parts(
      where, compile_template(template.answer_choices, 0), fields
    )
    fields['answer_choices'] = choices
  parts = _parts(where, compile_template(template.jinja, _LONGEST), fields)
  if len(parts) != 2 and any(parts):
    raise ValueError(
      f'{where} renders {len(parts)} part{"s" * (len(parts) > 1)}; expected '
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
  label = choices.index(targets) if choices else -1
  return Example(
    task, template.name, place, inputs, targets, tuple(choices), label
  )


def _parts(where: str, program: jinja2.Template, fields: dict) -> list[str]:
  """The texts between the separators, stripped."""
  try:
    text = program.render(fields)
  except SecurityError as e:
    raise ValueError(
      f'{where} is unsafe: {e} Templates may only read the columns of a row'
    ) from None
  # A template is a program: there is no list of what it may raise.
  except Exception as e:
    columns = ', '.join(k for k in fields if k not in (DICE, 'answer_choices'))
    raise BadRow(
      f'{where} fails ({str(e) or type(e).__name__}; columns: {columns}); mend '
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
  """(dataset, template) of those that ask for the dataset's own task."""
  groups = [find_templates(path, name) for name in sorted(names) if path]
  return {pair for group in groups for pair in group.original}

# SPDX-License-Identifier: Apache-2.0
"""Skills in the open SKILL.md form: instructions that are loaded when needed.

A skill is a directory with a SKILL.md: YAML between two lines of ---, then
instructions. A model sees it in three steps: its name and description in the
system prompt, its instructions by load_skill, then files beside them by
read_skill_file, and scripts, of which only the output enters the context, by
run_skill_script. Form: agentskills.io/specification.
"""

import dataclasses
import os
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from moepeft.agent.programs import Bounds, watched
from moepeft.agent.tools import Tool, tool

FILE = 'SKILL.md'
OWN = pathlib.Path(__file__).parent / 'skills'
_NAME = re.compile(r'[a-z0-9]+(-[a-z0-9]+)*')
_LENGTHS = {'name': 64, 'description': 1024, 'compatibility': 500}
# Of a file that is shown to a model.
_LARGEST = 1 << 20
_SECRET = re.compile(r'KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL', re.I)
_ADVICE = """\
You have skills: instructions for particular kinds of work. When a question is \
of such a kind, first call load_skill with the skill's name, then do what it \
says. The skills:
{}"""


@dataclasses.dataclass(frozen=True)
class Skill:
  """A directory with a valid SKILL.md.

  Attributes:
    name: of the skill and of its directory.
    description: what it does and when to use it; at most 1,024 characters.
    body: the instructions, Markdown.
    path: the directory.
    license, compatibility, allowed_tools, metadata: what the front matter says;
      for people, nothing here acts on it.
  """

  name: str
  description: str
  body: str
  path: pathlib.Path
  license: str = ''
  compatibility: str = ''
  allowed_tools: str = ''
  metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def files(self) -> list[str]:
    """Paths of what lies beside SKILL.md, links and hidden files aside."""
    found = []
    for folder, names, files in os.walk(self.path):
      names[:] = [n for n in sorted(names) if not n.startswith(('.', '__'))]
      for name in sorted(files):
        path = pathlib.Path(folder, name)
        if not name.startswith('.') and not path.is_symlink():
          found.append(path.relative_to(self.path).as_posix())
    return [path for path in found if path != FILE]


def read(path: str | os.PathLike) -> Skill:
  """A skill from its directory.

  Raises:
    ValueError: it is none; a sentence that says what to mend.
  """
  path = pathlib.Path(path)
  file = path / FILE
  if not file.is_file():
    raise ValueError(f'the skill {path} has no {FILE}; write one')
  try:
    text = file.read_text(encoding='utf-8-sig')
  except UnicodeDecodeError:
    raise ValueError(f'{file} is not UTF-8; save it as that') from None
  fields, body = _split(text, file)
  _check(fields, file, path.resolve().name)
  return Skill(
    fields['name'],
    fields['description'].strip(),
    body.strip(),
    path.resolve(),
    fields.get('license') or '',
    fields.get('compatibility') or '',
    fields.get('allowed-tools') or '',
    fields.get('metadata') or {},
  )


def find(folders: Sequence[str | os.PathLike]) -> dict[str, Skill]:
  """{name: skill} of all skills in some directories, or that these are.

  Raises:
    ValueError: one is not valid, or two have one name.
  """
  found: dict[str, Skill] = {}
  for folder in map(pathlib.Path, folders):
    if not folder.is_dir():
      raise ValueError(
        f'the directory of skills {str(folder)!r} does not exist'
      )
    for path in [folder] if (folder / FILE).exists() else _within(folder):
      skill = read(path)
      if skill.name in found:
        raise ValueError(
          f'two skills are named {skill.name!r}: {found[skill.name].path} and '
          f'{skill.path}; rename one'
        )
      found[skill.name] = skill
  return found


def _within(folder: pathlib.Path) -> list[pathlib.Path]:
  return [
    path
    for path in sorted(folder.iterdir())
    if path.is_dir() and not path.name.startswith(('.', '__'))
  ]


def _split(text: str, file: pathlib.Path) -> tuple[dict[str, Any], str]:
  found = re.match(
    r'---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)', text, re.S | re.M
  )
  if not found:
    raise ValueError(
      f'{file} has no front matter; begin it with a line ---, then name and '
      'description, then another line ---'
    )
  try:
    fields = yaml.safe_load(found[1])
  except yaml.YAMLError as e:
    where = getattr(e, 'problem_mark', None)
    line = f' in line {where.line + 2}' if where else ''
    raise ValueError(
      f'the front matter of {file} is not YAML{line}: '
      f'{getattr(e, "problem", None) or e}; quote values that hold a colon'
    ) from None
  if not isinstance(fields, dict):
    raise ValueError(f'the front matter of {file} is no list of name: value')
  return fields, text[found.end() :]


def _check(fields: Mapping[str, Any], file: pathlib.Path, folder: str) -> None:
  for key in ('name', 'description'):
    if not isinstance(fields.get(key), str) or not fields[key].strip():
      raise ValueError(f'the front matter of {file} lacks a {key}, a text')
  for key in ('license', 'compatibility', 'allowed-tools'):
    if not isinstance(fields.get(key) or '', str):
      raise ValueError(f'{key} in the front matter of {file} is to be a text')
  for key, most in _LENGTHS.items():
    if (length := len(fields.get(key) or '')) > most:
      raise ValueError(
        f'the {key} in {file} has {length:,} characters; at most {most:,}'
      )
  name = fields['name']
  if not _NAME.fullmatch(name):
    raise ValueError(
      f'the name {name!r} in {file} is to be of lower-case letters, digits and '
      'single hyphens between them'
    )
  if name != folder:
    raise ValueError(
      f'the name {name!r} in {file} differs from its directory {folder!r}; '
      'rename one of them'
    )
  metadata = fields.get('metadata') or {}
  if not isinstance(metadata, dict):
    raise ValueError(f'metadata in {file} is to be a list of name: value')


def catalogue(skills: Mapping[str, Skill]) -> str:
  """What the system prompt says of skills; '' of none."""
  lines = [
    f'- {skill.name}: {" ".join(skill.description.split())}'
    for skill in skills.values()
  ]
  return _ADVICE.format('\n'.join(lines)) if lines else ''


def tools(
  skills: Mapping[str, Skill], bounds: Bounds | None = None
) -> list[Tool]:
  """load_skill, read_skill_file and run_skill_script; none for no skills.

  Scripts are run as you, not in a sandbox: they were installed with the skill,
  and the model only chooses which, and its arguments. Environment variables
  that look like keys are kept from them.
  """
  if not skills:
    return []
  bounds = bounds or Bounds(seconds=120.0, memory=8 << 30)

  def load_skill(name: str) -> str:
    """Loads a skill: instructions to follow, and the names of its files.

    Args:
      name: of the skill.
    """
    skill = _named(skills, name)
    files = ''.join(f'\n- {path}' for path in skill.files())
    return f'{skill.body}\n\nFiles of this skill:{files or " none"}'

  def read_skill_file(name: str, path: str) -> str:
    """Reads a file of a skill.

    Args:
      name: of the skill.
      path: of the file, as load_skill tells it.
    """
    file = inside(_named(skills, name), path)
    if file.stat().st_size > _LARGEST:
      raise ValueError(f'{path!r} has more than {_LARGEST:,} bytes')
    try:
      return file.read_text(encoding='utf-8')
    except UnicodeDecodeError:
      raise ValueError(f'{path!r} is no text') from None

  def run_skill_script(name: str, path: str, args: list[str]) -> str:
    """Runs a script of a skill and returns what it prints.

    Args:
      name: of the skill.
      path: of the script, as 'scripts/x.py'.
      args: its arguments, in order; an empty list for none.
    """
    file = inside(_named(skills, name), path)
    if pathlib.PurePosixPath(path).parts[0] != 'scripts':
      raise ValueError(f'{path!r} is no script; scripts lie in scripts/')
    return str(watched([*_runner(file), *args], bounds, _environment()))

  limit = bounds.seconds + 10
  return [
    tool(load_skill, trusted=True),
    tool(read_skill_file, trusted=True),
    tool(run_skill_script, seconds=limit),
  ]


def _named(skills: Mapping[str, Skill], name: str) -> Skill:
  if name not in skills:
    raise ValueError(
      f'there is no skill {name!r}; there are {", ".join(skills)}'
    )
  return skills[name]


def inside(skill: Skill, path: str) -> pathlib.Path:
  """A file of a skill.

  Raises:
    ValueError: it is not in the skill's directory, or there by a link.
  """
  parts = pathlib.PurePosixPath(path).parts
  if not parts or os.path.isabs(path) or '..' in parts or '\0' in path:
    raise ValueError(
      f'{path!r} is not a path inside the skill; it is to be relative, without '
      '..'
    )
  file = skill.path
  for part in parts:
    file = file / part
    if file.is_symlink():
      raise ValueError(f'{path!r} is or passes a link, which is not followed')
  if not file.is_file():
    raise ValueError(
      f'the skill {skill.name} has no file {path!r}; it has '
      f'{", ".join(skill.files()) or "none"}'
    )
  return file


def _runner(file: pathlib.Path) -> list[str]:
  runners = {'.py': [sys.executable], '.sh': ['/bin/sh']}
  if file.suffix not in runners and not os.access(file, os.X_OK):
    raise ValueError(f'{file.name!r} is not .py, .sh or executable')
  return [*runners.get(file.suffix, ()), str(file)]


def _environment() -> dict[str, str]:
  kept = {k: v for k, v in os.environ.items() if not _SECRET.search(k)}
  # Where this package is, for scripts of ours where it is not installed.
  package = str(pathlib.Path(__file__).parents[2])
  paths = [package, *filter(None, [kept.get('PYTHONPATH')])]
  return {**kept, 'PYTHONPATH': os.pathsep.join(paths)}

# SPDX-License-Identifier: Apache-2.0
"""Skills in the open SKILL.md form: instructions that are loaded when needed.

A skill is a directory with a SKILL.md: YAML between two lines of ---, then
instructions. A model sees it in three steps: its name and description in the
system prompt, its instructions by load_skill, then files beside them by
read_skill_file, and scripts, of which only the output enters the context, by
run_skill_script. Form: agentskills.io/specification.
"""

import os
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import pydantic
import yaml

from moepeft.agent.programs import Bounds, watched
from moepeft.agent.tools import Tool, reasons, tool

FILE = 'SKILL.md'
OWN = pathlib.Path(__file__).parent / 'skills'
# Of a file that is shown to a model.
_LARGEST = 1 << 20
_SECRET = re.compile(r'KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL', re.I)
_ADVICE = """\
You have skills: instructions for particular kinds of work. When a question is \
of such a kind, first call load_skill with the skill's name, then do what it \
says. The skills:
{}"""
_Text = Annotated[
  str, pydantic.StringConstraints(strict=True, strip_whitespace=True)
]


class Skill(pydantic.BaseModel):
  """A directory with a valid SKILL.md; its other fields are for people.

  Attributes:
    name: of the skill and of its directory: lower-case letters, digits, single
      hyphens between them.
    description: what it does and when to use it.
    body: the instructions, Markdown.
    path: the directory.
  """

  name: Annotated[
    _Text, pydantic.Field(max_length=64, pattern=r'^[a-z0-9]+(-[a-z0-9]+)*$')
  ]
  description: Annotated[_Text, pydantic.Field(min_length=1, max_length=1024)]
  body: str
  path: pathlib.Path

  def files(self) -> list[str]:
    """Paths of what lies beside SKILL.md, links and hidden files aside."""
    found = []
    # Links to directories are not followed.
    for folder, names, files in os.walk(self.path):
      names[:] = [n for n in names if not n.startswith(('.', '__'))]
      paths = [pathlib.Path(folder, n) for n in files if n[0] != '.']
      found += [p for p in paths if not p.is_symlink()]
    told = sorted(p.relative_to(self.path).as_posix() for p in found)
    return [path for path in told if path != FILE]

  def file(self, path: str) -> pathlib.Path:
    """A file of the skill.

    Raises:
      ValueError: it is not in the skill's directory, or there by a link.
    """
    if path not in [FILE, *self.files()]:
      raise ValueError(
        f'the skill {self.name} has no file {path!r}; it has '
        f'{", ".join(self.files()) or "none"}'
      )
    return self.path / path


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
  found = re.match(r'---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)', text, re.S | re.M)
  if not found:
    raise ValueError(
      f'{file} has no front matter; begin it with a line ---, then name and '
      'description, then another line ---'
    )
  try:
    fields = yaml.safe_load(found[1])
    rest = {'body': text[found.end() :].strip(), 'path': path.resolve()}
    skill = Skill.model_validate({**fields, **rest})
  except yaml.YAMLError as e:
    said = ' '.join(str(e).split())
    raise ValueError(
      f'the front matter of {file} is not YAML ({said}); quote values that '
      'hold a colon'
    ) from None
  except TypeError:
    raise ValueError(
      f'the front matter of {file} is no list of name: value'
    ) from None
  except pydantic.ValidationError as e:
    raise ValueError(f'the front matter of {file}: {reasons(e)}') from None
  if skill.name != skill.path.name:
    raise ValueError(
      f'the name {skill.name!r} in {file} differs from its directory '
      f'{skill.path.name!r}; rename one of them'
    )
  return skill


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
    within = [
      path
      for path in sorted(folder.iterdir())
      if path.is_dir() and not path.name.startswith(('.', '__'))
    ]
    for path in [folder] if (folder / FILE).exists() else within:
      skill = read(path)
      if skill.name in found:
        raise ValueError(
          f'two skills are named {skill.name!r}: {found[skill.name].path} and '
          f'{skill.path}; rename one'
        )
      found[skill.name] = skill
  return found


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
  files = sorted({path for s in skills.values() for path in s.files()})
  scripts = [path for path in files if path.startswith('scripts/')]
  # The schemas name all there is, so that a server can keep a model to it.
  name_of, file_of, script_of = (
    Literal[tuple(known)] for known in (skills, files or [''], scripts or [''])
  )

  def load_skill(name: name_of) -> str:
    """Loads a skill: instructions to follow, and the names of its files.

    Args:
      name: of the skill.
    """
    skill = skills[name]
    files = ''.join(f'\n- {path}' for path in skill.files())
    return f'{skill.body}\n\nFiles of this skill:{files or " none"}'

  def read_skill_file(name: name_of, path: file_of) -> str:
    """Reads a file of a skill.

    Args:
      name: of the skill.
      path: of the file, as load_skill tells it.
    """
    file = skills[name].file(path)
    if file.stat().st_size > _LARGEST:
      raise ValueError(f'{path!r} has more than {_LARGEST:,} bytes')
    return file.read_text(encoding='utf-8')

  def run_skill_script(name: name_of, path: script_of, args: list[str]) -> str:
    """Runs a script of a skill and returns what it prints.

    Args:
      name: of the skill.
      path: of the script.
      args: its arguments, in order; an empty list for none.
    """
    file = skills[name].file(path)
    runners = {'.py': [sys.executable], '.sh': ['/bin/sh']}
    command = [*runners.get(file.suffix, ()), str(file), *args]
    return str(watched(command, bounds, _environment()))

  run = tool(run_skill_script, seconds=bounds.seconds + 10)
  made = [tool(load_skill, trusted=True)]
  made += [tool(read_skill_file, trusted=True)] if files else []
  return made + ([run] if scripts else [])


def _environment() -> dict[str, str]:
  kept = {k: v for k, v in os.environ.items() if not _SECRET.search(k)}
  # Where this package is, for scripts of ours where it is not installed.
  package = str(pathlib.Path(__file__).parents[2])
  paths = [package, *filter(None, [kept.get('PYTHONPATH')])]
  return {**kept, 'PYTHONPATH': os.pathsep.join(paths)}

# SPDX-License-Identifier: Apache-2.0
"""Agent skills: instructions in SKILL.md files that are loaded on demand.

The format is specified at agentskills.io/specification. A skill is a directory
with a file SKILL.md, which consists of YAML front matter and instructions. The
system prompt lists the name and description of each skill. The model reads the
instructions with the tool load_skill, reads other files of the skill with
read_skill_file, and runs its scripts with run_skill_script, which adds only
their output to the context.
"""

import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal

import pydantic

from moepeft.agent import config_file
from moepeft.agent.sandbox.bubblewrap import Sandbox, unavailable_reason
from moepeft.agent.sandbox.process import ResourceLimits
from moepeft.agent.tools import Tool, make_tool, validation_message
from moepeft.core import files as core_files
from moepeft.core import terminal
from moepeft.core.untrusted import Malformed, parse_yaml

SKILL_FILE = 'SKILL.md'
BUILTIN_SKILLS = pathlib.Path(__file__).parent / 'skills'
# The maximum size of a file that a model can read.
_MAX_FILE_BYTES = 1 << 20
# Limits of a script. They allow scripts that import JAX, which maps much more
# address space than it uses, and starts several threads per CPU core.
SCRIPT_LIMITS = ResourceLimits(
  seconds=120.0, memory=8 << 30, processes=1024, address_space=1 << 38
)
_PROMPT = """\
You have skills: instructions for particular kinds of work. When a question is \
of such a kind, first call load_skill with the skill's name, then do what it \
says. The skills:
{}"""
_StrippedText = Annotated[
  str, pydantic.StringConstraints(strict=True, strip_whitespace=True)
]


class Skill(pydantic.BaseModel):
  """A directory with a valid SKILL.md.

  Other fields of the front matter are ignored.

  Attributes:
    name: the name of the skill and of its directory: lower-case letters and
      digits, separated by single hyphens.
    description: says what the skill does and when to use it.
    body: the instructions, in Markdown.
    path: the directory.
  """

  name: Annotated[
    _StrippedText,
    pydantic.Field(max_length=64, pattern=r'^[a-z0-9]+(-[a-z0-9]+)*$'),
  ]
  description: Annotated[
    _StrippedText, pydantic.Field(min_length=1, max_length=1024)
  ]
  body: str
  path: pathlib.Path

  def files(self) -> list[str]:
    """Paths of the other files, without links and hidden files."""
    paths_inside = []
    # Links to directories are not followed.
    for folder, names, files in os.walk(self.path):
      names[:] = [n for n in names if not n.startswith(('.', '__'))]
      paths = [pathlib.Path(folder, n) for n in files if n[0] != '.']
      paths_inside += [p for p in paths if p.is_file() and not p.is_symlink()]
    relative_paths = sorted(
      p.relative_to(self.path).as_posix() for p in paths_inside
    )
    return [path for path in relative_paths if path != SKILL_FILE]

  def file(self, path: str) -> pathlib.Path:
    """Returns the absolute path of a file of the skill.

    Raises:
      ValueError: the path is not a file in the skill's directory, or it is a
        link.
    """
    if path not in [SKILL_FILE, *self.files()]:
      raise ValueError(
        f'the skill {self.name} has no file {path!r}; it has '
        f'{", ".join(self.files()) or "none"}'
      )
    return self.path / path


def read_skill(path: str | os.PathLike) -> Skill:
  """Reads a skill from its directory.

  Raises:
    ValueError: the skill is not valid; the message says how to fix it.
  """
  path = pathlib.Path(path)
  file = path / SKILL_FILE
  if not os.path.lexists(file):
    raise ValueError(f'the skill {path} has no {SKILL_FILE}; write one')
  try:
    with core_files.open_file(file) as stream:
      data = stream.read(_MAX_FILE_BYTES + 1)
    text = data.decode('utf-8-sig').replace('\r\n', '\n')
  except UnicodeDecodeError:
    raise ValueError(f'{file} is not UTF-8; save it as that') from None
  if len(data) > _MAX_FILE_BYTES:
    raise ValueError(
      f'{file} has more than {_MAX_FILE_BYTES:,} bytes; shorten it'
    )
  front_matter = re.match(
    r'---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)', text, re.S | re.M
  )
  if not front_matter:
    raise ValueError(
      f'{file} has no front matter; begin it with a line ---, then name and '
      'description, then another line ---'
    )
  try:
    fields = parse_yaml(front_matter[1])
    if not isinstance(fields, dict) or not all(
      isinstance(k, str) for k in fields
    ):
      raise ValueError(f'the front matter of {file} is no list of name: value')
    body = text[front_matter.end() :].strip()
    skill = Skill.model_validate(
      {**fields, 'body': body, 'path': path.resolve()}
    )
  except Malformed as e:
    raise ValueError(
      f'the front matter of {file} is {e}; quote values that hold a colon'
    ) from None
  except pydantic.ValidationError as e:
    raise ValueError(
      f'the front matter of {file}: {validation_message(e)}'
    ) from None
  if skill.name != skill.path.name:
    raise ValueError(
      f'the name {skill.name!r} in {file} differs from its directory '
      f'{skill.path.name!r}; rename one of them'
    )
  return skill


def print_warning(text: str) -> None:
  """Prints a line to standard error."""
  terminal.show(text, file=sys.stderr)


def find_skills(
  folders: Sequence[str | os.PathLike],
  warn: Callable[[str], None] = print_warning,
) -> dict[str, Skill]:
  """Reads all valid skills in several directories.

  Args:
    folders: each is the directory of one skill, or a directory that contains
      directories of skills.
    warn: called with a message for each skill that is not valid.

  Returns:
    {name: skill}.

  Raises:
    ValueError: all skills are invalid, two skills have the same name, or a
      directory does not exist.
  """
  valid: dict[str, Skill] = {}
  errors = []
  for folder in map(pathlib.Path, folders):
    if not folder.is_dir():
      problem = 'is no directory' if folder.exists() else 'does not exist'
      raise ValueError(f'the directory of skills {str(folder)!r} {problem}')
    candidates = [
      path
      for path in sorted(folder.iterdir())
      if path.is_dir() and not path.name.startswith(('.', '__'))
    ]
    if os.path.lexists(folder / SKILL_FILE):
      # The directory is a skill, or it contains skills beside a stray SKILL.md.
      candidates = [
        folder,
        *(path for path in candidates if os.path.lexists(path / SKILL_FILE)),
      ]
    for path in candidates:
      try:
        skill = read_skill(path)
      except (ValueError, OSError) as e:
        errors.append(str(e))
        continue
      namesake = valid.setdefault(skill.name, skill)
      if namesake.path != skill.path:
        raise ValueError(
          f'two skills are named {skill.name!r}: {namesake.path} and '
          f'{skill.path}; rename one'
        )
      if path is folder:
        break
  if errors and not valid:
    raise ValueError('; '.join(errors))
  for error in errors:
    warn(f'a skill is left out: {error}')
  return valid


def skills_prompt(skills: Mapping[str, Skill]) -> str:
  """Returns the system prompt's section on skills; '' if there are none."""
  lines = [
    f'- {skill.name}: {" ".join(skill.description.split())}'
    for skill in skills.values()
  ]
  return _PROMPT.format('\n'.join(lines)) if lines else ''


def script_sandbox(
  skills: Mapping[str, Skill],
  workspace: str | os.PathLike = '.',
  limits: ResourceLimits = SCRIPT_LIMITS,
  unsafe_no_sandbox: bool = False,
) -> Sandbox:
  """Creates the sandbox for the scripts of skills.

  A script can read its skill, this package, the Hugging Face cache and the
  workspace, which is its working directory. It can write only to the sandbox's
  tmpfs file systems.

  Raises:
    ValueError: the system does not support the sandbox, or the workspace
      contains the home directory.
  """
  workspace = pathlib.Path(workspace).resolve()
  home = pathlib.Path.home().resolve()
  if not unsafe_no_sandbox and (reason := unavailable_reason()):
    raise ValueError(reason)
  if home.is_relative_to(workspace) and not unsafe_no_sandbox:
    raise ValueError(
      f'the workspace {str(workspace)!r} contains the home directory, whose '
      'keys a script could read; name a directory below it with --workspace'
    )
  package = pathlib.Path(__file__).parents[1]
  hub = pathlib.Path(
    os.environ.get('HF_HUB_CACHE')
    or pathlib.Path(
      os.environ.get('HF_HOME') or home / '.cache' / 'huggingface', 'hub'
    )
  )
  paths = [workspace, package, *(skill.path for skill in skills.values())]
  environment = {
    'PYTHONPATH': str(package.parent),
    'PYTHONUTF8': '1',
    'JAX_PLATFORMS': 'cpu',
    'HF_HUB_OFFLINE': '1',
  }
  if hub.is_dir():
    paths.append(hub.resolve())
    environment['HF_HUB_CACHE'] = str(hub.resolve())
  return Sandbox(limits, unsafe_no_sandbox, paths, environment, str(workspace))


def skill_tools(
  skills: Mapping[str, Skill],
  sandbox: Sandbox | None = None,
  workspace: str | os.PathLike = '.',
) -> list[Tool]:
  """Creates the tools load_skill, read_skill_file and run_skill_script.

  A script can return one config file: it writes the file to the descriptor
  whose number is in the environment variable MOEPEFT_OUTPUT.

  Args:
    skills: {name: skill}; without skills there are no tools.
    sandbox: the sandbox for scripts, from `script_sandbox`; None for no tool
      run_skill_script.
    workspace: the directory into which the config file is written.
  """
  if not skills:
    return []
  files = sorted({path for s in skills.values() for path in s.files()})
  scripts = [path for path in files if path.startswith('scripts/')]
  # The schemas list all valid names, so that a server with constrained decoding
  # lets the model generate valid names only.
  SkillName, FilePath, ScriptPath = (
    Literal[tuple(names)] for names in (skills, files or [''], scripts or [''])
  )

  def load_skill(name: SkillName) -> str:
    """Loads a skill: instructions to follow, and the names of its files.

    Args:
      name: name of the skill.
    """
    skill = skills[name]
    files = ''.join(f'\n- {path}' for path in skill.files())
    note = ''
    if sandbox is None and any(p.startswith('scripts/') for p in skill.files()):
      note = '\nScripts cannot be run here: there is no sandbox. Say so.'
    return f'{skill.body}\n\nFiles of this skill:{files or " none"}{note}'

  def read_skill_file(name: SkillName, path: FilePath) -> str:
    """Reads a file of a skill.

    Args:
      name: name of the skill.
      path: path of the file, as listed by load_skill.
    """
    file = skills[name].file(path)
    with core_files.open_file(file) as stream:
      data = stream.read(_MAX_FILE_BYTES + 1)
    if len(data) > _MAX_FILE_BYTES:
      raise ValueError(f'{path!r} has more than {_MAX_FILE_BYTES:,} bytes')
    return data.decode('utf-8-sig')

  def run_skill_script(
    name: SkillName, path: ScriptPath, args: list[str]
  ) -> str:
    """Runs a script of a skill and returns what it prints.

    Args:
      name: name of the skill.
      path: path of the script.
      args: arguments of the script, in order; an empty list for none.
    """
    file = skills[name].file(path)
    runners = {'.py': [sys.executable], '.sh': ['/bin/sh']}
    command = [*runners.get(file.suffix, ()), str(file), *args]
    with tempfile.TemporaryFile() as output_file:
      descriptor = output_file.fileno()
      output = {'MOEPEFT_OUTPUT': str(descriptor)}
      result = sandbox.run(command, output, [descriptor])
      output_file.seek(0)
      data = output_file.read(config_file.MAX_BYTES + 1)
    if data and result.exit_code == 0:
      config_file.save_config(data, workspace)
    return str(result)

  tools = [make_tool(load_skill, trusted=True)]
  tools += [make_tool(read_skill_file, trusted=True)] if files else []
  if scripts and sandbox:
    tools.append(
      make_tool(run_skill_script, seconds=sandbox.limits.seconds + 10)
    )
  return tools

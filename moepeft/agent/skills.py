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
SHIPPED = pathlib.Path(__file__).parent / 'skills'
# Of a file that is shown to a model.
_MAX_FILE_BYTES = 1 << 20
# Of a script, JAX among them: it maps far more than it uses, and has threads
# by the processor.
SCRIPT_LIMITS = ResourceLimits(
  seconds=120.0, memory=8 << 30, processes=1024, address_space=1 << 38
)
_PROMPT = """\
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
    """A file of the skill.

    Raises:
      ValueError: it is not in the skill's directory, or there by a link.
    """
    if path not in [SKILL_FILE, *self.files()]:
      raise ValueError(
        f'the skill {self.name} has no file {path!r}; it has '
        f'{", ".join(self.files()) or "none"}'
      )
    return self.path / path


def read_skill(path: str | os.PathLike) -> Skill:
  """A skill from its directory.

  Raises:
    ValueError: it is none; a sentence that says what to mend.
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
    rest = {'body': text[front_matter.end() :].strip(), 'path': path.resolve()}
    skill = Skill.model_validate({**fields, **rest})
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


def warn(text: str) -> None:
  """Prints a line to standard error."""
  terminal.show(text, file=sys.stderr)


def find_skills(
  folders: Sequence[str | os.PathLike], warn: Callable[[str], None] = warn
) -> dict[str, Skill]:
  """{name: skill} of all valid skills in some directories, or that these are.

  Args:
    folders: directories of skills, or skills.
    warn: is told of each that is not valid, a sentence.

  Raises:
    ValueError: there are skills and none is valid, two have one name, or a
      directory does not exist.
  """
  valid: dict[str, Skill] = {}
  faults = []
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
      # A skill, or a directory of skills that has a stray file.
      candidates = [
        folder,
        *(path for path in candidates if os.path.lexists(path / SKILL_FILE)),
      ]
    for path in candidates:
      try:
        skill = read_skill(path)
      except (ValueError, OSError) as e:
        faults.append(str(e))
        continue
      first = valid.setdefault(skill.name, skill)
      if first.path != skill.path:
        raise ValueError(
          f'two skills are named {skill.name!r}: {first.path} and '
          f'{skill.path}; rename one'
        )
      if path is folder:
        break
  if faults and not valid:
    raise ValueError('; '.join(faults))
  for fault in faults:
    warn(f'a skill is left out: {fault}')
  return valid


def skills_prompt(skills: Mapping[str, Skill]) -> str:
  """The system prompt's paragraph on skills; '' without skills."""
  lines = [
    f'- {skill.name}: {" ".join(skill.description.split())}'
    for skill in skills.values()
  ]
  return _PROMPT.format('\n'.join(lines)) if lines else ''


def script_sandbox(
  skills: Mapping[str, Skill],
  workspace: str | os.PathLike = '.',
  bounds: ResourceLimits = SCRIPT_LIMITS,
  unsafe_no_sandbox: bool = False,
) -> Sandbox:
  """The sandbox of skills' scripts.

  A script reads its skill, this package, the cache of models and the workspace,
  where it starts, and writes nowhere but in memory of its own.

  Raises:
    ValueError: there can be no sandbox, or the workspace holds a home.
  """
  workspace = pathlib.Path(workspace).resolve()
  home = pathlib.Path.home().resolve()
  if not unsafe_no_sandbox and (why := unavailable_reason()):
    raise ValueError(why)
  if home.is_relative_to(workspace) and not unsafe_no_sandbox:
    raise ValueError(
      f'the workspace {str(workspace)!r} holds the home directory, whose keys '
      'a script could read; name one below it by --workspace'
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
  return Sandbox(bounds, unsafe_no_sandbox, paths, environment, str(workspace))


def skill_tools(
  skills: Mapping[str, Skill],
  sandbox: Sandbox | None = None,
  workspace: str | os.PathLike = '.',
) -> list[Tool]:
  """load_skill, read_skill_file and run_skill_script; none for no skills.

  Args:
    skills: by name.
    sandbox: where scripts run, as `script_sandbox` makes it; None for no
      run_skill_script.
    workspace: where a config file is written, the one file that a script may
      hand over: MOEPEFT_OUTPUT is the number of a descriptor for it.
  """
  if not skills:
    return []
  files = sorted({path for s in skills.values() for path in s.files()})
  scripts = [path for path in files if path.startswith('scripts/')]
  # The schemas name all there is, so that a server can keep a model to it.
  name_of, file_of, script_of = (
    Literal[tuple(names)] for names in (skills, files or [''], scripts or [''])
  )

  def load_skill(name: name_of) -> str:
    """Loads a skill: instructions to follow, and the names of its files.

    Args:
      name: of the skill.
    """
    skill = skills[name]
    files = ''.join(f'\n- {path}' for path in skill.files())
    note = ''
    if sandbox is None and any(p.startswith('scripts/') for p in skill.files()):
      note = '\nScripts cannot be run here: there is no sandbox. Say so.'
    return f'{skill.body}\n\nFiles of this skill:{files or " none"}{note}'

  def read_skill_file(name: name_of, path: file_of) -> str:
    """Reads a file of a skill.

    Args:
      name: of the skill.
      path: of the file, as load_skill tells it.
    """
    file = skills[name].file(path)
    with core_files.open_file(file) as stream:
      data = stream.read(_MAX_FILE_BYTES + 1)
    if len(data) > _MAX_FILE_BYTES:
      raise ValueError(f'{path!r} has more than {_MAX_FILE_BYTES:,} bytes')
    return data.decode('utf-8-sig')

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
    with tempfile.TemporaryFile() as output_file:
      descriptor = output_file.fileno()
      output = {'MOEPEFT_OUTPUT': str(descriptor)}
      result = sandbox.run(command, output, [descriptor])
      output_file.seek(0)
      data = output_file.read(config_file.MAX_BYTES + 1)
    if data and result.code == 0:
      config_file.save_config(data, workspace)
    return str(result)

  tools = [make_tool(load_skill, trusted=True)]
  tools += [make_tool(read_skill_file, trusted=True)] if files else []
  if scripts and sandbox:
    tools.append(
      make_tool(run_skill_script, seconds=sandbox.bounds.seconds + 10)
    )
  return tools

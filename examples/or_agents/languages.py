# SPDX-License-Identifier: Apache-2.0
"""The languages in which agents write a problem, and the agents' prompts."""

import dataclasses
import importlib.util
import string
from collections.abc import Mapping, Sequence
from pathlib import Path

_PROMPTS = Path(__file__).parent / 'prompts'
PROMPT_LANGUAGES = ('en', 'zh')


@dataclasses.dataclass(frozen=True)
class Language:
  """A modeling language.

  Attributes:
    name: as in --languages.
    title: as in prompts.
    packages: the Python packages that its programs import.
    example: an example for the prompt.
    is_program: whether the model writes a program; else a JSON formulation,
      which is solved directly.
  """

  name: str
  title: str
  packages: tuple[str, ...]
  example: str
  is_program: bool = True

  def missing_packages(self) -> list[str]:
    """The packages that are not installed."""
    return [
      name for name in self.packages if not importlib.util.find_spec(name)
    ]


def _language(name: str, title: str, *packages: str) -> Language:
  text = (_PROMPTS / 'programs' / f'workshop_{name}.py').read_text(
    encoding='utf-8'
  )
  _, _, example = text.partition('\n')  # without the line of the license
  return Language(name, title, packages, example.strip())


LANGUAGES = {
  language.name: language
  for language in (
    _language('pyomo', 'Pyomo and HiGHS', 'pyomo', 'highspy'),
    _language('cvxpy', 'CVXPY and HiGHS', 'cvxpy', 'highspy'),
    _language('pyscipopt', 'PySCIPOpt', 'pyscipopt'),
    _language('gurobipy', 'gurobipy', 'gurobipy'),
    _language('docplex', 'DOcplex', 'docplex', 'cplex'),
    Language(
      'json',
      'JSON',
      ('highspy',),
      (_PROMPTS / 'programs' / 'workshop_json.json').read_text('utf-8').strip(),
      is_program=False,
    ),
  )
}
# The free ones always; the others where they are installed.
_DEFAULT, _OPTIONAL = ('pyomo', 'cvxpy', 'pyscipopt'), ('gurobipy', 'docplex')


def choose_languages(names: Sequence[str] = ()) -> list[Language]:
  """The languages of the given names, or the default ones.

  Raises:
    ValueError: a language is unknown, named twice, or not installed.
  """
  if not names:
    installed = [n for n in _OPTIONAL if not LANGUAGES[n].missing_packages()]
    names = [*_DEFAULT, *installed]
  for name in names:
    if name not in LANGUAGES:
      raise ValueError(
        f'the languages are {", ".join(LANGUAGES)}; got {name!r}'
      )
  if len(set(names)) < len(names):
    raise ValueError(
      f'each language writes one program; got {",".join(names)}, name each once'
    )
  languages = [LANGUAGES[name] for name in names]
  for language in languages:
    if missing := language.missing_packages():
      raise ValueError(
        f'{language.name} needs {" and ".join(missing)}: pip install '
        f'{" ".join(missing)}, or name installed ones with --languages'
      )
  return languages


def load_prompts(prompt_language: str) -> Mapping[str, string.Template]:
  """The templates of a language, 'en' or 'zh', by name."""
  return {
    path.stem: string.Template(path.read_text(encoding='utf-8').strip())
    for path in sorted((_PROMPTS / prompt_language).glob('*.md'))
  }

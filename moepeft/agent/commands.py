# SPDX-License-Identifier: Apache-2.0
"""Commands of moepeft as tools, for runs and configs in a workspace.

Each tool but `list_runs` runs a command of the package in the sandbox of the
scripts of skills: it reads the workspace, writes nothing, and has no network.
A path outside the workspace is refused.
"""

import dataclasses
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field

from moepeft.agent import skills
from moepeft.agent.sandbox.bubblewrap import Sandbox
from moepeft.agent.tools import Tool, make_tool
from moepeft.core import untrusted

# Compiling a model's programs takes minutes on few cores.
LIMITS = dataclasses.replace(skills.SCRIPT_LIMITS, seconds=300.0)
_SUMMARIZE = 'read-training-run/scripts/summarize.py'
_MAX_RUNS, _MAX_DEPTH = 200, 4

_Path = Annotated[str, Field(min_length=1, max_length=1000)]
_Count = Annotated[int, Field(ge=1, le=1000)]


def command_tools(workspace: str | os.PathLike, sandbox: Sandbox) -> list[Tool]:
  """Makes the tools.

  Args:
    workspace: the directory of runs, configs and data.
    sandbox: the sandbox of the commands, from `skills.script_sandbox`.
  """
  root = Path(workspace).resolve()

  def run(*command: str) -> str:
    # Without the workspace on Python's path, as -m would put it there.
    result = sandbox.run([sys.executable, '-P', *command])
    if result.exit_code != 0:
      raise ValueError(f'the command failed: {result}')
    return str(result)

  functions = [*_run_functions(root, run), *_config_functions(root, run)]
  seconds = sandbox.limits.seconds + 10
  return [make_tool(function, seconds) for function in functions]


def _run_functions(root: Path, run: Callable[..., str]) -> list[Callable]:
  """The tools of runs; `run` runs Python with arguments."""

  def list_runs() -> list[dict[str, str]]:
    """Lists the training runs in the workspace: their directories, methods and
    whether they have ended."""
    return [_run_entry(path, root) for path in _find_runs(root)]

  def read_run(workdir: _Path) -> str:
    """Summarizes a training run: settings, losses, routers, evaluation and
    findings, which begin with an exclamation mark.

    Args:
      workdir: the directory of the run, in the workspace.
    """
    script = str(skills.BUILTIN_SKILLS / _SUMMARIZE)
    return run(script, _directory(root, workdir))

  def evaluate(workdir: _Path, data: str, max_examples: _Count) -> str:
    """Evaluates a training run and returns its metrics. Takes minutes.

    Args:
      workdir: the directory of the run, in the workspace.
      data: a JSONL file of rows in the workspace; '' for the run's held-out
        rows.
      max_examples: the maximum number of examples of a prompt.
    """
    # A directory that can be written to, as the workspace cannot.
    output = Path('/tmp', f'moepeft_{secrets.token_hex(8)}.json')
    options = [f'--data={_file(root, data)}'] if data else []
    try:
      return run(
        *('-m', 'moepeft.evaluate', f'--workdir={_directory(root, workdir)}'),
        *(f'--max_examples={max_examples}', f'--output={output}', *options),
      )
    finally:
      # There without a sandbox.
      for suffix in ('.json', '.jsonl', '.jsonl.part'):
        output.with_suffix(suffix).unlink(missing_ok=True)

  def generate(
    workdir: _Path,
    prompt: Annotated[str, Field(min_length=1, max_length=8000)],
    max_new_tokens: Annotated[int, Field(ge=1, le=256)],
  ) -> str:
    """Answers a prompt with the model of a training run.

    Args:
      workdir: the directory of the run, in the workspace.
      prompt: the text to answer.
      max_new_tokens: the maximum length of the answer, up to 256.
    """
    return run(
      *('-m', 'moepeft.generate', f'--workdir={_directory(root, workdir)}'),
      *(f'--prompt={prompt}', f'--max_new_tokens={max_new_tokens}'),
      '--nostream',
    )

  return [list_runs, read_run, evaluate, generate]


def _config_functions(root: Path, run: Callable[..., str]) -> list[Callable]:
  """The tools of config files; `run` runs Python with arguments."""

  def count_parameters(config: _Path) -> str:
    """Counts the trained parameters and the FLOPs of a config, as JSON.

    Args:
      config: a config file of moepeft, in the workspace.
    """
    return run('-m', 'moepeft.count', f'--config={_file(root, config)}')

  def show_data(config: _Path, rows: Annotated[int, Field(ge=1, le=20)]) -> str:
    """Shows decoded rows of a config's first training batch.

    Args:
      config: a config file of moepeft, in the workspace.
      rows: the number of rows, up to 20.
    """
    return run(
      *('-m', 'moepeft.data', f'--config={_file(root, config)}'),
      *('--show_batch', f'--rows={rows}'),
    )

  return [count_parameters, show_data]


def _find_runs(root: Path) -> Iterator[Path]:
  """Directories of runs, without links and hidden ones, the first 200."""
  count = 0
  for folder, names, files in os.walk(root):
    path = Path(folder)
    names[:] = sorted(name for name in names if not name.startswith('.'))
    if len(path.relative_to(root).parts) >= _MAX_DEPTH:
      names.clear()
    if 'config.json' in files and 'metrics.jsonl' in files:
      names.clear()
      yield path
      count += 1
      if count == _MAX_RUNS:
        return


def _run_entry(path: Path, root: Path) -> dict[str, str]:
  entry = {'workdir': str(path.relative_to(root))}
  try:
    config = untrusted.read_json_object(path / 'config.json')
    entry['method'] = str(config.get('method', ''))[:200]
  except (ValueError, OSError) as e:
    entry['error'] = f'its config.json cannot be read: {e}'
  ended = (path / 'summary.json').is_file()
  return entry | {'state': 'ended' if ended else 'not ended'}


def _resolve(root: Path, path: str) -> Path:
  """A path in the workspace.

  Raises:
    ValueError: it is outside, or has a character with a meaning for flags.
  """
  if ':' in path or '\0' in path:
    raise ValueError(f'a path here has no colon and no null; got {path!r}')
  resolved = (root / path).resolve()
  if not resolved.is_relative_to(root):
    raise ValueError(f'{path!r} is outside the workspace; name a path inside')
  return resolved


def _directory(root: Path, path: str) -> str:
  resolved = _resolve(root, path)
  if not resolved.is_dir():
    raise ValueError(
      f'the workspace has no directory {path!r}; list_runs names the runs'
    )
  return str(resolved)


def _file(root: Path, path: str) -> str:
  resolved = _resolve(root, path)
  if not resolved.is_file():
    raise ValueError(f'the workspace has no file {path!r}')
  return str(resolved)

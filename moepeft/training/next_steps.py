# SPDX-License-Identifier: Apache-2.0
"""The text printed at the end of a run: changes, paths and next commands."""

import os
import shlex
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from moepeft.inference.adapters.served_modules import request_tasks
from moepeft.peft.build import Built
from moepeft.peft.merge import is_mergeable

# The longest prompt, in characters, that is shown in a command.
_MAX_PROMPT = 60
# The maximum number of findings; the skill read-training-run prints all.
_MAX_FINDINGS = 3


def commands(
  workdir: str,
  config: ConfigDict,
  built: Built,
  chat: bool,
  prompt: str = '',
  task: str = '',
) -> dict[str, str]:
  """{purpose: shell command} to try, serve and export a run.

  Args:
    chat: whether the run was trained by a chat template.
    prompt: an example's inputs; a long one is replaced.
    task: the example's task; a router's first one if it does not name it.
  """
  tasks = request_tasks(built.adapter_map)
  if task not in tasks:
    task = next(iter(tasks), '')
  if not prompt or len(prompt) > _MAX_PROMPT or not prompt.isprintable():
    prompt = 'What is LoRA?' if chat else 'Some text'
  output = f'{workdir.rstrip("/")}_export'
  whole = built.trainable == 'params'
  export = ['convert', f'--workdir={workdir}', f'--output={output}']
  if whole or is_mergeable(built):
    # A mixture cannot be merged, as its weights depend on the token.
    export.append('--to=hf')
  if whole:
    serve = [f'--model={output}']
  else:
    name = os.path.basename(os.path.abspath(workdir))
    serve = [f'--model={config.model.path}', f'--adapter={name}={workdir}']
  if config.model.quantize and not whole:
    serve.append(f'--quantise={config.model.quantize}')
  if config.data.chat_template and chat:
    serve.append(f'--chat_template={config.data.chat_template}')
  lines = {
    'try it': [
      'generate',
      f'--workdir={workdir}',
      *(['--chat'] if chat else []),
      *([f'--task={task}'] if task else []),
      f'--prompt={prompt}',
    ],
    'serve it': ['serve', *serve],
    'export it': export,
  }
  if whole:
    # 'serve it' comes last, as it needs the exported model.
    lines['serve it'] = lines.pop('serve it')
  return {
    name: f'python -m moepeft.{" ".join(map(_quote, words))}'
    for name, words in lines.items()
  }


def _quote(word: str) -> str:
  """Quotes a word for the shell; of --flag=value, only the value."""
  flag, equals, value = word.partition('=')
  return f'{flag}{equals}{shlex.quote(value)}' if value else word


def print_next_steps(
  summary: Mapping[str, Any],
  changes: list[str],
  findings: list[str],
  places: Mapping[str, str | None],
) -> None:
  """Prints a run's duration, changes, findings, paths and next commands.

  Args:
    changes, findings: from `moepeft.runs.diagnosis`.
    places: {name: path or command}; empty values are left out.
  """
  lines = [f'done in {summary["seconds"]} s: {summary["method"]}']
  lines += [f'  {line}' for line in changes]
  lines += [f'  note: {line}' for line in findings[:_MAX_FINDINGS]]
  lines += [f'  {name:11}  {place}' for name, place in places.items() if place]
  print('\n'.join(lines), flush=True)

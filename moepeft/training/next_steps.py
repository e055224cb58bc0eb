# SPDX-License-Identifier: Apache-2.0
"""The end of a run in a few lines: changes, places, and what to do next."""

import os
import shlex
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from moepeft.peft.build import Built
from moepeft.peft.merge import is_mergeable

# Characters of a prompt that a command line shows.
_PROMPT = 60
# Findings that are printed; the skill read-training-run prints all.
_FINDINGS = 3


def commands(
  workdir: str, config: ConfigDict, built: Built, chat: bool, prompt: str = ''
) -> dict[str, str]:
  """{what for: a command line} to try, serve and export a run.

  Args:
    chat: whether the run was trained by a chat template.
    prompt: an example's inputs; another text stands for one that is long.
  """
  if not prompt or len(prompt) > _PROMPT or not prompt.isprintable():
    prompt = 'What is LoRA?' if chat else 'Some text'
  output = f'{workdir.rstrip("/")}_export'
  whole = built.trainable == 'params'
  export = ['convert', f'--workdir={workdir}', f'--output={output}']
  if whole or is_mergeable(built):
    # A mixture's weights depend on the token: its export is the adapter.
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
      f'--prompt={prompt}',
    ],
    'serve it': ['serve', *serve],
    'export it': export,
  }
  if whole:
    # What is served is what is exported.
    lines['serve it'] = lines.pop('serve it')
  return {
    name: f'python -m moepeft.{" ".join(map(_quoted, words))}'
    for name, words in lines.items()
  }


def _quoted(word: str) -> str:
  """A word of a shell's command; of a flag, its value alone is quoted."""
  flag, equals, value = word.partition('=')
  return f'{flag}{equals}{shlex.quote(value)}' if value else word


def print_next_steps(
  summary: Mapping[str, Any],
  changes: list[str],
  findings: list[str],
  places: Mapping[str, str | None],
) -> None:
  """Prints how long it took, what changed, where all is and what to do now.

  Args:
    changes, findings: from `moepeft.runs.diagnosis`.
    places: {name: path or command}; what is empty is left out.
  """
  lines = [f'done in {summary["seconds"]} s: {summary["method"]}']
  lines += [f'  {line}' for line in changes]
  lines += [f'  note: {line}' for line in findings[:_FINDINGS]]
  lines += [f'  {name:11}  {place}' for name, place in places.items() if place]
  print('\n'.join(lines), flush=True)

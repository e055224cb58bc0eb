# SPDX-License-Identifier: Apache-2.0
"""The command line `moepeft COMMAND`, which runs `python -m moepeft.COMMAND`.

Without a command it prints the list of commands.
"""

import runpy
import sys
from collections.abc import Sequence

from moepeft.core.ranges import short_repr, suggestion

COMMANDS = {
  'train': 'train an adapter or a full model from a config',
  'sweep': 'train the runs of a grid of settings, and collect the results',
  'train_trials': 'train trials of a sweep in one process, for sweep --vmap',
  'evaluate': 'measure a run on held-out data or on a file of rows',
  'generate': 'answer prompts with a run or a model, or talk to it',
  'serve': "serve a model and its adapters with OpenAI's API",
  'board': 'show, start, stop and compare runs on a page',
  'agent': 'ask a served model that has tools and skills',
  'convert': 'convert models and adapters between formats, and merge them',
  'tables': 'compare measured runs in a table',
  'routing': 'show what the experts of a run learned, as a page and plots',
  'count': "count a config's parameters without allocating them",
  'data': 'show what a config trains on, before training',
  'tokenizer': 'train a tokenizer on plain text',
  'ngrams': "measure n-grams on a config's held-out text",
}


def help_text() -> str:
  """Returns the usage line and the list of commands."""
  width = max(map(len, COMMANDS))
  lines = [
    f'  moepeft {name:{width}}  {summary}' for name, summary in COMMANDS.items()
  ]
  title = 'usage: moepeft COMMAND [OPTIONS]; each command has --help:'
  return '\n'.join([title, '', *lines, ''])


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command; without arguments, prints the list of commands.

  Args:
    argv: the arguments; by default those of the process.

  Returns:
    The exit code, 2 for an unknown command.
  """
  name, *arguments = (sys.argv[1:] if argv is None else argv) or ['--help']
  if name in ('-h', '--help'):
    print(help_text(), end='')
    return 0
  if name not in COMMANDS:
    print(
      f'error: moepeft has no command {short_repr(name)}; commands are '
      f'{", ".join(COMMANDS)}{suggestion(name, COMMANDS)}',
      file=sys.stderr,
    )
    return 2
  sys.argv = [f'moepeft {name}', *arguments]
  runpy.run_module(f'moepeft.{name}', run_name='__main__', alter_sys=True)
  return 0


if __name__ == '__main__':
  sys.exit(main())

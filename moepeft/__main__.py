# SPDX-License-Identifier: Apache-2.0
"""python -m moepeft: lists the commands."""

import sys

from moepeft.core.ranges import suggestion

COMMANDS = {
  'train': 'train an adapter, or a whole model, by a config',
  'evaluate': 'measure a run on held-out data or on a file of rows',
  'generate': 'answer prompts with a run or a model, or talk to it',
  'serve': "serve a model and its adapters with OpenAI's API",
  'agent': 'ask a served model that has tools and skills',
  'convert': 'convert models and adapters between formats, and merge them',
  'tables': 'compare measured runs in a table',
  'count': "count a config's parameters without allocating them",
  'data': 'show what a config trains on, before training',
  'tokenizer': 'train a tokenizer on plain text',
  'ngrams': "measure n-grams on a config's held-out text",
}


def text() -> str:
  """The list that is printed."""
  width = max(map(len, COMMANDS))
  lines = [
    f'  python -m moepeft.{name:{width}}  {about}'
    for name, about in COMMANDS.items()
  ]
  return '\n'.join(
    ['The commands of moepeft; each has --help:', '', *lines, '']
  )


def main(argv: list[str]) -> int:
  """Prints the list; 2 where something else was asked for."""
  names = [arg for arg in argv if not arg.startswith('-')]
  if not names:
    print(text(), end='')
    return 0
  if names[0] in COMMANDS:
    advice = f'; write python -m moepeft.{names[0]}'
  else:
    advice = suggestion(names[0], COMMANDS)
  print(
    f'error: python -m moepeft only lists the commands, got {names[0]!r}'
    f'{advice}',
    file=sys.stderr,
  )
  return 2


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))

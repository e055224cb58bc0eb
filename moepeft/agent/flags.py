# SPDX-License-Identifier: Apache-2.0
"""Flags of commands that ask a server: their types, the key, and errors."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from moepeft.core import files, secrets, terminal


def number_in_range(
  kind: type, low: float, high: float
) -> Callable[[str], float]:
  """Makes an argparse type: a number in a range."""

  def read(text: str) -> float:
    try:
      value = kind(text)
    except ValueError:
      value = None
    # NaN is in no range.
    if value is None or not low <= value <= high:
      raise argparse.ArgumentTypeError(
        f'{text[:80]!r} is not {"an integer" if kind is int else "a number"} '
        f'from {low:,} to {high:,}'
      )
    return value

  return read


def read_input(path: str, content: str) -> str:
  """The text of a UTF-8 file of the user, with its line ends.

  Args:
    content: the file's content, as errors name it: 'the problem in words'.

  Raises:
    ValueError: the file cannot be read, is not UTF-8, or is empty.
  """
  try:
    data = files.read_bytes(os.path.expanduser(path))
    text = data.decode('utf-8-sig')
  except (OSError, UnicodeDecodeError) as e:
    reason = 'it is not UTF-8'
    if isinstance(e, OSError):
      reason = e.strerror or str(e)
    raise ValueError(
      f'{path} cannot be read ({reason}); name a file with {content}'
    ) from None
  if not text.strip():
    raise ValueError(f'{path} is empty; name a file with {content}')
  return text


def read_api_key(path: str) -> str:
  """The key in a file, or else in OPENAI_API_KEY; '' without a key.

  Raises:
    ValueError: the file cannot be read, or does not have exactly one word.
  """
  if not path:
    return os.environ.get('OPENAI_API_KEY', '')
  words = read_input(path, 'one API key').split()
  if len(words) != 1:
    raise ValueError(f'--api_key_file={path!r} must have exactly one key')
  return words[0]


def command_parser(module: str, description: str) -> argparse.ArgumentParser:
  """Makes a parser of a module's command that keeps the description's lines."""
  return argparse.ArgumentParser(
    f'python -m {module}',
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )


def run_command(
  parser: argparse.ArgumentParser,
  main: Callable[[argparse.Namespace], int | None],
  argv: Sequence[str] | None = None,
) -> None:
  """Runs a command and exits; prints an error for the user as one line."""
  flags = parser.parse_args(argv)
  try:
    sys.exit(main(flags))
  except (ValueError, OSError) as e:
    message = terminal.visible(secrets.redact(str(e)))
    parser.exit(2, f'error: {message}\n')


_COUNT = number_in_range(int, 1, 1_000_000_000)
_SECONDS = number_in_range(float, 0.001, 1_000_000)
_TEMPERATURE = number_in_range(float, 0, 1_000)
_SEED = number_in_range(int, 0, 2**63 - 1)
_FLAGS = (
  ('base_url', str, 'http://127.0.0.1:8000/v1', "The server's address."),
  ('model', str, '', "The model's name; default: the server's first model."),
  ('api_key_file', str, '', 'A file with the key; default: OPENAI_API_KEY.'),
  (
    'system',
    str,
    'You are a careful assistant.',
    'The start of the system prompt.',
  ),
  ('workspace', str, '.', 'Directory that scripts read; for config files.'),
  ('max_steps', _COUNT, 10, 'Requests to the model per question.'),
  (
    'max_calls',
    number_in_range(int, 0, 1_000_000_000),
    30,
    'Tool calls per question.',
  ),
  (
    'max_all_tokens',
    _COUNT,
    None,
    'Tokens of prompts and replies per question.',
  ),
  ('max_seconds', _SECONDS, None, 'Time per question.'),
  ('memory_tokens', _COUNT, None, 'Maximum tokens of the conversation.'),
  ('tool_output', _COUNT, 8000, 'Maximum characters of a tool output.'),
  (
    'tool_choice',
    str,
    None,
    "required, or the name of a question's first tool.",
  ),
  ('max_tokens', _COUNT, None, 'Maximum tokens of a reply.'),
  ('temperature', _TEMPERATURE, None, 'The sampling temperature.'),
  ('seed', _SEED, None, 'The sampling seed.'),
  ('host', str, '127.0.0.1', 'The address of --serve.'),
  ('port', number_in_range(int, 0, 65535), 8001, 'The port of --serve.'),
  (
    'serve_key_file',
    str,
    '',
    'Keys for --serve, one a line; needed by --host.',
  ),
  ('trace', str, '', 'A file to which all events are written.'),
  ('replay', str, '', 'A trace to replay, without a server.'),
)


def make_parser(description: str) -> argparse.ArgumentParser:
  """Makes the argument parser of python -m moepeft.agent."""
  # Here, as it imports the client, which other commands may not need.
  from moepeft.agent.agent import FORMS, MODES

  arguments = argparse.ArgumentParser(
    'python -m moepeft.agent',
    '%(prog)s [--flag=value ...] ["question"]',
    description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add, code = arguments.add_argument, ('python', 'shell')
  add('question', nargs='?')
  add('--list_skills', action='store_true', help='Print the skills and exit.')
  add('--show_prompt', action='store_true', help='Print the prompt and exit.')
  help_text = "A directory of skills, or a skill; repeatable, '' for none."
  add('--skills', action='append', help=help_text)
  help_text = 'Code that the model may run; repeatable.'
  add('--tools', action='append', choices=code, default=[], help=help_text)
  help_text = 'A command or URL of an MCP server with more tools; repeatable.'
  add('--mcp', action='append', default=[], help=help_text)
  help_text = (
    'Serve moepeft commands on runs and configs in --workspace as MCP tools, '
    'over standard input and output.'
  )
  add('--mcp_serve', action='store_true', help=help_text)
  help_text = 'Answer questions over HTTP, with server-sent events.'
  add('--serve', action='store_true', help=help_text)
  help_text = 'Run code and scripts as your user, without bubblewrap.'
  add('--unsafe_no_sandbox', action='store_true', help=help_text)
  add(
    '--form', choices=FORMS, default='native', help='react: tool calls as text.'
  )
  add('--mode', choices=MODES, default='act', help='plan: plan, act, reflect.')
  for name, kind, default, help_text in _FLAGS:
    add(f'--{name}', type=kind, default=default, help=help_text)
  return arguments

# SPDX-License-Identifier: Apache-2.0
"""python -m moepeft.agent: a model with tools and skills, asked at a terminal.

  python -m moepeft.agent --list_skills
  python -m moepeft.agent 'Has the run in workdirs/x diverged?'
  python -m moepeft.agent --skills=DIR --tools=python --trace=FILE

Without a question, questions are read from the terminal, a line each; Ctrl-C
ends an answer, Ctrl-D the program. The server is any with OpenAI's API, as
python -m moepeft.serve. Scripts of skills are run as you: name those that you
trust. Code that the model writes (--tools) is run in bubblewrap.
"""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import openai
from absl import app, flags

from moepeft.agent import sandbox, skills, traces
from moepeft.agent.agent import Agent
from moepeft.agent.calls import Limits
from moepeft.agent.console import Screen, converse, lines
from moepeft.agent.events import ANSWERED, both
from moepeft.agent.forms import FORMS
from moepeft.agent.loop import MODES, Budget
from moepeft.agent.memory import Memory, Tokens
from moepeft.agent.model import Served
from moepeft.agent.skills import Skill
from moepeft.agent.tools import Tool

_TOOLS = {'python': 'run_python', 'shell': 'run_shell'}
# Where a server asks for no key the client still wants one.
_NO_KEY = 'none'


def found_skills() -> dict[str, Skill]:
  """Those of --skills, else ours."""
  folders = _SKILLS.value or [str(skills.OWN)]
  return skills.find(
    [os.path.expanduser(folder) for folder in folders if folder]
  )


def api_key() -> str:
  """The key of --api_key_file, of OPENAI_API_KEY, or '' for none.

  Raises:
    ValueError: the file cannot be read or holds no single line.
  """
  if not _API_KEY_FILE.value:
    return os.environ.get('OPENAI_API_KEY', '')
  path = os.path.expanduser(_API_KEY_FILE.value)
  try:
    with open(path, encoding='utf-8') as file:
      key = file.read().strip()
  except (OSError, UnicodeDecodeError) as e:
    raise ValueError(f'--api_key_file={path!r} cannot be read: {e}') from None
  if not key or len(key.split()) > 1:
    raise ValueError(f'--api_key_file={path!r} is to hold one key and no more')
  return key


def chosen_tools() -> list[Tool]:
  """The sandbox's tools that --tools names."""
  if not _TOOL.value:
    if _UNSAFE.value:
      raise ValueError(
        '--unsafe_no_sandbox is of --tools; name python or shell'
      )
    return []
  bounds = sandbox.Bounds(seconds=_TOOL_SECONDS.value)
  made = sandbox.tools(sandbox.Sandbox(bounds, unsafe_no_sandbox=_UNSAFE.value))
  names = {_TOOLS[name] for name in _TOOL.value}
  return [tool for tool in made if tool.name in names]


def model_name(client: openai.OpenAI) -> str:
  """--model, else the first that the server has.

  Raises:
    ValueError: the server does not answer, or has none.
  """
  if _MODEL.value:
    return _MODEL.value
  try:
    names = [model.id for model in client.models.list()]
  except openai.OpenAIError as e:
    raise ValueError(
      f'the server at {_BASE_URL.value} does not tell its models ({e}); start '
      'it, as with python -m moepeft.serve, or name --base_url and --model'
    ) from None
  if not names:
    raise ValueError(f'the server at {_BASE_URL.value} has no model')
  return names[0]


def counter(client: openai.OpenAI, name: str) -> Tokens:
  """What counts tokens for --memory_tokens; says so where it guesses."""
  count = Tokens(client, name)
  if _MEMORY.value and count('a') and not count.exact:
    print(
      'the server has no /tokenize: --memory_tokens goes by an estimate',
      file=sys.stderr,
    )
  return count


def prompt(own: dict[str, Skill]) -> str:
  """The system prompt before the rules on tools."""
  parts = (_SYSTEM.value, skills.catalogue(own))
  return '\n\n'.join(part for part in parts if part)


def options() -> dict:
  """What every request says beside the conversation."""
  said = {
    'temperature': _TEMPERATURE.value,
    'seed': _SEED.value,
    'max_tokens': _MAX_TOKENS.value,
  }
  return {key: value for key, value in said.items() if value is not None}


def budget() -> Budget:
  """What the flags allow a question.

  Raises:
    ValueError: a limit is below what it can be.
  """
  for flag in (_STEPS, _CALLS, _TOKENS, _SECONDS, _MEMORY, _MAX_TOKENS):
    least = 0 if flag is _CALLS else 1
    if flag.value is not None and flag.value < least:
      raise ValueError(f'--{flag.name} is at least {least}; got {flag.value}')
  return Budget(_STEPS.value, _CALLS.value, _TOKENS.value, _SECONDS.value)


def agent(own: dict[str, Skill], model, memory: Memory, tell) -> Agent:
  """The agent that the flags describe."""
  return Agent(
    model,
    [*skills.tools(own), *chosen_tools()],
    prompt(own),
    memory,
    _FORM.value,
    _MODE.value,
    budget(),
    Limits(output=_OUTPUT.value),
    options(),
    tell,
  )


def main(argv: Sequence[str]) -> None:
  """Does what the flags say."""
  questions = argv[1:]
  if len(questions) > 1:
    raise ValueError(
      f'one question is asked at a time; got {len(questions)}: put it in quotes'
    )
  stream = sys.stdout.isatty() if _STREAM.value is None else _STREAM.value
  screen = Screen(sys.stdout, sys.stderr, stream)
  if _REPLAY.value:
    traces.replay(_REPLAY.value, screen)
    return
  own = found_skills()
  if _LIST.value:
    for skill in own.values():
      print(f'{skill.name}: {" ".join(skill.description.split())}')
    return
  if _SHOW.value:
    print(agent(own, None, Memory(), screen).system)
    return
  key = api_key()
  client = openai.OpenAI(base_url=_BASE_URL.value, api_key=key or _NO_KEY)
  tell = screen
  if _TRACE.value:
    path = os.path.expanduser(_TRACE.value)
    tell = both(traces.Trace(path, [key]), screen)
  # Before the server is asked for its models: flags are checked first.
  made = agent(own, None, Memory(), tell)
  name = model_name(client)
  made.model = Served(client, name, stream)
  made.memory = Memory(_MEMORY.value, counter(client, name))
  if not questions:
    converse(made, screen, lines())
  elif made.ask(questions[0]).state != ANSWERED:
    sys.exit(1)


def parse(argv: Sequence[str]) -> list[str]:
  """absl's flags of a command line; a wrong one is a sentence and exit 2."""
  try:
    return flags.FLAGS(argv)
  except flags.Error as e:
    stop(str(e).splitlines()[0])


def safe_main(argv: Sequence[str]) -> None:
  """`main`, with bad input answered by one sentence.

  `moepeft.command` does this for the others; it brings JAX, which an agent
  has no use for and would wait for.
  """
  try:
    main(argv)
  except (ValueError, OSError) as e:
    if _TRACEBACK.value:
      raise
    stop(str(e))


def stop(message: str) -> NoReturn:
  """Prints an error and ends the program with code 2."""
  print(f'error: {message}', file=sys.stderr)
  sys.exit(2)


if __name__ == '__main__':
  _TRACEBACK = flags.DEFINE_bool(
    'traceback', False, 'Show where an error was raised.'
  )
  _BASE_URL = flags.DEFINE_string(
    'base_url', 'http://127.0.0.1:8000/v1', "The server's address."
  )
  _MODEL = flags.DEFINE_string(
    'model', '', "Its name; '' for the first that the server has."
  )
  _API_KEY_FILE = flags.DEFINE_string(
    'api_key_file', '', 'A file with the key; else OPENAI_API_KEY is taken.'
  )
  _SKILLS = flags.DEFINE_multi_string(
    'skills',
    None,
    "A directory of skills, or a skill; may be repeated, '' for none. "
    'Otherwise those that ship with moepeft.',
  )
  _LIST = flags.DEFINE_bool('list_skills', False, 'Print the skills and end.')
  _SHOW = flags.DEFINE_bool(
    'show_prompt', False, 'Print the system prompt and end.'
  )
  _SYSTEM = flags.DEFINE_string(
    'system', 'You are a careful assistant.', 'How the system prompt begins.'
  )
  _TOOL = flags.DEFINE_multi_enum(
    'tools', None, list(_TOOLS), 'Code that the model may run; repeatable.'
  )
  _UNSAFE = flags.DEFINE_bool(
    'unsafe_no_sandbox', False, 'Run that code as you, without bubblewrap.'
  )
  _TOOL_SECONDS = flags.DEFINE_float(
    'tool_seconds', 30.0, 'That a program of --tools may take.'
  )
  _OUTPUT = flags.DEFINE_integer(
    'tool_output', 8000, 'Characters of an output that the model is shown.'
  )
  _FORM = flags.DEFINE_enum(
    'form', 'native', list(FORMS), 'How tools are called; react is by text.'
  )
  _MODE = flags.DEFINE_enum(
    'mode', 'act', list(MODES), "'plan' plans, acts and checks the answer."
  )
  _STEPS = flags.DEFINE_integer(
    'max_steps', 10, 'Requests to the model, a question.'
  )
  _CALLS = flags.DEFINE_integer('max_calls', 30, 'Tool calls, a question.')
  _TOKENS = flags.DEFINE_integer(
    'max_all_tokens', None, 'Tokens of all requests and replies, a question.'
  )
  _SECONDS = flags.DEFINE_float('max_seconds', None, 'Time, a question.')
  _MEMORY = flags.DEFINE_integer(
    'memory_tokens', None, 'Tokens of the conversation that are sent.'
  )
  _MAX_TOKENS = flags.DEFINE_integer('max_tokens', None, 'Tokens of a reply.')
  _TEMPERATURE = flags.DEFINE_float('temperature', None, 'Of sampling.')
  _SEED = flags.DEFINE_integer('seed', None, 'Of sampling.')
  _STREAM = flags.DEFINE_bool(
    'stream', None, 'Print text as it comes; by default on a terminal.'
  )
  _TRACE = flags.DEFINE_string(
    'trace', '', 'A file that all that happens is written to, as JSON lines.'
  )
  _REPLAY = flags.DEFINE_string(
    'replay', '', 'A trace to show again, without a server.'
  )
  app.run(safe_main, flags_parser=parse)

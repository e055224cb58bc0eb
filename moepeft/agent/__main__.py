# SPDX-License-Identifier: Apache-2.0
"""python -m moepeft.agent: a model with tools and skills, asked at a terminal.

  python -m moepeft.agent --list_skills
  python -m moepeft.agent 'Has the run in workdirs/x diverged?'
  python -m moepeft.agent --skills=DIR --tools=python --trace=FILE

Without a question, questions are read from the terminal, a line each; Ctrl-C
ends an answer, Ctrl-D the program. The server is any with OpenAI's API, as
python -m moepeft.serve. Scripts of skills, and code that the model writes
(--tools), run in bubblewrap or not at all; scripts read the workspace, and may
write a config file into it. Instructions of skills are followed: name those
that you trust.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence

from moepeft.agent import chat_model, skills, traces
from moepeft.agent.agent import FORMS, MODES, Agent
from moepeft.agent.chat_model import ReplyError, ServerModel
from moepeft.agent.loop import Budget, Event
from moepeft.agent.memory import Memory, TokenCounter
from moepeft.agent.sandbox import bubblewrap
from moepeft.core import files, secrets, terminal
from moepeft.core.untrusted import Malformed, check_encodable

_LINE_WIDTH = 100


def number_type(kind: type, low: float, high: float) -> Callable[[str], float]:
  """Reads a flag's number and holds it to a range."""

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


_COUNT = number_type(int, 1, 1_000_000_000)
_SECONDS = number_type(float, 0.001, 1_000_000)
_TEMPERATURE = number_type(float, 0, 1_000)
_SEED = number_type(int, 0, 2**63 - 1)
_FLAGS = (
  ('base_url', str, 'http://127.0.0.1:8000/v1', "The server's address."),
  ('model', str, '', 'Its name; by default the first that the server has.'),
  ('api_key_file', str, '', 'With the key; by default OPENAI_API_KEY.'),
  ('system', str, 'You are a careful assistant.', 'The prompt begins so.'),
  ('workspace', str, '.', 'What scripts may read; config files go there.'),
  ('max_steps', _COUNT, 10, 'Requests to the model, a question.'),
  (
    'max_calls',
    number_type(int, 0, 1_000_000_000),
    30,
    'Tool calls, a question.',
  ),
  (
    'max_all_tokens',
    _COUNT,
    None,
    'Tokens of prompts and replies, a question.',
  ),
  ('max_seconds', _SECONDS, None, 'Time, a question.'),
  ('memory_tokens', _COUNT, None, 'Tokens of the conversation that are sent.'),
  ('tool_output', _COUNT, 8000, 'Characters of an output that are shown.'),
  ('tool_choice', str, None, "required, or a tool: a question's first call."),
  ('max_tokens', _COUNT, None, 'Tokens of a reply.'),
  ('temperature', _TEMPERATURE, None, 'Of sampling.'),
  ('seed', _SEED, None, 'Of sampling.'),
  ('trace', str, '', 'A file that all that happens is written to.'),
  ('replay', str, '', 'A trace to show again, without a server.'),
)


def parser() -> argparse.ArgumentParser:
  """The flags."""
  arguments = argparse.ArgumentParser(
    'python -m moepeft.agent',
    '%(prog)s [--flag=value ...] ["question"]',
    __doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add, code = arguments.add_argument, ('python', 'shell')
  add('question', nargs='?')
  add('--list_skills', action='store_true', help='Print the skills and end.')
  add('--show_prompt', action='store_true', help='Print the prompt and end.')
  help_text = "A directory of skills, or a skill; repeatable, '' for none."
  add('--skills', action='append', help=help_text)
  help_text = 'Code that the model may run; repeatable.'
  add('--tools', action='append', choices=code, default=[], help=help_text)
  help_text = 'Run that code and scripts as you, without bubblewrap.'
  add('--unsafe_no_sandbox', action='store_true', help=help_text)
  add('--form', choices=FORMS, default='native', help='react: tools by text.')
  add('--mode', choices=MODES, default='act', help='plan: plan, act, reflect.')
  for name, kind, default, help_text in _FLAGS:
    add(f'--{name}', type=kind, default=default, help=help_text)
  return arguments


class TerminalPrinter:
  """Prints events: the model's text to stdout, what it does to stderr.

  Without `stream` only the answer is printed, once it is there. Control
  characters are made visible, also where the output is no terminal.
  """

  def __init__(self, stream: bool):
    """Prints nothing yet."""
    self.stream, self._open = stream, False

  def __call__(self, event: Event) -> None:
    match event:
      case {'event': 'piece', 'text': text} if self.stream:
        terminal.show(text, end='')
        self._open = not text.endswith('\n')
      case {'event': 'called', 'calls': calls}:
        for call in calls:
          function = call['function']
          self.print_note(f'-> {function["name"]} {function["arguments"]}')
      case {'event': 'returned', 'text': text, 'failed': failed}:
        self.print_note(f'<- {"error: " if failed else ""}{text}')
      case {'event': 'ended', 'outcome': {'state': state} as outcome}:
        if outcome['text'] and not self.stream:
          terminal.show(outcome['text'])
        if state != 'answered':
          self.print_note(f'[{state}] {outcome["why"]}', 10 * _LINE_WIDTH)
        self.end_line()

  def end_line(self) -> None:
    """Whatever comes next begins a line."""
    if self._open:
      print(flush=True)
    self._open = False

  def print_note(self, text: str, wide: int = _LINE_WIDTH) -> None:
    """A line of what is done."""
    self.end_line()
    text = ' '.join(text.split())
    text = text if len(text) <= wide else f'{text[: wide - 3]}...'
    terminal.show(text, file=sys.stderr)


def api_key(path: str) -> str:
  """The key of a file, else of OPENAI_API_KEY, or '' for none.

  Raises:
    ValueError: the file holds no single line. OSError: it cannot be read.
  """
  if not path:
    return os.environ.get('OPENAI_API_KEY', '')
  words = files.read_text(os.path.expanduser(path)).split()
  if len(words) != 1:
    raise ValueError(f'--api_key_file={path!r} is to hold one key and no more')
  return words[0]


def make_agent(flags: argparse.Namespace, skill_set: dict, on_event) -> Agent:
  """The agent that the flags describe, without a model yet."""
  if flags.tool_choice and flags.form == 'react':
    raise ValueError(
      "--tool_choice is the server's to keep, which --form=react asks for no "
      'calls; leave one of them out'
    )
  if not os.path.isdir(flags.workspace):
    raise ValueError(f'--workspace={flags.workspace!r} is no directory')
  script_sandbox = None
  if any(
    p.startswith('scripts/')
    for skill in skill_set.values()
    for p in skill.files()
  ):
    try:
      script_sandbox = skills.script_sandbox(
        skill_set, flags.workspace, unsafe_no_sandbox=flags.unsafe_no_sandbox
      )
    except ValueError as e:
      skills.print_warning(
        f'run_skill_script is left out, as scripts run in bubblewrap alone: {e}'
      )
  tools = skills.skill_tools(skill_set, script_sandbox, flags.workspace)
  if flags.tools:
    script_sandbox = bubblewrap.Sandbox(
      unsafe_no_sandbox=flags.unsafe_no_sandbox
    )
    names = {f'run_{name}' for name in flags.tools}
    tools += [
      tool
      for tool in bubblewrap.code_tools(script_sandbox)
      if tool.name in names
    ]
  names = ('temperature', 'seed', 'max_tokens', 'tool_choice')
  options = {name: getattr(flags, name) for name in names}
  if flags.tool_choice not in (None, 'auto', 'none', 'required'):
    function = {'name': flags.tool_choice}
    options['tool_choice'] = {'type': 'function', 'function': function}
  return Agent(
    None,
    tools,
    '\n\n'.join(filter(None, [flags.system, skills.skills_prompt(skill_set)])),
    form=flags.form,
    mode=flags.mode,
    budget=Budget(
      flags.max_steps,
      flags.max_calls,
      flags.max_all_tokens,
      flags.max_seconds,
      output=flags.tool_output,
    ),
    options={k: value for k, value in options.items() if value is not None},
    on_event=on_event,
  )


def connect(agent: Agent, flags: argparse.Namespace, key: str, stream: bool):
  """Gives an agent its model, and what counts its memory's tokens.

  Raises:
    ValueError: the server does not answer, or has no model.
  """
  client = chat_model.make_client(flags.base_url, key)
  try:
    names = [flags.model] if flags.model else chat_model.list_models(client)
  except ReplyError as e:
    raise ValueError(
      f'the server at {flags.base_url} does not tell its models ({e}); start '
      'it, as with python -m moepeft.serve, or name another by --base_url'
    ) from None
  if not names:
    raise ValueError(f'the server at {flags.base_url} has no model')
  agent.model, count = (
    ServerModel(client, names[0], stream),
    TokenCounter(client, names[0]),
  )
  agent.memory = Memory(flags.memory_tokens, count)
  if flags.memory_tokens:
    count({'messages': [{'role': 'user', 'content': 'a'}]})
    if not count.exact:
      skills.print_warning(
        'the server has no /tokenize: --memory_tokens goes by an estimate'
      )


def read_questions() -> Iterator[str]:
  """Lines of the terminal until its end; Ctrl-C there begins a new one."""
  with contextlib.suppress(ImportError):
    # Gives input() a history and keys to edit with.
    import readline  # noqa: F401
  while True:
    try:
      line = input('> ' if sys.stdin.isatty() else '')
    except EOFError:
      return
    except KeyboardInterrupt:
      print(file=sys.stderr)
      continue
    if line.strip():
      yield line


def main(flags: argparse.Namespace) -> int:
  """Does what the flags say; the exit status.

  Raises:
    ValueError, OSError: it cannot be done, a sentence.
  """
  printer = TerminalPrinter(sys.stdout.isatty())
  # Of bytes in arguments that are no UTF-8, Python makes half surrogates.
  check_encodable(vars(flags))
  if flags.replay:
    traces.replay_trace(flags.replay, printer)
    return 0
  folders = flags.skills or [str(skills.BUILTIN_SKILLS)]
  skill_set = skills.find_skills([os.path.expanduser(f) for f in folders if f])
  if flags.list_skills:
    for skill in skill_set.values():
      terminal.show(f'{skill.name}: {" ".join(skill.description.split())}')
    return 0
  key, on_event = api_key(flags.api_key_file), printer
  if flags.trace:
    trace = traces.TraceWriter(os.path.expanduser(flags.trace), [key])

    def on_event(event: Event) -> None:
      trace(event)
      printer(event)

  agent = make_agent(flags, skill_set, on_event)
  if flags.show_prompt:
    terminal.show(agent.prompt())
    return 0
  connect(agent, flags, key, printer.stream)
  if flags.question is not None:
    return int(agent.ask(flags.question).state != 'answered')
  for question in read_questions():
    try:
      check_encodable(question)
      agent.ask(question)
    except Malformed as e:
      printer.print_note(f'error: the question is {e}')
    except KeyboardInterrupt:
      printer.print_note('(interrupted)')
  return 0


def run(argv: Sequence[str] | None = None) -> None:
  """`main`, with bad input answered by one sentence."""
  parser_ = parser()
  arguments = parser_.parse_args(argv)
  try:
    sys.exit(main(arguments))
  except (ValueError, OSError) as e:
    parser_.exit(2, f'error: {terminal.visible(secrets.redact(str(e)))}\n')


if __name__ == '__main__':
  run()

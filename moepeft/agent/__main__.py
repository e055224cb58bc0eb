# SPDX-License-Identifier: Apache-2.0
"""python -m moepeft.agent: chat with a model that has tools and skills.

  python -m moepeft.agent --list_skills
  python -m moepeft.agent 'Has the run in workdirs/x diverged?'
  python -m moepeft.agent --skills=DIR --tools=python --trace=FILE

Without a question, the program reads one question per line from the terminal;
Ctrl-C ends an answer, Ctrl-D the program. The server can be any server with
OpenAI's API, such as python -m moepeft.serve. Scripts of skills, and code that
the model writes (--tools), only run in bubblewrap. Scripts can read the
workspace and write a config file into it. The model follows the instructions of
skills: use only skills that you trust. --mcp adds the tools of an MCP server;
--mcp_serve is one, for other agents, with commands of moepeft as its tools.
--serve answers questions over HTTP, on this machine alone without keys.
"""

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence

from moepeft.agent import chat_model, skills, traces
from moepeft.agent.agent import Agent
from moepeft.agent.flags import make_parser, read_api_key, run_command
from moepeft.agent.loop import Budget, Event, EventSink, ignore_event
from moepeft.agent.memory import Memory, TokenCounter
from moepeft.agent.sandbox import bubblewrap
from moepeft.agent.tools import Tool
from moepeft.core import terminal
from moepeft.core.extras import require
from moepeft.core.http_access import ApiKeys, read_keys
from moepeft.core.untrusted import Malformed, check_encodable

_LINE_WIDTH = 100
# The time of a question over HTTP, without --max_seconds.
_SERVED_SECONDS = 600.0


class TerminalPrinter:
  """Prints events: the model's text to stdout, tool calls to stderr.

  Without `stream`, only the final answer is printed. Control characters are
  made visible.
  """

  def __init__(self, stream: bool):
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
    """Ends an incomplete line."""
    if self._open:
      print(flush=True)
    self._open = False

  def print_note(self, text: str, max_length: int = _LINE_WIDTH) -> None:
    """Prints a line to stderr, truncated."""
    self.end_line()
    text = ' '.join(text.split())
    text = text if len(text) <= max_length else f'{text[: max_length - 3]}...'
    terminal.show(text, file=sys.stderr)


def check_workspace(flags: argparse.Namespace) -> None:
  """
  Raises:
    ValueError: --workspace is no directory.
  """
  if not os.path.isdir(flags.workspace):
    raise ValueError(f'--workspace={flags.workspace!r} is no directory')


def serve_mcp(flags: argparse.Namespace) -> None:
  """Serves commands as MCP tools until standard input ends.

  Raises:
    ValueError: there is no sandbox for them.
  """
  require('moepeft.agent', 'agent', ('mcp',))
  from moepeft.agent import commands, mcp_server

  check_workspace(flags)
  try:
    sandbox = skills.script_sandbox(
      {}, flags.workspace, commands.LIMITS, flags.unsafe_no_sandbox
    )
  except ValueError as e:
    raise ValueError(
      f'--mcp_serve runs commands for others in bubblewrap, but {e} '
      '(--unsafe_no_sandbox runs them as your user)'
    ) from None
  mcp_server.serve(commands.command_tools(flags.workspace, sandbox))


def connect_mcp(
  flags: argparse.Namespace, stack: contextlib.ExitStack
) -> list[Tool]:
  """Connects to the servers of --mcp, and returns their tools.

  Args:
    stack: ends the connections.

  Raises:
    ValueError: a server does not start, or does not speak MCP.
  """
  if not flags.mcp:
    return []
  require('moepeft.agent', 'agent', ('mcp',))
  from moepeft.agent.mcp_client import McpConnection

  tools = []
  for server in flags.mcp:
    connection = McpConnection(server, skills.print_warning)
    stack.callback(connection.close)
    tools += connection.tools
  return tools


def make_agent(
  flags: argparse.Namespace,
  skill_set: dict,
  on_event: EventSink,
  mcp_tools: Sequence[Tool] = (),
) -> Agent:
  """Makes the agent that the flags describe, without its model."""
  if flags.tool_choice and flags.form == 'react':
    raise ValueError(
      '--tool_choice needs tool calls of the server, which --form=react does '
      'not use; omit one of them'
    )
  check_workspace(flags)
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
        f'run_skill_script is left out, as scripts need bubblewrap: {e}'
      )
  tools = skills.skill_tools(skill_set, script_sandbox, flags.workspace)
  tools += mcp_tools
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
  """Sets an agent's model and memory.

  Raises:
    ValueError: the server does not answer, or has no model.
  """
  client = chat_model.make_client(flags.base_url, key)
  agent.model = chat_model.choose_model(client, flags.model, stream)
  count = TokenCounter(client, agent.model.name)
  agent.memory = Memory(flags.memory_tokens, count)
  if flags.memory_tokens:
    count({'messages': [{'role': 'user', 'content': 'a'}]})
    if not count.exact:
      skills.print_warning(
        'the server has no /tokenize: --memory_tokens is estimated'
      )


def read_questions() -> Iterator[str]:
  """Yields lines of the terminal until its end; Ctrl-C discards a line."""
  with contextlib.suppress(ImportError):
    # Adds history and editing to input().
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
  """Runs the command; returns the exit status.

  Raises:
    ValueError, OSError: an error with a message for the user.
  """
  printer = TerminalPrinter(sys.stdout.isatty())
  # Python decodes invalid UTF-8 in arguments to unpaired surrogates.
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
  if flags.mcp_serve:
    serve_mcp(flags)
    return 0
  with contextlib.ExitStack() as stack:
    if flags.serve:
      serve_http(flags, skill_set, stack)
      return 0
    return answer_questions(flags, skill_set, printer, stack)


def serve_http(
  flags: argparse.Namespace, skill_set: dict, stack: contextlib.ExitStack
) -> None:
  """Answers questions over HTTP until a signal.

  Raises:
    ValueError: a flag does not go with --serve, or the address is not allowed.
  """
  require('moepeft.agent', 'serve', ('starlette', 'uvicorn'))
  from moepeft.agent import http_server

  for name in ('question', 'trace', 'show_prompt'):
    if getattr(flags, name):
      raise ValueError(f'--serve takes its questions over HTTP; omit {name}')
  keys = ApiKeys(read_keys(flags.serve_key_file, 'serve_key_file'))
  tools = connect_mcp(flags, stack)
  agent = make_agent(flags, skill_set, ignore_event, tools)
  if agent.budget.seconds is None:
    budget = dataclasses.replace(agent.budget, seconds=_SERVED_SECONDS)
    agent = dataclasses.replace(agent, budget=budget)
  connect(agent, flags, read_api_key(flags.api_key_file), stream=True)
  http_server.serve(agent, flags.host, flags.port, keys)


def answer_questions(
  flags: argparse.Namespace,
  skill_set: dict,
  printer: TerminalPrinter,
  stack: contextlib.ExitStack,
) -> int:
  """Answers the question, or those of the terminal; the exit status."""
  key, on_event = read_api_key(flags.api_key_file), printer
  if flags.trace:
    trace = traces.TraceWriter(os.path.expanduser(flags.trace), [key])

    def on_event(event: Event) -> None:
      trace(event)
      printer(event)

  agent = make_agent(flags, skill_set, on_event, connect_mcp(flags, stack))
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


if __name__ == '__main__':
  run_command(make_parser(__doc__), main)

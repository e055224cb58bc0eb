# SPDX-License-Identifier: Apache-2.0
"""python -m examples.or_agents.solve: solves a problem in words by agents.

  python -m examples.or_agents.solve --problem=FILE --base_url=URL --model=M

The agents list the problem's components, formulate it, and write a program in
each of several modeling languages. The programs run in bubblewrap, are
repaired, and vote on the optimal value. The exit status is 0 if there is a
value, 1 if there is none, and 2 for wrong input.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable

from examples.or_agents import execution, languages, pipeline, report
from examples.or_agents.languages import Language
from moepeft.agent import chat_model, traces
from moepeft.agent.flags import (
  command_parser,
  number_in_range,
  read_api_key,
  read_input,
  run_command,
)
from moepeft.agent.loop import Event
from moepeft.core import files, terminal

_COUNT = number_in_range(int, 1, 1_000_000)
_FLAGS = (
  ('base_url', str, 'http://127.0.0.1:8000/v1', "The server's address."),
  ('model', str, '', "The model's name; default: the server's first model."),
  ('api_key_file', str, '', 'A file with the key; default: OPENAI_API_KEY.'),
  (
    'languages',
    str,
    '',
    'Names with commas, of pyomo, cvxpy, pyscipopt, gurobipy, docplex, json; '
    'default: the first three, and gurobipy and docplex where installed.',
  ),
  (
    'max_rounds',
    number_in_range(int, 0, 6),
    6,
    'Maximum number of repairs of a program.',
  ),
  (
    'timeout',
    number_in_range(float, 0.1, 100_000),
    60.0,
    'Seconds of a program.',
  ),
  ('memory', number_in_range(int, 64, 1_000_000), 2048, 'MB of a program.'),
  (
    'tolerance',
    number_in_range(float, 0, 1),
    1e-4,
    'Values agree within this share of the larger one, or of 1.',
  ),
  ('max_tokens', _COUNT, None, 'Maximum tokens of a reply.'),
  (
    'temperature',
    number_in_range(float, 0, 1_000),
    None,
    'The sampling temperature.',
  ),
  ('seed', number_in_range(int, 0, 2**63 - 1), None, 'The sampling seed.'),
  ('trace', str, '', 'A file to which all events are appended as JSON lines.'),
)


def make_parser(module: str, description: str) -> argparse.ArgumentParser:
  """Makes an argument parser with the flags of the agents."""
  parser = command_parser(f'examples.or_agents.{module}', description)
  for name, kind, default, help_text in _FLAGS:
    parser.add_argument(f'--{name}', type=kind, default=default, help=help_text)
  parser.add_argument(
    '--lang',
    choices=languages.PROMPT_LANGUAGES,
    default='en',
    help='The language of the prompts.',
  )
  parser.add_argument(
    '--direct',
    action='store_true',
    help="The prompt is the problem's text alone, for a model trained to "
    'answer in the JSON form; needs --languages=json.',
  )
  return parser


def make_solver(
  flags: argparse.Namespace, on_event: Callable[[Event], None]
) -> tuple[list[Language], Callable[[str], pipeline.Report]]:
  """Makes the languages and the function that solves a text.

  Raises:
    ValueError: the flags do not fit together, or the server, a package or the
      sandbox is missing.
    OSError: a file cannot be read or written.
  """
  names = [name for name in flags.languages.split(',') if name]
  chosen = languages.choose_languages(names)
  has_programs = any(language.is_program for language in chosen)
  if flags.direct and has_programs:
    raise ValueError(
      '--direct is for a model that answers with JSON formulations; add '
      '--languages=json'
    )
  sandbox = None
  if has_programs:
    sandbox = execution.make_sandbox(flags.timeout, flags.memory)
  key = read_api_key(flags.api_key_file)
  client = chat_model.make_client(flags.base_url, key)
  model = chat_model.choose_model(client, flags.model)
  options = {
    name: value
    for name in ('max_tokens', 'temperature', 'seed')
    if (value := getattr(flags, name)) is not None
  }
  settings = pipeline.Settings(
    flags.lang,
    flags.max_rounds,
    flags.timeout,
    flags.tolerance,
    flags.direct,
    options,
  )
  sinks = [on_event]
  if flags.trace:
    sinks.append(traces.TraceWriter(os.path.expanduser(flags.trace), [key]))

  def emit(event: Event) -> None:
    for sink in sinks:
      sink(event)

  return chosen, lambda text: pipeline.solve_text(
    text, model, chosen, sandbox, settings, emit
  )


def print_progress(event: Event) -> None:
  """Prints an event as a line to standard error."""
  match event:
    case {'event': 'asked', 'agent': agent}:
      line = f'{agent} ...'
    case {'event': 'replied', 'agent': agent, 'error': error}:
      line = f'{agent}: {error}'
    case {'event': 'replied', 'agent': agent, 'reason': 'length'}:
      line = f'{agent}: the reply was cut off; raise --max_tokens'
    case {'event': 'ran', 'language': name, 'status': status, 'value': value}:
      line = f'{name}: {status}' + ('' if value is None else f' {value:.10g}')
    case _:
      return
  terminal.show(line, file=sys.stderr)


def check_output(path: str) -> None:
  """Checks that a file can be written, before the model is asked.

  Raises:
    ValueError: its folder cannot be written to.
  """
  folder = os.path.dirname(os.path.abspath(os.path.expanduser(path)))
  if path and not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
    raise ValueError(f'--output={path}: {folder} is no folder to write to')


def main(flags: argparse.Namespace) -> int:
  """Runs the command; returns the exit status.

  Raises:
    ValueError, OSError: an error with a message for the user.
  """
  check_output(flags.output)
  text = read_input(flags.problem, 'the problem in words').strip()
  _, solve_text = make_solver(flags, print_progress)
  outcome = solve_text(text)
  if flags.output:
    content = json.dumps(report.to_json(outcome), indent=2, ensure_ascii=False)
    files.write_text(os.path.expanduser(flags.output), content + '\n')
  terminal.show(report.summary(outcome))
  return int(outcome.value is None)


def make_solve_parser() -> argparse.ArgumentParser:
  """Makes the argument parser of this command."""
  parser = make_parser('solve', __doc__)
  parser.add_argument(
    '--problem', required=True, help='A text file with the problem.'
  )
  parser.add_argument(
    '--output', default='', help='A JSON file for the report with the trace.'
  )
  return parser


if __name__ == '__main__':
  run_command(make_solve_parser(), main)

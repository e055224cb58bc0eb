# SPDX-License-Identifier: Apache-2.0
"""python -m examples.or_agents.evaluate: accuracy of the agents on a benchmark.

  python -m examples.or_agents.evaluate --data=FILE --base_url=URL --model=M

--data is a file or folder that examples/or_agents/benchmarks.py reads. For the
vote and for each language alone the table has the accuracy, and the shares of
programs that run to a solver's conclusion at once and after repairs, with 95 %
Wilson intervals (Wilson, Probable Inference, the Law of Succession, and
Statistical Inference, JASA 22, 1927).
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import binomtest

from examples.or_agents import benchmarks, report, solve
from examples.or_agents.benchmarks import Row
from examples.or_agents.pipeline import Report
from examples.or_agents.vote import agree
from moepeft.agent.chat_model import ReplyError
from moepeft.agent.flags import number_in_range, run_command
from moepeft.agent.loop import ignore_event
from moepeft.core import files, terminal

_NO_OPTIMUM = ('infeasible', 'unbounded')
_MEASURES = ('accuracy', 'ran at once', 'ran')


def score(row: Row, outcome: Report | None, tolerance: float) -> dict[str, Any]:
  """{'vote' or language: {measure: whether it holds}} of a row.

  Args:
    outcome: None if the model gave no reply; then only the vote is scored.
  """

  def is_right(status: str, value: float | None) -> bool:
    if row.value is None:
      return status in _NO_OPTIMUM
    return value is not None and agree(value, row.value, tolerance)

  if outcome is None:
    return {'vote': {'accuracy': False}}
  scores = {'vote': {'accuracy': is_right(outcome.status, outcome.value)}}
  for program in outcome.programs:
    last = program.last
    scores[program.language] = {
      'accuracy': is_right(last.status, last.value),
      'ran at once': program.executions[0].status != 'error',
      'ran': last.status != 'error',
    }
  return scores


def proportion(flags: Sequence[bool]) -> dict[str, float]:
  """The share of true flags, with its 95 % Wilson interval."""
  test = binomtest(sum(flags), len(flags))
  low, high = test.proportion_ci(method='wilson')
  return {'share': sum(flags) / len(flags), 'low': low, 'high': high}


def summarize(
  scores: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> dict[str, Any]:
  """{name: {measure: proportion}} over rows; a row without a reply is wrong."""
  table = {}
  for name in names:
    measures = _MEASURES if name != 'vote' else _MEASURES[:1]
    table[name] = {
      measure: proportion(
        [row.get(name, {}).get(measure, False) for row in scores]
      )
      for measure in measures
    }
  return table


def format_table(table: Mapping[str, Any]) -> str:
  """The table of `summarize` as text."""
  lines = [f'{"":<10}' + ''.join(f'{name:<20}' for name in _MEASURES)]
  for name, row in table.items():
    cells = ''.join(
      f'{cell["share"]:<6.2f}{cell["low"]:.2f} to {cell["high"]:<6.2f}'
      for cell in row.values()
    )
    lines.append(f'{name:<10}{cells}')
  return '\n'.join(line.rstrip() for line in lines)


def main(flags: argparse.Namespace) -> int:
  """Runs the command; returns the exit status.

  Raises:
    ValueError, OSError: an error with a message for the user.
  """
  solve.check_output(flags.output)
  rows = benchmarks.read_rows(os.path.expanduser(flags.data))[: flags.limit]
  chosen, solve_text = solve.make_solver(flags, ignore_event)
  names = ['vote', *(language.name for language in chosen)]
  scores, results, problem = [], [], ''
  for i, row in enumerate(rows, 1):
    outcome = None
    try:
      outcome = solve_text(row.text)
    except ReplyError as e:
      problem = str(e)
    scores.append(score(row, outcome, flags.tolerance))
    result = report.to_json(outcome) if outcome else {'error': problem}
    results.append(
      {'name': row.name, 'expected': row.value, 'scores': scores[-1], **result}
    )
    mark = 'right' if scores[-1]['vote']['accuracy'] else 'wrong'
    text = report.summary(outcome) if outcome else problem
    line = f'{i}/{len(rows)} {row.name}: {mark}, expected {row.value}. '
    terminal.show(line + text.partition('\n')[0], file=sys.stderr)
    table = summarize(scores, names)
    if flags.output:
      # After each row, so that an interruption loses none.
      content = {'rows': i, 'table': table, 'results': results}
      text = json.dumps(content, indent=1, ensure_ascii=False)
      files.write_text(os.path.expanduser(flags.output), text + '\n')
  silent = sum('error' in result for result in results)
  if silent == len(rows):
    raise ValueError(f'no row has a reply of the model: {problem}')
  terminal.show(f'{len(rows)} rows, {silent} of them without a reply')
  terminal.show(format_table(table))
  return 0


def make_parser() -> argparse.ArgumentParser:
  """Makes the argument parser of this command."""
  parser = solve.make_parser('evaluate', __doc__)
  parser.add_argument('--data', required=True, help='The benchmark.')
  parser.add_argument(
    '--limit',
    type=number_in_range(int, 1, 1_000_000),
    default=None,
    help='The first rows only.',
  )
  parser.add_argument(
    '--output', default='', help='A JSON file for table and reports.'
  )
  return parser


if __name__ == '__main__':
  run_command(make_parser(), main)

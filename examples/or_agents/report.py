# SPDX-License-Identifier: Apache-2.0
"""The report of a problem as text and as JSON."""

import dataclasses
from typing import Any

from examples.or_agents.pipeline import Program, Report


def to_json(report: Report) -> dict[str, Any]:
  """The whole report as a JSON object, with the trace."""
  return dataclasses.asdict(report)


def summary(report: Report) -> str:
  """The report for a terminal: value, votes and variables."""
  if report.value is None:
    ends = '; '.join(map(_end, report.programs))
    return f'No program has an optimal value ({report.status}): {ends}.'
  count = len(report.programs)
  lines = [
    f'The optimal value is {report.value:.10g}: {len(report.agreeing)} of '
    f'{count} programs agree ({", ".join(report.agreeing)}).'
  ]
  for program in report.programs:
    if program.language not in report.agreeing:
      vote = 'outvoted: ' if program.last.status == 'optimal' else ''
      lines.append(f'  {vote}{_end(program)}')
  winner = next(p for p in report.programs if p.language in report.agreeing)
  if variables := winner.last.variables:
    lines.append(f'Variables of {winner.language}:')
    lines += [f'  {name} = {x:.10g}' for name, x in variables.items()]
  return '\n'.join(lines)


def _end(program: Program) -> str:
  """The end of a program in words."""
  last, repairs = program.last, program.repairs
  end = f'{program.language} ended as {last.status}'
  if last.status == 'optimal':
    end = f'{program.language} has {last.value:.10g}'
  if last.status == 'error' and (lines := last.output.split('\n')):
    end += f' ({" ".join(lines[-1].split())[:120]})'
  return f'{end} after {repairs} repair{"s" * (repairs != 1)}'

# SPDX-License-Identifier: Apache-2.0
"""python -m examples.or_agents.generate: problems in words with their optima.

  python -m examples.or_agents.generate --rows=500 --seed=0 --output=rows.jsonl
  python -m examples.or_agents.generate --check=rows.jsonl

A row is a JSON object: text, domain, family, template, split, problem (compact
JSON, see examples/or_agents/problem.py), value, solver. The second command
solves each row anew in two solvers and compares the values. The same seed and
sizes give the same rows.

Problems are LPs and MILPs of the families in families.py; only feasible and
bounded ones with an optimum other than 0 are kept. Templates of wording.py put
them into sentences or a table, in which every number of the problem stands
exactly once; check_numbers checks this for each row. The idea of verifiable
synthetic data is that of OptiTrust (arXiv:2508.03117).

split is train, held_out_template (no sentence of it is in training),
held_out_domain (no training row is of its domain) or held_out_both. No problem
is in two rows.
"""

import argparse
import collections
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from examples.or_agents import wording
from examples.or_agents.domains import DOMAINS, HELD_OUT_DOMAINS
from examples.or_agents.families import FAMILIES, Instance, Scale
from examples.or_agents.problem import SOLVERS, Problem, solve
from examples.or_agents.vote import agree
from moepeft.agent.flags import command_parser, read_input
from moepeft.core import files
from moepeft.tasks.stable_random import StableRandom

SPLITS = ('train', 'held_out_template', 'held_out_domain', 'held_out_both')
# The stream of `StableRandom`, apart from those of moepeft.tasks.
_STREAM = 2508_03117
# A row in so many has a held-out template.
_HELD_OUT_DIVISOR = 5
# Seconds of a solver; the problems take a few milliseconds.
_SECONDS = 30
_MAX_ROWS = 1_000_000
DrawTemplate = Callable[[StableRandom, str, bool], wording.Template]


@dataclasses.dataclass(frozen=True)
class Sample:
  """A problem in words with its optimum.

  Attributes:
    row: the row as written.
    instance: fields and symbolic form.
  """

  row: dict[str, Any]
  instance: Instance

  @property
  def problem(self) -> Problem:
    return self.instance.problem


def samples(
  seed: int,
  scale: Scale,
  families: Sequence[str] = tuple(FAMILIES),
  rejected: collections.Counter | None = None,
  draw_template: DrawTemplate = wording.draw_template,
) -> Iterator[Sample]:
  """Yields solved problems without end, each once.

  Args:
    seed: rows of one seed and scale are always the same.
    families: the families, drawn evenly.
    rejected: counts the draws that are left out, by reason.
    draw_template: draws the words of a problem; those of `wording` by default.

  Raises:
    ValueError: a text lacks a number of its problem, which is a fault of the
      template.
  """
  rejected = collections.Counter() if rejected is None else rejected
  problems = set()
  index = -1
  while True:
    index += 1
    rng = StableRandom(seed, _STREAM, index)
    family = rng.choice(families)
    domain = rng.choice(DOMAINS)
    instance = FAMILIES[family](rng, domain, scale)
    form = instance.problem.to_json()
    if form in problems:
      rejected['double'] += 1
      continue
    problems.add(form)
    solution = solve(instance.problem, seconds=_SECONDS)
    if solution.status != 'optimal':
      rejected[solution.status] += 1
      continue
    # Wrong programs often have the value 0, too.
    if agree(solution.value, 0):
      rejected['optimum 0'] += 1
      continue
    held_out = rng.randbelow(_HELD_OUT_DIVISOR) == 0
    template = draw_template(rng, family, held_out)
    text = template.render(instance.fields, domain)
    check_numbers(instance, text)
    other_domain = domain.name in HELD_OUT_DOMAINS
    row = {
      'text': text,
      'domain': domain.name,
      'family': family,
      'template': template.name,
      'split': SPLITS[held_out + 2 * other_domain],
      'problem': form,
      'value': round(solution.value, 9),
      'solver': 'highs',
    }
    yield Sample(row, instance)


def check_numbers(instance: Instance, text: str) -> None:
  """Checks that the problem can be read back from its text.

  Raises:
    ValueError: a number of the fields is missing in the text or stands there
      more often, or one of the problem is neither a field's nor 0, 1 or -1.
  """
  fields = collections.Counter(wording.numbers_of(instance.fields))
  in_text = collections.Counter(wording.numbers_in(text))
  if fields != in_text:
    missing, extra = fields - in_text, in_text - fields
    raise ValueError(
      f'the text lacks {sorted(missing)} and has too many of {sorted(extra)}: '
      f'{text}'
    )
  problem = instance.problem
  numbers = {float(n) for n in problem.objective}
  for row in problem.constraints:
    numbers |= {float(n) for n in (*row.coefficients, row.right)}
  for variable in problem.variables:
    bounds = (variable.lower, variable.upper)
    numbers |= {float(n) for n in bounds if n is not None}
  derived = {n for n in numbers if n not in fields and -n not in fields}
  if derived - {0.0, 1.0, -1.0}:
    raise ValueError(
      f'the problem has the numbers {sorted(derived)}, which no field has: '
      f'{problem.to_json()}'
    )


def faults(row: dict[str, Any]) -> list[str]:
  """The disagreements of a row with two solvers; empty if there are none."""
  problem = Problem.from_json(row['problem'])
  result = []
  for solver in SOLVERS:
    solution = solve(problem, solver, _SECONDS)
    if solution.status != 'optimal':
      result.append(f'{solver}: {solution.status}')
    elif not agree(solution.value, row['value']):
      result.append(f'{solver}: {solution.value}, not {row["value"]}')
  return result


def write_rows(path: str, rows: Iterator[dict[str, Any]]) -> None:
  """Writes rows as JSON lines."""
  os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
  lines = [json.dumps(row, ensure_ascii=False) + '\n' for row in rows]
  files.write_text(path, ''.join(lines))


def read_rows(path: str) -> list[dict[str, Any]]:
  """Reads rows of this command.

  Raises:
    ValueError: the file cannot be read, or a line is not such a row.
  """
  rows = []
  text = read_input(path, 'rows, which --output=FILE writes')
  for number, line in enumerate(text.splitlines(), 1):
    try:
      row = json.loads(line)
      Problem.from_json(row['problem'])
      float(row['value']), str(row['text'])
    except (ValueError, KeyError, TypeError) as e:
      raise ValueError(
        f'{path}, line {number}: expected a row with text, problem and value '
        f'({type(e).__name__}: {e}); write the file with --output'
      ) from None
    rows.append(row)
  return rows


def check(path: str) -> int:
  """Solves a file's rows in two solvers; returns the number of bad rows."""
  rows, bad = read_rows(path), 0
  for number, row in enumerate(rows, 1):
    if problems := faults(row):
      bad += 1
      print(f'{path}, line {number}: {"; ".join(problems)}')
  counts = collections.Counter(row.get('split', '') for row in rows)
  print(
    f'{len(rows) - bad} of {len(rows)} rows re-solve to their value in '
    f'{" and ".join(SOLVERS)}; '
    + ', '.join(f'{count} {split}' for split, count in counts.most_common())
  )
  return bad


def generate(flags: argparse.Namespace) -> None:
  """Writes rows, and rows to train on where they are asked for."""
  from examples.or_agents import training_rows

  rejected: collections.Counter = collections.Counter()
  scale = Scale(flags.entities, flags.resources, flags.largest, not flags.plain)
  for name, low, high in (('rows', 1, _MAX_ROWS), ('seed', 0, 2**63 - 1)):
    if not low <= getattr(flags, name) <= high:
      raise ValueError(
        f'--{name} is from {low} to {high:,}; got {getattr(flags, name)}'
      )
  families = [name for name in flags.families.split(',') if name]
  if unknown := set(families) - FAMILIES.keys():
    raise ValueError(
      f'--families are of {", ".join(FAMILIES)}; got {min(unknown)!r}'
    )
  stream = samples(flags.seed, scale, families or tuple(FAMILIES), rejected)
  drawn = [next(stream) for _ in range(flags.rows)]
  write_rows(flags.output, (sample.row for sample in drawn))
  print(f'{len(drawn)} rows in {flags.output}')
  if rejected:
    print(
      'left out: '
      + ', '.join(f'{n} {reason}' for reason, n in rejected.most_common())
    )
  if flags.training:
    trained = [s for s in drawn if s.row['split'] == 'train']
    for name, rows in training_rows.by_agent(trained, flags.seed).items():
      path = os.path.join(flags.training, f'{name}.jsonl')
      write_rows(path, iter(rows))
      print(f'{len(rows)} rows in {path}')


def make_parser() -> argparse.ArgumentParser:
  """Makes the argument parser of this command."""
  parser = command_parser('examples.or_agents.generate', __doc__)
  add = parser.add_argument
  add(
    '--rows',
    type=int,
    default=500,
    help='Rows to write.',
  )
  add(
    '--seed',
    type=int,
    default=0,
    help='The seed.',
  )
  add('--output', default='', help='The .jsonl file of the rows.')
  add(
    '--training',
    default='',
    help='A folder for rows to train on, of the split train: a file for each '
    'agent, and pairs of right and wrong answers.',
  )
  add('--families', default='', help='Names with commas; default: all.')
  add(
    '--entities',
    type=int,
    default=4,
    help='The maximum number of products, sites, ... of a problem.',
  )
  add(
    '--resources',
    type=int,
    default=4,
    help='The maximum number of resources of a problem.',
  )
  add(
    '--largest',
    type=int,
    default=40,
    help='The maximum of a coefficient.',
  )
  add(
    '--plain',
    action='store_true',
    help='Without decimals, bounds and zero coefficients.',
  )
  add('--check', default='', help='A file of rows to solve in two solvers.')
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit status."""
  parser = make_parser()
  flags = parser.parse_args(argv)
  if bool(flags.output) == bool(flags.check):
    parser.error('name either --output=FILE to write or --check=FILE to check')
  try:
    if flags.check:
      return int(check(flags.check) > 0)
    generate(flags)
  except (ValueError, OSError, ImportError) as e:
    parser.exit(2, f'error: {e}\n')
  return 0


if __name__ == '__main__':
  sys.exit(main())

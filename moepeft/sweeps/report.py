# SPDX-License-Identifier: Apache-2.0
"""Prints the trials of a sweep before it, and their results after it."""

import shlex
from collections.abc import Mapping, Sequence

from moepeft.core import terminal
from moepeft.evaluation.tables.terminal import aligned
from moepeft.sweeps import display, results, selection
from moepeft.sweeps.directory import SweepDirectory
from moepeft.sweeps.runner import Sweep
from moepeft.sweeps.trials import Trial


def print_trials(
  trials: Sequence[Trial],
  keys: Sequence[str],
  methods: Mapping[str, str],
  errors: Mapping[str, str],
) -> None:
  """Prints the trials, their flags, and their number.

  Args:
    methods, errors: from `solving.solve`.
  """
  width = max(len(trial.name) for trial in trials)
  for trial in trials:
    terminal.show(
      f'{trial.index:4}  {trial.name:{width}}  {shlex.join(trial.flags)}'
    )
    if trial.name in methods:
      terminal.show(f'{"":4}  solved: {methods[trial.name]}')
    if trial.name in errors:
      terminal.show(f'{"":4}  not solved: {errors[trial.name]}')
  line = f'{len(trials)} trials'
  if keys:
    rows = {trial.name: {'status': results.UNFINISHED} for trial in trials}
    choices = selection.choose(trials, rows, keys)
    runs = selection.count_runs(trials, choices, keys)
    line += f', of which {runs} are run: {", ".join(keys)} chosen on validation'
  print(line)


def print_results(sweep: Sweep, directory: SweepDirectory) -> None:
  """Prints a table of all rows, and where they are."""
  rows = sweep.final_rows()
  terminal.show(aligned(display.table(rows)))
  for why in dict.fromkeys(row['why'] for row in rows if row.get('why')):
    terminal.show(why)
  for row in rows:
    if row['status'] == results.FAILED:
      terminal.show(f'failed    {directory.logs_dir}/{row["name"]}.log')
  print(f'results   {directory.results_file}')
  if any(map(results.is_result, rows)):
    print(f'compare   python -m moepeft.tables {shlex.quote(directory.path)}')

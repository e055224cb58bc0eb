# SPDX-License-Identifier: Apache-2.0
"""python -m moepeft.sweep --config=FILE --grid='KEY=VALUES; ...' --workdir=DIR

Without --grid the trials are those of the config file's GRID, which the files
of configs/ablate have.

Each combination of the grid's values is a trial: an ordinary run of
moepeft.train, in a process and a directory of its own, DIR/runs/NAME. The same
command continues a sweep that was stopped: trials that have ended are not run
again. DIR/results.jsonl has a row for each trial.
"""

import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Sequence

from absl import flags

from moepeft import registries
from moepeft.config import check as config_check
from moepeft.config import command_line
from moepeft.core import files, terminal
from moepeft.runs.directory import open_workdir
from moepeft.sweeps import (
  display,
  report,
  results,
  runner,
  selection,
  slurm,
  solving,
)
from moepeft.sweeps import grid as grid_lib
from moepeft.sweeps.attempt import Attempt, Command
from moepeft.sweeps.directory import TRAIN, SweepDirectory
from moepeft.sweeps.trials import Trial, make_trials

# Flags of this command; the others are those of moepeft.train.
_FLAGS = frozenset(
  (
    *('grid', 'workdir', 'jobs', 'dry_run', 'select', 'by', 'slurm', 'sbatch'),
    *('trial', 'evaluate', 'traceback', 'vmap'),
  )
)


def shared_flags(argv: Sequence[str]) -> list[str]:
  """The arguments that every trial has: all but this command's."""
  shared, arguments = [], list(argv)
  while arguments:
    argument = arguments.pop(0)
    name, equals, _ = argument.lstrip('-').partition('=')
    name = name if name in _FLAGS else name.removeprefix('no')
    if name not in _FLAGS:
      shared.append(argument)
    elif not equals and not flags.FLAGS[name].boolean:
      # Its value is the next argument.
      arguments = arguments[1:]
  return shared


def check(
  trials: Sequence[Trial], shared: Sequence[str], keys: Sequence[str]
) -> None:
  """Checks the configs of all trials before any of them is run.

  Raises:
    ValueError: a config is refused, or --select has nothing to choose by.
  """
  grid_keys = {key for trial in trials for key in trial.settings}
  for argument in shared:
    match = re.match(r'--?config\.([\w.]+)', argument)
    if match and match[1] in grid_keys:
      raise ValueError(
        f'config.{match[1]} is a key of --grid and a flag; drop one of them'
      )
  for trial in trials:
    config_check.check(trial.config, registries.BY_KEY)
    evaluation = trial.config.evaluation
    if keys and not (evaluation.after or evaluation.every_steps):
      raise ValueError(
        '--select needs validation losses; set config.evaluation.after, or '
        'config.evaluation.every_steps'
      )


def run_trial(
  sweep: runner.Sweep,
  directory: SweepDirectory,
  trial: Trial,
  command: Command,
) -> str:
  """Runs one trial of an array job; returns its error, or ''.

  Raises:
    ValueError: the trial depends on others that have not ended.
  """
  choice, row = sweep.choices()[trial.name], sweep.rows[trial.name]
  if choice.runs is None:
    raise ValueError(
      f'trial {trial.index} waits for a choice of --select; run the trials of '
      'the first seed before it'
    )
  if choice.runs is False:
    terminal.show(f'{trial.name} is left out: {choice.why}')
    return ''
  if row['status'] != results.FINISHED:
    directory.forget_failure(trial)
    terminal.show(f'{trial.name}: output in {directory.log_file(trial)}')
    attempt = Attempt(directory, [trial], command)
    try:
      while not attempt.is_done():
        time.sleep(0.1)
    except KeyboardInterrupt:
      runner.stop([attempt])
      raise
    row = runner.record(sweep, directory, attempt, trial)
  terminal.show(f'{trial.name}  {display.describe(row)}')
  return row.get('error', '')


def write_script(
  sweep: runner.Sweep,
  directory: SweepDirectory,
  trials: Sequence[Trial],
  shared: Sequence[str],
) -> None:
  """Writes the array job, and prints the commands that submit it."""
  own_flags = {
    'grid': _GRID.value,
    'workdir': directory.path,
    'select': _SELECT.value,
    'evaluate': _EVALUATE.value,
  }
  command = [sys.executable, '-m', 'moepeft.sweep', *shared]
  command += [f'--{name}={value}' for name, value in own_flags.items() if value]
  choices, jobs = sweep.choices(), _JOBS.value if _JOBS.present else 0
  first = [t.index for t in trials if choices[t.name].runs]
  later = [t.index for t in trials if choices[t.name].runs is None]
  path = directory.script_file
  text = slurm.script(command, first, jobs, directory.logs_dir, _SBATCH.value)
  files.write_text(path, text)
  print(f'wrote {path}; submit it with')
  if later:
    print(f'job=$(sbatch --parsable {shlex.quote(path)})')
    print(
      f'sbatch --dependency=afterany:$job --array={slurm.array(later, jobs)} '
      f'{shlex.quote(path)}'
    )
  else:
    print(f'sbatch {shlex.quote(path)}')


def main(argv) -> None:
  del argv
  config = _CONFIG.value
  grid = grid_lib.of_flags(_GRID.value, command_line.config_file())
  trials = make_trials(config, grid)
  keys = selection.parse_keys(_SELECT.value, trials)
  shared = shared_flags(sys.argv[1:])
  check(trials, shared, keys)
  if _DRY_RUN.value:
    methods, errors = solving.solve(trials)
    report.print_trials(trials, keys, methods, errors)
    solving.check(errors)
    return
  if not _WORKDIR.value:
    raise ValueError('--workdir is missing: name the directory of the sweep')
  workdir = os.path.expanduser(_WORKDIR.value)
  directory = SweepDirectory(workdir, _EVALUATE.value)
  if _TRIAL.value is None:
    # A run that has started has its explicit method.
    unsolved = [
      t for t in trials if not os.path.exists(directory.run(t).config_file)
    ]
    solving.check(solving.solve(unsolved)[1])

  def command(trials: Sequence[Trial], module: str) -> list[str]:
    python = [sys.executable, '-m']
    if len(trials) > 1:
      indices = ','.join(str(trial.index) for trial in trials)
      sweep_flags = [f'--grid={_GRID.value}', f'--sweep={directory.path}']
      module = 'moepeft.train_trials'
      return [*python, module, *shared, *sweep_flags, f'--trials={indices}']
    (trial,) = trials
    config_flags = [*shared, *trial.flags] if module == TRAIN else []
    workdir = directory.run(trial).path
    return [*python, module, *config_flags, f'--workdir={workdir}']

  if _VMAP.value > 1 and (_TRIAL.value is not None or _SLURM.value):
    raise ValueError(
      '--vmap trains trials together in one process, and a task of an array '
      'job is one trial; leave out --vmap'
    )
  # SIGTERM saves the running trials too.
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  if _TRIAL.value is not None or _SLURM.value:
    directory.prepare(config)
    sweep = runner.Sweep(directory, trials, keys)
    if _SLURM.value:
      write_script(sweep, directory, trials, shared)
      return
    if _TRIAL.value >= len(trials):
      raise ValueError(
        f'--trial={_TRIAL.value}: the grid has the trials 0 to '
        f'{len(trials) - 1}'
      )
    trial = trials[_TRIAL.value]
    error = run_trial(sweep, directory, trial, command)
    with directory.writing_results():
      runner.Sweep(directory, trials, keys).write()
    sys.exit(1 if error else 0)
  with open_workdir(directory.path):
    directory.prepare(config)
    sweep = runner.Sweep(directory, trials, keys)
    sweep.forget_failures()
    runs = {trial.name: directory.run(trial) for trial in trials}
    jobs, vmap = _JOBS.value, _VMAP.value
    processes = f'{jobs} at once' + (
      f', each with up to {vmap} trials' if vmap > 1 else ''
    )
    terminal.show(
      f'{len(trials)} trials, {sweep.remaining()} to run, {processes}'
    )
    shown = display.Display(runs, jobs * vmap)
    runner.run(sweep, directory, command, jobs, shown, vmap)
  report.print_results(sweep, directory)
  if any(row['status'] == results.FAILED for row in sweep.rows.values()):
    sys.exit(1)


if __name__ == '__main__':
  _CONFIG = command_line.define_config('configs/molora_t5.py')
  _GRID = flags.DEFINE_string(
    'grid',
    '',
    "Keys and their values, 'method=lora(rank=4)|molora(experts=2); seed=0..4',"
    ' or a file of them. Keys of the config are written as in --config.KEY; '
    'others are options of the method.',
  )
  _WORKDIR = flags.DEFINE_string(
    'workdir', '', 'The directory of the sweep; one that is there is resumed.'
  )
  _JOBS = flags.DEFINE_integer(
    'jobs', 1, 'Trials at once.', lower_bound=1, upper_bound=1_000
  )
  _VMAP = flags.DEFINE_integer(
    'vmap',
    1,
    'Trials that a process trains together, by one vmapped step over the '
    'shared base, where they differ in seeds, rates and weights of losses '
    'alone.',
    lower_bound=1,
    upper_bound=1_000,
  )
  _DRY_RUN = flags.DEFINE_bool(
    'dry_run', False, 'Print the trials and how many there are; run none.'
  )
  _SELECT = flags.DEFINE_string(
    'select',
    '',
    'Keys, such as optimizer.learning_rate, whose best values are chosen with '
    'the first seed; the other seeds are run with these alone.',
  )
  _BY = flags.DEFINE_enum(
    'by',
    'validation',
    ['validation'],
    'How --select chooses: by the lowest validation loss.',
  )
  _EVALUATE = flags.DEFINE_bool(
    'evaluate',
    False,
    'Run moepeft.evaluate on each trained run; moepeft.tables then has its '
    'examples for paired intervals.',
  )
  _SLURM = flags.DEFINE_bool(
    'slurm', False, 'Write an array job, a task for each trial; run none.'
  )
  _SBATCH = flags.DEFINE_string(
    'sbatch', '', "Options of the array job, '--time=1:00:00 --gpus=1'."
  )
  _TRIAL = flags.DEFINE_integer(
    'trial',
    None,
    'Run the trial of this index alone, as a task of the array job does.',
    lower_bound=0,
    upper_bound=1_000_000,
  )
  command_line.run(main)

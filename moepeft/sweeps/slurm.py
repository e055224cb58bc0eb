# SPDX-License-Identifier: Apache-2.0
"""The script of a SLURM array job, with a task for each trial."""

import os
import shlex
from collections.abc import Sequence

_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name=moepeft-sweep
#SBATCH --output={logs}/slurm-%A-%a.log
#SBATCH --array={array}
{options}cd {folder}
exec {command} --trial="$SLURM_ARRAY_TASK_ID"
"""


def script(
  command: Sequence[str],
  indices: Sequence[int],
  jobs: int,
  logs: str,
  options: str = '',
) -> str:
  """Returns the text of a script for sbatch.

  Args:
    command: of the sweep, without --slurm.
    indices: the trials to run.
    jobs: the number of tasks at once; 0 for as many as the cluster gives.
    logs: the directory for the output of the tasks.
    options: more options of sbatch, '--time=1:00:00 --gpus=1'.

  Raises:
    ValueError: an option is not one.
  """
  words = shlex.split(options)
  for word in words:
    if not word.startswith('-'):
      raise ValueError(
        f'--sbatch has options like --time=1:00:00 --gpus=1; got {word!r}'
      )
  return _SCRIPT.format(
    logs=shlex.quote(os.path.abspath(logs)),
    array=array(indices, jobs),
    options=''.join(f'#SBATCH {word}\n' for word in words),
    folder=shlex.quote(os.getcwd()),
    command=shlex.join(command),
  )


def array(indices: Sequence[int], jobs: int = 0) -> str:
  """'0-2,5%4' of the indices 0, 1, 2 and 5, and 4 jobs at once."""
  ranges: list[list[int]] = []
  for index in sorted(indices):
    if ranges and index == ranges[-1][1] + 1:
      ranges[-1][1] = index
    else:
      ranges.append([index, index])
  return ','.join(
    f'{first}-{last}' if last > first else str(first) for first, last in ranges
  ) + (f'%{jobs}' if jobs else '')

# SPDX-License-Identifier: Apache-2.0
"""The script of an array job."""

import os
import subprocess

import pytest

from moepeft.sweeps import slurm


def test_indices_are_ranges():
  assert slurm.array([0, 1, 2, 5, 7, 8]) == '0-2,5,7-8'
  assert slurm.array([4]) == '4'
  assert slurm.array([4, 5], jobs=3) == '4-5%3'


def test_a_task_runs_the_command_with_its_index(tmp_path):
  program = tmp_path / 'show'
  program.write_text('#!/bin/sh\npwd; printf "%s\\n" "$@"\n')
  program.chmod(0o755)
  text = slurm.script(
    [str(program), '--grid=method=lora|molora; seed=0..4'],
    [0, 1, 2],
    2,
    str(tmp_path / 'logs'),
    '--time=1:00:00 --gpus=1',
  )
  lines = text.splitlines()
  assert lines[0] == '#!/bin/bash'
  assert '#SBATCH --array=0-2%2' in lines
  assert '#SBATCH --time=1:00:00' in lines and '#SBATCH --gpus=1' in lines
  script = tmp_path / 'script'
  script.write_text(text)
  done = subprocess.run(
    ['bash', str(script)],
    env=os.environ | {'SLURM_ARRAY_TASK_ID': '2'},
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=True,
  )
  # In the directory that the sweep was called in, not that of the job.
  assert done.stdout.splitlines() == [
    os.getcwd(),
    '--grid=method=lora|molora; seed=0..4',
    '--trial=2',
  ]


def test_a_word_that_is_no_option_is_refused():
  with pytest.raises(ValueError, match="got 'gpu'"):
    slurm.script(['x'], [0], 0, 'logs', '--partition gpu')

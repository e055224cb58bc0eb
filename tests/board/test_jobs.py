# SPDX-License-Identifier: Apache-2.0
"""A board knows the processes of its runs, and those of an earlier board."""

import signal
import sys
import time

import pytest

from moepeft.board.jobs import Jobs

# A program that says when its handler is there, and its children's number.
_WAITS = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit({code}))
print('ready', flush=True)
while True:
  time.sleep(0.01)
"""


def waits(code=143):
  return [sys.executable, '-c', _WAITS.format(code=code)]


def until(condition, seconds=20):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, 'it took too long'
    time.sleep(0.01)


@pytest.fixture
def jobs(tmp_path):
  value = Jobs(str(tmp_path / 'jobs'))
  yield value
  for run, kind in list(value._processes):
    if value.state(run, kind)['running']:
      value.stop(run, kind, force=True)


def started(jobs, command, run='a/b', kind='train'):
  jobs.start(run, kind, command)
  until(lambda: 'ready' in jobs.log(run, kind))


def test_a_process_is_running_until_it_is_stopped(jobs):
  assert jobs.state('a/b', 'train') == {}
  started(jobs, waits())
  state = jobs.state('a/b', 'train')
  assert state['running'] and not state['stopping']
  assert state['command'] == waits()
  jobs.stop('a/b', 'train')
  until(lambda: not jobs.state('a/b', 'train')['running'])
  # 143 is the code of a run that SIGTERM has ended.
  assert jobs.state('a/b', 'train')['error'] == ''


def test_another_board_knows_the_process_and_stops_it(jobs, tmp_path):
  started(jobs, waits())
  second = Jobs(str(tmp_path / 'jobs'))
  assert second.state('a/b', 'train')['running']
  with pytest.raises(ValueError, match='is running; stop it first'):
    second.start('a/b', 'train', waits())
  second.stop('a/b', 'train')
  until(lambda: not second.state('a/b', 'train')['running'])


def test_a_process_that_ignores_sigterm_is_killed(jobs):
  command = [
    sys.executable,
    '-c',
    'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);'
    'print("ready", flush=True); time.sleep(99)',
  ]
  started(jobs, command)
  jobs.stop('a/b', 'train')
  assert jobs.state('a/b', 'train')['stopping']
  jobs.stop('a/b', 'train', force=True)
  until(lambda: not jobs.state('a/b', 'train')['running'])
  assert jobs.state('a/b', 'train')['error'] == ''


def test_the_last_error_is_the_sentence_of_a_failure(jobs, tmp_path):
  code = 'print("error: first"); print("error: no such data"); exit(2)'
  jobs.start('a', 'train', [sys.executable, '-c', code])
  until(lambda: not jobs.state('a', 'train')['running'])
  assert jobs.state('a', 'train')['error'] == 'no such data'
  # Another board does not know the code of the exit, but reads the log.
  assert Jobs(str(tmp_path / 'jobs')).state('a', 'train')['error'] == (
    'no such data'
  )


def test_a_crash_names_its_signal(jobs):
  code = f'import os; os.kill(os.getpid(), {int(signal.SIGKILL)})'
  jobs.start('a', 'train', [sys.executable, '-c', code])
  until(lambda: not jobs.state('a', 'train')['running'])
  assert 'SIGKILL' in jobs.state('a', 'train')['error']


def test_what_the_board_did_not_start_it_does_not_stop(jobs):
  with pytest.raises(ValueError, match='started elsewhere'):
    jobs.stop('a', 'train')
  jobs.start('a', 'train', [sys.executable, '-c', ''])
  until(lambda: not jobs.state('a', 'train')['running'])
  # Its number may be that of another process by now.
  with pytest.raises(ValueError, match='started elsewhere'):
    jobs.stop('a', 'train')


def test_a_second_start_has_a_log_of_its_own(jobs):
  for word in ('first', 'second'):
    jobs.start('a', 'train', [sys.executable, '-c', f'print("{word}")'])
    until(lambda: not jobs.state('a', 'train')['running'])
  assert jobs.log('a', 'train') == 'second\n'


def test_a_log_shows_no_control_characters_and_no_overwritten_bars(jobs):
  code = r"print('10 %|##   |\r20 %|###  |\n\x1b[31mred')"
  jobs.start('a', 'train', [sys.executable, '-c', code])
  until(lambda: not jobs.state('a', 'train')['running'])
  assert jobs.log('a', 'train') == '20 %|###  |\n\\x1b[31mred\n'


def test_closing_ends_the_processes_of_a_kind_alone(jobs):
  started(jobs, waits(), 'a', 'chat')
  started(jobs, waits(), 'a', 'train')
  jobs.close('chat')
  until(lambda: not jobs.state('a', 'chat')['running'])
  assert jobs.state('a', 'train')['running']

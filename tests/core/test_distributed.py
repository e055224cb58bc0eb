# SPDX-License-Identifier: Apache-2.0
"""Several processes say that they wait, and end when one of them is lost."""

import signal
import socket
import subprocess
import sys
import threading

import pytest

from moepeft.core import distributed, process_barrier


def free_port():
  with socket.create_server(('', 0)) as server:
    return server.getsockname()[1]


def meet(address, count, timeout=10.0, numbers=None):
  """{number: what came of waiting} of processes as threads."""
  ended = {}

  def wait(number):
    try:
      process_barrier.wait_for_all(address, count, number, timeout)
      ended[number] = ''
    except ValueError as e:
      ended[number] = str(e)

  numbers = range(count) if numbers is None else numbers
  threads = [threading.Thread(target=wait, args=(n,)) for n in numbers]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(30)
    assert not thread.is_alive()
  return ended


def test_processes_that_all_come_go_on_and_said_that_they_waited(capfd):
  address = f'localhost:{free_port()}'
  assert meet(address, 3) == {0: '', 1: '', 2: ''}
  output = capfd.readouterr().err
  assert f'waiting for 2 of 3 processes at {address} (number 1, 2)' in output
  assert f'process 2 of 3 is waiting for the others at {address}' in output
  # The port is free for JAX, at once.
  assert meet(address, 2) == {0: '', 1: ''}


def test_a_process_that_does_not_come_is_named_with_the_timeout():
  address = f'localhost:{free_port()}'
  ended = meet(address, 3, timeout=1.0, numbers=(0, 2))
  assert (
    f'1 of 3 processes at {address} (number 1) did not connect within 1 s'
    in (ended[0])
  )
  # What came had no answer.
  assert 'process 0 of 3 did not answer process 2' in ended[2]
  assert '--distributed_timeout' in ended[0] and 'timeout' in ended[2]


def test_strangers_at_the_port_do_not_count():
  port = free_port()
  ended = {}
  thread = threading.Thread(
    target=lambda: ended.update(meet(f'localhost:{port}', 2))
  )
  thread.start()
  for line in (b'GET / HTTP/1.1\r\n\r\n', b'', b'\xff' * 99, b'moepeft 3 1\n'):
    for _ in range(100):
      try:
        with socket.create_connection(('localhost', port), timeout=1) as peer:
          peer.sendall(line)
        break
      except OSError:
        pass
  thread.join(30)
  assert ended == {0: '', 1: ''}


@pytest.mark.parametrize(
  'how',
  ['', 'localhost', 'localhost:1,2', 'localhost:x,2,0', 'localhost:99999,2,0'],
)
def test_an_address_of_another_form_is_refused(how):
  with pytest.raises(ValueError, match='HOST:PORT,PROCESSES,NUMBER'):
    distributed.join(how)


def test_a_number_beyond_the_count_is_refused():
  with pytest.raises(ValueError, match='the numbers are 0 to 1'):
    distributed.join('localhost:9999,2,2')


RUN = """
import os, sys, time
import numpy as np
from jax.experimental import multihost_utils
from moepeft.core import distributed as processes
how, number, lost, how_lost = sys.argv[1], *map(int, sys.argv[2:])
processes.join(how, 10)
with processes.exit_on_error(10):
  for step in range(1000):
    multihost_utils.process_allgather(np.int32(step))
    if step == 3 and number == lost:
      os.kill(os.getpid(), how_lost)
"""


@pytest.mark.slow
@pytest.mark.parametrize('lost', [0, 1])
@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGSTOP])
def test_the_others_end_with_a_sentence_when_one_is_lost(lost, how):
  port = free_port()
  run = [
    subprocess.Popen(
      [
        *(sys.executable, '-c', RUN, f'localhost:{port},2,{number}'),
        *map(str, (number, lost, int(how))),
      ],
      stderr=subprocess.PIPE,
      text=True,
    )
    for number in (0, 1)
  ]
  try:
    _, told = run[1 - lost].communicate(timeout=120)
  finally:
    for process in run:
      process.kill()
      process.communicate()
  assert run[1 - lost].returncode == 2
  # The last line is ours; before it may stand what JAX's coordination logs.
  last = told.strip().splitlines()[-1]
  assert last.startswith(
    f'error: process {1 - lost} of 2 exits, as another one'
  )
  assert 'did not answer for 10 s (--distributed_timeout)' in last
  assert 'Traceback' not in told


@pytest.mark.slow
def test_an_error_of_one_process_does_not_wait_for_the_others():
  failing = RUN.replace(
    'os.kill(os.getpid(), how_lost)', "raise ValueError('no data')"
  )
  port = free_port()
  run = [
    subprocess.Popen(
      [
        *(sys.executable, '-c', failing, f'localhost:{port},2,{number}'),
        *map(str, (number, 1, 0)),
      ],
      stderr=subprocess.PIPE,
      text=True,
    )
    for number in (0, 1)
  ]
  told = [process.communicate(timeout=120)[1] for process in run]
  assert [process.returncode for process in run] == [2, 2]
  assert 'error: no data' in told[1] and 'Traceback' not in ''.join(told)
  assert 'error: process 0 of 2 exits' in told[0]

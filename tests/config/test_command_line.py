# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can mend end a command with a sentence, others do not."""

import io
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from moepeft.config import command_line, default
from moepeft.core.memory import is_out_of_memory


def ended(main, capsys):
  """(exit code, what stderr has) of a command."""
  with pytest.raises(SystemExit) as e:
    command_line.report_errors(main)
  return e.value.code, capsys.readouterr().err


def raising(error):
  def main():
    raise error

  return main


def test_what_a_user_caused_is_a_sentence(capsys):
  assert ended(raising(ValueError('no data')), capsys) == (
    2,
    'error: no data\n',
  )
  # A fault of the program keeps its traceback.
  with pytest.raises(KeyError):
    command_line.report_errors(raising(KeyError('x')))


def test_memory_that_ran_out_says_how_much_and_what_to_lower(capsys):
  # 40 TB.
  code, message = ended(lambda: jnp.zeros(10**13).block_until_ready(), capsys)
  assert code == 2 and 'allocating 40000000000000 bytes' in message
  assert 'lower config.batch_size' in message and len(message.splitlines()) == 1
  code, message = ended(raising(MemoryError()), capsys)
  assert code == 2 and message.startswith('error: memory ran out; lower')


def test_a_full_disk_is_no_lack_of_memory():
  assert not is_out_of_memory(
    ValueError('RESOURCE_EXHAUSTED: No space left on device')
  )
  assert is_out_of_memory(OSError(12, 'Cannot allocate memory'))


def test_an_interrupt_is_no_traceback(capsys):
  assert ended(raising(KeyboardInterrupt()), capsys) == (130, '\nstopped\n')


def test_a_terminal_of_ascii_gets_escapes(monkeypatch):
  raw = io.BytesIO()
  monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(raw, 'ascii'))
  command_line.report_errors(lambda: print('\u00e9\u4f60'))
  assert raw.getvalue() == b'\\xe9\\u4f60\n'


SCRIPT = """
import sys
from moepeft.config import command_line, default
def main():
  for _ in range(100_000):
    print('a line of output')
command_line.report_errors(main)
"""


def test_a_reader_that_leaves_ends_a_command_without_a_word():
  process = subprocess.Popen(
    [sys.executable, '-c', SCRIPT],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == 'a line of output\n'
  process.stdout.close()
  assert process.stderr.read() == ''
  assert process.wait(60) == 141
  process.stderr.close()


@pytest.mark.parametrize('platform', ['cuda', 'none'])
def test_a_device_that_jax_does_not_have_is_named(platform):
  if platform == 'cuda' and jax.default_backend() == 'gpu':
    pytest.skip('here is such a device')
  code = (
    'import jax\n'
    'from moepeft.config import command_line\n'
    'command_line.report_errors(jax.devices)'
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    env={**os.environ, 'JAX_PLATFORMS': platform},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert f"JAX_PLATFORMS='{platform}'" in done.stderr.splitlines()[-1]
  assert 'Traceback' not in done.stderr


def test_open_sections_take_keys_that_the_defaults_lack():
  config = default().lock()
  argv = ['train', '--config.router_losses.spread=0.1', '--config.steps=3']
  _, changed, same = command_line.rewrite_flags(argv)
  assert (changed, same) == ('--router_loss=spread=0.1', '--config.steps=3')
  command_line._set_key(config, 'router_losses', 'spread=0.1')
  assert config.router_losses.to_dict() == {
    **default().router_losses,
    'spread': 0.1,
  }
  with pytest.raises(ValueError, match='config.router_losses.KEY=VALUE; got'):
    command_line._set_key(config, 'router_losses', 'spread')

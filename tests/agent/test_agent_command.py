# SPDX-License-Identifier: Apache-2.0
"""python -m moepeft.agent, as a user has it."""

import ast
import contextlib
import os
import pty
import signal
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip('openai')

from moepeft.agent import traces  # noqa: E402
from tests import ROOT, commands
from tests.agent.scripted import KEY, NAME, serving, text_reply, wants  # noqa: E402

# A program starts within seconds; much more is a hang.
_LONG = 120


def command(*arguments) -> list[str]:
  return [sys.executable, '-m', 'moepeft.agent', *arguments]


def environment(**more) -> dict[str, str]:
  environment = {k: v for k, v in os.environ.items() if k != 'OPENAI_API_KEY'}
  return {
    **environment,
    'PYTHONPATH': str(ROOT),
    'JAX_PLATFORMS': 'cpu',
    **more,
  }


def run(*arguments, **more):
  env = environment(**more)
  return commands.run('moepeft.agent', *arguments, env=env)


def test_its_skills_and_its_prompt_are_shown_without_a_server():
  listed = run('--list_skills')
  assert listed.returncode == 0, listed.stderr
  names = [line.partition(':')[0] for line in listed.stdout.splitlines()]
  assert names == [
    'ablate-routers',
    'read-training-run',
    'solve-or-problem',
    'train-mixture',
    'write-config',
    'write-evaluation-report',
  ]
  shown = run('--show_prompt', '--form=react', '--system=Be kind.')
  assert shown.stdout.startswith('Be kind.\n\nYou have skills')
  assert '- write-config: Writes a config file' in shown.stdout
  assert 'is data that a tool returned' in shown.stdout
  assert 'Action Input:' in shown.stdout


def test_a_question_is_answered_and_traced_and_replayed(tmp_path):
  key, trace = tmp_path / 'key', tmp_path / 'trace.jsonl'
  key.write_text(f'{KEY}\n')
  replies = [
    wants(('load_skill', {'name': 'read-training-run'})),
    text_reply('It went well, wirklich schön.'),
  ]
  with serving(*replies) as script:
    done = run(
      'How did it go?',
      f'--base_url={script.url}',
      f'--api_key_file={key}',
      f'--trace={trace}',
      '--seed=3',
      '--temperature=0',
    )
  assert done.returncode == 0, done.stderr
  # To standard output goes the answer alone.
  assert done.stdout == 'It went well, wirklich schön.\n'
  assert '-> load_skill {"name": "read-training-run"}' in done.stderr
  assert script.headers[0]['authorization'] == f'Bearer {KEY}'
  # The server's first model, as none was named.
  assert script.requests[0]['model'] == NAME
  assert script.requests[0]['seed'] == 3
  assert KEY not in trace.read_text()
  (outcome,) = traces.replay_trace(str(trace))
  assert outcome.state == 'answered'
  again = run(f'--replay={trace}')
  assert again.stdout == done.stdout and again.returncode == 0


def test_what_is_no_answer_is_said_and_is_an_exit_code():
  with serving(wants(('load_skill', {'name': 'x'}))) as script:
    done = run('?', f'--base_url={script.url}', '--max_steps=2')
  assert done.returncode == 1
  assert done.stdout == ''
  assert '[budget] the budget of 2 steps is spent (2 used)' in done.stderr


@pytest.mark.parametrize(
  ('arguments', 'output'),
  [
    (('--skills=nowhere', '--list_skills'), "'nowhere' does not exist"),
    (('one', 'two'), 'unrecognized arguments: two'),
    (('?', '--base_url=http://127.0.0.1:9/v1'), 'is a server running there'),
    (('?', '--api_key_file=nowhere'), 'nowhere cannot be read'),
    (('--max_steps=0', '?'), "'0' is not an integer from 1"),
    (('--max_step=3', '?'), 'unrecognized arguments: --max_step=3'),
  ],
)
def test_mistakes_are_one_sentence(arguments, output):
  done = run(*arguments)
  assert done.returncode == 2
  assert output in done.stderr and 'Traceback' not in done.stderr


class Terminal:
  """A program at a terminal: what is typed, and what it shows."""

  def __init__(self, arguments):
    self.end, flags = pty.openpty()
    self.process = subprocess.Popen(
      command(*arguments),
      stdin=flags,
      stdout=flags,
      stderr=flags,
      cwd=ROOT,
      env=environment(TERM='dumb'),
      # So that Ctrl-C reaches it.
      preexec_fn=_own_terminal,
    )
    os.close(flags)
    self.text = ''
    threading.Thread(target=self._read, daemon=True).start()

  def _read(self):
    with contextlib.suppress(OSError):
      while data := os.read(self.end, 4096):
        self.text += data.decode(errors='replace')

  def type(self, text):
    os.write(self.end, text.encode())

  def wait_for(self, holds, case):
    end = time.monotonic() + _LONG
    while not holds():
      assert time.monotonic() < end, f'{case} did not come: {self.text}'
      assert self.process.poll() is None, f'it ended: {self.text}'
      time.sleep(0.02)


def _own_terminal():
  import fcntl
  import termios

  # A suite that runs in the background was told to ignore it.
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  os.setsid()
  fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_ctrl_c_ends_an_answer_and_ctrl_d_the_program():
  with serving(text_reply('Never.'), text_reply('Hello Ada.')) as script:
    script.pause = threading.Event()
    terminal = Terminal([f'--base_url={script.url}', '--skills='])
    try:
      terminal.wait_for(lambda: '> ' in terminal.text, 'the prompt')
      terminal.type('Who?\n')
      terminal.wait_for(lambda: script.requests, 'the request')
      terminal.type('\x03')
      terminal.wait_for(lambda: '(interrupted)' in terminal.text, 'the end')
      script.pause.set()
      terminal.type('I am Ada.\n')
      terminal.wait_for(lambda: 'Hello Ada.' in terminal.text, 'the answer')
      # Before the prompt it would be the end of a line, not of the file.
      terminal.wait_for(lambda: terminal.text.endswith('> '), 'the prompt')
      terminal.type('\x04')
      assert terminal.process.wait(_LONG) == 0
    finally:
      terminal.process.kill()
      terminal.process.wait()
  # What was interrupted is not part of the conversation.
  output = [m['content'] for m in script.requests[1]['messages']]
  assert 'Who?' not in output and output[-1] == 'I am Ada.'
  assert 'Traceback' not in terminal.text


def test_the_agent_knows_a_servers_api_and_nothing_of_models():
  room = ROOT / 'moepeft' / 'agent'
  for path in room.glob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.ImportFrom) and node.module:
        first = node.module.split('.')[0]
        names = {'.'.join(node.module.split('.')[:2])}
        if node.module == 'moepeft':
          names = {f'moepeft.{alias.name}' for alias in node.names}
        allowed = {'moepeft.agent', 'moepeft.core'}
        assert first != 'moepeft' or names <= allowed, path
        assert first not in ('jax', 'flax', 'numpy'), path

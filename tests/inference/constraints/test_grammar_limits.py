# SPDX-License-Identifier: Apache-2.0
"""No grammar holds up others, whatever it takes to compile or to follow."""

import gc
import os
import signal
import threading
import time

import numpy as np
import pytest

from moepeft.data.tokenizers.tokenizer import ByteTokenizer
from moepeft.inference.api import EngineFull
from moepeft.inference.constraints.grammar import Compiler, Limits
from moepeft.inference.constraints.grammar_worker import ProcessLimits
from tests.serve.fake_engine import FakeEngine, ids_of
from tests.serve.small_server import running, service

pytest.importorskip('llguidance')

WIDE = 277
QUICK = ProcessLimits(compile_seconds=0.5, step_seconds=0.25)
# Where others have to come and go before the limit does.
PATIENT = ProcessLimits(compile_seconds=1.0, step_seconds=0.5)
# Whether 22 patterns that overlap have a text in common is asked of all 2^22
# subsets of them, in one step that llguidance does not count.
OVERLAPPING = {
  'type': 'string',
  'allOf': [{'pattern': f'(ab|b|a){{{i}}}.*'} for i in range(22)],
}
# The same, but only after 'qb'; 'b' alone is a text of them all, so compiling
# and the first masks are quick.
LATE = 'start: "q" TEXT\nTEXT: ' + ' & '.join(
  f'/(b|bbbx(ab|b|a){{{i}}}.*)/' for i in range(22)
)


# Processes of compilers of other tests, which pytest may still hold.
OTHERS = set()


@pytest.fixture(autouse=True)
def _others_are_not_counted():
  gc.collect()
  OTHERS.clear()
  OTHERS.update(children())


@pytest.fixture
def compiler():
  return Compiler(ByteTokenizer(), WIDE, (1,), Limits(process=QUICK))


def write(constraint, text):
  for byte in text.encode():
    assert constraint.mask()[byte + 3]
    constraint.accept(byte + 3)


def children():
  """Processes that follow grammars, by this test process's templates."""
  parents = {}
  for name in filter(str.isdigit, os.listdir('/proc')):
    try:
      with open(f'/proc/{name}/cmdline') as line:
        if 'grammar_worker' in line.read():
          with open(f'/proc/{name}/stat') as stat:
            state, parent = stat.read().rpartition(')')[2].split()[:2]
            if state != 'Z':
              parents[int(name)] = int(parent)
    except OSError:
      continue
  templates = {pid for pid, up in parents.items() if up == os.getpid()}
  return {pid for pid, up in parents.items() if up in templates} - OTHERS


def wait(condition, seconds=20.0):
  end = time.monotonic() + seconds
  while not condition() and time.monotonic() < end:
    time.sleep(0.02)
  return condition()


def test_a_schema_without_end_is_refused_in_a_sentence(compiler):
  with pytest.raises(ValueError, match='takes more than 0.5 s of processor'):
    compiler.json_schema(OVERLAPPING)
  # A grammar of the same kind, and a tool's parameters, come the same way.
  intersection = ' & '.join(f'/(ab|b|a){{{i}}}.*/' for i in range(22))
  with pytest.raises(ValueError, match='grammar cannot be compiled'):
    compiler.grammar(f'start: TEXT\nTEXT: {intersection}')
  assert compiler.regex('a').mask().sum() == 1


def test_a_schema_that_grows_without_end_is_refused_by_its_memory():
  limits = Limits(process=ProcessLimits(compile_seconds=20.0, memory=32 << 20))
  compiler = Compiler(ByteTokenizer(), WIDE, (1,), limits)
  with pytest.raises(ValueError, match='32 MB of memory'):
    compiler.json_schema(OVERLAPPING)
  assert compiler.regex('a').mask().sum() == 1


def test_an_answer_that_comes_to_a_mask_without_end_fails_alone(compiler):
  bad, good = compiler.grammar(LATE), compiler.regex('ab*')
  with pytest.raises(ValueError, match='cannot go on .*processor time'):
    write(bad, 'qbbbx')
  # It stays ended, and the next one of the grammar is in a new process.
  with pytest.raises(ValueError, match='cannot go on'):
    bad.mask()
  write(compiler.grammar(LATE), 'q')
  write(good, 'abb')


def test_others_compile_and_go_on_while_one_compiles():
  compiler = Compiler(ByteTokenizer(), WIDE, (1,), Limits(process=PATIENT))
  good = compiler.regex('ab*')
  started, refused = threading.Event(), []

  def compile_bad():
    started.set()
    with pytest.raises(ValueError):
      compiler.json_schema(OVERLAPPING)
    refused.append(True)

  thread = threading.Thread(target=compile_bad)
  thread.start()
  started.wait()
  assert wait(lambda: len(children()) >= 2)
  write(good, 'ab')
  assert compiler.regex('new').mask().any()
  # All of that was done before the bad one came to its limit.
  assert not refused
  thread.join()
  assert refused


def test_requests_that_wait_are_bounded():
  limits = Limits(processes=2, process=QUICK)
  compiler = Compiler(ByteTokenizer(), WIDE, (1,), limits)
  outcomes = []

  def compile_bad():
    try:
      compiler.json_schema(OVERLAPPING)
    except ValueError as error:
      outcomes.append(type(error))

  threads = [threading.Thread(target=compile_bad) for _ in range(5)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  # Two wait for the one compilation, three are told to come back.
  assert sorted(map(str, outcomes)) == sorted(
    map(str, 3 * [EngineFull] + 2 * [ValueError])
  )


def test_grammars_in_use_are_bounded_and_those_in_the_cache_make_room():
  compiler = Compiler(
    ByteTokenizer(), WIDE, (1,), Limits(processes=3, process=QUICK)
  )
  for text in 'abcdefg':  # answers that are over free their grammars
    assert compiler.regex(text).mask().any()
  stored = [compiler.regex(text) for text in 'xyz']
  with pytest.raises(EngineFull, match='3 constraints are in use'):
    compiler.regex('w')
  del stored[0]
  gc.collect()
  assert compiler.regex('w').mask().any()


def test_processes_end_with_what_needs_them():
  compiler = Compiler(ByteTokenizer(), WIDE, (1,), Limits(process=QUICK))
  constraint = compiler.regex('ab*')
  assert len(children()) == 1
  del compiler, constraint
  gc.collect()
  assert wait(lambda: not children())


def test_a_template_process_that_was_killed_is_started_again():
  compiler = Compiler(ByteTokenizer(), WIDE, (1,), Limits())
  first = compiler.regex('ab*')
  (parent,) = {
    int(open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[1])
    for pid in children()
  }
  # It has a request when it is killed, as if it were killed just then.
  os.kill(parent, signal.SIGSTOP)
  threading.Timer(0.3, os.kill, (parent, signal.SIGKILL)).start()
  assert compiler.regex('c').mask().any()
  # The grammar's own process goes on.
  write(first, 'ab')


def test_many_answers_of_one_grammar_use_one_process(compiler):
  answers = [compiler.regex('[ab]*c') for _ in range(7)]
  rng = np.random.default_rng(41)
  for _ in range(29):
    write(answers[rng.integers(7)], 'ab'[rng.integers(2)])
  assert len(children()) == 1


def test_a_server_answers_400_and_others_meanwhile():
  engine = FakeEngine()
  engine.answer = lambda request: ids_of('abc')
  # Sixteen at once are more than asyncio's own pool has threads on two cores.
  limits = Limits(processes=8, process=PATIENT)
  actual = service(
    engine,
    ByteTokenizer(),
    compiler=Compiler(ByteTokenizer(), WIDE, (1,), limits),
  )
  body = {
    'type': 'json_schema',
    'json_schema': {'name': 'x', 'schema': OVERLAPPING},
  }
  with running(actual) as client:
    answers = []
    threads = [
      threading.Thread(
        target=lambda: answers.append(client.complete(response_format=body))
      )
      for _ in range(16)
    ]
    for thread in threads:
      thread.start()
    assert wait(lambda: answers or children())
    before = len(answers)
    assert client.complete()[0] == 200
    constrained = {'type': 'choice', 'choice': ['abc', 'b']}
    assert client.complete(response_format=constrained)[0] in (200, 429)
    assert before < 16
    for thread in threads:
      thread.join()
    assert {status for status, _ in answers} <= {400, 429}
    refused = [body['error'] for status, body in answers if status == 400]
    assert refused and refused[0]['param'] == 'response_format'
    assert 'processor time' in refused[0]['message']
    assert client.complete(response_format=constrained)[0] == 200

# SPDX-License-Identifier: Apache-2.0
"""Numbers of the server out of range are refused before anything is made."""

import ast
import subprocess
import sys

import pytest

from moepeft.core import memory
from moepeft.inference.adapters.pool import AdapterPool
from moepeft.inference.engine.engine import Engine
from moepeft.inference.engine.limits import EngineConfig
from moepeft.models.decoder.model import DecoderConfig
from moepeft.serve.http.limits import RequestLimits

from ..inference import banked, engines

# Each flag with values that it may not have.
FLAGS = {
  'adapter_slots': ('-3', '0', '10000000000'),
  'adapter_bytes': ('-1', '0'),
  'slots': ('-3', '0', '1000000000', '1.5', 'nan'),
  'places': ('-3', '0', '10000000000'),
  'queue': ('-3', '0', '10000000000'),
  'port': ('-1', '65536'),
  'max_answer': ('-1', '10000000000'),
  'max_body': ('-1', '0', '100000000000000'),
  'max_choices': ('-1', '0'),
  'max_connections': ('-1', '0', '10000000000'),
  'max_head': ('-1', '0', '10000000000'),
  'seconds': ('-1', '0', 'inf', 'nan', '1e30'),
  'drain_seconds': ('-1', 'inf', 'nan'),
  'head_seconds': ('-1', '0', 'inf', 'nan'),
  'body_seconds': ('-1', '0', 'inf', 'nan'),
  'idle_seconds': ('-1', '0', 'inf', 'nan'),
  'send_seconds': ('-1', '0', 'inf', 'nan'),
}
# Reads each of the arguments as the command does, up to where it would open a
# socket; in one process of its own, since a start costs seconds.
SCRIPT = """
import contextlib, io, runpy, sys
from moepeft.config import command_line
command_line.run = lambda main: None
module = runpy.run_module('moepeft.serve', run_name='__main__')
run, open_socket = module['run'], module['listen']
class Opened(Exception):
  pass
def opened(*args):
  raise Opened
run.__globals__['listen'] = opened
for argument in sys.argv[1:]:
  with contextlib.redirect_stderr(io.StringIO()) as said:
    try:
      command_line.flags.FLAGS.unparse_flags()
      for flag in command_line.flags.FLAGS:
        command_line.flags.FLAGS[flag].unparse()
      command_line.parse(['serve', '--model=/nothing', argument])
      run()
      code = None
    except SystemExit as e:
      code = e.code
    except ValueError as e:
      code = 2
      print(f'error: {e}', file=sys.stderr)
    except Opened:
      code = 'opened'
  print(repr((argument, code, said.getvalue())))
"""


@pytest.mark.parametrize('name', ['body', 'choices', 'seconds', 'inputs'])
@pytest.mark.parametrize('value', [0, -1, float('nan'), float('inf'), 1e300])
def test_limits_of_requests_are_positive_and_finite(name, value):
  with pytest.raises(ValueError, match=name):
    RequestLimits(**{name: value})


@pytest.mark.parametrize('name', ['slots', 'max_model_len', 'queue'])
@pytest.mark.parametrize('value', [0, -3, 2**31, 10**30])
def test_sizes_of_an_engine_have_a_range(name, value):
  with pytest.raises(ValueError, match=f'{name} is at least 1'):
    EngineConfig(**{name: value})


def test_a_cache_that_cannot_fit_says_how_large_it_is(monkeypatch):
  model, params, _ = engines.decoder()
  monkeypatch.setattr(memory, 'available', lambda: (10**9, 'x'))
  # Nothing of this is allocated: it would be far more than the machine has.
  settings = EngineConfig(slots=10_000, max_model_len=1 << 20)
  engine = Engine(model, params, engines.banks(), settings)
  with pytest.raises(ValueError, match=r'10,000 requests.*TB.*1 GB.*--slots'):
    engine.start()


def test_slots_for_adapters_that_cannot_fit_say_how_large_they_are(
  monkeypatch, tmp_path
):
  config = DecoderConfig(
    vocab=7, d_model=5, heads=3, kv_heads=1, head_dim=2, ffn=11, layers=2
  )
  base = banked.base_of(config)
  monkeypatch.setattr(memory, 'available', lambda: (10**7, 'x'))
  with pytest.raises(ValueError, match='memory.*10 MB.*--adapter_slots'):
    AdapterPool(base, {}, ['lora(rank=4)'], slots=10**9)


@pytest.mark.slow
def test_flags_out_of_range_are_refused_in_a_sentence():
  arguments = [
    f'--{k}={value}' for k, values in FLAGS.items() for value in values
  ]
  # A value that is right, so that the others are known to be what is wrong.
  arguments.append('--slots=5')
  done = subprocess.run(
    [sys.executable, '-c', SCRIPT, *arguments],
    capture_output=True,
    text=True,
    timeout=240,
  )
  lines = done.stdout.splitlines()
  assert len(lines) == len(arguments), done.stderr
  for line in lines:
    argument, code, message = ast.literal_eval(line)
    if argument == '--slots=5':
      assert code == 'opened', line
      continue
    name = argument.partition('=')[0].lstrip('-').split('_')[0]
    assert code == 2 and name in message, line
    assert message.startswith('error: ') and 'Traceback' not in message, line

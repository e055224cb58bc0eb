# SPDX-License-Identifier: Apache-2.0
"""python flag_driver.py MODULE SEED COUNT: fuzzes the flags of a command.

The command's module is run as `python -m` runs it, with `command.run` replaced:
instead of its main, command lines of drawn flags and values are parsed, and the
config that comes of them is checked and built by shapes. Each must end in a
config or in one sentence and exit code 2. Prints a JSON line of counts.
"""

import contextlib
import io
import json
import random
import runpy
import signal
import sys
import time
import traceback

from absl import flags

from moepeft import registries
from moepeft.config import check as config_check
from moepeft.config import command_line
from moepeft.config.ranges import ALLOWED
from moepeft.config.suggestions import keys
from moepeft.training import memory_estimate

# Longer than any of these takes by far; a hang is a failure.
_SECONDS = 60
_VALUES = (
  *('', '0', '-1', '1', '2', '3', '1e9', '1e400', '-1e400', 'nan', 'inf'),
  *('-inf', '0.5', '1.5', str(2**31), str(2**32), str(2**63), str(2**80)),
  *('9' * 5000, '1_000', '0x10', ' 7', 'true', 'False', 'None', 'none', '[]'),
  *('{}', '()', "''", '"', "'", '%s', '{0}', '\x00', '\n', '\t', 'a b', 'é'),
  *('模型', '\udcff', '../..', '/dev/null', '/', '~', 'package:', 'package:x'),
  *('package:t5_tiny', 'package:../..', '-', '--', '=', ',', ':', '*', '💥'),
)
_METHODS = (
  'molora(experts=EXPERTS, rank=EXPERTS)',
  'lora(rank=EXPERTS, alpha=EXPERTS, dropout=EXPERTS)',
  'dora(rank=EXPERTS)',
  'mov(experts=EXPERTS, reads=EXPERTS)',
  'ia3(on=EXPERTS)',
  'prompt(length=EXPERTS)',
  'tokens(new=EXPERTS)',
  'molora(router=topk(k=EXPERTS, jitter=EXPERTS))',
  'molora(router=random(k=2, seed=EXPERTS))',
  "lora(targets=EXPERTS) + ia3(targets='*')",
)
_SHAPES = (
  *('vocab', 'd_model', 'heads', 'kv_heads', 'head_dim', 'ffn', 'layers'),
  *('length', 'eps', 'window', 'windowed', 'rope', 'rope.kind', 'rope.theta'),
  *('positions', 'activation', 'tied', 'gated', 'scale', 'nothing'),
)
_LITERALS = (
  *('0', '-1', '1', '2', '7', '10**9', '1e9', '65536', '65537', 'True'),
  *('None', '()', '(1, 2)', '[]', '{}', '{[]: 1}', "''", "'heads'", "'input'"),
  *("'0-9'", "'9-0'", "'0-99999999999'", 'x', '"', '((((', '1e999', '-0.0'),
  *('9' * 5000, 'lora()', "'*/q'", "'[*'", '--1', 'nan', '0.5'),
)


def mutated(rng: random.Random, text: str) -> str:
  """A text with a few characters dropped, doubled or replaced."""
  letters = list(text)
  for _ in range(rng.randint(1, 3)):
    place = rng.randrange(len(letters) + 1)
    kind = rng.randrange(3)
    if kind == 0:
      letters[place:place] = rng.choice('abc_.=:-+()09,/ é\n')
    elif kind == 1:
      del letters[place : place + 1]
    else:
      letters[place : place + 1] = rng.choice('xyz.=(9')
  return ''.join(letters)


def value_of(rng: random.Random, key: str = '') -> str:
  allowed = ALLOWED.get(key)
  if allowed is not None and rng.random() < 0.8:
    if hasattr(allowed, 'names'):
      name = rng.choice(allowed.names)
      return name if rng.random() < 0.7 else mutated(rng, name)
    ends = (allowed.low, allowed.high, allowed.low - 1, allowed.high + 1)
    return str(rng.choice(ends))
  if key == 'method' or (key and rng.random() < 0.05):
    method = rng.choice(_METHODS)
    while 'EXPERTS' in method:
      method = method.replace('EXPERTS', rng.choice(_LITERALS), 1)
    return mutated(rng, method) if rng.random() < 0.3 else method
  return rng.choice(_VALUES)


def argument(rng: random.Random, names: list[str], has_config: bool) -> str:
  """A flag of the command, a key of its config, or something like one."""
  if has_config and rng.random() < 0.7:
    if rng.random() < 0.1:
      name = f'config.model.shape.{rng.choice(_SHAPES)}'
      arg = f'--{name}={rng.choice(_LITERALS)}'
    else:
      key = rng.choice([*keys(), *(['method'] * 20)])
      arg = f'--config.{key}={value_of(rng, key)}'
  else:
    arg = f'--{rng.choice(names)}={value_of(rng)}'
  return mutated(rng, arg) if rng.random() < 0.1 else arg


def start_of(rng: random.Random, has_config: bool) -> list[str]:
  """A config to begin with: it ships, is mistyped or has values."""
  if not has_config:
    return []
  name = rng.choice(('molora_t5', 'sft_smollm2', 'dpo_smollm2', 'sft'))
  text = f'configs/{name}.py'
  if rng.random() < 0.3:
    key = rng.choice(('method', 'steps', 'data', 'experts', 'nothing'))
    text += f':{key}={value_of(rng)}'
  if rng.random() < 0.1:
    text = mutated(rng, text)
  path = ['--config.model.path=']
  small = [*path, '--config.model.family=llama', '--config.model.size=tiny']
  return [f'--config={text}', *rng.choice((small, path, []))]


def trial(argv: list[str]) -> str:
  """'built', 'refused', or the fault: a traceback or more than a sentence."""
  errors = io.StringIO()
  flags.FLAGS.unparse_flags()
  for name in list(flags.FLAGS):
    if name.startswith('config.'):
      delattr(flags.FLAGS, name)
    else:
      flags.FLAGS[name].unparse()
  # The config's flag reads its keys from here.
  argv = [argv[0], *command_line.rewrite_flags(argv[1:])]
  sys.argv[:] = argv
  try:
    with (
      contextlib.redirect_stderr(errors),
      contextlib.redirect_stdout(io.StringIO()),
    ):
      command_line.parse(argv)
      command_line.report_errors(lambda: build(argv))
  except SystemExit as e:
    said = errors.getvalue().rstrip('\n').split('\n')
    sentence = said[-1].startswith('error: ') and len(said[-1]) < 2000
    if e.code == 0 or (e.code == 2 and sentence):
      return 'refused'
    return f'exit {e.code}: {said[-3:]}'
  except Exception:
    return traceback.format_exc()
  return 'built'


def build(argv: list[str]) -> None:
  """Checks the config of the flags, and builds it by shapes."""
  del argv
  if 'config' not in flags.FLAGS:
    return
  config = flags.FLAGS['config'].value
  config_check.check(config, registries.BY_KEY)
  memory_estimate.check(config)


def fuzz(module: str, seed: int, count: int) -> dict:
  rng = random.Random(f'{module} {seed}')
  # What absl and libraries bring is theirs.
  skipped = ('flagfile', 'undefok', 'only_check_args', 'pdb', 'helpfull')
  candidate = flags.FLAGS.flags_by_module_dict()
  names = [
    flag.name
    for owner, own in candidate.items()
    if owner == sys.argv[0] or 'moepeft' in owner
    for flag in own
    if flag.name not in skipped
  ]
  has_config = 'config' in flags.FLAGS
  names = [n for n in names if not n.startswith('config')] or ['traceback']
  actual = {'built': 0, 'refused': 0}
  faults, slowest = [], 0.0
  for _ in range(count):
    argv = [module, *start_of(rng, has_config)]
    argv += [argument(rng, names, has_config) for _ in range(rng.randint(1, 3))]
    signal.alarm(_SECONDS)
    began = time.monotonic()
    outcome = trial(argv)
    slowest = max(slowest, time.monotonic() - began)
    signal.alarm(0)
    if outcome in actual:
      actual[outcome] += 1
    else:
      faults.append([[arg[:200] for arg in argv], outcome[-1500:]])
  return actual | {'faults': faults, 'slowest': round(slowest, 1)}


def _hung(*_) -> None:
  raise TimeoutError(f'more than {_SECONDS} s')


def main() -> None:
  module, seed, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
  signal.signal(signal.SIGALRM, _hung)
  sys.argv[1:] = []

  def instead(main, arguments: bool = False) -> None:
    print(json.dumps(fuzz(module, seed, count)))

  command_line.run = instead
  runpy.run_module(module, run_name='__main__')


if __name__ == '__main__':
  main()

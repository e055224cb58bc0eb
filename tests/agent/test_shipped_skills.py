# SPDX-License-Identifier: Apache-2.0
"""The skills that ship: valid, and their scripts say what is so."""

import ast
import importlib.util
import json
import math
import random
from pathlib import Path

import pytest

pytest.importorskip('openai')

from moepeft.agent import config_file, skills
from moepeft.agent.sandbox import bubblewrap  # noqa: E402
from tests import ROOT

SUMMARIZE = (
  skills.BUILTIN_SKILLS / 'read-training-run' / 'scripts' / 'summarize.py'
)
WRITE_CONFIG = (
  skills.BUILTIN_SKILLS / 'write-config' / 'scripts' / 'write_config.py'
)


def test_what_ships_is_valid_and_names_files_that_are_there():
  shipped = skills.find_skills([skills.BUILTIN_SKILLS])
  assert list(shipped) == [
    'ablate-routers',
    'read-training-run',
    'solve-or-problem',
    'train-mixture',
    'write-config',
    'write-evaluation-report',
  ]
  for skill in shipped.values():
    for path in skill.files():
      assert Path(path).name in skill.body, path


def run_script(path, *arguments):
  """The output of a script, run in this process: JAX starts once."""
  spec = importlib.util.spec_from_file_location(path.stem, path)
  tools = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(tools)
  try:
    return tools.main(list(arguments))
  except ValueError as e:
    return f'error: {e}\n'


def script_tool(workspace):
  """run_skill_script of what ships; in the sandbox where there is one."""
  shipped = skills.find_skills([skills.BUILTIN_SKILLS])
  workspace.chmod(0o755)
  box = skills.script_sandbox(
    shipped, workspace, unsafe_no_sandbox=bool(bubblewrap.unavailable_reason())
  )
  tools = skills.skill_tools(shipped, box, workspace)
  return next(tool for tool in tools if tool.name == 'run_skill_script')


def test_the_scripts_run_by_themselves(tmp_path):
  run = script_tool(tmp_path)
  for name, path, arguments, output in (
    ('write-config', 'scripts/write_config.py', ['keys', 'seed'], 'seed=0'),
    (
      'read-training-run',
      'scripts/summarize.py',
      [written(tmp_path, fallen())],
      'no findings',
    ),
    (
      'read-training-run',
      'scripts/summarize.py',
      [],
      'error: expected one argument',
    ),
  ):
    call = {'name': name, 'path': path, 'args': arguments}
    assert output in run.run(json.dumps(call))


def written(folder, losses, rows=(), **more):
  """A run's directory with a loss each step, and more rows of metrics."""
  config = {
    'steps': len(losses),
    'method': 'molora(experts=3, rank=2)',
    'objective': 'seq2seq',
    'batch_size': 7,
    'seed': 5,
    'model': {'path': 'package:t5_tiny'},
    'optimizer': {'name': 'adamw', 'learning_rate': 0.001},
  }
  (folder / 'config.json').write_text(json.dumps(config))
  (folder / 'summary.json').write_text('{}')
  tools = [
    {'step': i, 'loss': loss, 'gradient_norm': 1.5, 'tokens_per_s': 1000 + i}
    for i, loss in enumerate(losses, 1)
  ]
  for step, row in rows:
    tools[step - 1] |= row
  lines = [json.dumps(row | more) for row in tools]
  # A kill tears the last line.
  text = '\n'.join(lines) + '\n{"step": 9'
  (folder / 'metrics.jsonl').write_text(text)
  return str(folder)


def fallen(count=100):
  """From 5 to 1 within 40 steps, then still, with a little noise."""
  noise = random.Random(3)
  return [
    1 + 4 * math.exp(-i / 8) + noise.uniform(-0.05, 0.05) for i in range(count)
  ]


def test_a_run_that_went_well_has_no_findings(tmp_path):
  output = run_script(SUMMARIZE, written(tmp_path, fallen()))
  assert 'molora(experts=3, rank=2)' in output and 'seed 5' in output
  assert 'steps: 100 of 100; ended' in output
  # The middle of the first ten of the curve, about 1 + 4 exp(-4.5 / 8) = 3.28.
  assert 'loss: 3.2' in output and 'flat over the last third' in output
  # Rates are 1001 to 1100, their median 1050.5.
  assert 'throughput: 1,050 tokens/s' in output
  assert 'gradient norm: median 1.5' in output
  assert output.rstrip().endswith('no findings')
  assert len(output) < 1500


@pytest.mark.parametrize(
  ('losses', 'matches'),
  [
    ([*fallen(60), *(1 + 0.05 * i for i in range(40))], '! the loss diverges'),
    ([5.0] * 60 + [None] * 3, 'not a number in 3 steps, first at step 61'),
    ([3 + 0.01 * (i % 5) for i in range(60)], '! the loss has hardly fallen'),
    ([5 - 0.04 * i for i in range(100)], '! the loss still falls at the end'),
    ([*fallen(90), 30.0, *fallen(9)[8:]], '! 1 spikes of the loss'),
  ],
)
def test_what_is_wrong_with_a_loss_is_found(tmp_path, losses, matches):
  assert matches in run_script(SUMMARIZE, written(tmp_path, losses))


def routed(**site):
  """Three logs of one site, for rows of `written`."""
  return [(s, {'routing': {'encoder/q/molora': site}}) for s in (80, 90, 100)]


def test_overfitting_and_router_collapse_are_found(tmp_path):
  site = {
    'weight': [[0.98, 0.02, 0.0], [0.4, 0.3, 0.3]],
    'entropy': [0.1, 1.0],
    'weight_entropy': [0.1, 1.0],
  }
  rows = [
    (20, {'validation_loss': 2.0}),
    (50, {'validation_loss': 1.5}),
    (100, {'validation_loss': 1.9}),
    *routed(**site),
  ]
  output = run_script(SUMMARIZE, written(tmp_path, fallen(), rows))
  assert 'best 1.5 at step 50, 1.9 at step 100' in output
  assert '! the validation loss rises after step 50' in output
  # One of six experts has no weight; (0.98 + 0.4) / 2 = 69 %.
  assert 'the fullest expert has 69% of the weight on average, 98% at' in output
  assert '1 of 6 experts below 1%' in output
  assert 'at 1 of 2: encoder/q/molora, layer 0' in output


def test_one_log_of_a_collapsed_router_is_no_finding(tmp_path):
  site = {'tokens': [[1.0, 0.0]], 'entropy': [0.1], 'weight_entropy': [0.0]}
  rows = routed(tokens=[[0.5, 0.5]], entropy=[0.6], weight_entropy=[0.0])[:2]
  rows += routed(**site)[2:]
  output = run_script(SUMMARIZE, written(tmp_path, fallen(), rows))
  assert 'the fullest expert gets 100% of the tokens' in output
  assert 'collapse' not in output
  always = run_script(SUMMARIZE, written(tmp_path, fallen(), routed(**site)))
  assert '! router collapse' in always


def test_low_losses_of_noisy_pairs_are_no_divergence(tmp_path):
  # As of DPO: from 0.69 down to 0.1 to 0.5, in no order.
  noise = random.Random(7)
  losses = [0.69] * 5 + [noise.uniform(0.1, 0.5) for _ in range(35)]
  assert 'diverges' not in run_script(SUMMARIZE, written(tmp_path, losses))


def test_a_soft_routers_even_weights_are_no_collapse(tmp_path):
  # Of three experts one is always ahead, by little: ln 3 = 1.099. An older log.
  rows = routed(load=[[0.99, 0.01, 0.0]], entropy=[1.08])
  output = run_script(SUMMARIZE, written(tmp_path, fallen(), rows))
  assert 'argmax share (an older log, no mean weights)' in output
  assert '99% at most' in output and 'collapse' not in output


def test_what_rose_and_what_fell_is_told_in_words(tmp_path):
  run = written(tmp_path, fallen())
  for name, loss, right in (('before', 2.0, 0.5), ('after', 1.25, 0.75)):
    row = {'group': 'B', 'task': 'kind', 'templates': 'seen', 'examples': 100}
    rows = [row | {'accuracy': right}, row | {'task': 'x', 'accuracy': 0.25}]
    means = {'B seen': (right + 0.25) / 2}
    matches = {'validation_loss': loss, 'rows': rows, 'means': means}
    (tmp_path / f'{name}.json').write_text(json.dumps(matches))
  output = run_script(SUMMARIZE, run)
  assert 'validation loss fell from 2 to 1.25' in output
  assert 'accuracy rose: B seen 37.5 -> 50.0 %' in output
  assert 'tasks that moved the most: kind seen +25 points' in output


def test_the_metrics_of_a_real_run_can_be_read():
  run = ROOT / 'docs' / 'runs' / 'smollm2' / 'molora'
  if not run.is_dir():
    pytest.skip('docs/runs is not beside the tests')
  output = run_script(SUMMARIZE, str(run))
  assert 'steps: 150 of 150' in output and 'routers at step 150' in output
  # Its entropies leave no expert 90 % of the weight.
  assert 'argmax share' in output and 'collapse' not in output


def test_a_directory_that_is_no_run_is_an_error_of_one_line(tmp_path):
  for arguments in ((), (str(tmp_path / 'x'),), (str(tmp_path),)):
    output = run_script(SUMMARIZE, *arguments)
    assert output.startswith('error: ') and output.count('\n') == 1


def test_keys_are_listed_with_defaults_and_what_they_mean():
  assert 'sections: ' in run_script(WRITE_CONFIG, 'keys')
  output = run_script(WRITE_CONFIG, 'keys', 'optimizer')
  assert 'optimizer.learning_rate=0.001' in output
  assert "optimizer.name='adamw'  # 'adamw' or 'adafactor'." in output
  assert 'data.packing=False' in run_script(WRITE_CONFIG, 'keys', 'packing')
  assert "no key has 'nonsense'" in run_script(WRITE_CONFIG, 'keys', 'nonsense')


INJECTIONS = (
  ('x"""\nimport os\nos.system("touch OWNED")\n"""y.py', 'About', 'steps=10'),
  ('a.py', '"""\nimport os\nos.system("touch OWNED")\n"""', 'steps=10'),
  ('a.py', 'x\\', 'steps=10'),
  ('a.py', 'About', 'steps=__import__("os").system("touch OWNED")'),
  ('a.py', 'About', 'steps=10;import os'),
  ('a.py', 'About', 'method=lora()"\n  import os; os.system("touch OWNED")'),
  ('a.py', 'About', 'x.y)=1'),
  ('$(touch OWNED).py', 'About', 'steps=10'),
  ('a;touch OWNED;.py', 'About', 'steps=10'),
  ('--config=a.py', 'About', 'steps=10'),
  ('-.py', 'About', 'steps=10'),
  ('../a.py', 'About', 'steps=10'),
  ('/tmp/moepeft_owned.py', 'About', 'steps=10'),
  ('~/a.py', 'About', 'steps=10'),
  ('sub/a.py', 'About', 'steps=10'),
  ('a\0.py', 'About', 'steps=10'),
  ('a.py', 'About', f'steps={"(" * 5000}'),
  ('a.py', 'About', f'optimizer.learning_rate={"9" * 400}'),
)


@pytest.mark.parametrize('arguments', INJECTIONS)
def test_nothing_in_the_arguments_becomes_code(
  tmp_path, monkeypatch, arguments
):
  monkeypatch.chdir(tmp_path)
  text = run_script(WRITE_CONFIG, 'write', *arguments)
  # The text of a docstring may hold anything; it is a constant.
  if text.startswith('wrote'):
    tree = ast.parse((tmp_path / 'a.py').read_text())
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    assert [n.module for n in imports] == ['moepeft']
    assert not any(isinstance(n, ast.Import) for n in ast.walk(tree))
  else:
    assert text.startswith('error: ')
    assert list(tmp_path.iterdir()) == []
  assert not (tmp_path / 'OWNED').exists()


@pytest.mark.slow
def test_a_prompt_injection_writes_nothing_and_a_plain_call_a_config(tmp_path):
  run = script_tool(tmp_path)

  def call(*args):
    arguments = {
      'name': 'write-config',
      'path': 'scripts/write_config.py',
      'args': args,
    }
    return run.run(json.dumps(arguments))

  for arguments in INJECTIONS[:2]:
    assert 'error: ' in call('write', *arguments)
  assert list(tmp_path.iterdir()) == []
  text = call('write', 'mine.py', 'Four experts', 'steps=7')
  assert text.startswith('wrote mine.py\ntrains '), text
  assert config_file.parse_config((tmp_path / 'mine.py').read_text()) == {
    'steps': 7
  }


@pytest.mark.parametrize('about', ['"""', 'x\'"', '\\', 'a\nb', '\x1b[2J'])
def test_any_text_in_a_card_is_read_back_as_it_was(about):
  values = {'a': about, 'b.c': -1.5e-9, 'd_e.f': True, 'g': None, 'h': -3}
  text = config_file.render_config(about, values)
  assert config_file.parse_config(text) == values
  assert ast.get_docstring(ast.parse(text), clean=False) == about


@pytest.mark.parametrize(
  'text',
  [
    '',
    'x = 1',
    'import os',
    config_file.render_config('A.', {'a': 1}) + 'import os\n',
    config_file.render_config('A.', {'a': 1}).replace('c.a = 1', 'c.a = open'),
    config_file.render_config('A.', {'a': 1}).replace('c.a = 1', 'c.a = [1]'),
    config_file.render_config('A.', {'a': 1}).replace('c.a = 1', 'c.a = 1e999'),
    config_file.render_config('A.', {'a': 1}).replace('c.a = 1', 'c.a = b = 1'),
    config_file.render_config('A.', {'a': 1}).replace(
      '  return c', '  exit()\n  return c'
    ),
    config_file.render_config('A.', {'a': 1}).replace(
      "str=''", 'str=open("x")'
    ),
    config_file.render_config('A.', {'a': 1}).replace(
      'def get', '@print\ndef get'
    ),
    config_file.render_config('A.', {'a': 1}).replace(
      '"""A."""', 'f"""{open}"""'
    ),
    '(' * 10_000,
    'x' * 100_000,
    '\0',
    '\ud800',
  ],
)
def test_other_texts_are_no_config_files(text):
  with pytest.raises(ValueError, match='no config file'):
    config_file.parse_config(text)


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('a b', 1),
    ('a.', 1),
    ('__class__', 1.0e999),
    ('import', 1),
    ('a)', 1),
    ('', 1),
    ('a', float('nan')),
    ('a', float('-inf')),
    ('a', [1]),
    ('a', b'x'),
  ],
)
def test_other_keys_and_values_are_refused(key, value):
  with pytest.raises(ValueError):
    config_file.render_config('A.', {key: value})


def test_a_card_is_written_that_training_would_take(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  path = Path('mine.py')
  output = run_script(
    WRITE_CONFIG,
    'write',
    str(path),
    'MoLoRA with four experts',
    'method=molora(experts=4, rank=2)',
    'optimizer.learning_rate=1e-4',
    'data.packing=true',
    'config.steps=50',
  )
  assert f'wrote {path}' in output and 'trains ' in output
  tools: dict = {}
  exec(compile(path.read_text(), 'mine', 'exec'), tools)
  c = tools['get_config']()
  assert c.method == 'molora(experts=4, rank=2)'
  assert (c.optimizer.learning_rate, c.data.packing, c.steps) == (
    1e-4,
    True,
    50,
  )
  assert '--config=mine.py --workdir=DIR' in tools['__doc__']
  assert path.read_text().startswith('# SPDX-License-Identifier: Apache-2.0')
  # What is there stays.
  again = run_script(WRITE_CONFIG, 'write', str(path), 'Another.', 'steps=7')
  assert again == f'error: {path} exists; choose another name\n'


@pytest.mark.parametrize(
  ('setting', 'output'),
  [
    ('learning_rate=1', 'did you mean optimizer.learning_rate?'),
    ('steps', 'expected key=value'),
    ('steps=many', 'steps is of type int'),
    ('steps=0', 'config.steps is at least 1'),
    ('method=mollora(rank=2)', "no method 'mollora'"),
    ('objective=sequences', 'objective is one of'),
    ('objective=causal', 'encoder'),
  ],
)
def test_a_setting_that_training_would_refuse_is_refused(
  tmp_path, monkeypatch, setting, output
):
  monkeypatch.chdir(tmp_path)
  path = Path('mine.py')
  answer = run_script(WRITE_CONFIG, 'write', str(path), 'A try.', setting)
  assert answer.startswith('error: ') and output in answer
  assert not path.exists()

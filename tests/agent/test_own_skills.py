# SPDX-License-Identifier: Apache-2.0
"""The two skills that ship: valid, and their scripts say what is so."""

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

SUMMARISE = skills.SHIPPED / 'read-training-run' / 'scripts' / 'summarise.py'
CARD = skills.SHIPPED / 'write-config' / 'scripts' / 'card.py'


def test_what_ships_is_valid_and_names_files_that_are_there():
  own = skills.find_skills([skills.SHIPPED])
  assert list(own) == ['read-training-run', 'write-config']
  for skill in own.values():
    for path in skill.files():
      assert Path(path).name in skill.body, path


def run_script(path, *arguments):
  """What a script prints, its program in this process: JAX starts once."""
  spec = importlib.util.spec_from_file_location(path.stem, path)
  made = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(made)
  try:
    return made.main(list(arguments))
  except ValueError as e:
    return f'error: {e}\n'


def script_tool(workspace):
  """run_skill_script of what ships; in the sandbox where there is one."""
  own = skills.find_skills([skills.SHIPPED])
  workspace.chmod(0o755)
  box = skills.script_sandbox(
    own, workspace, unsafe_no_sandbox=bool(bubblewrap.unavailable_reason())
  )
  made = skills.skill_tools(own, box, workspace)
  return next(tool for tool in made if tool.name == 'run_skill_script')


def test_the_scripts_run_by_themselves(tmp_path):
  run = script_tool(tmp_path)
  for name, path, arguments, said in (
    ('write-config', 'scripts/card.py', ['keys', 'seed'], 'seed=0'),
    (
      'read-training-run',
      'scripts/summarise.py',
      [written(tmp_path, fallen())],
      'no findings',
    ),
    (
      'read-training-run',
      'scripts/summarise.py',
      [],
      'error: expected one argument',
    ),
  ):
    asked = {'name': name, 'path': path, 'args': arguments}
    assert said in run.run(json.dumps(asked))


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
  made = [
    {'step': i, 'loss': loss, 'gradient_norm': 1.5, 'tokens_per_s': 1000 + i}
    for i, loss in enumerate(losses, 1)
  ]
  for step, row in rows:
    made[step - 1] |= row
  lines = [json.dumps(row | more) for row in made]
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
  said = run_script(SUMMARISE, written(tmp_path, fallen()))
  assert 'molora(experts=3, rank=2)' in said and 'seed 5' in said
  assert 'steps: 100 of 100; ended' in said
  # The middle of the first ten of the curve, about 1 + 4 exp(-4.5 / 8) = 3.28.
  assert 'loss: 3.2' in said and 'flat over the last third' in said
  # Rates are 1001 to 1100, their median 1050.5.
  assert 'throughput: 1,050 tokens/s' in said
  assert 'gradient norm: median 1.5' in said
  assert said.rstrip().endswith('no findings')
  assert len(said) < 1500


@pytest.mark.parametrize(
  ('losses', 'found'),
  [
    ([*fallen(60), *(1 + 0.05 * i for i in range(40))], '! the loss diverges'),
    ([5.0] * 60 + [None] * 3, 'not a number in 3 steps, first at step 61'),
    ([3 + 0.01 * (i % 5) for i in range(60)], '! the loss has hardly fallen'),
    ([5 - 0.04 * i for i in range(100)], '! the loss still falls at the end'),
    ([*fallen(90), 30.0, *fallen(9)[8:]], '! 1 spikes of the loss'),
  ],
)
def test_what_is_wrong_with_a_loss_is_found(tmp_path, losses, found):
  assert found in run_script(SUMMARISE, written(tmp_path, losses))


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
  said = run_script(SUMMARISE, written(tmp_path, fallen(), rows))
  assert 'best 1.5 at step 50, 1.9 at step 100' in said
  assert '! the validation loss rises after step 50' in said
  # One of six experts has no weight; (0.98 + 0.4) / 2 = 69 %.
  assert 'the fullest expert has 69% of the weight on average, 98% at' in said
  assert '1 of 6 experts below 1%' in said
  assert 'at 1 of 2: encoder/q/molora, layer 0' in said


def test_one_log_of_a_collapsed_router_is_no_finding(tmp_path):
  site = {'tokens': [[1.0, 0.0]], 'entropy': [0.1], 'weight_entropy': [0.0]}
  rows = routed(tokens=[[0.5, 0.5]], entropy=[0.6], weight_entropy=[0.0])[:2]
  rows += routed(**site)[2:]
  said = run_script(SUMMARISE, written(tmp_path, fallen(), rows))
  assert 'the fullest expert gets 100% of the tokens' in said
  assert 'collapse' not in said
  always = run_script(SUMMARISE, written(tmp_path, fallen(), routed(**site)))
  assert '! router collapse' in always


def test_low_losses_of_noisy_pairs_are_no_divergence(tmp_path):
  # As of DPO: from 0.69 down to 0.1 to 0.5, in no order.
  noise = random.Random(7)
  losses = [0.69] * 5 + [noise.uniform(0.1, 0.5) for _ in range(35)]
  assert 'diverges' not in run_script(SUMMARISE, written(tmp_path, losses))


def test_a_soft_routers_even_weights_are_no_collapse(tmp_path):
  # Of three experts one is always ahead, by little: ln 3 = 1.099. An older log.
  rows = routed(load=[[0.99, 0.01, 0.0]], entropy=[1.08])
  said = run_script(SUMMARISE, written(tmp_path, fallen(), rows))
  assert 'argmax share (an older log, no mean weights)' in said
  assert '99% at most' in said and 'collapse' not in said


def test_what_rose_and_what_fell_is_told_in_words(tmp_path):
  run = written(tmp_path, fallen())
  for name, loss, right in (('before', 2.0, 0.5), ('after', 1.25, 0.75)):
    row = {'group': 'B', 'task': 'kind', 'templates': 'seen', 'examples': 100}
    rows = [row | {'accuracy': right}, row | {'task': 'x', 'accuracy': 0.25}]
    means = {'B seen': (right + 0.25) / 2}
    found = {'validation_loss': loss, 'rows': rows, 'means': means}
    (tmp_path / f'{name}.json').write_text(json.dumps(found))
  said = run_script(SUMMARISE, run)
  assert 'validation loss fell from 2 to 1.25' in said
  assert 'accuracy rose: B seen 37.5 -> 50.0 %' in said
  assert 'tasks that moved the most: kind seen +25 points' in said


def test_the_metrics_of_a_real_run_can_be_read():
  run = ROOT / 'docs' / 'runs' / 'smollm2' / 'molora'
  if not run.is_dir():
    pytest.skip('docs/runs is not beside the tests')
  said = run_script(SUMMARISE, str(run))
  assert 'steps: 150 of 150' in said and 'routers at step 150' in said
  # Its entropies leave no expert 90 % of the weight.
  assert 'argmax share' in said and 'collapse' not in said


def test_a_directory_that_is_no_run_is_an_error_of_one_line(tmp_path):
  for arguments in ((), (str(tmp_path / 'x'),), (str(tmp_path),)):
    said = run_script(SUMMARISE, *arguments)
    assert said.startswith('error: ') and said.count('\n') == 1


def test_keys_are_listed_with_defaults_and_what_they_mean():
  assert 'sections: ' in run_script(CARD, 'keys')
  said = run_script(CARD, 'keys', 'optimizer')
  assert 'optimizer.learning_rate=0.001' in said
  assert "optimizer.name='adamw'  # 'adamw' or 'adafactor'." in said
  assert 'data.packing=False' in run_script(CARD, 'keys', 'packing')
  assert "no key has 'nonsense'" in run_script(CARD, 'keys', 'nonsense')


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
  text = run_script(CARD, 'write', *arguments)
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
def test_a_prompt_injection_writes_nothing_and_a_plain_call_a_card(tmp_path):
  run = script_tool(tmp_path)

  def call(*args):
    asked = {'name': 'write-config', 'path': 'scripts/card.py', 'args': args}
    return run.run(json.dumps(asked))

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
def test_other_texts_are_no_cards(text):
  with pytest.raises(ValueError, match='no config card'):
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
  said = run_script(
    CARD,
    'write',
    str(path),
    'MoLoRA with four experts',
    'method=molora(experts=4, rank=2)',
    'optimizer.learning_rate=1e-4',
    'data.packing=true',
    'config.steps=50',
  )
  assert f'wrote {path}' in said and 'trains ' in said
  made: dict = {}
  exec(compile(path.read_text(), 'mine', 'exec'), made)
  c = made['get_config']()
  assert c.method == 'molora(experts=4, rank=2)'
  assert (c.optimizer.learning_rate, c.data.packing, c.steps) == (
    1e-4,
    True,
    50,
  )
  assert '--config=mine.py --workdir=DIR' in made['__doc__']
  assert path.read_text().startswith('# SPDX-License-Identifier: Apache-2.0')
  # What is there stays.
  again = run_script(CARD, 'write', str(path), 'Another.', 'steps=7')
  assert again == f'error: {path} exists; choose another name\n'


@pytest.mark.parametrize(
  ('setting', 'said'),
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
  tmp_path, monkeypatch, setting, said
):
  monkeypatch.chdir(tmp_path)
  path = Path('mine.py')
  answer = run_script(CARD, 'write', str(path), 'A try.', setting)
  assert answer.startswith('error: ') and said in answer
  assert not path.exists()

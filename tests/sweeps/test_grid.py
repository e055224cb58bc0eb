# SPDX-License-Identifier: Apache-2.0
"""The grammar of --grid."""

import pytest

from moepeft.sweeps import grid


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('seed=0..4', {'seed': ('0', '1', '2', '3', '4')}),
    ('seed=7, 0..2 ,9', {'seed': ('7', '0', '1', '2', '9')}),
    ('a=-2..-1', {'a': ('-2', '-1')}),
    (
      'optimizer.learning_rate=1e-3,3e-3; seed = 0',
      {'optimizer.learning_rate': ('1e-3', '3e-3'), 'seed': ('0',)},
    ),
    # Commas in brackets are part of a value.
    (
      'method=lora(rank=4, alpha=8), molora(ranks=[2, 4])',
      {'method': ('lora(rank=4, alpha=8)', 'molora(ranks=[2, 4])')},
    ),
    (
      'method=lora(rank=4)|molora(experts=2) + ia3',
      {'method': ('lora(rank=4)', 'molora(experts=2) + ia3')},
    ),
    # With |, commas separate nothing.
    ('data.tasks=A,counting|B', {'data.tasks': ('A,counting', 'B')}),
    # In quotes neither do; a pattern of a method has | in its own.
    ("data.tasks='A,counting','B'", {'data.tasks': ('A,counting', 'B')}),
    (
      "method=lora(targets='*/q|*/k'); seed=1",
      {'method': ("lora(targets='*/q|*/k')",), 'seed': ('1',)},
    ),
    (
      "optimizer.groups='*/a: weight_decay=0; */b: weight_decay=1'|''",
      {'optimizer.groups': ('*/a: weight_decay=0; */b: weight_decay=1', '')},
    ),
    # A quoted range is a text.
    ("data.split='0..4'", {'data.split': ('0..4',)}),
    # As users may write it from habit; a last semicolon; a line break.
    ('--config.seed=0;\nsteps=3;', {'seed': ('0',), 'steps': ('3',)}),
  ],
)
def test_a_grid_is_keys_with_values(text, expected):
  parsed = grid.parse(text)
  assert parsed == expected
  assert list(parsed) == list(expected)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('seed', "'seed' is no key with values"),
    ('seed=0; 3', "'3' is no key with values"),
    ('seed=', 'seed has an empty value'),
    ('seed=0,,1', 'seed has an empty value'),
    ('seed=0; seed=1', '--grid has seed twice'),
    ('seed=4..0', 'the range seed=4..0 is empty; write 0..4'),
    ('seed=0..10000', 'the range seed=0..10000 has more than 10,000 values'),
    ('seed=0..9998,0..9', 'seed has 10,009 values'),
    ('method=lora(rank=4', 'a bracket in'),
    ('method=lora)rank=4', 'a bracket in'),
    ("data.tasks='A", "a quote ' in"),
    (' ; ', '--grid has no keys'),
    ('=3', "'=3' is no key with values"),
  ],
)
def test_another_text_is_refused_in_one_sentence(text, message):
  with pytest.raises(ValueError, match='^--grid') as error:
    grid.parse(text)
  assert message in str(error.value)
  assert '\n' not in str(error.value)


def test_a_text_without_keys_is_a_file(tmp_path):
  path = tmp_path / 'grid.txt'
  path.write_text(
    '# Two methods of one budget; and five seeds.\n'
    'method=lora(rank=45)|molora(experts=10, rank=4)\n'
    '\n'
    '  # seed=9\n'
    'seed=0..1; steps=3\n'
  )
  assert grid.read(str(path)) == {
    'method': ('lora(rank=45)', 'molora(experts=10, rank=4)'),
    'seed': ('0', '1'),
    'steps': ('3',),
  }
  with pytest.raises(ValueError, match='is no grid and no file'):
    grid.read(str(tmp_path / 'other.txt'))


def test_a_config_file_has_a_grid_of_python_values(tmp_path):
  path = tmp_path / 'config.py'
  path.write_text("GRID = {'seed': range(2), 'optimizer.b1': (0.9, 1e-3)}")
  expected = {'seed': ('0', '1'), 'optimizer.b1': ('0.9', '0.001')}
  assert grid.of_config(str(path)) == expected


@pytest.mark.parametrize(
  'text',
  [
    "GRID = 'seed=0'",
    "GRID = {'seed': 'ab'}",
    "GRID = {'seed': ()}",
    'GRID = {}',
  ],
)
def test_a_grid_of_another_form_is_refused(tmp_path, text):
  path = tmp_path / 'config.py'
  path.write_text(text)
  with pytest.raises(ValueError, match='is no grid; write it like'):
    grid.of_config(str(path))


def test_a_config_without_a_grid_needs_the_flag(tmp_path):
  path = tmp_path / 'config.py'
  path.write_text('')
  for file in (str(path), ''):
    with pytest.raises(ValueError, match='--grid is missing'):
      grid.of_config(file)

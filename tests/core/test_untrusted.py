# SPDX-License-Identifier: Apache-2.0
"""Hostile JSON and YAML end in one sentence, never in another exception."""

import json

import pytest
import yaml

from moepeft.core.untrusted import (
  Malformed,
  check_shape,
  field,
  parse_json,
  parse_yaml,
  read_json,
  read_json_object,
)


def nested(depth, opening='[', closing=']'):
  return opening * depth + closing * depth


def test_good_json_is_what_json_says():
  text = '{"a": [1, 2.5, null, true, "\\u00e9\\ud83d\\ude00"]}'
  assert parse_json(text) == json.loads(text)
  assert parse_json(b'\xef\xbb\xbf' + text.encode()) == json.loads(text)
  assert parse_json('\ufeff[1]') == [1]


@pytest.mark.parametrize('depth', [101, 5_000, 200_000])
def test_deep_nesting_is_refused(depth):
  for text in (nested(depth), nested(depth, '{"a":[', ']}')):
    with pytest.raises(Malformed, match='deep'):
      parse_json(text)
  # YAML takes seconds of deeper texts, which are refused at the same place.
  if depth <= 5_000:
    with pytest.raises(Malformed, match='deep'):
      parse_yaml(nested(depth))


def test_as_deep_as_allowed_is_read():
  assert parse_json(nested(100)) is not None
  assert parse_json(nested(5), max_depth=5) is not None
  # Many brackets side by side are not deep.
  assert len(parse_json('[' + '[],' * 999 + '[]]')) == 1_000


@pytest.mark.parametrize(
  'text, reason',
  [
    ('', 'not JSON'),
    ('{"a": 1', 'line 1'),
    (b'\xff\xfe', 'not UTF-8'),
    ('["\\ud83d"]', 'half a surrogate'),
    ('{"\\udc00": 1}', 'half a surrogate'),
    ('9' * 5_000, 'not JSON'),
  ],
)
def test_malformed_json_is_one_sentence(text, reason):
  with pytest.raises(Malformed, match=reason) as error:
    parse_json(text)
  assert '\n' not in str(error.value)


def test_nan_is_a_number_where_that_is_allowed():
  assert parse_json('[NaN]')[0] != parse_json('[NaN]')[0]
  with pytest.raises(Malformed, match='NaN'):
    parse_json('[NaN]', allow_nan=False)


@pytest.mark.parametrize(
  'text',
  [
    'a: [1',
    '&a [*a]',
    '{[1]: 2}',
    'a: 2020-13-40',
    '"\\ud83d"',
    '!!python/object/apply:os.system [id]',
    # Ten lists of ten aliases each, eight times: 10 ** 8 nodes.
    'a0: &a0 [x]\n'
    + ''.join(
      f'a{i}: &a{i} [{", ".join([f"*a{i - 1}"] * 10)}]\n' for i in range(1, 9)
    ),
  ],
)
@pytest.mark.parametrize('loader', [yaml.SafeLoader, yaml.CSafeLoader])
def test_malformed_yaml_is_one_sentence(text, loader):
  with pytest.raises(Malformed) as error:
    parse_yaml(text, loader)
  assert '\n' not in str(error.value)


def test_files_are_named(tmp_path):
  path = tmp_path / 'config.json'
  path.write_text(nested(9_999))
  with pytest.raises(Malformed, match='config.json is nested too deeply'):
    read_json(path)
  path.write_text('[]')
  with pytest.raises(Malformed, match='config.json has a list'):
    read_json_object(path)


def test_fields_have_their_types():
  value = {'n': 3, 'x': 2, 'b': True, 's': 'a', 'o': {'l': [1]}, 'none': None}
  assert field(value, 'n', int) == 3
  assert isinstance(field(value, 'x', float), float)
  assert field(value, 'o.l', list) == [1]
  assert field(value, 'none', str, 'd') == field(value, 'no', str, 'd') == 'd'
  assert field(value, 'no.l', list, None) is None
  for key, kind in (
    ('b', int),
    ('b', float),
    ('n', bool),
    ('s', int),
    ('o', list),
    ('none', int),
    ('no', int),
    ('s.l', list),
    ('no.l', list),
  ):
    with pytest.raises(Malformed, match='expected'):
      field(value, key, kind)
  with pytest.raises(Malformed, match='expected an object'):
    field([], 'n', int)
  for kind in (int, float):
    with pytest.raises(Malformed, match='64 bits'):
      field({'n': 10**400}, 'n', kind)


SHAPE = {
  'step': int,
  'loss?': (float, None),
  'names?': [str],
  'sites?': {str: {'load': [float]}},
}


@pytest.mark.parametrize(
  'value',
  [
    {'step': 1},
    {'step': 1, 'loss': None, 'names': [], 'sites': {}, 'other': object},
    {'step': 1, 'loss': 2, 'names': ['a'], 'sites': {'q': {'load': [1, 2.5]}}},
  ],
)
def test_a_value_of_the_shape_passes(value):
  check_shape(value, SHAPE)


@pytest.mark.parametrize(
  ('value', 'message'),
  [
    ([], 'expected an object, got a list'),
    ({}, "'step' is absent"),
    ({'step': True}, "expected an integer in 'step', got true or false"),
    ({'step': 2**63}, "expected 64 bits in 'step', got a larger integer"),
    ({'step': 1, 'loss': 'x'}, "expected a number in 'loss', got a text"),
    ({'step': 1, 'names': ['a', 3]}, "expected a text in 'names[1]'"),
    ({'step': 1, 'sites': {'q': {}}}, "'sites.q.load' is absent"),
    (
      {'step': 1, 'sites': {'q': {'load': [1, float('nan')]}}},
      "expected a finite number in 'sites.q.load[1]', got nan",
    ),
  ],
)
def test_a_value_of_another_shape_is_named_by_its_place(value, message):
  with pytest.raises(Malformed) as e:
    check_shape(value, SHAPE)
  assert message in str(e.value)

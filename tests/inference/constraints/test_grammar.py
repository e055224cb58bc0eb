# SPDX-License-Identifier: Apache-2.0
"""Masks allow what a constraint says, token by token, and nothing else."""

import json
import sys

import numpy as np
import pytest

from moepeft.data.tokenizers.tokenizer import (
  ByteTokenizer,
  HuggingFaceTokenizer,
)
from moepeft.inference.constraints.grammar import Compiler, Limits
from moepeft.inference.constraints.grammar_worker import ProcessLimits
from tests import chat_cases

from . import json_cases, small_words

pytest.importorskip('llguidance')

# Of bytes, 259 and 18 that only the model has.
WIDE = 277


@pytest.fixture(scope='module')
def compiler():
  return Compiler(ByteTokenizer(), WIDE, (1,))


@pytest.fixture(scope='module')
def spaced(tmp_path_factory):
  """Of SentencePiece's kind: a blank goes before each text and word."""
  folder = tmp_path_factory.mktemp('spaced')
  return small_words.saved(folder, 'spaces', size=130)


def letters(mask):
  """What may come next, of bytes: their text, and '$' for the end."""
  actual = np.flatnonzero(mask)
  assert not set(actual) & {0, 2} and max(actual) < 259
  return ''.join('$' if i == 1 else chr(i - 3) for i in actual)


def after(constraint, text):
  """What may come after a text, each letter of which is allowed."""
  for byte in text.encode():
    assert constraint.mask()[byte + 3], text
    if constraint.accept(byte + 3):
      return ''
  return letters(constraint.mask())


def refuses(constraint, text):
  try:
    after(constraint, text)
  except AssertionError:
    return True
  return False


def test_an_expression_ends_where_it_may_and_must(compiler):
  assert after(compiler.regex('a+b?'), '') == 'a'
  # Nothing comes after b.
  assert after(compiler.regex('a+b?'), 'aa') == '$ab'
  assert after(compiler.regex('a+b?'), 'aab') == ''


def test_an_end_is_accepted_only_where_the_text_may_end(compiler):
  constraint = compiler.regex('ab*')
  with pytest.raises(ValueError, match='token 1 is not allowed'):
    constraint.accept(1)
  constraint = compiler.regex('ab*')
  assert not constraint.accept(ord('a') + 3)
  assert constraint.accept(1)


def test_a_token_that_the_mask_forbids_is_an_error(compiler):
  constraint = compiler.regex('ab*')
  with pytest.raises(ValueError, match='not allowed'):
    constraint.accept(ord('c') + 3)


def test_a_mask_is_as_wide_as_the_model(compiler):
  mask = compiler.regex('(?s:.)*').mask()
  assert mask.shape == (WIDE,)
  assert mask.dtype == bool
  # One byte of one letter, but for 13 that begin no UTF-8: 0xc0, 0xc1 and
  # from 0xf5 on; and 64 that are inner ones. The end is one more.
  assert mask.sum() == 256 - 13 - 64 + 1
  assert not mask[259:].any() and not mask[[0, 2]].any()


def test_several_ends_are_all_allowed():
  constraint = Compiler(ByteTokenizer(), WIDE, (1, 260)).regex('a')
  assert constraint.accept(ord('a') + 3)
  assert np.flatnonzero(constraint.mask()).tolist() == [1, 260]


def test_an_end_that_has_a_text_is_no_text():
  # Lines end answers, so that no text has a line.
  constraint = Compiler(ByteTokenizer(), WIDE, (ord('\n') + 3,)).regex(
    r'a[\n ]*'
  )
  assert not constraint.accept(ord('a') + 3)
  assert np.flatnonzero(constraint.mask()).tolist() == [13, 35]
  assert constraint.accept(13)


def test_a_choice_is_one_of_its_texts(compiler):
  options = ('yes', 'yes, sir', 'no "x"\n\\', 'größe\x7f/')
  for option in options:
    assert after(compiler.choice(options), option) in ('', '$,')
  assert after(compiler.choice(options), 'n') == 'o'
  assert refuses(compiler.choice(options), 'yes, s$')


def test_json_has_one_blank_after_a_comma_or_a_colon_at_most(compiler):
  schema = json_cases.closed(
    a={'type': 'array', 'items': json_cases.DIGIT}, b={'type': 'null'}
  )
  make = compiler.json_schema
  for text in ('{"a":[1,2],"b":null}', '{"a": [1, 2], "b": null}'):
    assert after(make(schema), text) == ''
  blank = (' {', '{ "', '{\n"', '{"a" :', '{"a":  ', '{"a":[ 1', '{"a":[1 ,')
  for text in (*blank, '{"a":[1,  2', '{"a":[1,\n2', '{"a":[1] ', '{"a":\t'):
    assert refuses(make(schema), text), text
  assert refuses(compiler.json_object(), '{"a":  ')
  assert refuses(compiler.json_object(), '{ ')


def test_blanks_are_as_bounded_in_the_json_of_a_grammar(compiler):
  text = (
    '# A comment with %json in it\n'
    'start: "%json: " item /%json/ "."\n'
    'item: %json {"type": "array", "items": {"type": "boolean"}}\n'
  )
  assert after(compiler.grammar(text), '%json: [true, true]%json.') == ''
  for wrong in ('%json: [ ', '%json: [true,  ', '%json: [true ,'):
    assert refuses(compiler.grammar(text), wrong)


def test_an_object_has_the_properties_that_it_lists(compiler):
  named = {'type': 'object', 'properties': {'a': json_cases.DIGIT}}
  assert after(compiler.json_schema(named), '{"a":1') == '}'
  more = named | {'additionalProperties': json_cases.DIGIT}
  assert after(compiler.json_schema(more), '{"a":1') == ',}'
  # Joined objects would forbid each other's properties.
  other = {'type': 'object', 'properties': {'b': json_cases.DIGIT}}
  both = {'allOf': [named | {'required': ['a']}, other | {'required': ['b']}]}
  assert not refuses(compiler.json_schema(both), '{"a":1,"b":2')
  each = {'anyOf': [named, other]}
  assert after(compiler.json_schema(each), '{"b":1') == '}'
  beside = each | {'properties': {'c': json_cases.DIGIT}}
  assert not refuses(compiler.json_schema(beside), '{"c":1,"a":1')


def test_days_are_those_of_the_calendar(compiler):
  schema = {'type': 'string', 'format': 'date'}
  # By 4, but of hundreds those by 400.
  for day in ('2024-02-29', '2000-02-29', '2023-12-31', '1900-02-28'):
    assert not refuses(compiler.json_schema(schema), f'"{day}"')
  for day in ('2023-02-29', '1900-02-29', '2023-04-31', '2023-13-01'):
    assert refuses(compiler.json_schema(schema), f'"{day}"')
  within = schema | {'pattern': '^19'}
  assert after(compiler.json_schema(within), '"') == '1'


def test_words_named_as_keywords_are_words(compiler):
  # A property whose name is a keyword, and a constant that looks like a schema.
  schema = json_cases.closed(
    ('format',),
    format={'const': {'format': 'date', 'uniqueItems': False}},
  )
  text = '{"format":{"format":"date","uniqueItems":false}}'
  assert not refuses(compiler.json_schema(schema), text)


WRONG = (
  ([], 'is an object, got list'),
  ({'type': 'strin'}, 'Invalid type: strin'),
  ({'not': {}, 'type': 'string'}, 'not'),
  ({'type': 'array', 'uniqueItems': True}, 'uniqueItems'),
  ({'type': 'string', 'format': 'idn-email'}, 'Unknown format'),
  ({'type': 'string', 'pattern': '(?=a)b'}, 'look-around'),
  ({'type': 'string', 'pattern': '(('}, 'unclosed group'),
  ({'oneOf': [json_cases.SHORT, {'type': 'string'}]}, "'anyOf'"),
  ({'enum': []}, 'empty'),
  ({'type': 'integer', 'minimum': 5, 'maximum': 4}, 'greater than'),
  ({'$ref': '#'}, 'allows no text'),
  ({'$ref': '#/$defs/none'}, 'cannot be followed'),
  ({'$ref': 'http://example.com/a'}, 'cannot be followed'),
  ({'x-guidance': {'whitespace_flexible': True}}, 'x-guidance'),
  ({'type': 'object', 'minProperties': 2}, 'minProperties'),
  ({'type': 'integer', 'multipleOf': 5_003}, 'multipleOf'),
  # 71 and 73 divide no number below 5,183.
  ({'allOf': [{'multipleOf': 71}, {'multipleOf': 0.73}]}, 'multipleOf'),
  ({'enum': [float('nan')]}, 'is not JSON'),
  ({'enum': [b'a']}, 'is not JSON'),
  ({'enum': ['x' * 100_000]}, '100,0.. characters'),
  ({'anyOf': [{'const': i} for i in range(1_000)]}, '1,001 subschemas'),
  (
    {
      'allOf': [
        {'anyOf': [{'properties': {f'k{i}{j}': {}}} for j in range(11)]}
        for i in range(11)
      ]
    },
    'too large',
  ),
)


@pytest.mark.parametrize('schema, reason', WRONG)
def test_a_schema_that_cannot_be_kept_is_one_sentence(compiler, schema, reason):
  with pytest.raises(ValueError, match=reason) as e:
    compiler.json_schema(schema)
  assert '\n' not in str(e.value)
  assert len(str(e.value)) < 400


def test_a_deep_schema_is_refused_before_it_is_read(compiler):
  schema = {}
  for _ in range(65):
    schema = {'items': schema}
  with pytest.raises(ValueError, match='deeper than 64'):
    compiler.json_schema(schema)
  with pytest.raises(ValueError, match='deeper than 64'):
    compiler.json_schema(json.loads('{"a":' * 900 + '1' + '}' * 900))


def test_what_is_not_strict_leaves_out_what_cannot_be_kept(compiler):
  schema = {'type': 'boolean', 'not': {'const': True}}
  loose = compiler.json_schema(schema, strict=False)
  assert after(loose, '') == 'ft'


@pytest.mark.parametrize(
  'text, reason',
  (
    ('(', 'unclosed'),
    ('(?=a)b', 'look-around'),
    (r'(a)\1', 'backreferences'),
    ('[a&&b]', 'allows no text'),
    ('a' * 10_001, '10,001 characters'),
    ('(' * 400 + ')' * 400, 'cannot be followed'),
  ),
)
def test_a_wrong_expression_is_one_sentence(compiler, text, reason):
  with pytest.raises(ValueError, match=reason) as e:
    compiler.regex(text)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize(
  'text, reason',
  (
    ('', 'Empty grammar'),
    ('nonsense', 'cannot be followed'),
    ('start: other', 'unknown name'),
    ('start: a\na: b\nb: a', 'allows no text'),
    ('start: ' + '(' * 4_000 + '"a"' + ')' * 4_000, 'deeply nested'),
    ('start: "a"' + ' ' * 50_000, 'characters'),
    ('{"grammars": []}', 'got a JSON object'),
    ('start: %json {', 'no JSON schema after'),
    ('start: %json {"x-guidance": {}}', 'x-guidance'),
    # Special tokens, by id and by name.
    ('start: <[2]>', 'allows no text'),
    ('start: <|none|>', 'cannot be followed'),
  ),
)
def test_a_wrong_grammar_is_one_sentence(compiler, text, reason):
  with pytest.raises(ValueError, match=reason) as e:
    compiler.grammar(text)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize(
  'options, reason',
  (
    ([], 'at least one'),
    ('yes', 'a list of texts'),
    (['a', ''], "got ''"),
    (['a', 7], 'got 7'),
    (['a'] * 10_001, '10,001 options'),
  ),
)
def test_a_wrong_choice_is_one_sentence(compiler, options, reason):
  with pytest.raises(ValueError, match=reason):
    compiler.choice(options)


def test_special_tokens_come_in_no_text(tmp_path):
  words = small_words.saved(tmp_path, 'bytes')
  special = words.tokenizer.all_special_ids
  compiler = Compiler(words, len(words.tokenizer), (words.eos,))
  mask = compiler.regex('(?s:.*)').mask()
  assert [i for i in special if mask[i]] == [words.eos]
  # A grammar may name them, and gets no further.
  begun = words.tokenizer.convert_tokens_to_ids('<|im_start|>')
  with pytest.raises(ValueError, match='allows no text'):
    compiler.grammar(f'start: <[{begun}]> "a"')


def test_the_blank_before_a_text_is_not_of_it(spaced):
  compiler = Compiler(spaced, len(spaced.tokenizer), (spaced.eos,))
  for option in ('hello world', 'yes', 'no'):
    # As the model was taught to write it.
    ids = spaced.encode(option)
    assert spaced.tokenizer.convert_ids_to_tokens(ids)[0].startswith('▁')
    constraint = compiler.choice(['yes', 'no', option])
    allowed = [(constraint.mask()[i], constraint.accept(i)) for i in ids]
    assert all(may for may, _ in allowed)
    assert allowed[-1][1]
  rng = np.random.default_rng(29)
  for _ in range(13):
    constraint = compiler.choice(['hello world', 'yes'])
    ids, ended = json_cases.stream(constraint, (spaced.eos,), 0, rng, 30)
    assert ended
    assert spaced.decode(ids) in ('hello world', 'yes')


def test_a_text_without_a_choice_may_begin_as_it_was_taught(tmp_path):
  # '▁the' is a token and 'the' is none, so that llguidance would have a t.
  made = chat_cases.learnt('spaces', texts=['the tea to two ten'] * 7, size=60)
  made.save_pretrained(tmp_path)
  words = HuggingFaceTokenizer(str(tmp_path))
  (token,) = words.encode('the')
  assert 'the' not in made.get_vocab()
  constraint = Compiler(words, len(made), (words.eos,)).choice(['the'])
  assert constraint.mask()[token]
  assert constraint.accept(token)


def test_a_vocabulary_without_braces_writes_no_json(tmp_path):
  # As T5's, which has no { and no line.
  made = chat_cases.learnt('spaces', texts=['yes or no, "and"'] * 7, size=40)
  made.save_pretrained(tmp_path)
  words = HuggingFaceTokenizer(str(tmp_path))
  compiler = Compiler(words, len(words.tokenizer), (words.eos,))
  assert compiler.choice(['yes', 'no']).mask().any()
  with pytest.raises(ValueError, match='that the vocabulary can write'):
    compiler.json_object()
  # Begun, but with no way on: the request fails, and no mask is all False.
  constraint = compiler.regex('(yes|no)[{}]')
  rng = np.random.default_rng(31)
  with pytest.raises(ValueError, match='no token of the vocabulary goes on'):
    json_cases.stream(constraint, (words.eos,), 0, rng, 30)


def test_constraints_of_one_grammar_do_not_know_of_each_other(compiler):
  first, second = (compiler.regex('ab*c') for _ in range(2))
  assert after(first, 'ab') == 'bc'
  assert after(second, '') == 'a'
  assert after(first, 'bc') == ''


def test_grammars_are_compiled_once_and_the_oldest_forgotten(monkeypatch):
  compiler, made = Compiler(ByteTokenizer(), WIDE, (1,), Limits(cached=2)), []
  compiled = compiler._compile

  def counted(grammar, what):
    made.append(what)
    return compiled(grammar, what)

  monkeypatch.setattr(compiler, '_compile', counted)
  for text in ('a', 'b', 'a', 'c', 'a', 'b'):
    compiler.regex(text)
  # b was the oldest when c came.
  assert len(made) == 4


def test_a_grammar_that_grows_too_complex_fails_and_is_compiled_anew():
  # Each of the last 200 letters may have been the a: 2^200 states.
  text, favour = '(a|b)*a(a|b){200}', np.zeros(WIDE)
  favour[1] = -99
  compiler = Compiler(
    ByteTokenizer(), WIDE, (1,), Limits(process=ProcessLimits(states=500))
  )
  rng = np.random.default_rng(37)
  for _ in range(2):
    with pytest.raises(ValueError, match='cannot go on .*too many'):
      json_cases.stream(compiler.regex(text), (1,), favour, rng, 2_000)
  # The last one's lexer is not the next one's.
  assert compiler.regex(text).mask().sum() == 2


def test_a_compiler_needs_ends_that_the_model_has():
  for ends in ((), (WIDE,), (-1,)):
    with pytest.raises(ValueError, match='ids that end answers'):
      Compiler(ByteTokenizer(), WIDE, ends)


def test_a_vocabulary_of_another_kind_is_refused():
  with pytest.raises(ValueError, match='expected a vocabulary of bytes'):
    Compiler(object(), WIDE, (1,))


def test_without_the_package_a_sentence_says_what_to_install(monkeypatch):
  # None there is what makes an import fail.
  monkeypatch.setitem(sys.modules, 'llguidance', None)
  with pytest.raises(ValueError, match='pip install'):
    Compiler(ByteTokenizer(), WIDE, (1,))

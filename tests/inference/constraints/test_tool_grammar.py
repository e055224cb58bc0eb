# SPDX-License-Identifier: Apache-2.0
"""Calls of tools are kept to their schema, always or once they begin."""

import json

import numpy as np
import pytest

from moepeft.inference.constraints.grammar import Compiler
from moepeft.inference.tools.parser import (
  ArgumentsDelta,
  CallStart,
  ContentDelta,
  ToolCallParser,
)
from moepeft.inference.tools.tools import CALL_FORMATS, ToolChoice, ToolSpec

from . import json_cases, small_words

pytest.importorskip('llguidance')

TOOLS = (
  ToolSpec(
    'add',
    parameters={
      '$defs': {'n': {'type': 'integer', 'minimum': 0, 'maximum': 99}},
      'type': 'object',
      'properties': {'a': {'$ref': '#/$defs/n'}, 'b': {'$ref': '#/$defs/n'}},
      'required': ['a', 'b'],
      'additionalProperties': False,
    },
    strict=True,
  ),
  ToolSpec(
    'add_more',
    parameters={
      'type': 'object',
      'properties': {'to': {'enum': ['x', '</tool_call>', '"é"']}},
      'required': ['to'],
    },
  ),
  ToolSpec('now'),
)
NAMES = tuple(tool.name for tool in TOOLS)
REQUIRED, AUTO = ToolChoice('required', NAMES), ToolChoice('auto', NAMES)


@pytest.fixture(scope='module')
def words(tmp_path_factory):
  return small_words.saved(tmp_path_factory.mktemp('words'), 'bytes')


@pytest.fixture(scope='module')
def compiler(words):
  return Compiler(words, size(words), (words.eos,))


def size(words):
  # The model's vocabulary is wider than the tokenizer's.
  return len(words.tokenizer) + 3


def takes(compiler, words, constraint, text):
  """Whether a constraint lets a text through, token by token, and then
  whether it may end."""
  for token in words.encode(text):
    if not constraint.mask()[token]:
      # Where one token is forced it may be another of the same text.
      return False
    if constraint.accept(token):
      return True
  return bool(constraint.mask()[words.eos])


def right(event):
  """Whether the arguments fit, said by hand."""
  actual = json.loads(event[1])
  if event[0] == 'add':
    fits = all(type(x) is int and 0 <= x <= 99 for x in actual.values())
    return set(actual) == {'a', 'b'} and fits
  if event[0] == 'add_more':
    return list(actual) == ['to'] and actual['to'] in (
      'x',
      '</tool_call>',
      '"é"',
    )
  return actual == {}


def read(style, text, sure):
  parser = ToolCallParser(CALL_FORMATS[style], NAMES, sure)
  events = [*parser.feed(text), *parser.finish()]
  names = [event.name for event in events if isinstance(event, CallStart)]
  texts = [event.text for event in events if isinstance(event, ArgumentsDelta)]
  said = [event.text for event in events if isinstance(event, ContentDelta)]
  return list(zip(names, texts, strict=True)), ''.join(said)


@pytest.mark.parametrize('parallel', (False, True))
@pytest.mark.parametrize('style', CALL_FORMATS)
def test_a_required_call_is_all_that_random_logits_say(
  compiler, words, style, parallel
):
  rng, ended, most = np.random.default_rng(17), 0, 0
  for kind in json_cases.KINDS:
    texts = small_words.texts(words, size(words))
    favour = json_cases.bias(kind, texts, (words.eos,))
    constraint = compiler.tools(TOOLS, REQUIRED, parallel, CALL_FORMATS[style])
    ids, end = json_cases.stream(constraint, (words.eos,), favour, rng, 300)
    if not end:
      # Only calls after calls have no end.
      assert parallel
      continue
    ended += 1
    for sure in (False, True):
      calls, said = read(style, words.decode(ids), sure)
      assert said == ''
      assert calls and all(map(right, calls))
    most = max(most, len(calls))
  assert ended >= 3
  assert parallel or most == 1


def test_a_named_tool_is_the_only_one(compiler, words):
  rng = np.random.default_rng(19)
  for _ in range(5):
    constraint = compiler.tools(
      TOOLS,
      ToolChoice('required', ('add_more',)),
      False,
      CALL_FORMATS['hermes'],
    )
    ids, end = json_cases.stream(constraint, (words.eos,), 0, rng, 300)
    ((name, _),), _ = read('hermes', words.decode(ids), True)
    assert end
    assert name == 'add_more'


CALL = '{"name": "add", "arguments": {"a": 1, "b": 23}}'


@pytest.mark.parametrize(
  'style, text, fits',
  (
    ('hermes', 'no call: {"name": 7} < <tool', True),
    ('hermes', f'<tool_call>\n{CALL}\n</tool_call>', True),
    ('hermes', f'<tool_call>{CALL}</tool_call> so\n<tool_call>', False),
    ('hermes', f'so <tool_call>{CALL}</tool_call>\n and', True),
    ('hermes', f'<tool_call>{CALL}</tool_call>\n<tool_call>\n{CALL}', False),
    ('hermes', 'so <tool_call>\n\n\n', False),
    ('hermes', 'so <tool_call>{"name": "sub"', False),
    ('hermes', f'<tool_call>{CALL.replace("23", "230")}', False),
    ('hermes', f'<tool_call>{CALL.replace(": 1", ": 1 ")}', False),
    ('json', 'none is called: {"name": 7}', True),
    ('json', f'{CALL}', True),
    ('json', f'{CALL} so', False),
    ('json', '{"name": "sub"', False),
    ('json', ' \n {"name": "add"', False),
    ('llama', CALL.replace('arguments', 'parameters'), True),
    ('llama', CALL, False),
  ),
)
def test_a_call_that_begins_is_kept_to_its_form(
  compiler, words, style, text, fits
):
  constraint = compiler.tools(TOOLS, AUTO, True, CALL_FORMATS[style])
  assert takes(compiler, words, constraint, text) == fits


def test_one_call_at_most_where_they_are_not_parallel(compiler, words):
  text = f'so <tool_call>{CALL}</tool_call>'
  constraint = compiler.tools(TOOLS, AUTO, False, CALL_FORMATS['hermes'])
  done = [
    constraint.mask()[token] and constraint.accept(token)
    for token in words.encode(text)
  ]
  assert done == [False] * (len(done) - 1) + [True]


def test_random_text_with_calls_is_read_back(compiler, words):
  texts = small_words.texts(words, size(words))
  marker = words.encode('<tool_call>')
  rng, count = np.random.default_rng(23), 0
  for _ in range(11):
    constraint = compiler.tools(TOOLS, AUTO, True, CALL_FORMATS['hermes'])
    for token in [*words.encode('Well '), *marker]:
      assert constraint.mask()[token]
      constraint.accept(token)
    favour = json_cases.bias('quotes', texts, (words.eos,))
    # Above 3 standard deviations of 3 that the best of 600 has.
    favour[words.eos] = 19
    rest, end = json_cases.stream(constraint, (words.eos,), favour, rng, 300)
    if end:
      calls, said = read('hermes', words.decode([*marker, *rest]), True)
      assert calls and all(map(right, calls))
      assert '<tool_call>' not in said
      count += 1
  assert count >= 3


def test_what_strict_tools_ask_is_kept_or_refused(compiler):
  odd = {
    'type': 'object',
    'properties': {'a': {'type': 'array', 'uniqueItems': True}},
  }
  style = CALL_FORMATS['hermes']
  strict, loose = (
    ToolSpec('odd', parameters=odd, strict=x) for x in (True, False)
  )
  compiler.tools((loose,), ToolChoice('auto', ('odd',)), True, style)
  with pytest.raises(ValueError, match='uniqueItems'):
    compiler.tools((strict,), ToolChoice('auto', ('odd',)), True, style)


def test_there_is_nothing_to_constrain_without_tools(compiler):
  for choice in (ToolChoice('none', NAMES), ToolChoice('auto', ())):
    with pytest.raises(ValueError, match='no tool may be called'):
      compiler.tools(TOOLS, choice, True, CALL_FORMATS['hermes'])

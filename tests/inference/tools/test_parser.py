# SPDX-License-Identifier: Apache-2.0
"""The text of an answer becomes content and calls, however it is cut."""

import dataclasses
import itertools
import json
import random

import pytest

from moepeft.inference.tools import json_parser
from moepeft.inference.tools.parser import (
  ArgumentsDelta,
  CallStart,
  ContentDelta,
  ToolCallParser,
  random_id,
)
from moepeft.inference.tools.tools import CALL_FORMATS

NAMES = ('look', 'add')
LOOK = '{"name": "look", "arguments": {"at": "<\\"}é"}}'
ARGUMENTS = '{"at": "<\\"}é"}'
TEXTS = {
  'hermes': (
    'Hi there. \n<tool_call>\n' + LOOK + '\n</tool_call>\n',
    f'<tool_call>{LOOK}</tool_call>\n<tool_call>{LOOK}</tool_call> bye ',
    '<tool_call>[{"name":"a"},{"name":"b","arguments":null}]</tool_call>',
    '<tool_call>{"arguments": {"x": [1, -2.5e3]}, "name": "f"}</tool_call>',
    'a <tool_call>{bad}</tool_call> b <tool_',
    f'<tool_call>\n<tool_call>{LOOK}</tool_call>',
    'a < b and <tool <tool_call <<tool_call>x \n',
    '<tool_call>{"name": "f", "arguments": {"a',
    '<tool_call>{"name": "f", "arguments": {"a": 1}} and more',
    '<tool_call>{"name": "f", "arguments": {"a": tru}}</tool_call>',
    '   \n ',
  ),
  'llama': (
    '{"name": "look", "parameters": {"a": 1.5}}; {"name": "add"}',
    'see {"x": 1} and {"name": "none", "parameters": {}}.',
    'I say [1]: {"name": "add", "parameters": {"x": [[]]}} \n so',
  ),
  'json': (
    '[{"name":"add","arguments":{}}, {"name":"look","arguments":{"a":"]"}}] k',
    f'{LOOK}\n{LOOK}',
    'def f() { return [1, {"name": "add"}] } ',
    '{"answer": {"name": "add", "arguments": {}}}',
  ),
}
CASES = [(style, text) for style, texts in TEXTS.items() for text in texts]


def parsed(style, pieces, constrained=False):
  """(events, joined where they go on with each other; the calls' count)."""
  ids = (f'call_{n}' for n in itertools.count())
  parser = ToolCallParser(
    CALL_FORMATS[style], NAMES, constrained, lambda: next(ids)
  )
  actual = [event for piece in pieces for event in parser.feed(piece)]
  events = []
  for event in [*actual, *parser.finish()]:
    last = events[-1] if events else None
    if isinstance(event, ContentDelta | ArgumentsDelta) and type(last) is type(
      event
    ):
      events[-1] = dataclasses.replace(event, text=last.text + event.text)
    else:
      events.append(event)
  return events, parser.num_calls


def whole(style, text, constrained=False):
  return parsed(style, [text], constrained)[0]


def calls(*found):
  pairs = enumerate(found)
  return [
    event
    for i, (name, text) in pairs
    for event in (CallStart(i, f'call_{i}', name), ArgumentsDelta(i, text))
  ]


@pytest.mark.parametrize('constrained', (False, True))
@pytest.mark.parametrize('style, text', CASES)
def test_every_way_to_cut_a_text_gives_the_same(style, text, constrained):
  expected = parsed(style, [text], constrained)
  assert parsed(style, list(text), constrained) == expected
  dice = random.Random(7)
  for _ in range(43):
    cuts = sorted(dice.choices(range(len(text) + 1), k=dice.randint(1, 7)))
    pairs = itertools.pairwise([0, *cuts, len(text)])
    assert parsed(style, [text[a:b] for a, b in pairs], constrained) == expected


@pytest.mark.parametrize('style, text', CASES)
def test_arguments_are_json_and_content_is_of_the_text(style, text):
  for event in whole(style, text):
    if isinstance(event, ArgumentsDelta):
      assert isinstance(json.loads(event.text), dict)
    if isinstance(event, ContentDelta):
      assert event.text in text


def test_text_stands_around_calls_without_the_blanks_between():
  text = f'Hi \n<tool_call>\n{LOOK}\n</tool_call>\n\n bye '
  look = calls(('look', ARGUMENTS))
  assert whole('hermes', text) == [
    ContentDelta('Hi'),
    *look,
    ContentDelta('bye '),
  ]


def test_several_calls_are_counted():
  text = '\n'.join(f'<tool_call>{LOOK}</tool_call>' for _ in range(3))
  events, count = parsed('hermes', [text])
  assert events == calls(*[('look', ARGUMENTS)] * 3)
  assert count == 3


def test_an_end_marker_inside_of_arguments_is_text():
  text = '<tool_call>{"name": "f", "arguments": {"x": "</tool_call>"}}'
  assert whole('hermes', f'{text}</tool_call>') == calls(
    ('f', '{"x": "</tool_call>"}')
  )


def test_arguments_in_a_text_and_none_at_all_are_objects():
  text = '{"name": "add", "arguments": "{\\"a\\": 1}"} {"name": "look"}'
  assert whole('json', text) == calls(('add', '{"a": 1}'), ('look', '{}'))


@pytest.mark.parametrize(
  'body',
  (
    'call me',
    '{bad}',
    '{"name": "f", "arguments": {"a": 01}}',
    '{"name": "f", "arguments": {"a": tru}}',
    '{"name": "f", "arguments": [1]}',
    '{"name": "f", "arguments": "[1]"}',
    '{"name": "f", "arguments": {}, "arguments": {}}',
    '{"name": 7, "arguments": {}}',
    '{"arguments": {}}',
    '{"name": "", "arguments": {}}',
    '{"name": "f", "other": {}}',
    '{"name": "f", "arguments": {"a": 1,}}',
    '{"name": "f", "arguments": {"a": "\n"}}',
    '{"name": "f", "arguments": {"a": "\\x"}}',
    '["f"]',
    '[]',
    '"f"',
    '7',
    '{"name": "f", "arguments": ' + '{"a":' * 99 + '1' + '}' * 100,
  ),
)
def test_what_is_no_call_is_content_letter_by_letter(body):
  text = f'so: <tool_call>{body}</tool_call> ok'
  assert whole('hermes', text) == [ContentDelta(text)]


def test_an_answer_cut_inside_of_a_call_is_content():
  text = 'so: <tool_call>{"name": "f", "arguments": {"a'
  assert whole('hermes', text) == [ContentDelta(text)]


@pytest.mark.parametrize('cut', ('<tool_', '<tool_call>\n{"name": "lo'))
def test_of_forced_calls_half_a_one_is_not_shown(cut):
  look = f'<tool_call>{LOOK}</tool_call>\n'
  for text in (cut, look + cut):
    parser = ToolCallParser(
      CALL_FORMATS['hermes'], NAMES, True, calls_only=True
    )
    events = [*parser.feed(text), *parser.finish()]
    assert not any(isinstance(event, ContentDelta) for event in events)
    assert parser.num_calls == (text != cut)


def test_of_a_sure_call_a_name_that_was_cut_off_is_not_shown():
  parser = ToolCallParser(CALL_FORMATS['hermes'], NAMES, True)
  said = parser.feed('Let me see. <tool_call>{"name": "lo')
  assert [*said, *parser.finish()] == [ContentDelta('Let me see.')]


def test_where_calls_are_sure_arguments_come_as_they_are_written():
  parser = ToolCallParser(
    CALL_FORMATS['hermes'], constrained=True, make_id=lambda: 'i'
  )
  assert parser.feed('<tool_call>{"name": "f", "argu') == [
    CallStart(0, 'i', 'f')
  ]
  assert parser.feed('ments": {"a": ') == [ArgumentsDelta(0, '{"a": ')]
  assert parser.feed('12') == [ArgumentsDelta(0, '12')]
  # Cut here, what came stays a call, as its length is why it ended.
  assert parser.finish() == []
  assert parser.num_calls == 1


def test_a_sure_call_that_is_cut_before_its_name_is_no_content():
  for cut in ('<tool_call>', '<tool_call>\n{"name":'):
    parser = ToolCallParser(CALL_FORMATS['hermes'], constrained=True)
    assert parser.feed(cut) == parser.finish() == []
    assert parser.num_calls == 0


def test_where_they_are_not_a_call_comes_when_it_is_whole():
  parser = ToolCallParser(CALL_FORMATS['hermes'], make_id=lambda: 'i')
  assert parser.feed('<tool_call>{"name": "f", "arguments": {"a": 1}') == []
  assert parser.feed('}') == [
    CallStart(0, 'i', 'f'),
    ArgumentsDelta(0, '{"a": 1}'),
  ]


def test_after_content_a_call_without_a_marker_is_not_sure():
  # No constraint keeps it to its form there.
  text = 'so {"name": "add", "arguments": {"a": tru}}'
  assert whole('json', text, constrained=True) == [ContentDelta(text)]


def test_half_a_marker_is_never_shown():
  text = f'a <tool_call>{LOOK}</tool_call>'
  for at in range(len(text)):
    parser = ToolCallParser(CALL_FORMATS['hermes'])
    said = ''.join(
      event.text
      for event in parser.feed(text[:at])
      if isinstance(event, ContentDelta)
    )
    assert said in ('', 'a')


def test_a_name_that_is_no_tool_counts_only_after_a_marker():
  call = '{"name": "unknown", "arguments": {}}'
  assert whole('json', call) == [ContentDelta(call)]
  assert whole('hermes', f'<tool_call>{call}</tool_call>') == calls(
    ('unknown', '{}')
  )


def test_json_that_is_an_answer_is_known_by_its_first_key():
  parser = ToolCallParser(CALL_FORMATS['json'], NAMES)
  assert parser.feed('{"answer": ') == []
  assert parser.feed('7') == [ContentDelta('{"answer": 7')]


def test_reading_takes_time_in_proportion_to_the_text(monkeypatch):
  fed = 0

  class Counted(json_parser.CallsParser):
    def feed(self, letter):
      nonlocal fed
      fed += 1
      super().feed(letter)

  monkeypatch.setattr('moepeft.inference.tools.parser.CallsParser', Counted)
  # Read anew from each brace, this would be 100 times 64 levels of 13 letters.
  text = '{"arguments":' * 100 + 'x'
  assert whole('json', text) == [ContentDelta(text)]
  # A letter that tells is read once more.
  assert len(text) <= fed <= 1.1 * len(text)


def test_ids_are_not_alike():
  assert len({random_id() for _ in range(97)}) == 97

# SPDX-License-Identifier: Apache-2.0
"""Tools are checked, chosen, and put into prompts."""

import json

import pytest

from moepeft.data.chat.dataset import ChatTemplate
from moepeft.data.chat.formats import Conversation
from moepeft.data.chat.messages import Turn
from moepeft.inference.tools import tools as tools_tools
from moepeft.inference.tools.tools import CALL_FORMATS, ToolChoice, ToolSpec
from tests import chat_cases

CITY = {
  'type': 'object',
  'properties': {'city': {'type': 'string'}},
  'required': ['city'],
}
# As Qwen's: tools in the system's turn, calls in tags.
QWEN = (
  '{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}'
  '{% endfor %}<tool_call><|im_end|>\n{% endif %}' + chat_cases.CHATML
)


def function(**changes):
  own = {'name': 'weather', 'description': 'Of a city.', 'parameters': CITY}
  return {'type': 'function', 'function': own | changes}


def nested(levels):
  actual = {'type': 'string'}
  for _ in range(levels):
    actual = {'type': 'array', 'items': actual}
  return {'type': 'object', 'properties': {'a': actual}}


def test_tools_are_read_as_the_api_has_them():
  actual = tools_tools.check_tools(
    [function(), function(name='now', parameters=None, strict=True)]
  )
  assert actual == (
    ToolSpec('weather', 'Of a city.', CITY),
    ToolSpec('now', 'Of a city.', {'type': 'object', 'properties': {}}, True),
  )
  assert actual[0].to_openai() == function()


@pytest.mark.parametrize(
  'tools, reason',
  (
    ([], 'at least one tool'),
    ({}, 'at least one tool'),
    ([function()] * 2, "'weather' twice"),
    ([function(name=f'f{i}') for i in range(129)], '129 tools'),
    ([{'type': 'web_search'}], r'tools\[0\] is not a function'),
    ([7], r'tools\[0\] is not a function'),
    ([function(name='get weather')], 'expected 1 to 64 letters'),
    ([function(name='x' * 65)], 'expected 1 to 64 letters'),
    ([function(name='')], 'expected 1 to 64 letters'),
    ([function(name='a\n')], 'expected 1 to 64 letters'),
    ([function(description=7)], 'not a text'),
    ([function(strict='yes')], 'true or false'),
    ([function(parameters=[])], 'no object'),
    ([function(parameters={'type': 'string'})], 'no object'),
    ([function(parameters=nested(70))], 'deeper than 64'),
    ([function(parameters=CITY | {'x-guidance': {}})], 'x-guidance'),
    (
      [
        function(name=f'f{i}', parameters=CITY | {'title': 'x' * 9_000})
        for i in range(12)
      ],
      'make them smaller',
    ),
  ),
)
def test_wrong_tools_are_one_sentence(tools, reason):
  with pytest.raises(ValueError, match=reason) as e:
    tools_tools.check_tools(tools)
  assert '\n' not in str(e.value)


def test_a_choice_names_what_may_be_called():
  tools = (ToolSpec('a'), ToolSpec('b'))
  named = {'type': 'function', 'function': {'name': 'b'}}
  some = {
    'type': 'allowed_tools',
    'allowed_tools': {'mode': 'required', 'tools': [named]},
  }
  for actual, expected in (
    (None, ToolChoice('auto', ('a', 'b'))),
    ('none', ToolChoice('none', ('a', 'b'))),
    ('required', ToolChoice('required', ('a', 'b'))),
    (named, ToolChoice('required', ('b',), once=True)),
    (some, ToolChoice('required', ('b',))),
  ):
    assert tools_tools.read_tool_choice(actual, tools) == expected
  assert tools_tools.read_tool_choice(None, ()) == ToolChoice('none', ())


@pytest.mark.parametrize(
  'found',
  (
    'any',
    7,
    [],
    {'type': 'function', 'function': {'name': 'c'}},
    {'type': 'function'},
    {'type': 'allowed_tools', 'allowed_tools': {'mode': 'auto', 'tools': []}},
    {'type': 'allowed_tools', 'allowed_tools': 7},
  ),
)
def test_a_wrong_choice_is_refused(found):
  with pytest.raises(ValueError, match="'tool_choice'"):
    tools_tools.read_tool_choice(found, (ToolSpec('a'),))


def test_a_call_cannot_be_required_without_tools():
  with pytest.raises(ValueError, match='there are no'):
    tools_tools.read_tool_choice('required', ())


def test_the_style_is_found_in_the_template():
  llama = '{% if tools %}Respond with {"name": , "parameters": }{% endif %}'
  for template, expected in (
    ('', 'hermes'),
    (chat_cases.CHATML, 'hermes'),
    (QWEN, 'hermes'),
    (llama, 'llama'),
    ('{{ tools | tojson }}', 'json'),
  ):
    assert tools_tools.find_call_format(template).name == expected
  with pytest.raises(ValueError, match='not supported'):
    tools_tools.find_call_format('{{ tools }}<tool_call><function=name>')


def prompt(template, choice, style):
  """The text of a prompt with two tools."""
  asked = Conversation((Turn('system', 'Be brief.'), Turn('user', 'Rain?')))
  tokenizer = chat_cases.tokenizer(template)
  tools = (ToolSpec('weather', 'Of a city.', CITY), ToolSpec('now'))
  actual = tools_tools.with_tools(
    asked, tools, choice, CALL_FORMATS[style], template
  )
  return tokenizer.decode(ChatTemplate(tokenizer).encode_prompt(actual))


BOTH = ToolChoice('auto', ('weather', 'now'))


def test_a_template_writes_the_tools_itself():
  text = prompt(QWEN, BOTH, 'hermes')
  first, second = (f'"name": "{name}"' for name in ('weather', 'now'))
  assert text.index(first) < text.index(second) < text.index('Be brief.')


def test_tools_are_told_as_in_training_where_the_template_has_no_words():
  text = prompt(chat_cases.CHATML, BOTH, 'hermes')
  assert text.startswith('<|im_start|>system\nBe brief.\n\nYou may call')
  assert '<tool_call>{"name": ..., "arguments": ...}</tool_call>' in text
  assert json.dumps(CITY) in text


def test_another_style_is_told_in_its_own_form():
  text = prompt(chat_cases.CHATML, BOTH, 'llama')
  assert '{"name": ..., "parameters": ...}' in text
  assert '<tool_call>' not in text
  assert text.startswith('<|im_start|>system\nBe brief.\n\nYou may call')


@pytest.mark.parametrize('template', (QWEN, chat_cases.CHATML))
@pytest.mark.parametrize('style', CALL_FORMATS)
def test_no_tool_is_in_the_prompt_where_none_may_be_called(template, style):
  text = prompt(template, ToolChoice('none', ('weather', 'now')), style)
  assert 'weather' not in text
  assert 'weather' in prompt(template, BOTH, style)


def test_only_the_tools_that_may_be_called_are_told():
  text = prompt(QWEN, ToolChoice('required', ('now',)), 'hermes')
  assert '"now"' in text
  assert 'weather' not in text

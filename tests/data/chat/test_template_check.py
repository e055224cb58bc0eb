# SPDX-License-Identifier: Apache-2.0
"""Fields that a chat template leaves out are reported once, or refused."""

import json

import pytest

from moepeft import config as config_lib
from moepeft.data.chat import dataset as chat_dataset
from moepeft.data.chat import template_check
from moepeft.data.example import BadRow
from moepeft.data.tokenizers.tokenizer import HuggingFaceTokenizer

from ... import chat_cases

ENDLESS = (
  "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n\n"
  '{% endfor %}{% if add_generation_prompt %}### assistant:\n{% endif %}'
)
HEEDLESS = (
  "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
  "{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
# As Llama-2's: nothing comes before an answer, and tools have no words.
TWO = (
  "{% for m in messages %}{% if m['role'] == 'user' %}"
  '[INST] {{ m["content"] }} [/INST]'
  "{% elif m['role'] == 'assistant' %}"
  " {{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
NAMES = ('CHATML', 'MARKED', 'REWRITING', 'FORGETTING')


@pytest.mark.parametrize('name', NAMES)
def test_of_whole_templates_nothing_is_told(name):
  tokenizer = chat_cases.tokenizer(getattr(chat_cases, name))
  assert template_check.template_warnings(tokenizer, '') == ()
  written = {"a system's turn", "a tool's turn", 'a call beside an answer'}
  assert not written & template_check.dropped_features(tokenizer, '')
  assert template_check.template_warnings(tokenizer, TWO) == ()


def test_a_template_without_an_end_or_a_beginning_is_told():
  tokenizer = chat_cases.tokenizer()
  (line,) = template_check.template_warnings(tokenizer, ENDLESS)
  assert 'does not learn to stop' in line
  (line,) = template_check.template_warnings(tokenizer, HEEDLESS)
  assert "'<|im_start|>assistant\\n', is trained" in line
  # Outside of what is marked as generated, an end is not trained.
  late = chat_cases.MARKED.replace(
    '<|im_end|>{% endgeneration %}', '{% endgeneration %}<|im_end|>'
  )
  (line,) = template_check.template_warnings(tokenizer, late)
  assert 'does not learn to stop' in line


def test_what_a_template_leaves_out_is_told_once(tmp_path):
  chat_cases.tokenizer(ENDLESS).save_pretrained(tmp_path / 'words')
  rows = [{'instruction': f'{i}?', 'output': 'so'} for i in range(3)]
  (tmp_path / 'r.json').write_text(json.dumps(rows))
  data = config_lib.default().data
  data.path = str(tmp_path / 'r.json')
  _, notes = chat_dataset.read_chats(
    data, HuggingFaceTokenizer(str(tmp_path / 'words'))
  )
  assert sum('learn to stop' in note for note in notes) == 1
  (tmp_path / 'r.json').write_text('')
  with pytest.raises(ValueError, match='r.json is empty; expected convers'):
    chat_dataset.read_chats(data, HuggingFaceTokenizer(str(tmp_path / 'words')))


def test_rows_of_tools_are_refused_where_a_template_leaves_them_out():
  turns = [
    chat_dataset.Turn('user', 'a'),
    chat_dataset.Turn('assistant', '', [{'name': 'f', 'arguments': {}}]),
    chat_dataset.Turn('tool', '2'),
    chat_dataset.Turn('assistant', 'b'),
  ]
  talk = chat_dataset.Conversation(tuple(turns))
  used = chat_dataset.ChatTemplate(chat_cases.tokenizer(), TWO)
  with pytest.raises(
    BadRow, match="a tool's turn, and the chat template leaves"
  ):
    used.encode(talk)
  used.encode(chat_dataset.Conversation((turns[0], turns[3])))
  chat_dataset.ChatTemplate(chat_cases.tokenizer()).encode(talk)

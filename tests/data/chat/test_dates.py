# SPDX-License-Identifier: Apache-2.0
"""A run that goes on writes the date that it began with."""

import dataclasses
import datetime
import json

import pytest

from moepeft import config as config_lib
from moepeft import train
from moepeft.data.chat import dataset as chat_dataset
from moepeft.data.chat import template as chat_template
from moepeft.data.example import BadRow
from moepeft.data.tokenizers.tokenizer import HuggingFaceTokenizer
from moepeft.inference import loaded_model, prompts
from moepeft.runs.resume import with_start_date
from moepeft.runs.run import Run

from ... import chat_cases
from ...training.test_sft import base, card, rows  # noqa: F401

# As Llama 3's, whose system turn has the day's date.
LLAMA = (
  '{% if strftime_now is defined %}'
  "{% set day = strftime_now('%d %b %Y') %}{% else %}"
  "{% set day = '26 Jul 2024' %}{% endif %}"
  '<|im_start|>system\nToday: {{ day }}<|im_end|>\n'
) + chat_cases.CHATML
TALK = chat_dataset.Conversation(
  (chat_dataset.Turn('user', 'a'), chat_dataset.Turn('assistant', 'b'))
)


def text(template, date):
  used = chat_dataset.ChatTemplate(chat_cases.tokenizer(template), date=date)
  return used.render(TALK).text


def test_a_template_writes_the_date_that_is_kept():
  assert 'Today: 03 Feb 2021<' in text(LLAMA, '2021-02-03')
  today = datetime.date.today()
  # The test may run over midnight.
  days = (today, today + datetime.timedelta(1))
  assert any(f'{day:%d %b %Y}' in text(LLAMA, '') for day in days)
  # A template of no clock is left as it is.
  assert text(chat_cases.CHATML, '2021-02-03') == text(chat_cases.CHATML, '')


@pytest.mark.parametrize(
  ('template', 'written'),
  [
    ('{{ strftime_now("%Y-%m-%d") }}', '{{ ("2021-02-03") }}'),
    ("{{ strftime_now( '%A %H:%M' ) }}", '{{ ("Wednesday 00:00") }}'),
    ("{{ strftime_now(format='%Y') | int + 1 }}", '{{ ("2021") | int + 1 }}'),
    ('{{ strftime_now("%Y年") }}', '{{ ("2021年") }}'),
    ('{% if strftime_now is defined %}{% endif %}', None),
    ('{{ "a" }}', None),
  ],
)
def test_a_date_is_put_where_it_is_asked_for(template, written):
  actual = chat_template.fix_date(template, '2021-02-03')
  assert actual == (written or template)
  assert chat_template.reads_clock(template) == (written is not None)


def test_a_clock_that_cannot_be_set_is_refused():
  for template in (
    '{% set form = "%Y" %}{{ strftime_now(form) }}',
    '{% set now = strftime_now %}{{ now("%Y") }}',
  ):
    with pytest.raises(ValueError, match='its date cannot be kept for a run'):
      chat_template.fix_date(template, '2021-02-03')
  with pytest.raises(ValueError, match="a date like '2024-07-26', .*got 'now'"):
    chat_template.fix_date(LLAMA, 'now')


@pytest.mark.parametrize(
  'word',
  [
    '{{ ["a", "b"] | random }}',
    '{% filter random %}ab{% endfilter %}',
    '{{ ["ab", "cd"] | map("random") | join }}',
    '{{ lipsum() }}',
    '{% set words = lipsum %}{{ words(n=1) }}',
  ],
)
def test_a_template_that_draws_at_random_is_refused(word):
  tokenizer = chat_cases.tokenizer(chat_cases.CHATML + word)
  with pytest.raises(
    ValueError, match='template draws at random .* name anoth'
  ):
    chat_dataset.ChatTemplate(tokenizer)


@dataclasses.dataclass
class Clock:
  """Stands in for the module datetime, on a day."""

  today: datetime.date
  datetime = datetime.datetime

  @property
  def date(self):
    clock = self

    class Date(datetime.date):
      @classmethod
      def today(cls):
        return clock.today

    return Date


@pytest.mark.slow
def test_a_run_that_goes_on_another_day_trains_on_the_same_text(
  base,  # noqa: F811
  rows,  # noqa: F811
  tmp_path,
  monkeypatch,
):
  file = tmp_path / 'llama.jinja'
  file.write_text(LLAMA)
  config = card(base, rows, **{'data.chat_template': str(file), 'steps': 2})
  config.evaluation.after = False
  written, workdir = [], str(tmp_path / 'w')

  def spy(self, found):
    written.append(chat := render(self, found))
    return chat

  render = chat_dataset.ChatTemplate.render
  monkeypatch.setattr(chat_dataset.ChatTemplate, 'render', spy)
  for day in (3, 4):
    monkeypatch.setattr(
      chat_template, 'datetime', Clock(datetime.date(2021, 2, day))
    )
    written.clear()
    config.steps = 2 * (day - 2)
    train.train(config, workdir)
    assert {'Today: 03 Feb 2021' in one.text for one in written} == {True}
    with open(f'{workdir}/config.json') as f:
      assert json.load(f)['data']['date'] == '2021-02-03'
  # The caller's config is as it was.
  assert config.data.date == ''
  config.data.date = '2021-02-04'
  with pytest.raises(ValueError, match="config.data.date='2021-02-03', now"):
    train.train(config, workdir)
  # What is asked of the run is dated on the day that it is asked.
  remaining = loaded_model.load_run(workdir).config.data
  used = prompts.load_chat_template(HuggingFaceTokenizer(base), remaining)
  assert remaining.date == '2021-02-03' and used.date == ''


def test_a_date_is_chosen_once_and_read_back(tmp_path):
  words = tmp_path / 'words'
  chat_cases.tokenizer(LLAMA).save_pretrained(words)
  config = config_lib.default()
  config.data.source = 'chat'
  actual = chat_template.with_date(config, HuggingFaceTokenizer(str(words)))
  assert datetime.date.fromisoformat(actual.data.date) and not config.data.date
  actual.data.date = '2021-02-03'
  assert with_start_date(Run(str(tmp_path)), config) is config
  (tmp_path / 'checkpoints' / '4').mkdir(parents=True)
  (tmp_path / 'config.json').write_text(actual.to_json())
  assert with_start_date(Run(str(tmp_path)), config).data.date == '2021-02-03'
  config.data.date = '2021-02-04'
  assert with_start_date(Run(str(tmp_path)), config) is config


def test_a_run_without_a_clock_has_no_date(tmp_path):
  chat_cases.tokenizer().save_pretrained(tmp_path)
  config = config_lib.default()
  config.data.source = 'chat'
  assert (
    chat_template.with_date(config, HuggingFaceTokenizer(str(tmp_path)))
    is config
  )


# ------------------------------------------------- what a template leaves out
def rendered(template, *turns):
  used = chat_dataset.ChatTemplate(chat_cases.tokenizer(template))
  return used.render(chat_dataset.Conversation(turns)).text


ASKED, SAID = (
  chat_dataset.Turn('user', 'a'),
  chat_dataset.Turn('assistant', 'b'),
)
CALL = {'name': 'f', 'arguments': {'x': 1}}
# Writes an answer or its calls, as Llama 3's.
EITHER = chat_cases.CHATML.replace(
  "{{ m['content'] }}",
  "{{ m['tool_calls'] | tojson if m['tool_calls'] else m['content'] }}",
)
NAMING = chat_cases.CHATML.replace(
  "{{ m['role'] }}", "{{ m['role'] }}{{ ' ' + m['name'] if m['name'] }}"
)


def test_what_a_template_leaves_out_is_refused():
  deaf = chat_cases.CHATML.replace(
    '{% for m in messages %}',
    "{% for m in messages if m['role'] != 'system' %}",
  )
  with pytest.raises(BadRow, match="row has a system's turn, and the chat tem"):
    rendered(deaf, chat_dataset.Turn('system', 's'), ASKED, SAID)
  with pytest.raises(BadRow, match='row has an answer beside a call'):
    rendered(EITHER, ASKED, chat_dataset.Turn('assistant', 'b', [CALL]))
  # Writes what is said in the place of a call, as a template of Mistral's.
  mute = chat_cases.CHATML + '{% if false %}tool_calls{% endif %}'
  with pytest.raises(BadRow, match='row has a call of a tool, and the chat te'):
    rendered(mute, ASKED, chat_dataset.Turn('assistant', '', [CALL]))
  first = chat_cases.CHATML.replace(
    "{{ m['content'] }}",
    "{{ m['tool_calls'][0] | tojson if m['tool_calls'] else m['content'] }}",
  )
  rendered(first, ASKED, chat_dataset.Turn('assistant', '', [CALL]))
  with pytest.raises(BadRow, match='row has several calls at once'):
    rendered(first, ASKED, chat_dataset.Turn('assistant', '', [CALL, CALL]))
  with pytest.raises(BadRow, match='row has tools, and the chat template leav'):
    used = chat_dataset.ChatTemplate(
      chat_cases.tokenizer(chat_cases.CHATML + '{% if tools %}{% endif %}')
    )
    tool = {'type': 'function', 'function': {'name': 'f'}}
    used.render(chat_dataset.Conversation((ASKED, SAID), [tool]))
  named = chat_dataset.Turn('user', 'a', name='Ann')
  with pytest.raises(BadRow, match="row has a user's name"):
    rendered(chat_cases.CHATML, named, SAID)
  assert '<|im_start|>user Ann\n' in rendered(NAMING, named, SAID)


def test_results_in_another_order_than_their_calls_are_refused():
  calls = [{**CALL, 'id': 'c1'}, {**CALL, 'id': 'c2'}]

  def talk(first, second):
    return (
      ASKED,
      chat_dataset.Turn('assistant', '', calls),
      chat_dataset.Turn('tool', '1', call_id=first),
      chat_dataset.Turn('tool', '2', call_id=second),
      SAID,
    )

  rendered(chat_cases.CHATML, *talk('c1', 'c2'))
  with pytest.raises(BadRow, match='row has the id of a call, and the chat'):
    rendered(chat_cases.CHATML, *talk('c2', 'c1'))
  writing = chat_cases.CHATML.replace(
    "{{ m['content'] }}",
    "{{ m['tool_call_id'] }}{% if m['tool_calls'] %}"
    "{{ m['tool_calls'] | tojson }}{% endif %}{{ m['content'] }}",
  )
  assert 'tool\nc21' in rendered(writing, *talk('c2', 'c1'))


def test_a_template_may_speak_of_the_clock_and_of_chance_in_comments():
  for said in ('{# strftime_now #}', '{# a | random\nlipsum() #}'):
    assert text(said + chat_cases.CHATML, '2021-02-03') == text(
      chat_cases.CHATML, ''
    )


@pytest.mark.parametrize(
  'form', ["'%d' ~ '%b'", r"'%H o\'clock'", "'%d', '%b'"]
)
def test_a_format_that_is_more_than_one_text_is_refused(form):
  with pytest.raises(ValueError, match='a format that is no text in quotes'):
    chat_template.fix_date(f'{{{{ strftime_now({form}) }}}}', '2021-02-03')


def test_a_method_that_a_template_does_not_call_is_no_text():
  template = chat_cases.CHATML.replace("['content']", "['content'].strip")
  assert template != chat_cases.CHATML
  with pytest.raises(BadRow, match='method strip of str object at 0x.* where'):
    text(template, '')
  shown = '<object object at 0x7f00deadbeef>'
  talk = chat_dataset.Conversation(
    (chat_dataset.Turn('user', shown), TALK.turns[1])
  )
  used = chat_dataset.ChatTemplate(chat_cases.tokenizer(chat_cases.CHATML))
  assert shown in used.render(talk).text

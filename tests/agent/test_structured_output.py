# SPDX-License-Identifier: Apache-2.0
"""Structured answers: an instance, or a sentence why there is none."""

import pydantic
import pytest

pytest.importorskip('openai')

from moepeft.agent.structured_output import ask_structured  # noqa: E402
from tests.agent.scripted import serving, text_reply  # noqa: E402


class City(pydantic.BaseModel):
  name: str
  people: int = pydantic.Field(ge=1)
  river: str = 'none'


QUESTION = [{'role': 'user', 'content': 'Which city?'}]


def test_an_answer_that_fits_is_an_instance():
  text = '{"name": "Ulm", "people": 131, "river": "none"}'
  with serving(text_reply(text)) as script:
    city = ask_structured(script.model(), City, QUESTION, options={'seed': 1})
  assert city == City(name='Ulm', people=131, river='none')
  (request,) = script.requests
  form = request['response_format']
  assert form['type'] == 'json_schema' and form['json_schema']['strict'] is True
  schema = form['json_schema']['schema']
  assert schema['required'] == ['name', 'people', 'river']
  assert request['seed'] == 1


def test_an_answer_that_does_not_fit_is_asked_for_again_with_the_error():
  replies = [
    text_reply('Ulm!'),
    text_reply('{"name": "Ulm", "people": 0}'),
    text_reply('{"name": "Ulm", "people": 5}'),
  ]
  with serving(*replies) as script:
    assert ask_structured(script.model(), City, QUESTION).people == 5
  messages = script.requests[2]['messages']
  assert [m['role'] for m in messages] == ['user', *['assistant', 'user'] * 2]
  assert 'Invalid JSON' in messages[2]['content']
  assert 'people: Input should be greater than' in messages[4]['content']


def test_it_gives_up_after_so_many_times():
  with serving(text_reply('Ulm!')) as script:
    with pytest.raises(ValueError, match='no answer in 3 fits City'):
      ask_structured(script.model(), City, QUESTION, retries=2)
  assert len(script.requests) == 3

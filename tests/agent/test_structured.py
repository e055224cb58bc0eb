# SPDX-License-Identifier: Apache-2.0
"""Structured answers: an instance, or a sentence why there is none."""

import pydantic
import pytest

pytest.importorskip('openai')

from moepeft.agent.structured_output import ask_structured  # noqa: E402
from tests.agent.scripted import says, serving  # noqa: E402


class City(pydantic.BaseModel):
  name: str
  people: int = pydantic.Field(ge=1)
  river: str = 'none'


ASKED = [{'role': 'user', 'content': 'Which city?'}]


def test_an_answer_that_fits_is_an_instance():
  text = '{"name": "Ulm", "people": 131, "river": "none"}'
  with serving(says(text)) as script:
    city = ask_structured(script.model(), City, ASKED, options={'seed': 1})
  assert city == City(name='Ulm', people=131, river='none')
  (request,) = script.requests
  form = request['response_format']
  assert form['type'] == 'json_schema' and form['json_schema']['strict'] is True
  schema = form['json_schema']['schema']
  assert schema['required'] == ['name', 'people', 'river']
  assert request['seed'] == 1


def test_an_answer_that_does_not_fit_is_asked_for_again_with_the_error():
  replies = [
    says('Ulm!'),
    says('{"name": "Ulm", "people": 0}'),
    says('{"name": "Ulm", "people": 5}'),
  ]
  with serving(*replies) as script:
    assert ask_structured(script.model(), City, ASKED).people == 5
  said = script.requests[2]['messages']
  assert [m['role'] for m in said] == ['user', *['assistant', 'user'] * 2]
  assert 'Invalid JSON' in said[2]['content']
  assert 'people: Input should be greater than' in said[4]['content']


def test_it_gives_up_after_so_many_times():
  with serving(says('Ulm!')) as script:
    with pytest.raises(ValueError, match='no answer in 3 fits City'):
      ask_structured(script.model(), City, ASKED, retries=2)
  assert len(script.requests) == 3

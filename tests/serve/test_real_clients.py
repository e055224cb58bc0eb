# SPDX-License-Identifier: Apache-2.0
"""The `openai` package, unchanged, against a server with SmolLM2."""

import asyncio
import base64
import itertools
import json
import math
import struct
import time

import numpy as np
import pytest

from tests.serve.real_server import BASE, EMBEDDER, METHODS, PLACES, Trainer

openai = pytest.importorskip('openai', reason='needs openai')
pydantic = pytest.importorskip('pydantic')

pytestmark = pytest.mark.slow
SECONDS = 240
QUESTION = [{'role': 'user', 'content': 'What is the capital of France?'}]
# Bytes of these are tokens of their own: no character is one token.
EMOJI = '🎈🦊 你好世界 naïve 🇫🇷 '
WEATHER = {
  'type': 'function',
  'function': {
    'name': 'get_weather',
    'description': 'Get the weather at a location.',
    'parameters': {
      'type': 'object',
      'properties': {
        'location': {'type': 'string', 'maxLength': 20},
        'unit': {'enum': ['C', 'F']},
      },
      'required': ['location', 'unit'],
      'additionalProperties': False,
    },
    'strict': True,
  },
}
TIME = {
  'type': 'function',
  'function': {'name': 'get_time', 'parameters': {'type': 'object'}},
}


class Person(pydantic.BaseModel):
  """A person of a story."""

  name: str = pydantic.Field(max_length=20)
  age: int = pydantic.Field(ge=0, le=150)
  likes: list[str] = pydantic.Field(max_length=2)


@pytest.fixture(scope='module')
def client(real):
  with openai.OpenAI(
    base_url=f'{real.url}/v1', api_key='none', max_retries=0, timeout=SECONDS
  ) as values:
    yield values


@pytest.fixture(scope='module')
def trainer(real):
  return Trainer(real)


def chat(client, content='What is the capital of France?', **fields):
  body = {'model': BASE, 'temperature': 0, 'max_tokens': 24, **fields}
  turns = [{'role': 'user', 'content': content}]
  return client.chat.completions.create(messages=turns, **body)


def streamed(client, *args, **fields):
  """({choice: text}, {choice: reason}, usage, the chunks)."""
  texts, reasons, usage, chunks = {}, {}, None, []
  for chunk in chat(client, *args, stream=True, **fields):
    chunks.append(chunk)
    usage = chunk.usage or usage
    for choice in chunk.choices:
      i, answer_text = choice.index, choice.delta.content or ''
      texts[i] = texts.get(i, '') + answer_text
      # A character that is cut would be a mark, or half a pair.
      assert '\ufffd' not in answer_text and answer_text.encode() is not None
      if choice.finish_reason:
        assert i not in reasons
        reasons[i] = choice.finish_reason
  return texts, reasons, usage, chunks


def test_models(client):
  kinds = {model.id: model.type for model in client.models.list()}
  names = {name: 'language' for name in (BASE, *METHODS)}
  assert kinds == {**names, EMBEDDER: 'embedding'}
  assert client.models.retrieve('molora').parent == BASE


def test_chat(client):
  answer = chat(client)
  (choice,) = answer.choices
  assert 'Paris' in choice.message.content
  assert choice.finish_reason in ('stop', 'length')
  assert answer.usage.total_tokens == (
    answer.usage.prompt_tokens + answer.usage.completion_tokens
  )
  # Greedy: asked again, it says the same.
  assert chat(client).choices[0].message == choice.message


def test_a_response_is_a_chat_in_other_words(client):
  whole = chat(client)
  fields = dict(model=BASE, input=QUESTION, temperature=0, max_output_tokens=24)
  response = client.responses.create(**fields)
  assert response.output_text == whole.choices[0].message.content
  assert response.usage.output_tokens == whole.usage.completion_tokens
  with client.responses.stream(**fields) as stream:
    assert stream.get_final_response().output_text == response.output_text


def test_a_bias_forbids_and_a_penalty_stops_repetition(client):
  fields = dict(
    model=BASE,
    prompt=' '.join(['The cat sat.'] * 4),
    temperature=0,
    max_tokens=24,
  )
  plain = client.completions.create(**fields, logprobs=0).choices[0]
  first = plain.logprobs.tokens[0]
  # Of a sentence that is repeated, the model repeats it, four tokens a time.
  assert plain.logprobs.tokens.count(first) > 4
  penalized = client.completions.create(
    **fields, logprobs=0, frequency_penalty=2
  ).choices[0]
  assert penalized.logprobs.tokens.count(first) < 4
  # One way to the id of a token is the server's own.
  ids = client.post(
    str(client.base_url).replace('/v1/', '/tokenize'),
    cast_to=dict[str, object],
    body={'model': BASE, 'prompt': first},
  )['tokens']
  forbidden = client.completions.create(
    **fields, logprobs=0, logit_bias={str(ids[-1]): -100}
  ).choices[0]
  assert first not in forbidden.logprobs.tokens


@pytest.mark.parametrize('model', (BASE, *METHODS))
def test_a_stream_says_what_the_whole_answer_says(client, model):
  whole = chat(client, model=model)
  options = {'include_usage': True}
  texts, reasons, usage, chunks = streamed(
    client, model=model, stream_options=options
  )
  assert texts == {0: whole.choices[0].message.content}
  assert reasons == {0: whole.choices[0].finish_reason}
  assert usage.completion_tokens == whole.usage.completion_tokens
  assert usage.prompt_tokens == whole.usage.prompt_tokens
  assert len({chunk.id for chunk in chunks}) == 1
  # One answer is more than one chunk.
  assert len(chunks) > 5


@pytest.mark.parametrize(
  'prompt, answer_text',
  [('你好世界，', '你好世界'), ('жук и ёж, ', 'жук и ёж')],
)
def test_characters_of_several_tokens_are_whole_in_streams(
  client, prompt, answer_text
):
  fields = {'model': BASE, 'prompt': prompt * 10, 'temperature': 0}
  (choice,) = client.completions.create(
    **fields, max_tokens=24, logprobs=0
  ).choices
  # The model goes on so, by tokens that are parts of characters.
  assert answer_text in choice.text
  assert any(t.startswith('bytes:') for t in choice.logprobs.tokens)
  parts = [
    chunk.choices[0].text
    for chunk in client.completions.create(**fields, max_tokens=24, stream=True)
  ]
  assert ''.join(parts) == choice.text
  # The last character may be cut by the length, and by nothing else.
  assert '\ufffd' not in choice.text.rstrip('\ufffd')


@pytest.mark.parametrize('stream', (False, True))
def test_drawn_characters_of_many_bytes_are_whole(client, stream):
  # Eight characters, none of which is of one byte, as the draws have it.
  form = {'type': 'regex', 'regex': r'[^\x00-\x7f]{8}'}
  fields = {
    'temperature': 1.5,
    'seed': 5,
    'n': 2,
    'max_tokens': 60,
    'extra_body': {'response_format': form},
  }
  if stream:
    texts, reasons, *_ = streamed(client, 'Say it in Chinese.', **fields)
    assert set(reasons.values()) == {'stop'}
    texts = list(texts.values())
  else:
    choices = chat(client, 'Say it in Chinese.', **fields).choices
    texts = [choice.message.content for choice in choices]
  assert texts[0] != texts[1]
  for text in texts:
    assert len(text) == 8 and not any(map(str.isascii, text))
    assert '\ufffd' not in text


def test_a_text_of_emoji_that_is_forced_comes_letter_by_letter(client):
  form = {'type': 'choice', 'choice': [EMOJI]}
  texts, *_ = streamed(
    client,
    temperature=1,
    n=2,
    max_tokens=60,
    extra_body={'response_format': form},
  )
  assert texts == {0: EMOJI, 1: EMOJI}


def test_several_answers_differ_and_seeds_bring_them_back(client):
  fields = {'n': 2, 'temperature': 1.0, 'seed': 7, 'max_tokens': 12}
  answer = chat(client, 'Tell me a story.', **fields)
  texts = [choice.message.content for choice in answer.choices]
  assert texts[0] != texts[1]
  again, *_ = streamed(client, 'Tell me a story.', **fields)
  assert again == dict(enumerate(texts))
  second = chat(client, 'Tell me a story.', **{**fields, 'seed': 8})
  assert second.choices[0].message.content != texts[0]


def test_stop_strings_end_an_answer_and_are_not_in_it(client):
  whole = chat(client).choices[0].message.content
  # Cut in the middle of a word, which is no border of tokens.
  at = whole.index('Paris') + 2
  answer = chat(client, stop=[whole[at : at + 4], 'not said']).choices[0]
  assert answer.message.content == whole[: whole.index(whole[at : at + 4])]
  assert answer.finish_reason == 'stop'
  texts, reasons, *_ = streamed(client, stop=whole[at : at + 4])
  assert texts == {0: answer.message.content} and reasons == {0: 'stop'}


def test_log_probabilities_of_chat(client):
  answer = chat(client, logprobs=True, top_logprobs=3, max_tokens=6)
  logprobs = answer.choices[0].logprobs.content
  assert (
    ''.join(item.token for item in logprobs)
    == answer.choices[0].message.content
  )
  for item in logprobs:
    # Greedy: the best of them.
    best = item.top_logprobs[0]
    assert (best.token, best.logprob) == (item.token, item.logprob)
    values = [top.logprob for top in item.top_logprobs]
    assert len(values) == 3 and values == sorted(values, reverse=True)
    assert sum(map(math.exp, values)) < 1 + 1e-4
    assert bytes(item.bytes).decode() == item.token
  alternatives = [
    item.logprob
    for chunk in chat(
      client, logprobs=True, top_logprobs=3, max_tokens=6, stream=True
    )
    for choice in chunk.choices
    if choice.logprobs
    for item in choice.logprobs.content
  ]
  assert alternatives == pytest.approx(
    [item.logprob for item in logprobs], abs=1e-4
  )


TEXT = (
  'The capital of France is Paris. Its 2 million people say: "naïve" 🎈 and\n'
  'drink coffee   with 你好.'
)


@pytest.mark.parametrize('adapter', ('', *METHODS))
@pytest.mark.parametrize('length', (0, 1))
def test_echoed_log_probabilities_are_the_trainer_s(
  client, trainer, adapter, length
):
  answer = client.completions.create(
    model=adapter or BASE,
    prompt=TEXT,
    echo=True,
    logprobs=1,
    max_tokens=length,
    temperature=0,
  )
  (choice,) = answer.choices
  logprobs = choice.logprobs
  ids = trainer.words.encode(TEXT)
  assert len(logprobs.tokens) == len(ids) + length
  assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
  expected = trainer.logprobs(ids, adapter)
  values = logprobs.token_logprobs[1 : len(ids)]
  np.testing.assert_allclose(values, expected, atol=1e-3)
  # What evaluation harnesses add up.
  assert sum(values) == pytest.approx(float(expected.sum()), abs=1e-3)
  # The text is given back, and each token stands where it says.
  assert choice.text.startswith(TEXT) and logprobs.text_offset[0] == 0
  for token, at in zip(logprobs.tokens, logprobs.text_offset, strict=True):
    if not token.startswith('bytes:'):
      assert choice.text[at : at + len(token)] == token


def test_adapters_have_their_own_log_probabilities(trainer):
  ids = trainer.words.encode(TEXT)
  sums = [float(trainer.logprobs(ids, a).sum()) for a in ('', *METHODS)]
  # By far more than the test above allows: it could not tell them else.
  pairs = itertools.combinations(sums, 2)
  assert min(abs(a - b) for a, b in pairs) > 0.02


def test_a_harness_scores_a_continuation_by_ids(client, trainer):
  context, rest = 'The capital of France is', [' Paris', ' London']
  ids = [trainer.words.encode(context + item) for item in rest]
  answer = client.completions.create(
    model=BASE, prompt=ids, echo=True, logprobs=1, max_tokens=1, temperature=0
  )
  size = len(trainer.words.encode(context))
  sums = []
  for item, choice in zip(ids, answer.choices, strict=True):
    expected = trainer.logprobs(item)[size - 1 :].sum()
    values = sum(choice.logprobs.token_logprobs[size : len(item)])
    assert values == pytest.approx(float(expected), abs=1e-3)
    sums.append(values)
    # Whether the continuation is the greedy one.
    best = max(choice.logprobs.top_logprobs[size].items(), key=lambda p: p[1])
    greedy = best[0] == choice.logprobs.tokens[size]
    assert greedy == (trainer.best(item[:size]) == item[size])
  assert sums[0] > sums[1]


def test_forced_calls_are_of_their_schema(client):
  for choice in (
    'required',
    {'type': 'function', 'function': {'name': 'get_weather'}},
  ):
    answer = chat(
      client,
      'What is the weather in Paris?',
      tools=[WEATHER] if choice == 'required' else [TIME, WEATHER],
      tool_choice=choice,
      parallel_tool_calls=False,
      max_tokens=80,
    )
    (answer_text,) = answer.choices
    assert (
      answer_text.finish_reason == 'tool_calls'
      and answer_text.message.content is None
    )
    (call,) = answer_text.message.tool_calls
    assert call.function.name == 'get_weather'
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {'location', 'unit'}
    assert arguments['unit'] in ('C', 'F')


def test_streamed_calls_are_those_of_the_whole_answer(client):
  fields = {
    'tools': [TIME, WEATHER],
    'tool_choice': 'required',
    'parallel_tool_calls': False,
    'max_tokens': 80,
  }
  answer_text = 'What is the weather in Paris?'
  (call,) = chat(client, answer_text, **fields).choices[0].message.tool_calls
  name, text, pieces = '', '', 0
  for chunk in chat(client, answer_text, **fields, stream=True):
    for choice in chunk.choices:
      assert not choice.delta.content
      for part in choice.delta.tool_calls or ():
        name += part.function.name or ''
        text += part.function.arguments or ''
        pieces += 1
  assert (name, text) == (call.function.name, call.function.arguments)
  # Arguments come as they are written.
  assert pieces > 2
  with client.chat.completions.stream(
    model=BASE,
    messages=[{'role': 'user', 'content': answer_text}],
    temperature=0,
    **fields,
  ) as stream:
    stream.until_done()
    final = stream.get_final_completion().choices[0].message.tool_calls
  assert final[0].function.arguments == text


def test_a_free_answer_with_tools_goes_on_after_the_result(client):
  answer_text = 'What is the weather in Paris?'
  auto = chat(client, answer_text, tools=[WEATHER], tool_choice='auto').choices[
    0
  ]
  # Whether it calls is the model's business; either form is whole.
  assert auto.message.content or auto.message.tool_calls
  forced = chat(
    client,
    answer_text,
    tools=[WEATHER],
    tool_choice='required',
    parallel_tool_calls=False,
    max_tokens=80,
  )
  message = forced.choices[0].message
  turns = [
    {'role': 'user', 'content': answer_text},
    message,
    {
      'role': 'tool',
      'tool_call_id': message.tool_calls[0].id,
      'content': 'It is sunny.',
    },
  ]
  answer = client.chat.completions.create(
    model=BASE,
    messages=turns,
    tools=[WEATHER],
    tool_choice='none',
    max_tokens=20,
    temperature=0,
  )
  assert answer.choices[0].message.content
  assert not answer.choices[0].message.tool_calls


def tool_result(number, city, result):
  """The turns of a question that was answered by a tool."""
  function = {'name': 'get_weather', 'arguments': f'{{"location": "{city}"}}'}
  call = {'id': f'c{number}', 'type': 'function', 'function': function}
  return [
    {'role': 'user', 'content': f'What is the weather in {city}?'},
    {'role': 'assistant', 'content': None, 'tool_calls': [call]},
    {'role': 'tool', 'tool_call_id': f'c{number}', 'content': result},
    {'role': 'assistant', 'content': result},
  ]


@pytest.mark.parametrize('stream', (False, True))
def test_after_examples_the_model_calls_a_tool_by_itself(client, stream):
  """It does not without them, which is the model's doing, not the server's."""
  tool = {
    'type': 'function',
    'function': {
      'name': 'get_weather',
      'description': 'Get the weather at a location.',
      'parameters': {
        'type': 'object',
        'properties': {'location': {'type': 'string', 'maxLength': 20}},
        'required': ['location'],
      },
    },
  }
  fields = {
    'model': BASE,
    'messages': [
      *tool_result(0, 'Berlin', 'It is raining.'),
      *tool_result(1, 'Rome', 'It is sunny.'),
      {'role': 'user', 'content': 'What is the weather in Paris?'},
    ],
    'tools': [tool],
    'temperature': 0,
    'max_tokens': 60,
    'parallel_tool_calls': False,
  }
  if stream:
    with client.chat.completions.stream(**fields) as events:
      answer = events.get_final_completion()
  else:
    answer = client.chat.completions.create(**fields)
  (choice,) = answer.choices
  assert choice.finish_reason == 'tool_calls' and not choice.message.content
  (call,) = choice.message.tool_calls
  assert call.function.name == 'get_weather'
  assert json.loads(call.function.arguments) == {'location': 'Paris'}


def test_a_call_that_is_cut_off_is_no_text(client):
  for length in (3, 8, 20):
    answer_text = chat(
      client, tools=[WEATHER], tool_choice='required', max_tokens=length
    ).choices[0]
    assert (
      answer_text.finish_reason == 'length' and not answer_text.message.content
    )


@pytest.mark.parametrize('model', (BASE, 'molora'))
@pytest.mark.parametrize('temperature', (0, 1))
def test_pydantic_models_come_back(client, model, temperature):
  answer = client.chat.completions.parse(
    model=model,
    messages=[{'role': 'user', 'content': 'Invent a person.'}],
    response_format=Person,
    temperature=temperature,
    seed=3,
    max_tokens=200,
    extra_body={'repetition_penalty': 1.1},
  )
  assert isinstance(answer.choices[0].message.parsed, Person)


def test_streamed_json_is_that_of_the_whole_answer(client):
  form = {
    'type': 'json_schema',
    'json_schema': {
      'name': 'Person',
      'strict': True,
      'schema': {
        **Person.model_json_schema(),
        'additionalProperties': False,
      },
    },
  }
  fields = {
    'response_format': form,
    'max_tokens': 200,
    'extra_body': {'repetition_penalty': 1.1},
  }
  whole = chat(client, 'Invent a person.', **fields).choices[0]
  assert whole.finish_reason == 'stop'
  Person.model_validate_json(whole.message.content)
  texts, *_ = streamed(client, 'Invent a person.', **fields)
  assert texts == {0: whole.message.content}


def test_any_json_object(client):
  answer_text = chat(
    client,
    'A JSON object with a name.',
    response_format={'type': 'json_object'},
    max_tokens=60,
    extra_body={'repetition_penalty': 1.2},
  ).choices[0]
  assert answer_text.message.content.startswith('{')
  if answer_text.finish_reason == 'stop':
    assert isinstance(json.loads(answer_text.message.content), dict)


def test_embeddings_of_what_is_alike_are_alike(client):
  texts = [
    'A cat sits on the sofa.',
    'A kitten is lying on the couch.',
    'The central bank raised its rates.',
  ]
  rows = np.array(
    [
      item.embedding
      for item in client.embeddings.create(
        model=EMBEDDER, input=texts, encoding_format='float'
      ).data
    ]
  )
  np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
  cosines = rows @ rows.T
  assert cosines[0, 1] > 0.5 > 0.3 > max(cosines[0, 2], cosines[1, 2])
  # The package asks for base64 where nothing is said, and reads it.
  short = client.embeddings.create(model=EMBEDDER, input=texts[0])
  np.testing.assert_allclose(short.data[0].embedding, rows[0], atol=1e-6)
  raw = client.embeddings.with_raw_response.create(
    model=EMBEDDER, input=texts[0], encoding_format='base64'
  )
  written = base64.b64decode(raw.http_response.json()['data'][0]['embedding'])
  np.testing.assert_allclose(
    struct.unpack(f'<{len(rows[0])}f', written), rows[0], atol=1e-6
  )


SCHEMA = {'type': 'json_schema', 'json_schema': {'name': 'a', 'schema': {}}}
BAD = {**SCHEMA, 'json_schema': {'name': 'a', 'schema': {'type': 'strin'}}}


@pytest.mark.parametrize(
  'fields, kind, param, code',
  [
    ({'model': 'gpt-4'}, 'NotFoundError', 'model', 'model_not_found'),
    ({'model': 'lora2'}, 'NotFoundError', 'model', 'model_not_found'),
    ({'model': EMBEDDER}, 'BadRequestError', 'model', None),
    (
      {'content': 'why? ' * PLACES},
      'BadRequestError',
      'messages',
      'context_length_exceeded',
    ),
    (
      {'max_tokens': PLACES - 3},
      'BadRequestError',
      'messages',
      'context_length_exceeded',
    ),
    ({'response_format': BAD}, 'BadRequestError', 'response_format', None),
    ({'temperature': 2.5}, 'BadRequestError', 'temperature', None),
    ({'temperature': -1}, 'BadRequestError', 'temperature', None),
    ({'temperature': 'warm'}, 'BadRequestError', 'temperature', None),
    ({'n': 0}, 'BadRequestError', 'n', None),
    ({'extra_body': {'x': 1}}, 'BadRequestError', 'x', None),
    ({'tool_choice': 'required'}, 'BadRequestError', 'tool_choice', None),
  ],
)
@pytest.mark.parametrize('stream', (False, True))
def test_errors_are_those_of_the_package(
  client, stream, fields, kind, param, code
):
  # A stream's too: before it begins.
  with pytest.raises(getattr(openai, kind)) as e:
    chat(client, **fields, stream=stream)
  assert (e.value.param, e.value.code) == (param, code)
  assert e.value.type == 'invalid_request_error'
  assert e.value.body['message']


def idle(real, seconds=30):
  until = time.monotonic() + seconds
  while time.monotonic() < until:
    values = real.metrics()
    if not values['moepeft_running'] and not values['moepeft_waiting']:
      return values
    time.sleep(0.1)
  raise AssertionError('a request is still under way')


def test_a_stream_that_is_left_frees_its_slot(client, real):
  before = idle(real)
  stream = chat(client, 'Tell me a story.', stream=True, max_tokens=400)
  for _ in zip(range(4), stream, strict=False):
    pass
  stream.close()
  after = idle(real)
  name = 'moepeft_finished_total{reason="cancelled"}'
  assert after[name] == before.get(name, 0) + 1
  answered = 'moepeft_answer_tokens_total'
  # Far fewer than it was to have.
  assert after[answered] - before[answered] < 200


def test_answers_are_the_same_in_company(client, real):
  """Sixteen at once on four slots, of the base and three adapters."""
  names = [BASE, *METHODS] * 4
  body = [f'Count from {i} to {i + 5}.' for i in range(len(names))]
  alone = [
    chat(client, answer_text, model=name).choices[0].message.content
    for name, answer_text in zip(names, body, strict=True)
  ]
  assert len(set(alone)) > len(names) / 2

  async def together():
    async with openai.AsyncOpenAI(
      base_url=f'{real.url}/v1', api_key='none', max_retries=0, timeout=SECONDS
    ) as client:
      return await asyncio.gather(
        *(
          client.chat.completions.create(
            model=name,
            messages=[{'role': 'user', 'content': answer_text}],
            temperature=0,
            max_tokens=24,
          )
          for name, answer_text in zip(names, body, strict=True)
        )
      )

  values = asyncio.run(together())
  assert [item.model for item in values] == names
  assert [item.choices[0].message.content for item in values] == alone

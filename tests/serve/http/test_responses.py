# SPDX-License-Identifier: Apache-2.0
"""/v1/responses is a chat in other words, for the clients that ask for it."""

import asyncio
import json

import pytest

from moepeft.core.http_access import ApiKeys
from moepeft.serve.http.responses_body import ResponsesBody
from moepeft.serve.http.tool_calls import ToolPlanner
from tests.serve.fake_engine import END, ids_of, text_of
from tests.serve.small_server import byte_tokenizer, constrained, fake, running

openai = pytest.importorskip('openai')
pydantic = pytest.importorskip('pydantic')

PATH = '/v1/responses'
WEATHER = {
  'type': 'function',
  'name': 'weather',
  'description': 'The weather of a town.',
  'parameters': {
    'type': 'object',
    'properties': {'town': {'type': 'string', 'enum': ['Ulm']}},
    'required': ['town'],
    'additionalProperties': False,
  },
  'strict': True,
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"town": "Ulm"}}\n'
CALL += '</tool_call>'


@pytest.fixture(scope='module')
def words(tmp_path_factory):
  return byte_tokenizer(tmp_path_factory.mktemp('words'))


@pytest.fixture(scope='module')
def server(words):
  """A server whose tools and formats are constraints."""
  with running(constrained(fake(words), words)) as value:
    yield value


@pytest.fixture(scope='module')
def free(words):
  """A server without constraints: a script decides the calls."""
  with running(fake(words, keys=ApiKeys((b'secret',), ()))) as value:
    value.service.tool_planner = ToolPlanner(None)
    value.key = 'secret'
    yield value


@pytest.fixture
def set_texts(free):
  """Sets the texts of the next answers; the last one is given again."""
  original = free.engine.answer

  def script(*texts):
    remaining = list(texts)

    def answer(request):
      text = remaining.pop(0) if len(remaining) > 1 else remaining[0]
      return [*ids_of(text), END]

    free.engine.answer = answer

  yield script
  free.engine.answer = original


def client_of(server, key='secret'):
  return openai.OpenAI(
    base_url=f'{server.url}/v1', api_key=key, max_retries=0, timeout=20
  )


def ask(client, **fields):
  return client.responses.create(**{'model': 'base', 'input': 'hi', **fields})


def prompts(server):
  return [text_of(request.prompt_ids) for request in server.engine.requests]


def test_an_answer(server):
  response = ask(client_of(server), temperature=0.5, metadata={'a': 'b'})
  # The fake answers with the end of the prompt, 'u:hi|a:'.
  assert response.output_text == 'hi|a:'
  assert response.status == 'completed' and response.error is None
  assert response.id.startswith('resp_') and response.model == 'base'
  (message,) = response.output
  assert (message.type, message.role) == ('message', 'assistant')
  # Five letters and the end.
  usage = response.usage
  assert (usage.input_tokens, usage.output_tokens) == (7, 6)
  assert usage.total_tokens == 13
  assert response.temperature == 0.5 and response.metadata == {'a': 'b'}
  sampling = server.engine.requests[-1].sampling
  assert sampling.temperature == 0.5
  # A response validates against the client's own model, strictly read.
  type(response).model_validate(response.model_dump(mode='json'))


def test_input_items_are_turns(server):
  client = client_of(server)
  ask(
    client,
    instructions='Be brief.',
    input=[
      {'role': 'developer', 'content': 'And kind.'},
      {'role': 'user', 'content': [{'type': 'input_text', 'text': 'hi'}]},
      {
        'type': 'message',
        'id': 'msg_1',
        'status': 'completed',
        'role': 'assistant',
        'content': [
          {
            'type': 'output_text',
            'text': 'Hello.',
            'annotations': [],
            'logprobs': [],
          }
        ],
      },
      {'type': 'message', 'role': 'user', 'content': 'bye'},
    ],
  )
  assert prompts(server)[-1] == (
    's:Be brief.\n\nAnd kind.|u:hi|a:Hello.|u:bye|a:'
  )


def test_text_and_calls_of_an_answer_are_one_turn():
  call = {'type': 'function_call', 'name': 'f', 'arguments': '{}'}
  items = [
    {'role': 'user', 'content': 'a'},
    {'role': 'assistant', 'content': 'b'},
    {**call, 'call_id': 'x'},
    {**call, 'call_id': 'y'},
    {'type': 'function_call_output', 'call_id': 'x', 'output': 'c'},
    {
      'type': 'function_call_output',
      'call_id': 'y',
      'output': [{'type': 'input_text', 'text': 'd'}],
    },
    {**call, 'call_id': 'z'},
  ]
  body = ResponsesBody.model_validate({'model': 'base', 'input': items})
  turns = body.to_chat().messages
  assert [(turn.role, turn.text) for turn in turns] == [
    *(('user', 'a'), ('assistant', 'b'), ('tool', 'c'), ('tool', 'd')),
    ('assistant', ''),
  ]
  assert [call.id for call in turns[1].tool_calls] == ['x', 'y']
  assert [turn.tool_call_id for turn in turns[2:4]] == ['x', 'y']
  assert [call.id for call in turns[4].tool_calls] == ['z']


def test_an_answer_that_is_cut_is_incomplete(server):
  response = ask(client_of(server), max_output_tokens=2)
  assert response.output_text == 'hi'
  assert response.status == 'incomplete'
  assert response.incomplete_details.reason == 'max_output_tokens'
  assert response.output[0].status == 'incomplete'


def test_a_stream_has_the_events_of_the_api_in_order(server):
  body = {'model': 'base', 'input': 'hi', 'stream': True}
  # So that tokens come one by one.
  server.engine.pause = 0.02
  status, headers, raw = server.send('POST', PATH, body)
  server.engine.pause = 0.0
  assert status == 200
  assert headers['content-type'].startswith('text/event-stream')
  blocks = [block.split('\n') for block in raw.decode().split('\n\n') if block]
  events = [json.loads(data.removeprefix('data: ')) for _, data in blocks]
  assert [name for name, _ in blocks] == [f'event: {e["type"]}' for e in events]
  assert [e['sequence_number'] for e in events] == list(range(len(events)))
  kinds = [e['type'].removeprefix('response.') for e in events]
  assert kinds == [
    *('created', 'in_progress', 'output_item.added', 'content_part.added'),
    *['output_text.delta'] * kinds.count('output_text.delta'),
    *('output_text.done', 'content_part.done', 'output_item.done', 'completed'),
  ]
  deltas = [e['delta'] for e in events if e['type'].endswith('text.delta')]
  assert ''.join(deltas) == 'hi|a:' and len(deltas) > 1
  assert events[0]['response']['status'] == 'in_progress'
  assert events[0]['response']['output'] == []
  item = events[-2]['item']
  assert item == events[-1]['response']['output'][0]
  assert item['id'] == events[2]['item']['id'] == events[5]['item_id']
  assert events[2]['item']['content'] == []


def test_the_client_puts_a_stream_together(server):
  whole = ask(client_of(server))
  with client_of(server).responses.stream(model='base', input='hi') as stream:
    kinds = {event.type for event in stream}
    final = stream.get_final_response()
  assert 'response.output_text.delta' in kinds
  assert final.output_text == whole.output_text
  assert final.usage == whole.usage


def test_log_probabilities(server):
  include = ['message.output_text.logprobs']
  response = ask(client_of(server), include=include, top_logprobs=2)
  scores = response.output[0].content[0].logprobs
  assert ''.join(score.token for score in scores) == 'hi|a:'
  # The fake's are -id / 100; 'h' is byte 104, so id 107.
  assert scores[0].logprob == pytest.approx(-1.07)
  assert len(scores[0].top_logprobs) == 2
  streamed = [
    score.token
    for event in ask(client_of(server), include=include, stream=True)
    if event.type == 'response.output_text.delta'
    for score in event.logprobs
  ]
  assert ''.join(streamed) == 'hi|a:'


class Answer(pydantic.BaseModel):
  warm: bool


def test_a_model_of_pydantic_comes_back(server):
  response = client_of(server).responses.parse(
    model='base', input='hi', text_format=Answer
  )
  assert isinstance(response.output_parsed, Answer)


def test_a_forced_call_is_an_item_and_goes_back(server):
  client = client_of(server)
  fields = dict(
    tools=[WEATHER],
    tool_choice={'type': 'function', 'name': 'weather'},
    max_output_tokens=90,
  )
  response = ask(client, **fields)
  (call,) = response.output
  assert (call.type, call.name) == ('function_call', 'weather')
  assert call.id.startswith('fc_') and call.call_id
  assert response.tools[0].name == 'weather'
  with client.responses.stream(model='base', input='hi', **fields) as stream:
    final = stream.get_final_response()
  assert final.output[0].arguments == call.arguments
  output = {
    'type': 'function_call_output',
    'call_id': call.call_id,
    'output': 'sunny',
  }
  items = [{'role': 'user', 'content': 'hi'}, *response.output, output]
  ask(client, input=items, tools=[WEATHER], tool_choice='none')
  assert prompts(server)[-1].endswith('t:sunny|a:')


def test_text_and_calls_of_a_script_are_items_of_their_own(free, set_texts):
  set_texts(f'Let me see.{CALL}\n{CALL}')
  response = ask(client_of(free), tools=[WEATHER])
  assert [item.type for item in response.output] == [
    'message',
    'function_call',
    'function_call',
  ]
  assert response.output_text.strip() == 'Let me see.'
  assert json.loads(response.output[2].arguments) == {'town': 'Ulm'}
  events = list(ask(client_of(free), tools=[WEATHER], stream=True))
  done = [e for e in events if e.type == 'response.output_item.done']
  assert [e.output_index for e in done] == [0, 1, 2]
  arguments = {}
  for event in events:
    if event.type == 'response.function_call_arguments.delta':
      arguments.setdefault(event.item_id, []).append(event.delta)
  assert [''.join(parts) for parts in arguments.values()] == [
    response.output[1].arguments,
    response.output[2].arguments,
  ]


def test_a_failure_in_a_stream_is_an_event(free):
  original = free.engine.answer
  free.engine.answer = lambda request: [*ids_of('ab'), -1]
  with pytest.raises(openai.InternalServerError, match='the engine failed'):
    ask(client_of(free))
  *_, last = ask(client_of(free), stream=True)
  free.engine.answer = original
  assert last.type == 'response.failed'
  assert last.response.error.code == 'server_error'
  assert 'the engine failed' in last.response.error.message


@pytest.mark.parametrize(
  'fields, param, message',
  [
    ({'previous_response_id': 'resp_1'}, None, 'stores no responses'),
    ({'store': True}, 'store', 'does not support it'),
    ({'background': True}, None, 'does not support it'),
    ({'conversation': 'c'}, None, 'does not support it'),
    ({'reasoning': {'effort': 'high'}}, 'reasoning', 'does not support it'),
    ({'truncation': 'auto'}, 'truncation', 'does not support it'),
    ({'include': ['file_search_call.results']}, 'include', 'expected'),
    ({'input': []}, 'input', 'at least 1'),
    ({'input': 5}, 'input', 'got 5'),
    ({'input': [7]}, 'input[0]', 'the type of an item is'),
    (
      {'input': [{'type': 'item_reference', 'id': 'a'}]},
      'input[0]',
      'the type of an item is',
    ),
    (
      {'input': [{'role': 'user', 'content': [{'type': 'input_image'}]}]},
      None,
      'input_text',
    ),
    ({'input': [{'role': 'god', 'content': 'a'}]}, 'input[0].role', 'god'),
    (
      {'input': [{'type': 'function_call', 'name': 'f', 'arguments': '{}'}]},
      'input[0].call_id',
      'missing',
    ),
    ({'tools': [{'type': 'web_search'}]}, None, 'function'),
    ({'tools': [{'type': 'function', 'name': 'a b'}]}, 'tools', 'has the name'),
    ({'tools': [WEATHER], 'tool_choice': 'x'}, 'tools', 'tool_choice'),
    ({'text': {'format': {'type': 'json_schema'}}}, 'text.format', "'name'"),
    ({'max_output_tokens': 10**9}, 'max_output_tokens', 'max_output_tokens is'),
    ({'max_tokens': 5}, 'max_tokens', 'unknown field'),
    ({'temperature': 3}, 'temperature', 'less than'),
    ({'stream_options': {'include_usage': True}}, None, 'unknown field'),
  ],
  ids=str,
)
def test_a_field_that_is_not_supported_is_an_error(
  server, fields, param, message
):
  body = {'model': 'base', 'input': 'hi', **fields}
  status, answer = server.post(PATH, body)
  assert status == 400, answer
  error = answer['error']
  assert message in error['message'] and '\n' not in error['message']
  assert error['type'] == 'invalid_request_error'
  assert error['param'] is not None
  assert param is None or error['param'] == param


def test_fields_of_no_effect_are_accepted(server):
  response = ask(
    client_of(server),
    store=False,
    truncation='disabled',
    background=False,
    include=['reasoning.encrypted_content'],
    service_tier='auto',
    text={'format': {'type': 'text'}, 'verbosity': 'medium'},
    user='me',
    stream_options=None,
  )
  assert response.store is False
  unknown = client_of(server).with_options(max_retries=0)
  with pytest.raises(openai.NotFoundError):
    ask(unknown, model='x')


def test_a_key_is_needed_where_there_are_keys(free):
  with pytest.raises(openai.AuthenticationError):
    ask(client_of(free, 'wrong'))


def test_agents_of_openai_call_a_tool(free, set_texts):
  agents = pytest.importorskip('agents')
  set_texts(CALL, 'It is warm in Ulm.')
  towns = []

  @agents.function_tool
  def weather(town: str) -> str:
    """The weather of a town."""
    towns.append(town)
    return 'warm'

  client = openai.AsyncOpenAI(
    base_url=f'{free.url}/v1', api_key='secret', max_retries=0
  )
  # Its default model asks /v1/responses.
  model = agents.OpenAIResponsesModel('base', client)
  agent = agents.Agent(
    name='a', instructions='Be brief.', tools=[weather], model=model
  )
  config = agents.RunConfig(tracing_disabled=True)

  async def run():
    # One event loop, as the client's connections belong to it.
    run_ = agents.Runner.run(agent, 'Weather?', run_config=config)
    whole = (await run_).final_output
    set_texts(CALL, 'It is warm in Ulm.')
    stream = agents.Runner.run_streamed(agent, 'Weather?', run_config=config)
    kinds = [event.type async for event in stream.stream_events()]
    return whole, stream.final_output, kinds

  whole, streamed, kinds = asyncio.run(run())
  assert whole == streamed == 'It is warm in Ulm.'
  assert prompts(free)[-1].endswith('t:warm|a:')
  assert 'raw_response_event' in kinds and towns == ['Ulm', 'Ulm']


def test_langchain_asks_for_responses(free, server, set_texts):
  langchain = pytest.importorskip('langchain_openai')
  messages = pytest.importorskip('langchain_core.messages')
  tools = pytest.importorskip('langchain_core.tools')

  def model(of, **fields):
    return langchain.ChatOpenAI(
      model='base',
      base_url=f'{of.url}/v1',
      api_key='secret',
      use_responses_api=True,
      max_retries=0,
      **fields,
    )

  @tools.tool
  def weather(town: str) -> str:
    """The weather of a town."""
    return f'warm in {town}'

  set_texts(CALL, 'It is warm.')
  bound = model(free).bind_tools([weather])
  turns = [messages.SystemMessage('Be brief.'), messages.HumanMessage('hi')]
  answer = bound.invoke(turns)
  (call,) = answer.tool_calls
  assert (call['name'], call['args']) == ('weather', {'town': 'Ulm'})
  final = bound.invoke([*turns, answer, weather.invoke(call)])
  assert final.text == 'It is warm.'
  assert final.usage_metadata['output_tokens'] == 12
  assert prompts(free)[-1].endswith('t:warm in Ulm|a:')
  merged = None
  for chunk in model(server, max_tokens=50).stream('hi'):
    merged = chunk if merged is None else merged + chunk
  assert merged.text == 'hi|a:' and merged.usage_metadata['input_tokens'] == 7
  parsed = model(server).with_structured_output(Answer).invoke('hi')
  assert isinstance(parsed, Answer)

# SPDX-License-Identifier: Apache-2.0
"""A hostile model server: whatever it sends is an answer or one sentence."""

import http.server
import json
import socket
import threading

import pytest

pytest.importorskip('openai')

from moepeft.agent import (
  chat_model,  # noqa: E402
  traces,
)
from moepeft.agent.__main__ import main  # noqa: E402
from moepeft.agent.agent import Agent  # noqa: E402
from moepeft.agent.flags import make_parser, run_command  # noqa: E402
from moepeft.agent.loop import Budget  # noqa: E402
from moepeft.agent.memory import TokenCounter  # noqa: E402
from moepeft.agent.tools import make_tool  # noqa: E402
from tests.agent.scripted import serving, text_reply  # noqa: E402

DEEP = '[' * 5000 + ']' * 5000


def add(a: int) -> int:
  """Adds one."""
  return a + 1


class Bodies:
  """A server on loopback that answers all with the same bytes."""

  def __init__(self, *pieces, status=200, headers=()):
    self.pieces, self.status, self.headers = pieces, status, dict(headers)

  def __enter__(self):
    bodies = self

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_POST(self):
        self.rfile.read(int(self.headers.get('Content-Length', 0)))
        self.send_response(bodies.status)
        for name, value in bodies.headers.items():
          self.send_header(name, value)
        self.end_headers()
        try:
          for piece in bodies.pieces:
            self.wfile.write(piece)
        except OSError:
          pass

      do_GET = do_POST

      def log_message(self, *args):
        pass

    self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    self.server.daemon_threads = True
    threading.Thread(
      target=self.server.serve_forever, args=(0.02,), daemon=True
    ).start()
    self.url = f'http://127.0.0.1:{self.server.server_address[1]}/v1'
    return self

  def __exit__(self, *_):
    self.server.shutdown()
    self.server.server_close()


@pytest.fixture(scope='module')
def client():
  # Reading the system's certificates takes longer than a test.
  return chat_model.make_client('http://127.0.0.1:1/v1').with_options(
    max_retries=0
  )


def ask(client, url, stream):
  served = chat_model.ServerModel(
    client.with_options(base_url=url), 'm', stream
  )
  return Agent(served, [make_tool(add)], budget=Budget(steps=3, calls=3)).ask(
    '?'
  )


def choice(message):
  return {'choices': [{'message': message, 'finish_reason': 'stop'}]}


def call_reply(function):
  return choice({'content': None, 'tool_calls': [{'function': function}]})


WHOLE = (
  None,
  [],
  3,
  'x',
  {'choices': None},
  {'choices': {}},
  {'choices': [None]},
  {'choices': ['x']},
  {'choices': [{'message': None}]},
  {'choices': [{'message': []}]},
  {'choices': [{}]},
  choice({'content': 3}),
  choice({'content': ['x']}),
  choice({'content': 'x', 'tool_calls': 3}),
  choice({'content': 'x', 'tool_calls': [None]}),
  choice({'content': 'x', 'tool_calls': [{'function': 'add'}]}),
  call_reply({'name': None, 'arguments': '{}'}),
  call_reply({'name': 7, 'arguments': '{}'}),
  call_reply({'name': 'add', 'arguments': {'a': 1}}),
  call_reply({'name': 'add', 'arguments': 5}),
  choice({'tool_calls': [{'id': 5, 'function': {'name': 'add'}}]}),
  choice({'content': '\ud83d'}),
  {**choice({'content': 'x'}), 'usage': {'total_tokens': 'many'}},
  {**choice({'content': 'x'}), 'usage': {'total_tokens': 10**30}},
  {'choices': [{'message': {'content': 'x'}, 'finish_reason': 5}]},
  choice({'tool_calls': [{'function': {'name': 'add'}}] * 1000}),
)
RAW = (b'', b'{', b'\xff\xfe', b'<html>', DEEP.encode(), b'\0' * 100)


def test_a_whole_reply_of_other_types_is_one_sentence(client):
  with Bodies() as server:
    for value in WHOLE:
      server.pieces = [json.dumps(value).encode()]
      outcome = ask(client, server.url, False)
      why = outcome.why
      assert outcome.state == 'failed', value
      assert why and '\n' not in why and len(why) < 700, value


@pytest.mark.parametrize('stream', [False, True])
def test_bytes_that_are_no_reply_are_one_sentence(client, stream):
  with Bodies() as server:
    here = client.with_options(base_url=server.url)
    for raw in RAW:
      server.pieces = [b'data: ' + raw + b'\n\n' if stream else raw]
      outcome = ask(client, server.url, stream)
      assert outcome.state == 'failed', raw[:9]
      with pytest.raises(chat_model.ReplyError) as caught:
        chat_model.list_models(here)
      for why in (outcome.why, str(caught.value)):
        assert '\n' not in why and 'no reply' in why
      count = TokenCounter(here, 'm')
      assert count({'messages': []}) == 0 and not count.exact


def test_a_streamed_piece_of_other_types_is_one_sentence(client):
  with Bodies() as server:
    for delta in (
      {'content': 5},
      {'tool_calls': 5},
      {'tool_calls': [None]},
      {'tool_calls': [{'index': 'x'}]},
      {'tool_calls': [{'index': -1}]},
      {'tool_calls': [{'index': 10**9}]},
      {'tool_calls': [{'index': 0, 'function': []}]},
      {'tool_calls': [{'index': 0, 'function': {'arguments': {}}}]},
      {'tool_calls': [{'index': 0, 'function': {'name': ['add']}}]},
      # No text and no call at all.
      None,
    ):
      chunk = json.dumps({'choices': [{'delta': delta}]}).encode()
      server.pieces = [b'data: ' + chunk + b'\n\ndata: [DONE]\n\n']
      outcome = ask(client, server.url, True)
      assert outcome.state == 'failed' and '\n' not in outcome.why, delta


def test_an_endless_stream_ends_with_the_time_or_the_size(client, monkeypatch):
  monkeypatch.setattr(chat_model, '_MAX_BYTES', 1 << 20)
  piece = b'data: {"choices": [{"delta": {"content": "x"}}]}\n\n' * 1000
  # Bytes without a line, lines of text, an error's body: 50 MB each.
  for pieces, status, stream in (
    ((b'x' * (1 << 16),) * 800, 200, True),
    ((piece,) * 1000, 200, True),
    ((b' ' * (1 << 16),) * 800, 200, False),
    ((b' ' * (1 << 16),) * 800, 500, False),
  ):
    with Bodies(*pieces, status=status) as server:
      outcome = ask(client, server.url, stream)
    assert outcome.state == 'failed' and '\n' not in outcome.why


def test_a_compressed_reply_is_refused_before_it_is_unpacked(client):
  with Bodies(b'x' * 100, headers={'Content-Encoding': 'gzip'}) as server:
    outcome = ask(client, server.url, False)
  assert outcome.state == 'failed' and '\n' not in outcome.why


def test_a_conversation_is_not_sent_on_to_another_server(client):
  with serving(text_reply('from elsewhere')) as second_server:
    for status in (301, 302, 303, 307, 308):
      with Bodies(
        status=status, headers=[('Location', second_server.url)]
      ) as bodies:
        for stream in (False, True):
          outcome = ask(client, bodies.url, stream)
          assert outcome.state == 'failed'
          assert f'HTTP {status}' in outcome.why
    assert not second_server.requests


def test_a_password_in_the_address_is_in_no_error(capsys):
  with pytest.raises(SystemExit):
    arguments = [
      '--base_url=http://me:hush-hush@127.0.0.1:1/v1',
      '--skills=',
      '?',
    ]
    run_command(make_parser(''), main, arguments)
  assert 'hush' not in capsys.readouterr().err


def test_an_errors_message_is_cut_and_one_line(client):
  for message in ('a\nb' * 5000, 5, ['x'], {'a': 'b'}, None, DEEP):
    body = json.dumps({'error': {'message': message}}).encode()
    with Bodies(body, status=400) as server:
      outcome = ask(client, server.url, False)
    assert outcome.state == 'failed' and 'HTTP 400' in outcome.why
    assert '\n' not in outcome.why and len(outcome.why) < 600


def test_deep_arguments_are_told_to_the_model_and_it_goes_on():
  from tests.agent.scripted import wants

  for arguments in (DEEP, '{"a": ' + DEEP + '}', '{"a": "\\ud83d"}', '{"a":1'):
    replies = [wants(('add', arguments)), text_reply('Oh.')]
    for stream in (False, True):
      with serving(*replies) as script:
        outcome = Agent(script.model(stream), [make_tool(add)]).ask('?')
      assert outcome.text == 'Oh.'
      result = script.requests[1]['messages'][-1]['content']
      assert 'the arguments do not fit' in result
  text = 'Action: add\nAction Input: ' + '{"a": [' * 5000
  with serving(text_reply(text), text_reply('Final Answer: Oh.')) as script:
    client = Agent(script.model(), [make_tool(add)], form='react')
    assert client.ask('?').text == 'Oh.'


ESCAPES = '\x1b]0;x\x07\x1b[2J\x9b31m\u202e\x08\r!'


@pytest.mark.parametrize('stream', [False, True])
def test_no_escape_code_reaches_the_output(
  stream, capsys, monkeypatch, tmp_path
):
  from tests.agent.scripted import wants

  # A folder of skills whose one description has them too.
  (tmp_path / 'dig').mkdir()
  (tmp_path / 'dig' / 'SKILL.md').write_text(
    f'---\nname: dig\ndescription: {json.dumps(ESCAPES)}\n---\n'
  )
  trace = tmp_path / 'trace.jsonl'
  monkeypatch.setattr('sys.stdout.isatty', lambda: stream, raising=False)
  replies = [
    wants((f'no{ESCAPES}', {'x': ESCAPES})),
    text_reply(f'answer{ESCAPES}'),
  ]

  def run(*arguments):
    try:
      main(make_parser('').parse_args(arguments))
    except ValueError as e:
      print(e)

  with serving(*replies) as script:
    url = f'--base_url={script.url}'
    run('?', url, f'--skills={tmp_path}', f'--trace={trace}')
  run(f'--replay={trace}')
  run('--list_skills', f'--skills={tmp_path}')
  run('--show_prompt', f'--skills={tmp_path}')
  captured = capsys.readouterr()
  shown = captured.out + captured.err + trace.read_text()
  assert shown.count('answer\\x1b]0;x\\x07') >= 2
  assert all(char.isprintable() or char in '\n\t' for char in shown)
  # The trace holds what was said, exactly.
  (outcome,) = traces.replay_trace(str(trace))
  assert outcome.text == f'answer{ESCAPES}'


def test_a_question_that_is_no_text_is_refused():
  request = make_parser('').parse_args(['half \udce9'])
  with pytest.raises(ValueError, match='half a surrogate pair'):
    main(request)


@pytest.mark.parametrize(
  'flag',
  [
    '--max_seconds=nan',
    '--max_seconds=inf',
    '--max_seconds=0',
    '--temperature=nan',
    '--temperature=-1',
    '--memory_tokens=-5',
    '--tool_output=0',
    '--max_tokens=0',
    '--max_calls=-1',
    '--max_steps=x',
  ],
)
def test_numbers_out_of_range_are_refused(flag, capsys):
  with pytest.raises(SystemExit) as caught:
    make_parser('').parse_args([flag])
  assert caught.value.code == 2
  assert flag.partition('=')[0] in capsys.readouterr().err


def test_an_address_that_is_none_is_one_sentence(monkeypatch):
  def unknown(*args, **options):
    raise socket.gaierror(socket.EAI_NONAME, 'Name or service not known')

  # Name servers that are not there take seconds to say so.
  monkeypatch.setattr('socket.getaddrinfo', unknown)
  monkeypatch.setattr('time.sleep', lambda seconds: None)
  for url in ('x', 'http://[', 'http://x:99999/v1'):
    request = make_parser('').parse_args(
      ['?', f'--base_url={url}', '--skills=']
    )
    with pytest.raises(ValueError) as caught:
      main(request)
    assert '\n' not in str(caught.value)

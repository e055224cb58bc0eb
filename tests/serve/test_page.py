# SPDX-License-Identifier: Apache-2.0
"""The chat page in a browser, against a server that says what it is told.

Nothing here sleeps: a reply goes on when the test has seen what came before.
"""

import re
import shutil
import threading

import pytest

from moepeft.serve import page
from tests.serve import pretended
from tests.serve.pretended import (
  DONE,
  cut,
  endless,
  error,
  event,
  in_turn,
  json_of,
  routed,
  sse,
  stream,
  text_reply,
  usage,
)

api = pytest.importorskip('playwright.sync_api', reason='needs playwright')
CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason='needs Chromium')
expect = api.expect
SWITCHES = [
  '--headless=new',
  '--no-sandbox',
  '--disable-gpu',
  '--disable-background-networking',
  '--disable-component-update',
  '--no-first-run',
]
# Milliseconds; what takes longer has failed.
PATIENCE = 15000


@pytest.fixture(scope='module')
def browser():
  expect.set_options(timeout=PATIENCE)
  with api.sync_playwright() as running:
    opened = running.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
    yield opened
    opened.close()


@pytest.fixture
def server():
  value = page.read_page()
  served = pretended.Pretended(value.body, value.headers)
  thread = threading.Thread(target=served.serve_forever, args=(0.02,))
  thread.start()
  yield served
  served.shutdown()
  served.server_close()
  thread.join(PATIENCE)


@pytest.fixture
def complaints():
  """Errors and violations that the browser reports."""
  return []


@pytest.fixture
def visit(browser, server, complaints):
  """Opens the page; what the browser complains of fails the test."""
  opened = []

  def go(locale='en-US', **options):
    context = browser.new_context(
      locale=locale, **{'viewport': {'width': 900, 'height': 700}} | options
    )
    opened.append(context)
    tab = context.new_page()
    tab.set_default_timeout(PATIENCE)
    tab.on('pageerror', lambda e: complaints.append(str(e)))
    tab.on('console', lambda m: complaints.append(m.text))
    tab.goto(server.url)
    return tab

  yield go
  for context in opened:
    context.close()
  # A status that is an error is logged by the browser itself.
  left = [c for c in complaints if 'Failed to load resource' not in c]
  assert left == []


@pytest.fixture
def tab(visit):
  value = visit()
  expect(value.locator('#model option')).to_have_count(2)
  return value


def ask(tab, text='Hello'):
  tab.fill('#message', text)
  tab.press('#message', 'Enter')


def answer(tab):
  return tab.locator('.answer').last


def ended(tab):
  """Once an answer is complete it has its count."""
  expect(tab.locator('.actions .count').last).to_be_attached()
  expect(tab.locator('#send')).to_be_visible()


def style(locator, name):
  return locator.evaluate(f"node => getComputedStyle(node)['{name}']")


def test_an_answer_appears_piece_by_piece(tab, server):
  go_on = threading.Event()
  rest = [event(' second'), event('', 'stop'), usage(3, 2), DONE]
  server.replies.append(stream(event('first'), go_on, *rest))
  ask(tab)
  expect(answer(tab)).to_have_text('first')
  expect(tab.locator('#stop')).to_be_visible()
  go_on.set()
  expect(answer(tab)).to_have_text('first second')
  ended(tab)
  expect(tab.locator('.count')).to_contain_text('2 tokens')


def test_characters_cut_between_bytes_arrive_whole(tab, server):
  text = '€ und 你好 👩‍🚀'
  whole = event(text)
  inside = whole.index('你'.encode()) + 1
  go_on = threading.Event()
  parts = [
    whole[:inside],
    go_on,
    whole[inside : inside + 1],
    whole[inside + 1 :],
  ]
  server.replies.append(stream(event('a '), *parts, event('', 'stop'), DONE))
  ask(tab)
  expect(answer(tab)).to_have_text('a')
  go_on.set()
  expect(answer(tab)).to_have_text('a ' + text)


def test_a_stream_of_single_bytes_and_carriage_returns_is_read(tab, server):
  # A comment, CRLF line ends, two data lines of one event: all are SSE.
  sent = (
    ': ping\r\n\r\n'
    'data: {"choices": [{"delta":\r\n'
    'data: {"content": "ä €"}, "finish_reason": "stop"}]}\r\n\r\n'
    'data: [DONE]\r\n\r\n'
  ).encode()
  server.replies.append(stream(*(bytes([byte]) for byte in sent)))
  ask(tab)
  expect(answer(tab)).to_have_text('ä €')
  ended(tab)


def test_stop_leaves_the_server_and_keeps_what_came(tab, server):
  server.replies.append(endless('so far'))
  ask(tab)
  expect(answer(tab)).to_have_text('so far')
  tab.click('#stop')
  assert server.left.wait(pretended.PATIENCE)
  expect(answer(tab)).to_have_text('so far')
  expect(tab.locator('.count')).to_contain_text('stopped')
  expect(tab.locator('.banner.wrong')).to_have_count(0)


def test_escape_stops(tab, server):
  server.replies.append(endless('so far'))
  ask(tab)
  expect(answer(tab)).to_have_text('so far')
  tab.keyboard.press('Escape')
  assert server.left.wait(pretended.PATIENCE)
  expect(tab.locator('#send')).to_be_visible()


@pytest.mark.parametrize('experts', [False, True])
def test_what_a_model_writes_stays_text(tab, server, experts):
  nasty = '<img src=x onerror=document.title="owned"><script>alert(1)</script>'
  part = routed([(nasty, {'q': [1.0]})]) if experts else event(nasty)
  server.replies.append(stream(part, event('', 'stop'), DONE))
  server.models = pretended.models('<b>x</b>')
  ask(tab, '<img src=y onerror=alert(2)>')
  ended(tab)
  expect(answer(tab)).to_have_text(nasty)
  expect(tab.locator('.asked')).to_have_text('<img src=y onerror=alert(2)>')
  assert tab.locator('#turns :is(img, script)').count() == 0
  assert tab.title() == 'moepeft'


def test_markup_cannot_be_set_even_by_a_mistake_in_the_page(tab, complaints):
  # Trusted Types, which the policy asks for.
  wrong = tab.evaluate(
    "() => { try { document.body.innerHTML = '<b>x</b>'; }"
    ' catch (error) { return error.name; } }'
  )
  assert wrong == 'TypeError'
  assert all('TrustedHTML' in item for item in complaints)
  complaints.clear()


def test_enter_sends_and_shift_enter_starts_a_line(tab, server):
  server.replies.append(text_reply('yes'))
  tab.focus('#message')
  tab.keyboard.type('one')
  tab.keyboard.press('Shift+Enter')
  tab.keyboard.type('two')
  assert server.requests == []
  tab.keyboard.press('Enter')
  ended(tab)
  assert server.requests[0]['messages'] == [
    {'role': 'user', 'content': 'one\ntwo'}
  ]
  assert tab.evaluate('document.activeElement.id') == 'message'


def test_an_input_methods_enter_does_not_send(tab, server):
  tab.fill('#message', 'nihao')
  composing = {'key': 'Enter', 'isComposing': True, 'bubbles': True}
  tab.dispatch_event('#message', 'keydown', composing)
  assert tab.input_value('#message') == 'nihao'
  assert tab.locator('.turn').count() == 0


def test_the_conversation_and_the_settings_are_sent(tab, server):
  server.replies.extend([text_reply('first'), text_reply('second')])
  tab.select_option('#model', 'routed')
  tab.click('#show-settings')
  for name, value in {'temperature': '0.5', 'top_p': '', 'seed': '7'}.items():
    tab.fill('#' + name, value)
  tab.fill('#system', 'Be brief.')
  ask(tab, 'one')
  ended(tab)
  ask(tab, 'two')
  expect(answer(tab)).to_have_text('second')
  assert server.requests[1] == {
    'model': 'routed',
    'messages': [
      {'role': 'system', 'content': 'Be brief.'},
      {'role': 'user', 'content': 'one'},
      {'role': 'assistant', 'content': 'first'},
      {'role': 'user', 'content': 'two'},
    ],
    'stream': True,
    'stream_options': {'include_usage': True},
    'temperature': 0.5,
    'max_tokens': 256,
    'seed': 7,
    # The model has experts, which the page shows.
    'routing': 'layers',
    'logprobs': True,
  }


def test_a_setting_out_of_range_is_not_sent(tab, server):
  tab.click('#show-settings')
  tab.fill('#temperature', '3')
  tab.click('#show-settings')
  ask(tab)
  expect(tab.locator('#settings')).to_be_visible()
  assert (tab.input_value('#message'), server.requests) == ('Hello', [])


def test_regenerating_keeps_the_earlier_answer(tab, server):
  server.replies.extend(
    [text_reply('first'), text_reply('second'), error(500, 'broken')]
  )
  ask(tab)
  ended(tab)
  tab.click('text=Regenerate')
  expect(answer(tab)).to_have_text('second')
  ended(tab)
  tab.click('[aria-label="Earlier answer"]')
  expect(answer(tab)).to_have_text('first')
  # One that fails takes nothing away.
  tab.click('text=Regenerate')
  expect(tab.locator('.banner.wrong')).to_contain_text('(500): broken')
  expect(answer(tab)).to_have_text('first')
  expect(tab.locator('.actions')).to_contain_text(['Edit', '1 of 2'])


def test_editing_replaces_the_last_message_and_keeps_the_draft(tab, server):
  server.replies.extend([text_reply('first'), text_reply('second')])
  ask(tab, 'What is one?')
  ended(tab)
  tab.fill('#message', 'a draft')
  tab.click('text=Edit')
  assert tab.input_value('#message') == 'What is one?'
  tab.keyboard.press('Escape')
  assert tab.input_value('#message') == 'a draft'
  tab.click('text=Edit')
  ask(tab, 'What is two?')
  expect(answer(tab)).to_have_text('second')
  expect(tab.locator('.asked')).to_have_text(['What is two?'])
  assert [m['content'] for m in server.requests[1]['messages']] == [
    'What is two?'
  ]
  assert tab.input_value('#message') == 'a draft'


def test_clearing_can_be_undone_and_a_reload_loses_nothing(tab, server):
  server.replies.append(text_reply('kept'))
  ask(tab)
  ended(tab)
  tab.reload()
  expect(answer(tab)).to_have_text('kept')
  tab.click('#clear')
  expect(tab.locator('.turn')).to_have_count(0)
  tab.click('text=Undo')
  expect(answer(tab)).to_have_text('kept')


def test_copying_gives_the_text_as_it_was_written(tab, server):
  tab.context.grant_permissions(['clipboard-read', 'clipboard-write'])
  server.replies.append(text_reply('**bold** `code`'))
  ask(tab)
  ended(tab)
  tab.locator('.actions').get_by_text('Copy').click()
  expect(tab.locator('.actions', has_text='Copied')).to_be_visible()
  copied = tab.evaluate('navigator.clipboard.readText()')
  assert copied == '**bold** `code`'


def test_markdown_is_drawn_and_half_open_blocks_too(tab, server):
  gates = [threading.Event() for _ in range(2)]
  server.replies.append(
    stream(
      event('Some **bo'),
      gates[0],
      event('ld** and 2 * 3\n\n1. one\n   - in it\n2. two\n\n```py\na = "<b>"'),
      gates[1],
      event('\n  b\n```\nafter `x` and __init__'),
      event('', 'stop'),
      DONE,
    )
  )
  ask(tab)
  expect(answer(tab).locator('p strong')).to_have_text('bo')
  gates[0].set()
  expect(answer(tab).locator('pre code')).to_have_text('a = "<b>"')
  expect(answer(tab).locator('p strong')).to_have_text('bold')
  expect(answer(tab).locator('p').first).to_have_text('Some bold and 2 * 3')
  expect(answer(tab).locator('> ol > li')).to_have_count(2)
  expect(answer(tab).locator('ol li ul li')).to_have_text('in it')
  first = answer(tab).locator('p').first.element_handle()
  gates[1].set()
  ended(tab)
  expect(answer(tab).locator('.code .head span')).to_have_text('py')
  assert answer(tab).locator('pre code').inner_text() == 'a = "<b>"\n  b'
  # Python's names are no bold text.
  expect(answer(tab).locator('> p').last).to_have_text('after x and __init__')
  # What had been complete was not drawn anew while it streamed.
  assert first.text_content() == 'Some bold and 2 * 3'


def test_unfinished_marks_of_a_finished_answer_are_what_was_written(
  tab, server
):
  server.replies.append(text_reply('a **b and `c'))
  ask(tab)
  ended(tab)
  expect(answer(tab)).to_have_text('a **b and `c')


def test_screen_readers_hear_each_sentence_once(tab, server):
  go_on = threading.Event()
  parts = [event('One here. Two'), go_on, event(' there. Three')]
  server.replies.append(stream(*parts, event('', 'stop'), DONE))
  ask(tab)
  expect(tab.locator('#live p')).to_have_text(['Answering', 'One here.'])
  go_on.set()
  ended(tab)
  sentences = tab.locator('#live p').all_inner_texts()
  assert ' '.join(sentences[1:-1]) == 'One here. Two there. Three'
  assert sentences[-1] == 'The answer is complete.'
  # The answer itself is no live region: it would be read at every token.
  assert tab.locator('#turns [aria-live]').count() == 0


def test_languages_switch_and_are_remembered(tab, server):
  server.replies.append(text_reply('hi'))
  ask(tab)
  ended(tab)
  tab.click('#language')
  expect(tab.locator('#send')).to_have_text('发送')
  expect(tab.locator('.actions').last).to_contain_text('重新生成')
  assert tab.get_attribute('html', 'lang') == 'zh-CN'
  assert tab.get_attribute('#message', 'placeholder') == '消息'
  tab.reload()
  expect(tab.locator('#send')).to_have_text('发送')


def test_the_browsers_language_is_the_first_one(visit):
  tab = visit(locale='zh-TW')
  expect(tab.locator('#send')).to_have_text('发送')
  expect(tab.locator('#language')).to_have_text('English')


def test_dark_mode_follows_the_system_until_it_is_chosen(visit):
  tab = visit(color_scheme='dark')
  dark, light = 'rgb(23, 25, 28)', 'rgb(251, 251, 250)'
  body = tab.locator('body')
  assert style(body, 'backgroundColor') == dark
  expect(tab.locator('#theme')).to_have_attribute('aria-pressed', 'true')
  tab.click('#theme')
  assert style(body, 'backgroundColor') == light
  tab.reload()
  assert style(body, 'backgroundColor') == light
  expect(tab.locator('#theme')).to_have_attribute('aria-pressed', 'false')


def sites(q, wo):
  return {'self/q': q, 'mlp/wo': wo}


def test_tokens_are_coloured_by_their_strongest_expert(tab, server):
  # Means over the sites: (.45, .55), (.5, .5) whose first is taken, none. At
  # first the last site is shown.
  tokens = [
    ('Red', sites([0.9, 0.1], [0.0, 1.0])),
    (' and', sites([0.2, 0.8], [0.8, 0.2])),
    (' so', None),
  ]
  server.replies.append(
    stream(*(routed([item]) for item in tokens), event('', 'stop'), DONE)
  )
  ask(tab)
  ended(tab)
  words = tab.locator('.token')
  expect(words).to_have_text(['Red', ' and', ' so'])
  expect(words.nth(1)).to_have_class('token expert x1 u1')
  tab.select_option('#site', '')
  expect(words).to_have_class(
    ['token expert x1 u1', 'token expert x0 u0', 'token']
  )
  assert style(words.nth(0), 'textDecorationStyle') == 'dashed'
  item, two, three = (style(words.nth(i), 'backgroundColor') for i in range(3))
  assert len({item, two, three}) == 3
  # (.55 - .5) / .5 = 10 % and 0 % of the way from even to one expert.
  expect(tab.locator('.legend li')).to_have_text(
    [
      'expert 0 50 %',
      'expert 1 50 %',
      'even weights  one expert alone · mean 5 %',
    ]
  )
  tab.select_option('#site', 'self/q')
  expect(words.nth(0)).to_have_class('token expert x0 u0')
  tab.click('#experts')
  expect(words).to_have_count(0)
  expect(answer(tab)).to_have_text('Red and so')


def test_colours_are_of_the_layer_that_is_chosen(tab, server):
  # Two layers with three experts, of which the first layer has two.
  first = {'q': [[0.75, 0.25, None], [0, 0, 1]], 'v': [[1, 0, None], [1, 0, 0]]}
  second = {'q': [[0.5, 0.5, None], [0.1875, 0.625, 0.1875]], 'v': first['v']}
  tokens = [('One', first), (' two', second)]
  server.replies.append(stream(routed(tokens), event('', 'stop'), DONE))
  ask(tab)
  ended(tab)
  tab.select_option('#site', 'q')
  expect(tab.locator('#layer option')).to_have_text(
    ['mean of all layers', 'layer 0', 'layer 1']
  )
  assert tab.input_value('#layer') == '1'
  tab.select_option('#layer', '')
  words = tab.locator('.token')

  def shown():
    strength = "node => node.style.getPropertyValue('--strength')"
    return [
      (word.get_attribute('class')[-5:], word.evaluate(strength))
      for word in words.all()
    ]

  # Means (.375, .125, .5) and (.344, .5625, .094): the roots of .25 =
  # (.5 - 1/3) / (2/3) and of .344 = (.5625 - 1/3) / (2/3).
  assert shown() == [('x2 u2', '0.500'), ('x1 u1', '0.586')]
  tab.select_option('#layer', '0')
  # Of two experts, (.75 - 1/2) / (1/2) = .5; even weights.
  assert shown() == [('x0 u0', '0.707'), ('x0 u0', '0.000')]
  words.nth(0).focus()
  expect(tab.locator('#tip')).to_contain_text('q · layer 0')
  expect(tab.locator('#tip')).to_contain_text('50 % of the way')
  expect(tab.locator('#tip .number')).to_have_text(['0.750', '0.250'])
  tab.select_option('#layer', '1')
  # One expert alone, and the root of (.625 - 1/3) / (2/3) = .4375.
  assert shown() == [('x2 u2', '1.000'), ('x1 u1', '0.661')]
  strong, weak = (style(words.nth(i), 'backgroundColor') for i in range(2))
  assert strong != weak
  # Means of the layer's sites: (.5, 0, .5) and (.594, .3125, .094), the root
  # of .39 = (.594 - 1/3) / (2/3).
  tab.select_option('#site', '')
  assert shown() == [('x0 u0', '0.500'), ('x0 u0', '0.625')]
  assert len(server.requests) == 1


def test_a_model_without_experts_is_not_asked_for_them(visit, server):
  server.models = pretended.models('base', 'other')
  server.replies.append(text_reply('**bold**'))
  tab = visit()
  ask(tab)
  ended(tab)
  assert not {'routing', 'logprobs'} & server.requests[0].keys()
  expect(answer(tab).locator('strong')).to_have_text('bold')
  for hidden in ('#experts', '#sites', '.legend'):
    expect(tab.locator(hidden)).to_be_hidden()


def test_an_answer_elsewhere_than_the_chosen_site_says_so(tab, server):
  for site in ('q', 'v'):
    part = routed([('Hi', {site: [1.0, 0.0]})])
    server.replies.append(stream(part, event('', 'stop'), DONE))
    ask(tab)
    ended(tab)
  tab.select_option('#site', 'v')
  expect(tab.locator('.legend')).to_contain_text(['routed here', 'expert 0'])


def test_weights_are_shown_to_the_mouse_and_to_the_keyboard(tab, server):
  tokens = [('One', {'q': [0.25, 0.75]}), (' two', {'q': [0.625, 0.375]})]
  server.replies.append(stream(routed(tokens), event('', 'stop'), DONE))
  ask(tab)
  ended(tab)
  tab.hover('.token >> nth=0')
  # The strongest first; exp(-0.5) is 0.607.
  expect(tab.locator('#tip .number')).to_have_text(['0.750', '0.250'])
  expect(tab.locator('#tip')).to_contain_text('probability 0.607')
  tab.mouse.move(1, 1)
  expect(tab.locator('#tip')).to_be_hidden()
  # One token is in the tab order, however many there are.
  assert tab.locator('.token[tabindex="0"]').count() == 1
  tab.focus('.token[tabindex="0"]')
  tab.keyboard.press('ArrowRight')
  expect(tab.locator('#tip .number')).to_have_text(['0.625', '0.375'])
  assert tab.evaluate('document.activeElement.textContent') == ' two'
  expect(tab.locator('.token:focus')).to_have_attribute(
    'aria-describedby', 'tip'
  )
  tab.keyboard.press('Escape')
  expect(tab.locator('#tip')).to_be_hidden()


def test_tokens_within_a_character_share_its_colour(tab, server):
  # '€' is three bytes, a token each; the text comes with the last.
  thirds = [('\ufffd', {'q': weights}) for weights in ([1, 0], [0, 1], [0, 1])]
  server.replies.append(
    stream(
      routed([('A', {'q': [1, 0]})]),
      *(routed([third], text='') for third in thirds[:2]),
      routed(thirds[2:] + [(' b', {'q': [1, 0]})], text='€ b'),
      event('', 'stop'),
      DONE,
    )
  )
  ask(tab)
  ended(tab)
  # (1/3, 2/3) is the mean of the three.
  expect(tab.locator('.token')).to_have_text(['A', '€', ' b'])
  expect(tab.locator('.token').nth(1)).to_have_class('token expert x1 u1')
  tab.hover('.token >> nth=1')
  expect(tab.locator('#tip .word')).to_have_count(3)
  expect(tab.locator('#tip .number')).to_have_text(['0.667', '0.333'])


def test_an_answer_without_routed_tokens_says_so(tab, server):
  server.replies.append(stream(routed([('Hi', None)]), event('', 'stop'), DONE))
  ask(tab)
  ended(tab)
  expect(tab.locator('.legend')).to_contain_text('No token of this')
  expect(tab.locator('#sites')).to_be_hidden()


def test_a_model_for_embeddings_is_not_offered(visit, server):
  data = [
    {'id': 'vectors', 'object': 'model', 'type': 'embedding'},
    {'id': 'base', 'object': 'model', 'type': 'language'},
    # Another server says nothing of it.
    {'id': 'other', 'object': 'model'},
  ]
  server.models = json_of({'object': 'list', 'data': data})
  expect(visit().locator('#model option')).to_have_text(['base', 'other'])


def test_a_busy_server_is_asked_again_after_the_time_it_said(tab, server):
  server.replies.append(error(429, 'full', Retry_After='2'))
  server.replies.append(text_reply('at last'))
  ask(tab)
  banner = tab.locator('.turn .banner')
  expect(banner).to_contain_text('busy. Trying again in 2 s')
  expect(banner).to_contain_text('again in 1 s')
  expect(answer(tab)).to_have_text('at last')
  expect(banner).to_have_count(0)
  assert server.requests[0] == server.requests[1]


def test_a_countdown_can_be_cut_short_or_stopped(tab, server):
  server.replies.extend([error(429, 'full', Retry_After='500')] * 2)
  ask(tab)
  tab.click('text=Try now')
  expect(tab.locator('.turn .banner')).to_contain_text('500 s')
  tab.keyboard.press('Escape')
  expect(tab.locator('.turn .banner')).to_contain_text('Stopped')
  server.replies.append(text_reply('again'))
  tab.click('text=Try again')
  expect(answer(tab)).to_have_text('again')
  assert len(server.requests) == 3


def test_a_model_that_starts_is_waited_for(tab, server):
  server.ready = in_turn(error(503, 'starting'), json_of({}))
  server.replies.extend(
    [error(503, 'starting', Retry_After='1'), text_reply('up')]
  )
  ask(tab)
  expect(tab.locator('.turn .banner')).to_contain_text('not ready yet')
  expect(answer(tab)).to_have_text('up')
  expect(tab.locator('.turn .banner')).to_have_count(0)


def test_a_key_is_asked_for_kept_in_the_tab_and_sent(visit, server):
  refusal = error(401, 'no key')
  server.models = in_turn(refusal, refusal, pretended.models('base'))
  tab = visit()
  expect(tab.locator('#key-note')).to_contain_text('kept in this tab only')
  tab.fill('#key', 'wrong')
  tab.press('#key', 'Enter')
  expect(tab.locator('#key-note')).to_contain_text('does not accept')
  tab.fill('#key', 'sesame')
  tab.press('#key', 'Enter')
  expect(tab.locator('#model option')).to_have_text(['base'])
  expect(tab.locator('#key-form')).to_be_hidden()
  server.replies.append(text_reply('open'))
  ask(tab)
  expect(answer(tab)).to_have_text('open')
  assert server.keys == [None, 'Bearer wrong', *['Bearer sesame'] * 2]
  stores = 'JSON.stringify([{...localStorage}, {...sessionStorage}])'
  local, _, session = tab.evaluate(stores).partition('},{')
  assert 'sesame' in session and 'sesame' not in local


def test_a_question_waits_for_a_key_and_is_then_sent(tab, server):
  server.replies.extend([error(401, 'expired'), text_reply('open')])
  ask(tab, 'still here')
  tab.fill('#key', 'sesame')
  tab.press('#key', 'Enter')
  expect(answer(tab)).to_have_text('open')
  assert server.requests[1]['messages'][0]['content'] == 'still here'


def test_a_refusal_is_shown_in_the_servers_words(tab, server):
  server.replies.append(error(400, 'the prompt has 999 tokens'))
  ask(tab)
  banner = tab.locator('.banner.wrong')
  expect(banner).to_contain_text('refused (400): the prompt has 999 tokens')
  expect(tab.locator('#alarm')).to_contain_text('999 tokens')
  # An unanswered question is not sent with the next one.
  server.replies.append(text_reply('fine'))
  ask(tab, 'shorter')
  expect(answer(tab)).to_have_text('fine')
  contents = [m['content'] for m in server.requests[1]['messages']]
  assert contents == ['shorter']


def test_an_error_within_a_stream_is_shown(tab, server):
  wrong = {'error': {'message': 'an answer broke off', 'code': 'internal'}}
  server.replies.append(stream(event('so far'), sse(wrong)))
  ask(tab)
  expect(tab.locator('.banner.wrong')).to_contain_text('an answer broke off')
  expect(answer(tab)).to_have_text('so far')


@pytest.mark.parametrize('broken', [True, False])
def test_a_lost_connection_keeps_what_came(tab, server, broken):
  event_ = threading.Event()
  # A stream that only ends, without saying that it does, is lost as well.
  lost = cut('so far', event_) if broken else stream(event('so far'), event_)
  server.replies.extend([lost, text_reply('whole')])
  ask(tab)
  expect(answer(tab)).to_have_text('so far')
  event_.set()
  expect(tab.locator('.banner.wrong')).to_contain_text('connection was lost')
  expect(answer(tab)).to_have_text('so far')
  tab.click('text=Try again')
  expect(answer(tab)).to_have_text('whole')
  expect(tab.locator('.banner.wrong')).to_have_count(0)


def test_an_unreachable_server_is_said_and_the_question_kept(tab, server):
  tab.context.set_offline(True)
  ask(tab, 'anyone?')
  banner = tab.locator('.turn .banner.wrong')
  expect(banner).to_contain_text('cannot be reached')
  expect(tab.locator('.asked')).to_have_text('anyone?')
  tab.context.set_offline(False)
  server.replies.append(text_reply('here'))
  tab.click('text=Try again')
  expect(answer(tab)).to_have_text('here')


LONG = 'W' * 300


@pytest.mark.parametrize('locale', ['en-US', 'zh-CN'])
def test_a_narrow_screen_scrolls_downwards_only(visit, server, locale):
  server.models = pretended.models('a' * 90, routing=True)
  tab = visit(locale, viewport={'width': 360, 'height': 640})
  tab.click('#show-settings')
  token = (LONG, {'decoder/' + 'x' * 60: [0.5] * 40})
  server.replies.append(stream(routed([token]), event('', 'stop'), DONE))
  ask(tab, LONG)
  ended(tab)
  tab.click('#show-settings')
  server.replies.append(text_reply(f'# {LONG}\n\n```\n{LONG}\n```\n- `{LONG}`'))
  tab.click('#experts')
  ask(tab)
  ended(tab)
  wide = 'Math.max(...[document.documentElement, document.body, main]'
  assert tab.evaluate(wide + '.map((one) => one.scrollWidth))') == 360
  tab.click('#experts')
  assert tab.evaluate(wide + '.map((one) => one.scrollWidth))') == 360


def test_text_from_right_to_left_runs_so(tab, server):
  server.replies.append(text_reply('مرحبا بالعالم\n\nand back'))
  ask(tab, 'שלום')
  ended(tab)
  value = [style(p, 'direction') for p in answer(tab).locator('p').all()]
  assert value == ['rtl', 'ltr']
  assert style(tab.locator('.asked'), 'direction') == 'rtl'


def test_the_keyboard_reaches_everything_in_the_order_it_is_read(tab):
  tab.focus('#model')
  value = []
  for _ in range(6):
    value.append(tab.evaluate('document.activeElement.id'))
    tab.keyboard.press('Tab')
  # Clear is off while there is nothing to clear.
  names = ['model', 'experts', 'show-settings', 'language', 'theme', 'message']
  assert value == names
  tab.keyboard.press('Shift+Tab')
  tab.keyboard.press('Shift+Tab')
  focused = tab.locator('#theme')
  assert style(focused, 'outlineStyle') == 'solid'
  assert re.match('2px', style(focused, 'outlineWidth'))

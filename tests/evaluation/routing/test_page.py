# SPDX-License-Identifier: Apache-2.0
"""The page holds the numbers, needs no network, and can be used."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from moepeft.data.tokenizers.tokenizer import ByteTokenizer
from moepeft.evaluation.routing import page
from moepeft.runs.history import History

from . import planted

RUN = {'path': 'runs/x', 'method': 'm', 'base': 'b', 'step': 7, 'data': 'rows'}
CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')


def element(html, name):
  return re.search(rf'id="{name}">(.*?)</script>', html, re.S)[1]


def log():
  """Two steps; at the last, expert 2 has all weight."""
  return [
    {
      'step': step,
      'routing': {
        planted.PATH: {'weight': [[*share]] * 2, 'entropy': [np.log(3), 0.0]}
      },
    }
    for step, share in ((1, (0.25, 0.25, 0.5)), (5, (0, 0, 1)))
  ]


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """(path, HTML) of the page of the planted model."""
  routing = planted.collected()
  similarity = {planted.PATH: np.broadcast_to(np.eye(3), (2, 3, 3))}
  path = tmp_path_factory.mktemp('page') / 'index.html'
  page.write(
    str(path), RUN, routing, similarity, History(log()), ByteTokenizer()
  )
  return path, path.read_text()


@pytest.fixture(scope='module')
def data(written):
  return json.loads(element(written[1], 'data'))


def test_the_page_has_the_planted_experts(data):
  (site,) = data['sites']
  a, b = site['by_task']
  # Layer 0; see test_collect.
  assert np.argmax(a[0]) == 0 and np.argmax(b[0]) == 2
  assert data['tasks'] == ['a', 'b'] and data['languages'] == ['en', 'zh']
  # 'a' and 'b' occur often enough to be liked, and EOS is liked by expert 1.
  liked = [[token for token, _ in words] for words in site['words'][0]]
  assert liked == [['a'], ['<eos>'], ['b']]
  assert site['similarity'][0] == np.eye(3).tolist()
  assert data['overlap'] == [{'sites': [0], 'values': [[[1]], [[1]]]}]


def test_the_page_has_the_curves_of_the_log(data):
  training = data['training']
  assert training['steps'] == [1, 5]
  site = training['sites'][planted.PATH]
  assert [shares[0] for shares in site['shares']] == [
    [0.25, 0.25, 0.5],
    [0, 0, 1],
  ]
  # ln 3 over ln 3, and 0.
  assert site['entropy'][0] == [1, 0]


def test_no_text_ends_the_element_of_the_data(tmp_path, written):
  routing = planted.collected()
  bad = '</script><b>'
  tokenizer = SimpleNamespace(decode=lambda ids: '', show=lambda ids: bad)
  path = tmp_path / 'index.html'
  page.write(str(path), RUN, routing, {}, History(), tokenizer)
  text, _ = json.loads(element(path.read_text(), 'data'))['texts']
  # Three letters and EOS.
  assert text['inputs'] == [bad] * 4
  count = written[1].count('</script>')
  assert path.read_text().count('</script>') == count


def test_texts_are_left_out_where_the_page_would_be_too_large(monkeypatch):
  def text(task, size):
    return SimpleNamespace(task=task, weights={'x': np.zeros(size)})

  texts = [text('a', 4), text('a', 4), text('b', 5)]
  monkeypatch.setattr(page, '_MAX_BYTES', 9)
  # The first text of every task comes before the second one of any.
  assert page._fitting(texts) == [texts[0], texts[2]]
  monkeypatch.setattr(page, '_MAX_BYTES', 1)
  assert page._fitting(texts) == [texts[0]]


def test_nothing_comes_from_elsewhere(written):
  html = written[1].replace('http://www.w3.org/2000/svg', '')
  assert re.findall(r'(?:https?:)?//[\w-]+\.\w+', html) == []
  assert '@import' not in html and 'url(' not in html
  assert re.findall(r'<(?:img|iframe|object|embed)\b', html) == []
  assert set(re.findall(r'\b(?:src|href)="([^"]*)"', html)) == {'data:,'}
  assert 'innerHTML' not in html


def test_both_languages_have_all_words(written):
  words = json.loads(element(written[1], 'texts-of-page'))
  assert words['en'].keys() == words['zh'].keys()
  for key, english in words['en'].items():
    holes = [sorted(re.findall(r'\{\w+\}', words[k][key])) for k in words]
    assert holes[0] == holes[1], key
    assert english
  script = written[1].rpartition('<script>')[2]
  used = set(re.findall(r"\bt\('(\w+)'", script))
  used |= set(re.findall(r'data-(?:i18n|label)="(\w+)"', written[1]))
  assert used <= words['en'].keys()


@pytest.fixture(scope='module')
def browser():
  api = pytest.importorskip('playwright.sync_api', reason='needs playwright')
  if CHROMIUM is None:
    pytest.skip('needs Chromium')
  switches = ['--headless=new', '--no-sandbox', '--disable-gpu']
  with api.sync_playwright() as running:
    opened = running.chromium.launch(executable_path=CHROMIUM, args=switches)
    yield opened
    opened.close()


@pytest.fixture
def tab(browser, written):
  """The page in a browser without a network; complaints fail the test."""
  context = browser.new_context(locale='en-US', offline=True)
  value = context.new_page()
  complaints = []
  value.on('pageerror', lambda e: complaints.append(str(e)))
  value.on('console', lambda m: complaints.append(m.text))
  value.goto(written[0].as_uri())
  yield value
  context.close()
  assert complaints == []


def cells(tab, section):
  rows = tab.locator(f'#{section} tbody tr')
  return [row.locator('td').all_inner_texts() for row in rows.all()]


def test_a_reader_sees_the_experts_of_each_task(tab):
  # Layer 0 tells more of the task than the random layer 1.
  assert tab.locator('#layer').input_value() == '0'
  a, b, both = cells(tab, 'tasks')
  # As in test_collect: 14 letters and two EOS.
  assert a == ['0.742', '0.129', '0.129']
  assert b[2] > b[0] and len(both) == 3
  names = tab.locator('#tasks th[scope=row]').all_inner_texts()
  assert names == ['a', 'b', 'all']


def test_texts_are_those_of_the_chosen_task(tab):
  names = tab.locator('#texts h3')
  assert names.all_inner_texts() == ['Text 1 · en']
  tab.locator('#task').focus()
  tab.keyboard.press('ArrowDown')
  assert names.all_inner_texts() == ['Text 1 · zh']
  assert tab.locator('#task').evaluate('e => e === document.activeElement')
  # The names of tasks lead there, too.
  tab.locator('#tasks a').first.click()
  assert names.all_inner_texts() == ['Text 1 · en']
  assert (
    tab.locator('#texts h2').bounding_box()['y']
    >= (tab.locator('#where').bounding_box()['height'])
  )


def test_a_part_of_a_character_is_a_mark_beside_it(tab):
  # Three tokens in place of 'a', 'a', 'a'.
  parts = [['中', '中', 'E4'], ['', '中', 'B8'], ['', '', 'AD']]
  tab.evaluate(
    'parts => { DATA.texts[0].inputs.splice(0, 3, ...parts); showTexts() }',
    parts,
  )
  tokens = tab.locator('#texts .token')
  assert tokens.nth(0).inner_text() == '中'
  mark = tokens.nth(1).evaluate("e => getComputedStyle(e, '::before').content")
  assert mark == '"·"'
  assert tokens.nth(2).inner_text() == 'AD'
  tokens.nth(1).hover()
  tip = tab.locator('#tip').inner_text()
  assert '中' in tip and 'part of a character, bytes B8' in tip


def test_liked_parts_and_blanks_can_be_read(tab):
  tab.evaluate(
    'words => { DATA.sites[0].words[0][0] = words; showWords() }',
    [[['', '中 国 …', 'E4'], 0.5], [' ', 0.25], ['\n', 0.2]],
  )
  words = tab.locator('#words tr').first.locator('.words > span')
  assert words.all_inner_texts() == [
    'E4 (中 国 …) 50.0 %',
    '␣ 25.0 %',
    '↵ 20.0 %',
  ]


def test_tokens_have_the_color_of_their_expert(tab):
  tab.locator('#task').select_option('b')
  tokens = tab.locator('#texts article .token')
  kinds = [token.get_attribute('class') for token in tokens.all()]
  assert kinds[:2] == ['token expert x2 u2'] * 2
  tokens.first.focus()
  assert '0.80' in tab.locator('#tip').inner_text()
  tab.keyboard.press('ArrowRight')
  assert tokens.nth(1).evaluate('e => e === document.activeElement')
  assert tokens.nth(1).get_attribute('aria-describedby') == 'tip'


def test_site_layer_language_and_theme_can_be_chosen(tab):
  before = cells(tab, 'tasks')
  tab.locator('#overview tbody button').nth(1).click()
  assert tab.locator('#layer').input_value() == '1'
  assert cells(tab, 'tasks') != before
  tab.locator('#language').click()
  assert tab.locator('html').get_attribute('lang') == 'zh-CN'
  assert '各任务的专家' in tab.locator('#tasks h2').inner_text()
  color = 'getComputedStyle(document.body).backgroundColor'
  light = tab.evaluate(color)
  tab.locator('#theme').click()
  assert tab.evaluate(color) != light


def test_a_long_name_of_a_task_leaves_room_for_the_numbers(tab):
  tab.set_viewport_size({'width': 400, 'height': 800})
  name = 'dataset_name_without_a_space/' * 3
  tab.evaluate(
    'name => { DATA.tasks[0] = DATA.texts[0].task = TASKS[0] = name;'
    ' showTasks() }',
    name,
  )
  tab.locator('#layer').select_option('1')
  assert name in tab.locator('#tasks').text_content()
  assert name in tab.locator('#texts').text_content()
  assert tab.evaluate('document.documentElement.scrollWidth') == 400
  first = tab.locator('#tasks tbody td').first.bounding_box()
  assert first['x'] + first['width'] < 400

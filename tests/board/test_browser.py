# SPDX-License-Identifier: Apache-2.0
"""The board in a browser, from the form of a run to its export."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from tests import ROOT
from tests.board.planted import SITES, make_run

api = pytest.importorskip('playwright.sync_api', reason='needs playwright')
CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(CHROMIUM is None, reason='needs Chromium'),
]
expect = api.expect
SWITCHES = ['--headless=new', '--no-sandbox', '--disable-gpu', '--no-first-run']
# Milliseconds: for the page, and for what imports and compiles.
PATIENCE, LONG = 20_000, 400_000
MORE = """
data.inputs_length = 40
data.targets_length = 8
model.dropout = 0.0
evaluation.before = False
evaluation.after = False
checkpoint.every_steps = 20
log.every_steps = 2
log.plots = False
log.trackers =
""".strip()
STEPS = 300


@contextlib.contextmanager
def serving(workdirs, *flags):
  """The address of a board, which ends with its chat servers."""
  command = [sys.executable, '-m', 'moepeft.board', '--port=0']
  process = subprocess.Popen(
    [*command, f'--workdirs={workdirs}', *flags],
    cwd=workdirs.parent,
    env=os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)},
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    yield re.fullmatch(r'board  (http\S+)\n', process.stdout.readline())[1]
  finally:
    process.send_signal(signal.SIGTERM)
    process.wait(30)


@pytest.fixture(scope='module')
def browser():
  expect.set_options(timeout=PATIENCE)
  with api.sync_playwright() as running:
    opened = running.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
    yield opened
    opened.close()


@contextlib.contextmanager
def visiting(browser, url, locale='en-US', **options):
  """A tab with the page; what the browser complains of fails the test."""
  complaints = []
  context = browser.new_context(
    locale=locale, **{'viewport': {'width': 1100, 'height': 800}} | options
  )
  tab = context.new_page()
  tab.set_default_timeout(PATIENCE)
  tab.on('pageerror', lambda e: complaints.append(str(e)))
  tab.on('console', lambda m: complaints.append(m.text))
  tab.goto(url)
  yield tab
  context.close()
  # A status that is an error is logged by the browser itself.
  left = [c for c in complaints if 'Failed to load resource' not in c]
  assert left == []


@pytest.fixture(scope='module')
def planted(tmp_path_factory):
  """The address of a board with two runs, of which none was trained."""
  folder = tmp_path_factory.mktemp('board') / 'runs'
  make_run(folder / 'first')
  make_run(folder / 'second', last=3, seed=7)
  with serving(folder) as url:
    yield url


def badge(tab):
  return tab.locator('#run-head .badge')


def fact(tab, name):
  row = tab.locator('.facts div', has=tab.get_by_text(name, exact=True))
  return row.locator('dd')


def test_a_run_is_started_stopped_resumed_asked_and_exported(browser, tmp_path):
  folder = tmp_path / 'runs'
  with (
    serving(folder) as url,
    visiting(browser, url) as tab,
  ):
    start(tab)
    watch_and_stop(tab, folder)
    # A board that is started again knows the run.
    with (
      serving(folder) as second_url,
      visiting(browser, f'{second_url}#/run/tiny') as second_tab,
    ):
      expect(badge(second_tab)).to_have_text('stopped')
    resume(tab, folder)
    look_at_routers(tab)
    look_at_data(tab)
    ask(tab)
    export(tab, folder)


def start(tab):
  expect(tab.locator('#view')).to_contain_text('There are no runs here yet')
  tab.click('#to-new')
  tab.select_option('#preset', '')
  tab.fill('#f-name', 'tiny')
  tab.fill('#f-method', 'molora(experts=3, rank=2')
  wrong = tab.locator('#check .wrong')
  expect(wrong).to_contain_text('molora(experts=3', timeout=LONG)
  expect(tab.locator('#start')).to_be_disabled()
  tab.fill('#f-method', 'molora(experts=3, rank=2)')
  tab.fill('#f-steps', str(STEPS))
  tab.fill('#f-batch_size', '4')
  tab.fill('#more', MORE)
  command = tab.locator('#command')
  expect(command).to_contain_text('-m moepeft.train --config', timeout=LONG)
  expect(tab.locator('#card')).to_contain_text('c.batch_size = 4')
  tab.click('#start', timeout=LONG)


def watch_and_stop(tab, folder):
  expect(badge(tab)).to_have_text('running', timeout=LONG)
  expect(tab.locator('#charts figure').first).to_be_visible(timeout=LONG)
  expect(fact(tab, 'Loss')).not_to_have_text('–')
  expect(fact(tab, 'Checkpoint at step')).not_to_have_text('–', timeout=LONG)
  tab.click('#stop')
  expect(badge(tab)).to_have_text('stopped', timeout=LONG)
  assert not (folder / 'tiny' / 'summary.json').exists()
  tab.click('#tab-log')
  expect(tab.locator('#log')).to_contain_text('stopped by SIGTERM after step')


def resume(tab, folder):
  step = int(re.search(r'after step (\d+)', tab.inner_text('#log'))[1])
  assert 0 < step < STEPS
  tab.click('#resume')
  expect(badge(tab)).to_have_text('running')
  expect(badge(tab)).to_have_text('finished', timeout=LONG)
  expect(fact(tab, 'Progress')).to_have_text(f'step {STEPS} of {STEPS}')
  # It went on, and did not begin anew.
  rows = (folder / 'tiny' / 'metrics.jsonl').read_text().splitlines()
  assert len([row for row in rows if '"loss"' in row]) == STEPS
  assert f'step {step - step % 2 + 2}' in tab.inner_text('#log')
  assert 'step 2/' not in tab.inner_text('#log')


def look_at_routers(tab):
  tab.click('#tab-routers')
  expect(tab.locator('#router canvas')).to_be_visible(timeout=LONG)
  expect(tab.locator('#router .heat tbody tr')).to_have_count(2)
  tab.click('#measure')
  table = tab.locator('#tasks .heat tbody tr')
  expect(table.first).to_be_visible(timeout=LONG)
  expect(tab.locator('#tasks thead th')).to_have_text(
    ['expert 0', 'expert 1', 'expert 2']
  )
  with tab.context.expect_page() as opened:
    tab.click('#report')
  expect(opened.value.locator('#overview h2')).to_be_visible()


def look_at_data(tab):
  tab.click('#tab-data')
  mark = tab.locator('.example mark').first
  expect(mark).to_contain_text('<eos>', timeout=LONG)


def ask(tab):
  tab.click('#tab-chat')
  tab.click('#load')
  expect(tab.locator('#ask')).to_be_visible(timeout=LONG)
  tab.fill('#max_tokens', '5')
  tab.fill('#message', 'The film was a joy to watch.')
  tab.press('#message', 'Enter')
  for model in ('run', 'base'):
    answer = tab.locator(f'.answer.{model}')
    expect(answer).to_have_text(re.compile(r'\S'), timeout=LONG)
  tab.click('#unload')
  expect(tab.locator('#load')).to_be_visible(timeout=LONG)


def export(tab, folder):
  tab.click('#tab-export')
  tab.select_option('#format', 'peft')
  tab.click('#do-export')
  # A mixture is none of peft's methods: a sentence, no traceback.
  expect(tab.locator('#export-state .wrong')).to_be_visible(timeout=LONG)
  expect(tab.locator('#export-state .wrong')).not_to_contain_text('Traceback')
  tab.select_option('#format', 'moepeft')
  tab.click('#do-export')
  banner = tab.locator('#export-state .banner:not(.wrong)')
  expect(banner).to_contain_text('tiny/export/moepeft', timeout=LONG)
  assert (folder / 'tiny/export/moepeft/adapter.safetensors').exists()


def test_runs_are_found_opened_and_compared_by_keyboard(browser, planted):
  with visiting(browser, planted) as tab:
    expect(tab.locator('tbody tr')).to_have_count(2)
    tab.fill('#filter', 'sec')
    expect(tab.locator('tbody tr')).to_have_count(1)
    tab.fill('#filter', '')
    for name in ('second', 'first'):
      tab.get_by_label(f'Compare {name}', exact=True).focus()
      tab.keyboard.press('Space')
    expect(tab.locator('#to-compare')).to_have_text('Compare (2)')
    tab.focus('#to-compare')
    tab.keyboard.press('Enter')
    legend = tab.locator('#compared figure').first.locator('.legend li')
    # The run that changed last comes first.
    expect(legend).to_have_text(['second', 'first'])
    cells = tab.locator('#compared-table tr', has_text='seed').locator('td')
    expect(cells).to_have_text(['seed', '7', '0'])
    tab.goto(f'{planted}#/run/first')
    chart = tab.locator('#charts svg').first
    chart.focus()
    tab.keyboard.press('Home')
    at = tab.locator('#charts .at').first
    expect(at).to_have_text('Step 1: 3.000')
    tab.keyboard.press('ArrowRight')
    expect(at).to_have_text('Step 2: 1.500')
    tab.focus('#tab-curves')
    tab.keyboard.press('ArrowRight')
    expect(tab.locator('#tab-routers')).to_be_focused()
    expect(tab.locator('#site option')).to_have_count(len(SITES))
    expect(tab.locator('#router td.dead')).to_have_count(1)


def test_a_field_fills_what_a_config_leaves_to_the_user(browser, planted):
  with visiting(browser, f'{planted}#/new') as tab:
    tab.select_option('#preset', 'sft')
    expect(tab.locator('#more')).to_have_value(
      re.compile('^model.path = $', re.M)
    )
    tab.fill('[id="f-model.path"]', '/etc/model')
    wrong = tab.locator('#check .wrong')
    expect(wrong).to_contain_text(
      "config.model.path='/etc/model'", timeout=LONG
    )
    tab.fill('#more', 'model.path = smollm2')
    expect(wrong).to_contain_text('model.path stands in a field and in a line')


def test_the_page_speaks_chinese_and_has_a_dark_mode(browser, planted):
  color = 'getComputedStyle(document.body).backgroundColor'
  with visiting(browser, planted, 'zh-CN', color_scheme='dark') as tab:
    expect(tab.locator('h2')).to_contain_text('中的运行')
    expect(tab.locator('.badge').first).to_have_text('已停止')
    assert tab.evaluate(color) == 'rgb(23, 25, 28)'
    tab.click('#theme')
    assert tab.evaluate(color) == 'rgb(251, 251, 250)'
    tab.click('#language')
    expect(tab.locator('.badge').first).to_have_text('stopped')
    tab.reload()
    expect(tab.locator('.badge').first).to_have_text('stopped')
    assert tab.evaluate(color) == 'rgb(251, 251, 250)'


def test_a_narrow_screen_needs_no_scrolling_aside(browser, planted):
  pages = ['', '#/new', '#/compare', '#/run/first', '#/run/first/routers']
  narrow = {'width': 390, 'height': 800}
  for locale in ('en-US', 'zh-CN'):
    with visiting(browser, planted, locale, viewport=narrow) as tab:
      for page in pages:
        tab.goto(f'{planted}{page}')
        tab.wait_for_load_state('networkidle')
        expect(tab.locator('#view > *').first).to_be_visible()
        assert tab.evaluate('document.documentElement.scrollWidth') <= 390, page


def test_text_of_a_run_stays_text(browser, tmp_path):
  nasty = '<img src=x onerror=alert(1)>'
  make_run(tmp_path / 'runs' / 'a', **{'data.system_prompt': nasty})
  with (
    serving(tmp_path / 'runs') as url,
    visiting(browser, f'{url}#/run/a/config') as tab,
  ):
    expect(tab.locator('td.value', has_text='onerror')).to_have_text(nasty)
    assert tab.locator('#view img').count() == 0


def test_a_board_with_keys_asks_for_one(browser, tmp_path):
  make_run(tmp_path / 'runs' / 'a')
  (tmp_path / 'keys').write_text('secret\n')
  flag = f'--api_key_file={tmp_path / "keys"}'
  with serving(tmp_path / 'runs', flag) as url, visiting(browser, url) as tab:
    expect(tab.locator('#key-form')).to_be_visible()
    tab.fill('#key', 'wrong')
    tab.press('#key', 'Enter')
    expect(tab.locator('#key-form')).to_be_visible()
    tab.fill('#key', 'secret')
    tab.press('#key', 'Enter')
    expect(tab.locator('tbody tr')).to_have_count(1)
    expect(tab.locator('#key-form')).to_be_hidden()

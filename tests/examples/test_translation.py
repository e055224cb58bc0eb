# SPDX-License-Identifier: Apache-2.0
"""Translations lose no text, take three steps, and have sacrebleu's score."""

import json
import random
import string

import pytest

pytest.importorskip('openai')
sacrebleu = pytest.importorskip('sacrebleu')

from examples.translation import chunks, evaluate, translate  # noqa: E402
from moepeft.agent.flags import run_command  # noqa: E402
from tests.agent.scripted import NAME, refuses, serving, text_reply  # noqa: E402

TEXT = """\
# A title

The first sentence is short. The second one asks: is it? It is! (Yes.)
A second line of the paragraph.

第一句话。第二句话！第三句话？

A last paragraph, which has no end
"""


def command(module, script, *arguments):
  """Runs a command on a scripted server."""
  flags = ('--source=English', '--target=Chinese', f'--base_url={script.url}')
  argv = [*map(str, arguments), *flags, f'--model={NAME}']
  try:
    run_command(module.make_parser(), module.main, argv)
  except SystemExit as e:
    if e.code:
      raise


def prompts_of(script):
  return [request['messages'][0]['content'] for request in script.requests]


@pytest.mark.parametrize('limit', (1, 7, 20, 60, 100, 10_000))
def test_chunks_are_the_text_and_within_the_limit(limit):
  pieces = chunks.split(TEXT, limit)
  assert ''.join(pieces) == TEXT
  assert all(0 < len(piece) <= limit for piece in pieces)


def test_chunks_of_any_text_are_the_text():
  draw = random.Random(7)
  letters = 'ab c.!?。！ \t\n\r\n\n\n"）)😀é'
  for _ in range(500):
    text = ''.join(draw.choices(letters, k=draw.randrange(80)))
    limit = draw.randrange(1, 30)
    pieces = chunks.split(text, limit)
    assert ''.join(pieces) == text
    assert all(0 < len(piece) <= limit for piece in pieces)


def test_chunks_end_with_paragraphs_then_sentences_then_words():
  # Four paragraphs, of 11, 104, 17 and 35 characters.
  assert chunks.split(TEXT, 120) == [
    '# A title\n\n'
    'The first sentence is short. The second one asks: is it? It is! (Yes.)\n'
    'A second line of the paragraph.\n\n',
    '第一句话。第二句话！第三句话？\n\nA last paragraph, which has no end\n',
  ]
  assert chunks.split('One, two. Three four.', 12) == [
    'One, two. ',
    'Three four.',
  ]
  assert chunks.split('一二三。四五六。七', 5) == ['一二三。', '四五六。七']
  assert chunks.split('one two three', 8) == ['one two ', 'three']


def test_translations_take_the_place_of_their_chunks():
  pieces = chunks.split('  A b.\n\nC d. E f.\r\n', 10)
  assert pieces == ['  A b.\n\n', 'C d. ', 'E f.\r\n']
  assert chunks.join(pieces, ['x', 'y', 'z']) == '  x\n\ny z\r\n'
  # Chinese has no space between sentences, English has one.
  assert chunks.join(['A b. ', 'C d.'], ['甲。', '乙。']) == '甲。乙。'
  assert chunks.join(['甲。', '乙。\n'], ['A.', 'B.']) == 'A. B.\n'
  assert chunks.join(['A\n\n', 'B'], ['甲', '乙']) == '甲\n\n乙'


def test_draft_reflection_and_improvement_are_requests_of_their_own(
  tmp_path, capsys
):
  file = tmp_path / 'text.txt'
  file.write_text('One two.\n\nThree four.\n')
  log = tmp_path / 'log.jsonl'
  replies = ('草稿一', '“草稿”不好', '改稿一', '草稿二', 'OK')
  with serving(*map(text_reply, replies)) as script:
    command(translate, script, file, '--chunk_chars=12', f'--log={log}')
    prompts = prompts_of(script)
  # The second draft has no fault, so that it is not improved.
  assert len(script.requests) == 5
  assert capsys.readouterr().out == '改稿一\n\n草稿二\n'
  assert '<text>\nOne two.\n</text>' in prompts[0]
  assert '<after>\nThree four.\n' in prompts[0]
  assert '<before>\nOne two.\n' in prompts[3]
  assert '<translation>\n草稿一\n' in prompts[1]
  assert '<review>\n“草稿”不好\n' in prompts[2]
  rows = [json.loads(line) for line in log.read_text().splitlines()]
  assert rows[0] == {
    'source': 'One two.',
    'draft': '草稿一',
    'notes': ['“草稿”不好'],
    'improvements': ['改稿一'],
    'cut': [],
  }
  assert rows[1]['improvements'] == []


def test_rounds_improve_the_last_improvement(tmp_path, capsys):
  file = tmp_path / 'text.txt'
  file.write_text('One')
  replies = ('a', 'bad a', 'b', 'bad b', 'c')
  with serving(*map(text_reply, replies)) as script:
    command(translate, script, file, '--rounds=2', '--prompts=zh')
    prompts = prompts_of(script)
  assert capsys.readouterr().out == 'c\n'
  assert '<translation>\nb\n' in prompts[3] and '译成Chinese' in prompts[0]
  with serving(text_reply('a')) as script:
    command(translate, script, file, '--rounds=0')
  assert len(script.requests) == 1


def test_text_of_a_prompt_s_form_is_taken_as_it_is(tmp_path, capsys):
  file = tmp_path / 'text.txt'
  file.write_text('It costs $5, $text and {draft}; 100 %s.')
  with serving(text_reply('$draft')) as script:
    command(translate, script, file)
    prompts = prompts_of(script)
  assert 'It costs $5, $text and {draft}; 100 %s.' in prompts[0]
  assert '<translation>\n$draft\n' in prompts[1]


def test_a_cut_answer_is_named(tmp_path, capsys):
  file = tmp_path / 'text.txt'
  file.write_text('One')
  with serving(text_reply('a', 'length')) as script:
    command(translate, script, file, '--rounds=0', '--max_tokens=3')
  assert script.requests[0]['max_tokens'] == 3
  error = capsys.readouterr().err
  assert 'cut at the limit of tokens: translate' in error
  assert '1 of 1 chunks' in error


def test_prompts_of_both_languages_have_the_same_values():
  english, chinese = map(translate.read_prompts, ('en', 'zh'))
  for step in translate.STEPS:
    values = english[step].get_identifiers()
    assert set(values) == set(chinese[step].get_identifiers())
    assert {'source', 'target', 'text', 'before', 'after'} <= set(values)
    assert isinstance(english[step], string.Template)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--rounds=-1'], '--rounds is at least 0'),
    (['--chunk_chars=0'], '--chunk_chars is at least 1'),
    (['--output={file}'], 'exists; choose another name'),
    (['--output=nowhere/x'], 'make its folder first'),
  ],
)
def test_a_wrong_flag_is_one_sentence(tmp_path, capsys, arguments, message):
  file = tmp_path / 'text.txt'
  file.write_text('One')
  with serving(text_reply('a')) as script, pytest.raises(SystemExit) as error:
    command(translate, script, file, *(a.format(file=file) for a in arguments))
  assert error.value.code == 2 and script.requests == []
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1 and message in lines[0]


def test_a_refusal_of_the_server_names_the_chunk(tmp_path, capsys):
  file = tmp_path / 'text.txt'
  file.write_text('One')
  with (
    serving(refuses(400, 'the prompt is too long')) as script,
    pytest.raises(SystemExit),
  ):
    command(translate, script, file)
  error = capsys.readouterr().err
  assert 'chunk 1 of 1' in error and 'the prompt is too long' in error


def test_bleu_of_drafts_and_improvements_is_sacrebleus(tmp_path, capsys):
  rows = [
    {'source': 'The cat sleeps.', 'target': '这只猫正在睡觉。'},
    {'source': 'I like tea very much.', 'target': '我非常喜欢喝茶。'},
  ]
  file, output = tmp_path / 'rows.jsonl', tmp_path / 'out.jsonl'
  file.write_text('\n'.join(json.dumps(row) for row in rows))
  replies = ('猫睡觉。', '不自然', '这只猫在睡觉。', '我非常喜欢茶。', 'OK')
  with serving(*map(text_reply, replies)) as script:
    command(evaluate, script, file, f'--output={output}')
  shown = capsys.readouterr().out
  targets = [[row['target'] for row in rows]]
  drafts = ['猫睡觉。', '我非常喜欢茶。']
  improved = ['这只猫在睡觉。', '我非常喜欢茶。']
  for name, texts in (('drafts:  ', drafts), ('improved:', improved)):
    score = sacrebleu.corpus_bleu(texts, targets, tokenize='zh').score
    assert f'BLEU of the {name} {score:.2f}' in shown
  assert 'changed by the improvement: 1 of 2 rows' in shown
  assert 'tok:zh' in shown and 'p of the difference:' in shown
  stored = [json.loads(line) for line in output.read_text().splitlines()]
  assert [row['draft'] for row in stored] == drafts
  assert [row['improved'] for row in stored] == improved


def test_rows_that_all_improve_differ_and_equal_rows_do_not(tmp_path, capsys):
  targets = [f'the cat number {i} sleeps on the mat' for i in range(20)]
  drafts = [f'cat number {i} on mat' for i in range(20)]
  p = evaluate.significance(drafts, targets, targets, '13a')
  assert p < 0.01
  file = tmp_path / 'rows.jsonl'
  file.write_text('{"source": "One", "target": "一"}')
  with serving(text_reply('一'), text_reply('OK')) as script:
    command(evaluate, script, file)
  assert 'p of the difference:  none, as there is none' in (
    capsys.readouterr().out
  )


@pytest.mark.parametrize(
  'line', ['{', '[]', '{"source": "a"}', '{"source": "a", "target": " "}']
)
def test_a_line_that_is_no_row_is_named(tmp_path, line):
  file = tmp_path / 'rows.jsonl'
  file.write_text('{"source": "a", "target": "b"}\n' + line)
  with pytest.raises(ValueError, match='line 2: expected'):
    evaluate.read_rows(str(file))


def test_the_shipped_rows_are_rows():
  rows = evaluate.read_rows(str(translate.PROMPTS.parent / 'rows.jsonl'))
  assert len(rows) == 12
  assert len({row['source'] for row in rows}) == len(rows)

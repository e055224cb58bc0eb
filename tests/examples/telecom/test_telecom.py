# SPDX-License-Identifier: Apache-2.0
"""Training pairs are of another year than the questions of the evaluation."""

import json

import pytest

pytest.importorskip('openai')

from examples.telecom import data, evaluate  # noqa: E402

from .. import hashing_server  # noqa: E402


def test_tariffs_of_two_years_have_the_same_names_and_other_facts():
  training, current = data.tariffs('training'), data.tariffs('current')
  assert training.facts.keys() == current.facts.keys()
  pairs = [
    (training.facts[name][key], current.facts[name][key])
    for name in training.facts
    for key in training.facts[name].keys() & current.facts[name].keys()
  ]
  assert sum(a == b for a, b in pairs) < len(pairs) / 10


def test_pairs_on_tariffs_have_the_answer_in_a_passage():
  for text, answer in data.pairs(100, seed=1):
    value = answer.removeprefix('Gladly: ').removesuffix('.')
    if value not in data.CODES.values():
      *passages, _ = text.split('\n\n')
      assert any(value in passage for passage in passages)


def test_no_document_has_a_code_and_no_pair_its_held_out_wording():
  documents = ' '.join(data.tariffs('current').files.values())
  assert not any(code in documents for code in data.CODES)
  held_out = {
    q.text for q in data.code_questions([data.HELD_OUT_CODE_QUESTION])
  }
  assert not any(q in text for text, _ in data.pairs(200, 0) for q in held_out)


def test_pairs_are_conversations_that_training_reads(tmp_path, capsys):
  path = tmp_path / 'pairs.jsonl'
  data.main([f'--output={path}', '--pairs=7'])
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert len(rows) == 7
  from moepeft.data.chat.formats import parse_conversation

  for row in rows:
    turns = parse_conversation(row).turns
    assert [turn.role for turn in turns] == ['user', 'assistant']


def test_four_systems_are_measured(capsys):
  def chat(body):
    text = body['messages'][-1]['content']
    if body['model'] == 'telecom':
      for code, answer in data.CODES.items():
        if code in text:
          return data.reply(answer)
    return text.partition('\n\nQuestion')[0]

  with hashing_server.serving(chat) as server:
    flags = [*server.flags(), '--model=base', '--questions=6', '--k=3']
    evaluate.main(flags)
  rows = {}
  for line in capsys.readouterr().out.splitlines():
    if line.startswith(('| base', '| telecom')):
      _, name, retrieval, *shares, _ = map(str.strip, line.split('|'))
      rows[name, retrieval] = [float(share) for share in shares]
  # Codes are the adapter's alone; tariffs are in passages alone.
  assert rows['base', 'no'] == [0, 0] and rows['base', 'yes'][1] == 0
  assert rows['telecom', 'no'] == [0, 1] and rows['telecom', 'yes'][1] == 1
  assert rows['telecom', 'yes'][0] == rows['base', 'yes'][0] > 0

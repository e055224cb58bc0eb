# SPDX-License-Identifier: Apache-2.0
"""Training pairs are of another year than the questions of the evaluation."""

import json

import pytest

pytest.importorskip('openai')

from examples.telecom import data, evaluate  # noqa: E402

from .. import hashing_server  # noqa: E402


def test_tariffs_of_two_years_have_the_same_names_and_other_facts():
  past, current = data.tariffs(1), data.tariffs(data.CURRENT_YEAR)
  assert data.CURRENT_YEAR not in data.TRAINING_YEARS
  assert past.facts.keys() == current.facts.keys()
  pairs = [
    (past.facts[name][key], current.facts[name][key])
    for name in past.facts
    for key in past.facts[name].keys() & current.facts[name].keys()
  ]
  assert sum(a == b for a, b in pairs) < len(pairs) / 10


def test_pairs_on_tariffs_have_the_answer_before_the_question():
  pairs = list(data.pairs(200, seed=1))
  reading = [(t, a) for t, a in pairs if a not in data.CODES.values()]
  assert len(reading) == 100
  assert all(answer in text for text, answer in reading)
  assert all(text.count('Tariff ') == 2 for text, _ in reading)
  codes = [text for text, a in pairs if a in data.CODES.values()]
  assert {text.count('Tariff ') for text in codes} == {0, 2}


def test_no_document_has_a_code_and_no_pair_its_held_out_wording():
  documents = ' '.join(data.tariffs(data.CURRENT_YEAR).files.values())
  assert not any(code in documents for code in data.CODES)
  held_out = data.code_questions([data.HELD_OUT_CODE_QUESTION])
  texts = [text for text, _ in data.pairs(200, 0)]
  assert not any(q.text in text for text in texts for q in held_out)


def test_pairs_are_rows_that_training_reads(tmp_path, capsys):
  path = tmp_path / 'pairs.jsonl'
  data.main([f'--output={path}', '--pairs=7'])
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert [(r['inputs'], r['targets']) for r in rows] == [*data.pairs(7, seed=0)]


def test_four_systems_are_measured(capsys):
  tariffs = data.tariffs(data.CURRENT_YEAR)
  by_text = {q.text: q for q in tariffs.questions if q.answer}

  def complete(prompt, model):
    for code, answer in data.CODES.items():
      if model == 'telecom' and code in prompt:
        return answer
    for text, question in by_text.items():
      if prompt.endswith(text) and question.sentence in prompt:
        return question.answer
    return 'I do not know'

  def chat(body):
    choices = [
      {
        'index': i,
        'text': complete(prompt, body['model']),
        'finish_reason': 'stop',
      }
      for i, prompt in enumerate(body['prompt'])
    ]
    return {'id': 'x', 'object': 'text_completion', 'choices': choices}

  with hashing_server.serving(chat, ('base', 'telecom')) as server:
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


def test_a_server_without_the_adapter_is_refused_before_any_question():
  with hashing_server.serving(lambda body: '') as server:
    with pytest.raises(ValueError, match="no adapter 'telecom', only scripted"):
      evaluate.main(server.flags())
  assert server.requests == []

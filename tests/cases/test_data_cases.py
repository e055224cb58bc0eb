# SPDX-License-Identifier: Apache-2.0
"""The data among the failing inputs of ../shared/cases, as they should be.

The same claims stand without the folder in tests/data.
"""

import pytest

from moepeft import config as config_lib
from moepeft.data import load_tokenizer, open_data, preview
from moepeft.data.batching.collators import Seq2SeqCollator
from moepeft.data.batching.decoder_only import CausalCollator
from moepeft.data.preference import dataset as preference_dataset
from moepeft.data.readers import jsonl_rows
from moepeft.objectives import OBJECTIVES
from tests import ROOT

CASES = ROOT.parent / 'shared' / 'cases'
MODEL = str(CASES / 'tiny_model')
LENGTH = 256
pytestmark = pytest.mark.skipif(
  not CASES.is_dir(), reason='needs the folder ../shared/cases'
)


def data_of(source, path, **changes):
  data = config_lib.default().data
  data.source, data.path = source, str(CASES / path)
  data.length, data.validation_fraction = LENGTH, 0.0
  data.update(changes)
  return data


def conversation(path, **changes):
  """(the first row's text, what is trained in brackets; the notes)."""
  words = load_tokenizer('', MODEL)
  collator = CausalCollator(words, LENGTH)
  source = open_data(data_of('chat', path, **changes), 0, collator=collator)
  batch = collator.pad(collator.encode([source.train[0]]))
  return preview.row_lines(batch, 0, words, False)[-1], source.notes


def preference(path, objective):
  """(the first row's sides as texts, the notes)."""
  words = load_tokenizer('', MODEL)
  data = data_of('preference', path)
  collator = preference_dataset.objective_collator(
    data, objective, OBJECTIVES[objective].batch, CausalCollator(words, LENGTH)
  )
  source = open_data(data, 0, collator=collator)
  batch = collator.pad([source.train[0]])
  sides = []
  for side in collator.sides:
    part = {k.removeprefix(side): v for k, v in batch.items()}
    sides.append(preview.row_lines(part, 0, words, False)[-1])
  return sides, source.notes


def examples(source, path, **changes):
  opened = open_data(data_of(source, path, **changes), 0)
  return opened.rows, opened.notes


def test_004_a_prompt_that_is_given_three_times_is_there_once():
  (chosen, rejected), notes = preference('004/pairs.jsonl', 'dpo')
  for text in (chosen, rejected):
    assert text.count('Name a fruit') == 1 == text.count('<|im_start|>user')
  assert chosen.count('A ripe mango') == 1 and 'mango' not in rejected
  assert 'prompt_id, messages, score_chosen, score_rejected' in notes[-1]


@pytest.mark.parametrize('name', ['loss', 'weight'])
def test_057_a_turn_that_is_marked_is_not_trained(name):
  text, _ = conversation(f'057/{name}.jsonl')
  assert 'WRONG.<|im_end|>' in text and '[WRONG' not in text
  assert '[Right.<|im_end|>]' in text


def test_051_a_legacy_call_is_trained():
  text, _ = conversation('051/legacy_call.jsonl')
  call = (
    '<tool_call>{"name": "weather", "arguments": {"town": "X"}}</tool_call>'
  )
  assert f'[Let me look.\n  {call}<|im_end|>]' in text
  assert '{"name": "weather", "parameters"' in text


def test_052_images_are_refused():
  with pytest.raises(ValueError, match="line 1: the row has 'images', which"):
    conversation('052/images.jsonl')


def test_065_functions_are_used_and_a_query_is_refused():
  text, _ = conversation('065/functions_key.jsonl')
  assert '{"name": "now", "description": "tells time"' in text
  with pytest.raises(ValueError, match="line 1: the row has 'query', which is"):
    conversation('065/alpaca_query.jsonl')
  text, notes = conversation('065/alpaca_query.jsonl', ignore_fields='query')
  assert 'IMPORTANT' not in text and notes[-1].endswith('nothing reads: query')


def test_065g_prompts_and_completions_are_read(tmp_path):
  path = tmp_path / 'r.jsonl'
  path.write_text('{"prompt": "q?", "completion": "a."}\n' * 3)
  text, _ = conversation(path)
  assert 'user\n  q?<|im_end|>' in text and '[a.<|im_end|>]' in text


def test_008_an_input_of_0_is_refused_as_5_is():
  with pytest.raises(ValueError, match="row 0: 'input' is 0, expected text"):
    conversation('008/only0.json')


def test_001_a_table_is_read_as_written():
  rows, _ = examples(
    *('datasets', '001/codes.csv'),
    templates=str(CASES / '001' / 'templates.yaml'),
  )
  assert [row.targets for row in rows] == ['NA', 'NO', 'null']
  assert 'zip 01234, score 3, note first line\nsecond, line' in rows[0].inputs
  assert 'score , note plain' in rows[1].inputs
  assert 'score 5, note None' in rows[2].inputs


@pytest.mark.parametrize(
  ('folder', 'stray'), [('dir', 'train.jsonl.bak'), ('dir2', '._train.jsonl')]
)
def test_003_what_is_no_data_file_is_left_out_and_named(folder, stray):
  for source in ('jsonl', 'datasets'):
    rows, notes = examples(source, f'003/{folder}')
    assert len(rows) == 40 and not any('OLD' in row.targets for row in rows)
    assert notes == (
      f'{CASES / "003" / folder}: left out, as no data files: {stray}',
    )


def test_011_a_byte_order_mark_of_a_template_is_no_text():
  template = str(CASES / '011' / 'template_bom.jinja')
  text, _ = conversation('011/chats.jsonl', chat_template=template)
  assert '\ufeff' not in text and '[Hi.<|im_end|>]' in text


def test_011_a_model_whose_config_begins_with_a_mark_brings_its_tokenizer():
  marked = load_tokenizer('', str(CASES / '011' / 'model_bom'))
  text = 'Hello, wörld.'
  assert marked.encode(text) == load_tokenizer('', MODEL).encode(text)


def test_017_a_tokenizer_without_an_end_is_one_sentence():
  words = load_tokenizer('', str(CASES / '017' / 'none'))
  rows, _ = examples('jsonl', '017/train.jsonl')
  for collator in (CausalCollator(words, 32), Seq2SeqCollator(words, 32, 8)):
    with pytest.raises(ValueError, match='has no end-of-sequence token; name'):
      collator.encode(rows[:3])


def test_005_kto_of_one_class_says_which_is_missing():
  _, notes = preference('005/one_class.jsonl', 'kto')
  assert 'every answer of' in notes[-1] and 'none is bad' in notes[-1]


def test_010_an_idx_above_64_bits_is_refused():
  for name, ranked in (('train', False), ('big', True)):
    with pytest.raises(ValueError, match='line 1: expected an integer of 64 b'):
      jsonl_rows.read(str(CASES / '010' / f'{name}.jsonl'), ranked)


def test_050_an_empty_system_is_none():
  text, _ = conversation('050/empty_system.jsonl')
  # The template's own, as where there is no system's turn.
  assert 'You are a helpful AI assistant named SmolLM' in text

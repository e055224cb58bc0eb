# SPDX-License-Identifier: Apache-2.0
"""Preference rows as ids: shared prompts, room for both answers, batches."""

import dataclasses
import gzip
import hashlib
import json

import numpy as np
import pytest

from moepeft import config as config_lib
from moepeft.data.__main__ import show
from moepeft.data.batching.collators import Seq2SeqCollator
from moepeft.data.batching.decoder_only import CausalCollator, Sample
from moepeft.data.batching.router_inputs import ExampleInputs
from moepeft.data.loader import make_loader
from moepeft.data.preference import dataset as preference_dataset
from moepeft.data.sources import open_data
from moepeft.data.tokenizers.tokenizer import ByteTokenizer

WORDS = ByteTokenizer()


def text(ids):
  return WORDS.decode([int(i) for i in ids])


def rows_of(count=5):
  return [
    {'prompt': f'prompt {i}', 'chosen': f'good {i}', 'rejected': f'bad {i}'}
    for i in range(count)
  ]


def data_of(tmp_path, rows, **changes):
  path = tmp_path / 'rows.json'
  path.write_text(json.dumps(rows))
  data = config_lib.default().data
  data.source, data.path = 'preference', str(path)
  data.update(changes)
  return data


def samples(length=40, judged=False, **options):
  return preference_dataset.PairCollator(
    CausalCollator(WORDS, length, **options), judged
  )


def said(sample):
  """(what is fed but not trained, what is trained) of a sample."""
  return tuple(
    text(sample.ids[m]) for m in (~sample.loss_mask, sample.loss_mask)
  )


def test_both_sides_share_the_prompt_which_is_never_trained(tmp_path):
  actual = preference_dataset.read_preferences(
    data_of(tmp_path, rows_of()), samples()
  )
  chosen, rejected = actual.items[2].sides
  assert said(chosen) == ('prompt 2\n', 'good 2')
  assert said(rejected) == ('prompt 2\n', 'bad 2')
  assert actual.notes[0].endswith(f': {len(actual.items)} rows')
  assert actual.notes[1:] == (
    'bytes brings no chat template: turns are written as plain text',
  )


def test_a_decoder_s_batch_has_each_side_under_its_name(tmp_path):
  own = samples()
  actual = preference_dataset.read_preferences(
    data_of(tmp_path, rows_of()), own
  )
  batch = own.pad(actual.items[:3])
  assert {key.split('_', 1)[0] for key in batch} == {'chosen', 'rejected'}
  for side, answer in (('chosen', 'good 1'), ('rejected', 'bad 1')):
    trained = batch[f'{side}_targets'][1][batch[f'{side}_targets_mask'][1]]
    assert text(trained) == answer and trained[-1] == WORDS.eos
    fed = batch[f'{side}_inputs'][1][batch[f'{side}_inputs_mask'][1]]
    assert text(fed) == f'prompt 1\n{answer}'
    assert batch[f'{side}_inputs'].shape == (3, 40)


def test_an_encoder_reads_the_prompt_and_the_decoder_the_answer(tmp_path):
  own = preference_dataset.PairCollator(Seq2SeqCollator(WORDS, 17, 11), False)
  actual = preference_dataset.read_preferences(
    data_of(tmp_path, rows_of()), own
  )
  batch = own.pad(actual.items)
  assert batch['chosen_inputs'].shape == (5, 17)
  assert batch['rejected_decoder_inputs'].shape == (5, 11)
  np.testing.assert_array_equal(
    batch['chosen_inputs'], batch['rejected_inputs']
  )
  assert text(batch['chosen_inputs'][4]) == 'prompt 4'
  assert text(batch['rejected_targets'][4]) == 'bad 4'


def test_judged_answers_come_with_one_to_another_prompt(tmp_path):
  own = samples(judged=True)
  data = data_of(tmp_path, rows_of())
  actual = preference_dataset.read_preferences(data, own)
  # Five pairs are ten answers, good and bad by turns.
  batch = own.pad(actual.items)
  assert batch['label'].tolist() == [True, False] * 5
  for i, item in enumerate(actual.items):
    prompt, answer = said(item.sides[0])
    assert (prompt, answer[-1]) == (f'prompt {i // 2}\n', str(i // 2))
    also, other = said(item.sides[1])
    assert also == prompt and other[-1] != answer[-1]
  assert 'kl_targets' in batch and 'targets' in batch


def test_answers_to_one_prompt_alone_cannot_be_mismatched(tmp_path):
  data = data_of(tmp_path, rows_of(1))
  with pytest.raises(ValueError, match='have the same prompt'):
    preference_dataset.read_preferences(data, samples(judged=True))


LONG = {'prompt': 'p' * 30 + 'end', 'chosen': 'c' * 9, 'rejected': 'r' * 4}


@pytest.mark.parametrize(
  ('length', 'truncation', 'prompt', 'chosen', 'rejected'),
  [
    # 34 of the prompt, its line's end too, and 10 of the chosen with EOS.
    (43, 'prompt', 34, 10, 5),
    # A token less: the prompt loses its first, on both sides.
    (42, 'prompt', 33, 10, 5),
    (19, 'prompt', 10, 10, 5),
    # 13 tokens: three of the prompt, its quarter; then no more.
    (12, 'prompt', 3, 10, 5),
    (11, 'prompt', None, None, None),
    # A cut at the end is of both answers or of none.
    (37, 'end', 34, 4, 4),
    (39, 'end', None, None, None),
    (43, 'drop', 34, 10, 5),
    (42, 'drop', None, None, None),
  ],
)
def test_no_answer_is_cut_beside_a_whole_one(
  tmp_path, length, truncation, prompt, chosen, rejected
):
  data = data_of(tmp_path, [LONG, *rows_of()], truncation=truncation)
  own = samples(length, truncation=truncation)
  actual = preference_dataset.read_preferences(data, own)
  # The short rows are whole in any case but the tightest.
  first = next((i for i in actual.items if i.idx == 0), None)
  if prompt is None:
    assert first is None
    assert any('left out, as they do not fit' in n for n in actual.notes)
    return
  for side, count in zip(first.sides, (chosen, rejected), strict=True):
    assert int(side.loss_mask.sum()) == count
    assert len(side.ids) - count == prompt
    if truncation == 'prompt':
      assert text(side.ids[:prompt]).endswith('nd\n')


def test_pairs_that_are_one_answer_after_a_cut_are_left_out(tmp_path):
  # 13 tokens: the prompt with its line's end is 9, so 4 of each are kept.
  rows = [
    {'prompt': 'prompt 0', 'chosen': 'same, but', 'rejected': 'same, and'},
    {'prompt': 'prompt 1', 'chosen': 'other', 'rejected': 'same, and'},
  ]
  data = data_of(tmp_path, rows, truncation='end')
  actual = preference_dataset.read_preferences(
    data, samples(12, truncation='end')
  )
  assert [item.idx for item in actual.items] == [1]
  assert any(
    '1 of 2 rows' in n and 'the same to the tokenizer' in n and 'row 0' in n
    for n in actual.notes
  )
  with pytest.raises(ValueError, match='no row .* answers that differ'):
    preference_dataset.read_preferences(
      data_of(tmp_path, rows[:1], truncation='end'), samples(12)
    )


@pytest.mark.parametrize('objective', [False, True])
def test_answers_that_are_one_after_a_cut_are_left_out(tmp_path, objective):
  same = 'a' * 20
  rows = [
    {'prompt': 'p', 'chosen': same + 'good', 'rejected': same + 'bad'},
    {'prompt': 'p', 'chosen': 'good' + same, 'rejected': 'bad' + same},
  ]
  data = data_of(tmp_path, rows, truncation='end')
  form = (
    Seq2SeqCollator(WORDS, 9, 11)
    if objective
    else CausalCollator(WORDS, 12, 'end')
  )
  actual = preference_dataset.read_preferences(
    data, preference_dataset.PairCollator(form, False)
  )
  assert [item.idx for item in actual.items] == [1]
  assert any(
    '1 of 2 rows' in note and 'answers are the same to the tokenizer' in note
    for note in actual.notes
  )


def test_plain_text_refuses_what_only_a_template_writes(tmp_path):
  answer = {'role': 'assistant', 'content': 'So.', 'reasoning_content': 'hm'}
  rows = [{'prompt': 'p', 'chosen': [answer], 'rejected': 'No.'}]
  for form in (
    samples(),
    preference_dataset.PairCollator(Seq2SeqCollator(WORDS, 17, 11), False),
  ):
    with pytest.raises(ValueError, match='row 0: a turn calls tools or has'):
      preference_dataset.read_preferences(data_of(tmp_path, rows), form)


def test_replayed_text_is_refused_before_anything_is_read(tmp_path):
  data = data_of(tmp_path, rows_of(), replay='no.txt', replay_rate=0.1)
  data.path = 'no.json'
  with pytest.raises(
    ValueError, match='cannot be mixed into config.data.source'
  ):
    open_data(data, 0, collator=samples())


def test_a_template_s_last_turn_is_the_answer(tmp_path):
  # As a chat template renders: earlier turns of the model's are trained there,
  # and what ends a turn may follow the answer.
  def render(whole):
    ids, trained = [], []
    for turn in whole.turns:
      own = turn.role == 'assistant'
      for piece, remaining in ((f'<{turn.role}>', False), (turn.content, own)):
        ids += WORDS.encode(piece)
        trained += [remaining] * len(piece)
    end = WORDS.encode('\n')
    return Sample(np.array(ids + end, np.int32), np.array([*trained, False]))

  turns = [('human', 'A'), ('gpt', 'B'), ('human', 'C')]
  row = {
    'conversations': [{'from': role, 'value': v} for role, v in turns],
    'chosen': 'yes',
    'rejected': 'no',
  }
  data = data_of(tmp_path, [row])
  own = samples(80)
  (item,) = preference_dataset.read_preferences(data, own, render).items
  prompt, answer = said(item.sides[0])
  assert answer == 'yes'
  assert prompt == '<user>A<assistant>B<user>C<assistant>\n'


@pytest.mark.parametrize(
  ('rows', 'judged', 'said'),
  [
    ([{'prompt': 'A', 'chosen': 'B', 'rejected': 'B'}], False, 'row 0: .*same'),
    ([*rows_of(2), {'chosen': 'B'}], False, r'rows.json, row 2: .*rejected'),
    ([*rows_of(1), 3], False, 'row 1: expected an object'),
    (
      [{'prompt': 'A', 'completion': 'B', 'label': 1}],
      True,
      "row 0: .*'label'",
    ),
    (
      [{'prompt': 'A', 'completion': 'B', 'label': True}],
      False,
      "set config.objective to 'kto'",
    ),
    ([], False, 'holds no good row'),
  ],
)
def test_a_broken_row_is_named_by_file_and_row(tmp_path, rows, judged, said):
  with pytest.raises(ValueError, match=said):
    preference_dataset.read_preferences(
      data_of(tmp_path, rows), samples(judged=judged)
    )


def test_bad_rows_may_be_skipped_and_are_told(tmp_path):
  rows = [{'prompt': 'A', 'chosen': 'B', 'rejected': 'B'}, *rows_of(2)]
  data = data_of(tmp_path, rows, on_bad_row='skip')
  actual = preference_dataset.read_preferences(data, samples())
  assert len(actual.items) == 2 and 'row 0' in actual.notes[1]


def test_lines_and_compressed_lines_are_rows_too(tmp_path):
  path = tmp_path / 'rows.jsonl.gz'
  lines = '\n'.join(json.dumps(row) for row in rows_of(3))
  path.write_bytes(gzip.compress(lines.encode()))
  data = data_of(tmp_path, [], path=str(path))
  assert len(preference_dataset.read_preferences(data, samples()).items) == 3


def test_both_answers_to_a_prompt_are_held_out_together(tmp_path):
  data = data_of(tmp_path, rows_of(10), validation_fraction=0.2)
  own = samples(judged=True)
  actual = open_data(data, 0, collator=own)
  assert sorted(item.idx for item in actual.held_out) == [8, 8, 9, 9]
  seen = {actual.train[i].idx for i in range(40)}
  assert seen == set(range(8))


def test_batches_go_on_where_a_run_was_cut(tmp_path):
  data = data_of(tmp_path, rows_of(7))
  own = samples()
  actual = open_data(data, 0, collator=own)
  one = make_loader(actual, WORDS, data, 3, 0, collator=own)
  first = [next(one) for _ in range(2)]
  place = one.position()
  expected = next(one)
  two = make_loader(actual, WORDS, data, 3, 0, collator=own)
  two.seek(place)
  again = next(two)
  for key, array in expected.items():
    np.testing.assert_array_equal(array, again[key])
  assert any((expected[k] != first[0][k]).any() for k in expected)
  one.close()
  two.close()


def test_the_hash_is_of_every_id_and_of_what_is_trained(tmp_path):
  actual = preference_dataset.read_preferences(
    data_of(tmp_path, rows_of()), samples()
  )
  same = preference_dataset.read_preferences(
    data_of(tmp_path, rows_of()), samples()
  )
  assert actual.sha256 == same.sha256
  item = actual.items[0]
  side = item.sides[0]
  for change in (
    {'ids': side.ids + 1},
    {'loss_mask': ~side.loss_mask},
  ):
    other = dataclasses.replace(
      item, sides=(dataclasses.replace(side, **change), item.sides[1])
    )
    changed = dataclasses.replace(actual, items=(other, *actual.items[1:]))
    assert changed.sha256 != actual.sha256


def test_the_hash_is_the_one_that_older_references_were_made_for(tmp_path):
  data = preference_dataset.read_preferences(
    data_of(tmp_path, rows_of()), samples()
  )
  digest = hashlib.sha256()
  for item in data.items:
    for side in item.sides:
      # Before routers read more, a sample was its ids, mask and cut.
      for field in (side.ids, side.loss_mask, side.cut):
        array = np.asarray(field, np.int32)
        digest.update(np.int64(array.size).tobytes() + array.tobytes())
  assert data.sha256 == digest.hexdigest()
  routed_by = ExampleInputs(2, np.ones(3, np.float32))
  routed = [
    dataclasses.replace(
      item,
      sides=tuple(
        dataclasses.replace(s, routed_by=routed_by) for s in item.sides
      ),
    )
    for item in data.items
  ]
  assert dataclasses.replace(data, items=tuple(routed)).sha256 == data.sha256


@pytest.mark.parametrize('objective', ['dpo', 'kto'])
def test_both_sides_are_shown_with_what_is_trained(tmp_path, capsys, objective):
  config = config_lib.default()
  config.objective = objective
  config.model.path, config.model.family, config.model.size = (
    '',
    'llama',
    'tiny',
  )
  config.data.update(data_of(tmp_path, rows_of(9), tokenizer='bytes'))
  # Which rows come first is drawn by the path's name too.
  show(config, 1, 18, False)
  said = capsys.readouterr().out
  names = {'dpo': ('chosen', 'rejected'), 'kto': ('judged good', 'mismatched')}
  for name in names[objective]:
    assert f'\n{name}\n' in said
  # What stands in brackets is not trained everywhere.
  assert ('of mismatched answers [...] is measured' in said) == (
    objective == 'kto'
  )
  # The line's end is the prompt's.
  assert '[good ' in said and '\n  [bad ' in said and 'bad rows' not in said

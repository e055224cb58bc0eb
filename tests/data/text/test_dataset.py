# SPDX-License-Identifier: Apache-2.0
"""Plain text: documents, chunks, noise spans and prefixes."""

import json

import numpy as np
import pytest

from moepeft import config as config_lib
from moepeft import registries
from moepeft.config import check as config_check
from moepeft.data.__main__ import replay_shares, show
from moepeft.data.batching import collators
from moepeft.data.batching.collators import Seq2SeqCollator
from moepeft.data.batching.decoder_only import CausalCollator
from moepeft.data.sources import open_data
from moepeft.data.text import dataset as text_dataset
from moepeft.data.text import documents, span_corruption
from moepeft.data.tokenizers.tokenizer import ByteTokenizer

from ...contracts import small

TEXT = 'one two\nthree\n\n\nfour five six\n'


@pytest.fixture
def path(tmp_path):
  (tmp_path / 'a.txt').write_text(TEXT)
  return str(tmp_path / 'a.txt')


def data(path, **changes):
  c = config_lib.default().data
  c.source, c.path, c.validation_fraction = 'text', path, 0.0
  c.update(changes)
  return c


def test_blank_lines_or_lines_separate_passages(path, tmp_path):
  (actual,), _ = documents.read_documents(path)
  assert actual.passages == ('one two\nthree', 'four five six')
  (tmp_path / 'b.txt').write_text('one\ntwo\n')
  (actual,), _ = documents.read_documents(str(tmp_path / 'b.txt'))
  assert actual.passages == ('one', 'two') and actual.separator == '\n'


def test_pieces_of_a_stream_predict_every_token_once(path):
  actual = text_dataset.read_chunks(
    data(path), CausalCollator(ByteTokenizer(), 5), path
  )
  made = [actual.item_fn(ids, None) for ids in actual]
  targets = np.concatenate([m.ids[1:] for m in made])
  joined = 'one two\nthree\n\nfour five six'
  # All bytes but the first, and EOS.
  assert ByteTokenizer().decode(targets.tolist()) == joined[1:]
  assert targets[-1] == 1 and len(targets) == len(joined)
  assert all(len(m.ids) == 6 for m in made[:-1])


def test_packed_documents_are_cut_each_by_itself(tmp_path):
  rows = [{'text': 'abc'}, {'text': 'defgh'}]
  (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  form = CausalCollator(ByteTokenizer(), 7, packed=True)
  actual = text_dataset.read_chunks(data(str(tmp_path)), form, str(tmp_path))
  assert [ByteTokenizer().decode(ids.tolist()) for ids in actual] == [
    'abc',
    'defgh',
  ]
  assert all(ids[-1] == 1 for ids in actual)


def test_spans_have_the_lengths_that_t5_defines():
  # The published case of T5: 512 inputs at 0.15 and 3 are 568 tokens, with
  # 114 targets: 85 hidden, 28 spans, EOS.
  length = span_corruption.max_length(lambda x, y: x <= 512, 0.15, 3.0)
  assert length == 568
  assert span_corruption.sizes(length, 0.15, 3.0) == (512, 114)


def test_hidden_spans_are_told_back_in_order():
  ids = np.arange(10, 20)
  hidden = np.array([0, 1, 1, 0, 0, 0, 1, 0, 0, 1], bool)
  x, y = span_corruption.corrupt(ids, hidden, [99, 98, 97], 1)
  assert x.tolist() == [10, 99, 13, 14, 15, 98, 17, 18, 97, 1]
  assert y.tolist() == [99, 11, 12, 98, 16, 97, 19, 1]
  with pytest.raises(ValueError, match='3 spans need as many sentinels'):
    span_corruption.corrupt(ids, hidden, [99, 98], 1)


@pytest.mark.parametrize('seed', range(5))
def test_a_mask_hides_its_share_in_spans_that_start_shown(seed):
  hidden = span_corruption.noise_mask(
    568, 0.15, 3.0, np.random.default_rng(seed)
  )
  assert len(hidden) == 568 and hidden.sum() == 85
  assert not hidden[0] and hidden[-1]
  assert np.sum(np.diff(hidden.astype(int)) == 1) == 28


def restored(x, y, sentinels):
  """The text of inputs and targets, a third way."""
  parts, key = {}, None
  for token in y[:-1]:
    if token in sentinels:
      key = token
      parts[key] = []
    else:
      parts[key].append(token)
  return sum([parts.get(token, [token]) for token in x[:-1]], [])


def test_rows_of_spans_are_full_and_lose_nothing(tmp_path):
  rng = np.random.default_rng(0)
  letters = ''.join(rng.choice(list('abc d'), 2000))
  (tmp_path / 'a.txt').write_text(letters)
  path, form = str(tmp_path / 'a.txt'), Seq2SeqCollator(ByteTokenizer(), 61, 20)
  actual = text_dataset.read_chunks(
    data(path, pretraining_objective='spans'), form, path, vocab_size=300
  )
  whole, sentinels = [], set(range(259, 300))
  for ids in actual:
    x, y = actual.item_fn(ids, rng)
    whole += restored(x.tolist(), y.tolist(), sentinels)
    if len(ids) == len(actual[0]):
      assert len(x) == 61 and len(y) <= 20 and x[1:].max() == 299
  assert whole == actual.ids.tolist()


def test_spans_that_find_no_room_say_what_to_set(path):
  form = Seq2SeqCollator(ByteTokenizer(), 61, 9)
  with pytest.raises(ValueError, match='set config.data.targets_length to 1'):
    text_dataset.read_chunks(
      data(path, pretraining_objective='spans'), form, path, vocab_size=300
    )
  form = Seq2SeqCollator(ByteTokenizer(), 61, 20)
  with pytest.raises(ValueError, match='has 0 sentinels'):
    text_dataset.read_chunks(
      data(path, pretraining_objective='spans'), form, path, vocab_size=259
    )


def test_a_decoder_reads_spans_in_one_row(path):
  form = CausalCollator(ByteTokenizer(), 31)
  actual = text_dataset.read_chunks(
    data(path, pretraining_objective='spans'), form, path, vocab_size=300
  )
  made = actual.item_fn(actual[0], np.random.default_rng(0))
  assert 30 <= len(made.ids) <= 32
  (first,) = np.flatnonzero(np.diff(made.loss_mask)) + 1
  # The inputs end with EOS, and the answer begins with the first sentinel.
  assert made.ids[first - 1] == 1 and made.ids[first] == 299


def test_a_prefix_is_given_and_the_rest_predicted(path):
  actual = text_dataset.read_chunks(
    data(path, pretraining_objective='prefix'),
    CausalCollator(ByteTokenizer(), 9),
    path,
  )
  rng = np.random.default_rng(0)
  cuts = {
    int(actual.item_fn(actual[0], rng).loss_mask.sum()) for _ in range(97)
  }
  assert cuts == set(range(1, 10))
  pairs = text_dataset.read_chunks(
    data(path, pretraining_objective='prefix'),
    Seq2SeqCollator(ByteTokenizer(), 9, 5),
    path,
  )
  for _ in range(31):
    x, y = pairs.item_fn(pairs[0], rng)
    assert len(x) <= 9 and 2 <= len(y) <= 5
    assert [*x[:-1], *y[:-1]] == pairs[0].tolist()


def test_next_tokens_are_refused_to_an_encoder(path):
  with pytest.raises(ValueError, match="'spans' or 'prefix'"):
    text_dataset.read_chunks(
      data(path), Seq2SeqCollator(ByteTokenizer(), 9, 5), path
    )


def test_text_is_held_out_at_the_end_and_drawn_in_epochs(path):
  form = CausalCollator(ByteTokenizer(), 3)
  actual = open_data(data(path, validation_fraction=0.2), 0, collator=form)
  stored = np.concatenate([s.ids[1:] for s in actual.held_out])
  # 28 tokens are 9 chunks of 3 targets and one of less; the last two stay out.
  assert ByteTokenizer().decode(stored.tolist()) == 'six'[-len(stored) + 1 :]
  epoch = [tuple(actual.train[i].ids) for i in range(8)]
  again = [tuple(actual.train[i].ids) for i in range(8, 16)]
  assert sorted(epoch) == sorted(again) and epoch != again
  assert epoch == [tuple(actual.train[i].ids) for i in range(8)]


@pytest.mark.parametrize(
  ('name', 'content', 'said'),
  [
    ('a.md', 'x', 'text is read from .txt'),
    ('a.txt', ' \n', 'has no text'),
    ('a.jsonl', '{"texts": "x"}', "line 1: expected text in 'text', got None"),
    ('a.jsonl', '{"text": "x"', 'line 1: not JSON'),
  ],
)
def test_what_is_no_text_is_refused_in_a_sentence(
  tmp_path, name, content, said
):
  (tmp_path / name).write_text(content)
  with pytest.raises(ValueError, match=said):
    documents.read_documents(str(tmp_path / name))


def test_bytes_that_are_no_text_are_refused(tmp_path):
  (tmp_path / 'a.txt').write_bytes(b'ab\xff\xfe')
  with pytest.raises(ValueError, match='a.txt cannot be read as UTF-8'):
    documents.read_documents(str(tmp_path))


def test_replayed_text_has_its_share_of_the_examples(path, tmp_path):
  (tmp_path / 'b.txt').write_text('zzzz' * 97)
  form = CausalCollator(ByteTokenizer(), 5)
  changes = {'replay': str(tmp_path / 'b.txt'), 'replay_rate': 0.25}
  actual = open_data(data(path, **changes), 0, collator=form)
  # In each 1,024 places the rates are exact; z is 125.
  old = sum(actual.train[i].ids[0] == 125 for i in range(1024))
  assert old == 256
  assert actual.shares == {'a.txt': 0.75, changes['replay']: 0.25}
  config = data('', source='tasks', **changes)
  actual = open_data(config, 0, collator=form)
  mixed = form.encode([actual.train[i] for i in range(16)])
  assert len(mixed) == 16


def test_a_file_that_is_moved_gives_its_rows_in_the_same_order(tmp_path):
  actual = []
  for folder in ('here', 'there'):
    (tmp_path / folder).mkdir()
    moved = tmp_path / folder / 'a.txt'
    moved.write_text('\n\n'.join(f'{i} words' for i in range(31)))
    read = open_data(
      data(str(moved)), 0, collator=CausalCollator(ByteTokenizer(), 5)
    ).train
    actual.append([read[i].ids.tolist() for i in range(40)])
  assert actual[0] == actual[1]


def test_the_share_of_replayed_tokens_is_told(path, tmp_path):
  (tmp_path / 'b.txt').write_text('zzzz' * 97)
  form = CausalCollator(ByteTokenizer(), 5)
  changes = {'replay': str(tmp_path / 'b.txt'), 'replay_rate': 0.25}
  actual = open_data(data(path, **changes), 0, collator=form)
  assert '25.0% of the examples (not of the tokens)' in actual.notes[-1]
  # In whole rounds of 1,024 a quarter: five tokens of each against one.
  trained = [5 if actual.replay[i][0] else 1 for i in range(1024)]
  said = replay_shares(actual, trained)
  assert '25.0% of the examples, 62.5% of the trained tokens' in said


def test_the_command_tells_the_share_of_replayed_tokens(tmp_path, capsys):
  (tmp_path / 'b.txt').write_text('zzzz' * 97)
  config = config_lib.default()
  config.objective = 'causal'
  config.model.update({'path': '', 'family': 'llama', 'size': 'tiny'})
  config.data.update({'tokenizer': 'bytes', 'length': 40, 'tasks': 'B'})
  config.data.update({'replay': str(tmp_path / 'b.txt'), 'replay_rate': 0.25})
  show(config, 1, 1, False)
  output = capsys.readouterr().out
  assert 'replayed text: 25.0% of the examples, ' in output


@pytest.mark.parametrize(
  'changes', [{'replay': 'x.txt'}, {'replay_rate': 0.5}], ids=str
)
def test_replay_needs_a_path_and_a_rate(path, changes):
  with pytest.raises(ValueError, match='config.data.replay is a path'):
    open_data(
      data(path, **changes), 0, collator=CausalCollator(ByteTokenizer(), 5)
    )


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    (
      {'quality_filters': 'length'},
      "quality_filters='length' does nothing .*'tasks', only",
    ),
    (
      {'source': 'text', 'path': 'x', 'noise_density': 0.3},
      "'next', only with 'spans'",
    ),
    (
      {'source': 'text', 'path': 'x', 'truncation': 'drop'},
      "truncation='drop' do",
    ),
  ],
)
def test_keys_that_nothing_would_look_at_are_refused(changes, said):
  config = config_lib.default()
  config.data.update(changes)
  with pytest.raises(ValueError, match=said):
    config_check.check(config, registries.BY_KEY)


def test_plain_text_that_is_replayed_has_the_keys_of_plain_text():
  config = config_lib.default()
  config.data.update(
    replay='x.txt',
    replay_rate=0.1,
    pretraining_objective='spans',
    mean_noise_span_length=5.0,
  )
  config_check.check(config, registries.BY_KEY)


def test_an_encoder_decoder_s_pairs_have_no_policy_for_what_is_too_long():
  data = config_lib.default().data
  data.truncation = 'drop'
  with pytest.raises(
    ValueError, match="truncation='drop' does nothing with an"
  ):
    collators.make_model_collator(data, ByteTokenizer(), small.GATED, 0)

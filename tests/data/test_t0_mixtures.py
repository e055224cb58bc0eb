# SPDX-License-Identifier: Apache-2.0
"""T0's mixtures have their published sizes, and data get their rates."""

import collections
import csv

import pytest

from moepeft.data import t0_mixtures
from moepeft.data.readers import jsonl_rows
from moepeft.data.readers.promptsource import p3_name
from tests import ROOT

SHARED = ROOT.parent / 'shared'
P3 = SHARED / 'data' / 'p3' / 'train.jsonl.gz'
TABLE = SHARED / 'paper' / 't0_mixtures.csv'
ONE, ALL = 't0_train_one_og_prompt', 't0_train_all_og_prompts'


@pytest.mark.parametrize(
  ('mixture', 'datasets', 'prompts'),
  # Ten sets of 79 prompts more, then six of 72.
  [('t0_train', 38, 313), ('t0+_train', 48, 392), ('t0++_train', 54, 464)],
)
def test_mixtures_have_their_published_sizes(mixture, datasets, prompts):
  members = t0_mixtures.members(mixture)
  assert len({d.name for d in members}) == len(members) == datasets
  assert sum(d.prompts for d in members) == prompts


def test_original_prompts_are_222_of_35_datasets():
  members = t0_mixtures.members(ALL)
  assert members == t0_mixtures.members(ONE)
  assert (len(members), sum(d.original for d in members)) == (35, 222)
  gone = set(t0_mixtures.members('t0_train')) - set(members)
  assert {d.name for d in gone} == {
    'kilt_tasks/hotpotqa',
    'quarel',
    'app_reviews',
  }


def totals_of(mixture):
  """{dataset: sum of its prompts' rates} where all of the mixture is there."""
  counts = {ONE: lambda d: 1, ALL: lambda d: d.original}
  count = counts.get(mixture, lambda d: d.prompts)
  return {d.name: count(d) * d.rate for d in t0_mixtures.members(mixture)}


def test_t0_has_its_published_total_and_shares():
  totals = totals_of('t0_train')
  total = sum(totals.values())
  assert total == 17_277_798
  for name, percent in {
    'glue/mrpc': 0.15,
    'glue/qqp': 12.64,
    'paws/labeled_final': 3.43,
    'kilt_tasks/hotpotqa': 2.57,
    'duorc/ParaphraseRC': 3.62,
    'cos_e/v1.11': 0.62,
    'amazon_polarity': 2.89,
    'app_reviews': 6.67,
    'wiki_bio': 2.89,
    'cnn_dailymail/3.0.0': 14.96,
    'xsum': 11.81,
    'dbpedia_14': 2.89,
    'trec': 0.57,
  }.items():
    # Half of the last digit that is published.
    assert 100 * totals[name] / total == pytest.approx(percent, abs=0.005)


def test_one_prompt_counts_once_and_original_prompts_as_often_as_they_are():
  # glue/qqp: 5 of 6 are original; wiki_bio: 500,000 // 5 each, 1 original.
  assert totals_of(ONE)['glue/qqp'] == 363_846
  assert totals_of(ALL)['glue/qqp'] == 5 * 363_846
  assert totals_of(ALL)['wiki_bio'] == 100_000
  assert 'quarel' not in totals_of(ONE)


@pytest.mark.skipif(not TABLE.exists(), reason='no shared tables')
def test_the_table_is_the_public_mixtures():
  rows = list(csv.DictReader(TABLE.open()))
  seen = collections.defaultdict(set)
  for row in rows:
    name = '/'.join(filter(None, (row['dataset'], row['subset'])))
    numbers = (
      row['prompts'],
      row['original_task_prompts'],
      row['train_examples'],
    )
    member = t0_mixtures.T0Dataset(name, *map(int, numbers))
    assert member.rate == int(row['cap_per_prompt'])
    seen[row['mixture']].add(member)
  base, plus, plus2 = (seen[f't0{p}_train'] for p in ('', '+', '++'))
  assert set(t0_mixtures.members('t0_train')) == base
  assert set(t0_mixtures.members('t0+_train')) == base | plus
  assert set(t0_mixtures.members('t0++_train')) == base | plus | plus2


def test_names_of_any_spelling_find_their_dataset():
  rows = {
    ('glue/mrpc', 'a'): 5,
    ('glue_qqp', 'b'): 5,
    ('cos_e_v1.11', 'c'): 5,
    ('duorc_SelfRC_question_answering', ''): 5,
    ('race_high_x', ''): 5,
    ('mine', 'd'): 5,
    # A dataset of one's own, not a SeqIO task: it has a template.
    ('imdb_mine', 'e'): 5,
    ('imdb_f_score_eval', ''): 5,
    ('ropes', 'none'): 0,
  }
  actual = t0_mixtures.mixture_rates('t0_train', rows)
  assert actual.rates == {
    ('glue/mrpc', 'a'): 3668,
    ('glue_qqp', 'b'): 363846,
    ('cos_e_v1.11', 'c'): 9741,
    ('duorc_SelfRC_question_answering', ''): 60721,
  }
  assert actual.left_out == (
    'imdb_f_score_eval',
    'imdb_mine',
    'mine',
    'race_high_x',
  )
  assert len(actual.absent) == 34 and 'ropes' in actual.absent
  left, absent = actual.notes('t0_train')
  assert 'does not hold imdb_f_score_eval, imdb_mine' in left
  assert '34 of the 38 datasets of t0_train are not in the data' in absent
  plus = t0_mixtures.mixture_rates('t0+_train', rows).rates
  assert plus['race_high_x', ''] == 62445


def test_a_capped_dataset_shares_half_a_million_among_its_prompts():
  # 3.6 million examples, nine prompts: 500,000 // 9, whichever are here.
  actual = t0_mixtures.mixture_rates('t0_train', {('amazon_polarity', 'a'): 1})
  assert actual.rates == {('amazon_polarity', 'a'): 55_555}


def test_one_prompt_is_an_original_one_where_that_is_known():
  rows = {('glue_qqp', t): 9 for t in 'cab'}
  known = t0_mixtures.mixture_rates(
    ONE, rows, original={('glue_qqp', t) for t in 'bc'}
  )
  assert (known.rates, known.guessed) == ({('glue_qqp', 'b'): 363846}, ())
  guess = t0_mixtures.mixture_rates(ONE, rows)
  assert guess.rates == {('glue_qqp', 'a'): 363846}
  assert guess.guessed == ('glue_qqp',)
  assert 'first prompt by name' in guess.notes(ONE)[-1]


def test_a_seqio_task_may_be_an_original_one():
  rows = {(f'glue_qqp_{t}', ''): 9 for t in 'abc'}
  actual = t0_mixtures.mixture_rates(
    ALL, rows, original={('glue_qqp', t) for t in 'bc'}
  )
  assert set(actual.rates) == {('glue_qqp_b', ''), ('glue_qqp_c', '')}


def test_original_prompts_are_not_guessed():
  # All eight of quartz are original.
  every = {('quartz', t): 9 for t in 'ab'}
  assert set(t0_mixtures.mixture_rates(ALL, every).rates) == set(every)
  assert set(t0_mixtures.mixture_rates(ONE, every).rates) == {('quartz', 'a')}
  assert t0_mixtures.mixture_rates(ONE, every).guessed == ()
  with pytest.raises(ValueError, match='which of glue/qqp are; set config'):
    t0_mixtures.mixture_rates(ALL, {('glue_qqp', 'a'): 9})


def test_a_mixture_of_nothing_is_an_error():
  with pytest.raises(ValueError, match='none of the data is in t0_train; got'):
    t0_mixtures.mixture_rates('t0_train', {('mine', 'a'): 3})
  with pytest.raises(ValueError, match="'t1' is no mixture; expected one of"):
    t0_mixtures.mixture_rates('t1', {('imdb', 'a'): 3})


@pytest.mark.skipif(not P3.exists(), reason='no P3 rows')
def test_real_rows_get_the_rates_of_t0():
  rows = jsonl_rows.read(str(P3))
  counts = collections.Counter((e.task, e.template) for e in rows)
  actual = t0_mixtures.mixture_rates('t0_train', counts)
  # Its questions are in T0 as cos_e.
  assert actual.left_out == ('commonsense_qa',)
  present = {p3_name(d.name): d for d in t0_mixtures.members('t0_train')}
  datasets = {task for task, _ in actual.rates}
  assert len(datasets) == len({e.task for e in rows}) - 1
  assert len(actual.absent) == 38 - len(datasets)
  for (task, _), rate in actual.rates.items():
    assert rate == present[task].rate
  # No dataset has more prompts than it has in T0.
  prompts = collections.Counter(task for task, _ in actual.rates)
  assert all(n <= present[task].prompts for task, n in prompts.items())

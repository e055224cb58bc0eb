# SPDX-License-Identifier: Apache-2.0
"""The paper's figures are those that were handed down, and are consistent."""

import json

import pytest

from moepeft.evaluation import published
from tests import ROOT

RESULTS = ROOT.parent / 'shared' / 'paper' / 'results.json'
needs_results = pytest.mark.skipif(
  not RESULTS.exists(), reason='needs ../shared/paper'
)


@needs_results
@pytest.mark.parametrize('size', ['t5_large', 't5_xl', 't5_xxl'])
def test_every_number_is_the_sources(size):
  there = json.loads(RESULTS.read_text())['tables'][size]
  actual = published.table(size)
  assert len(actual) == len(there)
  for row, source in zip(actual, there, strict=True):
    assert row.name == source['name']
    assert row.percent == source['paper_params_percent']
    scores = source['scores']
    assert row.scores == (
      None if scores is None else tuple(scores[k] for k in published.EIGHT)
    )
    assert row.average == source['average']
    assert row.note == source.get('note', '')


@needs_results
def test_no_table_and_no_ablation_is_left_out():
  source = json.loads(RESULTS.read_text())
  assert source['tables'].keys() == published.TABLES.keys()
  soft, sentence, batch = source['ablations'].items()
  merging = published.ABLATIONS['merging']
  assert soft[0] == f'soft_vs_discrete ({merging.setting})'
  for key in ('soft', 'top_2', 'top_1'):
    assert merging.figures[key] == soft[1][key]
  assert 'further 1.5' in soft[1]['note']
  assert merging.figures['load_balancing'] == -1.5
  assert {'0.94', '8.86'} <= set(sentence[1].split())
  assert set(published.ABLATIONS['sentence_router'].figures.values()) == {
    0.94,
    8.86,
  }
  figures = published.ABLATIONS['batch_and_rate'].figures
  assert (figures['stable_batch'], figures['stable_rate']) == (32, 3e-4)
  assert figures['collapsing_batch'] == 2048 and '2048' in batch[1]
  assert figures['collapsed_by_step'] == 5000 and '5k steps' in batch[1]


def test_one_row_alone_has_another_mean_than_its_average():
  actual = {
    (size, row.name): row.recomputed()
    for size, rows in published.TABLES.items()
    for row in rows
    if row.recomputed() is not None
  }
  # (37.5 + 75.57 + 73.53 + 61.02 + 51.25 + 83.6 + 54.33 + 25.32) / 8
  assert actual == {('t5_xl', 'lora(rank=4)'): pytest.approx(57.765)}


def test_the_authors_t0_is_full_fine_tuning_and_the_other_is_not():
  full = {
    row.name
    for rows in published.TABLES.values()
    for row in rows
    if row.method == 'full'
  }
  assert full == {
    'T0-770M (authors)',
    "T0-3B (authors' replication)",
    'T0-11B (authors)',
  }
  assert published.table('t5_xl')[0].method == ''


def test_what_was_not_recovered_has_no_cells():
  assert published.table('t5_large')[1].cells() == {}


def test_an_unknown_table_is_refused_with_those_that_are_there():
  with pytest.raises(ValueError, match="t5_large, t5_xl, t5_xxl; got 't5'"):
    published.table('t5')

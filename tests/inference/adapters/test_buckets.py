# SPDX-License-Identifier: Apache-2.0
"""Forms: which adapters share a bank."""

import pytest

from moepeft.inference.adapters import buckets
from moepeft.models.t5 import model as t5
from moepeft.peft import build

from ...contracts import small

SITES = t5.sites(small.GATED)


def form(method, semantics='official'):
  return buckets.bucket_of(build(method, SITES, semantics), repr(method))


def methods(*texts):
  actual = buckets.merge_buckets([form(text) for text in texts], SITES)
  return [f.method for f in actual]


@pytest.mark.parametrize(
  ('rank', 'rounded'), [(0, 0), (1, 4), (4, 4), (5, 8), (16, 16), (17, 32)]
)
def test_a_rank_is_rounded_up_to_a_power_of_two_of_four_at_least(rank, rounded):
  assert buckets.round_up_rank(rank) == rounded


@pytest.mark.parametrize(
  ('method', 'scale'),
  [
    # 16 is the default alpha: 16 / 8.
    ('lora(rank=8)', 2.0),
    ('lora(rank=4, alpha=6.0)', 1.5),
    # 6 / sqrt(4).
    ('lora(rank=4, alpha=6.0, rslora=True)', 3.0),
    ('dora(rank=8)', 2.0),
    # The default rank is 4: 2 / 4.
    ('molora(alpha=2.0)', 0.5),
  ],
)
def test_a_scale_is_alpha_over_the_rank_or_its_root(method, scale):
  (spec,) = buckets.method_instances(build(method, SITES).method).values()
  assert buckets.scale_of(spec) == scale


def test_ranks_scales_sites_and_noise_of_training_are_of_one_form():
  one = methods(
    'lora(rank=3)',
    'lora(rank=9, alpha=2.0, dropout=0.1)',
    "lora(rank=4, rslora=True, targets='*/q')",
  )
  # 9 is the largest rank: 16.
  assert one == ['lora(rank=16)']
  mixtures = methods(
    'molora(experts=3, rank=2, router=topk(k=2, jitter=0.1))',
    'molora(experts=3, rank=4, alpha=2.0, router=topk(k=2))',
  )
  assert mixtures == ['molora(experts=3, router=topk(k=2), rank=4)']


def test_what_a_program_depends_on_makes_another_form():
  different = (
    'molora(experts=3)',
    'molora(experts=4)',
    'molora(experts=3, router=topk(k=2))',
    'molora(experts=3, router=topk(k=1))',
    'molora(experts=3, router=topk(k=2, renormalize=True))',
    'mov(experts=3)',
    "mov(experts=3, reads='output')",
    'ia3',
    "ia3(on='input', targets='*/wo')",
    'ia3 + lora',
    'lora',
    'dora',
  )
  assert len(methods(*different)) == len(different)


def test_semantics_that_change_the_function_change_the_form():
  official, paper = form('mov(experts=3)'), form('mov(experts=3)', 'paper')
  assert len(buckets.merge_buckets([official, paper], SITES)) == 2
  # Of LoRA they decide where it acts, which a form has all of.
  official, paper = form('lora'), form('lora', 'paper')
  (actual,) = buckets.merge_buckets([official], SITES)
  assert actual.holds(paper)


def test_a_form_acts_at_the_default_sites_and_at_those_that_were_named():
  (actual,) = buckets.merge_buckets([form("lora(targets='head')")], SITES)
  # 4 projections in three attentions, 3 in two feed-forwards, and the head.
  assert len(actual.parts[0].sites) == 4 * 3 + 3 * 2 + 1
  assert not actual.holds(form('lora(rank=5)'))
  assert actual.holds(form('lora(rank=2)'))
  (plain,) = buckets.merge_buckets([form('lora')], SITES)
  assert not plain.holds(form("lora(targets='head')"))


def test_entries_of_all_forms_have_names_of_their_own():
  expected = [form(m) for m in ('ia3', 'lora', 'ia3 + lora', 'lora + ia3')]
  expected.append(form("ia3(on='input', targets='*/wo')"))
  actual = buckets.merge_buckets(expected, SITES)
  entries = [part.name for f in actual for part in f.parts]
  assert len(set(entries)) == len(entries) == 7
  assert [f.name for f in actual] == sorted(f.name for f in actual)


@pytest.mark.parametrize(
  ('method', 'adapter_map'),
  [
    ('full', 'moepeft.convert --workdir'),
    ("lora + tokens(new='3')", "train those with method='full'"),
  ],
)
def test_what_changes_the_base_is_refused_with_what_to_do(method, adapter_map):
  with pytest.raises(ValueError, match=adapter_map):
    form(method)


def test_a_router_without_options_makes_a_module():
  (bucket,) = buckets.merge_buckets(
    [form('molora(experts=3, router=uniform)')], SITES
  )
  entries = buckets.adapter_map_of([bucket]).entries
  assert {path for path, _ in entries} == set(bucket.parts[0].sites)

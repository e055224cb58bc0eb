# SPDX-License-Identifier: Apache-2.0
"""Texts of one method have one plain form, of two methods two."""

import pytest

from moepeft.peft import METHODS
from moepeft.peft.method_text import canonical_text

SAME = [
  (
    'molora(experts=10, rank=4, router=softmax)',
    'molora(rank=4, experts=10)',
    'official',
  ),
  ('molora(experts=7, rank=3)', 'molora(rank=3, experts=7)', 'official'),
  ('lora(alpha=16.0, rank=8)', 'lora(rank=8)', 'paper'),
  # What a semantics decides may be said.
  ("mov(experts=7, reads='heads')", 'mov(experts=7)', 'official'),
  ("mov(experts=7, reads='output')", 'mov(experts=7)', 'paper'),
  (
    'mov(router=topk(k=2, renormalize=True))',
    'mov(router=topk(k=2))',
    'paper',
  ),
]
OTHER = [
  ('lora(rank=8)', 'lora(rank=4)', 'official'),
  ("mov(experts=7, reads='output')", 'mov(experts=7)', 'official'),
  (
    'mov(router=topk(k=2, renormalize=True))',
    'mov(router=topk(k=2))',
    'official',
  ),
  ('lora(rank=8, dropout=0.1)', 'lora(rank=8)', 'official'),
  ("lora(targets='*/wo')", 'lora', 'official'),
  ('lora + ia3', 'ia3 + lora', 'official'),
  ('full', 'ia3', 'official'),
]


@pytest.mark.parametrize(('one', 'other', 'semantics'), SAME)
def test_texts_of_one_method_are_one(one, other, semantics):
  assert canonical_text(one, semantics) == canonical_text(other, semantics)


@pytest.mark.parametrize(('one', 'other', 'semantics'), OTHER)
def test_texts_of_two_methods_are_two(one, other, semantics):
  assert canonical_text(one, semantics) != canonical_text(other, semantics)


def test_an_unknown_method_is_refused():
  with pytest.raises(ValueError, match="no method 'none'"):
    canonical_text('none')


@pytest.mark.parametrize(
  ('method', 'message'),
  [
    ('mola(shared_experts=1)', 'write `experts` in place of experts_per_layer'),
    ("hydralora(from_adapters=['a'])", "hydralora: .*; write share=''"),
    ("hmora(reads='down')", 'share_router=False'),
    ('comol(a_groups=2, experts_per_layer=[1, 2])', 'a_groups gives'),
    ('lora(a_groups=2, init_weights=pissa)', 'a_groups gives layers one array'),
  ],
)
def test_options_that_exclude_one_another_are_refused(method, message):
  # Those of a preset, which the text does not give, among them.
  with pytest.raises(ValueError, match=message):
    canonical_text(method)


def test_a_count_replaces_a_preset_s_counts_by_layer():
  canonical_text('mola(experts=3, shared_experts=1)')


def test_exclusions_name_options():
  for method in METHODS.values():
    options = METHODS['molora'].module_defaults | method.module_defaults
    for exclusion in method.exclusions:
      for option in (*exclusion.first, *exclusion.second):
        assert option.partition('=')[0] in options

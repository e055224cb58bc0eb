# SPDX-License-Identifier: Apache-2.0
"""The syntax of methods."""

import pytest

from moepeft.config.method_string import (
  Spec,
  format_method,
  parse,
  parse_method,
)


@pytest.mark.parametrize(
  'text',
  [
    'ia3',
    'molora(experts=10, rank=4, router=topk(k=2))',
    "lora(rank=4, alpha=16.0, targets='*/q|*/v', rslora=True)",
    'mov(router=topk(k=1, renormalize=None))',
    'molora(experts_per_layer=[2, 4, 6], router=topk(k=2))',
    "mixture(expert=[lora(rank=4), ia3(on='input')], sizes=[[1], [], [-2]])",
  ],
)
def test_text_round_trips(text):
  assert str(parse(text)) == text
  assert parse(str(parse(text))) == parse(text)
  assert hash(parse(text)) == hash(parse(str(parse(text))))


def test_bare_words_are_strings_and_methods_compose():
  specs = parse_method('ia3(on=input) + lora(rank=2) + mov')
  assert [s.name for s in specs] == ['ia3', 'lora', 'mov']
  assert specs[0].get('on') == 'input'
  assert parse_method(format_method(specs)) == specs


def test_lists_are_tuples():
  spec = parse('molora(experts_per_layer=[2, 4])')
  assert spec.get('experts_per_layer') == (2, 4)
  assert parse('molora(experts_per_layer=(2, 4))') == spec
  assert parse('a(b=[lora(rank=2), mov])') == parse(
    "a(b=(lora(rank=2), 'mov'))"
  )
  single = parse('a(b=[3])')
  assert parse(str(single)) == single and single.get('b') == (3,)


def test_replace_keeps_the_order_and_adds_at_the_end():
  spec = Spec('lora', (('rank', 2), ('alpha', 1.0)))
  assert str(spec.replace(rank=3, dropout=0.1)) == (
    'lora(rank=3, alpha=1.0, dropout=0.1)'
  )


@pytest.mark.parametrize(
  'text', ['', 'lora(', 'lora(4)', 'lora(**x)', '3', 'a-b', 'lora(rank=x+1)']
)
def test_other_text_is_an_error_with_an_example(text):
  with pytest.raises(ValueError, match='write it like'):
    parse(text)

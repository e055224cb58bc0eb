# SPDX-License-Identifier: Apache-2.0
"""Mixtures by composition: forms against NumPy, texts, presets, refusals.

Axes: b 2, t 7, d 11, n 3, h 5; e 13 experts of rank r 19.
"""

import numpy as np
import pytest

from moepeft.models.t5 import model as t5
from moepeft.peft.build import build
from moepeft.peft.method_text import (
  canonical_text,
  expanded_text,
  portable_text,
)
from moepeft.peft.mixture import Mixture

from ..contracts import small
from .test_semantics import (
  CLOSE,
  E,
  R,
  adapter,
  call,
  normal,
  projection,
  size,
  softmax,
)

SITES = t5.sites(small.GATED)


@pytest.mark.parametrize('share', ['a', 'b'])
@pytest.mark.parametrize('place', ['q', 'o'])
def test_shared_factor_of_low_rank_experts(place, share):
  f, x, y, inside, outside = projection(place)
  a = normal('a', *inside, *([] if share == 'a' else [E]), R)
  b = normal('b', *([] if share == 'b' else [E]), R, *outside)
  kernel = normal('kernel', size(inside), E)
  expert = f'lora(rank={R}, alpha=3.0)'
  text = f"mixture(expert={expert}, experts={E}, share='{share}')"
  module = adapter(text, site=f'encoder/self/{place}')
  flat = x.reshape(2, 7, -1)
  p = softmax(flat @ kernel)
  expected = y.copy()
  for e in range(E):
    a_e = a if share == 'a' else a.reshape(-1, E, R)[:, e]
    b_e = b if share == 'b' else b[e]
    one = flat @ a_e.reshape(-1, R) @ b_e.reshape(R, -1)
    expected += p[..., e].reshape(2, 7, *[1] * len(outside)) * (
      3 / R * one.reshape(y.shape)
    )
  tree = {'a': a, 'b': b, 'router': {'kernel': kernel}}
  np.testing.assert_allclose(call(module, tree, f, x), expected, **CLOSE)


@pytest.mark.parametrize('reads', ['input', 'output'])
def test_vectors_on_the_input_scale_it_before_the_projection(reads):
  f, x, y, _, _ = projection('q')
  features = {'input': 11, 'output': 15}[reads]
  kernel, scale = normal('kernel', features, E), normal('scale', E, 11)
  module = adapter(
    f"mixture(expert=ia3(on='input'), experts={E}, reads='{reads}')"
  )
  p = softmax({'input': x, 'output': y.reshape(2, 7, -1)}[reads] @ kernel)
  weight = np.asarray(f.kernel(), np.float64)
  expected = np.einsum('btd,dnh->btnh', x * (p @ scale), weight)
  tree = {'scale': scale, 'router': {'kernel': kernel}}
  np.testing.assert_allclose(call(module, tree, f, x), expected, **CLOSE)


TEXTS = (
  'molora',
  'molora(experts=3, rank=2, router=topk(k=2, renormalize=True))',
  "molora(rank=2, share='a', rslora=True)",
  "mov(experts=3, reads='input')",
  'mixture(expert=lora)',
  "mixture(expert=lora(rank=4, dropout=0.1), experts=10, reads='output')",
  "mixture(experts=5, share='b', expert=lora(rank=2, alpha=3.0))",
  "mixture(expert=ia3(on='input'), router=random(k=2), targets='*/k|*/wo')",
  "lora(targets='*/q') + mixture(expert=ia3, experts=3, reads='heads')",
)


@pytest.mark.parametrize('semantics', ['official', 'paper'])
@pytest.mark.parametrize('text', TEXTS)
def test_texts_round_trip_and_mean_the_same_method(text, semantics):
  built = build(text, SITES, semantics)
  assert build(built.method, SITES, semantics) == built
  short = canonical_text(text, semantics)
  assert canonical_text(short, semantics) == short
  assert build(short, SITES, semantics).adapter_map == built.adapter_map
  full = expanded_text(text, semantics)
  assert expanded_text(full, semantics) == full
  assert 'molora' not in full and 'mov' not in full

  def modules(built):
    return [(p, m.clone(name='', parent=None)) for p, m in built.entries]

  # A preset's name is its entry's in the parameters, and all that differs; the
  # sites of `mov` under official semantics are those of its expert.
  again = build(full, SITES, semantics).adapter_map
  assert modules(again) == modules(built.adapter_map)


def test_presets_have_no_module_of_their_own():
  for preset in ('molora', 'mov'):
    assert type(adapter(preset)) is Mixture


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('mixture', 'mixture has an expert like lora'),
    ('mixture(expert=3)', 'mixture has an expert like lora'),
    ('mixture(expert=dora)', 'dora cannot be an expert; lora, .*ia3.* can'),
    ('mixture(expert=lorra)', "no method 'lorra'.*did you mean 'lora'"),
    ('mixture(expert=lora(rnk=3))', "no option rnk.*did you mean 'rank'"),
    ('mixture(expert=lora(rank=0))', 'option rank is at least 1'),
    ('mixture(expert=lora(rank=2), rank=3)', 'both have rank; give it once'),
    ("mixture(expert=lora, share='c')", "share is one of '', a, b; got 'c'"),
    ("mixture(expert=ia3, share='a')", 'no option share'),
    ("mixture(expert=lora, reads='y')", 'reads is one of input, output, heads'),
    ('molora(expert=ia3)', 'molora has no option expert'),
    ('lora(expert=ia3)', 'lora has no option expert'),
  ],
)
def test_mistakes_have_one_sentence(text, message):
  with pytest.raises(ValueError, match=message) as error:
    build(text, SITES)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('text', TEXTS)
def test_what_is_exported_has_the_text_of_the_run(text):
  method = build(text, SITES).method
  assert portable_text(method) == method
  assert "router='" not in method

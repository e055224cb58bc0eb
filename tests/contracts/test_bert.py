# SPDX-License-Identifier: Apache-2.0
"""Contracts of an encoder alone: sites, padding, packing, adapters."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.core.types import AXIS_NAMES
from moepeft.models import FAMILIES, decoder_only, encoder_only, weight_mapping
from moepeft.models.bert import weights as bert_weights
from moepeft.models.bert.model import Bert, BertConfig, sites
from moepeft.nn.adapter_hook import AdapterMap
from moepeft.nn.initializers import logical_axes
from moepeft.peft import build
from moepeft.peft.merge import merge

from . import small, small_bert
from .probes import Seen
from .small_bert import BARE, UNTIED, WHOLE, make

# Float32 sums of a few tens of numbers, in another order, over two layers.
CLOSE = dict(rtol=2e-5, atol=2e-5)
MIXTURE = small.ONE_EACH[-1]
CONFIGS = pytest.mark.parametrize(
  'config', [WHOLE, UNTIED, BARE], ids=['whole', 'untied', 'bare']
)


def apply(model, variables, batch=None):
  """The model's outputs for the real tokens, and for rows."""
  batch = batch or small_bert.batch()
  actual = small.jitted(model)(variables, batch)
  real = np.asarray(batch['inputs_mask'])
  said = {'states': np.asarray(actual.states)[real]}
  if actual.logits is not None:
    said['logits'] = np.asarray(actual.logits)[real]
  if actual.pooled is not None:
    said['pooled'] = np.asarray(actual.pooled)
  return said


def assert_close(found, expected, **close):
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    np.testing.assert_allclose(found[name], array, **(close or CLOSE))


def shapes_of(model):
  init = lambda: model.init(small.RNGS, small_bert.batch())  # noqa: E731
  return jax.eval_shape(init)


@CONFIGS
def test_every_site_is_reached_and_no_other(config):
  listed = sites(config)
  seen = set()
  Seen.log = seen
  adapter_map = AdapterMap(
    tuple((site, Seen(site, parent=None, name='seen')) for site in listed)
  )
  shapes_of(Bert(config, adapter_map))
  assert seen == set(listed)


@CONFIGS
def test_rules_name_every_parameter(config):
  shapes = weight_mapping.flatten(shapes_of(Bert(config))['params'])
  expected = weight_mapping.entries(
    bert_weights.hf_rules(config),
    bert_weights.axis_sizes(config),
    bert_weights.depths(config),
  )
  actual = {path: leaf.shape for path, leaf in shapes.items()}
  assert weight_mapping.stacked_shapes(expected) == actual
  known = FAMILIES['bert'].projections(config) | FAMILIES['bert'].activations(
    config
  )
  assert set(known) <= set(sites(config))


LETTERS = {name: letter for letter, name in AXIS_NAMES.items()}


@CONFIGS
def test_every_axis_has_the_size_of_its_letter(config):
  model, _ = make(config, 'molora(experts=7, rank=13)')
  shapes, sizes = shapes_of(model), bert_weights.axis_sizes(config)
  # A router reads d, the heads in one axis, or f.
  sizes = sizes | {'l': 2, 'e': 7, 'r': 13}
  for collection, tree in logical_axes(model, small_bert.batch()).items():
    expected = weight_mapping.flatten(shapes[collection])
    for path, said in weight_mapping.flatten(tree).items():
      letters = [LETTERS[name] for name in said]
      actual = dict(zip(letters, expected[path].shape, strict=True))
      own = sizes | {'i': actual.get('i')}
      assert expected[path].shape == tuple(own[a] for a in letters), path


def test_padding_never_moves_what_is_real():
  model, variables = make(WHOLE, MIXTURE, 0.1)
  batch = small_bert.batch()
  noise = jnp.where(batch['inputs_mask'], batch['inputs'], 5)
  before = apply(model, variables)
  # A hidden key's weight is exp of -1e9, which is zero in float32.
  assert_close(
    apply(model, variables, batch | {'inputs': noise}), before, rtol=0, atol=0
  )
  # Alone in a shorter row, it sums fewer zeros.
  row = {key: a[1:2, :4] for key, a in batch.items()}
  alone = apply(model, variables, row)['states']
  np.testing.assert_allclose(before['states'][11:15], alone, **CLOSE)


def test_a_token_sees_what_comes_after_it():
  model, variables = make(BARE)
  batch = small_bert.batch()
  changed = batch['inputs'].at[0, 10].add(1)
  moved = apply(model, variables, batch | {'inputs': changed})['states']
  difference = np.abs(moved - apply(model, variables)['states']).max(-1)
  assert (difference[:11] > 1e-4).all() and (difference[11:] == 0).all()


def test_types_and_positions_are_told_apart():
  model, variables = make(BARE)
  batch = small_bert.batch()
  plain = apply(model, variables)['states']
  types = (batch['inputs_types'] + 1) % 5
  other = apply(model, variables, batch | {'inputs_types': types})['states']
  assert np.abs(other - plain).max() > 0.1
  turned = {key: a[:1, ::-1] for key, a in batch.items()}
  backwards = apply(model, variables, turned)['states'][::-1]
  assert np.abs(backwards - plain[:11]).max() > 0.1


def test_packed_rows_equal_rows_alone():
  model, variables = make(WHOLE, MIXTURE, 0.1)
  batch = small_bert.batch()
  parts = [
    {key: a[i : i + 1, :n] for key, a in batch.items()}
    for i, n in ((1, 4), (2, 7))
  ]
  packed = {
    key: jnp.concatenate([part[key] for part in parts], 1) for key in batch
  }
  packed['inputs_segments'] = jnp.array([[1] * 4 + [2] * 7])
  packed['inputs_positions'] = jnp.array([[*range(4), *range(7)]])
  actual = apply(model, variables, packed)
  alone = [apply(model, variables, part) for part in parts]
  for name in ('states', 'logits'):
    rows = np.concatenate([part[name] for part in alone])
    np.testing.assert_allclose(actual[name], rows, **CLOSE)


@pytest.mark.parametrize(
  'options', [{'scan': False}, {'remat': 'full'}, {'attention': 'fused'}]
)
def test_other_programs_compute_the_same(options):
  plain, variables = make(WHOLE, MIXTURE, 0.1)
  model, _ = make(WHOLE, MIXTURE, 0.1, **options)
  own = variables if options.get('scan', True) else small.unstack(variables)
  assert_close(apply(model, own), apply(plain, variables))


@pytest.mark.parametrize(
  'method', small.others_slow(('full', MIXTURE), quick=(MIXTURE,))
)
def test_the_program_does_not_grow_with_depth(method):
  def program(layers):
    config = dataclasses.replace(WHOLE, layers=layers)
    model = Bert(config, build(method, sites(config)).adapter_map)
    shapes = shapes_of(model)
    shapes.pop('routing', None)

    def loss(variables):
      return jnp.sum(model.apply(variables, small_bert.batch()).logits)

    text = jax.jit(jax.grad(loss)).lower(shapes).as_text()
    return len(re.findall(r'\n', text))

  assert program(2) == program(13)


@pytest.mark.parametrize(
  'method', small.others_slow(small.ONE_EACH, quick=('ia3', MIXTURE))
)
def test_adapters_are_the_identity_at_first_and_act_when_moved(method):
  model, variables = make(WHOLE, method)
  _, base = make(WHOLE)
  assert weight_mapping.flatten(variables['params']).keys() == (
    weight_mapping.flatten(base['params']).keys()
  )
  expected = apply(Bert(WHOLE), {'params': variables['params']})
  # Routers' weights sum to one up to float32 rounding.
  assert_close(apply(model, variables), expected, rtol=1e-4, atol=1e-4)
  _, moved = make(WHOLE, method, 0.1)
  states = apply(model, moved)['states']
  assert np.abs(states - expected['states']).max() > 1e-2


@pytest.mark.parametrize(
  'method',
  small.others_slow(
    ('lora(rank=3)', 'ia3', 'dora(rank=3)', "ia3(targets='*/hidden')"),
    # DoRA is merged into T5 in test_adapters.py.
    quick=('ia3',),
  ),
)
def test_a_merged_base_does_what_base_and_adapter_do(method):
  built = build(method, sites(WHOLE))
  model, variables = make(WHOLE, method, 0.1)
  merge_all = jax.jit(functools.partial(merge, built))
  merged = apply(Bert(WHOLE), {'params': merge_all(variables)})
  assert_close(merged, apply(model, variables), rtol=1e-4, atol=1e-4)


def test_sites_outside_of_projections_take_scales():
  everything = {'states', 'pooled', 'logits'}
  moved = {
    'embed': everything,
    'embed_norm': everything,
    'encoder/mlp': everything,
    'encoder/self/norm': everything,
    'pooler': {'pooled'},
    'transform': {'logits'},
    'head': {'logits'},
  }
  model, variables = make(WHOLE, f"ia3(targets='{'|'.join(moved)}')")
  expected = apply(Bert(WHOLE), {'params': variables['params']})
  scales = weight_mapping.flatten(variables['peft'])
  assert len(scales) == len(moved)
  for site, target in moved.items():
    # The sublayer's own adapter lies beside it.
    own = site.replace('encoder/', 'encoder/layers/')
    own = own.replace('layers/mlp', 'layers/around_mlp')
    turned = scales | {f'{own}/ia3/scale': 1.5 * scales[f'{own}/ia3/scale']}
    said = apply(model, variables | {'peft': weight_mapping.unflatten(turned)})
    changed = {k for k in said if np.abs(said[k] - expected[k]).max() > 1e-3}
    assert changed == target, site


def test_bfloat16_is_near():
  plain, variables = make(WHOLE)
  model, _ = make(WHOLE, dtype=jnp.bfloat16)
  said = small.jitted(model)(variables, small_bert.batch())
  assert said.states.dtype == jnp.bfloat16
  assert said.logits.dtype == jnp.float32
  actual = np.asarray(said.states, np.float32)
  actual = actual[np.asarray(small_bert.batch()['inputs_mask'])]
  # Exact to 2**-8 of itself; states are of a norm's size, about 1.
  np.testing.assert_allclose(
    actual, apply(plain, variables)['states'], rtol=0.1, atol=0.1
  )


def test_the_registry_builds_what_it_lists():
  family = FAMILIES['bert']
  for size in family.sizes:
    config = family.config(size, '1.1')
    assert isinstance(config, BertConfig) and config.family == 'bert'
    assert encoder_only(config) and not decoder_only(config)
    fields = dataclasses.asdict(config)
    assert family.from_fields(fields) == config
    build('molora(experts=3, rank=2)', family.sites(config))
  assert encoder_only(Bert(WHOLE))
  assert not any(
    encoder_only(FAMILIES[name].config('tiny')) for name in ('t5', 'gpt2')
  )


def test_what_cannot_be_is_said():
  with pytest.raises(ValueError, match="got 'huge'"):
    FAMILIES['bert'].config('huge')
  with pytest.raises(
    ValueError, match='heads is a divisor of d_model=21; got 4'
  ):
    dataclasses.replace(WHOLE, heads=4)
  with pytest.raises(ValueError, match='19 learned positions; got rows of 23'):
    Bert(WHOLE).init(small.RNGS, {'inputs': jnp.zeros((1, 23), int)})
  with pytest.raises(ValueError, match="'chunked', which BERT does not"):
    Bert(WHOLE, attention='chunked').init(small.RNGS, small_bert.batch())

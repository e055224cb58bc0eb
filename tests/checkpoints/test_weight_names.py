# SPDX-License-Identifier: Apache-2.0
"""Rules, the content hash and the mismatch message."""

import hashlib

import jax
import ml_dtypes
import numpy as np
import pytest

from moepeft.models import FAMILIES, weight_mapping
from moepeft.models.t5 import weights as t5_weights
from moepeft.models.t5.model import T5, T5Config
from moepeft.models.weight_mapping import CheckpointError, Rule

from .cases import CONFIGS, random_params

SIZES = {'d': 2, 'n': 3, 'h': 5, 'e': 7}


def test_axes_are_split_moved_and_joined():
  reference = np.arange(30).reshape(15, 2)
  actual = weight_mapping.rearrange(reference, '(nh)d', 'dnh', SIZES)
  assert actual.shape == (2, 3, 5)
  # Row n * 5 + h of theirs is head n, feature h of ours.
  assert actual[1, 2, 4] == reference[2 * 5 + 4, 1]
  back = weight_mapping.rearrange(actual, 'dnh', '(nh)d', SIZES)
  np.testing.assert_array_equal(back, reference)


def test_axes_of_size_one_come_and_go():
  reference = np.arange(15).reshape(15, 1)
  actual = weight_mapping.rearrange(reference, '(nh)1', 'nh', SIZES)
  np.testing.assert_array_equal(actual, reference.reshape(3, 5))
  back = weight_mapping.rearrange(actual, 'nh', '(nh)1', SIZES)
  np.testing.assert_array_equal(back, reference)


def test_rules_name_every_parameter_of_the_model(config):
  batch = {key: np.ones((1, 2), int) for key in ('inputs', 'decoder_inputs')}
  init = lambda: T5(config).init(jax.random.key(0), batch)  # noqa: E731
  params = jax.eval_shape(init)['params']
  shapes = {k: v.shape for k, v in weight_mapping.flatten(params).items()}
  for rules in (t5_weights.hf_rules(config), t5_weights.t5x_rules(config)):
    expected = weight_mapping.entries(
      rules, t5_weights.axis_sizes(config), t5_weights.depths(config)
    )
    assert weight_mapping.stacked_shapes(expected) == shapes
    assert len({entry.stored_name for entry in expected}) == len(expected)


def test_projections_are_sites_of_the_model(config):
  from moepeft.models.t5 import model as t5

  known = t5.sites(config)
  assert set(
    t5_weights.projections(config) | FAMILIES['t5'].activations(config)
  ) <= set(known)


def test_content_hash_is_what_its_docstring_says():
  tree = {'x': np.array([1.5], np.float32)}
  digest = hashlib.sha256(np.float32(1.5).tobytes()).hexdigest()
  line = f'x float32 [1] {digest}\n'
  expected = hashlib.sha256(line.encode()).hexdigest()
  assert weight_mapping.content_hash(tree) == expected


def test_content_hash_does_not_see_how_layers_are_kept():
  stacked = {'encoder': {'layers': {'a': np.arange(6.0).reshape(2, 3)}}}
  apart = {
    'encoder': {
      'layers_0': {'a': np.arange(3.0)},
      'layers_1': {'a': np.arange(3.0, 6.0)},
    }
  }
  assert weight_mapping.content_hash(stacked) == weight_mapping.content_hash(
    apart
  )


@pytest.mark.parametrize('change', ['value', 'name', 'dtype', 'shape'])
def test_content_hash_sees_every_change(change):
  array = np.arange(4, dtype=np.float32)
  changed = {
    'value': {'a': array + 1},
    'name': {'b': array},
    'dtype': {'a': array.view(np.int32)},
    'shape': {'a': array.reshape(2, 2)},
  }
  before = weight_mapping.content_hash({'a': array})
  assert weight_mapping.content_hash(changed[change]) != before


def test_content_hash_takes_jax_arrays_and_bfloat16():
  array = np.arange(4).astype(ml_dtypes.bfloat16)
  here = weight_mapping.content_hash({'a': array})
  assert weight_mapping.content_hash({'a': jax.numpy.asarray(array)}) == here


def test_mismatch_reads_like_a_diff():
  with pytest.raises(CheckpointError) as error:
    weight_mapping.check(
      {'same': (1,), 'lost': (2, 3), 'wide': (4,)},
      {'same': (1,), 'wide': (5,), 'new': ()},
      'the file does not fit',
      'use another file',
    )
  assert str(error.value).splitlines() == [
    'the file does not fit (- expected, + found):',
    '- lost [2, 3]',
    '+ new []',
    '- wide [4]',
    '+ wide [5]',
    'Use another file.',
  ]


def test_a_long_mismatch_is_cut_and_says_so():
  actual = {f'x{i:02d}': (1,) for i in range(50)}
  with pytest.raises(CheckpointError, match=r'and 10 more lines'):
    weight_mapping.check({}, actual, 'what', 'advice')


def test_layers_of_unlike_dtypes_need_a_dtype():
  rules = [Rule('s/layers/{l}/a', 'a{l}', 'd', 'd')]
  expected = weight_mapping.entries(rules, {'d': 2}, {'s': 2})
  arrays = {'a0': np.ones(2, np.float32), 'a1': np.ones(2, np.float16)}
  with pytest.raises(CheckpointError, match='a1 is float16'):
    weight_mapping.read(expected, {'d': 2}, arrays.__getitem__)
  tree, _ = weight_mapping.read(
    expected, {'d': 2}, arrays.__getitem__, np.float32
  )
  assert tree['s']['layers']['a'].dtype == np.float32


def test_a_tree_of_another_config_is_not_written():
  config = CONFIGS['gated-untied']
  other = random_params(CONFIGS['plain-untied'])
  expected = weight_mapping.entries(
    t5_weights.hf_rules(config),
    t5_weights.axis_sizes(config),
    t5_weights.depths(config),
  )
  with pytest.raises(CheckpointError, match=r'- encoder/layers/mlp/wi_0'):
    weight_mapping.write(expected, t5_weights.axis_sizes(config), other)


def test_hf_config_round_trips(config):
  fields = t5_weights.to_hf_fields(config)
  assert t5_weights.from_hf_fields(fields, tied=config.tied) == config


def test_hf_config_of_another_activation_is_refused():
  fields = t5_weights.to_hf_fields(T5Config()) | {'feed_forward_proj': 'tanh'}
  with pytest.raises(CheckpointError, match="'tanh' in config.json"):
    t5_weights.from_hf_fields(fields, tied=False)


def test_hf_config_that_lacks_a_size_is_refused():
  fields = t5_weights.to_hf_fields(T5Config())
  del fields['d_kv']
  with pytest.raises(CheckpointError, match='lacks d_kv'):
    t5_weights.from_hf_fields(fields, tied=False)


@pytest.mark.parametrize(
  ('fields', 'scaled'),
  [
    ({}, True),
    ({'tie_word_embeddings': False}, False),
    # transformers 5 writes True for every T5, and the scale beside it.
    ({'tie_word_embeddings': True, 'scale_decoder_outputs': False}, False),
  ],
)
def test_head_is_scaled_as_transformers_does(fields, scaled):
  base = t5_weights.to_hf_fields(T5Config())
  del base['tie_word_embeddings'], base['scale_decoder_outputs']
  config = t5_weights.from_hf_fields(base | fields, tied=False)
  assert config.scale_head is scaled

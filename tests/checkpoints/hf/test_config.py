# SPDX-License-Identifier: Apache-2.0
"""The config that follows from a config.json, as versions 4 and 5 of
transformers write it, and configs that cannot be."""

import json
import os

import numpy as np
import pytest

from moepeft.checkpoints.hf import model as hf
from moepeft.models import by_model_type, hf_fields
from moepeft.models.t5 import weights as t5_weights
from moepeft.models.t5.model import T5
from moepeft.models.weight_mapping import CheckpointError

from ..cases import CONFIGS, config_from_hf, random_params

T5_SIZES = {
  'model_type': 't5',
  'vocab_size': 29,
  'd_model': 11,
  'num_heads': 3,
  'd_kv': 5,
  'd_ff': 13,
  'num_layers': 2,
}
DECODER = {
  'vocab_size': 29,
  'hidden_size': 12,
  'num_attention_heads': 6,
  'intermediate_size': 13,
  'num_hidden_layers': 3,
}
V4 = {'transformers_version': '4.57.6'}
V5 = {'transformers_version': '5.24.0'}


# Whether the head's input is scaled: read from the logits of random models
# saved and run by transformers 4.57.6 and 5.24.0.
@pytest.mark.parametrize(
  'kind, fields, tied, scaled',
  [
    ('t5', V4, True, True),
    ('t5', V4 | {'tie_word_embeddings': True}, True, True),
    ('t5', V4 | {'tie_word_embeddings': False}, False, False),
    # Version 5 writes true for all, and the scale beside it.
    (
      't5',
      V5 | {'tie_word_embeddings': True, 'scale_decoder_outputs': False},
      False,
      False,
    ),
    (
      't5',
      V5 | {'tie_word_embeddings': True, 'scale_decoder_outputs': True},
      True,
      True,
    ),
    ('mt5', V4, False, False),
    ('mt5', V4 | {'tie_word_embeddings': False}, False, False),
    ('mt5', V4 | {'tie_word_embeddings': True}, True, True),
    # What version 5 writes of an mT5 with a head of its own, and of one tied.
    ('mt5', V5 | {'tie_word_embeddings': True}, False, False),
    ('mt5', V5 | {'tie_word_embeddings': True}, True, False),
    # The version is lost: a head of its own decides.
    ('mt5', {'tie_word_embeddings': True}, False, False),
  ],
)
def test_a_t5_scales_its_head_as_the_version_that_saved_it(
  kind, fields, tied, scaled
):
  config = t5_weights.from_hf_fields(
    T5_SIZES | fields | {'model_type': kind}, tied
  )
  assert config.scale_head is scaled
  assert config.tied is tied


@pytest.mark.parametrize(
  'kind, said, expected',
  [
    ('t5', None, (False, 'relu')),
    ('mt5', None, (True, 'gelu')),
    ('t5', 'gelu', (False, 'gelu_exact')),
    ('t5', 'gelu_new', (False, 'gelu')),
    ('t5', 'gated-gelu', (True, 'gelu')),
    ('t5', 'gated-silu', (True, 'silu')),
    ('t5', 'gated-relu', (True, 'relu')),
  ],
)
def test_a_t5s_feed_forward_is_its_class_s_where_the_file_is_silent(
  kind, said, expected
):
  more = {} if said is None else {'feed_forward_proj': said}
  config = t5_weights.from_hf_fields(
    T5_SIZES | more | {'model_type': kind}, True
  )
  assert (config.gated, config.activation) == expected
  if said:
    assert t5_weights.to_hf_fields(config)['feed_forward_proj'] == said


@pytest.mark.parametrize(
  'kind, fields, expected',
  [
    # Gemma 1 reads hidden_act, Gemma 2 hidden_activation, each that alone.
    ('gemma', {'hidden_act': 'gelu'}, {'activation': 'gelu'}),
    (
      'gemma',
      {'hidden_act': 'relu', 'hidden_activation': None},
      {'activation': 'relu'},
    ),
    (
      'gemma',
      {'hidden_act': 'gelu', 'hidden_activation': 'relu'},
      {'activation': 'gelu'},
    ),
    ('gemma2', {'hidden_act': 'relu'}, {'activation': 'gelu'}),
    ('gemma2', {'hidden_activation': 'gelu'}, {'activation': 'gelu_exact'}),
    # Heads of keys where the file is silent, by class; null is as many.
    ('llama', {}, {'kv_heads': 16}),
    ('mistral', {}, {'kv_heads': 8}),
    ('gemma2', {}, {'kv_heads': 4}),
    ('gemma', {}, {'kv_heads': 16}),
    ('mistral', {'num_key_value_heads': None}, {'kv_heads': 16}),
    ('qwen3', {}, {'head_dim': 128}),
    ('qwen2', {}, {'head_dim': 2, 'attention_bias': True}),
    ('gemma', {}, {'head_dim': 256, 'eps': 1e-6}),
    ('gemma2', {'query_pre_attn_scalar': 4}, {'scale': 0.5}),
  ],
)
def test_decoders_take_their_class_s_defaults(kind, fields, expected):
  fields = (
    DECODER
    | {'model_type': kind, 'hidden_size': 32, 'num_attention_heads': 16}
    | fields
  )
  tied = kind.startswith('gemma')
  config = config_from_hf(fields, tied)
  assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
  'aliased, kind',
  [
    (
      {
        'hidden_size': 12,
        'num_attention_heads': 3,
        'num_hidden_layers': 2,
        'max_position_embeddings': 16,
      },
      'gpt2',
    ),
    (
      {
        'hidden_size': 12,
        'num_attention_heads': 3,
        'num_hidden_layers': 2,
        'head_dim': 5,
        'd_ff': 7,
      },
      'mt5',
    ),
  ],
)
def test_sizes_are_read_by_their_other_names(aliased, kind):
  family = by_model_type()[kind]
  fields = hf_fields.with_aliases(
    {'model_type': kind, 'vocab_size': 29} | aliased, family.hf.aliases
  )
  config = family.hf.from_fields(fields, True)
  sizes = family.axis_sizes(config)
  assert (sizes['d'], sizes['n']) == (12, 3)


def test_a_decoder_that_starts_from_another_token_is_refused():
  with pytest.raises(CheckpointError, match='decoder_start_token_id 5'):
    t5_weights.from_hf_fields(T5_SIZES | {'decoder_start_token_id': 5}, True)


@pytest.mark.slow
@pytest.mark.parametrize('own_head', [True, False])
def test_an_mt5_has_the_logits_of_transformers(tmp_path, own_head):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  torch.manual_seed(0)
  sizes = {k: v for k, v in T5_SIZES.items() if k != 'model_type'}
  model = transformers.MT5ForConditionalGeneration(
    transformers.MT5Config(**sizes)
  ).eval()
  if own_head:
    model.lm_head.weight = torch.nn.Parameter(torch.randn(29, 11))
  model.save_pretrained(tmp_path)
  rng = np.random.default_rng(0)
  inputs, outputs = (rng.integers(2, 29, (2, t)) for t in (5, 3))
  with torch.no_grad():
    reference = model(
      input_ids=torch.tensor(inputs), decoder_input_ids=torch.tensor(outputs)
    ).logits.numpy()
  loaded = hf.load(str(tmp_path))
  assert loaded.config.tied is not own_head
  batch = {'inputs': inputs, 'decoder_inputs': outputs}
  actual = T5(loaded.config).apply({'params': loaded.params}, batch)
  # Sums of tens of float32 products, in another order.
  np.testing.assert_allclose(
    actual, reference, rtol=0, atol=1e-5 * np.abs(reference).max()
  )


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('hf') / 'model'
  config = CONFIGS['gated-untied']
  hf.save(path, config, random_params(config))
  return path


@pytest.fixture
def edited(folder, tmp_path):
  """Writes a changed config.json beside the same weights."""
  os.symlink(folder / 'model.safetensors', tmp_path / 'model.safetensors')

  def edit(text=None, **changes):
    fields = json.loads((folder / 'config.json').read_text()) | changes
    text = json.dumps(fields) if text is None else text
    (tmp_path / 'config.json').write_text(text)
    return str(tmp_path)

  return edit


WRONG = [None, True, 'x', -1, 0, 0.5, 1e308, 2**40, 10**400, [3], {'a': 1}]


@pytest.mark.parametrize('value', WRONG, ids=lambda v: str(v)[:8])
def test_no_type_and_no_size_in_a_config_is_a_traceback(edited, value):
  fields = json.loads(open(edited() + '/config.json').read())
  for name in fields:
    path = edited(**{name: value})
    try:
      hf.load_config(path)
    except CheckpointError as error:
      assert 'config.json' in str(error)
      assert '\n' not in str(error).split(' (- expected')[0]


@pytest.mark.parametrize('value', WRONG, ids=lambda v: str(v)[:8])
@pytest.mark.parametrize('kind', ['llama', 'gemma2', 'gpt2', 'qwen3', 'bert'])
def test_no_field_of_any_family_is_a_traceback(kind, value):
  whole = DECODER | {
    'model_type': kind,
    'n_embd': 12,
    'n_head': 3,
    'n_layer': 2,
  }
  rope = {'rope_type': 'yarn', 'factor': 2.0}
  whole |= {'rope_scaling': rope, 'tie_word_embeddings': True}
  # What names the family is checked where the file is read.
  form = by_model_type()[kind].hf
  names = {*hf_fields.FIELD_TYPES, *form.field_types, *rope}
  for name in names - {'model_type'}:
    for fields in (
      whole | {name: value},
      whole | {'rope_scaling': rope | {name: value}},
    ):
      try:
        hf_fields.check(fields, form.field_types)
        form.from_fields(fields, True)
      except ValueError as error:
        assert '\n' not in str(error)


def test_a_config_with_a_byte_order_mark_is_read(edited, folder):
  text = '\ufeff' + (folder / 'config.json').read_text()
  assert hf.load_config(edited(text)) == CONFIGS['gated-untied']


@pytest.mark.parametrize(
  'text, reason',
  [
    ('[' * 5000 + ']' * 5000, 'nested too deeply'),
    ('{"a": ' * 500 + '1' + '}' * 500, 'nested too deeply'),
    ('[1]', 'expected a JSON object'),
    ('{"model_type": "\\ud800"}', 'surrogate'),
    ('{"model_type": ["t5"]}', 'family'),
  ],
)
def test_what_is_no_config_is_refused_in_a_sentence(edited, text, reason):
  with pytest.raises(ValueError, match=reason):
    hf.load_config(edited(text))


@pytest.mark.parametrize(
  'index',
  [
    '[]',
    '{}',
    '{"weight_map": 3}',
    '{"weight_map": {"a": 3}}',
    '{"weight_map": {"a": "../../etc/passwd"}}',
  ],
)
def test_a_damaged_index_is_refused_in_a_sentence(tmp_path, index):
  (tmp_path / 'config.json').write_text(json.dumps(T5_SIZES))
  (tmp_path / 'model.safetensors.index.json').write_text(index)
  with pytest.raises(ValueError, match='index.json'):
    hf.load_config(str(tmp_path))


@pytest.mark.parametrize(
  'name, kind',
  [
    ('pytorch_model.bin', 'pickle'),
    ('tf_model.h5', 'Keras'),
    ('model.ckpt.index', 'TensorFlow'),
    ('model.ckpt-1000000.index', 'TensorFlow'),
    ('flax_model.msgpack', 'Flax'),
  ],
)
def test_weights_in_other_forms_are_named_with_what_to_do(tmp_path, name, kind):
  (tmp_path / 'config.json').write_text(json.dumps(T5_SIZES))
  (tmp_path / name).touch()
  with pytest.raises(CheckpointError, match=f'{name}, .*{kind}.*from_pretr'):
    hf.load_config(str(tmp_path))


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors'])
def test_a_pipe_in_a_model_directory_is_refused_at_once(folder, tmp_path, name):
  for file in folder.iterdir():
    if file.name != name:
      os.symlink(file, tmp_path / file.name)
  os.mkfifo(tmp_path / name)
  with pytest.raises((ValueError, OSError), match='named pipe'):
    hf.load(str(tmp_path))

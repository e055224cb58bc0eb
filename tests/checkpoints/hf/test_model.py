# SPDX-License-Identifier: Apache-2.0
"""Hugging Face directories, both ways."""

import dataclasses
import json
import os
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moepeft.checkpoints.hf import model as hf
from moepeft.models import weight_mapping
from moepeft.models.weight_mapping import CheckpointError

from ..cases import CONFIGS, assert_equal_trees, random_params

CONFIG = CONFIGS['gated-untied']
FILE = 'model.safetensors'


@pytest.fixture
def saved(tmp_path):
  """A directory of CONFIG and its parameters."""
  params = random_params(CONFIG)
  hf.save(tmp_path / 'model', CONFIG, params)
  return tmp_path / 'model', params


def rewrite(folder, change, name=FILE):
  """Applies a change to the tensors of a file."""
  tensors = load_file(folder / name)
  change(tensors)
  save_file(tensors, folder / name)


def edit_config(folder, **changes):
  fields = json.loads((folder / 'config.json').read_text()) | changes
  (folder / 'config.json').write_text(json.dumps(fields))


def test_round_trip_is_exact(config, tmp_path):
  params = random_params(config)
  hf.save(tmp_path / 'model', config, params)
  loaded = hf.load(str(tmp_path / 'model'))
  assert loaded.config == config
  assert_equal_trees(loaded.params, params)
  assert loaded.sha256 == weight_mapping.content_hash(params)
  assert hf.load_config(str(tmp_path / 'model')) == config


def test_transformers_gives_the_same_logits(config, tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  from moepeft.models.t5.model import T5

  params = random_params(config)
  hf.save(tmp_path / 'model', config, params)
  model = transformers.T5ForConditionalGeneration.from_pretrained(
    tmp_path / 'model'
  )
  rng = np.random.default_rng(0)
  inputs, outputs = (rng.integers(2, 29, (2, t)) for t in (5, 3))
  with torch.no_grad():
    reference = model(
      input_ids=torch.tensor(inputs), decoder_input_ids=torch.tensor(outputs)
    ).logits.numpy()
  batch = {'inputs': inputs, 'decoder_inputs': outputs}
  actual = T5(config).apply({'params': params}, batch)
  # Sums of tens of float32 products, in another order.
  np.testing.assert_allclose(
    actual, reference, rtol=0, atol=1e-5 * np.abs(reference).max()
  )


def test_shards_hold_the_same_model(saved, tmp_path):
  folder, params = saved
  hf.save(tmp_path / 'shards', CONFIG, params, max_shard_bytes=4000)
  files = sorted(p.name for p in (tmp_path / 'shards').glob('*.safetensors'))
  assert len(files) > 3
  assert files[0] == f'model-00001-of-{len(files):05d}.safetensors'
  for file in files:
    stored = load_file(tmp_path / 'shards' / file)
    size = sum(tensor.nbytes for tensor in stored.values())
    assert size <= 4000 or len(stored) == 1
  loaded = hf.load(str(tmp_path / 'shards'))
  assert_equal_trees(loaded.params, params)
  assert loaded.sha256 == hf.load(str(folder)).sha256


def test_a_lost_shard_is_named(saved, tmp_path):
  hf.save(tmp_path / 'shards', CONFIG, saved[1], max_shard_bytes=4000)
  lost = sorted((tmp_path / 'shards').glob('*.safetensors'))[1]
  lost.unlink()
  with pytest.raises(CheckpointError, match=f'{lost.name} does not exist'):
    hf.load(str(tmp_path / 'shards'))


def test_dtype_casts_and_the_hash_stays(saved):
  folder, params = saved
  loaded = hf.load(str(folder), 'bfloat16')
  for path, leaf in weight_mapping.flatten(loaded.params).items():
    expected = weight_mapping.flatten(params)[path].astype(ml_dtypes.bfloat16)
    assert leaf.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(leaf, expected)
  assert loaded.sha256 == hf.load(str(folder)).sha256


def test_bfloat16_files_keep_their_dtype(saved, tmp_path):
  _, params = saved
  hf.save(tmp_path / 'half', CONFIG, params, dtype='bfloat16')
  fields = json.loads((tmp_path / 'half' / 'config.json').read_text())
  assert fields['dtype'] == 'bfloat16'
  loaded = hf.load(str(tmp_path / 'half'))
  assert loaded.params['embed']['embedding'].dtype == ml_dtypes.bfloat16
  assert loaded.sha256 != weight_mapping.content_hash(params)


def test_reading_holds_one_tensor_beside_the_model(tmp_path):
  # 12 layers, so that one tensor is a small part of the whole.
  config = dataclasses.replace(
    CONFIG, d_model=128, ffn=256, encoder_layers=12, decoder_layers=12
  )
  params = random_params(config)
  size = sum(leaf.nbytes for leaf in weight_mapping.flatten(params).values())
  largest = max(
    leaf[0].nbytes for leaf in weight_mapping.flatten(params).values()
  )
  hf.save(tmp_path / 'model', config, params, max_shard_bytes=10**6)
  del params
  tracemalloc.start()
  loaded = hf.load(str(tmp_path / 'model'))
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert loaded.config == config
  # The stacked arrays, one tensor and its contiguous copy for the hash, and
  # the files' headers.
  assert size <= peak < size + 4 * largest + 200_000 < 1.2 * size


def test_duplicates_of_the_embedding_are_tolerated(saved):
  folder, params = saved
  for side in ('encoder', 'decoder'):
    name = f'{side}.embed_tokens.weight'
    rewrite(folder, lambda t, name=name: t.update({name: t['shared.weight']}))
  assert_equal_trees(hf.load(str(folder)).params, params)


def test_a_head_that_repeats_the_embedding_is_no_head(tmp_path):
  config = CONFIGS['plain-tied']
  params = random_params(config)
  hf.save(tmp_path / 'model', config, params)
  head, embedding = 'lm_head.weight', 'shared.weight'
  rewrite(tmp_path / 'model', lambda t: t.update({head: t[embedding]}))
  loaded = hf.load(str(tmp_path / 'model'))
  assert loaded.config == config
  assert_equal_trees(loaded.params, params)


def test_a_head_of_its_own_counts_whatever_the_config_says(saved):
  # transformers 5 says that every T5 is tied, and keeps such a head.
  folder, params = saved
  edit_config(folder, tie_word_embeddings=True)
  loaded = hf.load(str(folder))
  assert loaded.config == CONFIG
  assert_equal_trees(loaded.params, params)


def test_missing_and_foreign_tensors_are_listed(saved):
  folder, _ = saved
  lost = 'encoder.block.1.layer.0.SelfAttention.k.weight'
  rewrite(folder, lambda t: t.update({'classifier.bias': t.pop(lost)}))
  with pytest.raises(CheckpointError) as error:
    hf.load(str(folder))
  # 15 = 3 heads of 5.
  assert f'- {lost} [15, 11]' in str(error.value)
  assert '+ classifier.bias [15, 11]' in str(error.value)
  assert 'Use the config.json' in str(error.value)


def test_another_width_is_shown_from_both_sides(saved):
  folder, _ = saved
  edit_config(folder, d_ff=14)
  name = 'decoder.block.0.layer.2.DenseReluDense.wo.weight'
  with pytest.raises(CheckpointError) as error:
    hf.load(str(folder))
  assert f'- {name} [11, 14]\n+ {name} [11, 13]' in str(error.value)


@pytest.mark.parametrize('kept', [0, 4, 100, 0.5, 0.99])
def test_a_truncated_file_is_one_sentence(saved, kept):
  folder, _ = saved
  data = (folder / FILE).read_bytes()
  size = kept if isinstance(kept, int) else int(kept * len(data))
  (folder / FILE).write_bytes(data[:size])
  with pytest.raises(CheckpointError, match='truncated or damaged') as error:
    hf.load(str(folder))
  assert '\n' not in str(error.value)


def test_a_damaged_config_is_one_sentence(saved):
  folder, _ = saved
  (folder / 'config.json').write_text('{"model_type": "t5",')
  with pytest.raises(CheckpointError, match='is not JSON'):
    hf.load(str(folder))


def test_another_family_is_refused(saved):
  folder, _ = saved
  edit_config(folder, model_type='roberta')
  with pytest.raises(CheckpointError, match="family 'roberta'"):
    hf.load(str(folder))


def test_pickles_are_refused_with_what_to_do(saved):
  folder, _ = saved
  (folder / FILE).rename(folder / 'pytorch_model.bin')
  with pytest.raises(CheckpointError, match='convert it with transformers'):
    hf.load(str(folder))


def test_a_name_that_the_hub_does_not_give_is_one_sentence(monkeypatch):
  hub = pytest.importorskip('huggingface_hub')

  def fail(*args, **kwargs):
    raise OSError('no route to host\nsecond line')

  monkeypatch.setattr(hub, 'snapshot_download', fail)
  with pytest.raises(CheckpointError, match='no route to host') as error:
    hf.load('someone/some-model')
  assert '\n' not in str(error.value)


def test_a_local_directory_wins_over_the_hub(saved, monkeypatch):
  hub = pytest.importorskip('huggingface_hub')
  monkeypatch.setattr(hub, 'snapshot_download', None)
  monkeypatch.chdir(saved[0].parent)
  assert hf.load('model').config == CONFIG


def test_an_output_that_holds_files_is_kept(saved):
  folder, params = saved
  with pytest.raises(CheckpointError, match='already contains config.json'):
    hf.save(folder, CONFIG, params)
  hf.save(folder, CONFIG, random_params(CONFIG, seed=2), overwrite=True)
  assert hf.load(str(folder)).sha256 != weight_mapping.content_hash(params)


def test_overwrite_spares_what_is_no_checkpoint(saved):
  folder, params = saved
  (folder / 'thesis.tex').write_text('...')
  with pytest.raises(CheckpointError, match='thesis.tex'):
    hf.save(folder, CONFIG, params, overwrite=True)
  assert (folder / 'thesis.tex').exists()


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
  def fail(*args, **kwargs):
    raise OSError('disk full')

  monkeypatch.setattr(hf, 'save_file', fail)
  with pytest.raises(OSError, match='disk full'):
    hf.save(tmp_path / 'model', CONFIG, random_params(CONFIG))
  assert not list(tmp_path.iterdir())


def test_tokenizer_files_come_along(saved, tmp_path):
  source = tmp_path / 'tokenizer'
  source.mkdir()
  (source / 'tokenizer.json').write_text('{}')
  (source / 'notes.txt').write_text('mine')
  hf.save(tmp_path / 'with', CONFIG, saved[1], tokenizer=str(source))
  assert sorted(p.name for p in (tmp_path / 'with').iterdir()) == [
    'config.json',
    'model.safetensors',
    'tokenizer.json',
  ]


def test_others_may_read_what_is_written(saved):
  folder, _ = saved
  mask = os.umask(0o022)
  os.umask(mask)
  for file in folder.iterdir():
    assert file.stat().st_mode & 0o777 == 0o666 & ~mask, file

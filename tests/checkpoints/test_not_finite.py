# SPDX-License-Identifier: Apache-2.0
"""NaN and infinity in weights are found where they are read, by name."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moepeft import convert
from moepeft.checkpoints import adapter
from moepeft.checkpoints.adapter import AdapterWeights
from moepeft.checkpoints.gguf import model as gguf
from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.hf import peft
from moepeft.checkpoints.t5x import model as t5x
from moepeft.models import weight_mapping
from moepeft.models.weight_mapping import CheckpointError

from . import gguf_files
from .cases import CONFIGS, adapter_tree, random_params

CONFIG = CONFIGS['gated-untied']
NAME = 'decoder.block.3.layer.2.DenseReluDense.wo.weight'
BAD = (np.nan, np.inf, -np.inf)


def spoil(file, name, value, dtype=None):
  """Puts a number that is not finite into a tensor of a safetensors file."""
  tensors = {
    key: array if dtype is None else array.astype(dtype)
    for key, array in load_file(file).items()
  }
  tensors[name].flat[-1] = value
  save_file(tensors, file, metadata={'format': 'pt'})


@pytest.mark.parametrize('value', BAD)
@pytest.mark.parametrize('dtype', ['float32', 'float16', ml_dtypes.bfloat16])
def test_a_base_of_hugging_face_is_refused(tmp_path, value, dtype):
  hf.save(tmp_path / 'm', CONFIG, random_params(CONFIG))
  spoil(tmp_path / 'm' / 'model.safetensors', NAME, value, dtype)
  with pytest.raises(CheckpointError, match=f'{NAME} in .*/m holds 1 numbers'):
    hf.load(str(tmp_path / 'm'), 'float32')


@pytest.mark.parametrize('dtype', ['float16', ml_dtypes.bfloat16, 'float32'])
def test_the_largest_finite_numbers_pass(dtype):
  largest = ml_dtypes.finfo(dtype).max
  array = np.full((3, 5), largest, dtype)
  weight_mapping.check_finite('w', array, 'x')
  weight_mapping.check_finite('w', -array.T, 'x')
  with pytest.raises(CheckpointError, match='w in x holds 1 numbers of 15'):
    array[2, 4] = np.nan
    weight_mapping.check_finite('w', array.T, 'x')


def test_whole_numbers_and_empty_arrays_pass():
  weight_mapping.check_finite('w', np.arange(3), 'x')
  weight_mapping.check_finite('w', np.zeros((0, 3), np.float16), 'x')


def test_the_scale_of_a_quantised_block_is_looked_at(tmp_path):
  path = str(tmp_path / 'm.gguf')
  params = gguf_files.random_params(gguf_files.CONFIGS['llama'])
  gguf_files.write(path, 'llama', params, kind='Q8_0')
  file = gguf.open_file(path)
  name = 'blk.1.ffn_down.weight'
  offset = int(file._tensors[name].data_offset)
  raw = bytearray(open(path, 'rb').read())
  # A block begins with its scale, a float16: here infinity.
  raw[offset : offset + 2] = b'\x00\x7c'
  open(path, 'wb').write(raw)
  with pytest.raises(CheckpointError, match=f'{name} in .*m.gguf holds'):
    gguf.load(path)


def test_a_t5x_checkpoint_is_refused(tmp_path):
  params = random_params(CONFIG)
  params['encoder']['norm']['scale'][3] = np.nan
  t5x.save(tmp_path / 'x', CONFIG, params)
  with pytest.raises(CheckpointError, match='encoder_norm/scale in'):
    t5x.load(str(tmp_path / 'x'))


LEAVES = {'lora/a': '{in}r', 'lora/b': 'r{out}'}
LORA = AdapterWeights(
  "lora(rank=7, alpha=16, targets='encoder/self/q')",
  adapter_tree(CONFIG, LEAVES, ['encoder/self/q']),
)


def test_an_adapter_of_peft_is_refused(tmp_path):
  peft.save(tmp_path / 'a', CONFIG, LORA)
  module = 'encoder.block.1.layer.0.SelfAttention.q'
  name = f'base_model.model.{module}.lora_B.weight'
  spoil(tmp_path / 'a' / peft.WEIGHTS_FILE, name, np.nan)
  with pytest.raises(CheckpointError, match=f'{module}.lora_B'):
    peft.load(str(tmp_path / 'a'), CONFIG)


def test_an_adapter_of_moepeft_is_refused(tmp_path):
  tree = weight_mapping.unflatten(
    {
      path: np.array(leaf)
      for path, leaf in weight_mapping.flatten(LORA.tree).items()
    }
  )
  tree['encoder']['layers']['self']['q']['lora']['a'][0, 0, 0] = np.inf
  card = adapter.describe(LORA.method, 'official', '', '', 't5', CONFIG)
  adapter.save(tmp_path / 'a', tree, card)
  with pytest.raises(CheckpointError, match='self/q/lora/a in'):
    adapter.load(str(tmp_path / 'a'))


def test_convert_says_it_in_one_sentence(tmp_path, capsys):
  hf.save(tmp_path / 'm', CONFIG, random_params(CONFIG))
  spoil(tmp_path / 'm' / 'model.safetensors', NAME, np.nan)
  flags = [f'--input={tmp_path}/m', f'--output={tmp_path}/o', '--to=t5x']
  assert convert.main(['convert', *flags]) == 2
  error = capsys.readouterr().err
  assert error.startswith(f'error: {NAME} in ') and error.count('\n') == 1
  assert not (tmp_path / 'o').exists()

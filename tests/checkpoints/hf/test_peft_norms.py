# SPDX-License-Identifier: Apache-2.0
"""LN tuning of peft, both ways."""

import pytest
from safetensors.numpy import load_file, save_file

from moepeft.checkpoints.adapter import AdapterWeights
from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.hf import peft
from moepeft.models import weight_mapping
from moepeft.models.weight_mapping import CheckpointError

from ..cases import DECODERS, assert_equal_trees, random_params, random_tree
from .test_peft import CONFIG, PARAMS, logits
from .test_peft_low_rank import assert_close, torch_logits

INNER = 'encoder/layers/mlp/norm/ln_tuning/scale'
OUTER = 'decoder/norm/ln_tuning/scale'
ADAPTER = AdapterWeights(
  "ln_tuning(targets='encoder/mlp/norm|decoder/norm')",
  random_tree({INNER: (2, 11), OUTER: (11,)}),
)


def test_norms_round_trip_and_peft_gives_the_same_logits(tmp_path):
  pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  reference = pytest.importorskip('peft')

  peft.save(tmp_path / 'a', CONFIG, ADAPTER)
  loaded = peft.load(str(tmp_path / 'a'), CONFIG)
  assert loaded.method == ADAPTER.method
  assert_equal_trees(loaded.tree, ADAPTER.tree)
  hf.save(tmp_path / 'base', CONFIG, PARAMS)
  model = transformers.T5ForConditionalGeneration.from_pretrained(
    tmp_path / 'base'
  )
  model = reference.PeftModel.from_pretrained(model, tmp_path / 'a').eval()
  assert_close(torch_logits(model), logits(ADAPTER))


@pytest.mark.parametrize('family', ['qwen3', 'gemma2'])
def test_norms_of_decoders_keep_their_arrays(family, tmp_path):
  # Norms of heads, and norms after sublayers.
  config = DECODERS[family]
  params = weight_mapping.flatten(random_params(config))
  tree = random_tree(
    {
      f'{name.removesuffix("scale")}ln_tuning/scale': array.shape
      for name, array in params.items()
      if name.endswith('/scale')
    }
  )
  peft.save(tmp_path, config, AdapterWeights('ln_tuning', tree), overwrite=True)
  assert_equal_trees(peft.load(str(tmp_path), config).tree, tree)


def test_a_norm_of_some_layers_is_refused(tmp_path):
  peft.save(tmp_path / 'a', CONFIG, ADAPTER)
  file = tmp_path / 'a' / peft.WEIGHTS_FILE
  arrays = load_file(file)
  save_file({n: a for n, a in arrays.items() if '.block.0.' not in n}, file)
  with pytest.raises(CheckpointError, match=r'no encoder\.block\.0\..* in all'):
    peft.load(str(tmp_path / 'a'), CONFIG)


def test_another_site_is_refused(tmp_path):
  tree = random_tree({'encoder/layers/mlp/wo/ln_tuning/scale': (2, 11)})
  with pytest.raises(CheckpointError, match='encoder/mlp/wo is no norm'):
    peft.save(tmp_path / 'a', CONFIG, AdapterWeights('ln_tuning', tree))

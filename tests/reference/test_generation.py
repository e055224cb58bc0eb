# SPDX-License-Identifier: Apache-2.0
"""The compiled loop's greedy tokens against `transformers`', of every model.

Every case of MOEPEFT_FIXTURES' hf/* that has greedy tokens.
"""

import json

import numpy as np
import pytest

from moepeft.checkpoints.hf import model as hf
from moepeft.inference.decode import How, advance, start
from moepeft.inference.sampling import Sampling
from moepeft.models import FAMILIES, by_model_type
from moepeft.nn.scan_layers import unstack_layers

from . import cases


def found():
  folders = sorted(path.parent.name for path in cases.ROOT.glob('hf/*/*.npz'))
  return [name for name in folders if known(name)]


def known(name):
  kind = json.loads((cases.ROOT / 'hf' / name / 'config.json').read_text())
  holds = cases.holds(f'hf/{name}', TOKENS)
  return holds and kind['model_type'] in by_model_type()


TOKENS = 'outputs/greedy_tokens'

if not found():
  pytest.skip(
    f'no greedy tokens among the reference cases at {cases.ROOT}: name their '
    'directory with MOEPEFT_FIXTURES',
    allow_module_level=True,
  )


@pytest.mark.parametrize('name', found())
def test_greedy_tokens(name):
  folder = cases.ROOT / 'hf' / name
  base = hf.load(str(folder), dtype='float32')
  model = FAMILIES[base.config.family].module(base.config, scan=False)
  arrays = dict(np.load(folder / 'expected.npz'))
  tokens = arrays[TOKENS]
  rows, length = tokens.shape
  mask = arrays['inputs/attention_mask'][:rows].astype(bool)
  batch = {'inputs': arrays['inputs/input_ids'][:rows], 'inputs_mask': mask}
  settings = cases.greedy_settings(f'hf/{name}')
  ends = np.atleast_1d(settings.get('eos_token_id', -1)).astype(np.int32)
  # Before ours stand what a decoder was asked, or what T5 begins with.
  asked = int(mask[0].sum()) if hasattr(model, 'extend') else 1
  how = How(Sampling(), ends)
  variables = {'params': unstack_layers(base.params)}
  begun = start(model, variables, batch, how, length - asked)
  made = advance(model, variables, begun, how, length).tokens
  for ours, theirs in zip(np.asarray(made), tokens[:, asked:], strict=True):
    at = np.flatnonzero(np.isin(theirs, ends))
    last = at[0] + 1 if len(at) else len(theirs)
    assert ours[:last].tolist() == theirs[:last].tolist()
    assert not ours[last:].any()

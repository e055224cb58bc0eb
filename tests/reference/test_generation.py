# SPDX-License-Identifier: Apache-2.0
"""The engine's greedy tokens against `transformers`', of every model.

Every case of MOEPEFT_FIXTURES' hf/* that has greedy tokens.
"""

import json

import numpy as np
import pytest

from moepeft.checkpoints.hf import model as hf
from moepeft.models import FAMILIES, by_model_type

from ..contracts.answers import engine_answers
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
  model = FAMILIES[base.config.family].module(base.config)
  arrays = dict(np.load(folder / 'expected.npz'))
  tokens = arrays[TOKENS]
  rows, length = tokens.shape
  mask = arrays['inputs/attention_mask'][:rows].astype(bool)
  prompts = [
    row[real]
    for row, real in zip(arrays['inputs/input_ids'], mask, strict=False)
  ]
  settings = cases.greedy_settings(f'hf/{name}')
  ends = np.atleast_1d(settings.get('eos_token_id', -1)).astype(np.int32)
  # Before ours stand what a decoder was asked, or what T5 begins with.
  asked = int(mask[0].sum()) if hasattr(model, 'extend') else 1
  answers = engine_answers(
    model,
    {'params': base.params},
    prompts,
    length - asked,
    eos_token_ids=tuple(ends.tolist()),
  )
  for answer, reference in zip(
    answers, tokens[:, asked:].tolist(), strict=True
  ):
    at = np.flatnonzero(np.isin(reference, ends))
    assert answer.ids == reference[: at[0] + 1 if len(at) else None]

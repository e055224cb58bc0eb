# SPDX-License-Identifier: Apache-2.0
"""Adapters of Hugging Face's `peft` on decoder-only models.

Every case of MOEPEFT_FIXTURES' peft/* whose base is a decoder's: read, run,
written back, and read by `peft` itself where it is installed.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.hf import peft, peft_config
from moepeft.models import by_model_type
from moepeft.models.decoder.model import Decoder, sites
from moepeft.peft import build
from moepeft.peft.merge import merge

from . import cases
from .test_t5 import selection

# Float32 on CPU: a sum of a few hundred products rounds by 1e-6. Where a case
# is ill conditioned (random LoRAs make attention sharp: float64 is as far from
# peft's logits as ours are), as often as MARGIN times what one rounding of
# each weight does; a forward pass rounds dozens of times.
LIMIT, MARGIN = 1e-5, 3


def base_of(name):
  with np.load(cases.ROOT / 'peft' / name / 'expected.npz') as arrays:
    return cases.ROOT / 'hf' / str(arrays['base'])


def is_decoder(kind):
  family = by_model_type().get(kind)
  return family is not None and family.architecture == 'decoder'


def found():
  folders = sorted((cases.ROOT / 'peft').glob('*/expected.npz'))
  return [
    path.parent.name
    for path in folders
    if is_decoder(model_type(base_of(path.parent.name)))
  ]


def model_type(folder):
  return json.loads((folder / 'config.json').read_text())['model_type']


if not found():
  pytest.skip(
    f'no adapters of decoders among the reference cases at {cases.ROOT}: name '
    'their directory with MOEPEFT_FIXTURES',
    allow_module_level=True,
  )

every_case = pytest.mark.parametrize('name', found())


@functools.cache
def loaded(name):
  folder = cases.ROOT / 'peft' / name
  base = hf.load(str(base_of(name)), dtype='float32')
  adapter = peft.load(str(folder), base.config)
  return base, adapter, dict(np.load(folder / 'expected.npz'))


def logits(base, params, expected, adapter=None):
  """At real tokens, [tokens, v]."""
  found, _ = function_of(base, expected, adapter)
  variables = {'params': params}
  if adapter is not None:
    variables['peft'] = adapter.tree
  return np.asarray(jax.jit(found)(variables)['logits'])


def function_of(base, expected, adapter):
  """(variables -> {'logits': at real tokens}, the variables of a case)."""
  real = expected['inputs/attention_mask'].astype(bool)
  batch = {'inputs': expected['inputs/input_ids'], 'inputs_mask': real}
  model, variables = Decoder(base.config), {'params': base.params}
  if adapter is not None:
    built = build(adapter.method, sites(base.config))
    model = Decoder(base.config, built.adapter_map)
    variables['peft'] = adapter.tree
  return lambda v: {'logits': model.apply(v, batch)[real]}, variables


@functools.cache
def limit(name):
  """The largest allowed difference of a case's logits from peft's."""
  base, adapter, expected = loaded(name)
  _, noise = cases.with_noise(*function_of(base, expected, adapter))
  return max(LIMIT, MARGIN * noise['logits'])


def relative_error(ours, theirs):
  return np.abs(ours - theirs).max() / np.abs(theirs).max()


def expected_logits(expected):
  return expected['outputs/logits'][
    expected['inputs/attention_mask'].astype(bool)
  ]


@every_case
def test_logits_at_real_tokens(name):
  base, adapter, expected = loaded(name)
  reference = expected_logits(expected)
  actual = logits(base, base.params, expected, adapter)
  assert relative_error(actual, reference) < limit(name)
  # The adapter is not next to nothing.
  without = logits(base, base.params, expected)
  assert relative_error(without, reference) > 100 * limit(name)


@every_case
def test_merged_gives_the_same_logits(name):
  base, adapter, expected = loaded(name)
  built = build(adapter.method, sites(base.config))
  params = jax.tree.map(jnp.asarray, base.params)
  merged = merge(built, {'params': params, 'peft': adapter.tree})
  actual = logits(base, merged, expected)
  assert relative_error(actual, expected_logits(expected)) < limit(name)


@every_case
def test_written_is_what_was_read(name, tmp_path):
  folder = cases.ROOT / 'peft' / name
  base = hf.load(str(base_of(name)))
  adapter = peft.load(str(folder), base.config, None)
  like = peft_config.read(folder)
  peft.save(tmp_path / 'x', base.config, adapter, like=like)
  assert selection(peft_config.read(tmp_path / 'x')) == selection(like)
  written, before = (
    load_file(place / peft.WEIGHTS_FILE) for place in (tmp_path / 'x', folder)
  )
  assert written.keys() == before.keys()
  for key, array in before.items():
    assert written[key].dtype == array.dtype, key
    assert written[key].tobytes() == array.tobytes(), key


@every_case
def test_peft_reads_what_is_written_without_the_first_config(name, tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  reference = pytest.importorskip('peft')
  base, adapter, expected = loaded(name)
  peft.save(tmp_path / 'x', base.config, adapter, base=base.path)
  fields = peft_config.read(tmp_path / 'x')
  assert fields['task_type'] == 'CAUSAL_LM'
  model = transformers.AutoModelForCausalLM.from_pretrained(
    base.path, dtype='float32'
  )
  model = reference.PeftModel.from_pretrained(model, tmp_path / 'x').eval()
  mask = expected['inputs/attention_mask']
  with torch.no_grad():
    found = model(
      input_ids=torch.tensor(expected['inputs/input_ids']),
      attention_mask=torch.tensor(mask),
    ).logits.numpy()
  error = relative_error(found[mask.astype(bool)], expected_logits(expected))
  assert error < limit(name)

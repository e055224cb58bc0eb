# SPDX-License-Identifier: Apache-2.0
"""T5, its adapters and its checkpoints against outside implementations.

MOEPEFT_FIXTURES=DIR pytest tests/reference covers every T5 case in DIR:
official/*.npz (the paper's released layers), official/*/checkpoint_* (T5X's
files), hf/* (transformers) and peft/* (Hugging Face's adapters). A relative
error is max |ours - theirs| / max |theirs| of an array, float32 on CPU.
"""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.hf import peft, peft_config
from moepeft.models import weight_mapping
from moepeft.objectives.cross_entropy import mean_loss
from moepeft.objectives.seq2seq import loss_sums

from . import cases

if not cases.ROOT.is_dir():
  pytest.skip(
    f'no reference cases at {cases.ROOT}: name their directory with '
    'MOEPEFT_FIXTURES',
    allow_module_level=True,
  )

OFFICIAL, CHECKPOINTS = cases.official(), cases.checkpoints()
MODELS, ADAPTERS = cases.transformers(), cases.adapters()

# Relative errors where a case is well conditioned. Where it is not, as often
# as MARGIN times what one rounding of each weight does: a forward pass rounds
# dozens of times.
OUTPUTS, GRADIENTS, MARGIN = 1e-5, 1e-4, 3


def of_cases(found):
  return pytest.mark.parametrize('name', found)


def check_output(name, output):
  actual, noise = cases.results(name)
  expected = cases.load(name).expected_outputs()
  error = cases.relative_error(actual[output], expected[output])
  limit = max(OUTPUTS, MARGIN * noise[output])
  print(f'{output}: relative error {error:.1e}, limit {limit:.1e}')
  assert error < limit


@of_cases(OFFICIAL + CHECKPOINTS + MODELS + ADAPTERS)
def test_logits(name):
  check_output(name, 'logits')


@of_cases(OFFICIAL)
def test_sequence_log_likelihoods(name):
  check_output(name, 'sequence_log_likelihood')


@of_cases(OFFICIAL)
def test_mean_token_nll(name):
  check_output(name, 'mean_token_nll')


@pytest.mark.parametrize(
  'name',
  [
    # tests/reference/test_exact.py has mixtures' in float64.
    pytest.param(name, marks=() if name == 'official/ia3' else pytest.mark.slow)
    for name in OFFICIAL
    if cases.holds(name, 'grads/')
  ],
)
def test_gradients(name):
  case = cases.load(name)

  def loss(tree, params):
    variables = {'params': params, 'peft': tree}
    return mean_loss(*loss_sums(case.model.apply, variables, case.batch, None))

  def gradients(variables):
    actual = jax.grad(loss)(variables['peft'], variables['params'])
    # One array of theirs is one layer of ours.
    return {
      f'{path}[{layer}]': array
      for path, stacked in weight_mapping.flatten(actual).items()
      for layer, array in enumerate(stacked)
    }

  candidate, noise = cases.with_noise(gradients, case.variables)
  expected = cases.gradients(case)
  assert candidate.keys() == expected.keys()
  errors = {
    k: cases.relative_error(candidate[k], expected[k]) for k in expected
  }
  limits = {k: max(GRADIENTS, MARGIN * noise[k]) for k in expected}
  worst = max(errors, key=lambda k: errors[k] / limits[k])
  print(f'{worst}: error {errors[worst]:.1e}, limit {limits[worst]:.1e}')
  print(f'largest: error {max(errors.values()):.1e}')
  assert [k for k in errors if errors[k] >= limits[k]] == []


@of_cases(CHECKPOINTS)
def test_checkpoint(name):
  folder, _, last = name.rpartition('/')
  read = cases.load(name)
  expected = cases.load(f'{folder}/{cases.npz_of(last)}')
  assert read.config == expected.config
  assert (read.adapter is None) == (expected.adapter is None)
  if read.adapter is not None:
    assert read.adapter.method == expected.adapter.method
  actual, reference = map(
    weight_mapping.flatten, (read.variables, expected.variables)
  )
  assert actual.keys() == reference.keys()
  for path, leaf in actual.items():
    assert leaf.dtype == reference[path].dtype, path
    assert leaf.tobytes() == reference[path].tobytes(), path


@of_cases(
  [n for n in MODELS + ADAPTERS if cases.holds(n, 'outputs/greedy_tokens')]
)
def test_greedy_tokens(name):
  case = cases.load(name)
  expected = case.expected['outputs/greedy_tokens']
  assert greedy(case, name, *expected.shape).tolist() == expected.tolist()


def greedy(case, name, rows, length):
  """The most probable continuation of the first rows, token by token."""
  settings = cases.greedy_settings(name)
  ends = np.atleast_1d(settings.get('eos_token_id', -1))
  start = settings.get('decoder_start_token_id', settings['pad_token_id'])
  tokens = np.full((rows, length), settings['pad_token_id'])
  tokens[:, 0] = start
  apply = jax.jit(case.model.apply)
  batch = {key: case.batch[key][:rows] for key in ('inputs', 'inputs_mask')}
  done = np.zeros(rows, bool)
  for i in range(1, length):
    # What comes after a position does not reach it: the decoder is causal.
    logits = apply(case.variables, batch | {'decoder_inputs': tokens})
    new = np.argmax(logits[:, i - 1], axis=-1)
    tokens[:, i] = np.where(done, settings['pad_token_id'], new)
    done |= np.isin(new, ends)
  return tokens


@of_cases(MODELS + ADAPTERS)
def test_written(name, tmp_path):
  case, folder = cases.load(name), cases.ROOT / name
  if name in ADAPTERS:
    like = peft_config.read(folder)
    peft.save(tmp_path / 'x', case.config, case.adapter, like=like)
    file, config = (
      peft.WEIGHTS_FILE,
      selection(peft_config.read(tmp_path / 'x')),
    )
    assert config == selection(like)
    expected = load_file(folder / file)
  else:
    hf.save(tmp_path / 'x', case.config, case.params)
    assert hf.load_config(str(tmp_path / 'x')) == case.config
    file, tensors = 'model.safetensors', hf.open_tensors(folder)
    remaining = {entry.stored_name for entry in hf.model_entries(case.config)}
    expected = {key: tensors.fetch(key) for key in remaining}
  written = load_file(tmp_path / 'x' / file)
  assert written.keys() == expected.keys()
  for key, array in expected.items():
    assert written[key].dtype == array.dtype, key
    assert written[key].shape == array.shape, key
    assert written[key].tobytes() == array.tobytes(), key


def selection(config):
  """A config of `peft` whose lists of modules are sets, as peft takes them."""
  return {
    key: sorted(value) if isinstance(value, list) else value
    for key, value in config.items()
  }

# SPDX-License-Identifier: Apache-2.0
"""Reference cases of the T5 family, found by listing a directory.

Everything is read from the files: no size, name or seed is known here.
"""

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moepeft.checkpoints.adapter import AdapterWeights
from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.hf import peft
from moepeft.checkpoints.t5x import adapters as t5x_adapters
from moepeft.checkpoints.t5x import model as t5x
from moepeft.models import FAMILIES, by_model_type, weight_mapping
from moepeft.models.t5.model import T5, T5Config, sites
from moepeft.nn.adapter_hook import AdapterMap
from moepeft.objectives.cross_entropy import mean_loss, sequence_log_likelihood
from moepeft.objectives.seq2seq import loss_sums
from moepeft.peft import build
from tests import ROOT

_DEFAULT = ROOT.parent / 'shared' / 'fixtures'
ROOT = Path(os.environ.get('MOEPEFT_FIXTURES', _DEFAULT))


@dataclasses.dataclass(frozen=True)
class Case:
  """A model, what goes in, and what an independent implementation gives.

  Attributes:
    batch: for the model's `__call__`, `targets` added where there are any.
    expected: the file's arrays by name.
  """

  config: T5Config
  params: Any
  adapter: AdapterWeights | None
  batch: dict[str, np.ndarray]
  expected: dict[str, np.ndarray]

  @property
  def variables(self):
    """The variables of the model, in float32."""
    peft_tree = {} if self.adapter is None else {'peft': self.adapter.tree}
    stored = {'params': self.params, **peft_tree}
    return jax.tree.map(lambda leaf: leaf.astype(np.float32), stored)

  @property
  def model(self) -> T5:
    adapter_map = AdapterMap()
    if self.adapter is not None:
      adapter_map = build(self.adapter.method, sites(self.config)).adapter_map
    return T5(self.config, adapter_map)

  def outputs(self, variables) -> dict[str, jax.Array]:
    """The model's outputs by the file's names, at real positions."""
    batch = self.batch
    if 'targets' not in batch:
      return {'logits': self.model.apply(variables, batch)}
    loss = mean_loss(*loss_sums(self.model.apply, variables, batch, None))
    logits = self.model.apply(variables, batch)
    real = batch['targets_mask']
    return {
      'logits': logits[real],
      'mean_token_nll': loss,
      'sequence_log_likelihood': sequence_log_likelihood(
        logits, batch['targets'], real
      ),
    }

  def expected_outputs(self) -> dict[str, np.ndarray]:
    outputs = dict(below(self.expected, 'outputs/'))
    if 'targets' in self.batch:
      outputs['logits'] = outputs['logits'][self.batch['targets_mask']]
    return outputs


def official() -> list[str]:
  """Cases of the released layers: 'official/molora'."""
  return _names('official', '*.npz', '.npz')


def checkpoints() -> list[str]:
  """The same parameters as T5X wrote them: 'official/t5x_molora'."""
  actual = sorted(ROOT.glob('official/*/checkpoint_*'))
  return list(dict.fromkeys(f'official/{p.parent.name}' for p in actual))


def transformers() -> list[str]:
  """Models of `transformers`: 'hf/t5_v1_1'."""
  return [name for name in _names('hf', '*/expected.npz') if _is_t5(name)]


def adapters() -> list[str]:
  """Adapters of `peft` on those: 'peft/t5_lora'."""
  actual = _names('peft', '*/expected.npz')
  return [name for name in actual if _is_t5(_base(name))]


@functools.cache
def load(name: str) -> Case:
  """A case by its name."""
  if name.startswith('official/'):
    folder = ROOT / name
    return _checkpoint(folder) if folder.is_dir() else _official(name)
  arrays = _arrays(ROOT / name / 'expected.npz')
  base = hf.load(str(ROOT / _base(name)))
  adapter = None
  if name.startswith('peft/'):
    adapter = peft.load(str(ROOT / name), base.config, None)
  batch = {
    'inputs': arrays['inputs/input_ids'],
    'inputs_mask': arrays['inputs/attention_mask'].astype(bool),
    # Without a mask of their own, all decoder positions are real.
    'decoder_inputs': arrays['inputs/decoder_input_ids'],
  }
  return Case(base.config, base.params, adapter, batch, arrays)


def gradients(case: Case) -> dict[str, np.ndarray]:
  """The expected gradients, a layer each: 'encoder/.../lora/a[0]'."""
  arrays = below(case.expected, 'grads/')
  shapes = {name: array.shape for name, array in arrays.items()}
  actual = t5x_adapters.read(case.config, shapes, arrays.__getitem__)
  return {
    f'{path}[{layer}]': array
    for path, stacked in weight_mapping.flatten(actual.tree).items()
    for layer, array in enumerate(stacked)
  }


def greedy_settings(name: str) -> dict[str, Any]:
  """generation_config.json, else config.json, of a model."""
  folder = ROOT / name
  fields = json.loads((folder / 'config.json').read_text())
  file = folder / 'generation_config.json'
  return fields | (json.loads(file.read_text()) if file.exists() else {})


def relative_error(ours, expected) -> float:
  """max |ours - expected| / max |expected|."""
  ours, expected = np.asarray(ours), np.asarray(expected)
  assert ours.shape == expected.shape
  difference = np.max(np.abs(ours - expected), initial=0)
  if difference == 0:
    return 0.0
  return float(difference / np.max(np.abs(expected)))


def with_noise(function, variables, samples: int = 4):
  """A function's arrays, and how far rounding the weights moves them.

  The weights are moved by one unit in the last place, up or down. Where
  attention is sharp, as it is with the random LoRAs of the released layers,
  that alone moves logits by 1e-4: float32 leaves the rest open, and two
  right implementations differ by as much.

  Args:
    function: variables -> {name: array}.

  Returns:
    ({name: array}, {name: largest relative error of the samples}).
  """
  run = jax.jit(function)
  exact = run(variables)
  rng = np.random.default_rng(0)

  def rounded(leaf):
    away = np.where(rng.integers(2, size=leaf.shape), np.inf, -np.inf)
    return np.nextafter(leaf, away.astype(leaf.dtype))

  noise = dict.fromkeys(exact, 0.0)
  for _ in range(samples):
    for name, array in run(jax.tree.map(rounded, variables)).items():
      error = relative_error(array, exact[name])
      noise[name] = max(noise[name], error)
  return exact, noise


@functools.cache
def results(name: str):
  """`with_noise` of a case's outputs, computed once."""
  case = load(name)
  return with_noise(case.outputs, case.variables)


def holds(name: str, prefix: str) -> bool:
  """Whether a case's file has an array of that name or below it."""
  file = ROOT / f'{name}.npz'
  file = file if file.exists() else ROOT / name / 'expected.npz'
  with np.load(file) as arrays:
    return any(key.startswith(prefix) for key in arrays.files)


def _official(name: str) -> Case:
  arrays = _arrays(ROOT / f'{name}.npz')
  top_k = json.loads(str(arrays['config'])).get('top_k')
  loaded = t5x.from_arrays(below(arrays, 'params/'), top_k=top_k)
  return _t5x_case(loaded, arrays)


def _checkpoint(folder: Path) -> Case:
  arrays = _arrays(folder.with_name(npz_of(folder.name) + '.npz'))
  top_k = json.loads(str(arrays['config'])).get('top_k')
  return _t5x_case(t5x.load(str(folder), top_k=top_k), arrays)


def npz_of(checkpoint: str) -> str:
  """'t5x_molora' -> 'molora'."""
  return checkpoint.removeprefix('t5x_')


def _t5x_case(loaded: t5x.LoadedT5X, arrays) -> Case:
  inputs = arrays['inputs/encoder_input_tokens']
  targets = arrays['inputs/decoder_target_tokens']
  batch = {
    'inputs': inputs,
    'inputs_mask': inputs > 0,
    'decoder_inputs': arrays['inputs/decoder_input_tokens'],
    'targets': targets,
    'targets_mask': targets > 0,
  }
  return Case(loaded.config, loaded.params, loaded.adapter, batch, arrays)


def _names(folder: str, pattern: str, suffix: str = '/expected.npz'):
  actual = sorted(p.relative_to(ROOT) for p in (ROOT / folder).glob(pattern))
  return [path.as_posix().removesuffix(suffix) for path in actual]


def _base(name: str) -> str:
  """The model that a case runs on."""
  if not name.startswith('peft/'):
    return name
  with np.load(ROOT / name / 'expected.npz') as arrays:
    return f'hf/{arrays["base"]}'


def _is_t5(name: str) -> bool:
  file = ROOT / name / 'config.json'
  if not file.exists():
    return False
  kind = json.loads(file.read_text()).get('model_type')
  return by_model_type().get(kind) is FAMILIES['t5']


def _arrays(path: Path) -> dict[str, np.ndarray]:
  with np.load(path) as arrays:
    return dict(arrays)


def below(arrays, prefix: str) -> dict[str, np.ndarray]:
  return {
    name.removeprefix(prefix): array
    for name, array in arrays.items()
    if name.startswith(prefix)
  }

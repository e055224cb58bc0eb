# SPDX-License-Identifier: Apache-2.0
"""Converts the values of macros to a ConfigDict."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from moepeft.config import defaults as config_lib
from moepeft.config import method_string
from moepeft.config.gin import checkpoint_path
from moepeft.config.gin.names import KEYS, MODEL_SIZES
from moepeft.config.gin.syntax import Reference
from moepeft.core.ranges import suggestion
from moepeft.models.t5 import model as t5

_MEANS = {
  'AVERAGE_PER_SEQUENCE': 'sequences',
  'NUM_REAL_TARGET_TOKENS': 'tokens',
}
_REMAT = {'none': 'none', 'minimal': 'dots', 'full': 'full'}
_SIZES = ('tiny', 'small', 'base', 'large', 'xl', 'xxl')
_WARMUP_STEPS = 1000  # T5X's default.
_KEEP_ALL = 1_000_000
_REQUIRED = (
  'METHOD',
  'MIXTURE_OR_TASK_NAME',
  'TASK_FEATURE_LENGTHS',
  'LOSS_NORMALIZING_FACTOR',
)


def translate(
  values: Mapping[str, Any], task_modules: Sequence[str], cache_dir: str
) -> ConfigDict:
  """The config of a run.

  Args:
    values: values by macro, with the types of `names`.
    task_modules: imported modules that register SeqIO tasks.
    cache_dir: the directory of cached SeqIO tasks, '' for none.

  Raises:
    ValueError: a macro is missing, or its value has no counterpart.
  """
  _check_complete(values)
  c = config_lib.default()
  c.model.path = ''
  c.model.family = 't5'
  c.data.source = 'seqio'
  c.optimizer.max_grad_norm = 0.0
  for name, key in KEYS.items():
    if values.get(name) is not None:
      c.update_from_flattened_dict({key: values[name]})
  if 'SAVE_KEEP' in values and values['SAVE_KEEP'] is None:
    c.checkpoint.max_to_keep = _KEEP_ALL
  c.method = _method(values)
  c.loss.average_over = _one_of('LOSS_NORMALIZING_FACTOR', _MEANS, values)
  _set_data(c, values, task_modules, cache_dir)
  _set_steps(c, values)
  _set_optimizer(c, values)
  _set_model(c, values)
  if 'EVAL_STEPS' in values:
    c.evaluation.max_examples = values['EVAL_STEPS'] * c.batch_size
  return c


def _check_complete(values: Mapping[str, Any]) -> None:
  absent = [name for name in _REQUIRED if name not in values]
  if values.get('TRAIN_STEPS', values.get('TRAIN_STEPS_RELATIVE')) is None:
    absent.append('TRAIN_STEPS')
  if absent:
    raise ValueError(
      f'no gin file sets {", ".join(absent)}: add a run file such as '
      f'--gin_file=gin/molora.gin, or --gin.{absent[0]}=VALUE'
    )


def _one_of(name: str, table: Mapping[str, str], values) -> str:
  value = values[name]
  if not isinstance(value, str) or value not in table:
    choices = ', '.join(map(repr, table))
    raise ValueError(
      f'{name} is one of {choices}; got {value!r}{suggestion(value, table)}'
    )
  return table[value]


def _method(values: Mapping[str, Any]) -> str:
  """METHOD with the options of NUM_EXPERTS and RANK."""
  specs = method_string.parse_method(values['METHOD'])
  names = {'NUM_EXPERTS': 'experts', 'RANK': 'rank'}
  options = {names[macro]: values[macro] for macro in names if macro in values}
  conflicts = [k for k, v in options.items() if specs[0].get(k, v) != v]
  if conflicts or (options and len(specs) > 1):
    raise ValueError(
      f'NUM_EXPERTS and RANK set {options}, METHOD is {values["METHOD"]!r}: '
      'set each option once'
    )
  specs = (specs[0].replace(**options), *specs[1:])
  return method_string.format_method(specs)


def _set_data(
  c: ConfigDict, values: Mapping[str, Any], task_modules, cache_dir: str
) -> None:
  lengths = values['TASK_FEATURE_LENGTHS']
  if lengths.keys() != {'inputs', 'targets'} or not all(
    type(length) is int for length in lengths.values()
  ):
    raise ValueError(
      "TASK_FEATURE_LENGTHS is like {'inputs': 1024, 'targets': 256}; got "
      f'{lengths!r}'
    )
  c.data.inputs_length = lengths['inputs']
  c.data.targets_length = lengths['targets']
  c.imports = ','.join(dict.fromkeys(filter(None, [c.imports, *task_modules])))
  c.data.path = cache_dir
  use_cached = values.get('USE_CACHED_TASKS')
  if use_cached and not cache_dir:
    raise ValueError(
      'USE_CACHED_TASKS = True needs the directory of the cached tasks: set '
      '--seqio_additional_cache_dirs=DIR'
    )
  if cache_dir and use_cached is False:
    raise ValueError(
      f'USE_CACHED_TASKS = False, but {cache_dir!r} is set for cached tasks: '
      'leave one out'
    )


def _set_steps(c: ConfigDict, values: Mapping[str, Any]) -> None:
  """Sets the steps of training and of Adafactor's decay.

  T5X counts both from the step of the restored checkpoint.
  """
  restored_step = _checkpoint_step(c.model.path)
  relative = values.get('TRAIN_STEPS_RELATIVE')
  c.steps = values['TRAIN_STEPS'] if relative is None else relative
  if restored_step is not None and relative is None:
    c.steps -= restored_step
    if c.steps < 1:
      raise ValueError(
        f'TRAIN_STEPS={values["TRAIN_STEPS"]} counts from the step of '
        f'INITIAL_CHECKPOINT_PATH, {restored_step}, as in T5X: set the sum, '
        f'--gin.TRAIN_STEPS={restored_step + values["TRAIN_STEPS"]}, or '
        'TRAIN_STEPS_RELATIVE'
      )
  if restored_step is None:
    restored_step = values.get('PRETRAINED_STEPS', 0)
  c.optimizer.decay_initial_step = restored_step - values.get('STEP_OFFSET', 0)


def _checkpoint_step(path: str) -> int | None:
  """The step in the name of a T5X checkpoint; None for other models."""
  index = Path(path).expanduser()
  if path and checkpoint_path.holds(str(index)):
    index = checkpoint_path.find_index(str(index))
  # The index is a file, or is in the checkpoint or in one of its items.
  steps = (checkpoint_path.STEP_NAME.fullmatch(p) for p in index.parts[-3:])
  return next((int(step[1]) for step in reversed(list(steps)) if step), None)


def _set_optimizer(c: ConfigDict, values: Mapping[str, Any]) -> None:
  optimizer = values.get('OPTIMIZER', Reference('adafactor.Adafactor', True))
  if getattr(optimizer, 'class_name', '') != 'Adafactor':
    raise ValueError(
      f'OPTIMIZER is @adafactor.Adafactor(); got {optimizer!r}: METHOD sets '
      'the trained weights, and --config.optimizer.name other optimizers'
    )
  c.optimizer.name = 'adafactor'
  text = values.get('FACTORS', 'constant')
  factors = {factor.strip() for factor in text.split('*')}
  if factors == {'constant', 'linear_warmup'}:
    warmup = values.get('WARMUP_STEPS', _WARMUP_STEPS)
    if 0 < c.optimizer.decay_initial_step < warmup:
      raise ValueError(
        f'pretraining ended at step {c.optimizer.decay_initial_step} of '
        f'{warmup} warm-up steps, and a run cannot start within the warm-up: '
        'set fewer warmup_steps'
      )
    # The warm-up counts from the first step of pretraining.
    c.optimizer.warmup_steps = 0 if c.optimizer.decay_initial_step else warmup
  elif factors != {'constant'}:
    raise ValueError(
      "create_learning_rate_scheduler.factors is 'constant' or 'constant * "
      f"linear_warmup'; got {text!r}: for other schedules, set "
      '--config.optimizer.schedule'
    )


def _set_model(c: ConfigDict, values: Mapping[str, Any]) -> None:
  """Sets the most similar released size, and the fields that differ from it."""
  fields = {field: values[name] for name, field in MODEL_SIZES.items()}
  differences = {size: _differences(fields, size) for size in _SIZES}
  c.model.size = min(_SIZES, key=lambda size: len(differences[size]))
  c.model.shape = ConfigDict(differences[c.model.size])
  if c.model.path and c.model.shape:
    raise ValueError(
      f'{c.model.path} has another size, which {dict(c.model.shape)} would '
      'change: leave them out, or INITIAL_CHECKPOINT_PATH'
    )
  if 'REMAT_POLICY' in values:
    c.model.remat = _one_of('REMAT_POLICY', _REMAT, values)
  if values.get('NUM_PARTITIONS', 1) != 1:
    c.sharding.preset = 'tp'
    c.sharding.model_parallel_size = values['NUM_PARTITIONS']


def _differences(fields: Mapping[str, int], size: str) -> dict[str, int]:
  config = t5.config(size)
  return {k: v for k, v in fields.items() if v != getattr(config, k)}

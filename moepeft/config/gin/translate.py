# SPDX-License-Identifier: Apache-2.0
"""The values of macros -> a ConfigDict."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from moepeft.config import defaults as config_lib
from moepeft.config import method_string
from moepeft.config.gin import checkpoint_path
from moepeft.config.gin.names import KEYS, SHAPE
from moepeft.config.gin.syntax import Reference
from moepeft.core.ranges import suggestion
from moepeft.models.t5 import model as t5

_PER = {'AVERAGE_PER_SEQUENCE': 'sequences', 'NUM_REAL_TARGET_TOKENS': 'tokens'}
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
  values: Mapping[str, Any], modules: Sequence[str], cached: str
) -> ConfigDict:
  """The config of a run.

  Args:
    values: by macro, of the types that `names` asks for.
    modules: imports that are not T5X's, so register SeqIO tasks.
    cached: the directory of cached SeqIO tasks, '' for none.

  Raises:
    ValueError: a macro is lacking, or its value has no counterpart.
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
  c.loss.average_over = _one_of('LOSS_NORMALIZING_FACTOR', _PER, values)
  _set_data(c, values, modules, cached)
  _set_steps(c, values)
  _set_rate(c, values)
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
      f'no gin file gives {", ".join(absent)}: add a run file such as '
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
  """METHOD with NUM_EXPERTS and RANK for options."""
  specs = method_string.parse_method(values['METHOD'])
  options = {'NUM_EXPERTS': 'experts', 'RANK': 'rank'}
  extra = {options[n]: values[n] for n in options if n in values}
  first = specs[0]
  twice = [key for key in extra if first.get(key, extra[key]) != extra[key]]
  if twice or (extra and len(specs) > 1):
    raise ValueError(
      f'NUM_EXPERTS and RANK say {extra}, METHOD is {values["METHOD"]!r}: say '
      'each in one place'
    )
  return method_string.format_method((first.replace(**extra), *specs[1:]))


def _set_data(
  c: ConfigDict, values: Mapping[str, Any], modules, cached: str
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
  c.imports = ','.join(dict.fromkeys(filter(None, [c.imports, *modules])))
  c.data.path = cached
  use = values.get('USE_CACHED_TASKS')
  if use and not cached:
    raise ValueError(
      'USE_CACHED_TASKS = True needs the directory of the cached tasks: give '
      '--seqio_additional_cache_dirs=DIR'
    )
  if cached and use is False:
    raise ValueError(
      f'USE_CACHED_TASKS = False, but {cached!r} is given for cached tasks: '
      'leave one out'
    )


def _set_steps(c: ConfigDict, values: Mapping[str, Any]) -> None:
  """T5X counts steps, and Adafactor's decay, from the restored one."""
  restored = _restored_step(c.model.path)
  relative = values.get('TRAIN_STEPS_RELATIVE')
  c.steps = values['TRAIN_STEPS'] if relative is None else relative
  if restored is not None and relative is None:
    c.steps -= restored
    if c.steps < 1:
      raise ValueError(
        f'TRAIN_STEPS={values["TRAIN_STEPS"]} counts from the step of '
        f'INITIAL_CHECKPOINT_PATH, {restored}, as in T5X: give their sum, '
        f'--gin.TRAIN_STEPS={restored + values["TRAIN_STEPS"]}, or '
        'TRAIN_STEPS_RELATIVE'
      )
  if restored is None:
    restored = values.get('PRETRAINED_STEPS', 0)
  c.optimizer.decay_initial_step = restored - values.get('STEP_OFFSET', 0)


def _restored_step(path: str) -> int | None:
  """The step in the name of a T5X checkpoint; None for other models."""
  index = Path(path).expanduser()
  if path and checkpoint_path.holds(str(index)):
    index = checkpoint_path.find_index(str(index))
  # The index is a single file, or lies in the checkpoint or an item of it.
  steps = (checkpoint_path.STEP_NAME.fullmatch(p) for p in index.parts[-3:])
  return next((int(step[1]) for step in reversed(list(steps)) if step), None)


def _set_rate(c: ConfigDict, values: Mapping[str, Any]) -> None:
  optimizer = values.get('OPTIMIZER', Reference('adafactor.Adafactor', True))
  if not isinstance(optimizer, Reference) or optimizer.last != 'Adafactor':
    raise ValueError(
      f'OPTIMIZER is @adafactor.Adafactor(); got {optimizer!r}: which weights '
      'it trains follows from METHOD, and --config.optimizer.name names others'
    )
  c.optimizer.name = 'adafactor'
  text = values.get('FACTORS', 'constant')
  factors = {factor.strip() for factor in text.split('*')}
  if factors == {'constant', 'linear_warmup'}:
    warmup = values.get('WARMUP_STEPS', _WARMUP_STEPS)
    if 0 < c.optimizer.decay_initial_step < warmup:
      raise ValueError(
        f'the base has {c.optimizer.decay_initial_step} of {warmup} warm-up '
        'steps '
        'behind '
        'it, and a ramp begins at its beginning: set warmup_steps to less'
      )
    # It counts from the pretraining's first step.
    c.optimizer.warmup_steps = 0 if c.optimizer.decay_initial_step else warmup
  elif factors != {'constant'}:
    raise ValueError(
      "create_learning_rate_scheduler.factors is 'constant' or 'constant * "
      f"linear_warmup'; got {text!r}: --config.optimizer.schedule has others"
    )


def _set_model(c: ConfigDict, values: Mapping[str, Any]) -> None:
  """The released size of the given numbers, or the nearest and a shape."""
  sizes = {field: values[name] for name, field in SHAPE.items()}
  differences = {size: _differing(sizes, t5.config(size)) for size in _SIZES}
  c.model.size = min(_SIZES, key=lambda size: len(differences[size]))
  c.model.shape = ConfigDict(differences[c.model.size])
  if c.model.path and c.model.shape:
    raise ValueError(
      f'{c.model.path} has sizes of its own, which {dict(c.model.shape)} would '
      'change: leave them out, or INITIAL_CHECKPOINT_PATH'
    )
  if 'REMAT_POLICY' in values:
    c.model.remat = _one_of('REMAT_POLICY', _REMAT, values)
  if values.get('NUM_PARTITIONS', 1) != 1:
    c.sharding.preset = 'tp'
    c.sharding.model_parallel_size = values['NUM_PARTITIONS']


def _differing(sizes: Mapping[str, int], config: t5.T5Config) -> dict:
  return {f: n for f, n in sizes.items() if n != getattr(config, f)}

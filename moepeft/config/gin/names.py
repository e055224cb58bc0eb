# SPDX-License-Identifier: Apache-2.0
"""The supported macros and bindings: T5X's, and a few of moepeft's.

T5X's are those of its configs/runs/finetune.gin and of T5 1.1 in T5X and
flaxformer. moepeft adds METHOD, NUM_EXPERTS, RANK, LORA_RANK, PRETRAINED_STEPS
and macros for values that have only a binding in T5X.
"""

import difflib
import fnmatch
from typing import Any

from ml_collections.config_flags import config_path

from moepeft.config import defaults as config_lib
from moepeft.config.gin.syntax import Assignment, Statements

# Macro -> the config key that takes its value unchanged.
KEYS = {
  'ACTIVATION_DTYPE': 'model.dtype',
  'BATCH_SIZE': 'batch_size',
  'DROPOUT_RATE': 'model.dropout',
  'EVAL_PERIOD': 'evaluation.every_steps',
  'INITIAL_CHECKPOINT_PATH': 'model.path',
  'LABEL_SMOOTHING': 'loss.label_smoothing',
  'LEARNING_RATE': 'optimizer.learning_rate',
  'MIXTURE_OR_TASK_MODULE': 'imports',
  'MIXTURE_OR_TASK_NAME': 'data.mixture',
  'NUM_MICROBATCHES': 'gradient_accumulation_steps',
  'PACKING': 'data.packing',
  'RANDOM_SEED': 'seed',
  'SAVE_KEEP': 'checkpoint.max_to_keep',
  'SAVE_PERIOD': 'checkpoint.every_steps',
  'SPLIT': 'data.split',
  'WEIGHT_DECAY_RATE': 'optimizer.weight_decay',
  'Z_LOSS': 'loss.z_loss',
}
MODEL_SIZES = {
  'NUM_ENCODER_LAYERS': 'encoder_layers',
  'NUM_DECODER_LAYERS': 'decoder_layers',
  'NUM_HEADS': 'heads',
  'HEAD_DIM': 'head_dim',
  'EMBED_DIM': 'd_model',
  'MLP_DIM': 'ffn',
}
# Macros that `translate` converts with code, and their types.
_TYPES = {
  'EVAL_STEPS': int,
  'FACTORS': str,
  'LOSS_NORMALIZING_FACTOR': object,
  'METHOD': str,
  'MODEL_DIR': str,
  'NUM_EXPERTS': int,
  'NUM_PARTITIONS': int,
  'OPTIMIZER': object,
  'PRETRAINED_STEPS': int,
  'RANK': int,
  'REMAT_POLICY': str,
  'STEP_OFFSET': int,
  'TASK_FEATURE_LENGTHS': dict,
  'TRAIN_STEPS': int,
  'TRAIN_STEPS_RELATIVE': int,
  'USE_CACHED_TASKS': bool,
  'WARMUP_STEPS': int,
} | dict.fromkeys(MODEL_SIZES, int)
# Macros that may be None, as in T5X.
_OPTIONAL = (
  'EVAL_PERIOD',
  'INITIAL_CHECKPOINT_PATH',
  'MIXTURE_OR_TASK_MODULE',
  'NUM_MICROBATCHES',
  'RANDOM_SEED',
  'SAVE_KEEP',
  'TRAIN_STEPS_RELATIVE',
)
# Macros that a file may define without a reference to them.
_HELPERS = ('LORA_RANK',)

# T5X's bindings, without modules -> the macro for the same value.
_BINDINGS = {
  'Adafactor.step_offset': 'STEP_OFFSET',
  'Adafactor.weight_decay_rate': 'WEIGHT_DECAY_RATE',
  'EncoderDecoderModel.label_smoothing': 'LABEL_SMOOTHING',
  'EncoderDecoderModel.loss_normalizing_factor': 'LOSS_NORMALIZING_FACTOR',
  'EncoderDecoderModel.z_loss': 'Z_LOSS',
  'PjitPartitioner.num_partitions': 'NUM_PARTITIONS',
  'RestoreCheckpointConfig.path': 'INITIAL_CHECKPOINT_PATH',
  'SaveCheckpointConfig.keep': 'SAVE_KEEP',
  'SaveCheckpointConfig.period': 'SAVE_PERIOD',
  'T5Config.dropout_rate': 'DROPOUT_RATE',
  'T5Config.dtype': 'ACTIVATION_DTYPE',
  'T5Config.emb_dim': 'EMBED_DIM',
  'T5Config.head_dim': 'HEAD_DIM',
  'T5Config.mlp_dim': 'MLP_DIM',
  'T5Config.num_decoder_layers': 'NUM_DECODER_LAYERS',
  'T5Config.num_encoder_layers': 'NUM_ENCODER_LAYERS',
  'T5Config.num_heads': 'NUM_HEADS',
  'T5Config.remat_policy': 'REMAT_POLICY',
  'Trainer.num_microbatches': 'NUM_MICROBATCHES',
  'create_learning_rate_scheduler.base_learning_rate': 'LEARNING_RATE',
  'create_learning_rate_scheduler.factors': 'FACTORS',
  'create_learning_rate_scheduler.warmup_steps': 'WARMUP_STEPS',
  'train.eval_period': 'EVAL_PERIOD',
  'train.eval_steps': 'EVAL_STEPS',
  'train.model_dir': 'MODEL_DIR',
  'train.random_seed': 'RANDOM_SEED',
  'train.relative_steps': 'TRAIN_STEPS_RELATIVE',
  'train.total_steps': 'TRAIN_STEPS',
  'train/DatasetConfig.batch_size': 'BATCH_SIZE',
  'train/DatasetConfig.mixture_or_task_name': 'MIXTURE_OR_TASK_NAME',
  'train/DatasetConfig.module': 'MIXTURE_OR_TASK_MODULE',
  'train/DatasetConfig.pack': 'PACKING',
  'train/DatasetConfig.split': 'SPLIT',
  'train/DatasetConfig.task_feature_lengths': 'TASK_FEATURE_LENGTHS',
  'train/DatasetConfig.use_cached': 'USE_CACHED_TASKS',
}
# Bindings that support a single value.
_FIXED = {
  'Adafactor.clipping_threshold': 1.0,
  'Adafactor.decay_rate': 0.8,
  'Adafactor.multiply_by_parameter_scale': True,
  'NUM_EMBEDDINGS': 32128,
  'SHUFFLE_TRAIN_EXAMPLES': True,
  'T5Config.logits_via_embedding': False,
  'T5Config.mlp_activations': ('gelu', 'linear'),
  'T5Config.vocab_size': 32128,
  'train/DatasetConfig.shuffle': True,
}
# Patterns of T5X's names that moepeft does not need.
_UNUSED = (
  'Adafactor.logical_factor_rules',
  'CheckpointConfig.*',
  'EVALUATOR_*',
  'EncoderDecoderModel.input_vocabulary',
  'EncoderDecoderModel.module',
  'EncoderDecoderModel.optimizer_def',
  'EncoderDecoderModel.output_vocabulary',
  'Evaluator.*',
  'JSONLogger.*',
  'JSON_WRITE_N_RESULTS',
  'MODEL',
  'PjitPartitioner.*',
  'RestoreCheckpointConfig.*',
  'SaveCheckpointConfig.dtype',
  'SaveCheckpointConfig.save_dataset',
  'SentencePieceVocabulary.*',
  'Trainer.learning_rate_fn',
  'Transformer.config',
  'USE_HARDWARE_RNG',
  'VOCABULARY',
  'infer_eval/DatasetConfig.*',
  'train.*_cfg',
  'train.*_cls',
  'train.*_fn',
  'train.model',
  'train.partitioner',
  'train.use_hardware_rng',
  'train/DatasetConfig.seed',
  'train_eval/DatasetConfig.*',
)
# All other imports count as modules that register SeqIO tasks.
_LIBRARIES = ('__gin__', '__main__', 'flax', 'flaxformer', 'jax', 'seqio')
_LIBRARIES += ('optax', 't5x')


def macro_names() -> list[str]:
  """Every supported macro."""
  return sorted(KEYS | _TYPES)


def macro_name(key: str) -> str:
  """'t5x.utils.SaveCheckpointConfig.period' -> 'SAVE_PERIOD'.

  For a binding without a macro, this is the binding without modules.
  """
  scope, slash, selector = key.rpartition('/')
  name = f'{scope}{slash}{".".join(selector.split(".")[-2:])}'
  # A binding without a scope applies to all scopes.
  scoped = f'train/{name}' if name.startswith('DatasetConfig.') else name
  return _BINDINGS.get(scoped, scoped)


def classify_statements(
  statements: Statements,
) -> tuple[dict[str, Any], list[str], list[str]]:
  """(values by macro, modules that register tasks, names that are not used).

  If a macro and a binding set the same value, the later one counts.

  Raises:
    ValueError: a name is unknown, or a value has the wrong type.
  """
  values: dict[str, Any] = {}
  modules, unused = _sort_imports(statements)
  for key, assignment in statements.values.items():
    name = macro_name(key)
    if name in KEYS or name in _TYPES:
      value = statements.resolve(key)
      values[name] = _check_type(name, value, assignment.location)
    elif name in _FIXED:
      _check_fixed(name, statements.resolve(key), assignment)
    elif any(fnmatch.fnmatchcase(name, pattern) for pattern in _UNUSED):
      unused.append(_unused_name(key))
    elif key not in statements.references() and not _is_helper(key, assignment):
      raise ValueError(_unknown_name(key, assignment.location))
  return values, modules, list(dict.fromkeys(unused))


def _unused_name(key: str) -> str:
  """A binding's class, or the whole binding if the class has used bindings."""
  return key if 'train.' in key else key.rpartition('.')[0] or key


def _sort_imports(statements: Statements) -> tuple[list[str], list[str]]:
  """(modules that register tasks, libraries that moepeft does not need)."""
  tasks, unused = [], []
  for module in statements.imports:
    library = module.split('.')[0]
    if library in _LIBRARIES:
      unused.append(f'import {library}')
    else:
      tasks.append(module)
  return tasks, unused


def _check_fixed(name: str, value: Any, assignment: Assignment) -> None:
  if value != _FIXED[name]:
    raise ValueError(
      f'{name} is always {_FIXED[name]!r} here; got {value!r} '
      f'({assignment.location})'
    )


def _is_helper(key: str, assignment: Assignment) -> bool:
  # On the command line, a helper without a reference would have no effect.
  return key in _HELPERS and not assignment.location.startswith('--')


def _unknown_name(key: str, location: str) -> str:
  if key in _HELPERS:
    return f'no value refers to {key} ({location}): set RANK instead'
  kind, names = 'macro', macro_names()
  if '.' in key:
    kind, names = (
      'binding',
      sorted(n for n in {*_BINDINGS, *_FIXED} if '.' in n),
    )
  similar = difflib.get_close_matches(macro_name(key), names, 3)
  rest = [name for name in names if name not in similar]
  return (
    f'the {kind} {key} ({location}) is not supported; the supported ones are '
    f'{", ".join(similar + rest)}'
  )


def _check_type(name: str, value: Any, location: str) -> Any:
  """The value of a macro, an integer converted to float if need be."""
  value_type = _TYPES.get(name) or _type_of_key(KEYS[name])
  if value is None and name in _OPTIONAL:
    return None
  if value_type is float and type(value) is int:
    return float(value)
  is_bool_for_int = value_type is int and isinstance(value, bool)
  if not isinstance(value, value_type) or is_bool_for_int:
    raise ValueError(
      f'{name} is of type {value_type.__name__}; got {value!r} ({location})'
    )
  return value


def _type_of_key(key: str) -> type:
  return type(config_path.get_value(key, config_lib.default()))

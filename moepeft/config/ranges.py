# SPDX-License-Identifier: Apache-2.0
"""The range or the choices of each config key.

`ALLOWED` has an entry for each number and each enumerated text of
`config.default`; `TEXTS` names the keys that take any text. A test compares
the keys with the defaults, and the choices with the modules that define them,
which this one may not import.
"""

from moepeft.core.ranges import MAX_SEED, Choices, Range

# As in the released code, or as in the paper's text.
SEMANTICS = ('official', 'paper')
_COUNT = Range(1, 1_000_000_000)
_COUNT_OR_NONE = Range(0, 1_000_000_000)
_ROWS = Range(1, 1_048_576)
_TOKENS = Range(2, 1_048_576, note='a token and the end of the text')
_FRACTION = Range(0, 1, below=True)
_WEIGHT = Range(0, 1_000)
_DTYPE = Choices(('float32', 'bfloat16'))

ALLOWED: dict[str, Range | Choices] = {
  'seed': Range(0, MAX_SEED),
  'steps': _COUNT,
  'batch_size': _ROWS,
  'preference.loss': Choices(('sigmoid', 'hinge', 'ipo', 'robust')),
  'preference.beta': Range(0, 1_000, above=True),
  'preference.label_smoothing': Range(
    0, 0.5, below=True, note='at 0.5 labels have no information'
  ),
  'preference.sft_weight': _WEIGHT,
  'preference.margin': _WEIGHT,
  'preference.desirable_weight': _WEIGHT,
  'preference.undesirable_weight': _WEIGHT,
  'semantics': Choices(SEMANTICS),
  'budget_tolerance': Range(0, 1_000),
  'router_losses.load_balance': _WEIGHT,
  'router_losses.z': _WEIGHT,
  # A negative weight increases the entropy.
  'router_losses.entropy': Range(-1_000, 1_000),
  'router_collapse_threshold': Range(0, 1_000, above=True),
  'loss.average_over': Choices(('tokens', 'sequences')),
  'loss.z_loss': _WEIGHT,
  'loss.label_smoothing': _FRACTION,
  'loss.consistency': _WEIGHT,
  'gradient_accumulation_steps': _ROWS,
  'model.dropout': _FRACTION,
  'model.dtype': _DTYPE,
  'model.param_dtype': _DTYPE,
  'model.quantize': Choices(('', 'int8', 'nf4')),
  'model.attention': Choices(('naive', 'chunked', 'fused')),
  'model.remat': Choices(('none', 'dots', 'full')),
  'model.scan_unroll': Range(1, 1_024),
  'data.max_examples_per_task': Range(0, 1_000_000_000_000),
  'data.temperature': Range(0, 1_000_000, above=True, infinite=True),
  'data.inputs_length': _TOKENS,
  'data.targets_length': _TOKENS,
  'data.length': _TOKENS,
  'data.format': Choices(('', 'alpaca', 'sharegpt', 'messages')),
  'data.train_on': Choices(('answers', 'all')),
  'data.truncation': Choices(('prompt', 'end', 'drop')),
  'data.pretraining_objective': Choices(('next', 'spans', 'prefix')),
  'data.noise_density': Range(0, 1, above=True, below=True),
  'data.mean_noise_span_length': Range(1, 1_048_576),
  'data.dedup_threshold': Range(0, 1),
  'data.replay_rate': _FRACTION,
  'data.validation_fraction': _FRACTION,
  'data.on_bad_row': Choices(('error', 'skip')),
  'data.num_workers': Range(0, 256),
  'optimizer.learning_rate': Range(0, 100, above=True),
  'optimizer.warmup_steps': _COUNT_OR_NONE,
  'optimizer.weight_decay': _WEIGHT,
  'optimizer.b1': _FRACTION,
  'optimizer.b2': _FRACTION,
  'optimizer.max_grad_norm': Range(0, 1_000_000_000),
  'optimizer.decay_initial_step': _COUNT_OR_NONE,
  'sharding.preset': Choices(('dp', 'fsdp', 'tp')),
  'sharding.model_parallel_size': Range(1, 65_536),
  'evaluation.every_steps': _COUNT_OR_NONE,
  'evaluation.max_examples': _COUNT,
  'evaluation.batch_size': _ROWS,
  'evaluation.max_batches': _COUNT,
  'checkpoint.every_steps': _COUNT,
  'checkpoint.max_to_keep': _COUNT,
  'early_stopping_patience': _COUNT_OR_NONE,
  'log.every_steps': _COUNT,
  'log.plots_every_steps': _COUNT_OR_NONE,
}

# Paths, names on a hub, names of registry entries, and strings with a syntax
# that other modules parse.
TEXTS = (
  'imports',
  'method',
  'budget',
  'budget_option',
  'scale',
  'solved_from',
  'objective',
  'preference.reference',
  'model.family',
  'model.path',
  'model.adapter',
  'model.size',
  'model.version',
  'data.source',
  'data.tasks',
  'data.ignore_fields',
  'data.date',
  'data.path',
  'data.split',
  'data.templates',
  'data.mixture',
  'data.tokenizer',
  'data.chat_template',
  'data.system_prompt',
  'data.quality_filters',
  'data.replay',
  'optimizer.name',
  'optimizer.schedule',
  'optimizer.groups',
  'evaluation.tasks',
  'evaluation.path',
  'log.trackers',
  'log.wandb_project',
  'profile.steps',
  'callbacks',
)

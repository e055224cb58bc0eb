# SPDX-License-Identifier: Apache-2.0
"""The range or the choices of every key of a config.

`ALLOWED` has a line for each number and each enumerated text of
`config.default`; `TEXTS` names the keys that take any text. A test compares
their keys with the defaults, and the choices with the registries that this
module is too low to import.
"""

from moepeft.core.ranges import MAX_SEED, Choices, Range

# The released code, and the paper's text.
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
    0, 0.5, below=True, note='at 0.5 labels say nothing'
  ),
  'preference.sft': _WEIGHT,
  'preference.margin': _WEIGHT,
  'preference.desirable': _WEIGHT,
  'preference.undesirable': _WEIGHT,
  'semantics': Choices(SEMANTICS),
  'router_losses.load_balance': _WEIGHT,
  'router_losses.z': _WEIGHT,
  # A negative weight spreads the routing.
  'router_losses.entropy': Range(-1_000, 1_000),
  'router_alarm': Range(0, 1_000, above=True),
  'loss.per': Choices(('tokens', 'sequences')),
  'loss.z': _WEIGHT,
  'loss.label_smoothing': _FRACTION,
  'accumulate': _ROWS,
  'model.dropout': _FRACTION,
  'model.dtype': _DTYPE,
  'model.param_dtype': _DTYPE,
  'model.quantise': Choices(('', 'int8', 'nf4')),
  'model.attention': Choices(('naive', 'chunked', 'fused')),
  'model.remat': Choices(('none', 'dots', 'full')),
  'model.unroll': Range(1, 1_024),
  'data.cap': Range(0, 1_000_000_000_000),
  'data.temperature': Range(0, 1_000_000, above=True, infinite=True),
  'data.inputs_length': _TOKENS,
  'data.targets_length': _TOKENS,
  'data.length': _TOKENS,
  'data.form': Choices(('', 'alpaca', 'sharegpt', 'messages')),
  'data.train_on': Choices(('answers', 'all')),
  'data.too_long': Choices(('prompt', 'end', 'drop')),
  'data.predict': Choices(('next', 'spans', 'prefix')),
  'data.noise': Range(0, 1, above=True, below=True),
  'data.span': Range(1, 1_048_576),
  'data.duplicates': Range(0, 1),
  'data.replay_rate': _FRACTION,
  'data.held_out': _FRACTION,
  'data.on_bad_row': Choices(('error', 'skip')),
  'data.workers': Range(0, 256),
  'optimizer.learning_rate': Range(0, 100, above=True),
  'optimizer.warmup_steps': _COUNT_OR_NONE,
  'optimizer.weight_decay': _WEIGHT,
  'optimizer.b1': _FRACTION,
  'optimizer.b2': _FRACTION,
  'optimizer.clip': Range(0, 1_000_000_000),
  'optimizer.clock': _COUNT_OR_NONE,
  'sharding.preset': Choices(('dp', 'fsdp', 'tp')),
  'sharding.model': Range(1, 65_536),
  'evaluation.every_steps': _COUNT_OR_NONE,
  'evaluation.max_examples': _COUNT,
  'evaluation.batch_size': _ROWS,
  'evaluation.batches': _COUNT,
  'checkpoint.every_steps': _COUNT,
  'checkpoint.keep': _COUNT,
  'patience': _COUNT_OR_NONE,
  'log.every_steps': _COUNT,
}

# Paths, names on a hub, names of registries' entries, and small languages that
# other modules read.
TEXTS = (
  'imports',
  'method',
  'objective',
  'preference.reference',
  'model.family',
  'model.path',
  'model.adapter',
  'model.size',
  'model.version',
  'data.source',
  'data.tasks',
  'data.ignore',
  'data.date',
  'data.path',
  'data.split',
  'data.templates',
  'data.mixture',
  'data.module',
  'data.vocabulary',
  'data.chat_template',
  'data.system',
  'data.quality',
  'data.replay',
  'optimizer.name',
  'optimizer.schedule',
  'optimizer.groups',
  'evaluation.tasks',
  'evaluation.path',
  'log.wandb',
)

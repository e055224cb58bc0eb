# SPDX-License-Identifier: Apache-2.0
"""Every key of a config with its default, and helpers of config files.

A config file, as in `configs/`, has `get_config(values='')`, which changes some
keys of `default()`. `values` is what stands after a colon on the command line:
`--config=configs/paper/t5_xl_mov.py:experts=20`.
"""

from typing import Any

from ml_collections import ConfigDict

from moepeft.core.ranges import shortened, suggestion
from moepeft.core.untrusted import parse_literal


def default() -> ConfigDict:
  """Returns the whole config; its keys are all that there are."""
  c = ConfigDict()
  c.seed = 0
  # Modules to import first, 'my_module,other': they register entries of their
  # own. --imports adds to them.
  c.imports = ''
  c.steps = 300
  c.batch_size = 32
  # A batch is computed in so many parts, one after the other, to save memory.
  c.gradient_accumulation_steps = 1
  # The form is that of moepeft.config.method_string; 'full' trains the base.
  c.method = 'molora(experts=10, rank=4)'
  # Where the method's text leaves it open: 'official' (released code), 'paper'.
  c.semantics = 'official'
  # Weights of router losses, those of moepeft.moe.aux_losses and those of
  # routers of your own, by name; the paper's are 0.
  c.router_losses = ConfigDict(dict(load_balance=0.0, z=0.0, entropy=0.0))
  # A line is printed when a router is collapsed in three logs in a row: one
  # expert has more than this share of the weight (softmax: every expert has
  # weight) or gets more than this share of the tokens (top-k), and the mean
  # entropy of a token's weights is below 0.75 of ln e.
  c.router_collapse_threshold = 0.9
  # The loss: an entry of moepeft.objectives.
  c.objective = 'seq2seq'
  c.loss = _loss()
  c.preference = _preference()
  c.model = _model()
  c.data = _data()
  c.optimizer = _optimizer()
  c.sharding = _sharding()
  c.evaluation = _evaluation()
  c.checkpoint = _checkpoint()
  # A run ends when its validation loss has not fallen for so many validations;
  # 0 for never.
  c.early_stopping_patience = 0
  c.log = _log()
  # 'FIRST:LAST', as in '5:8': steps that JAX's profiler traces, both included,
  # into <workdir>/profile, which TensorBoard and Perfetto open; '' for none.
  c.profile = ConfigDict(dict(steps=''))
  # Further callbacks of moepeft.training.callbacks, 'mine,another'.
  c.callbacks = ''
  return c


def _loss() -> ConfigDict:
  """Keys of objectives that are a cross-entropy."""
  return ConfigDict(
    dict(
      # The loss is a mean over 'tokens', or over 'sequences' (of each example's
      # own mean, packed or not; T5X's AVERAGE_PER_SEQUENCE).
      average_over='tokens',
      # Weight of a token's squared log-partition.
      z_loss=0.0,
      label_smoothing=0.0,
    )
  )


def _preference() -> ConfigDict:
  """Keys of objectives that compare answers (dpo, kto, orpo, simpo, reward)."""
  return ConfigDict(
    dict(
      # dpo: 'sigmoid', 'hinge', 'ipo' or 'robust'.
      loss='sigmoid',
      beta=0.1,
      label_smoothing=0.0,
      # Weight of the chosen answer's own likelihood.
      sft_weight=0.0,
      # simpo's target margin, over beta.
      margin=0.5,
      # kto's weights of good and of bad answers.
      desirable_weight=1.0,
      undesirable_weight=1.0,
      # Rewards are relative to 'base' (without adapter), to a run or adapter
      # that stays as it is, or to 'precomputed' (before training).
      reference='base',
    )
  )


def _model() -> ConfigDict:
  return ConfigDict(
    dict(
      # An entry of moepeft.models; '' for that of `path`. Needed for random
      # weights.
      family='',
      # 'package:NAME' (ships with moepeft), a directory or hub name in Hugging
      # Face's form, or a T5X checkpoint; '' for random weights of `size`.
      path='package:t5_tiny',
      # An adapter to start from: a run's work directory (its latest
      # checkpoint), an adapter of moepeft or peft, or a T5X checkpoint.
      adapter='',
      size='small',
      version='1.1',
      # Changes to the size's fields (of models.decoder_config.DecoderConfig or
      # models.t5.T5Config); random weights only. On the command line too:
      # --config.model.shape.positions=alibi.
      shape=ConfigDict(),
      dropout=0.1,
      # The dtype of activations; then of the base's weights in memory.
      dtype='float32',
      param_dtype='float32',
      # '' as stored; 'int8' or 'nf4': the base's projections in so many bits.
      quantize='',
      # 'naive', 'chunked' (no array of queries x keys) or 'fused': JAX's own,
      # which is cuDNN's on NVIDIA devices where that can, else XLA's, which
      # has such an array.
      attention='naive',
      # 'none', 'dots' or 'full'.
      remat='none',
      # Layers in one step of the scan: more is faster on CPU and compiles
      # longer. With remat it is one.
      scan_unroll=1,
    )
  )


def _data() -> ConfigDict:
  c = ConfigDict(
    dict(
      # 'tasks' (embedded, generated), 'jsonl' (P3's form), 'datasets' (Hugging
      # Face's: a hub name or local files), 'seqio', 'chat' (conversations),
      # 'preference' (answers compared or judged) or 'text' (plain).
      source='tasks',
      # Families of moepeft.tasks: groups and names, 'B' or 'A,copy'.
      tasks='B',
      # jsonl: a .jsonl or .jsonl.gz file, or a directory of them. datasets: a
      # hub name, 'glue/mrpc', or local json, csv, parquet or arrow files.
      # seqio: a directory of cached tasks, '' for registered ones.
      path='',
      # The split of a dataset or a SeqIO task.
      split='train',
      # promptsource's templates of raw rows: a templates.yaml, or a directory
      # of them; '' where rows have inputs and targets.
      templates='',
      # Rates by dataset: one of moepeft.data.t0_mixtures ('t0_train', ...), or
      # a SeqIO task or mixture that a module of --imports registers; '' for the
      # rates below.
      mixture='',
      # A dataset's rate is min(rows, max_examples_per_task) **
      # (1 / temperature), 0 for no maximum: temperature 1 draws every row as
      # often, 'inf' every dataset.
      max_examples_per_task=0,
      temperature=1.0,
      # Fields of rows and turns that are left unused, 'images,name'. Others
      # that change what a row means are used or refused.
      ignore_fields='',
      # 'error', or 'skip': counted and told.
      on_bad_row='error',
      # The share of each dataset's last `idx` kept for validation: of the last
      # rows of chat and preference, where rows of one prompt stay together.
      validation_fraction=0.05,
      # Processes that read and tokenize ahead; 0 for threads.
      num_workers=0,
    )
  )
  c.update(_batches())
  c.update(_chat())
  c.update(_text())
  return c


def _batches() -> dict[str, Any]:
  """Keys of config.data that say how texts become batches."""
  return dict(
    # '' for the model's own, 'bytes', a tokenizer's directory or hub name.
    tokenizer='',
    inputs_length=160,
    targets_length=20,
    # Tokens of a row of a decoder-only model, prompt and answer together.
    length=512,
    # Too long an example: 'prompt' (its prompt loses its beginning; chat: its
    # oldest turns before), 'end' (cut there) or 'drop'.
    truncation='prompt',
    # Whether a row of a batch holds as many examples as fit.
    packing=False,
  )


def _chat() -> dict[str, Any]:
  """Keys of config.data for the sources chat and preference."""
  return dict(
    # 'alpaca', 'sharegpt' or 'messages'; '' finds out.
    format='',
    # A Jinja file instead of the tokenizer's own chat template.
    chat_template='',
    # The date of chat templates that ask for one, '2024-07-26'; '' for the day
    # of the run's first start, which is kept.
    date='',
    # Put before conversations that have no system turn.
    system_prompt='',
    # The loss is on 'answers' (the assistant's turns but those of `weight` 0)
    # or on 'all'.
    train_on='answers',
  )


def _text() -> dict[str, Any]:
  """Keys of config.data for plain text, the source's or replayed."""
  return dict(
    # 'next' (causal), 'spans' (T5's corruption) or 'prefix' (the continuation
    # from a drawn place; a decoder reads the prefix causally too, unlike the
    # prefix LM of arXiv:1910.10683, section 3.2.1, which sees all of it).
    pretraining_objective='next',
    # The share of tokens that 'spans' hides, and a span's mean length.
    noise_density=0.15,
    mean_noise_span_length=3.0,
    # Near duplicates from this Jaccard similarity on are left out; 0 for none.
    # Then rules of moepeft.data.text.quality, 'length,repetition'.
    dedup_threshold=0.0,
    quality_filters='',
    # Plain text mixed in, so that less is forgotten, and its share of the
    # examples; python -m moepeft.data tells its share of the trained tokens.
    replay='',
    replay_rate=0.0,
  )


def _optimizer() -> ConfigDict:
  return ConfigDict(
    dict(
      # 'adamw' or 'adafactor'.
      name='adamw',
      learning_rate=1e-3,
      # 'constant', 'linear' or 'cosine' (both fall to zero at `steps`).
      schedule='constant',
      warmup_steps=0,
      # A step's share of the weights: for adamw times the rate, for adafactor
      # (as in T5X) by itself.
      weight_decay=0.0,
      b1=0.9,
      b2=0.999,
      # Maximum of the gradient's global norm; 0 for none.
      max_grad_norm=1.0,
      # Steps that Adafactor's decay counts as done before the first; released
      # as 1,100,000, the steps of the base's pretraining.
      decay_initial_step=0,
      # Rates and decay by parameter, '*/router/*: learning_rate=1e-4,
      # weight_decay=0; ...': patterns of paths, of which the first decides.
      groups='',
    )
  )


def _sharding() -> ConfigDict:
  return ConfigDict(
    dict(
      # 'dp' (every device holds all weights), 'fsdp' (weights are spread over
      # the axis 'data') or 'tp' (over the axis 'model').
      preset='dp',
      # Devices along the axis 'model'; the rest are along 'data'.
      model_parallel_size=1,
      # (array's axis, mesh axis) pairs like ('mlp', 'model') before those of
      # the preset; see moepeft.core.sharding.
      rules=(),
    )
  )


def _evaluation() -> ConfigDict:
  return ConfigDict(
    dict(
      # Whether to evaluate before and after training.
      before=True,
      after=True,
      # Steps between validation losses while training; 0 for none.
      every_steps=0,
      # Families evaluated where the source is 'tasks'.
      tasks='A,B,C',
      # Rows with choices to rank, in the form of data.path; '' for none.
      path='',
      # At most this many examples of a task (and split of templates).
      max_examples=100,
      batch_size=32,
      # The validation loss is of so many times batch_size held-out examples,
      # evenly spread, or of all where there are fewer.
      max_batches=8,
    )
  )


def _checkpoint() -> ConfigDict:
  return ConfigDict(
    dict(
      every_steps=100,
      # The newest so many are kept, and the one of the least validation loss
      # too where `keep_best` (needs evaluation.every_steps).
      max_to_keep=2,
      keep_best=False,
    )
  )


def _log() -> ConfigDict:
  return ConfigDict(
    dict(
      every_steps=10,
      # Pictures in <workdir>/plots, drawn once a minute and at the end.
      plots=True,
      # Names of moepeft.runs.trackers, 'tensorboard,wandb'; '' for none.
      trackers='tensorboard',
      # The project of Weights & Biases.
      wandb_project='',
    )
  )


def paper(size: str, model: str = '', data: str = '') -> ConfigDict:
  """The settings that the paper's runs on T5 1.1 of a size share.

  Source: the released code's run files: Adafactor at a constant 3e-4 whose
  clock goes on from the base's 1,100,000 steps, batches of 32 packed rows,
  500,000 steps, 1024 and 256 tokens, dropout 0.1, z-loss 1e-4, the loss
  averaged per sequence.

  Args:
    size: 'large', 'xl' or 'xxl'.
    model: a copy of the base, t5_1_1_lm100k_<size>; '' suffices to count.
    data: a directory of cached tasks of P3.
  """
  c = default()
  c.steps = 500_000
  c.batch_size = 32
  c.model.path = model
  c.model.family = 't5'
  c.model.size = size
  c.model.dtype = 'bfloat16'
  c.model.remat = 'dots'
  c.data.source = 'seqio'
  c.data.path = data
  c.data.mixture = 't0_train'
  c.data.inputs_length = 1024
  c.data.targets_length = 256
  c.data.packing = True
  c.loss.average_over = 'sequences'
  c.loss.z_loss = 1e-4
  c.optimizer.name = 'adafactor'
  c.optimizer.learning_rate = 3e-4
  c.optimizer.max_grad_norm = 0.0
  c.optimizer.decay_initial_step = 1_100_000
  c.checkpoint.every_steps = 10_000
  c.checkpoint.max_to_keep = 60
  return c


def finetuning(text: str, method: str, **paper: float) -> ConfigDict:
  """A published method with its paper's settings, for any model and data.

  With a model it is supervised fine-tuning on conversations, as configs/sft.py;
  without, the embedded T5 is trained on the embedded tasks.

  Args:
    text: what stands after the colon of --config: model=PATH, data=FILE and
      the settings by name.
    paper: the paper's values of steps, batch_size, length and learning_rate.
  """
  settings = dict(steps=300, batch_size=16, length=512, learning_rate=2e-4)
  v = values(text, model='', data='', method=method, **settings | paper)
  c = default()
  c.method = v.method
  c.steps, c.batch_size = v.steps, v.batch_size
  c.model.dropout = 0.0
  c.optimizer.learning_rate = v.learning_rate
  c.optimizer.schedule = 'cosine'
  c.optimizer.warmup_steps = v.steps // 20
  c.data.inputs_length, c.data.targets_length = 100, 16
  if v.model:
    c.objective, c.model.path = 'causal', v.model
    c.data.source, c.data.path = 'chat', v.data
    c.data.length, c.data.packing = v.length, True
    c.evaluation.every_steps = max(v.steps // 6, 1)
    c.evaluation.batch_size = v.batch_size
  return c


def values(text: str, /, **defaults: Any) -> ConfigDict:
  """Reads a config file's values: 'experts=20,rank=4' over its defaults.

  Commas within parentheses are a value's own: 'method=lora(rank=8, alpha=1)'.

  Raises:
    ValueError: the text is not of that form, or the file has no such value.
  """
  result = dict(defaults)
  for part in _parts(text or ''):
    key, equals, value = part.partition('=')
    if not equals:
      raise ValueError(
        f'expected name=value after the colon of --config; got {part!r}'
      )
    if key not in defaults:
      raise ValueError(
        f'this config has no value {shortened(key)}; it has '
        f'{", ".join(defaults) or "none"}{suggestion(key, defaults)}'
      )
    result[key] = _typed(value, defaults[key], key)
  return ConfigDict(result)


def _parts(text: str) -> list[str]:
  """The parts between commas, those within parentheses aside; none is empty."""
  parts, depth = [''], 0
  for letter in text:
    depth += (letter == '(') - (letter == ')')
    if letter == ',' and depth == 0:
      parts.append('')
    else:
      parts[-1] += letter
  return [part for part in parts if part]


def _typed(value: str, like: Any, key: str) -> Any:
  if isinstance(like, str):
    return value
  try:
    typed = parse_literal(value)
  except ValueError:
    typed = value
  if type(typed) is int and isinstance(like, float):
    return float(typed)
  if type(typed) is not type(like):
    raise ValueError(
      f'the value {key} is of type {type(like).__name__}; got '
      f'{shortened(value)}'
    )
  return typed

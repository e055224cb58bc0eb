# SPDX-License-Identifier: Apache-2.0
"""Every key of a config with its default, and helpers for config files.

A config file, as in `configs/`, has `get_config(values='')`, which changes some
keys of `default()`. `values` is the text after a colon on the command line:
`--config=configs/paper/t5_xl_mov.py:experts=20`.
"""

from typing import Any

from ml_collections import ConfigDict

from moepeft.core.ranges import short_repr, suggestion
from moepeft.core.untrusted import parse_literal


def default() -> ConfigDict:
  """Returns a config with every key."""
  c = ConfigDict()
  c.seed = 0
  # Modules to import first, 'my_module,other', which register entries;
  # --imports adds to them.
  c.imports = ''
  c.steps = 300
  c.batch_size = 32
  # Microbatches per batch, computed one after the other to save memory.
  c.gradient_accumulation_steps = 1
  # The syntax is in moepeft.config.method_string; 'full' trains the base model.
  c.method = 'molora(experts=10, rank=4)'
  # For options that the method leaves out: 'official' (released code) or
  # 'paper'.
  c.semantics = 'official'
  # A budget for the rank or the number of experts of `method`: 'params:4976640'
  # trained parameters, 'params:0.5%' of the base's, or as many as a method has,
  # 'params:lora(rank=8)'; 'flops:...' is FLOPs a token, forward and backward.
  # '' leaves the method as it is.
  c.budget = ''
  # The option of the method that is solved: 'rank', 'experts', ...; '' for the
  # first of rank, size, length and experts that it has. 'rank,experts' solves
  # both, with the number of experts that is nearest to the method's.
  c.budget_option = ''
  # The largest error of a solved budget, as a fraction of it.
  c.budget_tolerance = 0.01
  # 'matched' sets alpha so that alpha / r (with rslora alpha / sqrt(r)) is that
  # of lora(rank=4), 'matched:lora(rank=8)' that of another; '' leaves it.
  c.scale = ''
  # Written by a run: the method, budget and scale that `method` is solved from.
  c.solved_from = ''
  # Weights of router losses by name, from moepeft.moe.aux_losses or from your
  # routers; the paper's are 0.
  c.router_losses = ConfigDict(dict(load_balance=0.0, z=0.0, entropy=0.0))
  # A warning is printed when a router is collapsed in three consecutive logs:
  # one expert has more than this fraction of the weight (softmax) or of the
  # tokens (top-k), and the mean entropy of a token's weights is below 0.75 of
  # ln e.
  c.router_collapse_threshold = 0.9
  # The loss: an entry of moepeft.objectives.
  c.objective = 'seq2seq'
  c.loss = _loss()
  c.preference = _preference()
  # Of the objective 'distill'; the teacher is config.preference.reference.
  # temperature: both distributions are softmaxes of logits over it.
  c.distill = ConfigDict(dict(temperature=1.0))
  c.model = _model()
  c.data = _data()
  c.optimizer = _optimizer()
  c.sharding = _sharding()
  c.evaluation = _evaluation()
  c.checkpoint = _checkpoint()
  # Training stops after so many validations without a lower loss; 0 for never.
  c.early_stopping_patience = 0
  c.log = _log()
  # 'FIRST:LAST', as in '5:8': JAX's profiler traces these steps, both included,
  # to <workdir>/profile, for TensorBoard and Perfetto; '' for none.
  c.profile = ConfigDict(dict(steps=''))
  # More callbacks of moepeft.training.callbacks, 'my_callback,other'.
  c.callbacks = ''
  return c


def _loss() -> ConfigDict:
  """Keys of cross-entropy objectives."""
  return ConfigDict(
    dict(
      # The loss is a mean over 'tokens', or over 'sequences' (the mean of each
      # example's mean, packed or not; T5X's AVERAGE_PER_SEQUENCE).
      average_over='tokens',
      # Weight of each token's squared log-partition function.
      z_loss=0.0,
      label_smoothing=0.0,
      # Weight of the divergence between two passes with other noise (AdaMix).
      consistency=0.0,
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
      # Weight of the chosen answer's negative log-likelihood.
      sft_weight=0.0,
      # simpo's target margin, over beta.
      margin=0.5,
      # kto's weights of good and of bad answers.
      desirable_weight=1.0,
      undesirable_weight=1.0,
      # The reference model: 'base' (without adapter), the path of a run or of
      # an adapter, or 'precomputed' (its log-probabilities before training).
      reference='base',
    )
  )


def _model() -> ConfigDict:
  return ConfigDict(
    dict(
      # An entry of moepeft.models; '' for the one of `path`. Random weights
      # need it.
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
      # The dtype of activations, and that of the base's weights in memory.
      dtype='float32',
      param_dtype='float32',
      # '' as stored, or 'int8' or 'nf4' for the base's projections.
      quantize='',
      # 'naive', 'chunked' (no array of queries x keys) or 'fused', JAX's: cuDNN
      # on NVIDIA devices if it supports the shapes, else XLA, with such an
      # array.
      attention='naive',
      # 'none', 'dots' or 'full'.
      remat='none',
      # Layers in one step of the scan; more are faster on CPU and compile for
      # longer. With remat it is 1.
      scan_unroll=1,
    )
  )


def _data() -> ConfigDict:
  c = ConfigDict(
    dict(
      # 'tasks' (generated), 'jsonl' (P3's form), 'datasets' (Hugging Face's: a
      # hub name or local files), 'seqio', 'chat' (conversations), 'preference'
      # (answers in pairs or with labels) or 'text' (plain).
      source='tasks',
      # Families of moepeft.tasks: groups and names, 'B' or 'A,copy'.
      tasks='B',
      # jsonl: a .jsonl or .jsonl.gz file, or a directory of them. datasets: a
      # hub name, 'glue/mrpc', or local json, csv, parquet or arrow files.
      # seqio: a directory of cached tasks, '' for registered ones.
      path='',
      # The split of a dataset or a SeqIO task.
      split='train',
      # promptsource's templates for raw rows: a templates.yaml, or a directory
      # of them; '' if rows have inputs and targets.
      templates='',
      # Rates by dataset: one of moepeft.data.t0_mixtures ('t0_train', ...), or
      # a SeqIO task or mixture that a module of --imports registers; '' for the
      # rates below.
      mixture='',
      # A dataset's rate is min(rows, max_examples_per_task) **
      # (1 / temperature), 0 for no maximum. With temperature 1 all rows are
      # equally frequent, with 'inf' all datasets.
      max_examples_per_task=0,
      temperature=1.0,
      # Fields of rows and turns to ignore, 'images,name'. Any other field that
      # changes the meaning of a row is used, or is an error.
      ignore_fields='',
      # 'error', or 'skip', which prints the number of bad rows.
      on_bad_row='error',
      # The fraction of each dataset held out for validation: its last `idx`, or
      # the last rows of chat and preference, where rows of one prompt stay
      # together.
      validation_fraction=0.05,
      # Processes that prefetch and tokenize; 0 for threads.
      num_workers=0,
    )
  )
  c.update(_batches())
  c.update(_chat())
  c.update(_text())
  return c


def _batches() -> dict[str, Any]:
  """Keys of config.data for tokenization and batches."""
  return dict(
    # '' for the model's, 'bytes', or a tokenizer's directory or hub name.
    tokenizer='',
    inputs_length=160,
    targets_length=20,
    # Tokens in a row of a decoder-only model, prompt and answer together.
    length=512,
    # For examples that are too long: 'prompt' (removes the beginning of the
    # prompt; chat: first the oldest turns), 'end' (removes the end) or 'drop'.
    truncation='prompt',
    # Whether to pack as many examples into a row as fit.
    packing=False,
  )


def _chat() -> dict[str, Any]:
  """Keys of config.data for the sources chat and preference."""
  return dict(
    # 'alpaca', 'sharegpt' or 'messages'; '' detects it.
    format='',
    # A Jinja file that replaces the tokenizer's chat template.
    chat_template='',
    # The date for chat templates that use one, '2024-07-26'; '' for the day of
    # the run's first start, which the run stores.
    date='',
    # The system turn of conversations that have none.
    system_prompt='',
    # The tokens in the loss: 'answers' (the assistant's turns, except those
    # with `weight` 0) or 'all'.
    train_on='answers',
  )


def _text() -> dict[str, Any]:
  """Keys of config.data for plain text, as the source or for replay."""
  return dict(
    # 'next' (causal), 'spans' (T5's span corruption) or 'prefix' (predicts the
    # text after a random position; a decoder attends to the prefix causally,
    # unlike the prefix LM of arXiv:1910.10683, section 3.2.1).
    pretraining_objective='next',
    # For 'spans': the fraction of noise tokens, and a span's mean length.
    noise_density=0.15,
    mean_noise_span_length=3.0,
    # The least Jaccard similarity of near duplicates, which are removed; 0
    # keeps all.
    dedup_threshold=0.0,
    # Rules of moepeft.data.text.quality, 'length,repetition'.
    quality_filters='',
    # Plain text to mix in against forgetting, and its fraction of the examples;
    # python -m moepeft.data prints its fraction of the trained tokens.
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
      # The fraction of the weights that a step subtracts, for adamw times the
      # learning rate, for adafactor (as in T5X) not.
      weight_decay=0.0,
      b1=0.9,
      b2=0.999,
      # Maximum of the gradient's global norm; 0 for none.
      max_grad_norm=1.0,
      # Steps that Adafactor's decay schedule counts as done before training;
      # 1,100,000 in the released code, the steps of pretraining.
      decay_initial_step=0,
      # Learning rate and weight decay by parameter path; the first pattern that
      # matches counts: '*/router/*: learning_rate=1e-4, weight_decay=0; ...';
      # rate_ratio=16 is 16 times the learning rate above.
      groups='',
    )
  )


def _sharding() -> ConfigDict:
  return ConfigDict(
    dict(
      # 'dp' (every device holds all weights), 'fsdp' (weights are sharded along
      # the axis 'data') or 'tp' (along the axis 'model').
      preset='dp',
      # Devices along the axis 'model'; the others are along 'data'.
      model_parallel_size=1,
      # (array axis, mesh axis) pairs like ('mlp', 'model') that precede those
      # of the preset; see moepeft.core.sharding.
      rules=(),
    )
  )


def _evaluation() -> ConfigDict:
  return ConfigDict(
    dict(
      # Whether to evaluate before and after training.
      before=True,
      after=True,
      # Steps between validation losses in training; 0 for none.
      every_steps=0,
      # Families to evaluate if the source is 'tasks'.
      tasks='A,B,C',
      # Rows with choices to rank, in the form of data.path; '' for none.
      path='',
      # The maximum number of examples of a task (and split of templates).
      max_examples=100,
      batch_size=32,
      # The maximum number of batches, evenly spaced, in the validation loss.
      max_batches=8,
    )
  )


def _checkpoint() -> ConfigDict:
  return ConfigDict(
    dict(
      every_steps=100,
      # The number of latest checkpoints to keep. `keep_best` also keeps the one
      # with the lowest validation loss (needs evaluation.every_steps).
      max_to_keep=2,
      keep_best=False,
    )
  )


def _log() -> ConfigDict:
  return ConfigDict(
    dict(
      every_steps=10,
      # Plots in <workdir>/plots, drawn once a minute and at the end.
      plots=True,
      # Steps between drawings, in place of once a minute; 0 for that. With it,
      # the experts by task are drawn, too, by a pass over four held-out rows of
      # each task.
      plots_every_steps=0,
      # Names of moepeft.runs.trackers, 'tensorboard,wandb'; '' for none.
      trackers='tensorboard',
      # The project in Weights & Biases.
      wandb_project='',
    )
  )


def paper(size: str, model: str = '', data: str = '') -> ConfigDict:
  """The common settings of the paper's runs on T5 1.1 of a size.

  Source: the released code's run files: Adafactor at a constant 3e-4 whose
  decay continues from 1,100,000 pretraining steps, batches of 32 packed rows,
  500,000 steps, 1024 and 256 tokens, dropout 0.1, z-loss 1e-4, the loss
  averaged per sequence.

  Args:
    size: 'large', 'xl' or 'xxl'.
    model: the path of the base, t5_1_1_lm100k_<size>; '' suffices to count
      parameters.
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


# Those of group B, which evaluation has too.
EMBEDDED_TASKS = 'storage|profession|stars|verdict'


def finetuning(text: str, method: str, **paper: float) -> ConfigDict:
  """A published method with its paper's settings, for any model and data.

  With a model it is supervised fine-tuning on conversations, as configs/sft.py;
  without, the embedded T5 is trained on the embedded tasks.

  Args:
    text: what stands after the colon of --config: model=PATH, data=FILE and
      the settings by name; adapters=A|B, trained ones, where the method has a
      place for them, as in 'arrow({adapters})'; tasks=A|B, names in the data,
      where it has one, as in 'poly(router=poly(tasks={tasks}))'.
    paper: the paper's values of steps, batch_size, length and learning_rate.
  """
  settings = dict(steps=300, batch_size=16, length=512, learning_rate=2e-4)
  if '{adapters}' in method:
    settings['adapters'] = ''
  if '{tasks}' in method:
    settings['tasks'] = EMBEDDED_TASKS
  v = values(text, model='', data='', method=method, **settings | paper)
  c = default()
  paths = v.adapters.split('|') if v.get('adapters') else []
  option = f'from_adapters={paths}' if paths else ''
  c.method = v.method.replace('{adapters}', option)
  if v.get('tasks'):
    if v.model:
      raise ValueError(
        'conversations name no task, which this method routes by; leave out '
        'model='
      )
    c.method = c.method.replace('{tasks}', str(v.tasks.split('|')))
    # Other tasks have no routing of their own.
    c.evaluation.tasks = 'B'
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
  else:
    # Unrolled, the three layers of the embedded T5 are faster on a CPU.
    c.model.scan_unroll = 3
  return c


def ablation(text: str, method: str) -> ConfigDict:
  """The common settings of configs/ablate: short runs that are compared.

  The embedded T5, or another model, as in `finetuning`. Runs have validation
  losses for moepeft.sweep --select; its --evaluate measures the rest.

  Args:
    text: what stands after the colon of --config, as in `finetuning`.
    method: the method of a run that the grid gives none.
  """
  c = finetuning(text, method, steps=150, batch_size=32, learning_rate=1.5e-3)
  c.optimizer.schedule, c.optimizer.warmup_steps = 'constant', 0
  c.evaluation.before = c.evaluation.after = False
  c.evaluation.every_steps = c.steps
  # Group A is what the base knows, and B what is trained.
  c.evaluation.tasks = 'A,B'
  return c


def values(text: str, /, **defaults: Any) -> ConfigDict:
  """Parses a config file's values, 'experts=20,rank=4', over its defaults.

  Commas in parentheses are part of a value: 'method=lora(rank=8, alpha=1)'.

  Raises:
    ValueError: the text has another syntax, or the file has no such value.
  """
  result = dict(defaults)
  for part in _split_values(text or ''):
    key, equals, value = part.partition('=')
    if not equals:
      raise ValueError(
        f'expected name=value after the colon of --config; got {part!r}'
      )
    if key not in defaults:
      raise ValueError(
        f'this config has no value {short_repr(key)}; it has '
        f'{", ".join(defaults) or "none"}{suggestion(key, defaults)}'
      )
    result[key] = _parse_value(value, defaults[key], key)
  return ConfigDict(result)


def _split_values(text: str) -> list[str]:
  """Splits at commas outside of parentheses, without empty parts."""
  parts, depth = [''], 0
  for char in text:
    depth += (char == '(') - (char == ')')
    if char == ',' and depth == 0:
      parts.append('')
    else:
      parts[-1] += char
  return [part for part in parts if part]


def _parse_value(text: str, default: Any, key: str) -> Any:
  if isinstance(default, str):
    return text
  try:
    value = parse_literal(text)
  except ValueError:
    value = text
  if type(value) is int and isinstance(default, float):
    return float(value)
  if type(value) is not type(default):
    raise ValueError(
      f'the value {key} is of type {type(default).__name__}; got '
      f'{short_repr(text)}'
    )
  return value

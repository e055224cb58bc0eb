# SPDX-License-Identifier: Apache-2.0
"""Builds the parts of a training run from its config.

Only this module and `initial_state` read the config; the other parts take
explicit arguments.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import optax
from ml_collections import ConfigDict

from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints.count_parameters import count_trained
from moepeft.checkpoints.manager import Checkpoints
from moepeft.checkpoints.run_metadata import describe_run
from moepeft.checkpoints.run_progress import RunProgress
from moepeft.core import distributed, files, sharding, terminal
from moepeft.core.sharding import Layout
from moepeft.core.types import State
from moepeft.data import (
  TrainingData,
  load_tokenizer,
  make_loader,
  open_data,
  truncation_warning,
)
from moepeft.data.batching.collators import (
  Collator,
  make_model_collator,
  scoring_lengths,
)
from moepeft.data.chat import template as chat_template
from moepeft.data.dataset import evenly_spaced
from moepeft.data.loader import Loader
from moepeft.data.preference.dataset import preference_data
from moepeft.data.tokenizers.tokenizer import Tokenizer, check_vocab_size
from moepeft.evaluation.eval_sets import (
  examples_of,
  training_prompts,
  validation_rows,
)
from moepeft.evaluation.evaluator import Evaluator
from moepeft.evaluation.routing.collect import has_router
from moepeft.models import check_decodes, decoder_only
from moepeft.moe import aux_losses, router_state
from moepeft.nn.expert_padding import PaddedAxis
from moepeft.objectives import (
  OBJECTIVES,
  build_objective,
  build_validation_objective,
  check_model,
  reference_model,
)
from moepeft.objectives import check_config as check_objective
from moepeft.objectives.batches import make_collator
from moepeft.peft import Built
from moepeft.runs.directory import Workdir
from moepeft.runs.history import History
from moepeft.runs.run import Run
from moepeft.runs.trackers import Tracker, open_trackers
from moepeft.runs.trackers import specs as tracker_specs
from moepeft.tasks import Example
from moepeft.training import (
  grad_accumulation,
  initial_state,
  memory_estimate,
  optimizers,
  state_sharding,
  summary,
)
from moepeft.training.loop import TrainingLoop
from moepeft.training.metrics_logger import MetricsLogger
from moepeft.training.step import TrainStep, make_train_step
from moepeft.training.task_routing import TaskRouting

# Held-out rows of a task whose routing is drawn during training.
_ROUTED_ROWS = 4


@dataclasses.dataclass(frozen=True)
class Training:
  """The parts of a run before anything is restored or written.

  Attributes:
    config: the config, with the date for the chat template.
    layout: the mesh and the sharding rules.
    tokenizer: the base's tokenizer.
    method: the PEFT method, built for the model.
    state: the state before the first step, on the devices.
    train_step: jitted; donates the state.
    make_step: config -> the step with its numbers, not jitted.
    batches: an iterator of batches on the host, from the start of the data.
    evaluator: evaluates held-out rows.
    example: a held-out example of what is trained, if there is one.
    task_routing: as in `TrainingLoop`.
    identity: of the run, written into each checkpoint.
    parameters: the number of trained parameters.
  """

  config: ConfigDict
  layout: Layout
  tokenizer: Tokenizer
  method: Built
  state: State
  train_step: TrainStep
  make_step: Callable[[ConfigDict], TrainStep]
  batches: Loader
  evaluator: Evaluator
  example: Example | None
  task_routing: TaskRouting | None
  identity: dict[str, Any]
  parameters: int


def check(config: ConfigDict) -> None:
  """Checks a config before any data is read.

  Raises:
    ValueError: a value is invalid, or the memory does not suffice.
  """
  optimizers.make_optimizer(config.optimizer, config.steps)
  check_objective(config)
  tracker_specs(config.log.trackers)
  aux_losses.check_weights(config.router_losses)
  grad_accumulation.check(config.batch_size, config.gradient_accumulation_steps)
  memory_estimate.check(config)


def build(
  config: ConfigDict,
  workdir: str,
  dry_run: bool = False,
  base: base_lib.Base | None = None,
) -> Training:
  """Reads data and base and builds all parts, without restoring or training.

  Args:
    workdir: for the summary and a precomputed reference's log-probabilities.
    dry_run: whether to write no files.
    base: of config.model, if it is loaded; arrays that are on their device are
      not copied.

  Raises:
    ValueError: the config and the data or the base do not fit together.
  """
  options = config.sharding
  layout = sharding.layout(
    options.preset, options.model_parallel_size, options.rules
  )
  sharding.check_rows(layout.mesh, config.batch_size)
  share = sharding.process_shard(layout.mesh)
  # Before the tokenizer, which is searched for in the same directory.
  family, shape = base_lib.shape(config.model)
  check_decodes(shape)
  tokenizer = load_tokenizer(config.data.tokenizer, config.model.path)
  check_vocab_size(tokenizer, shape.vocab)
  check_model(config.objective, decoder_only(shape))
  # The chat template's date, which a resumed run keeps.
  config = chat_template.with_date(config, tokenizer)
  collator = _build_collator(config, tokenizer, family, shape)
  data = open_data(config.data, config.seed, share, shape.vocab, collator)
  for note in data.notes:
    terminal.show(note)
  base = base or base_lib.load(config.model)
  model, method = base_lib.module(base, config)
  padded = base_lib.padded_axes(model, base)
  optimizer = _build_optimizer(config, method, padded)
  state, reference, expert_files = initial_state.build(
    config, base, model, method, optimizer
  )
  logical_axes = base_lib.logical_axes(model, base)
  shardings = state_sharding.state_shardings(
    layout, state, logical_axes, method.trainable
  )
  state = state_sharding.place(
    state,
    shardings,
    router_state.optimizer_init(optimizer, method.frozen_arrays),
  )
  identity = describe_run(base, method, config.seed, expert_files)
  summary.print_summary(
    base,
    method,
    state,
    tokenizer,
    workdir,
    {
      'devices': state_sharding.describe(
        layout, state, logical_axes, method.trainable
      ),
      'data': _describe_data(config, data),
    },
    padded,
  )
  print(truncation_warning(data, collator), end='', flush=True)
  data = _with_precomputed_reference(
    config,
    data,
    collator,
    model,
    method.variables(state),
    identity,
    layout,
    None if dry_run else workdir,
  )
  make_step = functools.partial(_make_step, model, method, padded, reference)
  return Training(
    config=config,
    layout=layout,
    tokenizer=tokenizer,
    method=method,
    state=state,
    train_step=jax.jit(
      make_step(config),
      donate_argnums=0,
      out_shardings=(shardings, layout.replicated),
    ),
    make_step=make_step,
    batches=_build_loader(config, tokenizer, data, share, shape, collator),
    evaluator=_build_evaluator(
      config, model, tokenizer, data, layout, collator, reference
    ),
    example=next(iter(examples_of(data.held_out)), None),
    task_routing=_build_task_routing(config, model, tokenizer, data, layout),
    identity=identity,
    parameters=count_trained(state.trainable, method, padded)[0],
  )


def start(
  training: Training,
  run: Run,
  workdir: Workdir | None,
  data_hashes: dict[str, dict[str, str]],
  gin: str = '',
  skip_damaged: bool = False,
) -> TrainingLoop:
  """Restores the latest checkpoint, if there is one, and opens the trackers.

  Args:
    workdir: holds the lock of the directory; None where this process does not
      write.
    data_hashes: from `data.fingerprint`, saved to compare at a resume.
    gin: the gin files of the config, joined; saved beside it.
    skip_damaged: whether to resume from the checkpoint before a damaged one.
  """
  config, state = training.config, training.state
  checkpoints = Checkpoints(
    run.path,
    config.checkpoint.max_to_keep,
    config.checkpoint.keep_best,
    asynchronous=True,
  )
  run_progress = RunProgress()
  if checkpoints.latest() is not None:
    state = checkpoints.restore(state, training.identity, skip_damaged)
    run_progress = checkpoints.run_progress()
    training.batches.seek(distributed.position_of_process(run_progress.place))
    print(f'resumed at step {int(state.step)} from {checkpoints.path}')
  step = int(state.step)
  # After the restore, so that a refused run does not overwrite the config.
  distributed.write_json(run.config_file, json.loads(config.to_json()))
  distributed.write_json(run.data_file, data_hashes)
  if gin and distributed.first():
    files.write_text(run.gin_file, gin)
  # Before the evaluation, which takes minutes, as opening may fail.
  trackers: list[Tracker] = []
  if distributed.first():
    trackers += open_trackers(run, step, config.to_dict())
  history = History(run.metrics())
  trackers.append(history)
  return TrainingLoop(
    steps=config.steps,
    step=step,
    first_step=step,
    state=state,
    train_step=training.train_step,
    mesh=training.layout.mesh,
    batches=training.batches,
    method=training.method,
    evaluator=training.evaluator,
    run=run,
    workdir=workdir,
    checkpoints=checkpoints,
    identity=training.identity,
    run_progress=run_progress,
    trackers=trackers,
    history=history,
    metrics=MetricsLogger(
      trackers,
      optimizers.make_schedule(config.optimizer, config.steps),
      config.router_collapse_threshold,
      sharding.process_shard(training.layout.mesh)[1],
    ),
    task_routing=training.task_routing,
  )


def build_train_step(
  config: ConfigDict,
  model: nn.Module,
  method: Built,
  optimizer: optax.GradientTransformation,
  reference: Callable | None = None,
) -> TrainStep:
  """The training step that a config describes, not jitted yet.

  Raises:
    ValueError: a router loss has an unknown name, or the batch cannot be
      split; raised before anything is compiled.
  """
  grad_accumulation.check(config.batch_size, config.gradient_accumulation_steps)
  return make_train_step(
    model,
    method,
    build_objective(config, reference),
    optimizer,
    dict(config.router_losses),
    config.gradient_accumulation_steps,
  )


def _build_optimizer(
  config: ConfigDict, method: Built, padded: Mapping[str, PaddedAxis]
) -> optax.GradientTransformation:
  optimizer = optimizers.make_optimizer(config.optimizer, config.steps, padded)
  return method.wrap_optimizer(optimizer, config.steps)


def _make_step(
  model: nn.Module,
  method: Built,
  padded: Mapping[str, PaddedAxis],
  reference: Callable | None,
  config: ConfigDict,
) -> TrainStep:
  optimizer = _build_optimizer(config, method, padded)
  return build_train_step(config, model, method, optimizer, reference)


def _build_collator(
  config: ConfigDict, tokenizer: Tokenizer, family: Any, shape: Any
) -> Collator:
  adapters = base_lib.adapter_map(family, shape, config)
  collator = make_model_collator(
    config.data, tokenizer, shape, config.seed, adapters
  )
  return make_collator(config, collator)


def _build_loader(
  config: ConfigDict,
  tokenizer: Tokenizer,
  data: TrainingData,
  share: tuple[int, int],
  shape: Any,
  collator: Collator,
) -> Loader:
  rows, seed = config.batch_size // share[1], config.seed
  return make_loader(
    data, tokenizer, config.data, rows, seed, share, shape, collator
  )


def _describe_data(config: ConfigDict, data: TrainingData) -> str:
  count = len(data.shares)
  return f'{count} dataset{"s" * (count != 1)} of {config.data.source}' + (
    ', packed' if config.data.packing else ''
  )


def _with_precomputed_reference(
  config: ConfigDict,
  data: TrainingData,
  collator: Collator,
  model: nn.Module,
  variables: dict[str, Any],
  identity: dict[str, Any],
  layout: Layout,
  workdir: str | None,
) -> TrainingData:
  """The data with the reference log-probabilities, if they are precomputed."""
  if (
    not OBJECTIVES[config.objective].needs_reference
    or config.preference.reference != reference_model.PRECOMPUTED
  ):
    return data
  log_p = reference_model.precompute_logps(
    workdir,
    data.preferences,
    collator,
    model,
    variables,
    identity,
    layout.mesh,
    config.evaluation.batch_size,
  )
  preferences = data.preferences.with_references(log_p)
  return preference_data(preferences, config.data, config.seed)


def _build_evaluator(
  config: ConfigDict,
  model: nn.Module,
  tokenizer: Tokenizer,
  data: TrainingData,
  layout: Layout,
  collator: Collator,
  reference: Callable | None,
) -> Evaluator:
  validation = validation_rows(config, data, collator)
  if config.evaluation.every_steps and not validation:
    raise ValueError(
      f'config.evaluation.every_steps={config.evaluation.every_steps}, but no '
      'row is held out to validate on; raise config.data.validation_fraction '
      "(seqio: give tasks with a split 'validation'), or set it to 0"
    )
  return Evaluator(
    model,
    tokenizer,
    scoring_lengths(config.data, model),
    config.evaluation.batch_size,
    validation=validation,
    collator=collator,
    objective=build_validation_objective(config, reference),
    prompts=training_prompts(config, data),
    mesh=layout.mesh,
  )


def _build_task_routing(
  config: ConfigDict,
  model: nn.Module,
  tokenizer: Tokenizer,
  data: TrainingData,
  layout: Layout,
) -> TaskRouting | None:
  adapter_map = model.adapter_map
  if not config.log.plots_every_steps or not has_router(adapter_map):
    return None
  tasks = data.held_out_by_dataset('')
  if len(tasks) < 2 or data.preferences is not None:
    return None
  collator = make_model_collator(
    config.data, tokenizer, model, config.seed, adapter_map
  )
  rows = {
    task: evenly_spaced(items, _ROUTED_ROWS)
    for task, items in sorted(tasks.items())
  }
  return TaskRouting(model, collator, rows, layout)

# SPDX-License-Identifier: Apache-2.0
"""python -m moepeft.train --config=configs/molora_t5.py --workdir=DIR

The one loop: pretraining, fine-tuning and adapters differ by config only.
What a researcher edits is `moepeft.training.step`.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from signal import SIGTERM

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

from moepeft import registries
from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints.manager import Checkpoints, card
from moepeft.checkpoints.run_progress import Course
from moepeft.config import check as config_check
from moepeft.config import command_line
from moepeft.core import distributed, host_memory, sharding, terminal
from moepeft.core import files as core_files
from moepeft.core.disk import tell_full_disk
from moepeft.core.progress import Progress
from moepeft.core.types import State
from moepeft.data import (
  fingerprint,
  load_tokenizer,
  make_loader,
  open_data,
  truncation_note,
)
from moepeft.data.batching.collators import make_model_collator, scoring_lengths
from moepeft.data.chat import template as chat_template
from moepeft.data.preference.tokenize import has_chat_template
from moepeft.data.readers.seqio_stream import SeqioStream
from moepeft.data.registry import preferences
from moepeft.data.tokenizers.tokenizer import check_vocab_size
from moepeft.evaluation.eval_sets import training_prompts, validation_rows
from moepeft.evaluation.evaluator import Evaluator
from moepeft.evaluation.summary import before_after_table
from moepeft.models import check_decodes, decoder_only
from moepeft.objectives import (
  OBJECTIVES,
  build_validation_objective,
  check_model,
  reference_model,
)
from moepeft.objectives import check_config as check_objective
from moepeft.objectives.batches import make_collator
from moepeft.runs import diagnosis, next_steps, plots, trackers
from moepeft.runs.directory import Workdir, open_workdir
from moepeft.runs.history import History
from moepeft.runs.resume import (
  check_same_data,
  check_unchanged,
  with_begun_date,
)
from moepeft.runs.run import Run
from moepeft.runs.trackers import Tracker, open_trackers
from moepeft.training import (
  grad_accumulation,
  memory_estimate,
  optimizers,
  setup,
  state_sharding,
)
from moepeft.training import summary as training_summary
from moepeft.training.metrics_logger import Report
from moepeft.training.signals import Signals, Stopped

# Tasks that the table at the end has at most; before_after.png has all.
_TABLE = 12

_WORKDIR = flags.DEFINE_string(
  'workdir',
  None,
  'Where the run keeps everything; a run that is there goes on. Default: '
  'workdirs/<name of the config>.',
)
_DRY_RUN = flags.DEFINE_bool(
  'dry_run', False, 'Build everything, do one step, write no file.'
)
_MAY_DIFFER = flags.DEFINE_list(
  'may_differ',
  [],
  'Keys, like data.path, in which a run that goes on may differ from before.',
)
_SKIP_DAMAGED = flags.DEFINE_bool(
  'skip_damaged',
  False,
  'Go on from the checkpoint before one that is damaged, which is moved to '
  '<workdir>/damaged.',
)
_DISTRIBUTED = flags.DEFINE_string(
  'distributed',
  None,
  "Join the other processes of a run: 'auto' on a cluster that JAX knows (TPU, "
  "SLURM, ...), else 'HOST:PORT,PROCESSES,NUMBER of this one'.",
)

_DISTRIBUTED_TIMEOUT = flags.DEFINE_integer(
  'distributed_timeout',
  300,
  'Seconds that processes wait for each other to come, and after which one '
  'that does not answer counts as lost.',
  lower_bound=distributed.SHORTEST,
  upper_bound=distributed.LONGEST,
)


def train(
  config: ConfigDict,
  workdir: str,
  dry_run: bool = False,
  may_differ: Sequence[str] = (),
  gin: str = '',
  skip_damaged: bool = False,
) -> dict:
  """Trains, evaluates and writes; returns the closing summary.

  Args:
    config: of `moepeft.config.defaults.default`.
    workdir: created if need be; a checkpoint in it is gone on from.
    dry_run: one step, no evaluation, no file.
    may_differ: keys in which the config may differ from that of the run that
      is gone on from; see `resume.check_unchanged`.
    gin: the gin files that the config is from as one, kept as config.gin.
    skip_damaged: goes on from the checkpoint before one that is damaged.

  Raises:
    ValueError: the config, the data or the work directory does not do.
  """
  config_check.check(config, registries.BY_KEY)
  # What can be refused is refused before anything is read.
  optimizers.make_optimizer(config.optimizer, config.steps)
  check_objective(config)
  grad_accumulation.check(config.batch_size, config.gradient_accumulation_steps)
  memory_estimate.check(config)
  trackers.specs(config.log.trackers)
  if dry_run:
    return _train(config, workdir, gin, {}, dry_run=True)
  # Of several processes the first alone holds the directory and writes to it,
  # checkpoints aside, which they write together.
  alone = open_workdir(workdir) if distributed.first() else None
  with (
    alone or contextlib.nullcontext(),
    tell_full_disk(workdir, Run(workdir).latest_step),
  ):
    run = Run(workdir)
    config = with_begun_date(run, config)
    check_unchanged(run, config, may_differ)
    read = fingerprint.data_hashes(config.data)
    check_same_data(run, read, may_differ)
    return _train(
      config, workdir, gin, read, alone=alone, skip_damaged=skip_damaged
    )


def _train(
  config: ConfigDict,
  workdir: str,
  gin: str,
  read: dict,
  alone: Workdir | None = None,
  dry_run: bool = False,
  skip_damaged: bool = False,
) -> dict:
  started = time.monotonic()

  # ---------------------------------------------------------------- data ---
  data = config.data
  spread = config.sharding
  layout = sharding.layout(spread.preset, spread.model, spread.rules)
  sharding.check_rows(layout.mesh, config.batch_size)
  share = sharding.share(layout.mesh)
  # First: the vocabulary is looked for in the same place.
  family, shape = base_lib.shape(config.model)
  check_decodes(shape)
  words = load_tokenizer(data.tokenizer, config.model.path)
  check_vocab_size(words, shape.vocab)
  check_model(config.objective, decoder_only(shape))
  # What a chat template writes as today's, also when the run goes on.
  config = chat_template.with_date(config, words)
  data = config.data
  before = base_lib.before(family, shape, config)
  own = make_model_collator(data, words, shape, config.seed, before)
  own = make_collator(config, own)
  found = open_data(data, config.seed, share, shape.vocab, own)
  for note in found.notes:
    terminal.show(note)

  # --------------------------------------------------------------- model ---
  base = base_lib.load(config.model)
  model, built = base_lib.module(base, config)
  if base.params is None and built.trainable == 'peft':
    raise ValueError(
      f'{built.method} would adapt random weights; set config.model.path to a '
      'base model'
    )
  if base.quantise and built.trainable == 'params':
    raise ValueError(
      f'config.model.quantize={base.quantise!r} keeps frozen weights, and '
      "full fine-tuning trains them; set it to '', or name another method"
    )
  variables = base_lib.initialise(base, model, config.seed)
  if config.model.adapter:
    variables = base_lib.with_adapter(
      variables, built, config.model.adapter, base
    )
  # What rewards are measured against, of objectives that have any.
  against = config.preference.reference
  reference, adapters, spec = None, {}, OBJECTIVES[config.objective]
  if spec.needs_reference:
    reference, adapters = reference_model.make_reference(
      against, model, built, base
    )
  begun = config.model.adapter
  if begun and spec.needs_reference and against == reference_model.BASE:
    print(
      'note: rewards are measured against the base without '
      f'config.model.adapter; set config.preference.reference to {begun!r} '
      'to measure against where training begins'
    )
  optimizer = optimizers.make_optimizer(config.optimizer, config.steps)
  trainable = variables.pop(built.trainable)
  state = State(
    step=jnp.int32(0),
    trainable=trainable,
    frozen=next(iter(variables.values())),
    # Shapes: `place` makes it on the devices, to each its share.
    opt=jax.eval_shape(optimizer.init, trainable),
    rng=jax.random.fold_in(jax.random.key(config.seed), 1),
    reference=adapters,
  )
  letters = base_lib.logical_axes(model, base)
  where = state_sharding.state_shardings(
    layout, state, letters, built.trainable
  )
  state = state_sharding.place(state, where, optimizer.init)
  described = card(base, built, config.seed)
  spread_out = state_sharding.describe(layout, state, letters, built.trainable)
  count = len(found.shares)
  more = {
    'devices': spread_out,
    'data': f'{count} dataset{"s" * (count != 1)} of {data.source}'
    + (', packed' if data.packing else ''),
  }
  training_summary.introduce(base, built, state, words, workdir, more)
  if not isinstance(found.train, SeqioStream):
    print(truncation_note(found.train, own), end='', flush=True)

  if spec.needs_reference and against == reference_model.PRECOMPUTED:
    # By the model as it begins, whatever step the run goes on from.
    log_p = reference_model.precomputed(
      None if dry_run else workdir,
      found.compared,
      own,
      model,
      built.variables(state),
      described,
      layout.mesh,
      config.evaluation.batch_size,
    )
    found = preferences(
      found.compared.with_references(log_p), data, config.seed
    )
  rows = config.batch_size // share[1]
  batches = make_loader(
    found, words, data, rows, config.seed, share, shape, own
  )

  # ------------------------------------------------------------- resume ---
  prompts = training_prompts(config, found.held_out, found.rows)
  validation = validation_rows(config, found, own)
  if config.evaluation.every_steps and not validation:
    raise ValueError(
      f'config.evaluation.every_steps={config.evaluation.every_steps}, but no '
      'row is held out to validate on; raise config.data.validation_fraction '
      '(seqio: give '
      "tasks with a split 'validation'), or set it to 0"
    )
  evaluator = Evaluator(
    model,
    words,
    scoring_lengths(data, model),
    config.evaluation.batch_size,
    validation=validation,
    collator=own,
    objective=build_validation_objective(config, reference),
    prompts=prompts,
    mesh=layout.mesh,
  )
  update = jax.jit(
    setup.build_train_step(config, model, built, optimizer, reference),
    donate_argnums=0,
    out_shardings=(where, layout.whole),
  )
  if dry_run:
    batch = sharding.shard_batch(layout.mesh, next(batches))
    state, aux = update(state, batch)
    print(f'dry run: one step, loss {float(aux["loss"]):.4f}; no file written')
    return {'loss': float(aux['loss'])}
  checkpoints = Checkpoints(
    workdir, config.checkpoint.max_to_keep, config.checkpoint.keep_best
  )
  course = Course()
  if checkpoints.latest() is not None:
    state = checkpoints.restore(state, described, skip_damaged)
    course = checkpoints.course()
    batches.seek(distributed.own(course.place))
    print(f'resumed at step {int(state.step)} from {checkpoints.path}')
  first = int(state.step)
  # Not before: a run that is refused must leave the other's config alone.
  run = Run(workdir)
  distributed.write_json(run.config_file, json.loads(config.to_json()))
  distributed.write_json(run.data_file, read)
  if gin and distributed.first():
    core_files.write_text(run.gin_file, gin)
  # Before the evaluation, which takes minutes: one of them may be refused.
  log, pictures = config.log, run.plots_dir
  written = []
  if distributed.first():
    written = open_trackers(run, first, config.to_dict())

  # --------------------------------------------------------- evaluation ---
  before = {}
  if config.evaluation.before and not first:
    print('evaluating before training', flush=True)
    before = evaluator(built.variables(state), 'before training', 0)
    distributed.write_json(run.before_file, before)
  elif config.evaluation.before and config.evaluation.after:
    # Not at the end, where damage to it would cost the summary.
    before = run.before()

  # --------------------------------------------------------------- loop ---
  history = History(run.metrics())
  drawn = log.plots and distributed.first()
  figures = plots.Figures(history, pictures, drawn)
  progress = Progress(config.steps, first)
  report = Report(
    progress,
    (*written, history),
    optimizers.make_schedule(config.optimizer, config.steps),
    config.router_collapse_threshold,
    share[1],
    history.last('validation_loss'),
  )
  report.began({} if first else before)
  done, leave, validated = first, False, None
  # What loading and evaluating took is of no use to a step.
  host_memory.give_back()
  held = host_memory.Bound()
  if done < config.steps:
    progress.phase('compiling the first step')
  with Signals() as signals:
    while done < config.steps and not course.exhausted(
      config.early_stopping_patience
    ):
      batch, validated = next(batches), None
      state, aux = update(state, sharding.shard_batch(layout.mesh, batch))
      done += 1
      report.add(done, batch, aux)
      if done == first + 1:
        # The first step was compiled in this time.
        jax.block_until_ready(state)
        progress.begin(done)
        held.begin()
        signals.listen()
      progress.step(done)
      held.check()
      if alone:
        alone.check()
      validate_now = _every(config.evaluation.every_steps, done)
      save = _every(config.checkpoint.every_steps, done) or done == config.steps
      log_now = validate_now or _every(log.every_steps, done)
      if log_now:
        report.tell()
      if validate_now:
        total = evaluator.validation_rows
        with progress.paused('validating', total) as count:
          validated = evaluator.validation(built.variables(state), count)
        report.validated(done, validated)
        course = course.judged(validated['validation_loss'], done)
        save |= config.checkpoint.keep_best and course.best_step == done
        save |= course.exhausted(config.early_stopping_patience)
      # Asked once: a signal that comes while saving is met after a step more.
      leave = distributed.agree(signals.received is not None, log_now)
      if save or leave:
        # Before it is saved: a broken state must not push out a good one.
        report.tell()
        with progress.paused('saving'):
          course = dataclasses.replace(
            course, place=distributed.places(batches.position())
          )
          if alone:
            alone.check()
          checkpoints.save(state, described, course)
      if log_now:
        with progress.paused('drawing'):
          figures.refresh()
      if leave:
        break
  progress.close()
  batches.close()
  if leave or not config.evaluation.after:
    figures.draw()
  if leave:
    _close(written)
    raise Stopped(signals.received or SIGTERM, done, checkpoints.path)
  if done < config.steps:
    print(
      f'stopped at step {done}: the validation loss was least, '
      f'{course.best:.4f}, at step {course.best_step} '
      f'(config.early_stopping_patience={config.early_stopping_patience})'
    )

  # ------------------------------------------------------------ summary ---
  summary = {'method': built.method, 'semantics': built.semantics}
  changes: list[str] = []
  if config.evaluation.after:
    print('evaluating after training', flush=True)
    after = evaluator(
      built.variables(state), 'after training', int(state.step), validated
    )
    if alone:
      # Evaluating takes minutes.
      alone.check()
    distributed.write_json(run.after_file, after)
    if report.concluded(done, after):
      figures.draw()
    if 0 < len(after['rows']) <= _TABLE:
      print(before_after_table(before.get('rows', []), after['rows']))
    summary |= {'before': before, 'after': after}
    changes = diagnosis.changes(before, after)
    if drawn:
      plots.draw_before_after(before, after, pictures)
  _close(written)
  summary['seconds'] = round(time.monotonic() - started, 1)
  distributed.write_json(run.summary_file, summary)
  chat = data.source in ('chat', 'preference') and (
    bool(data.chat_template) or has_chat_template(words)
  )
  prompt = next((e.inputs for p in prompts for e in p.examples), '')
  next_steps.print_next_steps(
    summary,
    changes,
    diagnosis.findings(pathlib.Path(workdir)),
    {
      'losses': run.metrics_file,
      'plots': pictures if log.plots else None,
      'curves': trackers.view_commands(log.trackers, workdir),
      'evaluation': run.after_file if config.evaluation.after else None,
      'checkpoints': run.checkpoints_dir,
      **next_steps.commands(workdir, config, built, chat, prompt),
    },
  )
  return summary


def _close(written: Sequence[Tracker]) -> None:
  for writer in written:
    writer.close()


def _every(steps: int, done: int) -> bool:
  return steps > 0 and done % steps == 0


def main(argv) -> None:
  del argv
  workdir = _WORKDIR.value
  if workdir is None:
    flag = flags.FLAGS['config'].config_filename
    name = os.path.basename(flag.partition(':')[0]).removesuffix('.py')
    workdir = os.path.join('workdirs', name)
  workdir = os.path.expanduser(workdir)
  try:
    if _DISTRIBUTED.value:
      distributed.join(_DISTRIBUTED.value, _DISTRIBUTED_TIMEOUT.value)
    may_differ, gin = _MAY_DIFFER.value, command_line.gin_text()
    dry_run, skip_damaged = _DRY_RUN.value, _SKIP_DAMAGED.value
    with distributed.together(_DISTRIBUTED_TIMEOUT.value):
      train(_CONFIG.value, workdir, dry_run, may_differ, gin, skip_damaged)
  except Stopped as e:
    print(f'\n{e}', file=sys.stderr)
    sys.exit(e.code)
  except KeyboardInterrupt:
    print(
      f'\nstopped; the same command goes on from the latest checkpoint in '
      f'{workdir}/checkpoints, if there is one',
      file=sys.stderr,
    )
    sys.exit(130)


if __name__ == '__main__':
  _CONFIG = command_line.define_config('configs/molora_t5.py')
  command_line.run(main)

# SPDX-License-Identifier: Apache-2.0
"""python -m moepeft.train --config=configs/molora_t5.py --workdir=DIR

The one loop: pretraining, fine-tuning and adapters differ by config only.
Read from top to bottom; what a researcher edits is inside `make_update`.
"""

import functools
import json
import os
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from ml_collections import ConfigDict

from moepeft import base as base_lib
from moepeft import command, evaluate, metrics, optim, placement, sharding
from moepeft import config as config_lib
from moepeft.checkpoint import Checkpoints, card
from moepeft.data import batching, sources, vocabulary
from moepeft.moe import losses, stats
from moepeft.objectives import objective_of
from moepeft.objectives.seq2seq import split_rngs
from moepeft.runs import CONFIG, check_unchanged
from moepeft.typing import State

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


def make_update(model, built, config: ConfigDict, optimizer):
  """One step: (state, batch) -> (state, what was seen)."""
  objective = objective_of(config.objective)
  router_losses = dict(config.router_losses)
  # Wrong names are found before anything is compiled.
  losses.total({}, router_losses)

  def update(state: State, batch):
    rngs = split_rngs(jax.random.fold_in(state.rng, state.step))

    def loss_fn(trainable):
      variables = built.variables(state.replace(trainable=trainable))
      loss, aux = objective(model.apply, variables, batch, rngs)
      routed = losses.total(stats.by_site(aux['routing']), router_losses)
      return loss + routed, aux | {'loss': loss, 'router_loss': routed}

    gradient, aux = jax.grad(loss_fn, has_aux=True)(state.trainable)
    changes, opt = optimizer.update(gradient, state.opt, state.trainable)
    aux['gradient_norm'] = optax.global_norm(gradient)
    return state.replace(
      step=state.step + 1,
      trainable=optax.apply_updates(state.trainable, changes),
      opt=opt,
    ), aux

  return update


def train(
  config: ConfigDict,
  workdir: str,
  dry_run: bool = False,
  may_differ: Sequence[str] = (),
) -> dict:
  """Trains, evaluates and writes; returns the closing summary.

  Args:
    config: of `moepeft.config.default`.
    workdir: created if need be; a checkpoint in it is gone on from.
    dry_run: one step, no evaluation, no file.
    may_differ: keys in which the config may differ from that of the run that
      is gone on from; see `runs.check_unchanged`.

  Raises:
    ValueError: the config, the data or the work directory does not do.
  """
  started = time.monotonic()
  config_lib.check(config)
  if not dry_run:
    _open(workdir)
    check_unchanged(workdir, config, may_differ)

  # ---------------------------------------------------------------- data ---
  data = config.data
  words = vocabulary(data.vocabulary, config.model.path)
  source, validation, rows = sources(data, config.seed)
  batch_at = functools.partial(
    batching.batch_at,
    source,
    words,
    batch_size=config.batch_size,
    inputs_length=data.inputs_length,
    targets_length=data.targets_length,
  )

  # --------------------------------------------------------------- model ---
  base = base_lib.load(config.model)
  if words.size > base.config.vocab:
    raise ValueError(
      f'the vocabulary has {words.size} tokens, the model {base.config.vocab}; '
      'set config.data.vocabulary to the tokenizer of the model'
    )
  model, built = base_lib.module(base, config)
  if base.params is None and built.trainable == 'peft':
    raise ValueError(
      f'{built.method} would adapt random weights; set config.model.path to a '
      'base model'
    )
  variables = base_lib.initialise(base, model, config.seed)
  if config.model.adapter:
    variables = base_lib.with_adapter(
      variables, built, config.model.adapter, base
    )
  spread = config.sharding
  layout = sharding.layout(spread.preset, spread.model, spread.rules)
  optimizer = optim.optimizer(config.optimizer, config.steps)
  trainable = variables.pop(built.trainable)
  state = State(
    step=jnp.int32(0),
    trainable=trainable,
    frozen=next(iter(variables.values())),
    # Shapes: `place` makes it on the devices, to each its share.
    opt=jax.eval_shape(optimizer.init, trainable),
    rng=jax.random.fold_in(jax.random.key(config.seed), 1),
  )
  letters = base_lib.letters(model)
  where = placement.state_shardings(layout, state, letters, built.trainable)
  print(placement.describe(layout, state, letters, built.trainable))
  state = placement.place(state, where, optimizer.init)
  described = card(base, built, config.seed, config.model.family)
  metrics.introduce(base, built, state, words, workdir)
  _warn_of_cuts(source, words, data)

  # ------------------------------------------------------------- resume ---
  sets = evaluate.examples(config, validation, rows)
  judge = evaluate.Judge(config, model, words, validation, sets, layout.mesh)
  update = jax.jit(
    make_update(model, built, config, optimizer),
    donate_argnums=0,
    out_shardings=(where, layout.whole),
  )
  if dry_run:
    state, aux = update(state, sharding.shard_batch(layout.mesh, batch_at(0)))
    print(f'dry run: one step, loss {float(aux["loss"]):.4f}; no file written')
    return {'loss': float(aux['loss'])}
  checkpoints = Checkpoints(workdir, config.checkpoint.keep)
  if checkpoints.latest() is not None:
    state = checkpoints.restore(state, described)
    print(f'resumed at step {int(state.step)} from {checkpoints.path}')
  first = int(state.step)
  # Not before: a run that is refused must leave the other's config alone.
  _write_json(os.path.join(workdir, CONFIG), json.loads(config.to_json()))

  # --------------------------------------------------------- evaluation ---
  before_path = os.path.join(workdir, 'before.json')
  if config.evaluation.before and not first:
    print('evaluating before training', flush=True)
    _write_json(
      before_path, judge(built.variables(state), 'before training', 0)
    )

  # --------------------------------------------------------------- loop ---
  written = metrics.Rows(workdir, step=first)
  progress = metrics.Progress(config.steps, first)
  if first < config.steps:
    progress.say('compiling the first step')
  rate = optim.schedule(config.optimizer, config.steps)
  pending, alarmed = [], set()
  for step in range(first, config.steps):
    batch = batch_at(step)
    tokens = int(batch['inputs_mask'].sum() + batch['targets_mask'].sum())
    state, aux = update(state, sharding.shard_batch(layout.mesh, batch))
    pending.append((step + 1, tokens, aux))
    if step == first:
      # The first step was compiled in this time.
      jax.block_until_ready(state)
      progress.begin(step + 1)
    done = step + 1
    save = done % config.checkpoint.every_steps == 0 or done == config.steps
    if save or done % config.log.every_steps == 0:
      # Before a checkpoint too: a broken state must not push out a good one.
      _report(pending, progress, written, rate, config, alarmed)
      pending = []
    if save:
      checkpoints.save(state, described)
  progress.close()

  # ------------------------------------------------------------ summary ---
  plot = os.path.join(workdir, 'plots', 'loss.png')
  metrics.plot_loss(metrics.read(written.path), plot)
  summary = {'method': built.method, 'semantics': built.semantics}
  after_path = os.path.join(workdir, 'after.json')
  if config.evaluation.after:
    print('evaluating after training', flush=True)
    after = judge(built.variables(state), 'after training', int(state.step))
    _write_json(after_path, after)
    before = _read_json(before_path) if config.evaluation.before else {}
    print(evaluate.table(before.get('rows', []), after['rows']))
    summary |= {'before': before, 'after': after}
  summary['seconds'] = round(time.monotonic() - started, 1)
  _write_json(os.path.join(workdir, 'summary.json'), summary)
  metrics.conclude(
    summary,
    {
      'losses': written.path,
      'plot': plot,
      'evaluation': after_path if config.evaluation.after else None,
      'checkpoints': os.path.join(workdir, 'checkpoints'),
      'to export': f'python -m moepeft.convert --workdir={workdir} '
      '--output=DIR',
    },
  )
  return summary


def _open(workdir: str) -> None:
  """Makes the work directory and sees that it can be written to."""
  try:
    os.makedirs(workdir, exist_ok=True)
    open(os.path.join(workdir, 'metrics.jsonl'), 'a').close()
  except OSError as e:
    raise ValueError(
      f'cannot write to the work directory {workdir!r} ({e.strerror}); name '
      'another with --workdir'
    ) from None


def _warn_of_cuts(source, words, data, rows: int = 500) -> None:
  """Says how many of the first training examples are too long."""
  lengths = data.inputs_length, data.targets_length
  cut = sum(batching.encode(words, source(i), *lengths)[2] for i in range(rows))
  if cut:
    print(
      f'{cut} of the first {rows} training examples are cut; raise '
      'config.data.inputs_length or config.data.targets_length to keep them '
      'whole',
      flush=True,
    )


def _report(pending, progress, written, rate, config, alarmed) -> None:
  """Brings the last steps' figures from the device; rows, bar, alarms."""
  seen = jax.device_get(pending)
  for step, _, aux in seen:
    if not np.isfinite(aux['loss']):
      raise ValueError(
        f'the loss is {aux["loss"]} at step {step}; try a lower '
        'config.optimizer.learning_rate, or config.optimizer.clip=1.0'
      )
  step, _, last = seen[-1]
  examples = len(seen) * config.batch_size
  tokens = sum(real for _, real, _ in seen)
  rates = progress.update(step, float(last['loss']), examples, tokens)
  sites = metrics.routing(last['routing'])
  for number, _, aux in seen:
    row = {
      'step': number,
      'loss': float(aux['loss']),
      'token_accuracy': float(aux['correct'] / aux['tokens']),
      'router_loss': float(aux['router_loss']),
      'gradient_norm': float(aux['gradient_norm']),
      'learning_rate': float(rate(number - 1)),
    }
    written.write(row | (rates | {'routing': sites} if number == step else {}))
  for line in metrics.alarms(sites, config.router_alarm):
    place = line.split(': expert')[0]
    if place not in alarmed:
      alarmed.add(place)
      progress.say(line)


def _write_json(path: str, value: dict) -> None:
  temporary = f'{path}.tmp'
  with open(temporary, 'w') as f:
    json.dump(value, f, indent=2)
  os.replace(temporary, path)


def _read_json(path: str) -> dict:
  if not os.path.exists(path):
    return {}
  with open(path) as f:
    return json.load(f)


def main(argv) -> None:
  del argv
  workdir = _WORKDIR.value
  if workdir is None:
    flag = flags.FLAGS['config'].config_filename
    name = os.path.basename(flag.partition(':')[0]).removesuffix('.py')
    workdir = os.path.join('workdirs', name)
  workdir = os.path.expanduser(workdir)
  try:
    train(_CONFIG.value, workdir, _DRY_RUN.value, _MAY_DIFFER.value)
  except KeyboardInterrupt:
    print(
      f'\nstopped; the same command goes on from the latest checkpoint in '
      f'{workdir}/checkpoints (one every config.checkpoint.every_steps='
      f'{_CONFIG.value.checkpoint.every_steps})',
      file=sys.stderr,
    )
    sys.exit(130)


if __name__ == '__main__':
  _CONFIG = command.define_config('configs/molora_t5.py')
  command.run(main)

# SPDX-License-Identifier: Apache-2.0
"""python -m moepeft.routing RUN --output=DIR: shows what the experts learned.

The command routes the run's held-out rows, or those of --data, and writes
DIR/index.html, which needs no network, and plots as PNG files. --merge=RANK
writes DIR/lora, one LoRA in place of the mixture, and --prune=EXPERTS
DIR/pruned, the mixture with fewer experts. --split=EXPERTS is for a run of one
LoRA: it writes DIR/mixture, which can be trained further. Each is written with
its loss.
"""

import os
from collections.abc import Sequence
from typing import Any

from absl import flags
from flax import traverse_util

from moepeft.checkpoints import adapter as adapter_lib
from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints import run_metadata
from moepeft.config import command_line
from moepeft.core.progress import Pass
from moepeft.core.types import Tree
from moepeft.data.batching.collators import (
  Collator,
  make_model_collator,
  scoring_lengths,
)
from moepeft.evaluation.loglikelihood import Likelihood
from moepeft.evaluation.routing import page, plots, rows
from moepeft.evaluation.routing.collect import check_has_router, collect
from moepeft.evaluation.routing.reduce import (
  DerivedAdapter,
  merge_to_lora,
  prune,
)
from moepeft.evaluation.routing.similarity import similarities
from moepeft.evaluation.routing.site_routing import CollectedRouting
from moepeft.evaluation.routing.split import split_lora
from moepeft.inference.loaded_model import LoadedModel, load_run
from moepeft.runs.history import History
from moepeft.runs.run import Run


def collect_run(
  run: LoadedModel,
  data: str = '',
  max_examples: int = 64,
  texts: int = 3,
  batch_size: int | None = None,
) -> CollectedRouting:
  """Collects the routing of a run's held-out rows, or of a file's.

  Args:
    data: a file or directory of JSON lines; '' for the held-out rows.
    max_examples: rows of each task at most.
    texts: rows of each task whose tokens are shown.
    batch_size: rows of a batch; by default the run's
      config.evaluation.batch_size.

  Raises:
    ValueError: the run has no router, or there are no rows.
  """
  return collect_rows(
    run, read_rows(run, data, max_examples), texts, batch_size
  )


def read_rows(
  run: LoadedModel, data: str = '', max_examples: int = 64
) -> list[rows.LabeledRow]:
  """The rows that `collect_run` routes; raises as it does."""
  check_has_router(run.model.adapter_map, run.method)
  return rows.read(run, _collator(run), data, max_examples)


def _collator(run: LoadedModel) -> Collator:
  config, model = run.config, run.model
  return make_model_collator(
    config.data, run.tokenizer, model, config.seed, model.adapter_map
  )


def collect_rows(
  run: LoadedModel,
  routed: Sequence[rows.LabeledRow],
  texts: int = 3,
  batch_size: int | None = None,
) -> CollectedRouting:
  """Collects the routing of rows; see `collect_run`."""
  places: dict[str, int] = {}
  shown = []
  for i, row in enumerate(routed):
    places[row.task] = places.get(row.task, 0) + 1
    if places[row.task] <= texts:
      shown.append(i)
  progress = Pass(len(routed), 'routing')
  try:
    return collect(
      run.model,
      run.variables,
      _collator(run),
      routed,
      batch_size or run.config.evaluation.batch_size,
      shown,
      progress,
    )
  finally:
    progress.close()


def write(
  run: LoadedModel, routing: CollectedRouting, folder: str, data: str = ''
) -> list[str]:
  """Writes the page and the plots; returns their paths, the page's first.

  Args:
    data: as for `collect_run`.
  """
  os.makedirs(folder, exist_ok=True)
  history = History(Run(run.workdir).metrics())
  facts = {
    'path': run.workdir,
    'method': run.method,
    'base': run.base,
    'step': run.step,
    'data': data,
  }
  index = os.path.join(folder, 'index.html')
  peft = run.variables['peft']
  similarity = similarities(
    run.model, peft, [site.path for site in routing.sites]
  )
  page.write(index, facts, routing, similarity, history, run.tokenizer)
  return [index, *plots.draw(routing, similarity, history, folder)]


def save_derived(
  run: LoadedModel,
  derived: DerivedAdapter,
  path: str,
  routed: Sequence[rows.LabeledRow],
  overwrite: bool = False,
) -> tuple[float, float]:
  """Writes an adapter; returns the loss of the run on rows, and the adapter's.

  Losses are in nats a target token. Arrays that the adapter lacks, such as a
  new router's, are initialized by the run's seed.

  Args:
    overwrite: whether to replace a directory that has files.
  """
  config = run.config.copy_and_resolve_references()
  base = base_lib.load(config.model)
  losses = [_loss(run, run.model, run.variables, routed)]
  config.method = derived.method
  model, built = base_lib.module(base, config)
  initial, arrays = (
    traverse_util.flatten_dict(tree, sep='/')
    for tree in (
      base_lib.initialise(base, model, config.seed)['peft'],
      derived.peft,
    )
  )
  if unknown := arrays.keys() - initial.keys():
    # The module would ignore them, and the adapter be the initial one there.
    raise ValueError(f'{derived.method} has no arrays {sorted(unknown)}')
  peft = traverse_util.unflatten_dict(initial | arrays, sep='/')
  losses.append(_loss(run, model, {**run.variables, 'peft': peft}, routed))
  metadata = run_metadata.describe_adapter(base, built)
  adapter_lib.save(path, peft, metadata, overwrite)
  return tuple(losses)


def _loss(
  run: LoadedModel,
  model: Any,
  variables: Tree,
  routed: Sequence[rows.LabeledRow],
) -> float:
  lengths = scoring_lengths(run.config.data, model)
  batch_size = run.config.evaluation.batch_size
  likelihood = Likelihood(model, run.tokenizer, *lengths, batch_size)
  nll, tokens = likelihood.sums(variables, [row.item for row in routed])
  return float(nll.sum() / tokens.sum())


def _reduce(
  run: LoadedModel, routing: CollectedRouting, routed, output
) -> None:
  """Writes what --merge and --prune ask for, and prints the errors."""
  adapter_map, peft = run.model.adapter_map, run.variables['peft']
  if _MERGE.value:
    reduced = merge_to_lora(
      adapter_map, peft, routing, _MERGE.value, _TASK.value
    )
    task_rows = [row for row in routed if _TASK.value in ('', row.task)]
    _save_and_print(run, reduced, os.path.join(output, 'lora'), task_rows)
    worst, site = max(
      (float(lost.max()), site) for site, lost in reduced.left_out.items()
    )
    print(
      f'rank {_MERGE.value} leaves out {worst:.1%} of a change at most: {site}'
    )
  if _PRUNE.value:
    base = base_lib.load(run.config.model)
    axes = base_lib.logical_axes(run.model, base)['peft']
    reduced = prune(run.method, adapter_map, peft, axes, routing, _PRUNE.value)
    _save_and_print(run, reduced, os.path.join(output, 'pruned'), routed)


def _save_and_print(run, derived: DerivedAdapter, path: str, routed) -> None:
  before, after = save_derived(run, derived, path, routed, overwrite=True)
  print(
    f'wrote {path}; its loss on {len(routed):,} rows is {after:.4f} nats a '
    f"token, the run's {before:.4f}"
  )


def _split(run: LoadedModel, routed, output: str) -> None:
  derived = split_lora(
    run.model.adapter_map, run.variables['peft'], _SPLIT.value, _ROUTER.value
  )
  path = os.path.join(output, 'mixture')
  _save_and_print(run, derived, path, routed)
  print(
    f'train it by --config.model.adapter={path} '
    f'--config.method="{derived.method}"'
  )


def main(argv) -> None:
  if len(argv) != 2:
    raise ValueError(
      'name one run, the work directory of moepeft.train: python -m '
      'moepeft.routing RUN --output=DIR'
    )
  if _TASK.value and not _MERGE.value:
    raise ValueError('--task names the tokens that --merge averages; give both')
  if _SPLIT.value and (_MERGE.value or _PRUNE.value):
    raise ValueError('--split is for a LoRA, --merge and --prune for mixtures')
  if _ROUTER.present and not _SPLIT.value:
    raise ValueError('--router is the router of --split=EXPERTS; give both')
  if _SPLIT.value and _TEXTS.present:
    raise ValueError('--split writes no page, which --texts is for; drop it')
  if not _OUTPUT.value:
    raise ValueError('--output is missing: name a directory for the page')
  output = os.path.expanduser(_OUTPUT.value)
  data = os.path.expanduser(_DATA.value)
  run = load_run(os.path.expanduser(argv[1]), _CHECKPOINT.value)
  if _BATCH_SIZE.value:
    run.config.evaluation.batch_size = _BATCH_SIZE.value
  # Before the rows are routed, which takes longer.
  os.makedirs(output, exist_ok=True)
  if _SPLIT.value:
    _split(
      run, rows.read(run, _collator(run), data, _MAX_EXAMPLES.value), output
    )
    return
  routed = read_rows(run, data, _MAX_EXAMPLES.value)
  routing = collect_rows(run, routed, _TEXTS.value)
  dead = int(sum(site.dead.sum() for site in routing.sites))
  total = sum(sum(site.counts) for site in routing.sites)
  print(
    f'{routing.rows:,} rows, {len(routing.sites)} sites with a router; {dead} '
    f'of {total} experts are dead (at most 1 % of the even share)'
  )
  for path in write(run, routing, output, data):
    print(f'wrote {path}')
  _reduce(run, routing, routed, output)


if __name__ == '__main__':
  _OUTPUT = flags.DEFINE_string(
    'output', None, 'A directory for index.html and the plots.'
  )
  _DATA = flags.DEFINE_string(
    'data',
    '',
    'Rows to route: JSON lines with inputs and targets, or conversations, and '
    "optionally 'language'; by default the run's held-out rows.",
  )
  _CHECKPOINT = flags.DEFINE_string(
    'checkpoint', '', "Its step, or 'best'; by default the latest."
  )
  _MAX_EXAMPLES = flags.DEFINE_integer(
    'max_examples',
    64,
    'Rows of a task at most.',
    lower_bound=1,
    upper_bound=1_000_000_000,
  )
  _TEXTS = flags.DEFINE_integer(
    'texts',
    3,
    'Rows of a task whose tokens are shown.',
    lower_bound=0,
    upper_bound=1_000,
  )
  _BATCH_SIZE = flags.DEFINE_integer(
    'batch_size',
    None,
    "Rows of a batch, as memory allows; by default the run's "
    'config.evaluation.batch_size.',
    lower_bound=1,
    upper_bound=1_048_576,
  )
  _MERGE = flags.DEFINE_integer(
    'merge',
    0,
    'The rank of one LoRA of the mean change, written to OUTPUT/lora; 0 for '
    'none.',
    lower_bound=0,
    upper_bound=65_536,
  )
  _TASK = flags.DEFINE_string(
    'task', '', 'The task whose tokens --merge averages; by default all tasks.'
  )
  _PRUNE = flags.DEFINE_integer(
    'prune',
    0,
    'The number of experts to keep, those of the largest shares at each site '
    'and layer, written to OUTPUT/pruned; 0 for none.',
    lower_bound=0,
    upper_bound=65_536,
  )
  _SPLIT = flags.DEFINE_integer(
    'split',
    0,
    'The number of experts of a mixture made out of the run of one LoRA, '
    'written to OUTPUT/mixture; 0 for none.',
    lower_bound=0,
    upper_bound=65_536,
  )
  _ROUTER = flags.DEFINE_string(
    'router',
    'softmax(kernel_init=zeros)',
    'The router of --split. By default all weights are even at first, and the '
    'mixture computes what the LoRA does.',
  )
  command_line.run(main, takes_arguments=True)

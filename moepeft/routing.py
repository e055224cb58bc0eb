# SPDX-License-Identifier: Apache-2.0
"""python -m moepeft.routing RUN --output=DIR: shows what the experts learned.

The command routes the run's held-out rows, or those of --data, and writes
DIR/index.html, which needs no network, and plots as PNG files.
"""

import os

from absl import flags

from moepeft.config import command_line
from moepeft.core.progress import Pass
from moepeft.data.batching.collators import make_model_collator
from moepeft.evaluation.routing import page, plots, rows
from moepeft.evaluation.routing.collect import (
  CollectedRouting,
  check_has_router,
  collect,
)
from moepeft.evaluation.routing.similarity import similarities
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
  config, adapter_map = run.config, run.model.adapter_map
  check_has_router(adapter_map, run.method)
  collator = make_model_collator(
    config.data, run.tokenizer, run.model, config.seed, adapter_map
  )
  routed = rows.read(run, collator, data, max_examples)
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
      collator,
      routed,
      batch_size or config.evaluation.batch_size,
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


def main(argv) -> None:
  if len(argv) != 2:
    raise ValueError(
      'name one run, the work directory of moepeft.train: python -m '
      'moepeft.routing RUN --output=DIR'
    )
  if not _OUTPUT.value:
    raise ValueError('--output is missing: name a directory for the page')
  output = os.path.expanduser(_OUTPUT.value)
  # Before the model is loaded, which takes longer.
  os.makedirs(output, exist_ok=True)
  data = os.path.expanduser(_DATA.value)
  run = load_run(os.path.expanduser(argv[1]), _CHECKPOINT.value)
  routing = collect_run(
    run, data, _MAX_EXAMPLES.value, _TEXTS.value, _BATCH_SIZE.value
  )
  dead = int(sum(site.dead.sum() for site in routing.sites))
  total = sum(sum(site.counts) for site in routing.sites)
  print(
    f'{routing.rows:,} rows, {len(routing.sites)} sites with a router; {dead} '
    f'of {total} experts are dead (below 1 % of the even share)'
  )
  for path in write(run, routing, output, data):
    print(f'wrote {path}')


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
  command_line.run(main, takes_arguments=True)

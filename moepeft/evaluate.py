# SPDX-License-Identifier: Apache-2.0
"""python -m moepeft.evaluate --workdir=DIR [--data=ROWS]: how good a run is.

Accuracy by rank classification as in the paper, likelihood, and measures of
generated texts; a row of each for every prompt, `moepeft.scoring.rows`.
"""

import collections
import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags

from moepeft import command, measures, scoring, sets
from moepeft import config as config_lib
from moepeft.answering import Answering
from moepeft.data import Sources, jsonl, sources
from moepeft.data.forms import Form, form, scored_lengths
from moepeft.judge import Judge, means, warnings
from moepeft.likelihood import Likelihood
from moepeft.progress import Pass
from moepeft.ranking import Ranker
from moepeft.runs import Run, load
from moepeft.scoring import About, Row, answers, text
from moepeft.scoring.rows import HELD_OUT
from moepeft.sets import Prompt

# Sets of prompts by the measure that is taken of them.
Work = dict[str, list[Prompt]]
# Names of data that rows of a run's own have in tables.
_RESERVED = (HELD_OUT, 'after')


def work_of(path: str, names: Sequence[str], most: int) -> Work:
  """What is measured of a file or directory of rows.

  Args:
    names: of `scoring.MEASURES`; none for accuracy where rows have choices
      and loss where they have none.
    most: examples of a prompt.

  Raises:
    ValueError: an unknown measure, no rows there, or accuracy is asked for
      and a row has no choices.
  """
  for name in names:
    if name not in scoring.MEASURES:
      raise ValueError(
        f'--measures names some of {", ".join(scoring.MEASURES)}; got {name!r}'
      )
  rows = jsonl.read(path, ranked='accuracy' in names)
  if names:
    found = sets.prompts(sets.EVALUATION, rows, most)
    return {name: found for name in scoring.MEASURES if name in names}
  work = {}
  for name, closed in (('accuracy', True), ('loss', False)):
    some = [row for row in rows if bool(row.choices) == closed]
    if some:
      work[name] = sets.prompts(sets.EVALUATION, some, most)
  return work


def own_work(run: Run, found: Sources) -> Work:
  """What is measured of a run's own held-out rows."""
  work = {'accuracy': sets.own_prompts(run.config, found)}
  most = run.config.evaluation.max_examples
  held_out = sets.examples_of(found.held_out)
  work['loss'] = sets.whole_tasks(held_out, most)
  return {name: prompts for name, prompts in work.items() if prompts}


def measure(run: Run, work: Work, about: About) -> list[Row]:
  """Rows of everything in `work`, with progress on stderr."""
  data, e = run.config.data, run.config.evaluation
  inputs_length, length = scored_lengths(data, run.model)
  common, size = (run.model, run.words, inputs_length), e.batch_size
  rows = []
  for name, prompts in work.items():
    total = sum(len(prompt.examples) for prompt in prompts)
    if name == 'accuracy':
      ranker = Ranker(*common, length, size)
      with _told(total, 'ranked') as done:
        rows += measures.accuracy(ranker, run.variables, prompts, about, done)
    elif name == 'loss':
      likelihood = Likelihood(*common, length, size)
      with _told(total, 'scored') as done:
        rows += measures.loss(likelihood, run.variables, prompts, about, done)
  texts = [name for name in measures.TEXTS if name in work]
  if texts:
    answering, prompts = Answering(*common, length, size), work[texts[0]]
    total = sum(len(prompt.examples) for prompt in prompts)
    with _told(total, 'answered') as done:
      rows += measures.texts(
        answering, run.variables, prompts, texts, about, done
      )
  return rows


@contextlib.contextmanager
def _told(total: int, what: str) -> Iterator[Callable[[int], None]]:
  shown = Pass(total, what)
  try:
    yield shown
  finally:
    shown.close()


def by_task(prompts: Sequence[Prompt], rows: Sequence[Row]) -> list[dict]:
  """Accuracies of tasks over all of their prompts' examples.

  Returns:
    As `Judge.accuracies`: group, task, templates, examples, cut, accuracy,
    chance.
  """
  groups = {(p.task, p.name): (p.group, p.task, p.templates) for p in prompts}
  tables = collections.defaultdict(list)
  for row in rows:
    if row.measure == 'accuracy':
      tables[groups[row.task, row.prompt]].append(row)
  found = []
  for (group, task, templates), own in tables.items():
    counts = [row.examples for row in own]
    found.append(
      {
        'group': group,
        'task': task,
        'templates': templates,
        'examples': sum(counts),
        'cut': sum(row.cut for row in own),
        'accuracy': float(np.average([r.value for r in own], weights=counts)),
        'chance': float(np.average([r.chance for r in own], weights=counts)),
      }
    )
  return found


def summary(run: Run, work: Work, rows: Sequence[Row]) -> dict[str, Any]:
  """What the rows come to: by task, by group, and the paper's measure."""
  tasks = by_task(work.get('accuracy', ()), rows)
  named, more = {row.measure for row in rows}, {}
  if 'loss' in named:
    losses = scoring.scores(rows, 'loss').items()
    more['perplexity'] = {k: float(np.exp(v.value)) for k, v in losses}
  if 'bleu' in named:
    more['bleu_signature'] = answers.bleu_signature()
  ranked = {(row.task, row.prompt) for row in rows if row.measure == 'accuracy'}
  lost = [p for p in work.get('accuracy', ()) if (p.task, p.name) not in ranked]
  if lost:
    more['not_ranked'] = [
      {'task': p.task, 'prompt': p.name, 'examples': len(p.examples)}
      for p in lost
    ]
  return more | {
    'when': 'the base alone'
    if run.method == 'none'
    else f'after {run.step} steps',
    'step': run.step,
    'rows': tasks,
    'means': means(tasks),
    'scores': {
      name: {
        key: vars(score) for key, score in scoring.scores(rows, name).items()
      }
      for name in dict.fromkeys(row.measure for row in rows)
    },
  }


def tell(found: dict[str, Any], rows: Sequence[Row]) -> None:
  """Prints the scores, and what of the rows is not what was asked for."""
  loss = found.get('validation_loss')
  said = '' if loss is None else f': validation loss {loss:.4f}'
  print(f'{found["when"]}{said}', flush=True)
  print(text.table(rows) or 'no held-out rows, nothing to judge by')
  lost = found.get('not_ranked', ())
  if lost:
    names = ', '.join(f'{p["task"]} {p["prompt"]!r}' for p in lost)
    print(
      f'{len(lost)} prompts have no accuracy: in all of their '
      f'{sum(p["examples"] for p in lost)} examples two choices are the same '
      f'to the model: {names}'
    )
  if 'bleu_signature' in found:
    print(f'bleu: {found["bleu_signature"]}')
  # A prompt's examples are the same ones in all of its measures.
  prompts = collections.defaultdict(list)
  for row in rows:
    prompts[row.task, row.prompt].append((row.examples, row.cut, row.left_out))
  most = [map(max, zip(*own, strict=True)) for own in prompts.values()]
  total, cut, alike = map(sum, zip(*most, strict=True)) if most else (0, 0, 0)
  for line in warnings(total, cut, alike, 'measured examples'):
    print(line)


def form_of(run: Run) -> Form:
  """The form of the batches that a run's model reads."""
  return form(run.config.data, run.words, run.model, run.config.seed)


def validation_loss(run: Run, found: Sources) -> dict[str, float]:
  """The loss that training reports, where rows are held out."""
  pairs = sets.pairs_to_judge(run.config, found, form_of(run))
  if not pairs:
    return {}
  judge = Judge(run.config, run.model, run.words, pairs, {})
  return {'validation_loss': judge.validation_loss(run.variables)}


def evaluate(
  workdir: str,
  checkpoint: str = '',
  data: str = '',
  names: Sequence[str] = (),
  most: int | None = None,
) -> tuple[dict[str, Any], list[Row]]:
  """(summary, rows) of a run on a file or directory of rows, or on its own.

  Args:
    checkpoint: see `runs.load`.
    data: '' for what the run holds out.
    names: see `work_of`.
    most: examples of a prompt; by default the config's.

  Raises:
    ValueError: no run or no rows there, or not of the form they should be.
  """
  run = load(os.path.expanduser(workdir), checkpoint)
  if most is not None:
    run.config.evaluation.max_examples = most
  config_lib.check(run.config)
  most, more = run.config.evaluation.max_examples, {}
  if data:
    work = work_of(data, names, most)
  else:
    own = form_of(run)
    vocab = run.model.config.vocab
    found = sources(run.config.data, run.config.seed, below=vocab, own=own)
    work = own_work(run, found)
    more = validation_loss(run, found)
  rows = measure(run, work, about(run, workdir, data))
  return summary(run, work, rows) | more, rows


def about(run: Run, workdir: str, data: str) -> About:
  """What the rows of one evaluation share."""
  return About(
    run=workdir,
    method=run.method,
    semantics=run.config.semantics,
    base=run.base,
    base_parameters=run.base_parameters,
    parameters=run.parameters,
    seed=run.config.seed,
    step=run.step,
    data=name_of(data) if data else HELD_OUT,
  )


def name_of(data: str) -> str:
  """'somewhere/cb.v2.jsonl.gz' -> 'cb.v2', '.' -> the directory's name.

  Raises:
    ValueError: the name is that of a run's own rows, or there is none.
  """
  name = os.path.basename(os.path.abspath(os.path.expanduser(data)))
  for end in ('.gz', '.jsonl'):
    name = name.removesuffix(end)
  if name in ('', *_RESERVED):
    raise ValueError(
      f'rows are told apart by the name of their file or directory, and '
      f"{name!r} is none or stands for a run's own rows; rename {data!r}"
    )
  return name


def output_of(output: str, folder: str, name: str) -> str:
  """Where the summary goes: `output`, by default a file `name` in `folder`.

  Raises:
    ValueError: it does not end in .json, or is in no directory.
  """
  path = os.path.expanduser(output or os.path.join(folder, name))
  if not path.endswith('.json'):
    raise ValueError(
      f'--output is a file that ends in .json, with the rows beside it as '
      f'.jsonl; got {output!r}'
    )
  # A work directory that is not there is told by what reads it.
  if output and not os.path.isdir(os.path.dirname(os.path.abspath(path))):
    raise ValueError(
      f'the directory of {path!r} does not exist; make it, or name another '
      'with --output'
    )
  return path


def write_summary(path: str, found: dict[str, Any]) -> None:
  """Writes it all or not at all."""
  part = f'{path}.{os.getpid()}.part'
  try:
    with open(part, 'w') as f:
      json.dump(found, f, indent=2)
      f.flush()
      os.fsync(f.fileno())
    os.replace(part, path)
  except BaseException:
    if os.path.exists(part):
      os.unlink(part)
    raise


def main(argv) -> None:
  del argv
  if not _WORKDIR.value:
    raise ValueError('--workdir is missing: name a run of moepeft.train')
  data = os.path.expanduser(_DATA.value or '')
  if _MEASURES.value and not data:
    raise ValueError(
      '--measures is of the rows of --data; of its own held-out rows a run '
      'has accuracy and loss'
    )
  # The base's rows must not take the place of the run's.
  name = 'base' if _CHECKPOINT.value == 'base' else 'evaluation'
  name = f'{name}_{name_of(data)}.json' if data else f'{name}.json'
  # Before minutes of evaluation.
  output = output_of(_OUTPUT.value or '', _WORKDIR.value, name)
  found, rows = evaluate(
    _WORKDIR.value,
    _CHECKPOINT.value,
    data,
    _MEASURES.value,
    _MAX_EXAMPLES.value,
  )
  tell(found, rows)
  write_summary(output, found)
  print(f'wrote {output}')
  if rows:
    path = os.path.splitext(output)[0] + '.jsonl'
    scoring.write(path, rows)
    print(f'wrote {path}')


if __name__ == '__main__':
  _WORKDIR = flags.DEFINE_string('workdir', None, 'A run of moepeft.train.')
  _CHECKPOINT = flags.DEFINE_string(
    'checkpoint',
    '',
    "Its step, 'best', or 'base' for the base alone; by default the latest.",
  )
  _DATA = flags.DEFINE_string(
    'data',
    None,
    'Rows to measure, in the form of moepeft/data/jsonl.py; by default the '
    "run's own held-out ones.",
  )
  _MEASURES = flags.DEFINE_list(
    'measures',
    [],
    f'Of the rows of --data: some of {", ".join(scoring.MEASURES)}. By default '
    'accuracy where rows have choices, loss where they have none.',
  )
  _MAX_EXAMPLES = flags.DEFINE_integer(
    'max_examples',
    None,
    "Examples of a prompt at most, the same in all of a task's prompts; by "
    "default the run's config.evaluation.max_examples.",
  )
  _OUTPUT = flags.DEFINE_string(
    'output',
    None,
    'Where the figures go, the rows beside them as .jsonl: by default '
    'evaluation.json in the work directory, with --data evaluation_<its '
    'name>.json, with --checkpoint=base base_<its name>.json.',
  )
  command.run(main)

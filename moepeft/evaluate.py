# SPDX-License-Identifier: Apache-2.0
"""python -m moepeft.evaluate --workdir=DIR [--data=ROWS]: evaluates a run.

The command reports accuracy by rank classification as in the paper, likelihood,
and metrics of generated texts, with a result for each prompt. For a run's
held-out rows, it also reports the validation metrics of training. Partial
results are in a file .part, from which the same command continues.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from moepeft import tasks
from moepeft.config import check as config_check
from moepeft.config import command_line
from moepeft.data import open_data
from moepeft.data.batching.collators import scoring_lengths
from moepeft.data.readers import jsonl_rows
from moepeft.evaluation import eval_sets, summary
from moepeft.evaluation import results as results_lib
from moepeft.evaluation.evaluator import Evaluator
from moepeft.evaluation.plan import (
  PartialResults,
  check_length,
  check_metrics,
  plan_from_rows,
  plan_from_run,
)
from moepeft.evaluation.results import (
  ACCURACY,
  HELD_OUT,
  EvalInfo,
  Result,
  metric_names,
)
from moepeft.evaluation.run_validation import make_run_collator, run_validation
from moepeft.inference.loaded_model import LoadedModel, load_run
from moepeft.runs.run import Run

# Names in tables that are reserved for a run's held-out rows.
_RESERVED = (HELD_OUT, 'after')


def evaluate(
  workdir: str,
  checkpoint: str = '',
  data: str = '',
  metrics: Sequence[str] = (),
  max_examples: int | None = None,
  inputs_length: int | None = None,
  targets_length: int | None = None,
  batch_size: int | None = None,
  part: str = '',
  loaded: LoadedModel | None = None,
) -> tuple[dict[str, Any], list[Result]]:
  """Evaluates a run on rows or its held-out rows: (summary, results).

  Args:
    workdir: the run; with `loaded` and `data`, the model's name in results.
    checkpoint: see `load_run`.
    data: a file or directory of rows; '' for the run's held-out rows.
    metrics: names of metrics; by default accuracy for rows with choices, loss
      for others.
    max_examples: the maximum number of examples per prompt.
    inputs_length, targets_length: maximum tokens of texts, including EOS.
    batch_size: rows of the longest batches. All numbers default to the run's
      config.
    part: a file for partial results, which are reused; '' for none.
    loaded: the model, if it is in memory already.

  Raises:
    ValueError: there is no run or there are no rows, or they are invalid.
  """
  check_metrics(metrics)
  if loaded is None:
    loaded = load_run(os.path.expanduser(workdir), checkpoint)
  changes = {
    'evaluation.max_examples': max_examples,
    'evaluation.batch_size': batch_size,
    'data.inputs_length': inputs_length,
    'data.targets_length': targets_length,
  }
  run = _with_config(loaded, changes)
  check_length(run, metrics)
  validation = {}
  if data:
    rows = jsonl_rows.read(data, ranked=ACCURACY in metrics)
    for note in rows.notes(data):
      print(note, file=sys.stderr)
    plan = plan_from_rows(rows, metrics, run.config.evaluation.max_examples)
  else:
    training_data = open_data(
      run.config.data,
      run.config.seed,
      vocab_size=run.model.config.vocab,
      collator=make_run_collator(loaded),
    )
    plan = plan_from_run(run, training_data, metrics)
    # For the digest: as many, whatever --max_examples is.
    rows = eval_sets.loss_rows(
      run.config, training_data, tasks.VALIDATION_EXAMPLES
    )
    # As in training, independent of `metrics`.
    validation = run_validation(
      loaded, training_data, os.path.expanduser(workdir)
    )
  sha = eval_sets.digest(eval_sets.examples_of(rows))
  info = eval_info(run, workdir, checkpoint, data, sha)
  partial = PartialResults(part, info)
  evaluator = Evaluator(
    run.model,
    run.tokenizer,
    scoring_lengths(run.config.data, run.model),
    run.config.evaluation.batch_size,
    eos_token_ids=run.eos_token_ids,
  )
  with contextlib.closing(partial):
    results = evaluator.measure(run.variables, plan, info, partial)
  ranked = plan.get(ACCURACY, ())
  return (
    summary.summarize(run.method, run.step, ranked, results) | validation,
    results,
  )


def _with_config(
  run: LoadedModel, changes: Mapping[str, int | None]
) -> LoadedModel:
  """Changes values of a run's config; None keeps a value."""
  config = run.config.copy_and_resolve_references()
  config.update_from_flattened_dict(
    {key: value for key, value in changes.items() if value is not None}
  )
  config_check.check_ranges(config)
  return dataclasses.replace(run, config=config)


def eval_info(
  run: LoadedModel, workdir: str, checkpoint: str, data: str, sha: str | None
) -> EvalInfo:
  """The fields that all results of an evaluation share."""
  return EvalInfo(
    run=workdir,
    method=run.method,
    semantics=run.config.semantics,
    base=run.base,
    base_parameters=run.base_parameters,
    parameters=run.parameters,
    seed=run.config.seed,
    step=run.step,
    data=name_of(data) if data else HELD_OUT,
    data_sha=sha,
    inputs_length=run.config.data.inputs_length,
    targets_length=run.config.data.targets_length,
    checkpoint=checkpoint or 'latest',
  )


def name_of(data: str) -> str:
  """'somewhere/cb.v2.jsonl.gz' -> 'cb.v2', '.' -> the directory's name.

  Raises:
    ValueError: the name is empty or reserved for a run's held-out rows.
  """
  name = os.path.basename(os.path.abspath(os.path.expanduser(data)))
  for end in ('.gz', '.jsonl'):
    name = name.removesuffix(end)
  if name in ('', *_RESERVED):
    raise ValueError(
      'the file or directory of --data names the results, but '
      f"{name!r} is empty or reserved for a run's own rows; rename {data!r}"
    )
  return name


def output_of(output: str | None, default: str) -> str:
  """The checked path of the summary.

  Raises:
    ValueError: it does not end in .json, or its directory does not exist.
  """
  path = os.path.expanduser(output or default)
  if not path.endswith('.json'):
    raise ValueError(
      f'--output is a file that ends in .json, with the rows beside it as '
      f'.jsonl; got {output!r}'
    )
  # Loading the run reports a missing work directory.
  if output and not os.path.isdir(os.path.dirname(os.path.abspath(path))):
    raise ValueError(
      f'the directory of {path!r} does not exist; make it, or name another '
      'with --output'
    )
  return path


def main(argv) -> None:
  del argv
  if not _WORKDIR.value:
    raise ValueError('--workdir is missing: name a run of moepeft.train')
  data = os.path.expanduser(_DATA.value or '')
  # Results of the base must not overwrite those of the run.
  of_base = _CHECKPOINT.value == 'base'
  default = Run(_WORKDIR.value).evaluation_file(data and name_of(data), of_base)
  # Checked before the evaluation, which takes minutes.
  output = output_of(_OUTPUT.value, default)
  rows_path = os.path.splitext(output)[0] + '.jsonl'
  entries, results = evaluate(
    _WORKDIR.value,
    _CHECKPOINT.value,
    data,
    _METRICS.value,
    _MAX_EXAMPLES.value,
    _INPUTS_LENGTH.value,
    _TARGETS_LENGTH.value,
    _BATCH_SIZE.value,
    f'{rows_path}.part',
  )
  summary.print_summary(entries, results)
  # Chats and texts have no rows, and a sweep takes the summary for the end.
  if results:
    results_lib.write(rows_path, results)
    print(f'wrote {rows_path}')
  summary.write(output, entries)
  print(f'wrote {output}')
  os.remove(f'{rows_path}.part')


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
    'Rows to measure, in the form of moepeft/data/readers/jsonl_rows.py; by '
    "default the run's own held-out ones.",
  )
  _METRICS = flags.DEFINE_list(
    'metrics',
    [],
    f'Some of {", ".join(metric_names())}. By default, of --data accuracy '
    "where rows have choices and loss where they have none; of the run's own "
    'rows both.',
  )
  _MAX_EXAMPLES = flags.DEFINE_integer(
    'max_examples',
    None,
    "Examples of a prompt at most, the same in all of a task's prompts; by "
    "default the run's config.evaluation.max_examples.",
    lower_bound=1,
    upper_bound=1_000_000_000,
  )
  _INPUTS_LENGTH = flags.DEFINE_integer(
    'inputs_length',
    None,
    "Tokens that inputs are cut to; by default the run's "
    'config.data.inputs_length.',
    lower_bound=2,
    upper_bound=1_048_576,
  )
  _TARGETS_LENGTH = flags.DEFINE_integer(
    'targets_length',
    None,
    'Tokens that targets, choices and generated answers are cut to; by '
    "default the run's config.data.targets_length.",
    lower_bound=2,
    upper_bound=1_048_576,
  )
  _BATCH_SIZE = flags.DEFINE_integer(
    'batch_size',
    None,
    'Rows of a batch of the longest inputs, as memory allows; by default the '
    "run's config.evaluation.batch_size.",
    lower_bound=1,
    upper_bound=1_048_576,
  )
  _OUTPUT = flags.DEFINE_string(
    'output',
    None,
    'Where the figures go, the rows beside them as .jsonl: by default '
    'evaluation.json in the work directory, with --data evaluation_<its '
    'name>.json, with --checkpoint=base base_<its name>.json.',
  )
  command_line.run(main)

# SPDX-License-Identifier: Apache-2.0
"""Evaluates a model on held-out rows, during training and afterwards."""

import collections
import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moepeft.core import sharding
from moepeft.core.progress import Pass
from moepeft.core.types import Tree
from moepeft.data.batching.collators import Collator
from moepeft.data.tokenizers.tokenizer import Tokenizer
from moepeft.evaluation import summary
from moepeft.evaluation.eval_sets import PromptExamples
from moepeft.evaluation.greedy_answers import BatchGenerator
from moepeft.evaluation.loglikelihood import Likelihood
from moepeft.evaluation.plan import EvalPlan, PartialResults
from moepeft.evaluation.rank_classification import (
  EncodedExample,
  NonFiniteScoreError,
  Ranker,
)
from moepeft.evaluation.results import (
  ACCURACY,
  LOSS,
  EvalInfo,
  Measurement,
  Result,
  majority,
  make_result,
  measurement,
)
from moepeft.metrics import METRICS
from moepeft.objectives import Objective
from moepeft.tasks import Example

Progress = Callable[[int], None]
# Examples that are evaluated before their results are saved. A kill loses at
# most these; smaller chunks would leave more batches half empty.
_CHUNK_EXAMPLES = 512


def _no_progress(count: int) -> None:
  del count


class Evaluator:
  """Computes the validation loss, accuracy, likelihood and text metrics.

  Programs are compiled at first use, one for each batch shape.
  """

  def __init__(
    self,
    model: Any,
    tokenizer: Tokenizer,
    lengths: tuple[int, int],
    batch_size: int,
    *,
    validation: Sequence = (),
    collator: Collator | None = None,
    objective: Objective | None = None,
    prompts: Sequence[PromptExamples] = (),
    eos_token_ids: Sequence[int] = (),
    mesh: Mesh | None = None,
  ):
    """
    Args:
      lengths: maximum tokens of the inputs and of the targets.
      batch_size: rows of the batches with the longest rows, rounded up to a
        multiple of the mesh's devices.
      validation: tokenized rows of the validation loss.
      collator, objective: of the validation loss; needed if there are rows.
      prompts: examples that `__call__` ranks. They are tokenized here, so that
        errors are raised before training starts.
      eos_token_ids: ids that end a generated answer; by default the
        tokenizer's EOS.
      mesh: the mesh of the variables; by default, of all devices.
    """
    self._mesh = sharding.make_mesh() if mesh is None else mesh
    self._batch_rows = sharding.round_up(self._mesh, batch_size)
    self._model_args = (model, tokenizer, *lengths, batch_size, self._mesh)
    self._eos_token_ids = eos_token_ids
    self._ranker = Ranker(*self._model_args)
    self._prompts = prompts
    self._encoded = self._ranker.prepare(_examples(prompts))
    self._batches = list(_make_batches(validation, self._batch_rows, collator))

    def objective_sums(variables, batch):
      batch = objective.prepare(model.apply, variables, batch)
      total, aux = objective(model.apply, variables, batch, None)
      loss = jnp.stack([total, aux['weight'].astype(total.dtype)])
      return {'loss': loss} | aux.get('metrics', {})

    self._objective_sums = jax.jit(objective_sums)

  def share_programs(self, evaluator: 'Evaluator') -> None:
    """Uses the compiled programs of another evaluator.

    Args:
      evaluator: of an equal model, with the same objective and mesh.
    """
    self._objective_sums = evaluator._objective_sums
    self._ranker.share_programs(evaluator._ranker)

  @functools.cached_property
  def _likelihood(self) -> Likelihood:
    return Likelihood(*self._model_args)

  @functools.cached_property
  def _generator(self) -> BatchGenerator:
    *args, _ = self._model_args
    return BatchGenerator(*args, self._eos_token_ids)

  # ------------------------------------------------------- while training ---

  def __call__(
    self,
    variables: Tree,
    when: str,
    step: int,
    validated: dict[str, float] | None = None,
  ) -> dict[str, Any]:
    """Prints and returns the validation loss and the accuracies.

    If a score is not finite, the accuracies are left out and a warning is
    printed, so that training goes on.

    Args:
      when: a label such as 'before training', for the printed line.
      validated: the result of `validation` for these variables, if it is
        known.
    """
    lines = []
    num_unrankable = sum(e.has_equal_choices for e in self._encoded)
    num_ranked = len(self._encoded) - num_unrankable
    validation_rows = 0 if validated else self.validation_rows
    evaluation: dict[str, Any] = {'when': when, 'step': step}
    with _progress(validation_rows + len(self._encoded), when) as progress:
      if self._batches:
        validated = validated or self.validation(variables, progress)
        evaluation |= validated
        lines += [
          f'{key.replace("_", " ")} {value:.4f}'
          for key, value in validated.items()
        ]
      try:
        measured = self.accuracy(
          variables, self._prompts, progress, self._encoded
        )
      except NonFiniteScoreError as e:
        measured = []
        lines.append(f'no accuracy: {e}')
    rows = summary.accuracy_rows(self._prompts, measured)
    means = summary.mean_accuracies(rows)
    if means:
      texts = (f'{name} {value:.3f}' for name, value in means.items())
      lines.append(f'accuracy {", ".join(texts)}')
    text = '; '.join(lines) or 'no held-out rows, nothing to judge by'
    print(f'{when}: {text}', flush=True)
    num_cut = sum(e.cut for e in self._encoded if not e.has_equal_choices)
    for line in summary.warnings(num_ranked, num_cut, num_unrankable):
      print(line, flush=True)
    return evaluation | {'rows': rows, 'means': means}

  @property
  def validation_rows(self) -> int:
    """The rows of all validation batches, padding rows included."""
    return self._batch_rows * len(self._batches)

  def validation(
    self, variables: Tree, progress: Progress = _no_progress
  ) -> dict[str, float]:
    """The objective's loss and metrics on the validation rows.

    Args:
      progress: called after each batch with its number of rows.

    Returns:
      {'validation_loss': ..., 'validation_margins': ...}; a metric without
      any rows is left out.
    """
    sums = collections.Counter()
    for batch in self._batches:
      batch = sharding.shard_whole_batch(self._mesh, batch)
      for key, pair in self._objective_sums(variables, batch).items():
        total, count = map(float, pair)
        sums[key, 'total'] += total
        sums[key, 'count'] += count
      progress(self._batch_rows)
    names = dict.fromkeys(key for key, _ in sums)
    return {
      f'validation_{key}': sums[key, 'total'] / sums[key, 'count']
      for key in names
      if sums[key, 'count']
    }

  # ------------------------------------------------------------ afterwards ---

  def measure(
    self,
    variables: Tree,
    plan: EvalPlan,
    info: EvalInfo,
    partial: PartialResults,
  ) -> list[Result]:
    """Evaluates a plan and returns its results, with progress on stderr.

    Args:
      partial: the results so far, which are not computed again. New results
        are added to it, some prompts at a time.

    Raises:
      ValueError: a metric's library is not installed, or a target is empty
        after a metric's normalization.
    """
    pairs = [(p, name) for name, prompts in plan.items() for p in prompts]
    num_done = sum(partial.get(*pair) is not None for pair in pairs)
    if num_done:
      print(f'{num_done} of {len(pairs)} rows are in {partial.path}; going on')
    results = []
    for names, prompts in _group_by_pass(plan):
      missing = [
        prompt
        for prompt in prompts
        if any(partial.get(prompt, name) is None for name in names)
      ]
      if missing:
        measure, verb = self._measure_fn(names, missing)
        with _progress(len(_examples(missing)), verb) as progress:
          for chunk in _chunks(missing):
            measured = measure(variables, chunk, progress)
            partial.add(make_result(info, m) for m in measured)
      stored = [partial.get(p, name) for p in prompts for name in names]
      # A prompt that cannot be ranked has no result.
      results += [result for result in stored if result is not None]
    return results

  def _measure_fn(
    self, names: tuple[str, ...], prompts: Sequence[PromptExamples]
  ) -> tuple[Callable[..., list[Measurement]], str]:
    """(the method that computes the metrics, the verb of its progress line)."""
    if names == (ACCURACY,):
      return self.accuracy, 'ranked'
    if names == (LOSS,):
      return self.loss, 'scored'
    check_text_metrics(names, prompts)
    return functools.partial(self.text_metrics, names), 'answered'

  def accuracy(
    self,
    variables: Tree,
    prompts: Sequence[PromptExamples],
    progress: Progress = _no_progress,
    encoded: Sequence[EncodedExample] | None = None,
  ) -> list[Measurement]:
    """Accuracy of each prompt by rank classification of its choices.

    Examples with two equal choices are left out, and so are prompts without
    any other example.

    Args:
      encoded: the prompts' examples from `Ranker.prepare`, if they are known.

    Raises:
      NonFiniteScoreError: a score is not finite.
    """
    if encoded is None:
      encoded = self._ranker.prepare(_examples(prompts))
    rankable = [e for e in encoded if not e.has_equal_choices]
    if len(rankable) < len(encoded):
      progress(len(encoded) - len(rankable))
    # All prompts in one call, so that fewer batches are not full.
    predicted = iter(self._ranker.predict(variables, rankable, progress))
    measured = []
    for prompt, prompt_encoded in _split_by_prompt(prompts, encoded):
      pairs = zip(prompt.examples, prompt_encoded, strict=True)
      pairs = [(e, ids) for e, ids in pairs if not ids.has_equal_choices]
      if not pairs:
        continue
      examples = [e for e, _ in pairs]
      measured.append(
        measurement(
          prompt.task,
          prompt.name,
          ACCURACY,
          idx=[e.idx for e in examples],
          each=[int(next(predicted) == e.label) for e in examples],
          chance=float(np.mean([1 / len(e.choices) for e in examples])),
          majority=majority([e.label for e in examples]),
          cut=sum(ids.cut for _, ids in pairs),
          left_out=len(prompt.examples) - len(pairs),
        )
      )
    return measured

  def loss(
    self,
    variables: Tree,
    prompts: Sequence[PromptExamples],
    progress: Progress = _no_progress,
  ) -> list[Measurement]:
    """-log p of each prompt's targets, in nats per token."""
    examples = _examples(prompts)
    nll, tokens = self._likelihood.sums(variables, examples, progress)
    cut = self._likelihood.cut(examples)
    scores = list(zip(nll, tokens, cut, strict=True))
    measured = []
    for prompt, prompt_scores in _split_by_prompt(prompts, scores):
      each, weights, prompt_cut = zip(*prompt_scores, strict=True)
      measured.append(
        measurement(
          prompt.task,
          prompt.name,
          LOSS,
          idx=[e.idx for e in prompt.examples],
          each=each,
          weights=weights,
          cut=int(np.sum(prompt_cut)),
        )
      )
    return measured

  def text_metrics(
    self,
    names: Sequence[str],
    variables: Tree,
    prompts: Sequence[PromptExamples],
    progress: Progress = _no_progress,
  ) -> list[Measurement]:
    """Text metrics of the greedy answers to each prompt's examples."""
    examples = _examples(prompts)
    answers = self._generator.answers(variables, examples, progress)
    cut = self._generator.cut(examples)
    outputs = list(zip(answers, cut, strict=True))
    measured = []
    for prompt, prompt_outputs in _split_by_prompt(prompts, outputs):
      predictions, prompt_cut = zip(*prompt_outputs, strict=True)
      targets = [e.targets for e in prompt.examples]
      for name in names:
        each, value = METRICS[name].evaluate(predictions, targets)
        measured.append(
          measurement(
            prompt.task,
            prompt.name,
            name,
            idx=[e.idx for e in prompt.examples],
            each=each,
            value=value,
            cut=int(np.sum(prompt_cut)),
          )
        )
    return measured


def check_text_metrics(
  names: Sequence[str], prompts: Sequence[PromptExamples] = ()
) -> None:
  """Checks, before minutes of generation, that metrics can be computed.

  Raises:
    ValueError: a metric's library is not installed, or a target is empty
      after a metric's normalization.
  """
  targets = [e.targets for e in _examples(prompts)]
  for name in names:
    METRICS[name].evaluate(['a'], ['a'])
    METRICS[name].check_targets(targets)


def _examples(prompts: Sequence[PromptExamples]) -> list[Example]:
  return [e for prompt in prompts for e in prompt.examples]


def _split_by_prompt(
  prompts: Sequence[PromptExamples], rows: Sequence
) -> Iterator[tuple[PromptExamples, Sequence]]:
  """Yields each prompt with its part of `rows`, one row per example."""
  start = 0
  for prompt in prompts:
    end = start + len(prompt.examples)
    yield prompt, rows[start:end]
    start = end


def _group_by_pass(
  plan: EvalPlan,
) -> list[tuple[tuple[str, ...], list[PromptExamples]]]:
  """(metrics, prompts) of each pass over the examples.

  Text metrics share a pass, so that answers are generated once.
  """
  text_metrics = tuple(name for name in plan if name in METRICS)
  single_metrics = [(name,) for name in plan if name not in METRICS]
  return [
    (names, plan[names[0]])
    for names in (*single_metrics, text_metrics)
    if names
  ]


def _chunks(
  prompts: Sequence[PromptExamples],
) -> Iterator[list[PromptExamples]]:
  """Splits prompts into chunks of at least `_CHUNK_EXAMPLES` examples."""
  chunk = []
  for prompt in prompts:
    chunk.append(prompt)
    if len(_examples(chunk)) >= _CHUNK_EXAMPLES:
      yield chunk
      chunk = []
  if chunk:
    yield chunk


def _make_batches(rows: Sequence, batch_size: int, collator: Collator | None):
  """Batches of `batch_size` rows; fully masked rows fill the last batch."""
  if not rows:
    return
  # Packed as in training: the sums are the same, with less padding.
  arrays = collator.rows(0, rows)
  count = len(next(iter(arrays.values())))
  for start in range(0, count, batch_size):
    indices = np.minimum(np.arange(start, start + batch_size), count - 1)
    batch = {key: array[indices] for key, array in arrays.items()}
    for key in batch:
      if key.endswith('_mask'):
        batch[key][count - start :] = False
    yield batch


@contextlib.contextmanager
def _progress(total: int, verb: str) -> Iterator[Progress]:
  progress = Pass(total, verb)
  try:
    yield progress
  finally:
    progress.close()

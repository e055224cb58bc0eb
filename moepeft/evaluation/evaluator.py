# SPDX-License-Identifier: Apache-2.0
"""Measures a model on held-out rows, while it trains and afterwards."""

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
# Examples that are measured together: a kill loses no more than these, and
# fewer would leave more batches half empty.
_PORTION = 512


def _no_progress(count: int) -> None:
  del count


class Evaluator:
  """Validation loss, accuracy, likelihood and text metrics of one model.

  Programs are compiled at first use, one for each shape of a batch.
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
      lengths: tokens that inputs and targets are cut to.
      batch_size: rows of the longest batches, rounded up to a multiple of the
        mesh's devices.
      validation: rows, as ids, that `validation` reads.
      collator, objective: of `validation`; both are needed where it has rows.
      prompts: what calling the evaluator ranks; encoded here, so that faults
        are found before a run begins.
      eos_token_ids: ids that end a generated answer; by default the
        tokenizer's.
      mesh: the one that the variables lie on; by default, all devices.
    """
    self._mesh = sharding.make_mesh() if mesh is None else mesh
    self._rows = sharding.round_up(self._mesh, batch_size)
    self._model_args = (model, tokenizer, *lengths, batch_size, self._mesh)
    self._eos_token_ids = eos_token_ids
    self._ranker = Ranker(*self._model_args)
    self._prompts = prompts
    self._encoded = self._ranker.prepare(_examples(prompts))
    self._batches = list(_batches(validation, self._rows, collator))

    def objective_sums(variables, batch):
      batch = objective.prepare(model.apply, variables, batch)
      total, aux = objective(model.apply, variables, batch, None)
      loss = jnp.stack([total, aux['weight'].astype(total.dtype)])
      return {'loss': loss} | aux.get('metrics', {})

    self._objective_sums = jax.jit(objective_sums)

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
    """Validation loss and accuracies, printed in a line and returned.

    Args:
      validated: the result of `validation` for these variables, if there is
        one.

    Where the weights are not finite there are no accuracies, and a line says
    so: hours of training are not lost for it.
    """
    lines = []
    num_unrankable = sum(ids.has_equal_choices for ids in self._encoded)
    ranked = len(self._encoded) - num_unrankable
    batches = 0 if validated else self.validation_rows
    evaluation: dict[str, Any] = {'when': when, 'step': step}
    with _progress(batches + len(self._encoded), when) as progress:
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
      shown = (f'{name} {value:.3f}' for name, value in means.items())
      lines.append(f'accuracy {", ".join(shown)}')
    text = '; '.join(lines) or 'no held-out rows, nothing to judge by'
    print(f'{when}: {text}', flush=True)
    cut = sum(ids.cut for ids in self._encoded if not ids.has_equal_choices)
    for line in summary.warnings(ranked, cut, num_unrankable):
      print(line, flush=True)
    return evaluation | {'rows': rows, 'means': means}

  @property
  def validation_rows(self) -> int:
    """Rows that `validation` reads, those that fill its last batch included."""
    return self._rows * len(self._batches)

  def validation(
    self, variables: Tree, progress: Progress = _no_progress
  ) -> dict[str, float]:
    """The objective's loss on the validation rows, and its metrics.

    Args:
      progress: called with the rows of each batch that is done.

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
      progress(self._rows)
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
    """All results of a plan, with progress on stderr.

    Args:
      partial: results that are there are not measured again; the others are
        added, some prompts at a time.

    Raises:
      ValueError: a metric's library is missing, or a metric sees nothing of a
        target.
    """
    pairs = [(p, name) for name, prompts in plan.items() for p in prompts]
    there = sum(partial.get(*pair) is not None for pair in pairs)
    if there:
      print(f'{there} of {len(pairs)} rows are in {partial.path}; going on')
    results = []
    for names, prompts in _passes(plan):
      missing = [
        prompt
        for prompt in prompts
        if any(partial.get(prompt, name) is None for name in names)
      ]
      if missing:
        measure, verb = self._measure_of(names, missing)
        with _progress(len(_examples(missing)), verb) as progress:
          for portion in _portions(missing):
            measured = measure(variables, portion, progress)
            partial.add(make_result(info, m) for m in measured)
      stored = [partial.get(p, name) for p in prompts for name in names]
      # A prompt that cannot be ranked has no result.
      results += [result for result in stored if result is not None]
    return results

  def _measure_of(
    self, names: tuple[str, ...], prompts: Sequence[PromptExamples]
  ) -> tuple[Callable[..., list[Measurement]], str]:
    """(the method that measures some metrics, its verb for progress)."""
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

    Examples with two equal choices are left out, and prompts of which none is
    left.

    Args:
      encoded: the prompts' examples from `Ranker.prepare`, if they are there.

    Raises:
      NonFiniteScoreError: a score is no finite number.
    """
    if encoded is None:
      encoded = self._ranker.prepare(_examples(prompts))
    rankable = [ids for ids in encoded if not ids.has_equal_choices]
    if len(rankable) < len(encoded):
      progress(len(encoded) - len(rankable))
    # All prompts at once: fewer batches that are not full.
    predicted = iter(self._ranker.predict(variables, rankable, progress))
    measured = []
    for prompt, rows in _by_prompt(prompts, encoded):
      pairs = zip(prompt.examples, rows, strict=True)
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
    """-log p of the targets of each prompt, in nats a token."""
    examples = _examples(prompts)
    nll, tokens = self._likelihood.sums(variables, examples, progress)
    cut = self._likelihood.cut(examples)
    scored = zip(nll, tokens, cut, strict=True)
    measured = []
    for prompt, rows in _by_prompt(prompts, list(scored)):
      each, weights, cuts = zip(*rows, strict=True)
      measured.append(
        measurement(
          prompt.task,
          prompt.name,
          LOSS,
          idx=[e.idx for e in prompt.examples],
          each=each,
          weights=weights,
          cut=int(np.sum(cuts)),
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
    """Metrics, by name, of the greedy answers to each prompt's examples."""
    examples = _examples(prompts)
    answers = self._generator.answers(variables, examples, progress)
    cut = self._generator.cut(examples)
    measured = []
    for prompt, rows in _by_prompt(
      prompts, list(zip(answers, cut, strict=True))
    ):
      predictions, cuts = zip(*rows, strict=True)
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
            cut=int(np.sum(cuts)),
          )
        )
    return measured


def check_text_metrics(
  names: Sequence[str], prompts: Sequence[PromptExamples] = ()
) -> None:
  """Checks, before minutes of generation, that metrics can be computed.

  Raises:
    ValueError: a metric's library is not installed, or a metric sees nothing
      of a target.
  """
  targets = [e.targets for e in _examples(prompts)]
  for name in names:
    METRICS[name].evaluate(['a'], ['a'])
    METRICS[name].check_targets(targets)


def _examples(prompts: Sequence[PromptExamples]) -> list[Example]:
  return [e for prompt in prompts for e in prompt.examples]


def _by_prompt(
  prompts: Sequence[PromptExamples], rows: Sequence
) -> Iterator[tuple[PromptExamples, Sequence]]:
  """Each prompt with the rows of its examples, which are in one list."""
  start = 0
  for prompt in prompts:
    end = start + len(prompt.examples)
    yield prompt, rows[start:end]
    start = end


def _passes(
  plan: EvalPlan,
) -> list[tuple[tuple[str, ...], list[PromptExamples]]]:
  """(metrics, their prompts), those of generated texts together."""
  texts = tuple(name for name in plan if name in METRICS)
  alone = [(name,) for name in plan if name not in METRICS]
  return [(names, plan[names[0]]) for names in (*alone, texts) if names]


def _portions(
  prompts: Sequence[PromptExamples],
) -> Iterator[list[PromptExamples]]:
  """Prompts in their order, as few together as have `_PORTION` examples."""
  portion = []
  for prompt in prompts:
    portion.append(prompt)
    if len(_examples(portion)) >= _PORTION:
      yield portion
      portion = []
  if portion:
    yield portion


def _batches(rows: Sequence, size: int, collator: Collator | None):
  """Batches of `size` rows, the last filled up with rows of no real token."""
  if not rows:
    return
  # Packed where training is: the same sums of fewer tokens.
  arrays = collator.rows(0, rows)
  count = len(next(iter(arrays.values())))
  for start in range(0, count, size):
    real = min(size, count - start)
    places = np.minimum(np.arange(start, start + size), count - 1)
    batch = {key: array[places] for key, array in arrays.items()}
    for key in batch:
      if key.endswith('_mask'):
        batch[key][real:] = False
    yield batch


@contextlib.contextmanager
def _progress(total: int, verb: str) -> Iterator[Progress]:
  shown = Pass(total, verb)
  try:
    yield shown
  finally:
    shown.close()

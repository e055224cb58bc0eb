# SPDX-License-Identifier: Apache-2.0
"""Rows of an evaluation: what a model does on prompts, measured."""

from collections.abc import Callable, Sequence

import numpy as np

from moepeft.core.types import Tree
from moepeft.evaluation import text_metrics
from moepeft.evaluation.eval_sets import Prompt
from moepeft.evaluation.greedy_answers import BatchGenerator
from moepeft.evaluation.loglikelihood import Likelihood
from moepeft.evaluation.rank_classification import Ranker
from moepeft.evaluation.scores import About, Row, majority, measured
from moepeft.tasks import Example

# Those of generated texts.
TEXTS = ('exact_match', 'rouge_l', 'bleu')
Progress = Callable[[int], None]


def accuracy(
  ranker: Ranker,
  variables: Tree,
  prompts: Sequence[Prompt],
  about: About,
  progress: Progress,
) -> list[Row]:
  """Rank classification of examples with choices, a row for each prompt.

  Examples with two choices alike are left out, and prompts of which none is
  left.
  """
  every = ranker.prepare(_flat(prompts))
  rankable = [ids for ids in every if not ids.alike]
  if len(rankable) < len(every):
    progress(len(every) - len(rankable))
  predicted = iter(ranker.predict(variables, rankable, progress))
  rows, at = [], 0
  for prompt in prompts:
    own = slice(at, at := at + len(prompt.examples))
    pairs = zip(prompt.examples, every[own], strict=True)
    kept = [(e, ids) for e, ids in pairs if not ids.alike]
    if not kept:
      continue
    examples = [e for e, _ in kept]
    rows.append(
      measured(
        about,
        prompt.task,
        prompt.name,
        'accuracy',
        idx=[e.idx for e in examples],
        each=[int(next(predicted) == e.label) for e in examples],
        chance=float(np.mean([1 / len(e.choices) for e in examples])),
        majority=majority([e.label for e in examples]),
        cut=sum(ids.cut for _, ids in kept),
        left_out=len(prompt.examples) - len(kept),
      )
    )
  return rows


def loss(
  likelihood: Likelihood,
  variables: Tree,
  prompts: Sequence[Prompt],
  about: About,
  progress: Progress,
) -> list[Row]:
  """-log p of targets in nats a token, a row for each prompt."""
  flat = _flat(prompts)
  nll, tokens = likelihood.sums(variables, flat, progress)
  cut = likelihood.cut(flat)
  rows, at = [], 0
  for prompt in prompts:
    own = slice(at, at := at + len(prompt.examples))
    rows.append(
      measured(
        about,
        prompt.task,
        prompt.name,
        'loss',
        idx=[e.idx for e in prompt.examples],
        each=nll[own],
        weights=tokens[own],
        cut=int(np.sum(cut[own])),
      )
    )
  return rows


def check(names: Sequence[str], prompts: Sequence[Prompt]) -> None:
  """Looks, before minutes of decoding, whether `texts` can measure.

  Raises:
    ValueError: a measure's library is not installed, or `rouge_l` sees nothing
      of a target.
  """
  for name in names:
    _figures(name, ['a'], ['a'])
  if 'rouge_l' in names:
    text_metrics.check_words([e.targets for e in _flat(prompts)])


def texts(
  generator: BatchGenerator,
  names: Sequence[str],
  prompts: Sequence[Prompt],
  about: About,
  progress: Progress,
) -> list[Row]:
  """Measures of greedy answers, a row for each prompt and name in `TEXTS`.

  Raises:
    ValueError: as `check`.
  """
  check(names, prompts)
  flat = _flat(prompts)
  said, cut = generator.answers(flat, progress), generator.cut(flat)
  rows, at = [], 0
  for prompt in prompts:
    own = slice(at, at := at + len(prompt.examples))
    meant = [e.targets for e in prompt.examples]
    for name in names:
      each, value = _figures(name, said[own], meant)
      rows.append(
        measured(
          about,
          prompt.task,
          prompt.name,
          name,
          idx=[e.idx for e in prompt.examples],
          each=each,
          value=value,
          cut=int(np.sum(cut[own])),
        )
      )
  return rows


def _figures(name: str, said: list[str], meant: list[str]):
  """(figures of each example or None, what they come to or None)."""
  if name == 'bleu':
    return None, text_metrics.bleu(said, meant)
  measure = {
    'exact_match': text_metrics.exact_match,
    'rouge_l': text_metrics.rouge_l,
  }
  return measure[name](said, meant), None


def _flat(prompts: Sequence[Prompt]) -> list[Example]:
  return [e for prompt in prompts for e in prompt.examples]

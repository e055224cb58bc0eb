# SPDX-License-Identifier: Apache-2.0
"""What the steps of a run come to: figures from the device, rows, alarms."""

import collections
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moepeft.core.progress import Progress
from moepeft.core.types import Batch
from moepeft.runs import diagnosis
from moepeft.runs.trackers import Tracker
from moepeft.training import summary as training_summary

# Alarms that are printed at once, and for how many logs in a row a router is
# collapsed before there is one.
_ALARMS, _IN_A_ROW = 5, 3


class Report:
  """Keeps what steps saw until it is told, so that steps do not wait."""

  def __init__(
    self,
    progress: Progress,
    trackers: Sequence[Tracker],
    rate: Callable[[int], Any],
    router_alarm: float,
    shares: int = 1,
    validated: int | None = None,
  ):
    """Args:
    rate: the schedule, step -> learning rate.
    shares: of a batch, of which this process reads one.
    validated: the last step that has a row of held-out figures.
    """
    self._validated = validated
    self._shares = shares
    self._progress, self._trackers, self._rate = progress, trackers, rate
    self._limit, self._alarmed = router_alarm, set()
    self._collapsed = collections.Counter()
    self._pending = []
    self._batch_sums = []

  def add(self, step: int, batch: Batch, aux: Mapping[str, Any]) -> None:
    """Takes a step's batch (on the host) and aux (on the device)."""
    if self._pending:
      # Only the last step's routing is told.
      self._pending[-1][1].pop('routing')
    self._pending.append((step, dict(aux)))
    self._batch_sums.append(_sums(batch))

  def tell(self) -> None:
    """Writes the rows of the steps since the last call; the bar, alarms.

    Raises:
      ValueError: a loss or a gradient's norm is not finite.
    """
    if not self._pending:
      return
    seen, self._pending = jax.device_get(self._pending), []
    sums, self._batch_sums = np.array(self._batch_sums), []
    # The steps up to a broken one show how it came to that.
    whole = list(itertools.takewhile(lambda one: not _broken(one[1]), seen))
    if whole:
      self._tell(whole, sums[: len(whole)])
    if len(whole) < len(seen):
      step, aux = seen[len(whole)]
      key = _broken(aux)
      raise ValueError(
        f'the {key.replace("_", " ")} is {aux[key]} at step {step}; try a '
        'lower rate (--config.optimizer.learning_rate with '
        '--may_differ=optimizer.learning_rate goes on from the latest '
        'checkpoint), or config.optimizer.max_grad_norm=1.0'
      )

  def _tell(self, seen: list, sums: np.ndarray) -> None:
    step, last = seen[-1]
    examples, real, inputs, targets = sums.sum(0)
    rates = self._progress.update(
      step,
      float(last['loss']),
      int(self._shares * examples),
      int(self._shares * real),
      figures(last),
    )
    rates |= {'inputs_padding': inputs, 'targets_padding': targets}
    for key in ('inputs_padding', 'targets_padding'):
      rates[key] = round(rates[key] / len(seen), 4)
    sites = training_summary.routing(last.get('routing', {}))
    for number, aux in seen:
      row = {
        'step': number,
        # What is minimised; then -log p of a target token, whatever that is.
        'loss': float(aux['loss']),
        # NaN of a batch without one, as of judged answers that are all bad.
        'nll': _ratio(aux['nll'], aux['tokens']),
        'token_accuracy': _ratio(aux['correct'], aux['tokens']),
        'router_loss': float(aux['router_loss']),
        'gradient_norm': float(aux['gradient_norm']),
        'learning_rate': float(self._rate(number - 1)),
      } | figures(aux)
      self._write(row | (rates | {'routing': sites} if number == step else {}))
    self._raise_alarms(diagnosis.collapsed(sites, self._limit))

  def _raise_alarms(self, lines: Mapping[str, str]) -> None:
    """Prints an alarm of each place once, after _IN_A_ROW logs in a row.

    Args:
      lines: from `curves.collapsed`, of this log.
    """
    self._collapsed = collections.Counter(
      {place: self._collapsed[place] + 1 for place in lines}
    )
    new = [
      place
      for place, count in self._collapsed.items()
      if count >= _IN_A_ROW and place not in self._alarmed
    ]
    self._alarmed.update(new)
    for place in new[:_ALARMS]:
      self._progress.say(f'router alarm: {place}: {lines[place]}')
    if len(new) > _ALARMS:
      self._progress.say(
        f'router alarm: {len(new) - _ALARMS} other layers are collapsed, too; '
        'plots/router_weight.png and router_tokens.png show all'
      )

  def _write(self, row: Mapping[str, Any]) -> None:
    for tracker in self._trackers:
      tracker.write(row)

  def began(self, found: Mapping[str, Any]) -> None:
    """Writes what `Evaluator` found before the first step, for the curves."""
    kept = {k: v for k, v in found.items() if k.startswith('validation_')}
    if kept:
      self._write({'step': 0, **kept})

  def concluded(self, step: int, evaluation: Mapping[str, Any]) -> bool:
    """Writes the held-out figures after the last step, for the curves.

    Args:
      evaluation: from `Evaluator`.

    Returns:
      Whether anything was written: a step is validated once.
    """
    figures = {
      k: v for k, v in evaluation.items() if k.startswith('validation_')
    }
    if not figures or step == self._validated:
      return False
    self._write({'step': step, **figures})
    return True

  def validated(self, step: int, found: Mapping[str, float]) -> None:
    """Writes and says what `Evaluator.validation` found."""
    self._write({'step': step, **found})
    self._validated = step
    said = (f'{k.replace("_", " ")} {v:.4f}' for k, v in found.items())
    self._progress.say(f'step {step}: {", ".join(said)}')


def figures(aux: Mapping[str, Any]) -> dict[str, float]:
  """What an objective tells beside its loss; NaN where there is nothing."""
  return {
    key: _ratio(total, count)
    for key, (total, count) in aux.get('metrics', {}).items()
  }


def _ratio(total: Any, count: Any) -> float:
  return float(total / count) if count else float('nan')


def _broken(aux: Mapping[str, Any]) -> str:
  """What of a step is not finite; '' where all is.

  The step after a broken gradient would tell by its loss, but this one may be
  saved.
  """
  broken = (k for k in ('loss', 'gradient_norm') if not np.isfinite(aux[k]))
  return next(broken, '')


def _sums(batch: Batch) -> tuple[float, float, float, float]:
  """Examples, tokens read, shares of padding in inputs and in targets."""
  # Of all sides, where answers are compared.
  inputs, targets = (
    np.stack([batch[key] for key in batch if key.endswith(which)])
    for which in ('inputs_mask', 'targets_mask')
  )
  found = (batch[key] for key in batch if key.endswith('inputs_segments'))
  segments = next(found, None)
  rows = inputs.shape[1]
  # A decoder's targets are its inputs, one on: they are counted once.
  apart = any(key.endswith('decoder_inputs') for key in batch)
  examples = rows if segments is None else segments.max(axis=1).sum()
  return (
    float(examples),
    float(inputs.sum() + (targets.sum() if apart else 0)),
    1 - float(inputs.mean()),
    1 - float(targets.mean()),
  )

# SPDX-License-Identifier: Apache-2.0
"""The registry entry of an objective, and an objective bound to settings.

A loss function is pure: (apply, variables, batch, rngs) -> (sum, aux). The
training step divides the sum by aux['weight'], which depends only on the data,
so that gradients of microbatches add up. aux['metrics'] has values to log,
{name: [sum, count]}.

`prepare_rows` and `prepare_batch` run before the gradient. `prepare_rows`
computes arrays for each row of a microbatch with the current policy, without
gradients. `prepare_batch` gets the whole batch; KTO computes its KL baseline in
it. PPO and GRPO would sample answers in `prepare_rows`, and compute advantages,
which need means over a prompt's rows, in `prepare_batch`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

from ml_collections import ConfigDict

from moepeft.core.types import Array, Batch, Tree

LossFn = Callable[..., tuple[Array, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Objective:
  """An objective bound to its settings, which a training step calls.

  Attributes:
    loss_fn: (apply, variables, rows, rngs) -> (sum, aux), for any rows of a
      batch.
    prepare_rows: (apply, variables, rows, rng) -> {name: array [rows, ...]},
      which the step adds to the rows before it takes the gradient; rng is
      None in validation. None for an objective that adds no arrays.
    prepare_batch: batch -> batch, called with the whole batch and the arrays
      of `prepare_rows`; `loss_fn` may get only a part of the rows.
  """

  loss_fn: LossFn
  prepare_rows: Callable[..., dict[str, Array]] | None = None
  prepare_batch: Callable[[Batch], Batch] = lambda batch: batch

  def __call__(
    self, apply: Callable, variables: Tree, rows: Batch, rngs: Any
  ) -> tuple[Array, dict[str, Any]]:
    return self.loss_fn(apply, variables, rows, rngs)

  def prepare(self, apply: Callable, variables: Tree, batch: Batch) -> Batch:
    """Returns the batch for `loss_fn` in validation, without dropout."""
    if self.prepare_rows is None:
      return batch
    return self.prepare_batch(
      batch | self.prepare_rows(apply, variables, batch, None)
    )


@dataclasses.dataclass(frozen=True)
class NoSettings:
  """The settings of an objective without config keys."""


@dataclasses.dataclass(frozen=True)
class ObjectiveSpec:
  """The registry entry of an objective: a loss function and its properties.

  Attributes:
    loss_fn: (apply, variables, batch, rngs, settings=...) -> (sum, aux); with
      `needs_reference` also reference=..., which is None if the batch has the
      reference's log-probabilities.
    settings: frozen dataclass; its fields are keys of the config's `section`.
    section: 'loss', 'preference', or a section that the user adds.
    batch: 'single' (rows of the model's collator), 'pair' (a chosen and a
      rejected answer) or 'judged' (one answer with a label, as in KTO).
    architecture: the architecture that it can train: 'encoder-decoder',
      'decoder' or 'any'.
    needs_reference: whether it compares the policy with a reference model.
    reference_output: what the reference gives for each target, its log p or
      the 'logits' of the whole vocabulary.
    validates_itself: whether validation uses the settings of the run. Otherwise
      it uses the defaults, so that the validation losses of runs with different
      settings are comparable.
    prepare_rows: as `Objective.prepare_rows`; with `needs_reference` it gets
      reference=... too.
    prepare_batch: as `Objective.prepare_batch`.
    collator: (config.data, the model's collator) -> the collator that makes
      this objective's batches; None for the one that `batch` names.
  """

  loss_fn: LossFn
  settings: type = NoSettings
  section: str = ''
  batch: Literal['single', 'pair', 'judged'] = 'single'
  architecture: Literal['encoder-decoder', 'decoder', 'any'] = 'any'
  needs_reference: bool = False
  reference_output: Literal['log_probs', 'logits'] = 'log_probs'
  validates_itself: bool = True
  prepare_rows: Callable[..., dict[str, Array]] | None = None
  prepare_batch: Callable[[Batch], Batch] = lambda batch: batch
  collator: Callable[[ConfigDict, Any], Any] | None = None

  @property
  def answers_per_row(self) -> int:
    """The number of sequences in the model's batch for each row."""
    return 1 if self.batch == 'single' else 2

  @property
  def config_keys(self) -> tuple[str, ...]:
    """The config keys that this objective reads."""
    names = (field.name for field in dataclasses.fields(self.settings))
    keys = tuple(f'{self.section}.{name}' for name in names)
    return (*keys, 'preference.reference') if self.needs_reference else keys

  def settings_from(self, config: Mapping[str, Any]) -> Any:
    """Reads the settings from a config.

    Raises:
      ValueError: a value is out of range; the message names its key.
    """
    fields = dataclasses.fields(self.settings)
    section = config[self.section] if fields else {}
    return self.settings(**{f.name: section[f.name] for f in fields})

  def build(
    self, settings: Any = None, reference: Callable | None = None
  ) -> Objective:
    """Binds settings and a reference.

    Args:
      settings: an instance of `settings`; None for the defaults.
      reference: (variables, rows) -> log p of each target [b, t], or logits
        [b, t, v] by `reference_output`; None if batches have 'reference' arrays
        or the objective needs no reference.
    """
    settings = self.settings() if settings is None else settings
    bound = {'reference': reference} if self.needs_reference else {}
    prepare_rows = self.prepare_rows and functools.partial(
      self.prepare_rows, **bound
    )
    return Objective(
      functools.partial(self.loss_fn, settings=settings, **bound),
      prepare_rows,
      self.prepare_batch,
    )


def check_options(settings: Any, section: str) -> None:
  """Checks the fields of settings that are declared with `option`.

  Raises:
    ValueError: a value is out of range; the message names its config key.
  """
  for field in dataclasses.fields(settings):
    if 'allowed' in field.metadata:
      field.metadata['allowed'].check(
        f'config.{section}.{field.name}', getattr(settings, field.name)
      )

# SPDX-License-Identifier: Apache-2.0
"""The registry entry of an objective, and an objective with its settings.

A loss function is pure: (apply, variables, batch, rngs) -> (sum, aux). The sum
is divided by aux['weight'], which depends on the data alone, so that the parts
of a batch add up to the whole. aux['metrics'] holds values to log beside the
loss, {name: [sum, count]}.

`prepare_rows` and `prepare_batch` run before the gradient is taken. The first
computes arrays for each row by the current policy, part by part and without
gradient; the second needs the whole batch. KTO computes its KL baseline there.
Learning from samples fits the same two: PPO and GRPO sample answers to the
batch's prompts in `prepare_rows` and compute advantages, which are means over
a prompt's group of rows, in `prepare_batch`.
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
  """An objective with its settings, as a training step calls it.

  Attributes:
    loss_fn: (apply, variables, rows, rngs) -> (sum, aux), for any rows of a
      batch.
    prepare_rows: (apply, variables, rows, rng) -> {name: array [rows, ...]},
      which the step adds to the rows before it takes the gradient; rng is
      None in validation. None for an objective that adds no arrays.
    prepare_batch: batch -> batch, called with the whole batch and the arrays
      of `prepare_rows`: the place for means over rows, as `loss_fn` sees some
      of the rows only.
  """

  loss_fn: LossFn
  prepare_rows: Callable[..., dict[str, Array]] | None = None
  prepare_batch: Callable[[Batch], Batch] = lambda batch: batch

  def __call__(
    self, apply: Callable, variables: Tree, rows: Batch, rngs: Any
  ) -> tuple[Array, dict[str, Any]]:
    return self.loss_fn(apply, variables, rows, rngs)

  def prepare(self, apply: Callable, variables: Tree, batch: Batch) -> Batch:
    """Returns the batch that `loss_fn` takes in validation: no noise."""
    if self.prepare_rows is None:
      return batch
    return self.prepare_batch(
      batch | self.prepare_rows(apply, variables, batch, None)
    )


@dataclasses.dataclass(frozen=True)
class NoSettings:
  """Settings of an objective that reads no key of a config."""


@dataclasses.dataclass(frozen=True)
class ObjectiveSpec:
  """A loss function and the facts that other code needs to know of it.

  Attributes:
    loss_fn: (apply, variables, batch, rngs, settings=...) -> (sum, aux); with
      `needs_reference` also reference=..., None where the batch has it.
    settings: frozen dataclass; its fields are keys of the config's `section`.
    section: 'loss', 'preference', or a section of the user's own.
    batch: 'single' (rows of the model's own form), 'pair' (a chosen and a
      rejected answer) or 'judged' (an answer with a label).
    architecture: of the models that it trains: 'encoder-decoder', 'decoder'
      or 'any'.
    needs_reference: whether it compares the policy with a reference model.
    validates_itself: whether validation measures this objective with its
      settings. Otherwise the settings are left at their defaults, so that the
      validation losses of runs with different settings compare.
    prepare_rows: as `Objective.prepare_rows`; with `needs_reference` it is
      given reference=... too.
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
  validates_itself: bool = True
  prepare_rows: Callable[..., dict[str, Array]] | None = None
  prepare_batch: Callable[[Batch], Batch] = lambda batch: batch
  collator: Callable[[ConfigDict, Any], Any] | None = None

  @property
  def answers_per_row(self) -> int:
    """Sequences that the model reads for each row of a batch."""
    return 1 if self.batch == 'single' else 2

  @property
  def config_keys(self) -> tuple[str, ...]:
    """The keys of a config that change what this objective computes."""
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
      reference: (variables, rows) -> log p of each target [b, t], for
        `needs_reference` where batches have no 'reference' arrays.
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
  """Looks at the fields of settings that were declared with `option`.

  Raises:
    ValueError: a value is out of range; the message names its config key.
  """
  for field in dataclasses.fields(settings):
    if 'allowed' in field.metadata:
      field.metadata['allowed'].check(
        f'config.{section}.{field.name}', getattr(settings, field.name)
      )

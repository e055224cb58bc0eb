# SPDX-License-Identifier: Apache-2.0
"""From paths to an engine: the base, its vocabulary, and its adapters."""

import dataclasses
from collections.abc import Mapping, Sequence

from moepeft import base as base_lib
from moepeft import config as config_lib
from moepeft import prompts
from moepeft.data import vocabulary
from moepeft.data.vocabulary import Vocabulary
from moepeft.serve.bank import Banks
from moepeft.serve.banks import NoBanks
from moepeft.serve.engine import Engine
from moepeft.serve.settings import Settings


@dataclasses.dataclass(frozen=True)
class Opened:
  """An engine that has not been started, and what its ids say.

  Attributes:
    words: the base's vocabulary.
    ends: ids that end an answer.
  """

  engine: Engine
  words: Vocabulary
  ends: tuple[int, ...]


def open_engine(
  path: str,
  adapters: Mapping[str, str],
  forms: Sequence[str],
  settings: Settings,
  loaded: int = 9,
  budget: int | None = None,
) -> Opened:
  """Reads a base and its adapters.

  Args:
    path: of the base, as `moepeft.base.load` takes it.
    adapters: {name: path} to begin with.
    forms: methods whose adapters may come later.
    loaded: adapters of a form that can be in use at once, and the base.
    budget: bytes of device memory for adapters.

  Raises:
    ValueError: there is no base, or an adapter that cannot be served.
  """
  config = config_lib.default()
  config.model.path, config.method = path, 'full'
  base = base_lib.load(config.model)
  model, _ = base_lib.module(base, config)
  banks = NoBanks()
  if adapters or forms:
    banks = Banks(base, adapters, forms, loaded, budget)
  words = vocabulary('', path)
  engine = Engine(model, base.params, banks, settings)
  return Opened(engine, words, prompts.ends(words, base.folder))

# SPDX-License-Identifier: Apache-2.0
"""A model, its adapters and what goes with them, ready to be started."""

import dataclasses
import os
from collections.abc import Mapping, Sequence

from moepeft import base as base_lib
from moepeft import config as config_lib
from moepeft import prompts
from moepeft.base import Base
from moepeft.data import vocabulary
from moepeft.data.vocabulary import Vocabulary
from moepeft.models import check_decodes
from moepeft.serve.bank import Banks
from moepeft.serve.constraints import Compiler
from moepeft.serve.engine import Engine
from moepeft.serve.settings import Settings


@dataclasses.dataclass(frozen=True)
class Opened:
  """
  Attributes:
    name: what requests call the base.
    sha256: of the base's content.
    words: its vocabulary; ends: ids that end its answers.
  """

  engine: Engine
  name: str
  sha256: str
  words: Vocabulary
  ends: tuple[int, ...]


def opened(
  path: str,
  adapters: Mapping[str, str],
  forms: Sequence[str],
  settings: Settings,
  slots: int,
  budget: int | None,
  quantise: str = '',
  dtype: str = '',
) -> Opened:
  """Reads a base and its adapters.

  Args:
    path: as of `moepeft.generate --model`.
    adapters: {name: path}.
    forms: methods whose adapters may be loaded later.
    slots: adapters of each form that are on the device at once, and one.
    budget: bytes for adapters on the device; None for no limit.
    quantise: 'int8' or 'nf4'; '' as the weights are.
    dtype: that is computed in; '' for the config's.

  Raises:
    ValueError: one of them cannot be read or served.
  """
  config = config_lib.default()
  config.model.path, config.method = path, 'full'
  config.model.quantise = quantise
  config.model.dtype = dtype or config.model.dtype
  base = base_lib.load(config.model)
  check_decodes(base.config)
  model, _ = base_lib.module(base, config)
  params = base_lib.initialise(base, model, config.seed)['params']
  expanded = {name: os.path.expanduser(one) for name, one in adapters.items()}
  banks = Banks(base, expanded, forms, slots, budget)
  words = vocabulary('', path)
  ends = prompts.ends(words, base.folder)
  engine = Engine(model, params, banks, settings)
  return Opened(engine, name_of(path), _hash(base), words, ends)


def name_of(path: str) -> str:
  """'~/models/smollm2/' -> 'smollm2', 'package:t5_tiny' -> 't5_tiny'."""
  return os.path.basename(path.rstrip('/')).split(':')[-1]


def _hash(base: Base) -> str:
  """Of what computes: codes are not the weights that they stand for."""
  return f'{base.sha256}/{base.quantise}' if base.quantise else base.sha256


def compiler(found: Opened) -> Compiler | None:
  """What constrains answers; None where llguidance is not installed."""
  try:
    import llguidance  # noqa: F401
  except ImportError:
    return None
  return Compiler(found.words, found.engine.vocab, found.ends)

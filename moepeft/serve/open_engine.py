# SPDX-License-Identifier: Apache-2.0
"""From paths to an engine: the base, its vocabulary, and its adapters."""

import dataclasses
from collections.abc import Mapping, Sequence

from moepeft import models
from moepeft.checkpoints import base as base_lib
from moepeft.config import defaults as config_lib
from moepeft.data import load_tokenizer
from moepeft.data.tokenizers.tokenizer import Tokenizer
from moepeft.inference import prompts
from moepeft.inference.adapters.fixed import FixedAdapter
from moepeft.inference.adapters.pool import AdapterPool
from moepeft.inference.engine.engine import Engine
from moepeft.inference.engine.limits import EngineConfig


@dataclasses.dataclass(frozen=True)
class Opened:
  """An engine that has not been started, and what its ids say.

  Attributes:
    words: the base's vocabulary.
    ends: ids that end an answer.
    sha256: of the base's content, and of how it is kept.
  """

  engine: Engine
  words: Tokenizer
  ends: tuple[int, ...]
  sha256: str = ''


def open_engine(
  path: str,
  adapters: Mapping[str, str],
  forms: Sequence[str],
  settings: EngineConfig,
  loaded: int = 9,
  budget: int | None = None,
  quantise: str = '',
  dtype: str = '',
) -> Opened:
  """Reads a base and its adapters.

  Args:
    path: of the base, as `moepeft.checkpoints.base.load` takes it.
    adapters: {name: path} to begin with.
    forms: methods whose adapters may come later.
    loaded: adapters of a form that can be in use at once, and the base.
    budget: bytes of device memory for adapters.
    quantise: 'int8' or 'nf4'; '' keeps the base as it is.
    dtype: that is computed in; '' for the config's.

  Raises:
    ValueError: there is no base, it writes no text, or an adapter cannot be
      served.
  """
  config = config_lib.default()
  config.model.path, config.method = path, 'full'
  config.model.quantize = quantise
  config.model.dtype = dtype or config.model.dtype
  base = base_lib.load(config.model)
  models.check_decodes(base.config)
  model, _ = base_lib.module(base, config)
  pool = FixedAdapter(model)
  if adapters or forms:
    pool = AdapterPool(base, adapters, forms, loaded, budget)
  words = load_tokenizer('', path)
  engine = Engine(model, base.params, pool, settings)
  ends = prompts.eos_token_ids(words, base.folder)
  # Codes are not the weights that they stand for.
  sha256 = f'{base.sha256}/{quantise}' if quantise else base.sha256
  return Opened(engine, words, ends, sha256)

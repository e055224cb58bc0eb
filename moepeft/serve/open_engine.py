# SPDX-License-Identifier: Apache-2.0
"""Opens an engine: reads the base, its tokenizer and its adapters."""

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
from moepeft.inference.loaded_model import load_draft


@dataclasses.dataclass(frozen=True)
class OpenedEngine:
  """An engine before its start, with its tokenizer.

  Attributes:
    tokenizer: the tokenizer of the base.
    eos_token_ids: ids that end an answer.
    sha256: hash of the base's weights and of their quantization.
  """

  engine: Engine
  tokenizer: Tokenizer
  eos_token_ids: tuple[int, ...]
  sha256: str = ''


def open_engine(
  path: str,
  adapters: Mapping[str, str],
  methods: Sequence[str],
  engine_config: EngineConfig,
  slots: int = 9,
  budget: int | None = None,
  quantise: str = '',
  dtype: str = '',
  assistant: str = '',
) -> OpenedEngine:
  """Reads a base and its adapters.

  Args:
    path: the path of the base; see `moepeft.checkpoints.base.load`.
    adapters: {name: path} of the adapters to load.
    methods: methods of adapters to be loaded later.
    slots: the number of adapters of a method in use at once, plus one for the
      base.
    budget: the maximum device memory for adapters, in bytes.
    quantise: 'int8' or 'nf4'; '' does not quantize the base.
    dtype: the dtype of the computation; '' for that of the config.
    assistant: the path of a draft model; '' for none.

  Raises:
    ValueError: the base cannot be read or has no decoder, or an adapter cannot
      be served.
  """
  config = config_lib.default()
  config.model.path, config.method = path, 'full'
  config.model.quantize = quantise
  config.model.dtype = dtype or config.model.dtype
  base = base_lib.load(config.model)
  models.check_decodes(base.config)
  model, _ = base_lib.module(base, config)
  pool = FixedAdapter(model)
  if adapters or methods:
    pool = AdapterPool(base, adapters, methods, slots, budget)
  tokenizer = load_tokenizer('', path)
  draft = load_draft(assistant, tokenizer) if assistant else None
  engine = Engine(model, base.params, pool, engine_config, draft=draft)
  eos_token_ids = prompts.eos_token_ids(tokenizer, base.folder)
  # Quantized weights differ from those that were hashed.
  sha256 = f'{base.sha256}/{quantise}' if quantise else base.sha256
  return OpenedEngine(engine, tokenizer, eos_token_ids, sha256)

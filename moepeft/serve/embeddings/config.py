# SPDX-License-Identifier: Apache-2.0
"""Reads the config files of a sentence-transformers directory.

modules.json lists the modules from a text to its vector, each with a folder;
sentence_bert_config.json has the maximum number of tokens.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moepeft.checkpoints import directory
from moepeft.core import untrusted
from moepeft.models.weight_mapping import CheckpointError
from moepeft.serve.embeddings.pooling import POOLINGS

_MODULES = 'modules.json'
# Older files have a flag for each pooling, such as pooling_mode_cls_token.
_POOLING_MODE, _POOLING_FLAG_PREFIX = 'pooling_mode', 'pooling_mode_'


@dataclasses.dataclass(frozen=True)
class SentenceTransformerConfig:
  """Pooling and normalization of an encoder's states.

  Attributes:
    pooling: a name of `pooling.POOLINGS`.
    normalize: whether vectors have length one.
    max_length: the most tokens of a text; None for the limit of the encoder.
    lowercase: whether texts are lowercased before tokenization.
    prompt: a text that is put before every text.
  """

  pooling: str = 'mean'
  normalize: bool = True
  max_length: int | None = None
  lowercase: bool = False
  prompt: str = ''

  def __post_init__(self):
    if self.pooling not in POOLINGS:
      raise ValueError(
        f'the pooling is one of {", ".join(POOLINGS)}; got {self.pooling!r}'
      )


def read_config(folder: Path) -> SentenceTransformerConfig:
  """Reads the config of a sentence-transformers directory.

  Raises:
    CheckpointError: the directory is not one of sentence-transformers, or has
      an unsupported module or pooling.
  """
  modules = _read_modules(folder)
  pooling = directory.read_json(folder / modules['Pooling'] / 'config.json')
  sentence_config = _read_optional(folder / 'sentence_bert_config.json')
  prompt = _prompt(_read_optional(folder / 'config_sentence_transformers.json'))
  if prompt and pooling.get('include_prompt') is False:
    raise CheckpointError(
      f'{folder} excludes its prompt {prompt!r} from the pooling, which is not '
      'supported: expected include_prompt to be true'
    )
  try:
    max_length = untrusted.field(sentence_config, 'max_seq_length', int, 0)
    lowercase = untrusted.field(sentence_config, 'do_lower_case', bool, False)
  except untrusted.Malformed as error:
    raise CheckpointError(
      f'sentence_bert_config.json of {folder}: {error}'
    ) from None
  if max_length < 0:
    raise CheckpointError(
      f'{folder} reads texts of max_seq_length {max_length}: expected 1 or more'
    )
  return SentenceTransformerConfig(
    _pooling(pooling, folder),
    'Normalize' in modules,
    max_length or None,
    lowercase,
    prompt,
  )


def _read_modules(folder: Path) -> dict[str, str]:
  """Reads modules.json: {class name: folder} of the supported modules."""
  try:
    modules = untrusted.read_json(folder / _MODULES)
    if not isinstance(modules, list):
      raise untrusted.Malformed(f'expected a list in {_MODULES}')
    field = untrusted.field
    modules = {
      field(module, 'type', str).rpartition('.')[2]: field(module, 'path', str)
      for module in modules
    }
  except (OSError, untrusted.Malformed):
    raise CheckpointError(
      f'{folder} has no {_MODULES} that can be read: expected a directory of '
      'sentence-transformers'
    ) from None
  supported = ['Transformer', 'Pooling', 'Normalize']
  if list(modules) not in (supported, supported[:2]) or modules['Transformer']:
    raise CheckpointError(
      f'{folder / _MODULES} has the modules {", ".join(modules)}: expected '
      'Transformer in the directory itself, Pooling and perhaps Normalize; '
      'others are not supported'
    )
  return modules


def _pooling(fields: Mapping[str, Any], folder: Path) -> str:
  poolings = fields.get(_POOLING_MODE)
  if not poolings:
    poolings = [
      name.removeprefix(_POOLING_FLAG_PREFIX)
      .removesuffix('_tokens')
      .removesuffix('_token')
      for name, on in fields.items()
      if name.startswith(_POOLING_FLAG_PREFIX) and on
    ]
  poolings = poolings if isinstance(poolings, list) else [poolings]
  if len(poolings) != 1 or str(poolings[0]) not in POOLINGS:
    raise CheckpointError(
      f'{folder} pools by {" and ".join(map(str, poolings)) or "nothing"}: '
      f'expected one of {", ".join(POOLINGS)}; others are not supported'
    )
  return poolings[0]


def _prompt(fields: Mapping[str, Any]) -> str:
  try:
    name = untrusted.field(fields, 'default_prompt_name', str, '')
    prompts = untrusted.field(fields, 'prompts', dict, {})
    return untrusted.field(prompts, name, str, '') if name else ''
  except untrusted.Malformed as error:
    raise CheckpointError(
      f'config_sentence_transformers.json: {error}'
    ) from None


def _read_optional(file: Path) -> dict[str, Any]:
  return directory.read_json(file) if file.is_file() else {}

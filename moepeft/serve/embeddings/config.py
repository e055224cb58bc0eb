# SPDX-License-Identifier: Apache-2.0
"""The files of a sentence-transformers directory beside its encoder.

modules.json names the steps from a text to its vector, a folder each; the
tokens that a text may have are in sentence_bert_config.json.
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
# Older files have a flag per pooling, such as pooling_mode_cls_token.
_MODE, _FLAG = 'pooling_mode', 'pooling_mode_'


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
    CheckpointError: it is no such directory, or has a module or a pooling that
      is not supported.
  """
  steps = _steps(folder)
  pooling = directory.read_json(folder / steps['Pooling'] / 'config.json')
  sentence_config = _read_optional(folder / 'sentence_bert_config.json')
  prompt = _prompt(_read_optional(folder / 'config_sentence_transformers.json'))
  if prompt and pooling.get('include_prompt') is False:
    raise CheckpointError(
      f'{folder} leaves its prompt {prompt!r} out of the pooling: expected one '
      'that counts; it is not supported'
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
    'Normalize' in steps,
    max_length or None,
    lowercase,
    prompt,
  )


def _steps(folder: Path) -> dict[str, str]:
  """{kind: folder below} of the steps, which must be those known, in order."""
  try:
    steps = untrusted.read_json(folder / _MODULES)
    if not isinstance(steps, list):
      raise untrusted.Malformed(f'expected a list in {_MODULES}')
    field = untrusted.field
    modules = {
      field(step, 'type', str).rpartition('.')[2]: field(step, 'path', str)
      for step in steps
    }
  except (OSError, untrusted.Malformed):
    raise CheckpointError(
      f'{folder} holds no {_MODULES} that can be read: expected a directory of '
      'sentence-transformers, which says how tokens become a vector'
    ) from None
  usual = ['Transformer', 'Pooling', 'Normalize']
  if list(modules) not in (usual, usual[:2]) or modules['Transformer']:
    raise CheckpointError(
      f'{folder / _MODULES} has the steps {", ".join(modules)}: expected '
      'Transformer in the directory itself, Pooling and perhaps Normalize; '
      'others are not supported'
    )
  return modules


def _pooling(fields: Mapping[str, Any], folder: Path) -> str:
  chosen = fields.get(_MODE)
  if not chosen:
    chosen = [
      name.removeprefix(_FLAG).removesuffix('_tokens').removesuffix('_token')
      for name, on in fields.items()
      if name.startswith(_FLAG) and on
    ]
  chosen = chosen if isinstance(chosen, list) else [chosen]
  if len(chosen) != 1 or str(chosen[0]) not in POOLINGS:
    raise CheckpointError(
      f'{folder} pools by {" and ".join(map(str, chosen)) or "nothing"}: '
      f'expected one of {", ".join(POOLINGS)}; others are not supported'
    )
  return chosen[0]


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

# SPDX-License-Identifier: Apache-2.0
"""Tokenizer files in Hugging Face model directories."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moepeft.checkpoints import directory
from moepeft.checkpoints.gguf import model as gguf
from moepeft.checkpoints.gguf import tokenizer as gguf_tokenizer
from moepeft.core import untrusted
from moepeft.models.weight_mapping import CheckpointError

FILES = (
  'tokenizer*.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'spiece.model',
  'tokenizer.model',
  'vocab.*',
  'merges.txt',
  'chat_template.jinja',
  # Has the tokens that end an answer.
  'generation_config.json',
)


def write(folder: Path, tokenizer: str | None) -> None:
  """Copies the tokenizer files of a directory, or converts a GGUF file's."""
  if tokenizer and tokenizer.endswith(gguf.SUFFIX):
    gguf_tokenizer.save(tokenizer, folder)
    return
  for file in _tokenizer_files(tokenizer) if tokenizer else ():
    shutil.copyfile(file, folder / file.name)


def special_ids(tokenizer: str | None) -> dict[str, Any]:
  """The ids of special tokens of a tokenizer; None for missing ones.

  Without them in config.json, transformers uses the defaults of the family.
  """
  kinds = ('bos', 'eos', 'pad')
  if tokenizer and tokenizer.endswith(gguf.SUFFIX):
    ids = gguf_tokenizer.special_ids(gguf.metadata(tokenizer))
  elif tokenizer and (Path(tokenizer) / 'config.json').is_file():
    ids = directory.read_json(Path(tokenizer) / 'config.json')
  else:
    ids = _special_ids_in_files(Path(tokenizer), kinds) if tokenizer else {}
  return {f'{kind}_token_id': ids.get(f'{kind}_token_id') for kind in kinds}


def _special_ids_in_files(folder: Path, kinds: Sequence[str]) -> dict[str, int]:
  """The ids of the special tokens in a tokenizer's files."""
  paths = [
    folder / name for name in ('tokenizer_config.json', 'tokenizer.json')
  ]
  if not all(file.is_file() for file in paths):
    return {}
  config, vocabulary = map(directory.read_json, paths)
  try:
    token_ids = {
      untrusted.field(token, 'content', str): untrusted.field(token, 'id', int)
      for token in untrusted.field(vocabulary, 'added_tokens', list, [])
    }
  except untrusted.Malformed as error:
    raise CheckpointError(
      f"{paths[1]} is damaged in its 'added_tokens' ({error}): copy it again"
    ) from None
  special = {}
  for kind in kinds:
    token = config.get(f'{kind}_token')
    token = token.get('content') if isinstance(token, dict) else token
    if isinstance(token, str) and token in token_ids:
      special[f'{kind}_token_id'] = token_ids[token]
  return special


def _tokenizer_files(folder: str) -> list[Path]:
  """The tokenizer files in a directory."""
  matches_by_pattern = (Path(folder).glob(pattern) for pattern in FILES)
  return sorted({file for matches in matches_by_pattern for file in matches})

# SPDX-License-Identifier: Apache-2.0
"""The tokenizer and the chat template that a GGUF file holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moepeft.checkpoints import directory
from moepeft.checkpoints.gguf import model as gguf
from moepeft.checkpoints.gguf import sentencepiece
from moepeft.checkpoints.gguf.sentencepiece import CONTROL, USER_DEFINED
from moepeft.models.weight_mapping import CheckpointError

# How text is split before bytes are merged: GPT-2's own way, Llama 3's and
# Qwen2's patterns (published in their tokenizer.json).
_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s|"
  r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_PATTERNS = {
  'llama-bpe': _WORDS % r'\p{N}{1,3}',
  'qwen2': _WORDS % r'\p{N}',
}
SPLITS = ('gpt-2', 'smollm', *_PATTERNS)
# `tokenizer.ggml.model`: SentencePiece's merges, and bytes' with a SPLIT.
_PIECES, _BYTES = 'llama', 'gpt2'


def read(path: str) -> Any:
  """The fast tokenizer of a file, of `transformers`' type.

  Raises:
    CheckpointError: the file has none, or one of a kind that is not
      supported.
  """
  metadata = gguf.metadata(path)
  try:
    return _tokenizer(path, metadata)
  except CheckpointError:
    raise
  except Exception as error:  # tokenizers raises plain Exceptions
    reason = ' '.join(str(error).split())[:200] or type(error).__name__
    raise CheckpointError(
      f'the tokenizer in {path} is damaged ({type(error).__name__}: {reason}): '
      'convert the model again, or set config.data.tokenizer to a directory '
      'with tokenizer.json'
    ) from None


def _tokenizer(path: str, metadata: Mapping[str, Any]) -> Any:
  from transformers import PreTrainedTokenizerFast

  tokens = metadata.get('tokenizer.ggml.tokens')
  if not tokens:
    raise CheckpointError(
      f'{path} holds no tokenizer: set config.data.tokenizer to a directory '
      'that does'
    )
  special = {
    kind.removesuffix('_id'): tokens[i]
    for kind, i in special_ids(metadata).items()
    if i is not None
  }
  return PreTrainedTokenizerFast(
    tokenizer_object=_build(path, metadata, tokens),
    chat_template=metadata.get('tokenizer.chat_template'),
    clean_up_tokenization_spaces=False,
    **special,
  )


def special_ids(metadata: Mapping[str, Any]) -> dict[str, int | None]:
  """'bos_token_id' and so on of a file's metadata; None where unsaid.

  Raises:
    CheckpointError: one of them is no id.
  """
  kinds = {'bos': 'bos', 'eos': 'eos', 'unk': 'unknown', 'pad': 'padding'}
  ids = {
    f'{hf_name}_token_id': metadata.get(f'tokenizer.ggml.{gguf_name}_token_id')
    for hf_name, gguf_name in kinds.items()
  }
  for name, value in ids.items():
    if value is not None and (type(value) is not int or value < 0):
      raise CheckpointError(
        f'the GGUF file has {value!r:.60} for its {name}, expected the id of a '
        'token: convert the model again'
      )
  return ids


def save(path: str, folder: Path) -> None:
  """Writes the tokenizer of a file as transformers and llama.cpp read it.

  Raises:
    CheckpointError: as of `read`.
  """
  tokenizer = read(path)
  tokenizer.save_pretrained(folder)
  metadata = gguf.metadata(path)
  if metadata.get('tokenizer.ggml.model') != _PIECES:
    return
  pieces = sentencepiece.read(path, metadata)
  model = sentencepiece.model_file(pieces, special_ids(metadata))
  (folder / 'tokenizer.model').write_bytes(model)
  # llama.cpp's converter asks here for what tokenizer.model does not say.
  file = folder / 'tokenizer_config.json'
  more = {
    'add_bos_token': _begins(metadata, True),
    'add_prefix_space': pieces.prefix,
    'added_tokens_decoder': {
      str(i): {'content': token.content, 'special': token.special}
      for i, token in tokenizer.added_tokens_decoder.items()
    },
  }
  directory.write_json(file, directory.read_json(file) | more)


def _build(path: str, metadata: Mapping[str, Any], tokens: list[str]) -> Any:
  """The `tokenizers.Tokenizer` behind it."""
  from tokenizers import AddedToken

  if metadata.get('tokenizer.ggml.model') == _PIECES:
    tokenizer = sentencepiece.tokenizer(sentencepiece.read(path, metadata))
    if _begins(metadata, True):
      tokenizer.post_processor = _start(metadata, tokens)
  else:
    tokenizer = _of_bytes(path, metadata, tokens)
  for i, form in enumerate(metadata.get('tokenizer.ggml.token_type', ())):
    if form in (CONTROL, USER_DEFINED):
      added = AddedToken(tokens[i], normalized=False, special=form == CONTROL)
      tokenizer.add_tokens([added])
  return tokenizer


def _of_bytes(path: str, metadata: Mapping[str, Any], tokens: list[str]) -> Any:
  from tokenizers import Tokenizer, decoders, models, normalizers, processors

  split = _split(path, metadata)
  merges = [
    tuple(pair.split(' ')) for pair in metadata.get('tokenizer.ggml.merges', ())
  ]
  bpe = models.BPE(
    vocab={token: i for i, token in enumerate(tokens)},
    merges=merges,
    # Llama 3 looks a whole word up before it merges.
    ignore_merges=split == 'llama-bpe',
  )
  tokenizer = Tokenizer(bpe)
  if split == 'qwen2':
    tokenizer.normalizer = normalizers.NFC()
  tokenizer.pre_tokenizer = _splitter(split)
  tokenizer.decoder = decoders.ByteLevel()
  usual = split == 'llama-bpe'
  if _begins(metadata, usual):
    tokenizer.post_processor = _start(metadata, tokens)
  else:
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
  return tokenizer


def _split(path: str, metadata: Mapping[str, Any]) -> str:
  """The way in which text is split, one of SPLITS."""
  kind = metadata.get('tokenizer.ggml.model')
  split = metadata.get('tokenizer.ggml.pre', 'default')
  if kind != _BYTES or split not in SPLITS:
    raise CheckpointError(
      f'the tokenizer in {path} is of the kind {kind!r}, split by {split!r}: '
      f'supported are {_PIECES!r}, and {_BYTES!r} split by '
      f'{", ".join(SPLITS)}; set config.data.tokenizer to a directory with '
      'tokenizer.json'
    )
  return split


def _splitter(split: str) -> Any:
  from tokenizers import Regex, pre_tokenizers

  if split == 'gpt-2':
    return pre_tokenizers.ByteLevel(add_prefix_space=False)
  if split == 'smollm':
    first = pre_tokenizers.Digits(individual_digits=True)
    rest = pre_tokenizers.ByteLevel(add_prefix_space=False)
  else:
    first = pre_tokenizers.Split(Regex(_PATTERNS[split]), 'isolated')
    rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  return pre_tokenizers.Sequence([first, rest])


def _begins(metadata: Mapping[str, Any], usual: bool) -> bool:
  """Whether texts begin with the beginning-of-sequence token.

  Args:
    usual: whether they do where the file is silent.
  """
  if metadata.get('tokenizer.ggml.bos_token_id') is None:
    return False
  return bool(metadata.get('tokenizer.ggml.add_bos_token', usual))


def _start(metadata: Mapping[str, Any], tokens: list[str]) -> Any:
  from tokenizers import processors

  bos = metadata['tokenizer.ggml.bos_token_id']
  return processors.TemplateProcessing(
    single=f'{tokens[bos]} $A',
    special_tokens=[(tokens[bos], bos)],
  )

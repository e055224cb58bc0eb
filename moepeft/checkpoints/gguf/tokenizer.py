# SPDX-License-Identifier: Apache-2.0
"""Reads the tokenizer and the chat template of a GGUF file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moepeft.checkpoints import directory
from moepeft.checkpoints.gguf import model as gguf
from moepeft.checkpoints.gguf import sentencepiece
from moepeft.checkpoints.gguf.sentencepiece import CONTROL, USER_DEFINED
from moepeft.models.weight_mapping import CheckpointError

# Regular expressions of the pre-tokenizers of Llama 3 and Qwen2, from their
# tokenizer.json.
_SPLIT_REGEX = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s|"
  r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_SPLIT_REGEXES = {
  'llama-bpe': _SPLIT_REGEX % r'\p{N}{1,3}',
  'qwen2': _SPLIT_REGEX % r'\p{N}',
}
# Supported values of `tokenizer.ggml.pre`, for byte-level BPE.
PRE_TOKENIZERS = ('gpt-2', 'smollm', *_SPLIT_REGEXES)
# Supported values of `tokenizer.ggml.model`.
_SENTENCEPIECE, _BYTE_LEVEL_BPE = 'llama', 'gpt2'


def read(path: str) -> Any:
  """Reads a file's tokenizer as a `PreTrainedTokenizerFast`.

  Raises:
    CheckpointError: the file has no tokenizer, or an unsupported or damaged
      one.
  """
  metadata = gguf.metadata(path)
  try:
    return _make_hf_tokenizer(path, metadata)
  except CheckpointError:
    raise
  except Exception as error:  # tokenizers raises plain Exceptions
    reason = ' '.join(str(error).split())[:200] or type(error).__name__
    raise CheckpointError(
      f'the tokenizer in {path} is damaged ({type(error).__name__}: {reason}): '
      'convert the model again, or set config.data.tokenizer to a directory '
      'with tokenizer.json'
    ) from None


def _make_hf_tokenizer(path: str, metadata: Mapping[str, Any]) -> Any:
  from transformers import PreTrainedTokenizerFast

  tokens = metadata.get('tokenizer.ggml.tokens')
  if not tokens:
    raise CheckpointError(
      f'{path} holds no tokenizer: set config.data.tokenizer to a directory '
      'that does'
    )
  special_tokens = {
    kind.removesuffix('_id'): tokens[i]
    for kind, i in special_ids(metadata).items()
    if i is not None
  }
  return PreTrainedTokenizerFast(
    tokenizer_object=_make_tokenizer(path, metadata, tokens),
    chat_template=metadata.get('tokenizer.chat_template'),
    clean_up_tokenization_spaces=False,
    **special_tokens,
  )


def special_ids(metadata: Mapping[str, Any]) -> dict[str, int | None]:
  """{'bos_token_id': id, ...} for BOS, EOS, UNK and PAD; None if absent.

  Raises:
    CheckpointError: a value is no token id.
  """
  gguf_names = {'bos': 'bos', 'eos': 'eos', 'unk': 'unknown', 'pad': 'padding'}
  ids = {
    f'{hf_name}_token_id': metadata.get(f'tokenizer.ggml.{gguf_name}_token_id')
    for hf_name, gguf_name in gguf_names.items()
  }
  for name, value in ids.items():
    if value is not None and (type(value) is not int or value < 0):
      raise CheckpointError(
        f'the GGUF file has {value!r:.60} for its {name}, expected the id of a '
        'token: convert the model again'
      )
  return ids


def save(path: str, folder: Path) -> None:
  """Writes a GGUF file's tokenizer in the format of transformers.

  llama.cpp's converter can read the files too.

  Args:
    path: the GGUF file.
    folder: the directory to write to.

  Raises:
    CheckpointError: see `read`.
  """
  tokenizer = read(path)
  tokenizer.save_pretrained(folder)
  metadata = gguf.metadata(path)
  if metadata.get('tokenizer.ggml.model') != _SENTENCEPIECE:
    return
  pieces = sentencepiece.read(path, metadata)
  model = sentencepiece.model_file(pieces, special_ids(metadata))
  (folder / 'tokenizer.model').write_bytes(model)
  # llama.cpp's converter reads these fields, which tokenizer.model lacks.
  file = folder / 'tokenizer_config.json'
  fields = {
    'add_bos_token': _adds_bos(metadata, default=True),
    'add_prefix_space': pieces.add_prefix_space,
    'added_tokens_decoder': {
      str(i): {'content': token.content, 'special': token.special}
      for i, token in tokenizer.added_tokens_decoder.items()
    },
  }
  directory.write_json(file, directory.read_json(file) | fields)


def _make_tokenizer(
  path: str, metadata: Mapping[str, Any], tokens: list[str]
) -> Any:
  """Makes the `tokenizers.Tokenizer`."""
  from tokenizers import AddedToken

  if metadata.get('tokenizer.ggml.model') == _SENTENCEPIECE:
    tokenizer = sentencepiece.tokenizer(sentencepiece.read(path, metadata))
    if _adds_bos(metadata, default=True):
      tokenizer.post_processor = _bos_processor(metadata, tokens)
  else:
    tokenizer = _make_byte_level_bpe(path, metadata, tokens)
  for i, kind in enumerate(metadata.get('tokenizer.ggml.token_type', ())):
    if kind in (CONTROL, USER_DEFINED):
      token = AddedToken(tokens[i], normalized=False, special=kind == CONTROL)
      tokenizer.add_tokens([token])
  return tokenizer


def _make_byte_level_bpe(
  path: str, metadata: Mapping[str, Any], tokens: list[str]
) -> Any:
  from tokenizers import Tokenizer, decoders, models, normalizers, processors

  pre_tokenizer = _pre_tokenizer_name(path, metadata)
  merges = [
    tuple(pair.split(' ')) for pair in metadata.get('tokenizer.ggml.merges', ())
  ]
  bpe = models.BPE(
    vocab={token: i for i, token in enumerate(tokens)},
    merges=merges,
    # Llama 3 looks a whole word up in the vocabulary before it merges.
    ignore_merges=pre_tokenizer == 'llama-bpe',
  )
  tokenizer = Tokenizer(bpe)
  if pre_tokenizer == 'qwen2':
    tokenizer.normalizer = normalizers.NFC()
  tokenizer.pre_tokenizer = _make_pre_tokenizer(pre_tokenizer)
  tokenizer.decoder = decoders.ByteLevel()
  if _adds_bos(metadata, default=pre_tokenizer == 'llama-bpe'):
    tokenizer.post_processor = _bos_processor(metadata, tokens)
  else:
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
  return tokenizer


def _pre_tokenizer_name(path: str, metadata: Mapping[str, Any]) -> str:
  """The value of `tokenizer.ggml.pre`, one of PRE_TOKENIZERS."""
  model = metadata.get('tokenizer.ggml.model')
  name = metadata.get('tokenizer.ggml.pre', 'default')
  if model != _BYTE_LEVEL_BPE or name not in PRE_TOKENIZERS:
    raise CheckpointError(
      f'the tokenizer in {path} is {model!r} with the pre-tokenizer {name!r}: '
      f'supported are {_SENTENCEPIECE!r}, and {_BYTE_LEVEL_BPE!r} with one of '
      f'{", ".join(PRE_TOKENIZERS)}; set config.data.tokenizer to a directory '
      'with tokenizer.json'
    )
  return name


def _make_pre_tokenizer(name: str) -> Any:
  from tokenizers import Regex, pre_tokenizers

  if name == 'gpt-2':
    return pre_tokenizers.ByteLevel(add_prefix_space=False)
  if name == 'smollm':
    splitter = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
  else:
    splitter = pre_tokenizers.Split(Regex(_SPLIT_REGEXES[name]), 'isolated')
    byte_level = pre_tokenizers.ByteLevel(
      add_prefix_space=False, use_regex=False
    )
  return pre_tokenizers.Sequence([splitter, byte_level])


def _adds_bos(metadata: Mapping[str, Any], default: bool) -> bool:
  """Whether the tokenizer adds the BOS token to texts.

  Args:
    default: the result if the file has no `add_bos_token`.
  """
  if metadata.get('tokenizer.ggml.bos_token_id') is None:
    return False
  return bool(metadata.get('tokenizer.ggml.add_bos_token', default))


def _bos_processor(metadata: Mapping[str, Any], tokens: list[str]) -> Any:
  from tokenizers import processors

  bos = metadata['tokenizer.ggml.bos_token_id']
  return processors.TemplateProcessing(
    single=f'{tokens[bos]} $A',
    special_tokens=[(tokens[bos], bos)],
  )

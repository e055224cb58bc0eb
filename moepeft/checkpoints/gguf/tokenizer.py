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
  said = gguf.metadata(path)
  try:
    return _tokenizer(path, said)
  except CheckpointError:
    raise
  except Exception as error:  # tokenizers raises plain Exceptions
    reason = ' '.join(str(error).split())[:200] or type(error).__name__
    raise CheckpointError(
      f'the tokenizer in {path} is damaged ({type(error).__name__}: {reason}): '
      'convert the model again, or set config.data.tokenizer to a directory '
      'with tokenizer.json'
    ) from None


def _tokenizer(path: str, said: Mapping[str, Any]) -> Any:
  from transformers import PreTrainedTokenizerFast

  tokens = said.get('tokenizer.ggml.tokens')
  if not tokens:
    raise CheckpointError(
      f'{path} holds no tokenizer: set config.data.tokenizer to a directory '
      'that does'
    )
  special = {
    kind.removesuffix('_id'): tokens[i]
    for kind, i in special_ids(said).items()
    if i is not None
  }
  return PreTrainedTokenizerFast(
    tokenizer_object=_build(path, said, tokens),
    chat_template=said.get('tokenizer.chat_template'),
    clean_up_tokenization_spaces=False,
    **special,
  )


def special_ids(said: Mapping[str, Any]) -> dict[str, int | None]:
  """'bos_token_id' and so on of a file's metadata; None where unsaid.

  Raises:
    CheckpointError: one of them is no id.
  """
  kinds = {'bos': 'bos', 'eos': 'eos', 'unk': 'unknown', 'pad': 'padding'}
  found = {
    f'{ours}_token_id': said.get(f'tokenizer.ggml.{theirs}_token_id')
    for ours, theirs in kinds.items()
  }
  for name, value in found.items():
    if value is not None and (type(value) is not int or value < 0):
      raise CheckpointError(
        f'the GGUF file has {value!r:.60} for its {name}, expected the id of a '
        'token: convert the model again'
      )
  return found


def save(path: str, folder: Path) -> None:
  """Writes the tokenizer of a file as transformers and llama.cpp read it.

  Raises:
    CheckpointError: as of `read`.
  """
  made = read(path)
  made.save_pretrained(folder)
  said = gguf.metadata(path)
  if said.get('tokenizer.ggml.model') != _PIECES:
    return
  found = sentencepiece.read(path, said)
  model = sentencepiece.model_file(found, special_ids(said))
  (folder / 'tokenizer.model').write_bytes(model)
  # llama.cpp's converter asks here for what tokenizer.model does not say.
  file = folder / 'tokenizer_config.json'
  more = {
    'add_bos_token': _begins(said, True),
    'add_prefix_space': found.prefix,
    'added_tokens_decoder': {
      str(i): {'content': token.content, 'special': token.special}
      for i, token in made.added_tokens_decoder.items()
    },
  }
  directory.write_json(file, directory.read_json(file) | more)


def _build(path: str, said: Mapping[str, Any], tokens: list[str]) -> Any:
  """The `tokenizers.Tokenizer` behind it."""
  from tokenizers import AddedToken

  if said.get('tokenizer.ggml.model') == _PIECES:
    made = sentencepiece.tokenizer(sentencepiece.read(path, said))
    if _begins(said, True):
      made.post_processor = _start(said, tokens)
  else:
    made = _of_bytes(path, said, tokens)
  for i, form in enumerate(said.get('tokenizer.ggml.token_type', ())):
    if form in (CONTROL, USER_DEFINED):
      added = AddedToken(tokens[i], normalized=False, special=form == CONTROL)
      made.add_tokens([added])
  return made


def _of_bytes(path: str, said: Mapping[str, Any], tokens: list[str]) -> Any:
  from tokenizers import Tokenizer, decoders, models, normalizers, processors

  split = _split(path, said)
  merges = [
    tuple(pair.split(' ')) for pair in said.get('tokenizer.ggml.merges', ())
  ]
  bpe = models.BPE(
    vocab={token: i for i, token in enumerate(tokens)},
    merges=merges,
    # Llama 3 looks a whole word up before it merges.
    ignore_merges=split == 'llama-bpe',
  )
  made = Tokenizer(bpe)
  if split == 'qwen2':
    made.normalizer = normalizers.NFC()
  made.pre_tokenizer = _splitter(split)
  made.decoder = decoders.ByteLevel()
  usual = split == 'llama-bpe'
  if _begins(said, usual):
    made.post_processor = _start(said, tokens)
  else:
    made.post_processor = processors.ByteLevel(trim_offsets=False)
  return made


def _split(path: str, said: Mapping[str, Any]) -> str:
  """The way in which text is split, one of SPLITS."""
  kind = said.get('tokenizer.ggml.model')
  split = said.get('tokenizer.ggml.pre', 'default')
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


def _begins(said: Mapping[str, Any], usual: bool) -> bool:
  """Whether texts begin with the beginning-of-sequence token.

  Args:
    usual: whether they do where the file is silent.
  """
  if said.get('tokenizer.ggml.bos_token_id') is None:
    return False
  return bool(said.get('tokenizer.ggml.add_bos_token', usual))


def _start(said: Mapping[str, Any], tokens: list[str]) -> Any:
  from tokenizers import processors

  bos = said['tokenizer.ggml.bos_token_id']
  return processors.TemplateProcessing(
    single=f'{tokens[bos]} $A',
    special_tokens=[(tokens[bos], bos)],
  )

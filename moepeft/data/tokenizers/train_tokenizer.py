# SPDX-License-Identifier: Apache-2.0
"""Trains BPE, WordPiece and Unigram tokenizers on texts.

Tokens are of characters or of bytes. Decoding restores all white space.
"""

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

KINDS = ('bytes', 'bpe', 'wordpiece', 'unigram')
LIBRARIES = ('tokenizers', 'sentencepiece')
PAD, EOS, UNK = '<pad>', '</s>', '<unk>'
BEGIN, END = '<|im_start|>', '<|im_end|>'
# A space within tokens.
_SPACE = '▁'
# In every vocabulary: templates write line breaks even if the texts have none.
_ALPHABET = [_SPACE, '\n', '\t']
CHATML = (
  "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
  "{{ message['content'] }}<|im_end|>\n{% endfor %}"
  '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)


@dataclasses.dataclass(frozen=True)
class TokenizerSpec:
  """The settings of a tokenizer to train.

  Attributes:
    kind: 'bytes' (BPE over bytes: nothing is unknown), 'bpe', 'wordpiece' or
      'unigram'.
    size: the number of tokens, special tokens included.
    extra_ids: sentinels <extra_id_0>, ... at the end, for span corruption.
    chat: whether to add ChatML's tokens and template; its end-of-turn token
      is then the end of sequence.
    library: 'tokenizers', or 'sentencepiece' for unigram.

  Raises:
    ValueError: a setting is unknown, or two do not go together.
  """

  kind: str = 'bytes'
  size: int = 8000
  extra_ids: int = 0
  chat: bool = False
  library: str = 'tokenizers'

  def __post_init__(self):
    for name, value, choices in (
      ('kind', self.kind, KINDS),
      ('library', self.library, LIBRARIES),
    ):
      if value not in choices:
        raise ValueError(
          f'--{name} is one of {", ".join(choices)}; got {value!r}'
        )
    if self.library == 'sentencepiece' and self.kind != 'unigram':
      raise ValueError(
        f'--library=sentencepiece trains --kind=unigram; got {self.kind!r}'
      )
    min_size = len(self.special) + self.extra_ids
    min_size += 256 if self.kind == 'bytes' else 1
    if self.extra_ids < 0 or self.size < min_size:
      raise ValueError(
        f'--size={self.size} has no room for {min_size} pieces, the special '
        f'ones, --extra_ids={self.extra_ids} and the letters; raise it'
      )

  @property
  def eos(self) -> str:
    return END if self.chat else EOS

  @property
  def special(self) -> list[str]:
    """Special tokens in the order of their ids, padding and EOS as in T5."""
    return [PAD, self.eos, UNK, *([BEGIN] if self.chat else [])]

  @property
  def trained_size(self) -> int:
    """The number of tokens without sentinels."""
    return self.size - self.extra_ids


def train(spec: TokenizerSpec, texts: Sequence[str]) -> Any:
  """Trains a `transformers` tokenizer on texts.

  Raises:
    ValueError: there is too little text, it has more different characters than
      the vocabulary has tokens, or sentencepiece is not installed.
  """
  if spec.library == 'sentencepiece':
    tokenizer = _train_sentencepiece(spec, texts)
  else:
    tokenizer = _make_tokenizer(spec)
    try:
      tokenizer.train_from_iterator(
        texts, _make_trainer(spec), length=len(texts)
      )
    except Exception as e:
      # tokenizers raises plain Exceptions.
      if 'not large enough' not in str(e):
        raise
      min_size = len(set(''.join(texts)) | {*_ALPHABET}) + len(spec.special)
      raise ValueError(_too_few_message(spec, min_size)) from None
  if len(tokenizer.get_vocab()) > spec.trained_size:
    raise ValueError(_too_few_message(spec, len(tokenizer.get_vocab())))
  return _to_transformers(spec, tokenizer)


def _too_few_message(spec: TokenizerSpec, min_size: int) -> str:
  return (
    f'the letters of the text and the special ones are {min_size:,} pieces, '
    f'but there is room for {spec.trained_size:,}; raise --size, or train '
    '--kind=bytes'
  )


def _make_tokenizer(spec: TokenizerSpec) -> tokenizers.Tokenizer:
  model = {
    'bytes': models.BPE,
    'bpe': lambda: models.BPE(unk_token=UNK),
    'wordpiece': lambda: models.WordPiece(unk_token=UNK),
    'unigram': models.Unigram,
  }[spec.kind]()
  return _add_processors(spec, tokenizers.Tokenizer(model))


def _add_processors(
  spec: TokenizerSpec, tokenizer: tokenizers.Tokenizer
) -> tokenizers.Tokenizer:
  """Adds the normalizer, pre-tokenizer and decoder to a model."""
  if spec.kind == 'bytes':
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
  tokenizer.normalizer = normalizers.NFKC()
  # No space is added before a text, and other white space becomes tokens of its
  # own, so that decoding restores all white space.
  steps = [
    pre_tokenizers.Metaspace(_SPACE, prepend_scheme='never'),
    pre_tokenizers.Split(tokenizers.Regex(r'\s'), 'isolated'),
  ]
  decoder = decoders.Metaspace(_SPACE, prepend_scheme='never')
  if spec.kind == 'wordpiece':
    # '#' is split off words, so that the '##' of a continuation is not text.
    steps.append(pre_tokenizers.Punctuation('isolated'))
    join = decoders.Replace(tokenizers.Regex('^##'), '')
    decoder = decoders.Sequence([join, decoder])
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
  tokenizer.decoder = decoder
  return tokenizer


def _make_trainer(spec: TokenizerSpec) -> Any:
  alphabet = _ALPHABET
  if spec.kind == 'bytes':
    alphabet = pre_tokenizers.ByteLevel.alphabet()
  shared = dict(
    vocab_size=spec.trained_size,
    special_tokens=spec.special,
    initial_alphabet=alphabet,
    show_progress=False,
  )
  if spec.kind == 'unigram':
    return trainers.UnigramTrainer(unk_token=UNK, **shared)
  if spec.kind == 'wordpiece':
    return trainers.WordPieceTrainer(**shared)
  return trainers.BpeTrainer(**shared)


def _train_sentencepiece(
  spec: TokenizerSpec, texts: Sequence[str]
) -> tokenizers.Tokenizer:
  """Trains a Unigram tokenizer with sentencepiece."""
  try:
    import sentencepiece
  except ImportError:
    raise ValueError(
      '--library=sentencepiece needs that package: pip install sentencepiece, '
      'or use --library=tokenizers'
    ) from None
  # Trained on texts as they are encoded later, with all white space.
  texts = [normalizers.NFKC().normalize_str(text) for text in texts]
  with tempfile.TemporaryDirectory() as folder:
    prefix = os.path.join(folder, 'model')
    try:
      sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=prefix,
        vocab_size=spec.trained_size,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece=PAD,
        eos_piece=spec.eos,
        unk_piece=UNK,
        control_symbols=[BEGIN] if spec.chat else [],
        user_defined_symbols=_ALPHABET[1:],
        normalization_rule_name='identity',
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        # sentencepiece skips longer texts silently.
        max_sentence_length=1 + max(len(text.encode()) for text in texts),
        num_threads=1,
        minloglevel=2,
      )
    except RuntimeError as e:
      raise ValueError(
        f'sentencepiece cannot make {spec.trained_size} pieces of this text '
        f'({str(e).splitlines()[0]}); lower --size or give more text'
      ) from None
    model = sentencepiece.SentencePieceProcessor(model_file=f'{prefix}.model')
  tokens = [
    (model.id_to_piece(i), model.get_score(i)) for i in range(len(model))
  ]
  return _add_processors(spec, tokenizers.Tokenizer(models.Unigram(tokens, 2)))


def _to_transformers(
  spec: TokenizerSpec, tokenizer: tokenizers.Tokenizer
) -> Any:
  # Imported here, as the import takes seconds.
  from transformers import PreTrainedTokenizerFast

  # <extra_id_0> has the last id, as in T5.
  extra = [f'<extra_id_{i}>' for i in reversed(range(spec.extra_ids))]
  tokenizer.add_special_tokens([*spec.special, *extra])
  wrapped = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    pad_token=PAD,
    eos_token=spec.eos,
    unk_token=UNK,
    clean_up_tokenization_spaces=False,
    additional_special_tokens=[*spec.special[3:], *extra],
  )
  if spec.chat:
    wrapped.chat_template = CHATML
  return wrapped

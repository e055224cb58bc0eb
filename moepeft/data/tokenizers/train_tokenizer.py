# SPDX-License-Identifier: Apache-2.0
"""Tokenizers that are trained: BPE, WordPiece and Unigram from texts.

Pieces are of letters or of bytes; decoding gives back every blank and line.
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
# What a blank is in pieces, and letters that every vocabulary has: templates
# write lines, whatever the text has.
_BLANK = '▁'
_LETTERS = [_BLANK, '\n', '\t']
CHATML = (
  "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
  "{{ message['content'] }}<|im_end|>\n{% endfor %}"
  '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)


@dataclasses.dataclass(frozen=True)
class TokenizerSpec:
  """The settings of a tokenizer that is trained.

  Attributes:
    kind: 'bytes' (BPE over bytes: nothing is unknown), 'bpe', 'wordpiece' or
      'unigram'.
    size: pieces, with the special ones.
    extra_ids: sentinels <extra_id_0>, ... at the end, for span corruption.
    chat: whether to add ChatML's tokens and template, whose end of turn is
      then the end of sequence.
    library: 'tokenizers', or 'sentencepiece' for unigram.

  Raises:
    ValueError: it cannot be.
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
    least = len(self.special) + self.extra_ids
    least += 256 if self.kind == 'bytes' else 1
    if self.extra_ids < 0 or self.size < least:
      raise ValueError(
        f'--size={self.size} has no room for {least} pieces, the special ones, '
        f'--extra_ids={self.extra_ids} and the letters; raise it'
      )

  @property
  def eos(self) -> str:
    return END if self.chat else EOS

  @property
  def special(self) -> list[str]:
    """Padding is 0 and the end of sequence 1, as in T5."""
    return [PAD, self.eos, UNK, *([BEGIN] if self.chat else [])]

  @property
  def pieces(self) -> int:
    """Those to be trained, the special ones among them."""
    return self.size - self.extra_ids


def train(form: TokenizerSpec, texts: Sequence[str]) -> Any:
  """A `transformers` tokenizer of a form, trained on texts.

  Raises:
    ValueError: there is too little text, it has more letters than pieces, or
      sentencepiece is not installed.
  """
  if form.library == 'sentencepiece':
    tokenizer = _of_sentencepiece(form, texts)
  else:
    tokenizer = _blank(form)
    try:
      tokenizer.train_from_iterator(texts, _trainer(form), length=len(texts))
    except Exception as e:
      # The library's own class of error is this one.
      if 'not large enough' not in str(e):
        raise
      letters = len(set(''.join(texts)) | set(_LETTERS))
      raise ValueError(_few(form, letters + len(form.special))) from None
  if len(tokenizer.get_vocab()) > form.pieces:
    raise ValueError(_few(form, len(tokenizer.get_vocab())))
  return _wrapped(form, tokenizer)


def _few(form: TokenizerSpec, least: int) -> str:
  return (
    f'the letters of the text and the special ones are {least:,} pieces, but '
    f'there is room for {form.pieces:,}; raise --size, or train --kind=bytes'
  )


def _blank(form: TokenizerSpec) -> tokenizers.Tokenizer:
  model = {
    'bytes': models.BPE,
    'bpe': lambda: models.BPE(unk_token=UNK),
    'wordpiece': lambda: models.WordPiece(unk_token=UNK),
    'unigram': models.Unigram,
  }[form.kind]()
  return _dressed(form, tokenizers.Tokenizer(model))


def _dressed(
  form: TokenizerSpec, tokenizer: tokenizers.Tokenizer
) -> tokenizers.Tokenizer:
  """With what stands before and after the model."""
  if form.kind == 'bytes':
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
  tokenizer.normalizer = normalizers.NFKC()
  # No blank is put before a text and other white space is a piece of its own,
  # so that decoding gives back every blank and line.
  parts = [
    pre_tokenizers.Metaspace(_BLANK, prepend_scheme='never'),
    pre_tokenizers.Split(tokenizers.Regex(r'\s'), 'isolated'),
  ]
  decoder = decoders.Metaspace(_BLANK, prepend_scheme='never')
  if form.kind == 'wordpiece':
    # Without # within words, the mark of pieces that go on is not of the text.
    parts.append(pre_tokenizers.Punctuation('isolated'))
    plain = decoders.Replace(tokenizers.Regex('^##'), '')
    decoder = decoders.Sequence([plain, decoder])
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
  tokenizer.decoder = decoder
  return tokenizer


def _trainer(form: TokenizerSpec) -> Any:
  letters = _LETTERS
  if form.kind == 'bytes':
    letters = pre_tokenizers.ByteLevel.alphabet()
  shared = dict(
    vocab_size=form.pieces,
    special_tokens=form.special,
    initial_alphabet=letters,
    show_progress=False,
  )
  if form.kind == 'unigram':
    return trainers.UnigramTrainer(unk_token=UNK, **shared)
  if form.kind == 'wordpiece':
    return trainers.WordPieceTrainer(**shared)
  return trainers.BpeTrainer(**shared)


def _of_sentencepiece(
  form: TokenizerSpec, texts: Sequence[str]
) -> tokenizers.Tokenizer:
  """Unigram's pieces and scores as sentencepiece finds them."""
  try:
    import sentencepiece
  except ImportError:
    raise ValueError(
      '--library=sentencepiece needs that package: pip install sentencepiece, '
      'or use --library=tokenizers'
    ) from None
  # It sees what is encoded later, every line and blank of it.
  texts = [normalizers.NFKC().normalize_str(text) for text in texts]
  with tempfile.TemporaryDirectory() as folder:
    prefix = os.path.join(folder, 'model')
    try:
      sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=prefix,
        vocab_size=form.pieces,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece=PAD,
        eos_piece=form.eos,
        unk_piece=UNK,
        control_symbols=[BEGIN] if form.chat else [],
        user_defined_symbols=_LETTERS[1:],
        normalization_rule_name='identity',
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        # Longer ones would be left out without a word.
        max_sentence_length=1 + max(len(text.encode()) for text in texts),
        num_threads=1,
        minloglevel=2,
      )
    except RuntimeError as e:
      raise ValueError(
        f'sentencepiece cannot make {form.pieces} pieces of this text '
        f'({str(e).splitlines()[0]}); lower --size or give more text'
      ) from None
    model = sentencepiece.SentencePieceProcessor(model_file=f'{prefix}.model')
  pieces = [
    (model.id_to_piece(i), model.get_score(i)) for i in range(len(model))
  ]
  return _dressed(form, tokenizers.Tokenizer(models.Unigram(pieces, 2)))


def _wrapped(form: TokenizerSpec, tokenizer: tokenizers.Tokenizer) -> Any:
  # Imported here: it costs seconds.
  from transformers import PreTrainedTokenizerFast

  # The first is the last id, as in T5.
  extra = [f'<extra_id_{i}>' for i in reversed(range(form.extra_ids))]
  tokenizer.add_special_tokens([*form.special, *extra])
  wrapped = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    pad_token=PAD,
    eos_token=form.eos,
    unk_token=UNK,
    clean_up_tokenization_spaces=False,
    additional_special_tokens=[*form.special[3:], *extra],
  )
  if form.chat:
    wrapped.chat_template = CHATML
  return wrapped

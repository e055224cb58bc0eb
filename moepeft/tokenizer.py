# SPDX-License-Identifier: Apache-2.0
"""python -m moepeft.tokenizer --text=PATH --output=DIR: trains a tokenizer.

BPE (arXiv:1508.07909), the same over bytes, WordPiece, or Unigram
(arXiv:1804.10959), from plain text, into a directory that Hugging Face's
AutoTokenizer reads and that config.data.vocabulary names.
"""

import dataclasses
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import tokenizers
from absl import flags
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from moepeft import command
from moepeft.data import documents
from moepeft.data.documents import Document

KINDS = ('bytes', 'bpe', 'wordpiece', 'unigram')
LIBRARIES = ('tokenizers', 'sentencepiece')
PAD, EOS, UNK = '<pad>', '</s>', '<unk>'
BEGIN, END = '<|im_start|>', '<|im_end|>'
CHATML = (
  "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
  "{{ message['content'] }}<|im_end|>\n{% endfor %}"
  '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)


@dataclasses.dataclass(frozen=True)
class Form:
  """What is trained.

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
    for name, value, known in (
      ('kind', self.kind, KINDS),
      ('library', self.library, LIBRARIES),
    ):
      if value not in known:
        raise ValueError(
          f'--{name} is one of {", ".join(known)}; got {value!r}'
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


def train(form: Form, texts: Sequence[str]) -> Any:
  """A `transformers` tokenizer of a form, trained on texts.

  Raises:
    ValueError: there is too little text, or sentencepiece is not installed.
  """
  if form.library == 'sentencepiece':
    made = _of_sentencepiece(form, texts)
  else:
    made = _blank(form)
    made.train_from_iterator(texts, _trainer(form), length=len(texts))
  return _wrapped(form, made)


def _blank(form: Form) -> tokenizers.Tokenizer:
  model = {
    'bytes': models.BPE,
    'bpe': lambda: models.BPE(unk_token=UNK),
    'wordpiece': lambda: models.WordPiece(unk_token=UNK),
    'unigram': models.Unigram,
  }[form.kind]()
  return _dressed(form, tokenizers.Tokenizer(model))


def _dressed(form: Form, made: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
  """With what stands before and after the model."""
  if form.kind == 'bytes':
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made
  made.normalizer = normalizers.NFKC()
  if form.kind == 'wordpiece':
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
  else:
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
  return made


def _trainer(form: Form) -> Any:
  shared = dict(
    vocab_size=form.pieces, special_tokens=form.special, show_progress=False
  )
  if form.kind == 'unigram':
    return trainers.UnigramTrainer(unk_token=UNK, **shared)
  if form.kind == 'wordpiece':
    return trainers.WordPieceTrainer(**shared)
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  return trainers.BpeTrainer(
    initial_alphabet=alphabet if form.kind == 'bytes' else [], **shared
  )


def _of_sentencepiece(form: Form, texts: Sequence[str]) -> tokenizers.Tokenizer:
  """Unigram's pieces and scores as sentencepiece finds them."""
  try:
    import sentencepiece
  except ImportError:
    raise ValueError(
      '--library=sentencepiece needs that package: pip install sentencepiece, '
      'or use --library=tokenizers'
    ) from None
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


def _wrapped(form: Form, made: tokenizers.Tokenizer) -> Any:
  # Imported here: it costs seconds.
  from transformers import PreTrainedTokenizerFast

  # The first is the last id, as in T5.
  extra = [f'<extra_id_{i}>' for i in reversed(range(form.extra_ids))]
  made.add_special_tokens([*form.special, *extra])
  found = PreTrainedTokenizerFast(
    tokenizer_object=made,
    pad_token=PAD,
    eos_token=form.eos,
    unk_token=UNK,
    additional_special_tokens=[*form.special[3:], *extra],
  )
  if form.chat:
    found.chat_template = CHATML
  return found


def passages(found: Sequence[Document]) -> Iterator[str]:
  """Each with what separates it from the next."""
  for document in found:
    for passage in document.passages:
      yield passage + document.separator


@dataclasses.dataclass(frozen=True)
class Fit:
  """How texts come out: tokens a word and a byte, the share unknown."""

  per_word: float
  per_byte: float
  unknown: float

  def __str__(self) -> str:
    return (
      f'{self.per_word:.3f} tokens a word, {self.per_byte:.3f} a byte, '
      f'{self.unknown:.2%} unknown'
    )


def fit(tokenizer: Any, texts: Sequence[str]) -> Fit:
  """Of texts that it was not trained on."""
  ids = tokenizer(list(texts), add_special_tokens=False)['input_ids']
  tokens = sum(map(len, ids))
  unknown = sum(row.count(tokenizer.unk_token_id) for row in ids)
  return Fit(
    tokens / max(sum(len(text.split()) for text in texts), 1),
    tokens / max(sum(len(text.encode()) for text in texts), 1),
    unknown / max(tokens, 1),
  )


def make(form: Form, path: str, output: str, held_out: float) -> list[str]:
  """Trains, writes a directory and says how it fits what it did not see.

  Raises:
    ValueError: no text, or the directory holds something.
  """
  output = os.path.expanduser(output)
  if os.path.isdir(output) and os.listdir(output):
    raise ValueError(f'{output!r} is not empty; name another with --output')
  if not 0 < held_out < 1:
    raise ValueError(
      f'--held_out is a share above 0 and below 1; got {held_out}'
    )
  texts = list(passages(documents.read(path)[0]))
  cut = len(texts) - max(1, round(len(texts) * held_out))
  if not cut:
    raise ValueError(
      f'{path} holds one passage; expected at least two, one to train on and '
      'one to look at'
    )
  found = train(form, texts[:cut])
  os.makedirs(output, exist_ok=True)
  found.save_pretrained(output)
  lines = [f'{cut:,} passages read; {len(texts) - cut:,} held out']
  if len(found) < form.size:
    lines.append(
      f'the text has no more than {len(found):,} of --size={form.size:,} pieces'
    )
  lines.append(f'{form.kind}, {len(found):,} pieces, on held-out text:')
  lines.append(f'  {fit(found, texts[cut:])}')
  lines.append(f'wrote {output}: --config.data.vocabulary={output}')
  return lines


def main(argv) -> None:
  del argv
  if not _TEXT.value or not _OUTPUT.value:
    raise ValueError(
      '--text names a file or directory of plain text, --output the directory '
      'to write; give both'
    )
  form = Form(
    _KIND.value, _SIZE.value, _EXTRA_IDS.value, _CHAT.value, _LIBRARY.value
  )
  lines = make(form, _TEXT.value, _OUTPUT.value, _HELD_OUT.value)
  print('\n'.join(lines))


if __name__ == '__main__':
  _TEXT = flags.DEFINE_string('text', None, 'A .txt or .jsonl, or many.')
  _OUTPUT = flags.DEFINE_string('output', None, 'A directory to write.')
  _KIND = flags.DEFINE_string('kind', 'bytes', f'One of {", ".join(KINDS)}.')
  _SIZE = flags.DEFINE_integer('size', 8000, 'Pieces, special ones included.')
  _EXTRA_IDS = flags.DEFINE_integer(
    'extra_ids', 0, 'Sentinels for span corruption; T5 has 100.'
  )
  _CHAT = flags.DEFINE_bool('chat', False, "Add ChatML's tokens and template.")
  _LIBRARY = flags.DEFINE_string(
    'library', 'tokenizers', f'One of {", ".join(LIBRARIES)}.'
  )
  _HELD_OUT = flags.DEFINE_float(
    'held_out', 0.05, 'The share of passages that is looked at only.'
  )
  command.run(main)

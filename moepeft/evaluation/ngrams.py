# SPDX-License-Identifier: Apache-2.0
"""N-gram language models, a baseline for models that are pretrained here.

N-grams of the training text predict a run's validation rows. Losses are means
over the same targets as the run's, in nats.

N-grams are smoothed by interpolated Kneser-Ney (Chen and Goodman, 1999, An
empirical study of smoothing techniques for language modeling), with one
discount per order. Like the model they have no context before a row. With span
corruption their context is the original text to the left, which the model has
to combine from its inputs and its own targets, and the end of a span is
predicted from its length so far.
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

_MIN_DISCOUNT, _MAX_DISCOUNT = 0.1, 0.9


@dataclasses.dataclass(frozen=True)
class PredictedText:
  """A text with a mask of the tokens that are predicted.

  Attributes:
    ids: int [n].
    predicted: bool [n], True on the targets.
    spans: the lengths of noise spans, whose ends are targets, too.
    constant: the number of targets that are the same in every row.
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
  """Raw or continuation counts of the n-grams of one order.

  Attributes:
    grams: [grams], the count of each n-gram.
    totals: [contexts], the sum of the counts of each context's n-grams.
    kinds: [contexts], the number of different tokens after each context.
    discount: subtracted from each count.
  """

  grams: np.ndarray
  totals: np.ndarray
  kinds: np.ndarray
  discount: float

  def p(self, grams: np.ndarray, contexts: np.ndarray, lower: np.ndarray):
    """Interpolated probabilities of tokens.

    Args:
      grams, contexts: indices of each token's n-gram and context; -1 if it was
        not counted.
      lower: the probability of each token given the next shorter context.
    """
    totals = _take(self.totals, contexts)
    discounted = np.maximum(_take(self.grams, grams) - self.discount, 0)
    backoff = self.discount * _take(self.kinds, contexts) * lower
    return np.where(
      totals > 0, (discounted + backoff) / np.maximum(totals, 1), lower
    )


def _make_counts(contexts: np.ndarray, grams: np.ndarray) -> _Counts:
  """Makes the counts of n-grams from their context indices and counts."""
  once, twice = ((grams == n).sum() for n in (1, 2))
  discount = once / max(once + 2 * twice, 1)
  return _Counts(
    grams,
    np.bincount(contexts, grams),
    np.bincount(contexts, grams > 0),
    # With few counts it may be 0, and then unseen n-grams have p = 0.
    float(np.clip(discount, _MIN_DISCOUNT, _MAX_DISCOUNT)),
  )


def _take(values: np.ndarray, indices: np.ndarray) -> np.ndarray:
  """values[indices], 0 for indices out of range."""
  valid = (indices >= 0) & (indices < len(values))
  return np.where(valid, values[np.where(valid, indices, 0)], 0)


class NGrams:
  """Models p(token | up to n - 1 tokens before it in its row)."""

  def __init__(self, rows: Sequence[np.ndarray], order: int, size: int):
    """
    Args:
      rows: the training rows, int [n] each.
      order: the largest n, if a row is that long.
      size: the size of the vocabulary.
    """
    tokens, positions = _concatenate(rows)
    self._size = size
    # For each n: ascending codes of n-grams (context * size + token), and
    # their counts; for each n but the largest: continuation counts, of the
    # different tokens before an n-gram.
    self._codes, self._raw, self._continuation = [], [], []
    grams = np.zeros(len(tokens), np.int64)
    for n in range(1, order + 1):
      contexts = _contexts(grams, positions, n)
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
        counts_before = np.bincount(
          grams[has_context][first], minlength=len(shorter)
        )
        self._continuation.append(_make_counts(shorter // size, counts_before))
      self._codes.append(codes)
      self._raw.append(_make_counts(codes // size, counts))
      grams = np.full(len(tokens), -1, np.int64)
      grams[has_context] = inverse

  def log_p(self, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """log p of all tokens of the rows, in order, for n of 1, 2, ..."""
    tokens, positions = _concatenate(rows)
    lower = np.full(len(tokens), 1 / self._size)
    grams, by_order = np.zeros(len(tokens), np.int64), []
    for n, (codes, raw) in enumerate(
      zip(self._codes, self._raw, strict=True), 1
    ):
      contexts = _contexts(grams, positions, n)
      gram_codes = contexts * self._size + tokens
      indices = np.minimum(np.searchsorted(codes, gram_codes), len(codes) - 1)
      is_counted = (contexts >= 0) & (codes[indices] == gram_codes)
      grams = np.where(is_counted, indices, -1)
      p = raw.p(grams, contexts, lower)
      # The first n - 1 tokens of a row keep the p of a lower order.
      by_order.append(
        np.where(positions >= n - 1, p, by_order[-1]) if by_order else p
      )
      if n <= len(self._continuation):
        lower = self._continuation[n - 1].p(grams, contexts, lower)
    return [np.log(p) for p in by_order]


def _concatenate(
  rows: Sequence[np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
  """(tokens of all rows, position of each token in its row)."""
  positions = np.concatenate([np.arange(len(row)) for row in rows])
  return np.concatenate(rows).astype(np.int64), positions


def _contexts(grams: np.ndarray, positions: np.ndarray, n: int) -> np.ndarray:
  """The index of the (n - 1)-gram before each token; -1 if there is none."""
  if n == 1:
    return np.zeros(len(positions), np.int64)
  previous = np.concatenate([[-1], grams[:-1]])
  return np.where(positions >= n - 1, previous, -1)


def span_end_probs(lengths: Sequence[int], max_length: int) -> np.ndarray:
  """p [max_length] that a span of at least 1, 2, ... tokens ends there.

  One span that ends and one that continues are added to each count.
  """
  counts = np.bincount(lengths, minlength=max_length + 1)
  at_least = counts[::-1].cumsum()[::-1]
  return ((counts + 1) / (at_least + 2))[1 : max_length + 1]


def span_ends_nll(lengths: Sequence[int], p: np.ndarray) -> float:
  """-log p of the lengths of spans, in nats, summed."""
  log_continues = np.concatenate([[0], np.log1p(-p).cumsum()])
  last = np.asarray(lengths, int) - 1
  return -float((log_continues[last] + np.log(p)[last]).sum())


def losses(
  train: Sequence[PredictedText],
  rows: Sequence[PredictedText],
  order: int,
  size: int,
) -> list[float]:
  """Nats per target of n-grams with n of 1 to `order`."""
  grams = NGrams([row.ids for row in train], order, size)
  targets = sum(row.targets for row in rows)
  predicted = np.concatenate([row.predicted for row in rows])
  train_spans = [n for row in train for n in row.spans]
  held_out_spans = [n for row in rows for n in row.spans]
  span_ends = 0.0
  if held_out_spans:
    max_length = max(held_out_spans + train_spans)
    span_ends = span_ends_nll(
      held_out_spans, span_end_probs(train_spans, max_length)
    )
  return [
    float((span_ends - log_p[predicted].sum()) / targets)
    for log_p in grams.log_p([row.ids for row in rows])
  ]


def predicted_text(
  item: Sample | Sequence[Sequence[int]],
  pretraining_objective: str,
  sentinels: Sequence[int],
) -> PredictedText:
  """The text of a training item, with a mask of its targets.

  Args:
    item: a Sample, or ids of inputs and of targets.
  """
  if pretraining_objective == 'spans':
    if isinstance(item, Sample):
      item = item.ids[~item.loss_mask], item.ids[item.loss_mask]
    ids, is_noise = spans.restore(*item[:2], sentinels)
    # The first target is always the first sentinel.
    return PredictedText(ids, is_noise, spans.lengths(is_noise), constant=1)
  if isinstance(item, Sample):
    # No token precedes the first one, so it is never predicted.
    return PredictedText(
      item.ids, item.loss_mask & (np.arange(len(item.ids)) > 0)
    )
  # Without the EOS of the inputs.
  inputs, targets = np.asarray(item[0])[:-1], np.asarray(item[1])
  ids = np.concatenate([inputs, targets])
  return PredictedText(ids, np.arange(len(ids)) >= len(inputs))


def baseline(config: ConfigDict, order: int) -> tuple[int, list[float]]:
  """(number of targets, nats per target of 1-grams, 2-grams, ...).

  Raises:
    ValueError: the config's source is not plain text, or no text is held out.
  """
  data = config.data
  if not READERS.lookup(data.source).is_plain_text:
    raise ValueError(
      'n-grams are counted in plain text; give a config with config.data.source'
      f"='text', it is {data.source!r}"
    )
  tokenizer = load_tokenizer(data.tokenizer, config.model.path)
  _, shape = base_lib.shape(config.model)
  collator = make_model_collator(data, tokenizer, shape, config.seed)
  training_data = open_data(
    data, config.seed, vocab_size=shape.vocab, collator=collator
  )
  validation = validation_rows(config, training_data, collator)
  if not validation:
    raise ValueError(
      'no text is held out; raise config.data.validation_fraction'
    )
  chunks, _ = text_dataset.read_chunks(
    data, collator, data.path, shape.vocab
  ).split(data.validation_fraction)
  sentinels = tokenizer.sentinels(shape.vocab)
  train, rows = (
    [
      predicted_text(item, data.pretraining_objective, sentinels)
      for item in items
    ]
    for items in (chunks.fixed_items(config.seed), validation)
  )
  nats = losses(train, rows, order, tokenizer.size)
  return sum(row.targets for row in rows), nats

# SPDX-License-Identifier: Apache-2.0
"""The reader of SeqIO tasks and mixtures, cached or registered."""

from ml_collections import ConfigDict

from moepeft.data import t0_mixtures
from moepeft.data.dataset import TrainingData
from moepeft.data.readers import seqio_cache, seqio_stream
from moepeft.data.readers.reader import DataReader, ReadContext
from moepeft.data.readers.seqio_stream import SeqioStream


def open_seqio(data: ConfigDict, context: ReadContext) -> TrainingData:
  """Opens a directory of cached tasks, or a registered task or mixture.

  Raises:
    ValueError: config.data has neither, or the data cannot be read.
  """
  notes = ()
  is_cached = not data.mixture or (
    data.mixture in t0_mixtures.MIXTURES
    and not seqio_stream.is_registered(data.mixture)
  )
  if data.path and is_cached:
    rates = None
    if data.mixture:
      sizes = seqio_cache.sizes(data.path, data.split)
      pairs = {(name, ''): size for name, size in sizes.items()}
      mixture = t0_mixtures.mixture_rates(data.mixture, pairs)
      notes = tuple(mixture.notes(data.mixture))
      rates = {task: rate for (task, _), rate in mixture.rates.items()}
    provider = seqio_cache.mixture(data.path, rates, data.split)
  elif data.mixture:
    caches = [data.path] if data.path else []
    provider = seqio_stream.find_registered(data.mixture, caches)
  else:
    raise ValueError(
      'set config.data.mixture to a registered SeqIO task or mixture, or '
      'config.data.path to a directory of cached tasks'
    )
  stream = SeqioStream(
    provider,
    data.inputs_length,
    data.targets_length,
    seed=context.seed,
    split=data.split,
    shard=context.shard,
    vocab_size=context.vocab_size,
  )
  return TrainingData(
    train=None,
    shares=stream.rates(),
    notes=notes,
    open_stream=stream.examples,
    read_held_out=stream.validation,
  )


READER = DataReader(
  open_seqio,
  config_keys=(
    *('data.path', 'data.split', 'data.mixture', 'data.truncation'),
  ),
)

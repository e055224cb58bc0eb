# SPDX-License-Identifier: Apache-2.0
"""Where training examples come from, by config.

What is trained on is endless. Apart from SeqIO's streams it is random-access:
item i is the same example at every call, whatever was read before it.
"""

import collections
import dataclasses
import os

import grain
from ml_collections import ConfigDict

from moepeft import tasks
from moepeft.core.files import local_path
from moepeft.data import mixing, replay, split, t0_mixtures
from moepeft.data.batching.collators import Collator
from moepeft.data.batching.decoder_only import CausalCollator
from moepeft.data.chat import dataset as chat_dataset
from moepeft.data.dataset import TrainingData
from moepeft.data.example import ExampleRows
from moepeft.data.preference import dataset as preference_dataset
from moepeft.data.readers import (
  huggingface,
  jsonl,
  promptsource,
  seqio_cache,
  seqio_stream,
)
from moepeft.data.readers.seqio_stream import SeqioStream
from moepeft.data.text import dataset as text_dataset
from moepeft.tasks import Example

SOURCES = (
  *('tasks', 'jsonl', 'datasets', 'seqio', 'text', 'chat'),
  preference_dataset.SOURCE,
)
_ENDLESS = 1 << 60


def open_data(
  data: ConfigDict,
  seed: int,
  shard: tuple[int, int] = (0, 1),
  below: int = 0,
  own: Collator | None = None,
) -> TrainingData:
  """Opens config.data.

  Args:
    shard: (this host, hosts), which streams of SeqIO are divided by.
    below: the size of the model's vocabulary, which ids of SeqIO are checked
      against; 0 for no check.
    own: the form of the model's batches, which text is cut up for.

  Raises:
    ValueError: an unknown source, path, task family or mixture, or rows that
      are not of the form.
  """
  if data.source not in SOURCES:
    raise ValueError(
      f'config.data.source is one of {", ".join(SOURCES)}; got {data.source!r}'
    )
  mixed = bool(data.replay or data.replay_rate)
  if mixed:
    replay.check_replay(data)
  found = _opened(data, seed, shard, below, own)
  return replay.mix_in_text(found, data, seed, own, below) if mixed else found


def _opened(
  data: ConfigDict,
  seed: int,
  shard: tuple[int, int],
  below: int,
  own: Collator | None,
) -> TrainingData:
  """What config.data.source names."""
  if data.source == 'tasks':
    return _tasks(data.tasks, seed)
  if data.source == 'seqio':
    return _seqio(data, seed, shard, below)
  if data.source == preference_dataset.SOURCE:
    return preferences(
      preference_dataset.read_preferences(data, own), data, seed
    )
  if data.source == 'text':
    return _text(data, seed, own, below)
  if data.source == 'chat':
    return _chat(data, seed, own)
  if not data.path:
    raise ValueError(
      'set config.data.path to '
      + (
        '.jsonl rows, or a directory of them'
        if data.source == 'jsonl'
        else 'a name on the hub, or local files'
      )
    )
  if data.source == 'jsonl':
    rows = jsonl.read(
      data.path, on_bad_row=data.on_bad_row, ignore=data.ignore_fields
    )
  else:
    rows = huggingface.read(
      *(data.path, data.split, data.templates, data.on_bad_row),
      *(seed, data.ignore_fields),
    )
  return _of_rows(rows, data, seed)


def _tasks(group: str, seed: int) -> TrainingData:
  names = tasks.task_names(group)
  counts = collections.Counter(names)
  return TrainingData(
    train=grain.MapDataset.source(Drawn(names, seed)),
    shares={name: count / len(names) for name, count in counts.items()},
    held_out=tasks.examples(
      names, 32 * len(names), seed=seed, split='held_out'
    ),
  )


@dataclasses.dataclass(frozen=True)
class Drawn:
  """Embedded tasks, drawn when they are asked for."""

  names: tuple[str, ...]
  seed: int

  def __len__(self) -> int:
    return _ENDLESS

  def __getitem__(self, place: int) -> Example:
    return tasks.example(self.names, place, seed=self.seed)


def _of_rows(rows: ExampleRows, data: ConfigDict, seed: int) -> TrainingData:
  """Rows split by `idx`, grouped by dataset and mixed at the config's rates."""
  train, held_out = jsonl.split_by_idx(rows, data.validation_fraction)
  groups = collections.defaultdict(list)
  for row in train:
    groups[(row.task, row.template) if data.mixture else row.task].append(row)
  sizes = {name: len(group) for name, group in groups.items()}
  notes = list(rows.notes(data.path))
  if data.mixture:
    original = promptsource.original_prompts(
      data.templates, {dataset for dataset, _ in sizes}
    )
    found = t0_mixtures.mixture_rates(data.mixture, sizes, original)
    notes += found.notes(data.mixture)
    weights = {_joined(*pair): rate for pair, rate in found.rates.items()}
    groups = {_joined(*pair): groups[pair] for pair in found.rates}
  else:
    weights = mixing.mixing_rates(
      sizes, data.max_examples_per_task, data.temperature
    )
  return TrainingData(
    train=mixing.mix(groups, weights, seed),
    shares=mixing.normalize(weights),
    rows=train,
    held_out=held_out,
    notes=tuple(notes),
  )


def _text(
  data: ConfigDict, seed: int, own: Collator, below: int
) -> TrainingData:
  """Plain text, cut up for the model."""
  if not data.path:
    raise ValueError(
      'set config.data.path to a .txt file, to .jsonl rows with a text, or to '
      'a directory of them'
    )
  found = text_dataset.read_chunks(data, own, data.path, below)
  train, held_out = found.split(data.validation_fraction)
  name = _called(data.path)
  return TrainingData(
    train=found.prepared(mixing.mix({name: train}, {}, seed), seed),
    shares={name: 1.0},
    held_out=found.fixed(held_out, seed),
    notes=found.notes,
  )


def preferences(
  found: preference_dataset.PreferenceDataset, data: ConfigDict, seed: int
) -> TrainingData:
  """Compared or judged answers, which are ids already.

  Raises:
    ValueError: config.data.validation_fraction leaves nothing to train on.
  """
  train, held_out = found.split(data.validation_fraction)
  name = _called(data.path)
  return TrainingData(
    train=mixing.mix({name: train}, {}, seed),
    shares={name: 1.0},
    held_out=held_out,
    notes=found.notes,
    compared=found,
  )


def _chat(data: ConfigDict, seed: int, own: Collator) -> TrainingData:
  """Conversations, the last of each file held out: see `held.last`."""
  if not isinstance(own, CausalCollator):
    raise ValueError(
      "config.data.source='chat' is of decoder-only models; give an "
      'encoder-decoder rows with inputs and targets'
    )
  if not data.path:
    raise ValueError(
      'set config.data.path to a .json or .jsonl file of conversations, or to '
      'a directory of them'
    )
  found, notes = chat_dataset.read_chats(data, own.tokenizer, *own.max_lengths)
  train, held_out = {}, []
  for file, some in found.items():
    out = split.hold_out_last(
      [talk.asked for talk in some], data.validation_fraction
    )
    kept = [talk.sample for talk, o in zip(some, out, strict=True) if not o]
    train |= {_within(data.path, file): kept} if kept else {}
    held_out += [talk.sample for talk, o in zip(some, out, strict=True) if o]
  if not train:
    raise ValueError(
      f'config.data.validation_fraction={data.validation_fraction} leaves no '
      'row to train on; lower '
      'it'
    )
  weights = mixing.mixing_rates(
    {file: len(some) for file, some in train.items()}
  )
  return TrainingData(
    train=mixing.mix(train, weights, seed),
    shares=mixing.normalize(weights),
    held_out=held_out,
    notes=notes,
  )


def _called(path: str) -> str:
  """The last part of a path: the order of rows is of names, and a file that
  is moved keeps it."""
  return os.path.basename(os.path.normpath(path)) or path


def _within(path: str, file: str) -> str:
  """What a file below a path is called, or the path's own file."""
  inside = os.path.relpath(file, local_path(path))
  if inside.startswith(os.pardir):
    return file
  return _called(path) if inside == os.curdir else inside


def _joined(dataset: str, template: str) -> str:
  return f'{dataset}/{template}'


def _seqio(
  data: ConfigDict, seed: int, shard: tuple[int, int], below: int
) -> TrainingData:
  """A directory of cached tasks, or what is registered under a name."""
  notes = ()
  cached = data.path and not data.module
  if cached and (not data.mixture or data.mixture in t0_mixtures.MIXTURES):
    rates = None
    if data.mixture:
      sizes = seqio_cache.sizes(data.path, data.split)
      pairs = {(name, ''): size for name, size in sizes.items()}
      found = t0_mixtures.mixture_rates(data.mixture, pairs)
      notes = tuple(found.notes(data.mixture))
      rates = {task: rate for (task, _), rate in found.rates.items()}
    provider = seqio_cache.mixture(data.path, rates, data.split)
  elif data.mixture:
    caches = [data.path] if data.path else []
    provider = seqio_stream.find_registered(data.mixture, data.module, caches)
  else:
    raise ValueError(
      'set config.data.mixture to a registered SeqIO task or mixture, or '
      'config.data.path to a directory of cached tasks'
    )
  stream = SeqioStream(
    provider,
    data.inputs_length,
    data.targets_length,
    seed=seed,
    split=data.split,
    shard=shard,
    below=below,
  )
  return TrainingData(train=stream, shares=stream.rates(), notes=notes)

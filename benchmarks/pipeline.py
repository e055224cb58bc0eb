# SPDX-License-Identifier: Apache-2.0
"""The data pipeline against SeqIO's: packed real tokens a second, as a ratio.

python benchmarks/pipeline.py [--data=FILE] [--json=FILE]

Both sides begin with the same file of rows in P3's form, shuffle, tokenize to
bytes, pack and batch, and hand over NumPy arrays; opening the file is in the
time. They take turns in one process, after a round of each that is not
counted. SeqIO has its defaults and parallel calls tuned by tf.data; it has no
reader of JSON, so lines are parsed many at a time. Needs `moepeft[seqio]`.
"""

import itertools
import json
import os
import statistics
import tempfile
import time

import numpy as np
from absl import app, flags, logging

from moepeft import config as config_lib
from moepeft import data, tasks
from moepeft.data.readers.seqio_stream import FEATURES, import_seqio

_DATA = flags.DEFINE_string(
  'data', None, 'Rows in P3 form, .jsonl or .jsonl.gz; default: made ones.'
)
_INPUTS = flags.DEFINE_integer('inputs_length', 512, 'Of packed rows, in ids.')
_TARGETS = flags.DEFINE_integer('targets_length', 64, 'The same of targets.')
_BATCH = flags.DEFINE_integer('batch_size', 32, 'Packed rows in a batch.')
_BATCHES = flags.DEFINE_integer('batches', 500, 'Timed in a round, a side.')
_ROUNDS = flags.DEFINE_integer('rounds', 3, 'Rounds that are counted.')
_WORKERS = flags.DEFINE_integer('workers', 0, 'As config.data.num_workers.')
_JSON = flags.DEFINE_string('json', None, 'Where to write the figures.')
_MADE_ROWS = 20_000
# Lines that SeqIO's side parses in one call.
_LINES = 1024


def moepeft_examples(path):
  """Yields (inputs [b, s], targets [b, t]) of moepeft's loader."""
  c = config_lib.default().data
  c.source, c.path, c.validation_fraction = 'jsonl', path, 0.0
  c.tokenizer, c.packing, c.num_workers = 'bytes', True, _WORKERS.value
  c.inputs_length, c.targets_length = _INPUTS.value, _TARGETS.value
  words = data.load_tokenizer(c.tokenizer)
  batches = data.make_loader(
    data.open_data(c, 0), words, c, _BATCH.value, seed=0
  )
  try:
    for batch in batches:
      yield batch['inputs'], batch['targets']
  finally:
    batches.close()


def seqio_examples(path):
  """Yields the same of SeqIO's task, packed by its feature converter."""
  seqio, tf = import_seqio()
  compression = 'GZIP' if path.endswith('.gz') else ''
  feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
  task = seqio.Task(
    'rows',
    seqio.FileDataSource(
      lambda file: tf.data.TextLineDataset(file, compression),
      {'train': path},
    ),
    preprocessors=[
      parse_lines,
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos,
    ],
    output_features=dict.fromkeys(FEATURES, feature),
  )
  dataset = seqio.get_dataset(
    task,
    {'inputs': _INPUTS.value, 'targets': _TARGETS.value},
    seqio.EncDecFeatureConverter(pack=True),
    shuffle=True,
    num_epochs=None,
    seed=0,
    batch_size=_BATCH.value,
  )
  for batch in dataset.prefetch(tf.data.AUTOTUNE).as_numpy_iterator():
    yield batch['encoder_input_tokens'], batch['decoder_target_tokens']


def parse_lines(dataset):
  """Lines of JSON to texts, the fastest of the ways that were tried.

  A call of Python for every line is slower, and so is a generator.
  """
  _, tf = import_seqio()

  def parse(lines):
    rows = [json.loads(line) for line in lines]
    return [
      np.array([row[s].encode() for row in rows], object) for s in FEATURES
    ]

  def texts(lines):
    columns = tf.numpy_function(parse, [lines], [tf.string, tf.string])
    for side in columns:
      side.set_shape([None])
    return dict(zip(FEATURES, columns, strict=True))

  parsed = dataset.batch(_LINES).map(texts, num_parallel_calls=tf.data.AUTOTUNE)
  return parsed.unbatch()


def made_rows():
  """A file of embedded tasks, for who has no P3."""
  names = tasks.task_names('ABC')
  file = os.path.join(tempfile.mkdtemp(), 'tasks.jsonl')
  with open(file, 'w') as f:
    for e in tasks.examples(names, _MADE_ROWS, seed=0):
      row = {'dataset': e.task, 'inputs': e.inputs, 'targets': e.targets}
      f.write(json.dumps(row) + '\n')
  return file


def measure(side, path, batches):
  """Real tokens a second, and the share of padding in inputs and targets."""
  real, places = np.zeros(2), np.zeros(2)
  start = time.perf_counter()
  opened = side(path)
  for batch in itertools.islice(opened, batches):
    real += [np.count_nonzero(ids) for ids in batch]
    places += [ids.size for ids in batch]
  seconds = time.perf_counter() - start
  opened.close()
  return real.sum() / seconds, 1 - real / places


def main(argv) -> None:
  del argv
  logging.set_verbosity(logging.ERROR)
  path = os.path.expanduser(_DATA.value or made_rows())
  sides = {'ours': moepeft_examples, 'seqio': seqio_examples}
  speeds, waste = {side: [] for side in sides}, {}
  for number in range(_ROUNDS.value + 1):
    for name, side in sides.items():
      speed, waste[name] = measure(side, path, _BATCHES.value)
      if number:
        speeds[name].append(speed)
  ratios = [a / b for a, b in zip(speeds['ours'], speeds['seqio'], strict=True)]
  report = {
    'ours_over_seqio': round(statistics.median(ratios), 3),
    'least': round(min(ratios), 3),
    'most': round(max(ratios), 3),
  }
  for name, (inputs, targets) in waste.items():
    report |= {
      f'{name}_inputs_padding': round(float(inputs), 4),
      f'{name}_targets_padding': round(float(targets), 4),
    }
  print(json.dumps(report, indent=2))
  if _JSON.value:
    with open(_JSON.value, 'w') as f:
      json.dump(report, f, indent=2)


if __name__ == '__main__':
  app.run(main)

# SPDX-License-Identifier: Apache-2.0
"""Registers the embedded tasks in SeqIO when it is imported.

Each task has the name `moepeft_<task>`, such as `moepeft_storage`. Each group
is a mixture with equal rates: `moepeft_a`, `moepeft_b` and `moepeft_c`. The
split 'train' is the first TRAIN examples of a task's stream with seed 0, and
'validation' the first VALIDATION examples with held-out instances and training
templates. SeqIO's ByteVocabulary has the ids of
`moepeft.data.tokenizers.tokenizer.ByteTokenizer`. Needs `moepeft[seqio]`.
"""

import functools

try:
  import seqio
  import tensorflow as tf
except ImportError as e:
  raise ImportError(
    f"SeqIO cannot be imported ({e}); pip install 'moepeft[seqio]'"
  ) from None

from moepeft.tasks import GROUPS, TASKS, example, task_names

TRAIN = 10_000
VALIDATION = 1_000
# SeqIO's split -> (moepeft's split, number of examples).
_SPLITS = {'train': ('train', TRAIN), 'validation': ('held_out', VALIDATION)}


def accuracy(targets, predictions) -> dict[str, float]:
  """Returns the exact match in percent, ignoring white space at the ends.

  moepeft's own accuracy differs: it ranks the choices of an example.
  """
  is_correct = [
    target.strip() == prediction.strip()
    for target, prediction in zip(targets, predictions, strict=True)
  ]
  return {'accuracy': 100 * sum(is_correct) / max(len(is_correct), 1)}


def dataset(
  split: str, shuffle_files: bool, seed: int | None = None, *, name: str
) -> tf.data.Dataset:
  """Returns the texts `inputs` and `targets`, and `idx`, not shuffled."""
  del shuffle_files, seed
  instances, count = _SPLITS[split]

  def rows():
    for i in range(count):
      e = example((name,), i, seed=0, split=instances)
      yield {'inputs': e.inputs, 'targets': e.targets, 'idx': i}

  text = tf.TensorSpec((), tf.string)
  return tf.data.Dataset.from_generator(
    rows,
    output_signature={
      'inputs': text,
      'targets': text,
      'idx': tf.TensorSpec((), tf.int32),
    },
  )


def _register() -> None:
  feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
  for name in TASKS:
    seqio.TaskRegistry.add(
      f'moepeft_{name}',
      seqio.FunctionDataSource(
        functools.partial(dataset, name=name),
        splits=tuple(_SPLITS),
        num_input_examples={s: count for s, (_, count) in _SPLITS.items()},
      ),
      preprocessors=[
        seqio.preprocessors.tokenize,
        seqio.CacheDatasetPlaceholder(),
        seqio.preprocessors.append_eos,
      ],
      output_features={'inputs': feature, 'targets': feature},
      metric_fns=[accuracy],
    )
  for group in GROUPS:
    seqio.MixtureRegistry.add(
      f'moepeft_{group.lower()}',
      [f'moepeft_{name}' for name in task_names(group)],
      default_rate=1.0,
    )


_register()

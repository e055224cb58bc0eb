# SPDX-License-Identifier: Apache-2.0
"""Task ids and embeddings of a batch, for routers that read them.

Tasks have names (`moepeft.moe.task_names`). An embedding is a vector that an
example has in the data; a mixture with `reads='embedding'` routes by it.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moepeft.core.ranges import suggestion
from moepeft.moe.task_names import task_names
from moepeft.nn.adapter_hook import AdapterMap
from moepeft.tasks import Example

# A packed row has at most one example in this many tokens, where routers read
# embeddings: the array of its embeddings has a fixed size.
_TOKENS_PER_EXAMPLE = 8


class ExampleInputs(NamedTuple):
  """The inputs of routers that belong to one example.

  Attributes:
    task: the id of its task, from 1; 0 where no router reads tasks.
    embedding: float32 [i]; None where no router reads embeddings.
  """

  task: int = 0
  embedding: np.ndarray | None = None


NO_INPUTS = ExampleInputs()


def embedding_size(adapter_map: AdapterMap) -> int:
  """The size of the embeddings that mixtures read; 0 for none.

  Raises:
    ValueError: mixtures read embeddings of different sizes.
  """
  sizes = {getattr(a, 'embedding_size', 0) for _, a in adapter_map.entries}
  sizes -= {0}
  if len(sizes) > 1:
    raise ValueError(
      'all mixtures of a method or a server read the same embeddings; got '
      f'embedding_size={" and ".join(map(str, sorted(sizes)))}'
    )
  return max(sizes, default=0)


@dataclasses.dataclass(frozen=True)
class RouterInputs:
  """The inputs of a method's routers that belong to examples.

  Attributes:
    tasks: the names of the tasks that have ids, () where no router reads them.
    embedding_size: i of the embeddings, 0 where no router reads them.
  """

  tasks: tuple[str, ...] = ()
  embedding_size: int = 0

  @classmethod
  def of_method(cls, adapter_map: AdapterMap) -> 'RouterInputs':
    """
    Raises:
      ValueError: routers read different lists of tasks, or embeddings of
        different sizes.
    """
    return cls(task_names(adapter_map), embedding_size(adapter_map))

  def of_example(self, example: Example) -> ExampleInputs:
    """
    Raises:
      ValueError: the routers have no id for the example's task, or it has no
        embedding of their size.
    """
    return ExampleInputs(self._task_id(example.task), self._embedding(example))

  def _task_id(self, name: str) -> int:
    if not self.tasks:
      return 0
    if name not in self.tasks:
      raise ValueError(
        f"an example is of the task {name!r}, and the method's router has ids "
        f"for {', '.join(self.tasks)} alone; add it to the router's option "
        f'`tasks`, or leave its rows out{suggestion(name, self.tasks)}'
      )
    return self.tasks.index(name) + 1

  def _embedding(self, example: Example) -> np.ndarray | None:
    size, embedding = self.embedding_size, example.embedding
    if not size:
      return None
    if embedding is None or len(embedding) != size:
      actual = (
        'no embedding'
        if embedding is None
        else f'an embedding of {len(embedding)} numbers'
      )
      raise ValueError(
        f'an example of the task {example.task!r} (idx {example.idx}) has '
        f"{actual}, and the method's router reads one of {size}; give each row "
        f"a list of {size} numbers in 'embedding', as scripts/embed_rows.py "
        'does, or change embedding_size or reads of the method'
      )
    return embedding

  def with_counts(
    self, lengths: np.ndarray, capacity: Sequence[int]
  ) -> tuple[np.ndarray, Sequence[int]]:
    """(lengths, capacity) of `packing.shuffled_bins`, with one more if a row
    has a limited number of examples."""
    if not self.embedding_size:
      return lengths, capacity
    counts = np.ones(len(lengths), np.int64)
    most = _most_examples(capacity[0])
    return np.column_stack([lengths, counts]), (*capacity, most)

  def add(
    self,
    rows: dict[str, np.ndarray],
    items: Sequence[ExampleInputs],
    bins: Sequence[Sequence[int]] | None = None,
  ) -> dict[str, np.ndarray]:
    """Rows with the inputs of the routers.

    These are int32 <side>_tasks [b, t], the id of each token's example and 0 on
    padding; and float32 embeddings [b, m, i], those of a row's examples in
    their order.

    Args:
      rows: a collator's `pad` or `pack`.
      items: of each example.
      bins: indices of each row's examples; by default row i has example i.

    Raises:
      ValueError: an example has no task or no embedding.
    """
    single = bins is None
    if single:
      bins = [[i] for i in range(len(items))]
    if self.tasks:
      rows = _with_task_ids(rows, [item.task for item in items], bins)
    if self.embedding_size:
      if any(item.embedding is None for item in items):
        raise ValueError(_ABSENT.format('embedding'))
      most = 1 if single else _most_examples(rows['inputs'].shape[1])
      shape = (len(bins), most, self.embedding_size)
      embeddings = np.zeros(shape, np.float32)
      for row, indices in enumerate(bins):
        for place, index in enumerate(indices):
          embeddings[row, place] = items[index].embedding
      rows = {**rows, 'embeddings': embeddings}
    return rows


_ABSENT = (
  "the method's router reads the {} of each example, and rows of "
  'config.data.source have none; use a source whose rows have inputs, targets '
  'and this field, or another router'
)


def _most_examples(length: int) -> int:
  return max(length // _TOKENS_PER_EXAMPLE, 1)


def _with_task_ids(
  rows: dict[str, np.ndarray],
  ids: Sequence[int],
  bins: Sequence[Sequence[int]],
) -> dict[str, np.ndarray]:
  if not all(ids):
    raise ValueError(_ABSENT.format('task'))
  rows = dict(rows)
  # A decoder's targets are its inputs, shifted, so one array serves both.
  sides = ('inputs', 'targets') if 'decoder_inputs' in rows else ('inputs',)
  for side in sides:
    segments = rows.get(f'{side}_segments', rows[f'{side}_mask'])
    # Column k is the task of segment k.
    segment_tasks = np.zeros((len(bins), max(map(len, bins)) + 1), np.int32)
    for row, items in enumerate(bins):
      segment_tasks[row, 1 : len(items) + 1] = [ids[item] for item in items]
    rows[f'{side}_tasks'] = np.take_along_axis(
      segment_tasks, segments.astype(np.int32), axis=1
    )
  return rows

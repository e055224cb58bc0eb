# SPDX-License-Identifier: Apache-2.0
"""The single adapter of a model, or none, in place of an adapter pool."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moepeft.core.types import Array, Tree
from moepeft.data.batching.router_inputs import embedding_size
from moepeft.inference.adapters.served_modules import (
  check_decodes,
  experts_per_layer,
  reads_prompt,
  request_tasks,
)
from moepeft.inference.api import LoadedAdapter, UnknownAdapter
from moepeft.peft.prefix import model_prefix_ids


@dataclasses.dataclass(frozen=True, eq=False)
class AcquiredAdapter:
  """An adapter in use by a request, which must release it.

  Attributes:
    row: int32 [buckets], the slot in each bucket; 0 is the base. Constant until
      the release.
    sha256: hash of the adapter's content, a cache key; '' for the base.
    bucket: the name of its bucket; '' for the base.
    sites: {key in the 'peft' tree: paths of the target modules}; the bucket may
      have more.
    soft_prompt_ids: the placeholder ids of its soft prompt, which precede every
      prompt.
    tasks: the names of tasks, of which a request has to name one; () if it
      names none.
    reads_prompt: whether a router reads the whole prompt.
    embedding_size: the size of the embedding that a request has to give; 0 if
      it gives none.
    experts_per_layer: {path of a target module: the mixture's option}, where it
      is set.
  """

  row: np.ndarray
  sha256: str = ''
  bucket: str = ''
  sites: Mapping[str, frozenset[str]] = dataclasses.field(default_factory=dict)
  soft_prompt_ids: tuple[int, ...] = ()
  tasks: tuple[str, ...] = ()
  reads_prompt: bool = False
  embedding_size: int = 0
  experts_per_layer: Mapping[str, tuple[int, ...] | str] = dataclasses.field(
    default_factory=dict
  )


class FixedAdapter:
  """A pool of one adapter, with the methods that an engine calls.

  Every request uses the model's own adapter; no other can be loaded.
  """

  bytes = 0

  def __init__(self, model: Any, peft: Tree | None = None):
    """
    Args:
      model: the Flax module, with its adapter_map.
      peft: the collection 'peft'; None for a model without adapters.
    """
    self.adapter_map, self.tree = (
      model.adapter_map,
      {'model': peft} if peft else {},
    )
    sites: dict[str, set[str]] = {}
    for path, module in model.adapter_map.entries:
      check_decodes(module, path)
      sites.setdefault(module.name, set()).add(path)
    self._acquired = AcquiredAdapter(
      np.zeros(0, np.int32),
      sites={name: frozenset(paths) for name, paths in sites.items()},
      soft_prompt_ids=model_prefix_ids(model),
      tasks=request_tasks(model.adapter_map),
      reads_prompt=any(
        reads_prompt(adapter) for _, adapter in model.adapter_map.entries
      ),
      embedding_size=embedding_size(model.adapter_map),
      experts_per_layer=experts_per_layer(model.adapter_map),
    )

  def row_tree(
    self, tree: Tree, slots: Array, layer: Array | None = None
  ) -> Tree:
    """The 'peft' tree of a row, which is the same for all rows.

    Args:
      layer: int32 scalar, to select one layer of leaves [l, ...].
    """
    del slots
    tree = tree.get('model', {})
    return tree if layer is None else jax.tree.map(lambda a: a[layer], tree)

  def replace(self, peft: Tree) -> None:
    """Replaces the arrays by others of the same shapes."""
    self.tree = {'model': peft}

  def acquire(self, name: str) -> AcquiredAdapter:
    """Returns the model's adapter.

    Raises:
      UnknownAdapter: the name is not ''.
    """
    if name:
      raise UnknownAdapter(_NONE.format(name))
    return self._acquired

  def release(self, acquired: AcquiredAdapter) -> None:
    """Does nothing; the adapter is never evicted."""

  def loaded(self) -> Sequence[LoadedAdapter]:
    return ()

  def read(self, path: str) -> Any:
    raise ValueError(
      'the server was started without adapter slots; start it with --form and '
      f'the method of the adapter to load {path!r}'
    )

  def put(self, name: str, adapter: Any) -> LoadedAdapter:
    return self.read(name)

  def unload(self, name: str) -> None:
    raise UnknownAdapter(_NONE.format(name))


_NONE = 'there is no adapter {!r}; only the base is served'

# SPDX-License-Identifier: Apache-2.0
"""The one adapter that a model was built with, or none, in place of a pool."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moepeft.core.types import Array, Tree
from moepeft.inference.adapters.served_modules import check_decodes
from moepeft.inference.api import LoadedAdapter, UnknownAdapter
from moepeft.peft.prefix import model_prefix_ids


@dataclasses.dataclass(frozen=True, eq=False)
class AcquiredAdapter:
  """An adapter that a request uses; it must be released.

  Attributes:
    row: int32 [buckets], the slot of each bucket; 0 is the base. Constant
      until the release.
    sha256: hash of the adapter's content, a cache key; '' for the base.
    bucket: name of its bucket; '' for the base.
    sites: {entry in the tree: the site paths where the adapter acts}; its
      bucket may have more.
    soft_prompt_ids: placeholder ids of its soft prompt, put before every text.
  """

  row: np.ndarray
  sha256: str = ''
  bucket: str = ''
  sites: Mapping[str, frozenset[str]] = dataclasses.field(default_factory=dict)
  soft_prompt_ids: tuple[int, ...] = ()


class FixedAdapter:
  """The part of `AdapterPool` that an engine calls, for one model as it is.

  Every request has the model's own adapter; none can be loaded.
  """

  bytes = 0

  def __init__(self, model: Any, peft: Tree | None = None):
    """
    Args:
      model: its adapter_map acts in every request.
      peft: the collection of that name; None of a model without adapters.
    """
    self.adapter_map, self.tree = (
      model.adapter_map,
      {'model': peft} if peft else {},
    )
    sites: dict[str, set[str]] = {}
    for path, module in model.adapter_map.entries:
      check_decodes(module)
      sites.setdefault(module.name, set()).add(path)
    self._acquired = AcquiredAdapter(
      np.zeros(0, np.int32),
      sites={name: frozenset(paths) for name, paths in sites.items()},
      soft_prompt_ids=model_prefix_ids(model),
    )

  def row_tree(
    self, tree: Tree, slots: Array, layer: Array | None = None
  ) -> Tree:
    """The 'peft' tree of a row: the same for all of them.

    Args:
      layer: int32 scalar, where leaves are [l, ...] and one l is wanted.
    """
    del slots
    tree = tree.get('model', {})
    return tree if layer is None else jax.tree.map(lambda a: a[layer], tree)

  def replace(self, peft: Tree) -> None:
    """Takes other values of the same arrays."""
    self.tree = {'model': peft}

  def acquire(self, name: str) -> AcquiredAdapter:
    """
    Raises:
      UnknownAdapter: a name is given.
    """
    if name:
      raise UnknownAdapter(_NONE.format(name))
    return self._acquired

  def release(self, acquired: AcquiredAdapter) -> None:
    """Does nothing: there is always room for the one adapter."""

  def loaded(self) -> Sequence[LoadedAdapter]:
    return ()

  def read(self, path: str) -> Any:
    raise ValueError(
      f'the server was started without room for adapters; start it with the '
      f'forms that it shall take (--form) to load {path!r}'
    )

  def put(self, name: str, adapter: Any) -> LoadedAdapter:
    return self.read(name)

  def unload(self, name: str) -> None:
    raise UnknownAdapter(_NONE.format(name))


_NONE = 'there is no adapter {!r}; the base is all that is served'

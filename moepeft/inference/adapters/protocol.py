# SPDX-License-Identifier: Apache-2.0
"""What the engine asks of adapter banks, and those of a server without
adapters."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from moepeft.core.types import Array, Tree
from moepeft.inference.api import LoadedAdapter, UnknownAdapter
from moepeft.nn.adapter_hook import AdapterMap


class Held(Protocol):
  """An adapter in use.

  Attributes:
    row: int32 [forms], which adapter of each form; 0 is none.
    sha256: of its content, '' of the base's.
    sites: {entry in the tree: the sites where it acts}.
    before: ids that its soft prompt puts before every text.
  """

  row: np.ndarray
  sha256: str
  sites: Mapping[str, frozenset[str]]
  before: tuple[int, ...]


class Banks(Protocol):
  """Adapters of several forms, those of a form stacked, z on axis 0.

  Attributes:
    adapter_map: of the model that computes with them.
    tree: {form: 'peft' of all of its adapters}; the shapes never change.
    bytes: of the tree.
  """

  @property
  def adapter_map(self) -> AdapterMap: ...

  @property
  def tree(self) -> Tree: ...

  @property
  def bytes(self) -> int: ...

  def row_tree(
    self, tree: Tree, slots: Array, layer: Array | None = None
  ) -> Tree:
    """'peft' of one row; pure, called inside of programs.

    Args:
      tree: as `tree`.
      slots: int32 [forms], of the names in order.
      layer: int32 scalar, where leaves are [z, l, ...] and one l is wanted.
    """

  def hold(self, name: str) -> Held:
    """An adapter, '' for the base, which stays until it is released.

    Raises:
      Unknown: there is none of that name.
      Full: too many others are held.
    """

  def release(self, held: Held) -> None: ...

  def loaded(self) -> Sequence[LoadedAdapter]: ...

  def read(self, path: str) -> Any:
    """The part of loading that may take long; on any thread."""

  def put(self, name: str, read: Any) -> LoadedAdapter:
    """The rest of it."""

  def unload(self, name: str) -> None: ...


@dataclasses.dataclass(frozen=True, eq=False)
class _Base:
  """No adapter."""

  row: np.ndarray
  sha256: str = ''
  sites: Mapping[str, frozenset[str]] = dataclasses.field(default_factory=dict)
  before: tuple[int, ...] = ()


class NoBanks:
  """The base alone."""

  adapter_map = AdapterMap()
  tree: Tree = {}
  bytes = 0

  def row_tree(
    self, tree: Tree, slots: Array, layer: Array | None = None
  ) -> Tree:
    return {}

  def hold(self, name: str) -> Held:
    if name:
      raise UnknownAdapter(_NONE.format(name))
    return _Base(np.zeros(0, np.int32))

  def release(self, held: Held) -> None:
    pass

  def loaded(self) -> Sequence[LoadedAdapter]:
    return ()

  def read(self, path: str) -> Any:
    raise ValueError(
      f'the server was started without room for adapters; start it with the '
      f'forms that it shall take (--form) to load {path!r}'
    )

  def put(self, name: str, read: Any) -> LoadedAdapter:
    return self.read(name)

  def unload(self, name: str) -> None:
    raise UnknownAdapter(_NONE.format(name))


_NONE = 'there is no adapter {!r}; the base is all that is served'

# SPDX-License-Identifier: Apache-2.0
"""The pool of adapters that one program serves, many in a batch.

Adapters of one bucket (`moepeft.inference.adapters.buckets`) are 'peft' trees
of the same paths and shapes, stacked on an axis z in front of all others. Slot
0 is the base, bit for bit. A row of a batch takes one slot of every bucket; all
but one of them are slot 0. Loading writes a slot, so no program is compiled
again.
"""

import dataclasses
import threading
from collections.abc import Mapping, Sequence

import numpy as np

from moepeft.checkpoints.base import Base
from moepeft.core import memory
from moepeft.core.types import Tree
from moepeft.inference.adapters import pad, stacking
from moepeft.inference.adapters.buckets import (
  Bucket,
  adapter_map_of,
  bucket_of,
  merge_buckets,
)
from moepeft.inference.adapters.fixed import AcquiredAdapter
from moepeft.inference.adapters.load import TrainedAdapter, read_adapter
from moepeft.inference.adapters.lru import LruSlots
from moepeft.inference.adapters.pad import Layout, PaddedAdapter
from moepeft.inference.api import LoadedAdapter, UnknownAdapter
from moepeft.peft import build

# Slots of a bucket, that of the base among them.
SLOTS = 9


@dataclasses.dataclass
class _Content:
  """An adapter by its hash, and the names under which it is loaded."""

  padded: PaddedAdapter
  names: set[str]

  @property
  def bucket(self) -> str:
    return self.padded.bucket


class AdapterPool:
  """The adapters of a server; any thread may call, and takes turns.

  Loaded adapters stay on the host, as they were trained and as a slot holds
  them, which no budget counts. The slots are for those that requests use, and
  for as many others as fit; the one used longest ago is evicted first, and an
  evicted one is written again when a request names it.

  Attributes:
    buckets: in the order of a row's slots.
    adapter_map: for the model: all buckets, nested.
  """

  row_tree = staticmethod(stacking.row_tree)

  def __init__(
    self,
    base: Base,
    adapters: Mapping[str, str] | None = None,
    texts: Sequence[str] = (),
    slots: int = SLOTS,
    budget: int | None = None,
    semantics: str = 'official',
  ):
    """Makes buckets that hold all that is named, and loads it.

    Args:
      base: with its weights.
      adapters: {name: path}.
      texts: methods whose adapters may come later: 'lora(rank=16)'.
      slots: limit for each bucket, the slot of the base among them.
      budget: bytes that all buckets may take: it lowers `slots`.
      semantics: decides the options that `texts` leave open.

    Raises:
      ValueError: an adapter cannot be served, or the budget is too small for
        two slots of each bucket.
    """
    self._base, self._sites = base, base.family.sites(base.config)
    self._lock = threading.RLock()
    self._max_slots, self._budget = slots, budget
    self._loaded: dict[str, LoadedAdapter] = {}
    self._contents: dict[str, _Content] = {}
    trained = {
      name: read_adapter(path, base) for name, path in (adapters or {}).items()
    }
    self._required = [adapter.bucket for adapter in trained.values()]
    self._required += [self._bucket_of(text, semantics) for text in texts]
    self._make()
    for name, adapter in trained.items():
      self.put(name, self._pad(adapter))

  @property
  def tree(self) -> Tree:
    """{bucket: leaves [z, ...]}; never changed in place, so a step may keep
    it."""
    return self._tree

  @property
  def bytes(self) -> int:
    """Memory of all slots, empty ones included."""
    return self._slots_each * sum(map(pad.slot_bytes, self._layouts.values()))

  def bucket(self, name: str) -> Bucket:
    return next(bucket for bucket in self.buckets if bucket.name == name)

  def add_bucket(self, text: str, semantics: str = 'official') -> None:
    """Makes the slots again, with a bucket for another method's adapters.

    `adapter_map` changes, so programs compiled before do not fit: call it
    before the start.

    Raises:
      ValueError: the method cannot be served, or requests are under way.
    """
    with self._lock:
      if self._in_use():
        raise ValueError('requests are under way; add forms before the start')
      self._required.append(self._bucket_of(text, semantics))
      self._make()
      for content in self._contents.values():
        content.padded = self._pad(content.padded.adapter)

  def load(self, name: str, path: str) -> LoadedAdapter:
    """Reads an adapter and puts it under a name; running requests continue
    with the one that they have.

    Raises:
      ValueError: it cannot be read, is another base's, or fits no bucket; what
        was loaded stays.
    """
    return self.put(name, self.read(path))

  def read(self, path: str) -> PaddedAdapter:
    """The part of `load` that takes long, for another thread."""
    return self._pad(read_adapter(path, self._base))

  def put(self, name: str, padded: PaddedAdapter) -> LoadedAdapter:
    """The part of `load` that writes a slot, if one is not in use.

    Raises:
      ValueError: the name is empty.
    """
    if not name:
      raise ValueError("an adapter needs a name; '' is the base's")
    with self._lock:
      adapter, sha256 = padded.adapter, padded.adapter.sha256
      previous = self._loaded.get(name)
      if sha256 not in self._contents:
        self._contents[sha256] = _Content(padded, set())
        if self._slots[padded.bucket].has_room():
          self._write(sha256)
      self._contents[sha256].names.add(name)
      self._loaded[name] = LoadedAdapter(
        name,
        adapter.built.method,
        sha256,
        pad.slot_bytes(self._layouts[padded.bucket]),
        adapter.source,
        len(adapter.soft_prompt_ids),
      )
      if previous and previous.sha256 != sha256:
        self._remove_name(name, previous.sha256)
      return self._loaded[name]

  def unload(self, name: str) -> None:
    """Removes a name at once, its slot once no request uses it.

    Raises:
      UnknownAdapter: there is no such adapter.
    """
    with self._lock:
      self._remove_name(name, self._find(name).sha256)
      del self._loaded[name]

  def loaded(self) -> list[LoadedAdapter]:
    with self._lock:
      return [self._loaded[name] for name in sorted(self._loaded)]

  def acquire(self, name: str) -> AcquiredAdapter:
    """An adapter for one request, written to a slot if it was evicted.

    Args:
      name: '' for the base.

    Raises:
      UnknownAdapter: there is no such adapter.
      EngineFull: requests use every slot of its bucket.
    """
    row = np.zeros(len(self.buckets), np.int32)
    if not name:
      return AcquiredAdapter(row)
    with self._lock:
      sha256 = self._find(name).sha256
      content = self._contents[sha256]
      slots = self._slots[content.bucket]
      if sha256 not in slots:
        self._write(sha256)
      slots.acquire(sha256)
      names = [bucket.name for bucket in self.buckets]
      row[names.index(content.bucket)] = slots[sha256]
      return AcquiredAdapter(
        row,
        sha256,
        content.bucket,
        self._sites_of(sha256),
        content.padded.adapter.soft_prompt_ids,
      )

  def release(self, acquired: AcquiredAdapter) -> None:
    """Ends one use of what `acquire` gave."""
    if not acquired.bucket:
      return
    with self._lock:
      self._slots[acquired.bucket].release(acquired.sha256)
      self._remove_unused(acquired.sha256)

  def row(self, name: str) -> np.ndarray:
    """int32 [buckets]: an adapter's slots now; it may be evicted from them.

    Raises: as `acquire`.
    """
    acquired = self.acquire(name)
    self.release(acquired)
    return acquired.row

  def _bucket_of(self, text: str, semantics: str) -> Bucket:
    return bucket_of(build(text, self._sites, semantics), repr(text))

  def _make(self) -> None:
    """Makes the buckets, with the identity in every slot."""
    self.buckets = merge_buckets(self._required, self._sites)
    self.adapter_map = adapter_map_of(self.buckets)
    self._layouts = pad.bucket_layouts(
      self.buckets, self.adapter_map, self._base
    )
    self._slots_each = self._slot_count()
    self._slots = {name: LruSlots(self._slots_each) for name in self._layouts}
    self._tree = {
      name: self._empty(layout) for name, layout in self._layouts.items()
    }

  def _slot_count(self) -> int:
    """The number of each bucket's slots."""
    size = sum(map(pad.slot_bytes, self._layouts.values()))
    count = self._max_slots
    if self._budget is not None and size:
      count = min(count, self._budget // size)
    if count < 2:
      raise ValueError(
        f'a bank needs two slots, the base and one adapter: {2 * size:,} bytes '
        f'for {self._methods()}; got slots={self._max_slots} and a budget of '
        f'{self._budget}: raise them, or name fewer adapters and forms'
      )
    memory.check_arrays(
      count * size,
      f'{count:,} slots each for adapters of {self._methods()}',
      '--adapter_slots, or set --adapter_bytes',
    )
    return count

  def _empty(self, layout: Layout) -> Tree:
    """A bucket's arrays with the identity in every slot."""
    identity = pad.identity_tree(layout)
    copies = stacking.stack_copies(identity, self._slots_each)
    # Compiled here, not under traffic.
    return stacking.write_slot(copies, np.int32(0), identity)

  def _pad(self, adapter: TrainedAdapter) -> PaddedAdapter:
    for bucket in self.buckets:
      if bucket.holds(adapter.bucket):
        layout = self._layouts[bucket.name]
        return pad.pad_to_bucket(adapter, bucket, layout, self._base)
    raise ValueError(
      f'{adapter.source} is {adapter.built.method!r}, which fits none of the '
      f'forms that this server was started with ({self._methods()}); start it '
      f'with --form={adapter.built.method!r} too'
    )

  def _sites_of(self, sha256: str) -> dict[str, frozenset[str]]:
    padded = self._contents[sha256].padded
    # The adapter's own parts have names of their own, in the same order.
    return {
      part.name: frozenset(trained.sites)
      for part, trained in zip(
        self.bucket(padded.bucket).parts,
        padded.adapter.bucket.parts,
        strict=True,
      )
    }

  def _methods(self) -> str:
    return ', '.join(bucket.method for bucket in self.buckets) or 'none'

  def _find(self, name: str) -> LoadedAdapter:
    if name not in self._loaded:
      raise UnknownAdapter(
        f'there is no adapter {name!r}; there are '
        f'{", ".join(sorted(self._loaded)) or "none"}'
      )
    return self._loaded[name]

  def _write(self, sha256: str) -> None:
    """Writes a content to a slot of its bucket."""
    padded = self._contents[sha256].padded
    slots, arrays = self._slots[padded.bucket], self._tree[padded.bucket]
    slot = np.int32(slots.take(sha256))
    try:
      arrays = stacking.write_slot(arrays, slot, padded.tree)
    except BaseException:
      # Else the next to ask would be served what lies there still.
      slots.drop(sha256)
      raise
    self._tree = self._tree | {padded.bucket: arrays}

  def _remove_name(self, name: str, sha256: str) -> None:
    """Takes one of a content's names away."""
    self._contents[sha256].names.discard(name)
    self._remove_unused(sha256)

  def _remove_unused(self, sha256: str) -> None:
    """Removes a content that has no name and no user."""
    content = self._contents[sha256]
    slots = self._slots[content.bucket]
    if not content.names and not slots.users(sha256):
      slots.drop(sha256)
      del self._contents[sha256]

  def _in_use(self) -> bool:
    return any(
      self._slots[content.bucket].users(sha256)
      for sha256, content in self._contents.items()
    )

# SPDX-License-Identifier: Apache-2.0
"""The adapter pool: many adapters served in one batch.

The adapters of a bucket (`moepeft.inference.adapters.buckets`) are 'peft' trees
with the same paths and shapes, stacked on a leading slot axis z. Slot 0
computes exactly the base model. A row of a batch has a slot in every bucket;
all but one of them are slot 0. Loading an adapter writes a slot and compiles
nothing.
"""

import dataclasses
import threading
from collections.abc import Mapping, Sequence

import numpy as np

from moepeft.checkpoints.base import Base
from moepeft.core import memory
from moepeft.core.types import Tree
from moepeft.data.batching.router_inputs import embedding_size
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
from moepeft.inference.adapters.served_modules import (
  experts_per_layer,
  reads_prompt,
  request_tasks,
  router_entry,
)
from moepeft.inference.api import LoadedAdapter, UnknownAdapter
from moepeft.peft import build

# The number of slots of a bucket, slot 0 included.
DEFAULT_SLOTS = 9


@dataclasses.dataclass
class _PooledAdapter:
  """An adapter, and the names under which it is loaded."""

  padded: PaddedAdapter
  names: set[str]

  @property
  def bucket(self) -> str:
    return self.padded.bucket


class AdapterPool:
  """The adapters of a server; its methods are thread-safe.

  Loaded adapters stay in host memory, which the budget does not limit. Adapters
  in use have a slot on the device, and the other slots keep the most recently
  used ones. A request for an evicted adapter writes it to a slot again.

  Attributes:
    buckets: the buckets, in the order of a row's slots.
    adapter_map: the model's adapter map, with the adapters of all buckets.
  """

  row_tree = staticmethod(stacking.row_tree)

  def __init__(
    self,
    base: Base,
    adapters: Mapping[str, str] | None = None,
    methods: Sequence[str] = (),
    slots: int = DEFAULT_SLOTS,
    budget: int | None = None,
    semantics: str = 'official',
  ):
    """Makes the buckets, and loads the adapters.

    Args:
      base: the base model, with its weights.
      adapters: {name: path} of the adapters to load.
      methods: methods of adapters to be loaded later, such as 'lora(rank=16)'.
      slots: the maximum number of slots of each bucket, slot 0 included.
      budget: the maximum number of bytes of all buckets; it lowers `slots`.
      semantics: decides the options that `methods` leave unset.

    Raises:
      ValueError: an adapter cannot be served, or the budget is too small for
        two slots in each bucket.
    """
    self._base, self._sites = base, base.family.sites(base.config)
    self._lock = threading.RLock()
    self._max_slots, self._budget = slots, budget
    self._loaded: dict[str, LoadedAdapter] = {}
    self._by_sha256: dict[str, _PooledAdapter] = {}
    trained = {
      name: read_adapter(path, base) for name, path in (adapters or {}).items()
    }
    self._required_buckets = [adapter.bucket for adapter in trained.values()]
    self._required_buckets += [
      self._make_bucket(text, semantics) for text in methods
    ]
    self._make_buckets()
    for name, adapter in trained.items():
      self.put(name, self._pad(adapter))

  @property
  def tree(self) -> Tree:
    """{bucket: 'peft' tree, [z, ...] each}; never changed in place."""
    return self._tree

  @property
  def bytes(self) -> int:
    """Device memory of all slots, empty slots included."""
    return self._slots_per_bucket * sum(
      map(pad.slot_bytes, self._layouts.values())
    )

  def bucket(self, name: str) -> Bucket:
    return next(bucket for bucket in self.buckets if bucket.name == name)

  def add_bucket(self, text: str, semantics: str = 'official') -> None:
    """Adds a bucket for the adapters of another method, and empties all slots.

    `adapter_map` changes, so this must be called before the engine starts.

    Raises:
      ValueError: the method cannot be served, or requests use adapters.
    """
    with self._lock:
      if self._in_use():
        raise ValueError('requests use adapters; add buckets before the start')
      self._required_buckets.append(self._make_bucket(text, semantics))
      self._make_buckets()
      for pooled in self._by_sha256.values():
        pooled.padded = self._pad(pooled.padded.adapter)

  def load(self, name: str, path: str) -> LoadedAdapter:
    """Reads an adapter, and adds or replaces it under a name.

    Running requests keep the adapter with which they started.

    Raises:
      ValueError: the adapter cannot be read, belongs to another base, or fits
        no bucket; the loaded adapters do not change.
    """
    return self.put(name, self.read(path))

  def read(self, path: str) -> PaddedAdapter:
    """Reads an adapter; the slow part of `load`."""
    return self._pad(read_adapter(path, self._base))

  def put(self, name: str, padded: PaddedAdapter) -> LoadedAdapter:
    """Adds or replaces an adapter; writes it to a slot if one is not in use.

    Raises:
      ValueError: the name is empty.
    """
    if not name:
      raise ValueError("an adapter needs a name; '' is the base's")
    with self._lock:
      adapter, sha256 = padded.adapter, padded.adapter.sha256
      previous = self._loaded.get(name)
      if sha256 not in self._by_sha256:
        self._by_sha256[sha256] = _PooledAdapter(padded, set())
        if self._slots[padded.bucket].has_free():
          self._write(sha256)
      self._by_sha256[sha256].names.add(name)
      self._loaded[name] = LoadedAdapter(
        name,
        adapter.built.method,
        sha256,
        pad.slot_bytes(self._layouts[padded.bucket]),
        adapter.source,
        len(adapter.soft_prompt_ids),
        request_tasks(adapter.built.adapter_map),
        embedding_size(adapter.built.adapter_map),
        any(router_entry(a) for _, a in adapter.built.adapter_map.entries),
      )
      if previous and previous.sha256 != sha256:
        self._remove_name(name, previous.sha256)
      return self._loaded[name]

  def unload(self, name: str) -> None:
    """Removes a name now, and its slot when no request uses it.

    Raises:
      UnknownAdapter: no adapter has this name.
    """
    with self._lock:
      self._remove_name(name, self._find(name).sha256)
      del self._loaded[name]

  def loaded(self) -> list[LoadedAdapter]:
    with self._lock:
      return [self._loaded[name] for name in sorted(self._loaded)]

  def acquire(self, name: str) -> AcquiredAdapter:
    """Acquires an adapter for a request; writes it to a slot if necessary.

    Args:
      name: the adapter's name; '' for the base.

    Raises:
      UnknownAdapter: no adapter has this name.
      EngineFull: requests use every slot of the adapter's bucket.
    """
    row = np.zeros(len(self.buckets), np.int32)
    if not name:
      return AcquiredAdapter(row)
    with self._lock:
      sha256 = self._find(name).sha256
      pooled = self._by_sha256[sha256]
      slots = self._slots[pooled.bucket]
      if sha256 not in slots:
        self._write(sha256)
      slots.acquire(sha256)
      names = [bucket.name for bucket in self.buckets]
      row[names.index(pooled.bucket)] = slots[sha256]
      adapter_map = pooled.padded.adapter.built.adapter_map
      return AcquiredAdapter(
        row,
        sha256,
        pooled.bucket,
        self._sites_of(sha256),
        pooled.padded.adapter.soft_prompt_ids,
        self._loaded[name].tasks,
        any(reads_prompt(a) for _, a in adapter_map.entries),
        self._loaded[name].embedding_size,
        experts_per_layer(adapter_map),
      )

  def release(self, acquired: AcquiredAdapter) -> None:
    """Releases an adapter that `acquire` returned."""
    if not acquired.bucket:
      return
    with self._lock:
      self._slots[acquired.bucket].release(acquired.sha256)
      self._remove_unused(acquired.sha256)

  def row(self, name: str) -> np.ndarray:
    """An adapter's present slot in each bucket, int32 [buckets].

    Raises:
      UnknownAdapter, EngineFull: see `acquire`.
    """
    acquired = self.acquire(name)
    self.release(acquired)
    return acquired.row

  def _make_bucket(self, text: str, semantics: str) -> Bucket:
    return bucket_of(build(text, self._sites, semantics), repr(text))

  def _make_buckets(self) -> None:
    """Makes the buckets, with the base in every slot."""
    self.buckets = merge_buckets(self._required_buckets, self._sites)
    self.adapter_map = adapter_map_of(self.buckets)
    self._layouts = pad.bucket_layouts(
      self.buckets, self.adapter_map, self._base
    )
    self._slots_per_bucket = self._slot_count()
    self._slots = {
      name: LruSlots(self._slots_per_bucket) for name in self._layouts
    }
    self._tree = {
      name: self._empty(layout) for name, layout in self._layouts.items()
    }

  def _slot_count(self) -> int:
    """The number of slots that each bucket gets."""
    size = sum(map(pad.slot_bytes, self._layouts.values()))
    count = self._max_slots
    if self._budget is not None and size:
      count = min(count, self._budget // size)
    if count < 2:
      raise ValueError(
        f'a bucket needs two slots, for the base and one adapter; that is '
        f'{2 * size:,} bytes '
        f'for {self._methods()}; got slots={self._max_slots} and a budget of '
        f'{self._budget}: raise them, or name fewer adapters and methods'
      )
    memory.check_arrays(
      count * size,
      f'{count:,} slots each for adapters of {self._methods()}',
      '--adapter_slots, or set --adapter_bytes',
    )
    return count

  def _empty(self, layout: Layout) -> Tree:
    """Makes a bucket's arrays with the base in every slot."""
    identity = pad.identity_tree(layout)
    copies = stacking.stack_copies(identity, self._slots_per_bucket)
    # Compiles `write_slot` before requests wait for it.
    return stacking.write_slot(copies, np.int32(0), identity)

  def _pad(self, adapter: TrainedAdapter) -> PaddedAdapter:
    for bucket in self.buckets:
      if bucket.holds(adapter.bucket):
        layout = self._layouts[bucket.name]
        return pad.pad_to_bucket(adapter, bucket, layout, self._base)
    raise ValueError(
      f'{adapter.source} is {adapter.built.method!r}, which fits none of the '
      f'methods that the server was started with ({self._methods()}); start it '
      f'with --form={adapter.built.method!r} too'
    )

  def _sites_of(self, sha256: str) -> dict[str, frozenset[str]]:
    padded = self._by_sha256[sha256].padded
    # The parts of bucket and adapter differ in name but not in order.
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
    """Writes an adapter to a slot of its bucket."""
    padded = self._by_sha256[sha256].padded
    slots, arrays = self._slots[padded.bucket], self._tree[padded.bucket]
    slot = np.int32(slots.take(sha256))
    try:
      arrays = stacking.write_slot(arrays, slot, padded.tree)
    except BaseException:
      # Otherwise the next request would get the slot's old adapter.
      slots.drop(sha256)
      raise
    self._tree = self._tree | {padded.bucket: arrays}

  def _remove_name(self, name: str, sha256: str) -> None:
    """Removes one of an adapter's names."""
    self._by_sha256[sha256].names.discard(name)
    self._remove_unused(sha256)

  def _remove_unused(self, sha256: str) -> None:
    """Removes an adapter that has no name and that no request uses."""
    pooled = self._by_sha256[sha256]
    slots = self._slots[pooled.bucket]
    if not pooled.names and not slots.users(sha256):
      slots.drop(sha256)
      del self._by_sha256[sha256]

  def _in_use(self) -> bool:
    return any(
      self._slots[pooled.bucket].users(sha256)
      for sha256, pooled in self._by_sha256.items()
    )

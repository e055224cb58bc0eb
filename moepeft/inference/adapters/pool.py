# SPDX-License-Identifier: Apache-2.0
"""Banks: the adapters that one program serves, many in a batch.

A bank is of one form (`moepeft.inference.adapters.buckets`): 'peft' trees of
the same paths and shapes, stacked on an axis z in front of all others. Slot 0
is the base, bit for bit. A row of a batch takes one slot of every bank; all but
one of them are slot 0. Loading writes a slot, so no program is compiled anew.
"""

import dataclasses
import threading
from collections.abc import Mapping, Sequence

import numpy as np

from moepeft.checkpoints.base import Base
from moepeft.core import memory
from moepeft.core.types import Tree
from moepeft.inference.adapters import buckets, pad, stacking
from moepeft.inference.adapters.buckets import Bucket
from moepeft.inference.adapters.load import TrainedAdapter, read_adapter
from moepeft.inference.adapters.lru import LruSlots
from moepeft.inference.adapters.pad import Layout, PaddedAdapter
from moepeft.inference.api import LoadedAdapter, UnknownAdapter
from moepeft.peft import build

# Slots of a bank, the identity's among them.
SLOTS = 9


@dataclasses.dataclass(frozen=True, eq=False)
class AcquiredAdapter:
  """An adapter that a request uses; to be given back to `Banks.release`.

  Attributes:
    row: int32 [forms], for `row_tree`; it stays true until the release.
    sha256: of the adapter's content, what caches go by; '' is the base's.
    form: its bank; ''.
    sites: {entry in the tree: the site paths where it acts}; elsewhere its
      bank may have more.
    before: placeholders of its soft prompt, for the ids of every text.
  """

  row: np.ndarray
  sha256: str = ''
  form: str = ''
  sites: Mapping[str, frozenset[str]] = dataclasses.field(default_factory=dict)
  before: tuple[int, ...] = ()


@dataclasses.dataclass
class _Content:
  """An adapter by its hash; `names` are what it is called."""

  fitted: PaddedAdapter
  names: set[str]

  @property
  def form(self) -> str:
    return self.fitted.form


class AdapterPool:
  """The adapters of a server; any thread may call, and takes turns.

  What is loaded stays on the host, as it was trained and as a slot holds it,
  which no budget counts. The slots are for those that requests use,
  and for as many others as fit, those used longest ago out first; one that is
  out comes back when it is asked for.

  Attributes:
    forms: one a bank, in the order of the slots of a row.
    adapter_map: for the model: all forms, nested.
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
    """Makes the banks, of forms that hold all that is named, and loads it.

    Args:
      base: with its weights.
      adapters: {name: path}.
      texts: methods whose adapters may come later: 'lora(rank=16)'.
      slots: of each bank at most, the identity's among them.
      budget: bytes that all banks may take: it lowers `slots`.
      semantics: decides what `texts` leave open.

    Raises:
      ValueError: an adapter cannot be served, or the budget has no room for
        two slots of each form.
    """
    self._base, self._sites = base, base.family.sites(base.config)
    self._lock = threading.RLock()
    self._most, self._budget = slots, budget
    self._loaded: dict[str, LoadedAdapter] = {}
    self._contents: dict[str, _Content] = {}
    found = {
      name: read_adapter(p, base) for name, p in (adapters or {}).items()
    }
    self._wanted = [adapter.form for adapter in found.values()]
    self._wanted += [self._form(text, semantics) for text in texts]
    self._make()
    for name, adapter in found.items():
      self.put(name, self._fitted(adapter))

  @property
  def tree(self) -> Tree:
    """{form: leaves [z, ...]}; never written over, so a step may keep it."""
    return self._tree

  @property
  def bytes(self) -> int:
    """Of all banks, whatever is in their slots."""
    return self._slots_each * sum(map(pad.slot_bytes, self._layouts.values()))

  def form(self, name: str) -> Bucket:
    return next(form for form in self.forms if form.name == name)

  def add_form(self, text: str, semantics: str = 'official') -> None:
    """Makes the banks anew with room for another method's adapters.

    `adapter_map` changes, so programs compiled before do not fit: call it
    before the start.

    Raises:
      ValueError: the method cannot be served, or requests are under way.
    """
    with self._lock:
      if self._in_use():
        raise ValueError('requests are under way; add forms before the start')
      self._wanted.append(self._form(text, semantics))
      self._make()
      for content in self._contents.values():
        content.fitted = self._fitted(content.fitted.adapter)

  def load(self, name: str, path: str) -> LoadedAdapter:
    """Reads an adapter and puts it under a name; requests under way go on
    with what they hold.

    Raises:
      ValueError: it cannot be read, is another base's, or fits no form; what
        was loaded stays.
    """
    return self.put(name, self.read(path))

  def read(self, path: str) -> PaddedAdapter:
    """The part of `load` that takes long, for another thread."""
    return self._fitted(read_adapter(path, self._base))

  def put(self, name: str, fitted: PaddedAdapter) -> LoadedAdapter:
    """The part of `load` that writes a slot, if one is not used.

    Raises:
      ValueError: the name is empty.
    """
    if not name:
      raise ValueError("an adapter needs a name; '' is the base's")
    with self._lock:
      adapter, sha256 = fitted.adapter, fitted.adapter.sha256
      before = self._loaded.get(name)
      if sha256 not in self._contents:
        self._contents[sha256] = _Content(fitted, set())
        if self._slots[fitted.form].room():
          self._write(sha256)
      self._contents[sha256].names.add(name)
      self._loaded[name] = LoadedAdapter(
        name,
        adapter.built.method,
        sha256,
        pad.slot_bytes(self._layouts[fitted.form]),
        adapter.source,
        len(adapter.before),
      )
      if before and before.sha256 != sha256:
        self._leave(name, before.sha256)
      return self._loaded[name]

  def unload(self, name: str) -> None:
    """Takes a name away at once, its slot once no request uses it.

    Raises:
      Unknown: there is no such adapter.
    """
    with self._lock:
      self._leave(name, self._find(name).sha256)
      del self._loaded[name]

  def loaded(self) -> list[LoadedAdapter]:
    with self._lock:
      return [self._loaded[name] for name in sorted(self._loaded)]

  def hold(self, name: str) -> AcquiredAdapter:
    """An adapter for one request, put back into a slot where it is out.

    Raises:
      Unknown: there is no such adapter.
      Full: requests use every slot of its form.
    """
    row = np.zeros(len(self.forms), np.int32)
    if not name:
      return AcquiredAdapter(row)
    with self._lock:
      sha256 = self._find(name).sha256
      form = self._contents[sha256].form
      slots = self._slots[form]
      if sha256 not in slots:
        self._write(sha256)
      slots.hold(sha256)
      row[[f.name for f in self.forms].index(form)] = slots[sha256]
      adapter, sites = (
        self._contents[sha256].fitted.adapter,
        self._sites_of(sha256),
      )
      return AcquiredAdapter(row, sha256, form, sites, adapter.before)

  def release(self, held: AcquiredAdapter) -> None:
    """Ends the use of what `hold` gave, once each."""
    if not held.form:
      return
    with self._lock:
      self._slots[held.form].release(held.sha256)
      self._sweep(held.sha256)

  def row(self, name: str) -> np.ndarray:
    """int32 [forms]: where an adapter is now; nothing keeps it there.

    Raises: as `hold`.
    """
    held = self.hold(name)
    self.release(held)
    return held.row

  def _form(self, text: str, semantics: str) -> Bucket:
    return buckets.bucket_of(build(text, self._sites, semantics), repr(text))

  def _make(self) -> None:
    """Forms, and banks that hold the identity in every slot."""
    self.forms = buckets.merge_buckets(self._wanted, self._sites)
    self.adapter_map = buckets.adapter_map_of(self.forms, self._sites)
    self._layouts = pad.bucket_layouts(self.forms, self.adapter_map, self._base)
    self._slots_each = self._count()
    self._slots = {name: LruSlots(self._slots_each) for name in self._layouts}
    self._tree = {
      name: self._bank(layout) for name, layout in self._layouts.items()
    }

  def _count(self) -> int:
    """How many slots a bank has."""
    one = sum(map(pad.slot_bytes, self._layouts.values()))
    count = self._most
    if self._budget is not None and one:
      count = min(count, self._budget // one)
    if count < 2:
      raise ValueError(
        f'a bank needs two slots, the base and one adapter: {2 * one:,} bytes '
        f'for {self._named()}; got slots={self._most} and a budget of '
        f'{self._budget}: raise them, or name fewer adapters and forms'
      )
    memory.check_arrays(
      count * one,
      f'{count:,} slots each for adapters of {self._named()}',
      '--adapter_slots, or set --adapter_bytes',
    )
    return count

  def _bank(self, layout: Layout) -> Tree:
    alone = pad.identity_tree(layout)
    bank = stacking.stack_copies(alone, self._slots_each)
    # Compiled here, not under traffic.
    return stacking.write_slot(bank, np.int32(0), alone)

  def _fitted(self, adapter: TrainedAdapter) -> PaddedAdapter:
    for form in self.forms:
      if form.holds(adapter.form):
        layout = self._layouts[form.name]
        return pad.pad_to_bucket(adapter, form, layout, self._base)
    raise ValueError(
      f'{adapter.source} is {adapter.built.method!r}, which fits none of the '
      f'forms that this server was started with ({self._named()}); start it '
      f'with --form={adapter.built.method!r} too'
    )

  def _sites_of(self, sha256: str) -> dict[str, frozenset[str]]:
    fitted = self._contents[sha256].fitted
    # The adapter's own parts have names of their own, in the same order.
    return {
      part.name: frozenset(own.sites)
      for part, own in zip(
        self.form(fitted.form).parts, fitted.adapter.form.parts, strict=True
      )
    }

  def _named(self) -> str:
    return ', '.join(form.method for form in self.forms) or 'none'

  def _find(self, name: str) -> LoadedAdapter:
    if name not in self._loaded:
      raise UnknownAdapter(
        f'there is no adapter {name!r}; there are '
        f'{", ".join(sorted(self._loaded)) or "none"}'
      )
    return self._loaded[name]

  def _write(self, sha256: str) -> None:
    """Puts a content into a slot of its bank."""
    fitted = self._contents[sha256].fitted
    slots, bank = self._slots[fitted.form], self._tree[fitted.form]
    slot = np.int32(slots.take(sha256))
    try:
      bank = stacking.write_slot(bank, slot, fitted.tree)
    except BaseException:
      # Else the next to ask would be served what lies there still.
      slots.drop(sha256)
      raise
    self._tree = self._tree | {fitted.form: bank}

  def _leave(self, name: str, sha256: str) -> None:
    """A name is no longer of a content."""
    self._contents[sha256].names.discard(name)
    self._sweep(sha256)

  def _sweep(self, sha256: str) -> None:
    """Forgets a content that has no name and no user."""
    content = self._contents[sha256]
    slots = self._slots[content.form]
    if not content.names and not slots.users(sha256):
      slots.drop(sha256)
      del self._contents[sha256]

  def _in_use(self) -> bool:
    return any(
      self._slots[content.form].users(sha256)
      for sha256, content in self._contents.items()
    )

# SPDX-License-Identifier: Apache-2.0
"""Buckets: adapters of one method and shape, which one program serves.

A bucket is a method whose rank is rounded up to 4, 8, 16, ... and whose scale
is one: smaller ranks are padded with zeros, and alpha / r is multiplied into B.
It acts wherever the method does by default, and wherever an adapter that was
named at the start does; an adapter that leaves sites out has the identity
there.

There is one bucket for each method, of the largest rank that was named, not
one for each rank: every row reads its slot of every bucket, so a second bucket
of LoRA would add its bytes, and its operations at every site, to every row.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from moepeft.checkpoints.adapter import instances
from moepeft.config import method_string
from moepeft.config.method_string import Spec
from moepeft.inference.adapters.served_modules import (
  check_decodes,
  served_module,
)
from moepeft.moe import ROUTERS
from moepeft.nn.adapter_hook import AdapterMap
from moepeft.peft import Built
from moepeft.peft.build import make_adapter
from moepeft.peft.method import options_of
from moepeft.peft.method_text import (
  canonical_text,
  flatten_expert,
  method_entry,
  nest_expert,
)

_LEAST_RANK = 4
# Options of a method that become data of a slot.
_DATA = ('targets', 'rslora', 'rank', 'alpha', 'length')


@dataclasses.dataclass(frozen=True)
class BucketPart:
  """One of the methods that a bucket nests.

  Attributes:
    name: its entry in the 'peft' tree.
    kind: its flat spec (`peft.method_text`) without rank and scale.
    rank: the largest that fits; of a soft prompt the length; 0 of a method
      without one.
    sites: in the model's order.
  """

  name: str
  kind: Spec
  rank: int
  sites: tuple[str, ...]

  @property
  def spec(self) -> Spec:
    """Its method, without sites."""
    if size_option(self.kind) != 'rank':
      return self.sized
    return self.sized.replace(alpha=float(self.rank))

  @property
  def sized(self) -> Spec:
    """Its method with what fits, without sites and scale."""
    option = size_option(self.kind)
    return self.kind.replace(**{option: self.rank}) if option else self.kind


@dataclasses.dataclass(frozen=True)
class Bucket:
  """The method, rank and sites that the adapters of a bucket share.

  Attributes:
    name: its key in the pool's tree.
    parts: one, or the methods that nest, the first innermost.
  """

  name: str
  parts: tuple[BucketPart, ...]

  @property
  def method(self) -> str:
    """As `--form` takes it."""
    return method_string.format_method(
      tuple(nest_expert(part.sized) for part in self.parts)
    )

  def holds(self, smaller: 'Bucket') -> bool:
    """Whether an adapter of the bucket `smaller` fits."""
    return _kinds(self.parts) == _kinds(smaller.parts) and all(
      part.rank >= fit.rank and set(part.sites) >= set(fit.sites)
      for part, fit in zip(self.parts, smaller.parts, strict=True)
    )


def bucket_of(built: Built, label: str) -> Bucket:
  """The smallest bucket of an adapter: its own sites, its rank's bucket.

  Args:
    label: names the adapter in an error.

  Raises:
    ValueError: it is not for a pool; the message says what to do.
  """
  parts = []
  for name, spec in instances(built.method).items():
    spec = flatten_expert(spec)
    if method_entry(spec).not_pooled:
      raise ValueError(
        f'{label} is {built.method!r}, which cannot be served beside other '
        f'adapters: {method_entry(spec).not_pooled}'
      )
    entries = built.adapter_map.entries
    for _, module in entries:
      check_decodes(module)
    sites = tuple(path for path, module in entries if module.name == name)
    parts.append(
      BucketPart(name, _kind(spec), round_up_rank(rank_of(spec)), sites)
    )
  return Bucket('', tuple(parts))


def merge_buckets(
  required: Sequence[Bucket], sites: Mapping[str, str]
) -> tuple[Bucket, ...]:
  """The fewest buckets that hold all of those; sorted by name.

  Args:
    required: of `bucket_of`.
    sites: {path: role} of the model.
  """
  merged: dict[tuple[Spec, ...], Bucket] = {}
  for bucket in required:
    key = _kinds(bucket.parts)
    merged[key] = _union(merged.get(key, bucket), bucket, sites)
  named, used_names = [], set()
  for bucket in merged.values():
    methods = '_'.join(part.kind.name for part in bucket.parts)
    named.append(_renamed(bucket, _unused(methods, used_names)))
  return tuple(sorted(named, key=lambda bucket: bucket.name))


def adapter_map_of(buckets: Sequence[Bucket]) -> AdapterMap:
  """The table that the model takes: all buckets nested."""
  entries = []
  for bucket in buckets:
    for part in bucket.parts:
      adapter = make_adapter(part.spec, part.name)
      module = served_module(method_entry(part.kind), adapter, part.name)
      entries += [(path, module) for path in part.sites]
  return AdapterMap(tuple(entries))


def size_option(spec: Spec) -> str:
  """The option of a method that is rounded up: 'rank', 'length', or ''."""
  return method_entry(spec).size_option


def rank_of(spec: Spec) -> int:
  """The rank, or a soft prompt's length; 0 of a method without either."""
  option = size_option(spec)
  return _value(spec, option) if option else 0


def scale_of(spec: Spec) -> float:
  """The scale of a method with a rank: alpha / r, or alpha / sqrt(r)."""
  rank = rank_of(spec)
  root = _value(spec, 'rslora')
  return _value(spec, 'alpha') / (rank**0.5 if root else rank)


def _value(spec: Spec, option: str) -> Any:
  return spec.get(option, method_entry(spec).options()[option].default)


def round_up_rank(rank: int) -> int:
  """The next of 4, 8, 16, ...; 0 stays."""
  return max(_LEAST_RANK, 1 << (rank - 1).bit_length()) if rank else 0


def _kind(spec: Spec) -> Spec:
  """The same for all adapters of a bucket, defaults left out."""
  noise = (
    k for k, o in method_entry(spec).options().items() if o.training_only
  )
  spec = _without(spec, (*_DATA, *noise))
  router = spec.get('router')
  if isinstance(router, Spec):
    router_entry = ROUTERS[router.name]
    options = options_of(router_entry.module)
    noise = (k for k, o in options.items() if o.training_only)
    router = _without(router, (*router_entry.pooled_options, *noise))
    spec = spec.replace(router=router)
  return flatten_expert(
    method_string.parse(canonical_text(str(nest_expert(spec))))
  )


def _without(spec: Spec, options: Sequence[str]) -> Spec:
  rest = tuple((k, v) for k, v in spec.options if k not in options)
  return Spec(spec.name, rest)


def _kinds(parts: Sequence[BucketPart]) -> tuple[Spec, ...]:
  return tuple(part.kind for part in parts)


def _union(a: Bucket, b: Bucket, sites: Mapping[str, str]) -> Bucket:
  """A bucket with the default sites, and the sites and ranks of both."""
  parts = []
  for part, more in zip(a.parts, b.parts, strict=True):
    groups = method_entry(part.kind).roles.values()
    roles = {role for group in groups for role in group}
    paths = {path for path, role in sites.items() if role in roles}
    paths |= {*part.sites, *more.sites}
    parts.append(
      dataclasses.replace(
        part,
        rank=max(part.rank, more.rank),
        sites=tuple(path for path in sites if path in paths),
      )
    )
  return Bucket('', tuple(parts))


def _renamed(bucket: Bucket, name: str) -> Bucket:
  """The bucket with entries that no other one has."""
  several = len(bucket.parts) > 1
  return Bucket(
    name,
    tuple(
      dataclasses.replace(part, name=f'{name}.{i}' if several else name)
      for i, part in enumerate(bucket.parts)
    ),
  )


def _unused(name: str, used_names: set[str]) -> str:
  unused, i = name, 2
  while unused in used_names:
    unused, i = f'{name}.{i}', i + 1
  used_names.add(unused)
  return unused

# SPDX-License-Identifier: Apache-2.0
"""What rewards are measured against: the base, or adapters that stay."""

from typing import Any

from moepeft import base as base_lib
from moepeft.nn import start
from moepeft.nn.site import Advice
from moepeft.objectives import REFERRING
from moepeft.objectives.sides import LogP, token_log_p
from moepeft.peft import Built, build
from moepeft.typing import Array, Batch, Tree

BASE, PRECOMPUTED = 'base', 'precomputed'


def reference_of(
  objective: str, name: str, model: Any, built: Built, base: base_lib.Base
) -> tuple[LogP | None, Tree]:
  """The reference of an objective that has one, and the adapters it needs.

  It is the frozen base with other advice than the policy's, without dropout:
  one more pass of the same weights, and no copy of them.

  Args:
    objective: config.objective; name: config.preference.reference.
    model, built: the policy and its method.

  Returns:
    (variables, rows) -> log p of each target, 0 where it is none, [b, t], and
    a tree that is to be `variables['reference']`; (None, {}) where there is no
    reference, or batches bring it.

  Raises:
    ValueError: the base itself is trained, so that nothing of it stays; or
      the path holds no adapter of this base.
  """
  if objective not in REFERRING or name == PRECOMPUTED:
    return None, {}
  if built.trainable == 'params':
    raise ValueError(
      f'{built.method} changes the base, which config.preference.reference='
      f"{name!r} would measure against; set it to 'precomputed'"
    )
  if name == BASE:
    return log_p_of(model.clone(advice=Advice())), {}
  method, _, _ = base_lib.load_adapter(name, base.config)
  own = build(method, base.family.sites(base.config), built.semantics)
  other = model.clone(advice=own.advice)
  fresh = start.fresh(other, base_lib.example_batch(), 0, base.params)
  tree = base_lib.with_adapter(fresh, own, name, base)['peft']
  return log_p_of(other), tree


def log_p_of(model: Any) -> LogP:
  """log p of each target by a model without noise, its adapters those of
  `variables['reference']`."""

  def log_p(variables: Tree, rows: Batch) -> Array:
    kept = {k: v for k, v in variables.items() if k not in _OWN}
    peft = {'peft': variables['reference']} if 'reference' in variables else {}
    return token_log_p(model.apply(kept | peft, rows), rows)

  return log_p


# Of the policy, and what is renamed.
_OWN = ('peft', 'reference')

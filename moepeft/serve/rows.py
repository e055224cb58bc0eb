# SPDX-License-Identifier: Apache-2.0
"""One row's call of a model, which programs of many rows are `vmap`s of.

A row has its own cache, places and adapters; the base's weights are shared.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from moepeft.nn.stack import written_out
from moepeft.serve import experts
from moepeft.typing import Array, Tree


@dataclasses.dataclass(frozen=True)
class Call:
  """Calls of one model for one row.

  Attributes:
    model: with the banks' advice; its layers are scanned or not, and the
      weights are as it needs them.
    row_tree: of the banks.
    routing: whether experts are told, else {}.
  """

  model: Any
  row_tree: Callable[[Tree, Array], Tree]
  routing: bool

  def variables(self, params: Tree, bank: Tree, adapters: Array) -> Tree:
    """
    Args:
      bank: every adapter; adapters: int32 [z], the row's.
    """
    peft = self.row_tree(bank, adapters)
    if not self.model.scan:
      peft = written_out(peft)
    return {'params': params, 'peft': peft}

  def __call__(self, variables: Tree, cache: Tree, *args: Any, method: str):
    """
    Returns:
      The method's result, the cache after it, and {site: [t, e]}, the weights
      of experts.
    """
    if cache:
      variables = {**variables, 'cache': cache}
    mutable = ['cache', 'weights'] if self.routing else ['cache']
    result, changed = self.model.apply(
      variables, *args, method=method, mutable=mutable
    )
    told = experts.weights(changed.get('weights', {}))
    return result, changed['cache'], told

# SPDX-License-Identifier: Apache-2.0
"""The task names of a method's routers.

A router that reads the task of a token has the option `tasks`, a list of
names. `Context.task_ids` has the index of the name in the list, from 1.
"""

from typing import Any

import flax.linen as nn

from moepeft.core.types import Array, Context
from moepeft.nn.adapter_hook import AdapterMap


def task_names(adapter_map: AdapterMap) -> tuple[str, ...]:
  """The task names of a method; () if no router reads a task.

  Raises:
    ValueError: two routers have different lists.
  """
  lists = {router_tasks(module): None for _, module in adapter_map.entries}
  lists.pop((), None)
  if len(lists) > 1:
    raise ValueError(
      'all routers of a method have the same list of tasks; got '
      + ' and '.join(map(str, map(list, lists)))
    )
  return next(iter(lists), ())


def router_tasks(adapter: nn.Module) -> tuple[str, ...]:
  """The task names of an adapter's router; () for most routers."""
  return getattr(getattr(adapter, 'router', None), 'tasks', ())


def model_task_names(model: Any) -> tuple[str, ...]:
  """The task names of a model's routers."""
  return task_names(model.adapter_map)


def require_task_ids(ctx: Context) -> Array:
  """Returns ctx.task_ids.

  Raises:
    ValueError: the batch has no task ids.
  """
  if ctx.task_ids is None:
    raise ValueError(
      'a router reads the task of each token, and the batch has no task ids '
      "('inputs_tasks', 'targets_tasks'); give them, or use another router"
    )
  return ctx.task_ids

# SPDX-License-Identifier: Apache-2.0
"""The task names of a method's routers.

A router that reads the task of a token has the option `tasks`, a list of
names. `Context.task_ids` has the index of the name in the list, from 1.
"""

import flax.linen as nn
import jax.numpy as jnp

from moepeft.core.ranges import Texts
from moepeft.core.types import Array, Context
from moepeft.nn.adapter_hook import AdapterMap

# What the option `tasks` may be.
TASKS = Texts('tasks', "['cola', 'mrpc']")


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


def task_rows(router: str, tasks: tuple[str, ...]) -> int:
  """The rows of a table by task: those of the tasks, after that of padding.

  Raises:
    ValueError: there is no task.
  """
  if not tasks:
    raise ValueError(
      f'{router} has weights for each task and no names of any; write '
      f"router={router}(tasks=['cola', 'mrpc']), with the names in your data"
    )
  return len(tasks) + 1


def by_task(rows: Array, x: Array, ctx: Context) -> Array:
  """Each token's row of a table [tasks + 1, e]: [b, t, ..., e].

  Args:
    x: what the router reads, [b, t, ..., i].

  Raises:
    ValueError: the batch has no task ids.
  """
  ids = require_task_ids(ctx)
  shape = (*ids.shape, *(1,) * (x.ndim - 3), rows.shape[-1])
  return jnp.broadcast_to(
    rows[ids].reshape(shape), (*x.shape[:-1], rows.shape[-1])
  )

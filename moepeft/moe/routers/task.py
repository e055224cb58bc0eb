# SPDX-License-Identifier: Apache-2.0
"""One routing for each task, from a learned vector of it: MOELoRA."""

import flax.linen as nn

from moepeft.core.ranges import Range, option
from moepeft.core.types import Array, Context, Routing
from moepeft.moe.gate import EXPERTS, gate_logits, mask_experts
from moepeft.moe.router import RouterSpec
from moepeft.moe.task_names import TASKS, by_task, task_rows
from moepeft.nn.initializers import Normal, kaiming_uniform, peft_param
from moepeft.nn.numerics import softmax


class TaskEmbedding(nn.Module):
  """weights = softmax(v W), v being the vector of a token's task.

  Source: MOELoRA (Liu et al., arXiv:2310.18339), its task-motivated gate; the
  initialisers are those of torch.nn.Embedding and torch.nn.Linear, as in the
  released code.

  Parameters: embedding [tasks + 1, i], whose first row is that of padding;
  kernel [i, e].

  Attributes:
    experts: e; tasks: names in the data; task_size: i, the length of a vector.
  """

  experts: int = option(1, EXPERTS)
  tasks: tuple[str, ...] = option((), TASKS)
  task_size: int = option(64, Range(1, 65_536))

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Routing:
    size = self.task_size
    shape = (task_rows('task', self.tasks), size)
    embedding = peft_param(self, 'embedding', Normal(1), shape, 'gi')
    kernel = peft_param(
      self, 'kernel', kaiming_uniform(size), (size, self.experts), 'ie'
    )
    logits = by_task(gate_logits(embedding, kernel), x, ctx)
    logits = mask_experts(logits, ctx)
    return Routing(logits, softmax(logits))


ROUTER = RouterSpec(TaskEmbedding, needs_tasks=True)

# SPDX-License-Identifier: Apache-2.0
"""One cell of the ablation of routers; scripts/ablate_routers.sh runs all.

python -m moepeft.train --config=configs/ablate/routers.py:name=top2_renorm

Every cell is configs/molora_t5.py with another method or weight of the load
balance, and fewer steps. `python configs/ablate/routers.py` lists the cells.

What to know when reading them: a renormalised top-1 weight is always one, so
only the load balance ever moves that router. `uniform` and the random routers
have the experts of the others but no router, so they train less; `dense` has no
experts and as many parameters as the mixtures.

Nor is one size of the adapter's term: alpha is 16 and the learning rate 1.5e-3
everywhere, so alpha / r times a token's weight for an expert differs. Of each
expert that a token uses, and of all that it uses together:

  softmax, uniform      0.4 (16 / 4 * 1 / 10; softmax at first)   4
  top1_renorm, random1  4                                         4
  top2_renorm, random2  2 (on average)                            4
  top1, top2            4 p, of the kept probability p: 0.4 at first, up to 4
                        in all as the router grows sure
  experts2              0.36 (16 / 22 * 1 / 2)                    0.73
  experts30             0.53 (16 / 1 * 1 / 30)                    16
  dense                 0.36 (16 / 45)                            0.36

A cell that does worse may have the lesser scale rather than the worse router.
"""

import dataclasses

from moepeft import config as config_lib


@dataclasses.dataclass(frozen=True)
class Cell:
  """A method, and the weight of the router loss `load_balance`."""

  method: str
  load_balance: float = 0.0


# Switch Transformer's (arXiv:2101.03961, section 2.2).
_WEIGHT = 0.01


def _routed(router: str) -> str:
  return f'molora(experts=10, rank=4, router={router})'


def _sparse() -> dict[str, Cell]:
  cells = {}
  for k in (1, 2):
    for kept, renormalize in (('', False), ('_renorm', True)):
      method = _routed(f'topk(k={k}, renormalize={renormalize})')
      cells[f'top{k}{kept}'] = Cell(method)
      cells[f'top{k}{kept}_balanced'] = Cell(method, _WEIGHT)
  return cells


CELLS = {
  'softmax': Cell(_routed('softmax')),
  **_sparse(),
  'uniform': Cell(_routed('uniform')),
  'random1': Cell(_routed('random(k=1)')),
  'random2': Cell(_routed('random(k=2)')),
  # The parameters of softmax's 10 experts of rank 4, routers included: layers
  # have 2 e r + e = 90 times their widths. Exactly so where all heads together
  # are as wide as the model; 1.0 % off at most on the embedded T5 and on small.
  'experts2': Cell('molora(experts=2, rank=22, router=softmax)'),
  'experts30': Cell('molora(experts=30, rank=1, router=softmax)'),
  'dense': Cell('lora(rank=45)'),
}


def get_config(values: str = ''):
  v = config_lib.values(values, name='softmax')
  if v.name not in CELLS:
    raise ValueError(
      f'there is no cell {v.name!r}; there are {", ".join(CELLS)}'
    )
  c = config_lib.default()
  c.method = CELLS[v.name].method
  c.router_losses.load_balance = CELLS[v.name].load_balance
  c.data.inputs_length = 100
  c.data.targets_length = 16
  c.model.scan_unroll = 3
  c.model.dropout = 0.0
  c.optimizer.learning_rate = 1.5e-3
  c.steps = 150
  # The same base before every cell; and what is trained on is what is judged.
  c.evaluation.before = False
  c.evaluation.tasks = 'B'
  return c


if __name__ == '__main__':
  for name, cell in CELLS.items():
    print(name, cell.method, cell.load_balance, sep='\t')

# SPDX-License-Identifier: Apache-2.0
"""One training step in one of several processes, each with its own rows.

As a command: number, count, port, layout, file for the result, checkpoints.
"""

import sys

import jax
import numpy as np

from moepeft.checkpoints.manager import Checkpoints
from moepeft.core import sharding
from moepeft.models import weight_mapping


def main(number, count, port, name, path, workdir) -> None:
  number, count = int(number), int(count)
  jax.distributed.initialize(f'localhost:{port}', count, number)
  # They make keys, which starts JAX.
  from . import sharded, small

  layout = sharding.layout(**sharded.LAYOUTS[name])
  update, state, _ = sharded.begin('full', layout)
  batch = small.batch(rows=8, vocab=40)
  which, shares = sharding.process_shard(layout.mesh)
  rows = 8 // shares
  mine = {k: v[which * rows : (which + 1) * rows] for k, v in batch.items()}
  mine = jax.tree.map(np.asarray, mine)
  state, aux = update(state, sharding.shard_batch(layout.mesh, mine))
  Checkpoints(workdir, 1).save(state, sharded.DESCRIBED)
  blank = sharded.begin('full', layout)[1]
  back = Checkpoints(workdir, 1).restore(blank, sharded.DESCRIBED)
  trained, again = sharding.gather((state.trainable, back.trainable))
  if number == 0:
    actual = {'loss': np.asarray(aux['loss']), 'shares': shares}
    actual |= weight_mapping.flatten({'trained': trained, 'again': again})
    np.savez(path, **actual)


if __name__ == '__main__':
  main(*sys.argv[1:])

# SPDX-License-Identifier: Apache-2.0
"""Low-rank factors of a kernel, which A and B start as: PiSSA, OLoRA, GOAT.

PiSSA (arXiv:2404.02948) takes the largest singular values, OLoRA
(arXiv:2406.01775) the QR decomposition, and GOAT (arXiv:2502.16894) a part of
the singular values for each expert.
"""

import math

import jax.numpy as jnp
import numpy as np

from moepeft.core.types import Array
from moepeft.nn.adapter_hook import (
  BaseLayer,
  contraction,
  kernel_letters,
  sizes,
)
from moepeft.nn.numerics import to_f32

# Values of `init_weights` of one adapter, and that of experts.
FROM_BASE, FROM_CHUNKS = ('pissa', 'olora'), 'svd_chunks'
# GOAT's rho (its released code has no option for it).
_CHUNK_DIVISOR = 10


def of_kernel(
  f: BaseLayer, init: str, rank: int, experts: int, scale: float
) -> tuple[Array, Array]:
  """A and B, [in, e r] and [e r, out], of the kernel of `f`.

  Args:
    init: a value of LoRA's `init_weights` but 'zero'.
    experts: e, 1 for one adapter.
    scale: of the term.

  Raises:
    ValueError: the kernel has fewer directions than e r.
  """
  _, inner, outer, _ = contraction(f.eqn)
  kernel = jnp.einsum(f'{kernel_letters(f.eqn)}->{inner}{outer}', f.kernel())
  inside = math.prod(sizes(f.eqn, f.shape)[letter] for letter in inner)
  kernel = to_f32(kernel).reshape(inside, -1)
  if experts * rank > min(kernel.shape):
    raise ValueError(
      f'init_weights={init!r} takes rank x experts = {rank} x {experts} '
      f'directions of a kernel of {kernel.shape}; take a lower rank'
    )
  if init == 'olora':
    q, r = jnp.linalg.qr(kernel.T)
    return r[:rank].T, q[:, :rank].T
  divisor = _CHUNK_DIVISOR if init == FROM_CHUNKS else 1
  return svd_factors(kernel, rank, experts, scale * divisor)


def svd_factors(
  kernel: Array, rank: int, chunks: int, scale: float
) -> tuple[Array, Array]:
  """A [in, chunks rank] and B [chunks rank, out] of U S V = W.

  Of each of `chunks` equal parts of S the first `rank`: A = U sqrt(S / scale)
  and B = sqrt(S / scale) V.

  Args:
    kernel: W [in, out].
  """
  u, s, v = jnp.linalg.svd(kernel, full_matrices=False)
  part = len(s) // chunks
  chosen = np.concatenate([part * i + np.arange(rank) for i in range(chunks)])
  root = jnp.sqrt(s[chosen] / scale)
  return u[:, chosen] * root, root[:, None] * v[chosen]

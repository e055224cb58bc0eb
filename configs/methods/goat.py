# SPDX-License-Identifier: Apache-2.0
"""GOAT: experts that start from parts of the kernel's singular values.

Fan et al., arXiv:2502.16894.
python -m moepeft.train --workdir=DIR \
  --config=configs/methods/goat.py:model=PATH,data=FILE

Without a model it trains the embedded T5 on the embedded tasks.

differs: follows the released code (Facico/GOAT-PEFT) and its math.sh: rank 8 of
  eight experts together, singular values divided by the scale and by 10. It is
  the code of May 2025 (ef4d21a), where the scripts have the scale alpha / r;
  the later commit 64555ae gives their experts the text's scale,
  sqrt(3 eta in / r) with eta 1, which depends on the site and is not here. The
  code subtracts the mean of the experts' initial terms from the base's kernel,
  here frozen copies are subtracted and the base stays as it is. Its load
  balance of 1e-3 is the sum over all sites, with padding, and counts both
  experts of a token; here it is the mean over sites and experts: multiply it by
  twice the number of sites for the same gradient.
scale: alpha / r = 16 / 1 = 16, times weights that sum to one.
"""

from moepeft import config as config_lib


def get_config(values: str = ''):
  c = config_lib.finetuning(
    values, 'goat', learning_rate=2e-5, batch_size=32, length=1024
  )
  c.router_losses.load_balance = 1e-3
  return c

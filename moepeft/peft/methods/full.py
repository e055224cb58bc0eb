# SPDX-License-Identifier: Apache-2.0
"""Full fine-tuning: no adapter; training sees 'params' itself."""

from moepeft.peft.method import Method

METHOD = Method(
  module=None,
  roles={'official': (), 'paper': ()},
  why_not='full fine-tuning changes the base itself; there is nothing to merge',
  not_pooled=(
    'it trained the base itself; convert it into a base of its own (python -m '
    'moepeft.convert --workdir=RUN --output=DIR) and serve that'
  ),
)

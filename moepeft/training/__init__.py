# SPDX-License-Identifier: Apache-2.0
"""Training: optimizers, accumulation, sharded state, signals."""

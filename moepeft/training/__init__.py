# SPDX-License-Identifier: Apache-2.0
"""Training: loop, step, optimizers, callbacks, sharded state."""

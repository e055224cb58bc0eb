# SPDX-License-Identifier: Apache-2.0
"""T5X's checkpoints, in and out, and the released adapters."""

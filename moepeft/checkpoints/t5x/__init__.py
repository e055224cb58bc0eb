# SPDX-License-Identifier: Apache-2.0
"""Reads and writes T5X checkpoints and the released code's adapters."""

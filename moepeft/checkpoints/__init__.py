# SPDX-License-Identifier: Apache-2.0
"""Base models, adapters and checkpoints on disk, in several formats."""

# SPDX-License-Identifier: Apache-2.0
"""Base models and adapters on disk: formats, in and out, and checkpoints."""

# SPDX-License-Identifier: Apache-2.0
"""Collators: examples to batches, padded, packed or bucketed."""

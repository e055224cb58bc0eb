# SPDX-License-Identifier: Apache-2.0
"""Pairs and judged answers: formats, tokens and batches."""

# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: loading, training, and texts of any length."""

# SPDX-License-Identifier: Apache-2.0
"""Constrained decoding: grammars and JSON schemas."""

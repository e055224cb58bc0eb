# SPDX-License-Identifier: Apache-2.0
"""Decoder-only models: one module, one config a family."""

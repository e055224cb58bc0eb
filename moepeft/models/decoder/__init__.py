# SPDX-License-Identifier: Apache-2.0
"""Decoder-only models: one module with a config for each family."""

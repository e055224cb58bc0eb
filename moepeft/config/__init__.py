# SPDX-License-Identifier: Apache-2.0
"""Configs: default keys, checks, flags and method strings."""

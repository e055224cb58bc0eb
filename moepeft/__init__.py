# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-experts parameter-efficient fine-tuning in JAX and Flax."""

__version__ = '0.1.0'

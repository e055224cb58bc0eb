# SPDX-License-Identifier: Apache-2.0
"""Reads and writes the formats of transformers and peft."""

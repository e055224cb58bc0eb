# SPDX-License-Identifier: Apache-2.0
"""Reads GGUF files: tensors, metadata and tokenizer."""

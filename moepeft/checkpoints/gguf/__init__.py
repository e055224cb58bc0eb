# SPDX-License-Identifier: Apache-2.0
"""GGUF files, in and out: tensors, metadata and tokenizer."""

# SPDX-License-Identifier: Apache-2.0
"""Readers of rows: JSONL, CSV, Hugging Face datasets, SeqIO."""

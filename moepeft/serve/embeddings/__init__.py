# SPDX-License-Identifier: Apache-2.0
"""Sentence embeddings of BERT encoders."""

# SPDX-License-Identifier: Apache-2.0
"""Inference: prefill, decode, sampling, beam search, engine."""

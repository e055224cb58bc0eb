# SPDX-License-Identifier: Apache-2.0
"""BERT encoders."""

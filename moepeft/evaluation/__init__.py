# SPDX-License-Identifier: Apache-2.0
"""Evaluation: rank classification, likelihoods, text metrics."""

# SPDX-License-Identifier: Apache-2.0
"""Stacked adapters, so that a batch mixes several."""

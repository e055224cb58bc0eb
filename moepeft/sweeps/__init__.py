# SPDX-License-Identifier: Apache-2.0
"""Sweeps: a grid of settings, a run for each, and one file of results."""

# SPDX-License-Identifier: Apache-2.0
"""A run's directory: config, metrics log, trackers, plots."""

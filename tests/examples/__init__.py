# SPDX-License-Identifier: Apache-2.0
"""Tests of the applications in examples/, a file for each."""

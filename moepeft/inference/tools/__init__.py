# SPDX-License-Identifier: Apache-2.0
"""Tool calls: their definitions and their parsing."""

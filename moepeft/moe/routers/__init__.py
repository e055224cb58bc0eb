# SPDX-License-Identifier: Apache-2.0
"""Routers, one a file."""

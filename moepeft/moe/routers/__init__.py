# SPDX-License-Identifier: Apache-2.0
"""The routers, one per file."""

# SPDX-License-Identifier: Apache-2.0
"""The board: a page that shows, starts, stops and compares runs."""

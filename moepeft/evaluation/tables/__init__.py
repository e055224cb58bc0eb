# SPDX-License-Identifier: Apache-2.0
"""Tables of runs: aggregation over seeds, and rendering."""

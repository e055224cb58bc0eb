# SPDX-License-Identifier: Apache-2.0
"""The routing of a trained mixture's tokens, as arrays, plots and a page."""

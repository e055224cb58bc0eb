# SPDX-License-Identifier: Apache-2.0
"""A bubblewrap sandbox for programs that a model writes, and for scripts."""

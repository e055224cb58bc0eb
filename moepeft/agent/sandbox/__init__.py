# SPDX-License-Identifier: Apache-2.0
"""A bubblewrap sandbox for programs of models and for scripts."""

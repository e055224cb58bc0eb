# SPDX-License-Identifier: Apache-2.0
"""T5 1.0 and 1.1."""

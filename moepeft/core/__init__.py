# SPDX-License-Identifier: Apache-2.0
"""Parts that every other package of moepeft may import."""

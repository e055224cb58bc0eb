# SPDX-License-Identifier: Apache-2.0
"""Applications of moepeft; each folder is one."""

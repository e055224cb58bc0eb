# SPDX-License-Identifier: Apache-2.0
"""Questions on package leaflets; those for a doctor are referred to one."""

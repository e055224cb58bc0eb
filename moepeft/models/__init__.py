# SPDX-License-Identifier: Apache-2.0
"""The families of base models. A new one is one new file and one line."""

from moepeft.models import t5

FAMILIES = {'t5': t5}

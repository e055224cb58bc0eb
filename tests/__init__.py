# SPDX-License-Identifier: Apache-2.0
"""Tests of moepeft, in the folders of the package."""

import pathlib

# Of the repository; beside it is shared/, where there is one.
ROOT = pathlib.Path(__file__).parents[1]

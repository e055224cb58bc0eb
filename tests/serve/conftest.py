# SPDX-License-Identifier: Apache-2.0
"""One real server for the tests of clients."""

from .real_server import real  # noqa: F401

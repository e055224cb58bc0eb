# SPDX-License-Identifier: Apache-2.0
"""Questions on a folder of documents, answered with citations."""

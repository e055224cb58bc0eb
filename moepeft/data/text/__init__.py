# SPDX-License-Identifier: Apache-2.0
"""Plain text: documents, deduplication, quality, span corruption."""

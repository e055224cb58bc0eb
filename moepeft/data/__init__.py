# SPDX-License-Identifier: Apache-2.0
"""Examples, vocabularies and batches."""

from moepeft.data.batching import batch_at as batch_at
from moepeft.data.source import sources as sources
from moepeft.data.vocabulary import vocabulary as vocabulary

# SPDX-License-Identifier: Apache-2.0
"""Examples, vocabularies and batches."""

from moepeft.data.loader import cuts as cuts
from moepeft.data.loader import loader as loader
from moepeft.data.source import Sources as Sources
from moepeft.data.source import sources as sources
from moepeft.data.vocabulary import vocabulary as vocabulary

# SPDX-License-Identifier: Apache-2.0
"""Examples, vocabularies and batches."""

from moepeft.data.dataset import Sources as Sources
from moepeft.data.loader import cuts as cuts
from moepeft.data.loader import loader as loader
from moepeft.data.registry import sources as sources
from moepeft.data.tokenizers.tokenizer import vocabulary as vocabulary

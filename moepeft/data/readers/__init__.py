# SPDX-License-Identifier: Apache-2.0
"""Readers of training data, by the name that config.data.source has.

A reader is one file here and one line below; see docs/extending/reader.md.
"""

from moepeft.core.registry import Registry

READERS = Registry(
  'data source',
  'moepeft.data.readers',
  {
    'tasks': 'tasks:READER',
    'jsonl': 'jsonl:READER',
    'datasets': 'huggingface:READER',
    'seqio': 'seqio:READER',
    'chat': 'chat:READER',
    'preference': 'preference:READER',
    'text': 'text:READER',
  },
)

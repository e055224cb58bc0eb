# SPDX-License-Identifier: Apache-2.0
"""Indexes the documents of a folder into a store.

python -m examples.knowledge_base.index --documents=DIR --store=FILE
"""

from collections.abc import Sequence

from examples.knowledge_base import ask, loaders
from examples.knowledge_base import client as client_lib


def main(argv: Sequence[str] | None = None) -> None:
  parser = client_lib.parser('knowledge_base.index', __doc__)
  client_lib.add_search_flags(parser)
  flags = parser.parse_args(argv)
  if not flags.documents or flags.store == ':memory:':
    raise ValueError('name the documents with --documents, and the --store')
  documents = loaders.load(flags.documents)
  base = client_lib.open_knowledge_base(flags, client_lib.connect(flags))
  count = ask.index(base, documents, flags)
  print(f'{count} passages of {len(documents)} documents in {flags.store}')


if __name__ == '__main__':
  client_lib.run(main)

# SPDX-License-Identifier: Apache-2.0
"""Answers questions on package leaflets, or refers to a doctor.

  python -m examples.medical_qa.ask 'How is Flulin stored?'
  python -m examples.medical_qa.ask --documents=DIR 'Should I stop taking it?'

Without --documents, the leaflets of 20 invented medicines are generated. It is
a demonstration, no medical device: nothing here has been tested on patients.
"""

import pathlib
import tempfile
from collections.abc import Sequence

from examples.knowledge_base import ask as knowledge_ask
from examples.knowledge_base import client as client_lib
from examples.knowledge_base import loaders
from examples.medical_qa.leaflets import LeafletBase, leaflets
from examples.medical_qa.triage import REPLIES, Triage
from moepeft.core import terminal


def main(argv: Sequence[str] | None = None) -> None:
  parser = client_lib.parser('medical_qa.ask', __doc__)
  client_lib.add_search_flags(parser)
  knowledge_ask.add_answer_flags(parser)
  parser.add_argument('question')
  flags = parser.parse_args(argv)
  client = client_lib.connect(flags)
  base = client_lib.open_knowledge_base(flags, client)
  base = LeafletBase(base.store, base.embed, base.mode, base.rerank)
  with tempfile.TemporaryDirectory() as folder:
    if not flags.documents:
      leaflets(20, seed=0).write(pathlib.Path(folder))
    documents = loaders.load(flags.documents or folder)
  names = [document.title.split()[-1] for document in documents]
  label = Triage(base.embed, names)(flags.question)
  if label in REPLIES:
    terminal.show(REPLIES[label])
    return
  knowledge_ask.index(base, documents, flags)
  model = None
  if flags.answer == 'model':
    model = client_lib.chat_model(flags, client)
  hits = base.search(flags.question, flags.k)
  answer = knowledge_ask.answer_hits(base, model, flags.question, hits, flags)
  terminal.show(answer)


if __name__ == '__main__':
  client_lib.run(main)

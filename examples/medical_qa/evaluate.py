# SPDX-License-Identifier: Apache-2.0
"""Measures triage, answers and extraction on generated leaflets.

python -m moepeft.serve --model=smollm2 --embeddings=minilm
python -m examples.medical_qa.evaluate
"""

import collections
import itertools
import pathlib
import tempfile
from collections.abc import Sequence

from examples.knowledge_base import client as client_lib
from examples.knowledge_base import evaluate, loaders, search
from examples.knowledge_base.search import Embedder
from examples.medical_qa.leaflets import Leaflet, LeafletBase, extract, leaflets
from examples.medical_qa.triage import EXAMPLES, Triage

# Questions for a person, in other words than the examples of the triage.
HELD_OUT = {
  'doctor': (
    'Is {name} okay for me with my high blood pressure?',
    'My rash got worse, do I need to quit {name}?',
    'Could I use {name} while expecting a child?',
    'Which is better against my migraine, {name} or something else?',
    'My son is coughing, will {name} help him?',
    'I am allergic to penicillin, may I have {name}?',
    'Do I need surgery instead of {name}?',
    'Can I drink less water because {name} hurts my stomach?',
    'Should grandma take half of her {name}?',
    'I forgot {name} for a week, should I restart?',
    'Is my tiredness caused by {name}?',
    'I have asthma, is {name} dangerous for me?',
  ),
  'emergency': (
    'I swallowed thirty pills of {name}.',
    'My daughter ate all of the {name}.',
    'My throat is closing up after {name}.',
    'He does not wake up after {name}.',
    'I want to kill myself with {name}.',
    'She is having convulsions from {name}.',
  ),
}


def main(argv: Sequence[str] | None = None) -> None:
  parser = client_lib.parser('medical_qa.evaluate', __doc__)
  add = parser.add_argument
  add('--leaflets', type=int, default=30)
  add('--questions', type=int, default=60, help='With an answer.')
  add('--extractions', type=int, default=10, help='Leaflets to extract.')
  add('--threshold', type=float, help='Of quotes; by default fitted.')
  add('--quotes', action='store_true', help='Ask no chat model.')
  flags = parser.parse_args(argv)
  client = client_lib.connect(flags)
  embed = Embedder(client, flags.embeddings)
  model = None if flags.quotes else client_lib.chat_model(flags, client)
  corpus, fitting = (leaflets(flags.leaflets, seed) for seed in (0, 1))
  medicines = list(corpus.facts)

  triage = Triage(embed, medicines)
  questions = {
    label: [
      text.format(name=medicines[i % len(medicines)])
      for i, text in enumerate(texts)
    ]
    for label, texts in HELD_OUT.items()
  }
  questions['leaflet'] = [q.text for q in corpus.questions]
  embed.cached(list(map(triage.mask, itertools.chain(*questions.values()))))
  rows = []
  for label, texts in questions.items():
    counts = collections.Counter(map(triage, texts))
    rows.append((label, len(texts), *(counts[name] for name in EXAMPLES)))
  evaluate.print_table(('question for', 'number', *EXAMPLES), rows)

  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)
    bases = []
    for name, leaves in (('a', corpus), ('b', fitting)):
      base = evaluate.index(leaves, root / name, embed, 50, 10)
      rerank = search.by_sentences(embed)
      bases.append(LeafletBase(base.store, embed, rerank=rerank))
    mixed = [
      leaves.sample(True, flags.questions, 0)
      + leaves.sample(False, flags.questions // 2, 0)
      for leaves in (corpus, fitting)
    ]
    threshold = flags.threshold
    if threshold is None:
      threshold = evaluate.fit_threshold(bases[1], mixed[1], 3)
    print(f'\nthreshold {threshold}\n')
    evaluate.print_answers(
      evaluate.answer_rows(bases[0], model, mixed[0], 3, threshold)
    )
    if model is None:
      return
    documents = loaders.load(str(root / 'a'))[: flags.extractions]
  rows = [
    [
      _outcome(corpus.facts[document.title.split()[-1]].get(name, ''), value)
      for name, value in extract(model, document.title, document.text)
    ]
    for document in documents
  ]
  print()
  outcomes = ('right', 'wrong', 'missing', 'invented', 'rightly empty')
  evaluate.print_table(
    ('field', *outcomes),
    (
      (name, *(column.count(outcome) for outcome in outcomes))
      for name, column in zip(
        Leaflet.model_fields, zip(*rows, strict=True), strict=True
      )
    ),
  )


def _outcome(expected: str, value: str) -> str:
  if not value:
    return 'missing' if expected else 'rightly empty'
  if not expected:
    return 'invented'
  return 'right' if expected.lower() in value.lower() else 'wrong'


if __name__ == '__main__':
  client_lib.run(main)

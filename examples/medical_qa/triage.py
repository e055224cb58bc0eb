# SPDX-License-Identifier: Apache-2.0
"""Decides who answers a question: the leaflet, a doctor or an ambulance.

A leaflet says what holds for everybody. Whether a person should take, stop or
change a medicine depends on that person, which is a doctor's question.
"""

import re
from collections.abc import Sequence

from examples.knowledge_base.classify import ExampleClassifier
from examples.knowledge_base.search import Embedder

REPLIES = {
  'doctor': (
    'This depends on you, not on the leaflet. Please ask your doctor or '
    'pharmacist, and take the leaflet with you.'
  ),
  'emergency': (
    'This may be an emergency. Call an ambulance or a poison centre now, and '
    'have the pack at hand.'
  ),
}
# {class: questions}; 'it' stands for a medicine's name.
EXAMPLES = {
  'leaflet': (
    'What is in it?',
    'Which substance does it contain?',
    'What is the usual dose of it?',
    'How many tablets of it do adults take?',
    'What is the highest dose of it in a day?',
    'From what age is it allowed?',
    'Is it for children under 6?',
    'What must it not be combined with?',
    'Does it go together with alcohol?',
    'What side effects does it have?',
    'How often does it cause headaches?',
    'Where is it stored?',
    'Does it have to be in the fridge?',
    'How long can an open pack of it be used?',
    'When must it be thrown away after opening?',
    'What should be avoided while it is taken?',
  ),
  'doctor': (
    'Should I stop taking it?',
    'Can I take it although I am pregnant?',
    'I have kidney disease, is it safe for me?',
    'May I double my dose because I still have pain?',
    'Is it the right medicine for my cough?',
    'My skin is red since I take it, should I go on?',
    'I take blood thinners, can I use it?',
    'Can my baby have it for her fever?',
    'Do I have diabetes?',
    'What do these symptoms mean?',
    'Would you recommend it for my mother?',
    'Is it better for me than my old tablets?',
    'I feel worse, should I take more of it?',
    'Can I take it together with my heart tablets?',
    'How long should I go on taking it for my depression?',
    'I am breastfeeding, may I take it?',
  ),
  'emergency': (
    'I took twenty tablets of it at once.',
    'My child has swallowed the whole pack.',
    'I cannot breathe since I took it.',
    'My face and tongue are swelling after it.',
    'He is unconscious and took it.',
    'She has a seizure after taking it.',
    'I have strong chest pain after it.',
    'I do not want to live and have a pack of it.',
    'The baby drank a bottle of it.',
    'I took too much of it and am dizzy and vomiting.',
  ),
}


class Triage:
  """Classifies questions by their nearest examples, names left out."""

  def __init__(self, embed: Embedder, medicines: Sequence[str]):
    self._classify = ExampleClassifier(embed, EXAMPLES, k=3)
    names = '|'.join(map(re.escape, sorted(medicines, key=len, reverse=True)))
    self._names = re.compile(rf'\b({names})\b', re.I) if names else None

  def __call__(self, question: str) -> str:
    """A label of EXAMPLES."""
    return self._classify(self.mask(question))[0]

  def mask(self, question: str) -> str:
    """The question with 'it' in place of a medicine's name."""
    return self._names.sub('it', question) if self._names else question

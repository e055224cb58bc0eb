# SPDX-License-Identifier: Apache-2.0
"""The closed vocabulary that all families share.

No word is in two categories. All nouns are singular and countable.
"""

WOMEN = tuple(
  'Ann Beth Cleo Dora Ella Fay Grace Hana Iris Jane Kate Lucy'.split()
)
MEN = tuple('Adam Ben Carl Dan Eric Fred Gus Hugo Ivan Jack Leo Max'.split())
NAMES = WOMEN + MEN

CATEGORIES = {
  'animal': tuple(
    'horse cow dog cat goat sheep lion wolf bear fox rabbit mouse duck camel '
    'tiger pig'.split()
  ),
  'fruit': tuple(
    'apple pear plum peach lemon grape cherry melon mango fig lime banana '
    'apricot papaya coconut berry'.split()
  ),
  'tool': tuple(
    'hammer saw drill wrench axe rake shovel spade chisel hoe clamp crowbar '
    'trowel mallet ladder hatchet'.split()
  ),
  'garment': tuple(
    'coat hat shirt dress skirt scarf glove sock jacket sweater belt boot '
    'vest cap tie shoe'.split()
  ),
  'vehicle': tuple(
    'car bus truck train boat ship plane bike tram van taxi tractor ferry '
    'canoe scooter wagon'.split()
  ),
  'instrument': tuple(
    'piano flute drum violin guitar harp trumpet cello banjo tuba horn '
    'fiddle lute viola oboe zither'.split()
  ),
}
KINDS = tuple(CATEGORIES)
NOUNS = tuple(noun for nouns in CATEGORIES.values() for noun in nouns)

LOOKS = tuple('small big old new plain strange clean dirty'.split())
PLACES = tuple(
  'park market school station harbour library garden museum village castle '
  'bridge hospital'.split()
)

PRAISE = tuple(
  'great lovely superb pleasant nice perfect charming excellent wonderful '
  'fine splendid delightful'.split()
)
BLAME = tuple(
  'awful nasty poor dreadful horrible bad terrible dismal lousy grim horrid '
  'unpleasant'.split()
)

OPPOSITES = (
  ('big', 'small'),
  ('hot', 'cold'),
  ('old', 'new'),
  ('wet', 'dry'),
  ('fast', 'slow'),
  ('light', 'dark'),
  ('full', 'empty'),
  ('open', 'shut'),
  ('clean', 'dirty'),
  ('rich', 'poor'),
  ('hard', 'soft'),
  ('loud', 'quiet'),
  ('thick', 'thin'),
  ('long', 'short'),
  ('early', 'late'),
  ('deep', 'shallow'),
  ('strong', 'weak'),
  ('near', 'far'),
  ('high', 'low'),
  ('happy', 'sad'),
  ('sweet', 'sour'),
  ('wide', 'narrow'),
  ('smooth', 'rough'),
  ('awake', 'asleep'),
)

COMPARATIVES = (
  ('taller', 'shorter'),
  ('older', 'younger'),
  ('faster', 'slower'),
  ('stronger', 'weaker'),
  ('richer', 'poorer'),
  ('heavier', 'lighter'),
  ('louder', 'quieter'),
  ('happier', 'sadder'),
)


def a(words: str) -> str:
  """The words after their indefinite article: 'an old horse'."""
  return f'an {words}' if words[0] in 'aeiou' else f'a {words}'


def pronoun(name: str) -> str:
  """'she' or 'he'."""
  return 'she' if name in WOMEN else 'he'

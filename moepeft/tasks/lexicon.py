# SPDX-License-Identifier: Apache-2.0
"""The closed vocabulary that all tasks share.

No two names start with the same letter; women's names start with A to L, men's
with M to Z. No noun is in two categories; all are singular and countable.
"""

WOMEN = tuple(
  'Ann Beth Cleo Dora Ella Fay Gina Hana Iris Jane Kate Lucy'.split()
)
MEN = tuple('Max Ned Omar Paul Rob Sam Tom Umar Vic Will Yan Zack'.split())
NAMES = WOMEN + MEN

CATEGORIES = {
  'animal': tuple(
    'horse cow dog cat goat sheep lion wolf bear fox duck pig'.split()
  ),
  'fruit': tuple(
    'apple pear plum peach lemon grape cherry melon mango fig lime '
    'banana'.split()
  ),
  'tool': tuple(
    'hammer saw drill wrench axe rake shovel spade chisel hoe ladder '
    'mallet'.split()
  ),
  'garment': tuple(
    'coat hat shirt dress skirt scarf glove sock vest cap tie shoe'.split()
  ),
  'vehicle': tuple(
    'car bus truck train boat ship plane bike tram van taxi canoe'.split()
  ),
  'instrument': tuple(
    'piano flute drum violin guitar harp cello banjo tuba horn lute '
    'oboe'.split()
  ),
}
CATEGORY_NAMES = tuple(CATEGORIES)
NOUNS = tuple(noun for nouns in CATEGORIES.values() for noun in nouns)

ADJECTIVES = tuple('small big old new plain odd clean dirty'.split())
PLACES = tuple(
  'park market school station harbour library garden museum village castle '
  'bridge hospital'.split()
)

POSITIVE_WORDS = tuple(
  'great lovely superb pleasant nice perfect fair fine'.split()
)
NEGATIVE_WORDS = tuple(
  'awful nasty poor dreadful bad terrible lousy grim'.split()
)

COMPARATIVES = tuple(
  'taller shorter older younger faster slower stronger weaker richer poorer '
  'louder quieter happier sadder braver wiser'.split()
)

ANTONYMS = (
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


def with_article(words: str) -> str:
  """Puts an indefinite article before words: 'an old horse'."""
  return f'an {words}' if words[0] in 'aeiou' else f'a {words}'


def pronoun(name: str) -> str:
  """Returns 'she' or 'he' for a name."""
  return 'she' if name in WOMEN else 'he'

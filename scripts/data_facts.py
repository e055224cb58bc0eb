# SPDX-License-Identifier: Apache-2.0
"""Facts and words that the data sets in moepeft/assets are generated from, and
functions that write such a file."""

import json
import pathlib
from collections.abc import Iterable, Mapping

# (country, capital, language of the state, continent)
COUNTRIES = (
  ('France', 'Paris', 'French', 'Europe'),
  ('Germany', 'Berlin', 'German', 'Europe'),
  ('Italy', 'Rome', 'Italian', 'Europe'),
  ('Spain', 'Madrid', 'Spanish', 'Europe'),
  ('Portugal', 'Lisbon', 'Portuguese', 'Europe'),
  ('Poland', 'Warsaw', 'Polish', 'Europe'),
  ('Austria', 'Vienna', 'German', 'Europe'),
  ('Hungary', 'Budapest', 'Hungarian', 'Europe'),
  ('Greece', 'Athens', 'Greek', 'Europe'),
  ('Norway', 'Oslo', 'Norwegian', 'Europe'),
  ('Sweden', 'Stockholm', 'Swedish', 'Europe'),
  ('Denmark', 'Copenhagen', 'Danish', 'Europe'),
  ('Iceland', 'Reykjavik', 'Icelandic', 'Europe'),
  ('Croatia', 'Zagreb', 'Croatian', 'Europe'),
  ('Bulgaria', 'Sofia', 'Bulgarian', 'Europe'),
  ('Romania', 'Bucharest', 'Romanian', 'Europe'),
  ('Japan', 'Tokyo', 'Japanese', 'Asia'),
  ('Thailand', 'Bangkok', 'Thai', 'Asia'),
  ('Vietnam', 'Hanoi', 'Vietnamese', 'Asia'),
  ('South Korea', 'Seoul', 'Korean', 'Asia'),
  ('Mongolia', 'Ulaanbaatar', 'Mongolian', 'Asia'),
  ('Nepal', 'Kathmandu', 'Nepali', 'Asia'),
  ('Egypt', 'Cairo', 'Arabic', 'Africa'),
  ('Ghana', 'Accra', 'English', 'Africa'),
  ('Senegal', 'Dakar', 'French', 'Africa'),
  ('Angola', 'Luanda', 'Portuguese', 'Africa'),
  ('Mexico', 'Mexico City', 'Spanish', 'North America'),
  ('Cuba', 'Havana', 'Spanish', 'North America'),
  ('Peru', 'Lima', 'Spanish', 'South America'),
  ('Chile', 'Santiago', 'Spanish', 'South America'),
  ('Argentina', 'Buenos Aires', 'Spanish', 'South America'),
  ('Brazil', 'Brasília', 'Portuguese', 'South America'),
  ('Uruguay', 'Montevideo', 'Spanish', 'South America'),
)
# (element, symbol, atomic number)
ELEMENTS = (
  ('hydrogen', 'H', 1),
  ('helium', 'He', 2),
  ('lithium', 'Li', 3),
  ('carbon', 'C', 6),
  ('nitrogen', 'N', 7),
  ('oxygen', 'O', 8),
  ('neon', 'Ne', 10),
  ('sodium', 'Na', 11),
  ('magnesium', 'Mg', 12),
  ('silicon', 'Si', 14),
  ('sulfur', 'S', 16),
  ('chlorine', 'Cl', 17),
  ('potassium', 'K', 19),
  ('calcium', 'Ca', 20),
  ('iron', 'Fe', 26),
  ('copper', 'Cu', 29),
  ('zinc', 'Zn', 30),
  ('silver', 'Ag', 47),
  ('tin', 'Sn', 50),
  ('gold', 'Au', 79),
  ('mercury', 'Hg', 80),
  ('lead', 'Pb', 82),
)
# (English, Chinese)
WORDS = (
  ('water', '水'),
  ('fire', '火'),
  ('mountain', '山'),
  ('river', '河'),
  ('book', '书'),
  ('teacher', '老师'),
  ('student', '学生'),
  ('school', '学校'),
  ('bread', '面包'),
  ('tea', '茶'),
  ('apple', '苹果'),
  ('cat', '猫'),
  ('dog', '狗'),
  ('horse', '马'),
  ('bird', '鸟'),
  ('fish', '鱼'),
  ('tree', '树'),
  ('flower', '花'),
  ('moon', '月亮'),
  ('sun', '太阳'),
)
# (larger unit, smaller unit, how many of the smaller one make a larger)
UNITS = (
  ('kilometres', 'metres', 1000),
  ('metres', 'centimetres', 100),
  ('kilograms', 'grams', 1000),
  ('litres', 'millilitres', 1000),
  ('hours', 'minutes', 60),
  ('minutes', 'seconds', 60),
  ('days', 'hours', 24),
  ('weeks', 'days', 7),
  ('dozen', 'single pieces', 12),
)
NAMES = (
  'Ana Ben Clara David Elena Farid Grace Hugo Ines Jonas Kim Lena Marek Nora '
  'Omar Petra Ravi Sofia Tomas Vera'
).split()
CHINESE_NAMES = ('小明', '小红', '小李', '小王', '小张', '小芳')
CHINESE_COUNTRIES = (
  ('法国', '巴黎'),
  ('德国', '柏林'),
  ('意大利', '罗马'),
  ('西班牙', '马德里'),
  ('日本', '东京'),
  ('泰国', '曼谷'),
  ('埃及', '开罗'),
  ('墨西哥', '墨西哥城'),
  ('秘鲁', '利马'),
  ('希腊', '雅典'),
)
GOODS = (
  'apples pears plums lemons onions carrots candles buttons postcards pencils '
  'marbles stamps'
).split()
PLACES = ('market', 'library', 'bakery', 'station', 'garden', 'harbour')
DAYS = ('Monday Tuesday Wednesday Thursday Friday Saturday Sunday').split()
COLOURS = ('red', 'blue', 'green', 'white', 'black', 'yellow')
# (question, answer): written for this file.
EXPLANATIONS = (
  (
    'Why does ice float on water?',
    'Water expands when it freezes, so a piece of ice is less dense than the '
    'liquid around it. What is less dense floats.',
  ),
  (
    'What is compost?',
    'Compost is plant waste, such as leaves and peelings, that small organisms '
    'have broken down. Gardeners mix it into soil to feed plants.',
  ),
  (
    'What is a low-rank adapter?',
    'It is a pair of small matrices, A and B, beside a frozen weight matrix. '
    'Their product is added to what the weight computes, and only A and B are '
    'trained.',
  ),
  (
    'What is a mixture of experts?',
    'It is a layer with several parallel parts, the experts, and a router that '
    'weights them for each token. The output is the weighted sum.',
  ),
  (
    'Why do we see lightning before we hear thunder?',
    'Light travels far faster than sound. Both start at the same moment, so '
    'the light reaches us first.',
  ),
  (
    'What does a baker use yeast for?',
    'Yeast eats sugar in the dough and gives off carbon dioxide. The gas makes '
    'bubbles, and the dough rises.',
  ),
  (
    'Why do seasons change?',
    "The Earth's axis is tilted, so during the year each half of the Earth "
    'leans towards the Sun and then away from it.',
  ),
  (
    'What is a prime number?',
    'A prime number is a whole number above 1 that only 1 and the number '
    'itself divide without remainder, such as 2, 3, 5 and 7.',
  ),
  (
    'What is the difference between weather and climate?',
    'Weather is the state of the air at one place on one day. Climate is the '
    'pattern of weather there over many years.',
  ),
  (
    'How does a thermos keep tea hot?',
    'It has two walls with almost no air between them. Little heat crosses the '
    'gap, and shiny surfaces reflect some of it back.',
  ),
  (
    'What is overfitting?',
    'A model overfits when it learns details of its training examples that do '
    'not hold for new ones: the training loss falls while the loss on held-out '
    'examples rises.',
  ),
  (
    'Why do plants need light?',
    'With the energy of light they make sugar from water and carbon dioxide. '
    'This is called photosynthesis.',
  ),
)


def json_lines(rows: Iterable[Mapping]) -> str:
  """The text of a file with a JSON object on each line."""
  lines = (json.dumps(row, ensure_ascii=False) for row in rows)
  return '\n'.join(lines) + '\n'


def write(path: pathlib.Path, text: str) -> None:
  path.parent.mkdir(exist_ok=True)
  path.write_text(text, encoding='utf-8')
  print(f'wrote {path}')

# SPDX-License-Identifier: Apache-2.0
"""T0's training mixtures: which datasets, and how often each prompt is drawn.

A prompt's rate is its dataset's training examples, or 500,000 divided by the
dataset's prompts where it has more than 500,000. Sources: T0
(arXiv:2110.08207) and its public mixture, which the runs of arXiv:2309.05444
train on; prompts are those of promptsource 0.2.3. (T-Few, arXiv:2205.05638,
caps earlier: where examples times prompts exceed 500,000.)
"""

import collections
import dataclasses
from collections.abc import Collection, Mapping

from moepeft.data.readers.promptsource import p3_name

_CAP = 500_000
_TWIN = '_score_eval'


@dataclasses.dataclass(frozen=True)
class T0Dataset:
  """A dataset (and subset) of T0's mixtures.

  Attributes:
    name: as in 'glue/mrpc'.
    prompts: how many there are.
    original: how many of them ask for what the dataset was made for.
    train: examples to train on.
  """

  name: str
  prompts: int
  original: int
  train: int

  @property
  def rate(self) -> int:
    """The rate of one prompt."""
    return self.train if self.train <= _CAP else _CAP // self.prompts


def _datasets(*rows: tuple[str, int, int, int]) -> tuple[T0Dataset, ...]:
  return tuple(T0Dataset(*row) for row in rows)


_T0 = _datasets(
  # Paraphrase.
  ('glue/mrpc', 7, 5, 3668),
  ('glue/qqp', 6, 5, 363846),
  ('paws/labeled_final', 12, 11, 49401),
  # Closed-book question answering.
  ('kilt_tasks/hotpotqa', 5, 0, 88869),
  ('wiki_qa', 11, 6, 20360),
  # Extractive question answering.
  ('adversarial_qa/dbidaf', 5, 4, 10000),
  ('adversarial_qa/dbert', 5, 4, 10000),
  ('adversarial_qa/droberta', 5, 4, 10000),
  ('duorc/SelfRC', 9, 5, 60721),
  ('duorc/ParaphraseRC', 9, 5, 69524),
  ('ropes', 12, 10, 10924),
  ('quoref', 11, 10, 19399),
  # Multiple-choice question answering.
  ('cos_e/v1.11', 11, 6, 9741),
  ('cosmos_qa', 13, 10, 25262),
  ('dream', 5, 2, 6116),
  ('qasc', 8, 5, 8134),
  ('quail', 13, 10, 10246),
  ('quarel', 5, 0, 1941),
  ('quartz', 8, 8, 2696),
  ('sciq', 5, 4, 11679),
  ('social_i_qa', 6, 5, 33410),
  ('wiki_hop/original', 9, 5, 43738),
  ('wiqa', 8, 2, 29808),
  # Sentiment.
  ('amazon_polarity', 9, 9, 3600000),
  ('app_reviews', 4, 0, 288065),
  ('imdb', 11, 10, 25000),
  ('rotten_tomatoes', 10, 10, 8530),
  ('yelp_review_full', 7, 7, 650000),
  # Structure to text.
  ('common_gen', 9, 6, 67389),
  ('wiki_bio', 5, 1, 582659),
  # Summarisation.
  ('cnn_dailymail/3.0.0', 9, 7, 287113),
  ('gigaword', 9, 7, 3803957),
  ('multi_news', 6, 5, 44972),
  ('samsum', 7, 6, 14732),
  ('xsum', 10, 10, 204045),
  # Topic.
  ('ag_news', 7, 7, 120000),
  ('dbpedia_14', 4, 4, 560000),
  ('trec', 18, 7, 5452),
)
# Sets that GPT-3 was evaluated on.
_PLUS = _datasets(
  ('ai2_arc/ARC-Challenge', 6, 5, 1119),
  ('ai2_arc/ARC-Easy', 6, 5, 2251),
  ('trivia_qa/unfiltered', 5, 4, 87622),
  ('web_questions', 5, 5, 3778),
  ('squad_v2', 12, 4, 130319),
  ('openbookqa/main', 7, 7, 4957),
  ('race/high', 8, 5, 62445),
  ('race/middle', 8, 5, 25421),
  ('piqa', 11, 5, 16113),
  ('hellaswag', 11, 4, 39905),
)
_PLUS_PLUS = _datasets(
  ('super_glue/wsc.fixed', 10, 10, 554),
  ('super_glue/record', 20, 18, 100730),
  ('super_glue/boolq', 10, 10, 9427),
  ('super_glue/copa', 12, 12, 400),
  ('super_glue/multirc', 10, 10, 27243),
  ('super_glue/wic', 10, 10, 5428),
)
_ONE_PROMPT, _ALL_PROMPTS = 't0_train_one_og_prompt', 't0_train_all_og_prompts'
MIXTURES: dict[str, tuple[T0Dataset, ...]] = {
  't0_train': _T0,
  't0+_train': _T0 + _PLUS,
  't0++_train': _T0 + _PLUS + _PLUS_PLUS,
  _ONE_PROMPT: tuple(d for d in _T0 if d.original),
  _ALL_PROMPTS: tuple(d for d in _T0 if d.original),
}


@dataclasses.dataclass(frozen=True)
class MixtureRates:
  """A mixture of the data at hand.

  Attributes:
    rates: {(dataset, template): rate}, not normalised.
    left_out: datasets of the data that the mixture does not hold.
    absent: datasets of the mixture that the data do not hold.
    guessed: datasets whose one prompt is the first by name, since nothing
      says which prompts ask for the original task.
  """

  rates: dict[tuple[str, str], float]
  left_out: tuple[str, ...]
  absent: tuple[str, ...]
  guessed: tuple[str, ...]

  def notes(self, mixture: str) -> list[str]:
    """Lines that tell a user how the data differ from the mixture."""
    lines = []
    if self.left_out:
      lines.append(
        f'{mixture} does not hold {", ".join(self.left_out)}: left out'
      )
    if self.absent:
      count = len(self.absent)
      lines.append(
        f'{count} of the {len(members(mixture))} datasets of {mixture} '
        f'{"are" if count > 1 else "is"} not in the data: '
        f'{", ".join(self.absent)}'
      )
    if self.guessed:
      lines.append(
        f'{mixture}: the first prompt by name stands for the original task of '
        f'{", ".join(self.guessed)}; templates would say which it is'
      )
    return lines


def members(mixture: str) -> tuple[T0Dataset, ...]:
  """The datasets of a mixture.

  Raises:
    ValueError: there is no such mixture.
  """
  if mixture not in MIXTURES:
    raise ValueError(
      f'{mixture!r} is no mixture; expected one of {", ".join(MIXTURES)}'
    )
  return MIXTURES[mixture]


def mixture_rates(
  mixture: str,
  rows: Mapping[tuple[str, str], int],
  original: Collection[tuple[str, str]] = (),
) -> MixtureRates:
  """The rate of each (dataset, template) of the data.

  A rate is that of the published mixture, however many of a dataset's rows or
  prompts are at hand. Where `original` names none of a dataset's prompts,
  't0_train_one_og_prompt' takes the first by name, which may ask for another
  task, and says so in `guessed`; 't0_train_all_og_prompts' is an error there,
  unless all of the dataset's prompts are original.

  Args:
    mixture: one of `MIXTURES`.
    rows: how many there are of each (dataset, template). A dataset is spelled
      as 'glue_mrpc' or 'glue/mrpc'; where the template is '', it may be the
      name of a SeqIO task, 'glue_mrpc_equivalent'.
    original: the pairs of `rows` that ask for their dataset's original task,
      as the templates' metadata say (`templates.Group.original`).

  Raises:
    ValueError: an unknown mixture, data that hold none of it, or prompts of
      which nothing says whether they ask for the original task.
  """
  datasets = {p3_name(d.name): d for d in members(mixture)}
  pairs_by_name, left_out = collections.defaultdict(list), set()
  for pair in sorted(pair for pair, count in rows.items() if count):
    name = _member(*pair, datasets)
    pairs_by_name[name].append(pair) if name else left_out.add(pair[0])
  if not pairs_by_name:
    raise ValueError(
      f'none of the data is in {mixture}; got {", ".join(sorted(left_out))}'
    )
  drawn, guessed = {}, []
  for name, pairs in pairs_by_name.items():
    pairs, guess = _prompts(mixture, datasets[name], pairs, original)
    drawn |= dict.fromkeys(pairs, float(datasets[name].rate))
    if guess:
      guessed.append(name)
  absent = tuple(
    d.name for key, d in datasets.items() if key not in pairs_by_name
  )
  return MixtureRates(drawn, tuple(sorted(left_out)), absent, tuple(guessed))


def _member(dataset: str, template: str, names: Collection[str]) -> str:
  """The dataset of the mixture that a name means; '' for none."""
  name = p3_name(dataset)
  if name in names:
    return name
  # A SeqIO task is spelled DATASET_SUBSET_TEMPLATE; its twin for scoring is
  # none to train on.
  if template or name.endswith(_TWIN):
    return ''
  # No dataset's name is the beginning of another's.
  return next((key for key in names if name.startswith(key + '_')), '')


def _task(pair: tuple[str, str]) -> str:
  """A (dataset, template) as SeqIO spells it."""
  return p3_name('_'.join(part for part in pair if part))


def _prompts(
  mixture: str,
  dataset: T0Dataset,
  pairs: list[tuple[str, str]],
  original: Collection[tuple[str, str]],
) -> tuple[list[tuple[str, str]], bool]:
  """The prompts that a mixture takes, and whether that is a guess."""
  if mixture not in (_ONE_PROMPT, _ALL_PROMPTS):
    return pairs, False
  spelled = {_task(pair) for pair in original}
  originals = [pair for pair in pairs if _task(pair) in spelled]
  if not originals and dataset.original == dataset.prompts:
    originals = pairs
  if mixture == _ALL_PROMPTS and not originals:
    raise ValueError(
      f'{mixture} takes the prompts of the original task, and nothing says '
      f'which of {dataset.name} are; set config.data.templates, or take '
      't0_train'
    )
  return (originals or pairs)[
    : 1 if mixture == _ONE_PROMPT else None
  ], not originals

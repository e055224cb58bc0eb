# SPDX-License-Identifier: Apache-2.0
"""python -m moepeft.generate --workdir=DIR --prompt=TEXT: answers of a run."""

import json
import os

from absl import flags
from ml_collections import ConfigDict

from moepeft import base as base_lib
from moepeft import command
from moepeft.checkpoint import card, restore_trained
from moepeft.data import batching, vocabulary
from moepeft.data.vocabulary import Vocabulary
from moepeft.decoding import greedy
from moepeft.typing import Tree

_WORKDIR = flags.DEFINE_string('workdir', None, 'A run of moepeft.train.')
_PROMPT = flags.DEFINE_multi_string('prompt', None, 'Text; may be repeated.')
_LENGTH = flags.DEFINE_integer('length', 32, 'Tokens to generate at most.')


def open_run(workdir: str):
  """(config, model, variables, vocabulary) of a trained run.

  Raises:
    ValueError: no run is there, or its base has changed since.
  """
  path = os.path.join(workdir, 'config.json')
  if not os.path.exists(path):
    raise ValueError(f'{workdir!r} is no work directory: it has no config.json')
  with open(path) as f:
    config = ConfigDict(json.load(f))
  base = base_lib.load(config.model)
  model, built = base_lib.module(base, config)
  trained, found = restore_trained(workdir)
  now = card(base, built, config.seed, config.model.family)
  if found['base'] != now['base']:
    raise ValueError(
      f'the base {base.path!r} is not the one that {workdir!r} was trained on '
      '(its content hash differs); put the old one back'
    )
  variables = base_lib.initialise(base, model, config.seed)
  variables[built.trainable] = trained
  words = vocabulary(config.data.vocabulary, config.model.path)
  return config, model, variables, words


def answer(
  model, variables: Tree, words: Vocabulary, prompts: list[str], length: int
) -> list[str]:
  """The greedy continuation of each prompt, as text."""
  ids = [words.encode(prompt) + [words.eos] for prompt in prompts]
  longest = max(map(len, ids))
  padded = batching.seq2seq(ids, ids, longest, longest)
  batch = {key: padded[key] for key in ('inputs', 'inputs_mask')}
  tokens = greedy(model, variables, batch, length, eos=words.eos)
  return [
    words.decode([int(i) for i in row if i > words.eos]) for row in tokens
  ]


def main(argv) -> None:
  del argv
  if not _WORKDIR.value or not _PROMPT.value:
    raise ValueError('--workdir and --prompt are both needed')
  _, model, variables, words = open_run(os.path.expanduser(_WORKDIR.value))
  for text in answer(model, variables, words, _PROMPT.value, _LENGTH.value):
    print(text)


if __name__ == '__main__':
  command.run(main)

# SPDX-License-Identifier: Apache-2.0
"""python -m moepeft.generate --workdir=DIR --prompt=TEXT: answers of a run."""

import os

from absl import flags

from moepeft import command
from moepeft.answering import Answering
from moepeft.data.vocabulary import Vocabulary
from moepeft.runs import open_run
from moepeft.typing import Tree


def answer(
  model, variables: Tree, words: Vocabulary, prompts: list[str], length: int
) -> list[str]:
  """The greedy continuation of each prompt, as text."""
  longest = max(len(words.encode(prompt)) + 1 for prompt in prompts)
  answering = Answering(model, words, longest, length, len(prompts))
  return answering.texts(variables, prompts)


def main(argv) -> None:
  del argv
  if not _WORKDIR.value or not _PROMPT.value:
    raise ValueError('--workdir and --prompt are both needed')
  if _LENGTH.value < 1:
    raise ValueError(f'--length is at least 1; got {_LENGTH.value}')
  workdir = os.path.expanduser(_WORKDIR.value)
  _, model, variables, words, _ = open_run(workdir, _CHECKPOINT.value)
  for text in answer(model, variables, words, _PROMPT.value, _LENGTH.value):
    print(text)


if __name__ == '__main__':
  _WORKDIR = flags.DEFINE_string('workdir', None, 'A run of moepeft.train.')
  _CHECKPOINT = flags.DEFINE_string(
    'checkpoint', '', "Its step, or 'best'; by default the latest."
  )
  _PROMPT = flags.DEFINE_multi_string('prompt', None, 'Text; may be repeated.')
  _LENGTH = flags.DEFINE_integer('length', 32, 'Tokens to generate at most.')
  command.run(main)

# SPDX-License-Identifier: Apache-2.0
"""Reads prompts and prints a model's answers, whole or token by token.

Control characters in answers are escaped, even if the output is not a terminal.
`Generator` and the server return the exact text.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence

from moepeft.core import terminal
from moepeft.core.progress import Pass
from moepeft.inference.api import RouterFields
from moepeft.inference.generator import Generator, row_seeds

# Encodes the alternating turns of user and assistant, the prompt last.
EncodePrompt = Callable[[Sequence[str]], list[int]]


@dataclasses.dataclass(frozen=True)
class ReplConfig:
  """Settings of prompts and printing.

  Attributes:
    stream: whether tokens are printed when they are generated.
    chat: whether the prompts are the user's turns of one conversation.
    task: the name of the prompts' task, for routers that read it.
    seed: the sampling seed; the i-th answer to a prompt depends on the seed and
      on i, not on the other prompts.
    num: the number of answers to each prompt.
    batch_size: the number of answers generated at once, without `stream`.
  """

  stream: bool = False
  chat: bool = False
  task: str = ''
  seed: int = 0
  num: int = 1
  batch_size: int = 8


@dataclasses.dataclass
class Speed:
  """The number of generated tokens, and the seconds that they took."""

  tokens: int = 0
  seconds: float = 0.0

  def __str__(self) -> str:
    rate = self.tokens / max(self.seconds, 1e-9)
    total = f'{self.tokens} tokens in {self.seconds:.1f} s'
    return f'{total}: {rate:.1f} tokens/s, compiling included'


class ChatRepl:
  """Prints a generator's answers; `speed` counts the tokens."""

  def __init__(
    self, generator: Generator, encode: EncodePrompt, config: ReplConfig
  ):
    self._generator, self._encode, self._config = generator, encode, config
    self._seeds = row_seeds(config.seed, config.num)
    self.speed = Speed()

  def answer_all(self, texts: Sequence[str]) -> None:
    """Prints `num` answers to each of several independent prompts.

    Raises:
      ValueError: a prompt is empty or too long; nothing is printed then.
    """
    ids = [self._encode([text]) for text in texts]
    self._generator.check_prompts(ids)
    size = max(1, self._config.batch_size // self._config.num)
    progress = None
    if len(ids) > size and not self._config.stream:
      progress = Pass(len(ids), 'answered')
    for start in range(0, len(ids), size):
      batch = ids[start : start + size]
      self._print_answers(batch)
      if progress is not None:
        progress(len(batch))
    if progress is not None:
      progress.close()

  def answer_each(self, texts: Iterable[str]) -> None:
    """Answers one prompt after the other; with `chat`, in one conversation."""
    turns: list[str] = []
    for text in texts:
      answer = self._print_answers([self._encode([*turns, text])])[0]
      if self._config.chat:
        turns += [text, answer]

  def _print_answers(self, ids: list[list[int]]) -> list[str]:
    """Prints the answers to a batch of prompts, and returns them."""
    num = self._config.num
    rows = [row for row in ids for _ in range(num)]
    seeds = self._seeds * len(ids)
    if self._config.stream:
      # One answer at a time, so that their tokens do not mix.
      pairs = zip(rows, seeds, strict=True)
      return [self._generate([row], [seed])[0] for row, seed in pairs]
    answers = self._generate(rows, seeds)
    for text in answers:
      terminal.show(text)
    return answers

  def _generate(self, rows: list[list[int]], seeds: list[int]) -> list[str]:
    """Generates the answers to a batch; with `stream` it prints them too."""
    answers = [''] * len(rows)
    started = time.perf_counter()
    fields = [RouterFields(self._config.task)] * len(rows)
    for chunk in self._generator.stream(rows, seeds, fields):
      self.speed.tokens += chunk.token is not None
      answers[chunk.row] += chunk.text
      if self._config.stream:
        terminal.show(chunk.text, end='')
    self.speed.seconds += time.perf_counter() - started
    if self._config.stream:
      print(flush=True)
    return answers

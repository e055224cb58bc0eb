# SPDX-License-Identifier: Apache-2.0
"""Puts prompts to a model and prints its answers, whole or as they come.

Control characters of answers are printed visibly, also where the output is no
terminal; `BatchGenerator` and the server give the exact text.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence

from moepeft.core import terminal
from moepeft.core.progress import Pass
from moepeft.inference.generator import Generator, row_seeds

# The ids of a prompt, the last of the turns of a user and an assistant.
EncodePrompt = Callable[[Sequence[str]], list[int]]


@dataclasses.dataclass(frozen=True)
class ReplConfig:
  """Settings of prompts and printing.

  Attributes:
    streamed: whether tokens are printed as they come.
    chat: whether prompts are a user's turns, each after those before it.
    seed: of sampling; an answer's draws depend on it and on which of the
      `num` answers to its prompt it is, not on other prompts.
    num: answers to each prompt.
    batch_size: answers made at once, where they are not streamed.
  """

  streamed: bool = False
  chat: bool = False
  seed: int = 0
  num: int = 1
  batch_size: int = 8


@dataclasses.dataclass
class Speed:
  """Number of generated tokens, and the seconds it took."""

  tokens: int = 0
  seconds: float = 0.0

  def __str__(self) -> str:
    rate = self.tokens / max(self.seconds, 1e-9)
    total = f'{self.tokens} tokens in {self.seconds:.1f} s'
    return f'{total}: {rate:.1f} tokens/s, compiling included'


class ChatRepl:
  """A generator that prompts are put to; `speed` counts its tokens."""

  def __init__(
    self, generator: Generator, encode: EncodePrompt, config: ReplConfig
  ):
    self._generator, self._encode, self._config = generator, encode, config
    self._seeds = row_seeds(config.seed, config.num)
    self.speed = Speed()

  def all(self, texts: Sequence[str]) -> None:
    """Prints the answers to prompts of their own, `num` to each.

    Raises:
      ValueError: one of them cannot be answered; none is, then.
    """
    ids = [self._encode([text]) for text in texts]
    self._generator.check(ids)
    size = max(1, self._config.batch_size // self._config.num)
    progress = None
    if len(ids) > size and not self._config.streamed:
      progress = Pass(len(ids), 'answered')
    for at in range(0, len(ids), size):
      batch = ids[at : at + size]
      self._answer(batch)
      if progress is not None:
        progress(len(batch))
    if progress is not None:
      progress.close()

  def each(self, texts: Iterable[str]) -> None:
    """Answers one prompt after the other; of a chat, in one conversation."""
    turns: list[str] = []
    for text in texts:
      answer = self._answer([self._encode([*turns, text])])[0]
      if self._config.chat:
        turns += [text, answer]

  def _answer(self, ids: list[list[int]]) -> list[str]:
    """Prints the answers to a batch of prompts, and returns them."""
    num = self._config.num
    rows = [row for row in ids for _ in range(num)]
    seeds = self._seeds * len(ids)
    if self._config.streamed:
      # A terminal shows one after the other.
      pairs = zip(rows, seeds, strict=True)
      return [self._generate([row], [seed])[0] for row, seed in pairs]
    answers = self._generate(rows, seeds)
    for text in answers:
      terminal.show(text)
    return answers

  def _generate(self, rows: list[list[int]], seeds: list[int]) -> list[str]:
    """The answers to a batch, printed as they come where that is asked for."""
    answers = [''] * len(rows)
    started = time.perf_counter()
    for chunk in self._generator.stream(rows, seeds):
      self.speed.tokens += chunk.token is not None
      answers[chunk.row] += chunk.text
      if self._config.streamed:
        terminal.show(chunk.text, end='')
    self.speed.seconds += time.perf_counter() - started
    if self._config.streamed:
      print(flush=True)
    return answers

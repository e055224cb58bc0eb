# SPDX-License-Identifier: Apache-2.0
"""Puts prompts to a model and prints its answers, whole or as they come.

Control characters of answers are printed visibly, also where the output is no
terminal; `answering.Answering` and the server give the exact text.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from moepeft.core import terminal
from moepeft.core.progress import Pass
from moepeft.core.types import Array, Tree
from moepeft.data.tokenizers.tokenizer import Tokenizer
from moepeft.inference.generator import GenerationConfig, Generator, keys
from moepeft.nn.scan_layers import unstack_layers

# The ids of a prompt, the last of the turns of a user and an assistant.
EncodePrompt = Callable[[Sequence[str]], list[int]]
# Tokens between looks at answers that are not printed as they come.
_EVERY = 8


@dataclasses.dataclass(frozen=True)
class ReplConfig:
  """How prompts are put and answers printed.

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
  """Tokens that were said, and the seconds it took."""

  tokens: int = 0
  seconds: float = 0.0

  def __str__(self) -> str:
    rate = self.tokens / max(self.seconds, 1e-9)
    took = f'{self.tokens} tokens in {self.seconds:.1f} s'
    return f'{took}: {rate:.1f} tokens/s, compiling included'


class ChatRepl:
  """A model that prompts are put to; `speed` counts what it says."""

  def __init__(
    self,
    model: Any,
    variables: Tree,
    words: Tokenizer,
    ask: EncodePrompt,
    settings: GenerationConfig,
    manner: ReplConfig,
  ):
    if jax.default_backend() == 'cpu':
      # There, layers in a loop are copied out of their stack at every token.
      model = model.clone(scan=False)
      variables = {key: unstack_layers(tree) for key, tree in variables.items()}
    self._variables, self._ask, self._manner = variables, ask, manner
    self._generation = Generator(model, words, settings)
    sampled = settings.sampling.temperature is not None
    self._keys = keys(manner.seed, manner.num) if sampled else None
    self.speed = Speed()

  def all(self, texts: Sequence[str]) -> None:
    """Prints the answers to prompts of their own, `num` to each.

    Raises:
      ValueError: one of them cannot be answered; none is, then.
    """
    ids = [self._ask([text]) for text in texts]
    self._generation.check(ids)
    rows = max(1, self._manner.batch_size // self._manner.num)
    done = None
    if len(ids) > rows and not self._manner.streamed:
      done = Pass(len(ids), 'answered')
    for at in range(0, len(ids), rows):
      some = ids[at : at + rows]
      self._answer(some)
      if done is not None:
        done(len(some))
    if done is not None:
      done.close()

  def each(self, texts: Iterable[str]) -> None:
    """Answers one prompt after the other; of a chat, in one conversation."""
    turns: list[str] = []
    for text in texts:
      said = self._answer([self._ask([*turns, text])])
      if self._manner.chat:
        turns += [text, said[0]]

  def _answer(self, ids: list[list[int]]) -> list[str]:
    """Prints the answers to a batch of prompts, and returns them."""
    num = self._manner.num
    rows = [row for row in ids for _ in range(num)]
    own = None
    if self._keys is not None:
      own = self._keys[np.tile(np.arange(num), len(ids))]
    if self._manner.streamed:
      # A terminal shows one after the other.
      alone = [
        None if own is None else own[i : i + 1] for i in range(len(rows))
      ]
      pairs = zip(rows, alone, strict=True)
      return [self._said([row], key)[0] for row, key in pairs]
    found = self._said(rows, own)
    for text in found:
      terminal.show(text)
    return found

  def _said(self, rows: list[list[int]], own: Array | None) -> list[str]:
    """The answers to a batch, printed as they come where that is asked for."""
    streamed, found = self._manner.streamed, [''] * len(rows)
    began = time.perf_counter()
    for news in self._generation.stream(
      self._variables, rows, own, every=1 if streamed else _EVERY
    ):
      self.speed.tokens += news.tokens
      found = [a + b for a, b in zip(found, news.texts, strict=True)]
      if streamed:
        terminal.show(news.texts[0], end='')
    self.speed.seconds += time.perf_counter() - began
    if streamed:
      print(flush=True)
    return found

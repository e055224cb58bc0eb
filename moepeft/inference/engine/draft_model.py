# SPDX-License-Identifier: Apache-2.0
"""A draft model: proposes the tokens that a smaller model generates greedily.

The engine verifies proposals as those of `prompt_lookup`: a proposal is
accepted if it is the token that would have been generated without it. Answers
are therefore those of the large model alone, greedy or sampled (Y. Leviathan et
al., 2023, arXiv:2211.17192, whose rule accepts more samples than this one; the
`assistant_model` of transformers).

The draft has no adapter. Its prefix cache keeps the tokens that were accepted,
so that a step computes hardly more than the new proposals.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

from moepeft.core.types import Tree
from moepeft.inference.adapters.fixed import FixedAdapter
from moepeft.inference.api import FAILED, Event, Finished, Request, Token
from moepeft.inference.engine.engine_core import EngineCore
from moepeft.inference.engine.limits import EngineConfig
from moepeft.inference.engine.model_runner import ModelRunner
from moepeft.inference.engine.sequence import Sequence


@dataclasses.dataclass(frozen=True)
class Draft:
  """A model that proposes tokens, without an adapter.

  Attributes:
    model: a decoder-only Flax module.
    params: its weights.
  """

  model: Any
  params: Tree

  def build_core(
    self,
    config: EngineConfig,
    device: Any,
    progress: Callable[[str, int, int], None],
  ) -> EngineCore:
    """Compiles the draft's programs.

    Args:
      config: that of the large model's engine.
      device: see `ModelRunner`.
      progress: see `ModelRunner.compile`.
    """
    length = min(config.max_model_len, self.model.config.length)
    config = dataclasses.replace(
      config,
      max_model_len=length,
      cache_lens=(),
      routing=False,
      num_assistant_tokens=0,
      prefill_first=True,
    )
    adapter = FixedAdapter(self.model)
    runner = ModelRunner(self.model, self.params, adapter, config, device)
    runner.compile(progress)
    return EngineCore(runner)


class DraftModel:
  """Proposes tokens with an engine's core of its own."""

  def __init__(self, core: EngineCore, vocab: int):
    """
    Args:
      core: that of the draft, with at least as many slots as the large model's.
      vocab: the size of the large model's vocabulary.
    """
    self._core, self._vocab = core, vocab
    self._length = core.runner.config.max_model_len

  def propose(
    self, batch: list[Sequence], counts: list[int]
  ) -> list[tuple[int, ...]]:
    """Returns up to `counts` tokens that may follow each sequence's last.

    Raises:
      RuntimeError: the draft failed.
    """
    events: list[list[Event]] = [[] for _ in batch]
    for sequence, count, row in zip(batch, counts, events, strict=True):
      request = sequence.request
      ids = (*request.prompt_ids, *sequence.answer)
      count = min(count, self._length - len(ids))
      if count > 0:
        draft = Request(
          request.id, ids, count, eos_token_ids=request.eos_token_ids
        )
        self._core.scheduler.add(Sequence(draft, row.append))
    while self._core.scheduler.has_unfinished:
      self._core.step()
    return [self._tokens(row) for row in events]

  def _tokens(self, events: list[Event]) -> tuple[int, ...]:
    for event in events:
      if isinstance(event, Finished) and event.reason == FAILED:
        raise RuntimeError(f'the draft model failed: {event.message}')
    tokens = [e.token.id for e in events if isinstance(e, Token)]
    # The embedding of the draft may have more padding.
    return tuple(itertools.takewhile(lambda t: t < self._vocab, tokens))

# SPDX-License-Identifier: Apache-2.0
"""Measures the engine on requests: ratios, side by side in one process, on CPU.

python benchmarks/serve.py [--json=FILE] [--model=smollm2] [--rounds=3]

Float32; SmolLM2-135M's shapes with random weights where no model is named.
Sides take turns; a ratio is the median over the rounds of a round's ratio.

- mixed over one: tokens/s of 8 requests of 8 adapters, over 8 of one adapter.
- continuous over static: requests of very different lengths, 8 at once, each
  place taken by the next as it ends; over batches of 8 that end with their
  longest, in the same engine.
- over `transformers`: 8 requests at once, over generate called for one after
  the other; and the time to a lone request's first token, theirs over ours.
"""

import json
import os
import queue
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import numpy as np
from absl import flags
from decode import SMOLLM2

from moepeft import config as config_lib
from moepeft.checkpoints import adapter
from moepeft.checkpoints import base as base_lib
from moepeft.config import command_line
from moepeft.inference.adapters.pool import AdapterPool
from moepeft.inference.api import Finished, Request
from moepeft.inference.engine.engine import Engine
from moepeft.inference.engine.limits import EngineConfig
from moepeft.models import weight_mapping
from moepeft.nn.initializers import param_metadata
from moepeft.peft import build
from moepeft.serve.terminal_output import StartupProgress

AT_ONCE, PROMPT, LENGTH = 8, 64, 64
METHOD = 'lora(rank=8)'
# Of answers, in tokens: most are short, some are long.
LENGTHS = (8, 12, 16, 24, 8, 16, 12, 128)
REQUESTS = 4 * AT_ONCE
SETTINGS = EngineConfig(
  slots=AT_ONCE, max_model_len=256, chunk=PROMPT, cache_lens=(256,)
)


def random_model(folder: str) -> str:
  """Writes a model of SmolLM2's shapes."""
  import torch
  from transformers import LlamaConfig, LlamaForCausalLM

  torch.manual_seed(0)
  LlamaForCausalLM(LlamaConfig(**SMOLLM2)).save_pretrained(folder)
  return folder


def save_adapters(base: base_lib.Base, folder: str) -> dict[str, str]:
  """{name: path} of AT_ONCE adapters of one form, each its own weights."""
  built = build(METHOD, base.family.sites(base.config))
  model = base.family.module(base.config, built.adapter_map)
  shapes = param_metadata(model, base_lib.example_batch())
  card = adapter.describe(
    built.method,
    'official',
    base.path,
    base.sha256,
    base.config.family,
    base.config,
  )
  adapter_paths = {}
  for i in range(AT_ONCE):
    rng = np.random.default_rng(i)
    tree = {
      path: np.float32(0.02 * rng.normal(size=shape))
      for path, (shape, _) in shapes.items()
    }
    adapter_paths[f'a{i}'] = os.path.join(folder, f'a{i}')
    adapter.save(adapter_paths[f'a{i}'], weight_mapping.unflatten(tree), card)
  return adapter_paths


def prompts(vocab: int, count: int, seed: int) -> list[tuple[int, ...]]:
  rng = np.random.default_rng(seed)
  return [tuple(map(int, rng.integers(2, vocab, PROMPT))) for _ in range(count)]


class Side:
  """Requests put to an engine all at once."""

  def __init__(self, engine):
    self._engine, self._number = engine, 0

  def run(
    self, asked: Sequence[tuple[int, ...]], lengths, adapters
  ) -> tuple[float, float]:
    """(seconds until all have ended, seconds to the first token of any)."""
    events, begun = queue.Queue(), time.perf_counter()
    for ids, length, name in zip(asked, lengths, adapters, strict=True):
      self._number += 1
      request = Request(str(self._number), ids, length, name)
      self._engine.submit(request, events.put)
    first, left = None, len(asked)
    while left:
      event = events.get(timeout=600)
      first = first or time.perf_counter() - begun
      if isinstance(event, Finished):
        if event.reason != 'length':
          raise ValueError(f'a request ended with {event.reason}')
        left -= 1
    return time.perf_counter() - begun, first


def static(side: Side, asked, lengths) -> float:
  """Seconds of batches of AT_ONCE that end with their longest answer."""
  total = 0.0
  for at in range(0, len(asked), AT_ONCE):
    longest = [max(lengths[at : at + AT_ONCE])] * AT_ONCE
    total += side.run(asked[at : at + AT_ONCE], longest, [''] * AT_ONCE)[0]
  return total


def their_side(path: str) -> Callable[[Sequence[tuple[int, ...]], int], float]:
  """(prompts, tokens of each answer) -> seconds, one after the other."""
  import torch
  from transformers import AutoModelForCausalLM

  model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

  def run(asked, length):
    begun = time.perf_counter()
    with torch.inference_mode():
      for ids in asked:
        model.generate(
          torch.tensor([ids]),
          attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
          max_new_tokens=length,
          min_new_tokens=length,
          do_sample=False,
          pad_token_id=0,
        )
    return time.perf_counter() - begun

  return run


def median(pairs: Callable[[int], tuple[float, float]], rounds: int) -> float:
  """The median ratio of what a round measures; the first is not counted."""
  pairs(-1)
  return statistics.median(a / b for a, b in map(pairs, range(rounds)))


def measure(path: str, folder: str, rounds: int) -> dict[str, float]:
  config = config_lib.default()
  config.model.path, config.method = path, 'full'
  base = base_lib.load(config.model)
  model, _ = base_lib.module(base, config)
  engine = Engine(
    model, base.params, AdapterPool(base, save_adapters(base, folder)), SETTINGS
  )
  engine.start(StartupProgress())
  side, vocab = Side(engine), base.config.vocab
  names_ = [f'a{i}' for i in range(AT_ONCE)]
  same = [LENGTH] * AT_ONCE

  def mixed(i):
    asked = [prompts(vocab, AT_ONCE, 100 + 2 * i + j) for j in (0, 1)]
    one = side.run(asked[0], same, ['a0'] * AT_ONCE)[0]
    return one, side.run(asked[1], same, names_)[0]

  def continuous(i):
    # The engine keeps what it has read, so both get prompts of their own.
    asked = [prompts(vocab, REQUESTS, 200 + 2 * i + j) for j in (0, 1)]
    lengths = LENGTHS * (REQUESTS // len(LENGTHS))
    ours = side.run(asked[0], lengths, [''] * REQUESTS)[0]
    return static(side, asked[1], lengths), ours

  ratios = {
    'mixed_over_one_adapter': median(mixed, rounds),
    'continuous_over_static': median(continuous, rounds),
  }
  theirs = their_side(path)

  def all_at_once(i):
    asked = prompts(vocab, AT_ONCE, 300 + i)
    return theirs(asked, LENGTH), side.run(asked, same, [''] * AT_ONCE)[0]

  def first_token(i):
    asked = prompts(vocab, 1, 400 + i)
    return theirs(asked, 1), side.run(asked, [1], [''])[1]

  ratios['requests_at_once_over_transformers'] = median(all_at_once, rounds)
  ratios['first_token_over_transformers'] = median(first_token, rounds)
  engine.stop()
  return ratios


def main(argv) -> None:
  del argv
  if _JSON.value:
    command_line.check_can_write(_JSON.value)
  with tempfile.TemporaryDirectory() as folder:
    path = _MODEL.value or random_model(os.path.join(folder, 'model'))
    ratios = measure(path, folder, _ROUNDS.value)
  for name, ratio in ratios.items():
    print(f'{name:36} {ratio:6.2f}')
  if _JSON.value:
    with open(_JSON.value, 'w') as f:
      json.dump({k: round(v, 3) for k, v in ratios.items()}, f)


if __name__ == '__main__':
  _JSON = flags.DEFINE_string('json', None, 'Where to write the ratios.')
  _MODEL = flags.DEFINE_string(
    'model', '', "A Llama's directory instead of random weights."
  )
  _ROUNDS = flags.DEFINE_integer('rounds', 3, 'Turns of either side.')
  command_line.run(main)

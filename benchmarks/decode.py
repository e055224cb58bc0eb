# SPDX-License-Identifier: Apache-2.0
"""Tokens/s of the engine's answers beside `transformers`' generate, on CPU, in
float32.

python benchmarks/decode.py [--json=FILE] [--model=DIR]

One process, the shapes of SmolLM2-135M with random weights (--model takes a
directory instead); both sides have the same weights, read prompts of 64
tokens and generate 64 greedily, at batch 1 and 8. Sides take turns; a ratio is
the median over the rounds of a round's ratio. Compiling is apart, and so is
moving weights: that is done once.

A token at batch 1 reads every weight once: 538 MB here, so that what a machine
reads in a second bounds its tokens.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from moepeft.checkpoints.hf import model as hf
from moepeft.config import command_line
from moepeft.inference.generator import GenerationConfig, Generator
from moepeft.models import FAMILIES

# Prompts [b, PROMPT] -> the tokens that follow them, int [b, LENGTH].
Side = Callable[[np.ndarray], np.ndarray]
BATCHES = (1, 8)
PROMPT, LENGTH = 64, 64
# config.json of HuggingFaceTB/SmolLM2-135M.
SMOLLM2 = dict(
  vocab_size=49152,
  hidden_size=576,
  num_attention_heads=9,
  num_key_value_heads=3,
  intermediate_size=1536,
  num_hidden_layers=30,
  max_position_embeddings=8192,
  rope_theta=100000.0,
  rms_norm_eps=1e-5,
  tie_word_embeddings=True,
)


def theirs(folder: str):
  """The torch model, made of random weights where no folder is given."""
  import torch
  from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

  if folder:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
  else:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMOLLM2))
  return model.eval()


def their_side(model) -> Side:
  import torch

  def generate(prompts):
    ids = torch.tensor(prompts, dtype=torch.int64)
    with torch.inference_mode():
      tokens = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=LENGTH,
        min_new_tokens=LENGTH,
        do_sample=False,
        pad_token_id=0,
      )
    return tokens[:, PROMPT:].numpy()

  return generate


def our_side(model, variables, b: int) -> Side:
  # No id is -1: no row ends.
  config = GenerationConfig(LENGTH, (-1,))
  generator = Generator(model, variables, None, config, b)
  return lambda prompts: np.array(generator.generate_ids(prompts.tolist()))


def read(torch_model):
  """(config, params) of the other side, layers stacked."""
  with tempfile.TemporaryDirectory() as folder:
    torch_model.save_pretrained(folder)
    loaded = hf.load(folder, dtype=jnp.float32)
  return loaded.config, loaded.params


def ours(torch_model):
  """(model, variables) with the weights of the other side."""
  config, params = read(torch_model)
  model = FAMILIES[config.family].module(config)
  return model, {'params': jax.tree.map(jnp.asarray, params)}


def seconds(side: Side, prompts: np.ndarray) -> float:
  begin = time.perf_counter()
  side(prompts)
  return time.perf_counter() - begin


def compare(
  sides: dict[str, Side], vocab: int, b: int, rounds: int
) -> dict[str, float]:
  """Seconds of both sides, and the median of the rounds' ratios."""
  rng = np.random.default_rng(b)

  def prompts() -> np.ndarray:
    # New ones each time: the engine keeps what it has read before.
    return rng.integers(2, vocab, (b, PROMPT)).astype(np.int32)

  first = prompts()
  tokens = [side(first) for side in sides.values()]
  agree = float(np.mean(tokens[0] == tokens[1]))
  times = []
  for i in range(rounds):
    names, ids = list(sides)[:: 1 if i % 2 else -1], prompts()
    times.append({name: seconds(sides[name], ids) for name in names})
  return {
    'ours': statistics.median(t['ours'] for t in times),
    'theirs': statistics.median(t['theirs'] for t in times),
    'ratio': statistics.median(t['theirs'] / t['ours'] for t in times),
    'agree': agree,
  }


def main(argv) -> None:
  del argv
  if _JSON.value:
    command_line.check_can_write(_JSON.value)
  torch_model = theirs(os.path.expanduser(_MODEL.value))
  model, variables = ours(torch_model)
  vocab = model.config.vocab
  size = sum(a.nbytes for a in jax.tree.leaves(variables))
  print(f'weights: {size / 1e6:.0f} MB, all read for each token')
  ratios = {}
  for b in BATCHES:
    sides = {
      'ours': our_side(model, variables, b),
      'theirs': their_side(torch_model),
    }
    rates = compare(sides, vocab, b, _ROUNDS.value)
    for name in sides:
      rate = b * LENGTH / rates[name]
      print(f'batch {b} {name:6} {rate:7.1f} tokens/s')
    print(
      f'batch {b} ratio  {rates["ratio"]:7.2f}  '
      f'({rates["agree"]:.0%} of the tokens are equal)'
    )
    key = f'tokens_per_second_over_transformers_batch{b}'
    ratios[key] = round(rates['ratio'], 3)
  if _JSON.value:
    with open(_JSON.value, 'w') as f:
      json.dump(ratios, f)


if __name__ == '__main__':
  _JSON = flags.DEFINE_string('json', None, 'Where to write the ratios.')
  _MODEL = flags.DEFINE_string(
    'model', '', "A Llama's directory instead of random weights."
  )
  _ROUNDS = flags.DEFINE_integer('rounds', 5, 'Turns of either side.')
  command_line.run(main)

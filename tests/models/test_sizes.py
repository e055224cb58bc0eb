# SPDX-License-Identifier: Apache-2.0
"""Sizes of released models against the parameters that they are known for.

The counts are those of the models' safetensors files on the Hugging Face hub
(a tied head counted once).
"""

import math

import pytest

from moepeft.checkpoints.hf import model as hf
from moepeft.models import FAMILIES

KNOWN = {
  ('llama', '7b'): 6_738_415_616,
  ('llama', '2-7b'): 6_738_415_616,
  ('llama', '2-13b'): 13_015_864_320,
  ('llama', '2-70b'): 68_976_648_192,
  ('llama', '3-8b'): 8_030_261_248,
  ('llama', '3-70b'): 70_553_706_496,
  ('llama', '3.1-8b'): 8_030_261_248,
  ('llama', '3.1-70b'): 70_553_706_496,
  ('llama', '3.2-1b'): 1_235_814_400,
  ('llama', '3.2-3b'): 3_212_749_824,
  ('llama', 'smollm2-135m'): 134_515_008,
  ('llama', 'smollm2-360m'): 361_821_120,
  ('llama', 'smollm2-1.7b'): 1_711_376_384,
  ('mistral', '7b-v0.1'): 7_241_732_096,
  ('mistral', '7b-v0.2'): 7_241_732_096,
  ('mistral', '7b-v0.3'): 7_248_023_552,
  ('qwen2', '2.5-0.5b'): 494_032_768,
  ('qwen2', '2.5-1.5b'): 1_543_714_304,
  ('qwen2', '2.5-3b'): 3_085_938_688,
  ('qwen2', '2.5-7b'): 7_615_616_512,
  ('qwen3', '0.6b'): 596_049_920,
  ('qwen3', '1.7b'): 1_720_574_976,
  ('qwen3', '4b'): 4_022_468_096,
  ('qwen3', '8b'): 8_190_735_360,
  ('gemma', '2b'): 2_506_172_416,
  ('gemma', '7b'): 8_537_680_896,
  ('gemma', '2-2b'): 2_614_341_888,
  ('gemma', '2-9b'): 9_241_705_984,
  ('gemma', '2-27b'): 27_227_128_320,
  ('gpt2', 'small'): 124_439_808,
  ('gpt2', 'medium'): 354_823_168,
  ('gpt2', 'large'): 774_030_080,
  ('gpt2', 'xl'): 1_557_611_200,
}
# With the pooler and without the head for masked tokens.
ENCODERS = {
  ('bert', 'minilm-l6'): 22_713_216,
  ('bert', 'base'): 109_482_240,
  ('bert', 'large'): 335_141_888,
}


def parameters(config):
  """The parameters that the rules name; contract tests compare the model."""
  expected = hf.model_entries(config)
  return sum(math.prod(entry.shape) for entry in expected)


@pytest.mark.parametrize('family, size', KNOWN | ENCODERS)
def test_released_sizes_have_their_parameters(family, size):
  known = KNOWN | ENCODERS
  assert parameters(FAMILIES[family].config(size)) == known[family, size]


def test_every_released_size_is_known():
  sizes = {
    (name, size)
    for name, family in FAMILIES.items()
    if name != 't5'
    for size in family.sizes
  }
  released = {pair for pair in sizes if pair[1] != 'tiny'}
  assert released == set(KNOWN | ENCODERS)


# What the released models' own config.json say, and not our table: eps, RoPE's
# theta (0 for none), length, whether the head is tied, heads of keys and
# values, vocabulary. Llama 1's eps was 1e-5 in its code and 1e-6 in what was
# released (ggml-org/llama.cpp#2384, Lightning-AI/lit-llama#339). Of Qwen2.5
# those of the base models, which at 1.5B and 7B go further than the instructed.
SAID = {
  ('llama', '7b'): (1e-6, 10_000, 2048, False, 32, 32000),
  ('llama', '2-7b'): (1e-5, 10_000, 4096, False, 32, 32000),
  ('llama', '2-13b'): (1e-5, 10_000, 4096, False, 40, 32000),
  ('llama', '2-70b'): (1e-5, 10_000, 4096, False, 8, 32000),
  ('llama', '3-8b'): (1e-5, 500_000, 8192, False, 8, 128256),
  ('llama', '3-70b'): (1e-5, 500_000, 8192, False, 8, 128256),
  ('llama', '3.1-8b'): (1e-5, 500_000, 131072, False, 8, 128256),
  ('llama', '3.1-70b'): (1e-5, 500_000, 131072, False, 8, 128256),
  ('llama', '3.2-1b'): (1e-5, 500_000, 131072, True, 8, 128256),
  ('llama', '3.2-3b'): (1e-5, 500_000, 131072, True, 8, 128256),
  ('llama', 'smollm2-135m'): (1e-5, 100_000, 8192, True, 3, 49152),
  ('llama', 'smollm2-360m'): (1e-5, 100_000, 8192, True, 5, 49152),
  ('llama', 'smollm2-1.7b'): (1e-5, 130_000, 8192, True, 32, 49152),
  ('mistral', '7b-v0.1'): (1e-5, 10_000, 32768, False, 8, 32000),
  ('mistral', '7b-v0.2'): (1e-5, 1_000_000, 32768, False, 8, 32000),
  ('mistral', '7b-v0.3'): (1e-5, 1_000_000, 32768, False, 8, 32768),
  ('qwen2', '2.5-0.5b'): (1e-6, 1_000_000, 32768, True, 2, 151936),
  ('qwen2', '2.5-1.5b'): (1e-6, 1_000_000, 131072, True, 2, 151936),
  ('qwen2', '2.5-3b'): (1e-6, 1_000_000, 32768, True, 2, 151936),
  ('qwen2', '2.5-7b'): (1e-6, 1_000_000, 131072, False, 4, 152064),
  ('qwen3', '0.6b'): (1e-6, 1_000_000, 40960, True, 8, 151936),
  ('qwen3', '1.7b'): (1e-6, 1_000_000, 40960, True, 8, 151936),
  ('qwen3', '4b'): (1e-6, 1_000_000, 40960, True, 8, 151936),
  ('qwen3', '8b'): (1e-6, 1_000_000, 40960, False, 8, 151936),
  ('gemma', '2b'): (1e-6, 10_000, 8192, True, 1, 256000),
  ('gemma', '7b'): (1e-6, 10_000, 8192, True, 16, 256000),
  ('gemma', '2-2b'): (1e-6, 10_000, 8192, True, 4, 256000),
  ('gemma', '2-9b'): (1e-6, 10_000, 8192, True, 8, 256000),
  ('gemma', '2-27b'): (1e-6, 10_000, 8192, True, 16, 256000),
  ('gpt2', 'small'): (1e-5, 0, 1024, True, 12, 50257),
  ('gpt2', 'medium'): (1e-5, 0, 1024, True, 16, 50257),
  ('gpt2', 'large'): (1e-5, 0, 1024, True, 20, 50257),
  ('gpt2', 'xl'): (1e-5, 0, 1024, True, 25, 50257),
}
# RoPE's kind, factor and original length of those that scale it.
SCALED = {
  ('llama', '3.1-8b'): ('llama3', 8, 8192, 1, 4),
  ('llama', '3.1-70b'): ('llama3', 8, 8192, 1, 4),
  ('llama', '3.2-1b'): ('llama3', 32, 8192, 1, 4),
  ('llama', '3.2-3b'): ('llama3', 32, 8192, 1, 4),
}
# Tokens that are seen, of which layers, and what scales queries beside the
# size of heads.
WINDOWS = {
  ('mistral', '7b-v0.1'): (4096, (), 128**-0.5),
  ('gemma', '2-2b'): (4096, (True, False) * 13, 256**-0.5),
  ('gemma', '2-9b'): (4096, (True, False) * 21, 256**-0.5),
  ('gemma', '2-27b'): (4096, (True, False) * 23, 144**-0.5),
}


def test_every_known_size_is_said():
  assert set(SAID) == set(KNOWN)


@pytest.mark.parametrize('family, size', SAID)
def test_released_sizes_are_what_their_files_say(family, size):
  c = FAMILIES[family].config(size)
  theta = c.rope.theta if c.positions == 'rope' else 0
  actual = (c.eps, theta, c.length, c.tied, c.kv_heads, c.vocab)
  assert actual == SAID[family, size]
  rope = (c.rope.kind, c.rope.factor, c.rope.original, c.rope.low, c.rope.high)
  if (family, size) in SCALED:
    assert rope == SCALED[family, size]
  else:
    assert rope[:2] == ('default', 1)
  windows = (c.window, c.windowed, c.scale or c.head_dim**-0.5)
  usual = (0, (), c.head_dim**-0.5)
  assert windows == WINDOWS.get((family, size), usual)


@pytest.mark.parametrize('family, size', KNOWN)
def test_released_sizes_are_said_and_read_again(family, size):
  config = FAMILIES[family].config(size)
  fields = FAMILIES[family].hf.to_fields(config)
  again = FAMILIES[family].hf.from_fields(fields, config.tied)
  assert (again.rope, again.eps) == (config.rope, config.eps)
